"""Layers that compute their weight or pad their input: quantized as what they compute, known by trying them."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from lightnings import Callback
from models import Net, keeper, loader, samples, trainer
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune, spectral_norm, weight_norm

from tinyq_lightning import QuantizedCheckpointMixin, TinyQCallback, load_quantized, quantize, quantized
from tinyq_lightning.file import Archive, FloatFile, quantize_file, write_checkpoint
from tinyq_lightning.layers import QuantizedConv, float_weight, kind_of
from tinyq_lightning.layers.own_forward import own_forward
from tinyq_lightning.spec import as_spec


class Standardized(nn.Conv2d):
    """As timm's ScaledStdConv2d."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale, self.eps = self.weight[0].numel() ** -0.5, 1e-6

    def forward(self, x):
        rows, factors = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        rows = functional.batch_norm(rows, None, None, weight=factors, training=True, momentum=0.0, eps=self.eps)
        return functional.conv2d(
            x, rows.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


def padded(x, layer):
    """As TensorFlow's SAME."""
    moves = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    more = [max((math.ceil(n / step) - 1) * step + (width - 1) * gap + 1 - n, 0) for n, width, step, gap in moves]
    return functional.pad(x, [end for each in reversed(more) for end in (each // 2, each - each // 2)])


class Same(nn.Conv2d):
    """As timm's Conv2dSame."""

    def forward(self, x):
        return functional.conv2d(
            padded(x, self), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups
        )


class StandardizedSame(Standardized):
    def forward(self, x):
        return super().forward(padded(x, self))


class InAChild(nn.Conv2d):
    """As efficientnet_pytorch's Conv2dStaticSamePadding."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        x = self.static_padding(x)
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Pad(nn.Module):
    def __init__(self, size):
        super().__init__()

        def ends(size):
            return (size - 1, 0)

        self.size, self.ends = size, ends

    def forward(self, x):
        return functional.pad(x, self.ends(self.size))


class Causal(nn.Conv1d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad = Pad(self.kernel_size[0])

    def forward(self, x):
        return super().forward(self.pad(x))


class Cut(nn.Conv1d):
    """Causal too."""

    def forward(self, x):
        return super().forward(x)[..., : -self.padding[0]]


class Reflected(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(functional.pad(x, (1, 1, 2, 2), mode="reflect"), self.weight, self.bias)


class Flipped(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight.flip(-1), bias)


class Masked(nn.Linear):
    """As in MADE."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones(self.weight.shape).tril())

    def forward(self, x):
        return functional.linear(x, self.weight * self.mask, self.bias)


MODULES = {
    "standardized": (lambda: Standardized(8, 16, 3, padding=1), {"gain", "weight"}),
    "grouped": (lambda: Standardized(8, 8, 3, groups=4, stride=2), {"gain", "weight"}),
    "same": (lambda: Same(8, 16, 3, stride=2), set()),
    "same, depthwise": (lambda: Same(8, 8, 5, stride=2, groups=8), set()),
    "same, odd": (lambda: Same(8, 6, (3, 4), stride=(2, 3), dilation=(1, 2), bias=False), set()),
    "standardized same": (lambda: StandardizedSame(8, 16, 7, stride=2), {"gain", "weight"}),
    "a child pads": (lambda: InAChild(8, 16, 3, stride=2), set()),
    "causal": (lambda: Causal(8, 8, 3), set()),
    "cut": (lambda: Cut(8, 8, 3, padding=4, dilation=2), set()),
    "reflected": (lambda: Reflected(8, 8, 3), set()),
    "flipped": (lambda: Flipped(8, 8, 3), {"weight"}),
    "masked": (lambda: Masked(8, 12), {"mask", "weight"}),
    "bfloat16": (lambda: StandardizedSame(8, 16, 3, stride=2).bfloat16(), {"gain", "weight"}),
}


def inputs(layer, more):
    """A batch whose sizes go through all remainders by a stride."""
    dims = len(getattr(layer, "kernel_size", ()))
    return torch.randn(2, 8, *[9 + more + dim for dim in range(dims)], dtype=next(layer.parameters()).dtype)


@pytest.mark.parametrize("name", MODULES)
def test_a_layer_becomes_int8_with_the_weight_that_it_computes_and_its_own_padding(name):
    make, sources = MODULES[name]
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    layer, state = model[0], {key: value.clone() for key, value in model.state_dict().items()}
    calls = [(x := inputs(layer, more), model(x)) for more in range(5)]

    with quantized(model, "w8a32") as plan:
        (decision,) = plan
        assert decision.method == "w8a32"
        assert all(source in decision.reason for source in sources)
        assert ("is fixed as" in decision.reason) == bool(sources)
        assert set(model.state_dict()) == {f"0.{key}" for key in ("int8_weights", "scales")} | (
            {"0.bias"} if layer.bias is not None else set()
        )
        weight = model[0].weight.double()
        for x, wanted in calls:
            got = model(x)
            assert got.shape == wanted.shape
            assert (got - wanted).norm() < 0.02 * wanted.norm()
        stands_for = copy.deepcopy(model)
    assert model[0] is layer
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (float_weight(layer).double() - weight).norm() < 0.01 * weight.norm()
    assert all(torch.equal(model(x), wanted) for x, wanted in calls)
    assert stands_for(calls[0][0]).shape == calls[0][1].shape


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("bfloat16", "masked")])
def test_rows_of_the_weight_times_what_they_are_multiplied_with_is_the_output(name):
    layer = MODULES[name][0]()
    kind, x = kind_of(layer), inputs(layer, 2)
    rows = kind.sizes(layer)["weight"].to_rows(float_weight(layer)).unflatten(0, (kind.row_parts(layer), -1))
    product = (torch.cat(list(kind.row_inputs(layer, x)), 1) @ rows.transpose(1, 2)).transpose(0, 1).flatten(1)
    wanted = kind.features(layer, layer(x)) - (0 if layer.bias is None else layer.bias)
    assert torch.allclose(product, wanted, atol=1e-5)


def of_any_size():
    model = nn.Sequential(Same(3, 8, 3, stride=2), nn.ReLU(), StandardizedSame(8, 8, 4, stride=3)).eval()
    quantize(model)
    return model, [torch.randn(2, 3, height, 18) for height in (31, 32, 33, 40, 41)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_padding_by_the_size_of_the_input_is_right_in_graphs_of_any_size(dynamic):
    model, inputs = of_any_size()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=dynamic, backend="eager")
    traced = torch.jit.trace(model, inputs[0])
    for x in inputs:
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
        assert torch.allclose(traced(x), model(x), atol=1e-5)


@pytest.mark.skipif(torch.__version__.startswith("2.7"), reason="torch 2.7 exports no sizes that are computed so")
@torch.no_grad()
def test_padding_by_the_size_of_the_input_is_right_in_what_is_exported():
    model, inputs = of_any_size()
    heights = {2: torch.export.Dim("height", min=30)}
    exported = torch.export.export(copy.deepcopy(model), (inputs[0],), dynamic_shapes=(heights,)).module()
    for x in inputs:
        assert torch.allclose(exported(x), model(x), atol=1e-5)


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class ByInput(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight * x.mean(), self.bias)


class DropsConnections(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, functional.dropout(self.weight, 0.5, self.training), self.bias)


class RoundsInput(nn.Conv2d):
    def forward(self, x):
        return super().forward((x * 16).round() / 16)


class WithoutAutocast(nn.Conv2d):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class Writes(nn.Conv2d):
    def forward(self, x):
        self.weight.data *= 0.5
        return super().forward(x)


class WritesInAFunction(nn.Conv2d):
    def forward(self, x):
        setattr(self, "calls", getattr(self, "calls", 0) + 1)  # noqa: B010  # so that no instruction tells of it
        return super().forward(x)


class PadsOddWidths(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.pad(x, (0, 1)) if x.shape[-1] % 2 else x)


class PadsTheOtherEnd(Same):
    """With the odd one at the beginning."""

    def forward(self, x):
        return super().forward(x.flip(-1, -2)).flip(-1, -2)


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


class Detached(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.detach())


class HoldsMore(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.more = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return super().forward(x * 1)


class ScalesItsOutput(HoldsMore):
    def forward(self, x):
        return super().forward(x) * self.more[0]


FLOAT = (
    *(Activated, ByInput, DropsConnections, RoundsInput, WithoutAutocast, Writes, WritesInAFunction, PadsOddWidths),
    *(PadsTheOtherEnd, Twice, Detached, HoldsMore, ScalesItsOutput),
)


@pytest.mark.parametrize("kind", FLOAT, ids=lambda kind: kind.__name__)
def test_what_does_anything_else_stays_float_and_is_not_changed_by_being_tried(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(4, 8, 3), nn.Conv2d(8, 4, 1))
    state, held, random = copy.deepcopy(model.state_dict()), dict(vars(model[0])), torch.get_rng_state()
    reasons = [decision.reason for decision in quantize(model)]
    wanted = "it holds more besides" if kind is HoldsMore else "has a forward of its own"
    assert wanted in reasons[0]
    assert isinstance(model[1], QuantizedConv)
    assert vars(model[0]) == held
    assert all(torch.equal(value, state[f"0.{name}"]) for name, value in model[0].state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


class Clamps(nn.Linear):
    """A weight beyond 1 shows it, and a stand-in has none."""

    def forward(self, x):
        return functional.linear(x, self.weight.clamp(-1, 1), self.bias)


class ClampsTheBias(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias.clamp(-1, 1))


class ClampsInPlace(nn.Linear):
    def forward(self, x):
        self.weight.data.clamp_(-1, 1)
        return super().forward(x)


class StandardizesManyChannels(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True) if self.in_channels > 16 else self.weight
        return self._conv_forward(x, weight, self.bias)


class PoolsLargeImages(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.avg_pool2d(x, 3, 1, 1) if x.shape[-1] > 32 else x)


class HalvesSingleSamples(nn.Linear):
    def forward(self, x):
        return super().forward(x * 0.5 if len(x) == 1 else x)


class Flattens(nn.Linear):
    def forward(self, x):
        return super().forward(x.transpose(1, 2) if x.shape[-1] != self.in_features else x)


class MasksIfToldTo(nn.Linear):
    """By a tensor that is no buffer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.mask = torch.rand(self.weight.shape) > 0.5

    def forward(self, x):
        mask = getattr(self, "mask", None)
        return functional.linear(x, self.weight if mask is None else self.weight * mask, self.bias)


BY_VALUES_OR_SIZES = (
    *(Clamps, ClampsTheBias, ClampsInPlace, StandardizesManyChannels, PoolsLargeImages, HalvesSingleSamples),
    *(Flattens, MasksIfToldTo),
)


@pytest.mark.parametrize("kind", BY_VALUES_OR_SIZES, ids=lambda kind: kind.__name__)
def test_what_shows_only_by_the_layers_own_values_and_sizes_stays_float(kind):
    layer = kind(32, 24) if issubclass(kind, nn.Linear) else kind(32, 24, 3)
    with torch.no_grad():
        layer.weight.mul_(40)
        layer.bias.mul_(40)
    state = copy.deepcopy(layer.state_dict())
    (decision, _) = quantize(nn.Sequential(layer, nn.Linear(24, 4)))
    assert (decision.method, decision.reason) == ("float", f"{kind.__name__} has a forward of its own")
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


class DropsIn(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.drop(x))


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_that_draws_in_training_stays_float_whatever_mode_it_is_in(training):
    (dropping, _) = quantize(nn.Sequential(DropsIn(4, 8, 3), nn.Linear(2, 2)).train(training))
    assert dropping.method == "float"


def test_layers_that_differ_in_values_alone_are_tried_once():
    assert own_forward(Standardized(32, 32, 3)) is own_forward(Standardized(32, 32, 3))


def hooked(make, by):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return by(make())


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


HOOKED = {
    "weight_norm": (lambda: hooked(lambda: nn.Conv1d(8, 8, 3), weight_norm), {"weight_g", "weight_v"}),
    "weight_norm transposed": (lambda: hooked(lambda: nn.ConvTranspose1d(8, 6, 4, 2), weight_norm), {"weight_g"}),
    "weight_norm linear": (lambda: hooked(lambda: nn.Linear(8, 8), weight_norm), {"weight_v"}),
    "spectral_norm": (lambda: hooked(lambda: nn.Conv2d(8, 8, 3), spectral_norm), {"weight_orig", "weight_u"}),
    "pruned": (lambda: hooked(lambda: nn.Conv2d(8, 8, 3), pruned), {"weight_orig", "weight_mask"}),
    "pruned linear": (lambda: hooked(lambda: nn.Linear(8, 8), pruned), {"weight_mask"}),
}


@pytest.mark.parametrize("name", HOOKED)
def test_a_weight_that_a_hook_of_torch_computes_is_quantized_as_it_is_computed(name):
    make, sources = HOOKED[name]
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    calls = []
    model[0].register_forward_pre_hook(lambda module, args: calls.append(type(module)))
    x = inputs(model[0], 0)
    wanted, state, zeros = model(x), set(model.state_dict()), model[0].weight == 0
    with quantized(model, "w8a32") as plan:
        (decision,) = plan
        assert decision.method == "w8a32"
        assert all(source in decision.reason for source in sources)
        assert (model(x) - wanted).norm() < 0.02 * wanted.norm()
        assert set(model.state_dict()) == {"0.int8_weights", "0.scales", "0.bias"}
        assert bool((model[0].weight[zeros] == 0).all())
        assert calls[-1] is type(model[0])
    assert torch.equal(model(x), wanted)
    assert set(model.state_dict()) == state


def test_layers_that_compute_other_weights_from_one_do_not_share_its_codes():
    model = nn.Sequential(Standardized(4, 4, 3), Standardized(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[2].weight = model[0].weight
    told = "weight, of which layers compute weights of their own"
    assert [each.reason.startswith("tied to ") and told in each.reason for each in quantize(model)] == [True] * 3
    assert [type(layer) for layer in model] == [Standardized, Standardized, nn.Conv2d]


class Causal1d(Causal):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3)

    def forward(self, x):
        return super().forward(x)


class Images(Net):
    """Convolutions on points that are taken for images of three by three."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(Standardized(1, 8, 3, padding=1), nn.ReLU(), StandardizedSame(8, 8, 3, stride=2), nn.ReLU()),
            *(nn.Flatten(2), Causal1d(8, 8)),
        )
        self.head = nn.Sequential(Masked(8, 8), hooked(lambda: nn.Linear(8, 4), weight_norm))

    def forward(self, x):
        images = functional.pad(x.flatten(1), (0, 1)).view(len(x), 1, 3, 3)
        return self.head(self.body(images).mean(-1))


class Restored(QuantizedCheckpointMixin, Images):
    pass


def test_files_of_a_training_load_bit_equal_by_every_door(tmp_path):
    callback, keep = TinyQCallback("w8a32", report="full"), keeper(tmp_path)
    trainer(tmp_path, callback, keep).fit(Images(), loader(), loader(seed=1))
    assert callback.error is None
    assert all(decision.method == "w8a32" for decision in callback.plan)
    (path,), x = map(str, tmp_path.glob("w8a32-*.ckpt")), samples(32, 3).tensors[0]

    loaded = load_quantized(path, Images).eval()
    wanted, state = loaded(x), loaded.state_dict()
    assert not [name for name in state if name.endswith(("gain", "mask", "weight_g", "weight_v", ".weight"))]

    class Keep(Callback):
        def on_test_end(self, trainer, module):
            self.outputs, self.names = module(x), set(module.state_dict())

    kept, module = Keep(), Images()
    run = trainer(tmp_path, TinyQCallback("w8a32", when="test_start"), kept)
    with pytest.warns(UserWarning, match=r"body\.0.*cannot be given the one of the quantized file"):
        run.test(module, loader(seed=2), ckpt_path=path, verbose=False)
    assert torch.equal(kept.outputs, wanted)
    assert kept.names == set(state)

    with Archive(keep.best_model_path) as source:
        assert FloatFile(source, Images, {}).loaded  # for the hook of weight_norm
        content, _ = quantize_file(source, Images, as_spec("w8a32"), {})
    write_checkpoint(content, str(tmp_path / "streamed.ckpt"))
    for other in (
        Restored.load_from_checkpoint(path),
        load_quantized(str(tmp_path / "streamed.ckpt"), Images),
        copy.deepcopy(loaded),
    ):
        assert torch.equal(other.eval()(x), wanted)
        assert other.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_a_file_is_quantized_by_layer_without_the_float_model_in_memory(tmp_path):
    def make():
        return nn.Sequential(StandardizedSame(4, 8, 3, stride=2), nn.ReLU(), Same(8, 8, 3, stride=2), Flipped(8, 4, 1))

    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 4, 13, 14)
    torch.save(model.state_dict(), tmp_path / "float.pt")
    with Archive(str(tmp_path / "float.pt")) as source:
        assert not FloatFile(source, make, {}).loaded
        content, coverage = quantize_file(source, make, as_spec("w8a8"), {})
    write_checkpoint(content, str(tmp_path / "int8.ckpt"))
    quantize(model, "w8a8")
    assert coverage.quantized_layers == 3
    assert torch.equal(load_quantized(str(tmp_path / "int8.ckpt"), make).eval()(x), model(x))
