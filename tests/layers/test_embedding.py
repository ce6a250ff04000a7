"""Look-ups in int8 rows, multiplied by a number or not."""

from __future__ import annotations

import torch
from torch import fx, nn

from tinyq_lightning import quantize, quantized
from tinyq_lightning.layers import QuantizedEmbedding


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def __init__(self, persistent):
        super().__init__(10, 8)
        self.register_buffer("factor", torch.tensor(3.0), persistent=persistent)

    def forward(self, input):
        return super().forward(input) * self.factor


def tied(persistent):
    model = nn.Sequential(Scaled(persistent), nn.Linear(8, 10, bias=False))
    model[1].weight = model[0].weight
    return model


def test_a_traced_look_up_is_scaled_once():
    model, words = tied(persistent=False), torch.arange(10)
    wanted = model[0](words)
    quantize(model)
    assert isinstance(model[0], QuantizedEmbedding)
    assert torch.allclose(model[0](words), wanted, atol=0.05)
    assert torch.equal(fx.symbolic_trace(model)(words), model(words))


def test_a_factor_that_a_file_may_change_keeps_the_layers_float():
    with quantized(tied(persistent=True), "w8a32") as plan:
        assert [decision.method for decision in plan] == ["float", "float"]
        assert plan.decisions[0].reason == "it holds factor besides its weight"
