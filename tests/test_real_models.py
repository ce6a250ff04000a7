"""Pretrained models lose next to nothing: examples/real_models run whole."""

from __future__ import annotations

import runpy
from pathlib import Path
from statistics import median

import pytest
import torch

from tinyq_lightning import quantize
from tinyq_lightning.plan.plan import state_bytes

SCRIPT = Path(__file__).parents[1] / "examples" / "real_models"
# points of the score: a probe of 200 encoder moves by 0.005 for each, and two may move either way
ALLOWED = {"w8a32": 0.002, "w8a16": 0.0025, "w8a8": 0.005, "w4a32": 0.01}
MORE_ALLOWED = {"polarity": 0.01, "median cents off": 0.2}
FOUR_BITS = {("w4a32", "word accuracy"): 0.04, ("w4a32", "Lee rho"): 0.04, ("w4a32", "median cents off"): 1.0}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of packages that are not ours
@pytest.mark.parametrize("name", ["encoder", "dna", "digits", "phonemes", "pitch"])
def test_a_pretrained_model_keeps_its_scores_and_loses_its_weight(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(SCRIPT)
    results = runpy.run_path(str(SCRIPT))["measure"](name, ["float", *ALLOWED])
    wanted, size, *_ = results["float"]
    more_allowed = {**MORE_ALLOWED, **FOUR_BITS}
    for method, allowed in ALLOWED.items():
        scores, quantized_size, *_ = results[method]
        for score, value in wanted.items():
            most = more_allowed.get((method, score), more_allowed.get(score, allowed))
            assert abs(scores[score] - value) <= most + 1e-9, (method, score)
        assert quantized_size < (0.14 if method == "w4a32" else 0.26) * size


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of packages that are not ours
@pytest.mark.parametrize("name", ["encoder", "dna", "digits", "phonemes"])
def test_calibration_leaves_less_error_in_each_layer_and_scores_that_are_as_good(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(SCRIPT)
    left, (wanted, plain, calibrated), _ = runpy.run_path(str(SCRIPT / "calibrated.py"))["measure"](name, "w4a32")
    assert median(left) < 0.85
    assert max(left) <= 1
    for score, value in calibrated.items():
        assert value >= min(wanted[score], plain[score]) - 0.01, score


WORDS = 64
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of packages that are not ours
@pytest.mark.parametrize(
    ("model", "config", "settings", "tied"),
    [
        ("GPT2LMHeadModel", "GPT2Config", GPT2, ["transformer.wte", "lm_head"]),
        ("LlamaForCausalLM", "LlamaConfig", {**BERT, "tie_word_embeddings": True}, ["model.embed_tokens", "lm_head"]),
        ("BertForMaskedLM", "BertConfig", BERT, ["bert.embeddings.word_embeddings", "cls.predictions.decoder"]),
        (
            "T5ForConditionalGeneration",
            "T5Config",
            {**T5, "decoder_start_token_id": 0},
            ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
        ),
    ],
    ids=["gpt2", "llama", "bert", "t5"],
)
def test_the_architectures_of_transformers_work_with_their_ties(model, config, settings, tied):
    import transformers

    net = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    words = torch.randint(WORDS, (2, 9))
    given = {"input_ids": words} | ({"labels": words} if config == "T5Config" else {})
    with torch.no_grad():
        wanted, size = net(**given).logits, state_bytes(net.state_dict())
        plan = quantize(net, "w8a32")
        got = net(**given).logits
    assert {decision.method for decision in plan} == {"w8a32"}
    assert len({net.get_submodule(name).int8_weights.data_ptr() for name in tied}) == 1
    assert ((got - wanted).norm() / wanted.norm()) < 0.03
    assert state_bytes(net.state_dict()) == size - sum(decision.float_bytes - decision.bytes for decision in plan)
