"""What the plan says of memory is what the layers hold, once they were called."""

import pytest
import torch
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.kernels import has_int8_product


class Tied(nn.Module):
    """A large table that is the head's weight too."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(4000, 512), nn.Linear(512, 4000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, rows):
        return self.head(self.embed(torch.arange(rows)))


class TwoHeads(nn.Module):
    """Two layers that multiply by the same weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1024, 1024), nn.Linear(1024, 1024)
        self.second.weight = self.first.weight

    def forward(self, rows):
        x = torch.ones(rows, 1024)
        return self.first(x) + self.second(x)


class Cross(nn.Module):
    """Attention from one sequence to another, which takes the projection in parts."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(1024, 8, batch_first=True)

    def forward(self, rows):
        x = torch.ones(1, rows, 1024)
        return self.attention(x, x + 1, x + 1)[0]


def held_bytes(model):
    """Bytes of all tensors of the model and of the forms that kernels have made."""
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer is not None)]
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    layers = [each for module in model.modules() for each in (module, *parts(module))]
    forms = {id(form): form for each in layers for form in getattr(each, "_forms", {}).values()}
    return sum(memory.values()) + sum(form.bytes_a_weight * form.codes().numel() for form in forms.values())


def parts(module):
    return [layer for *_, layer in getattr(module, "_parts", {}).values()]


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
@pytest.mark.parametrize("kernel", ["auto", "compact"])
@pytest.mark.parametrize("network", [Tied, TwoHeads, Cross])
def test_the_plan_counts_what_layers_that_share_codes_hold(network, kernel, method):
    if network is Cross and not has_int8_product():
        pytest.skip("the parts of a projection are float16 copies beside the codes of the whole")
    model = network().eval()
    plan = quantize(model, {"method": method, "kernel": kernel})
    with torch.no_grad():
        for rows in (1, 40):
            model(rows)
    counted = sum(each.memory_bytes for each in plan)
    assert held_bytes(model) == pytest.approx(counted, rel=0.01)
