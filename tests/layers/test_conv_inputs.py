import pytest
import torch
from torch import nn

from tinyq_lightning.layers import conv_inputs, kind_of

LAYERS = {
    "plain": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "moved": lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    "circular": lambda: nn.Conv1d(4, 4, 5, padding="same", padding_mode="circular", groups=4),
    "reflect": lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"),
    "three": lambda: nn.Conv3d(2, 3, 2),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
    "transposed, cropped": lambda: nn.ConvTranspose2d(3, 4, 2, padding=1, stride=2),
    "transposed, dilated": lambda: nn.ConvTranspose1d(3, 4, 4, stride=3, padding=2, dilation=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_the_weight_times_what_they_are_multiplied_with_is_the_output(name, monkeypatch):
    monkeypatch.setattr(conv_inputs, "_BLOCK_VALUES", 1)  # so that there are several blocks
    layer = LAYERS[name]()
    kind, dims = kind_of(layer), len(layer.kernel_size)
    x = torch.randn(3, layer.in_channels, *[7] * dims)

    blocks = list(kind.row_inputs(layer, x))

    assert len(blocks) > 1
    inputs = torch.cat(blocks, 1)
    rows = kind.sizes(layer)["weight"].to_rows(layer.weight).unflatten(0, (kind.row_parts(layer), -1))
    product = (inputs @ rows.transpose(1, 2)).transpose(0, 1).flatten(1)
    expected = kind.features(layer, layer(x)) - layer.bias
    assert torch.allclose(product, expected, atol=1e-5)


def test_one_sample_without_a_batch():
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 5, 5)
    (inputs,) = kind_of(layer).row_inputs(layer, x)
    assert torch.equal(inputs, next(kind_of(layer).row_inputs(layer, x[None])))
