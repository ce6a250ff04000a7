"""Three pretrained models lose next to nothing: examples/real_models.py run whole."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "real_models.py"
# points of the score: a probe of 200 sentences moves by 0.005 for each
ALLOWED = {"w8a32": 0.002, "w8a16": 0.002, "w8a8": 0.005}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of packages that are not ours
@pytest.mark.parametrize("name", ["text", "dna", "digits"])
def test_a_pretrained_model_keeps_its_scores_and_loses_its_weight(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location("real_models", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "real_models", script)  # dataclasses look their module up
    spec.loader.exec_module(script)
    results = script.measure(script.MODELS[name])
    wanted, size, _ = results["float"]
    for method, allowed in ALLOWED.items():
        scores, quantized_size, _ = results[method]
        for score, value in wanted.items():
            assert abs(scores[score] - value) <= (0.005 if score == "polarity" else allowed) + 1e-9, (method, score)
        assert quantized_size < {"text": 0.65, "dna": 0.26, "digits": 0.45}[name] * size
