"""Recurrent layers of classes derived from torch's: their own code runs, on float weights that the codes expand to."""

from __future__ import annotations

import abc
import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tinyq_lightning import export, load_quantized, quantize, quantized
from tinyq_lightning.file import Archive, quantize_file, write_checkpoint
from tinyq_lightning.layers import QuantizedGRU, QuantizedLSTM, QuantizedLSTMCell
from tinyq_lightning.spec import as_spec

SIZE = 24


class Flexible(abc.ABC, nn.RNNBase):
    """Takes lengths, as the classes of pytorch-forecasting do."""

    @abc.abstractmethod
    def first_state(self, x):
        pass

    def forward(self, x, hx=None, lengths=None):
        if lengths is None:
            return super().forward(x, hx=hx)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False, batch_first=self.batch_first)
        out, state = super().forward(packed, hx=self.first_state(x) if hx is None else hx)
        return pad_packed_sequence(out, batch_first=self.batch_first)[0], state


class FlexibleLSTM(Flexible, nn.LSTM):
    def first_state(self, x):
        zeros = x.new_zeros(self.num_layers, len(x), self.hidden_size)
        return zeros + 0.1, zeros


class Scaled(nn.GRU):
    factor = 2

    def __init__(self, *args, portion=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.portion = portion

    @property
    def gain(self):
        return self.factor * self.portion

    @staticmethod
    def halved(x):
        return x / 2

    def forward(self, input, hx=None):
        out, state = super().forward(self.gain * self.halved(input), hx)
        return out * self.weight_hh_l0.norm(), state


class Kept(nn.LSTMCell):
    """Some of the old cell is kept."""

    def forward(self, input, hx=None):
        hidden, cell = super().forward(input, hx)
        return hidden, cell if hx is None else 0.9 * cell + 0.1 * hx[1]


class Named(nn.GRU):
    """Has a method, and torch's forward."""

    def state_sizes(self):
        return self.num_layers, self.hidden_size


def flexible():
    return FlexibleLSTM(SIZE, SIZE, num_layers=2, batch_first=True)


X = torch.randn(3, 5, SIZE, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([2, 5, 1])
CASES = {
    "lengths": (flexible, QuantizedLSTM, lambda layer: layer(X, lengths=LENGTHS)[0]),
    "without lengths": (flexible, QuantizedLSTM, lambda layer: layer(x=X)[0]),
    "scaled": (lambda: Scaled(SIZE, SIZE, portion=0.7), QuantizedGRU, lambda layer: layer(X)[0]),
    "cell": (lambda: Kept(SIZE, SIZE), QuantizedLSTMCell, lambda layer: layer(X[0], (X[1], X[2]))[1]),
    "method": (lambda: Named(SIZE, SIZE), QuantizedGRU, lambda layer: layer(X)[0] * sum(layer.state_sizes())),
}


class Net(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.layer, self.case, self.head = CASES[case][0](), case, nn.Linear(SIZE, 8)

    def forward(self):
        return self.head(CASES[self.case][2](self.layer))


def float_twin(net):
    """The float net with the weights that the codes of a quantized one expand to."""
    twin = Net(net.case).eval()
    with torch.no_grad():
        for name, parameter in twin.layer.named_parameters():
            parameter.copy_(getattr(net.layer, name))
            parameter.requires_grad_(False)
    return twin


@pytest.fixture(params=CASES)
def net(request):
    torch.manual_seed(0)
    return Net(request.param).eval()


@torch.no_grad()
def test_the_code_of_a_subclass_gives_what_it_gives_for_the_dequantized_weights(net):
    made, kind = net.layer, type(net.layer)
    wanted = net()
    with quantized(net, "w8a32") as plan:
        found = plan.decisions[0]
        assert (found.kind, found.method, found.reason) == ("recurrent", "w8a32", "spec")
        assert isinstance(net.layer, kind)
        assert isinstance(net.layer, CASES[net.case][1])
        call = CASES[net.case][2]
        twin = float_twin(net)
        assert torch.equal(call(net.layer), call(twin.layer))
        assert torch.equal(call(net.layer), call(twin.layer)), "again, from what is kept"
        assert 0 < (net() - wanted).norm() / wanted.norm() < 0.03
    assert net.layer is made
    assert torch.equal(net(), wanted)


@torch.no_grad()
def test_autocast_rounds_as_for_the_float_layer_and_only_while_it_is_on(net):
    quantize(net, "w8a32")
    call, twin = CASES[net.case][2], float_twin(net)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            wanted = call(twin.layer).float()
        except RuntimeError as error:
            pytest.skip(f"torch itself cannot: {error}")
        assert torch.allclose(call(net.layer).float(), wanted, atol=0.02)
    assert torch.equal(call(net.layer), call(twin.layer))


@torch.no_grad()
def test_copies_pickles_and_other_dtypes_run_the_code_too(net):
    quantize(net, "w8a32")
    wanted = net()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other.layer) is type(net.layer)
        assert torch.equal(other(), wanted)
    assert copy.deepcopy(net.layer).double().dtype == torch.float64


@torch.no_grad()
def test_files_made_from_the_model_and_from_its_file_give_the_same_bits(net, tmp_path):
    torch.save({"state_dict": net.state_dict(), "pytorch-lightning_version": "2.0.0"}, tmp_path / "float.ckpt")
    make = lambda: Net(net.case)  # noqa: E731
    with Archive(tmp_path / "float.ckpt") as source:
        content, _ = quantize_file(source, make, as_spec("w8a32"), {})
        write_checkpoint(content, tmp_path / "quantized.ckpt")
    quantize(net, "w8a32")
    loaded = load_quantized(tmp_path / "quantized.ckpt", make).eval()
    assert type(loaded.layer) is type(net.layer)
    assert torch.equal(loaded(), net())


def test_gradients_reach_inputs_and_biases_through_the_code():
    layer = nn.ModuleList([flexible()])
    quantize(layer, "w8a32")
    x = X.clone().requires_grad_()
    layer[0].bias_hh_l0.requires_grad_(True)
    layer[0](x, lengths=LENGTHS)[0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer[0].bias_hh_l0.grad.abs().sum() > 0


@torch.no_grad()
def test_compiled_code_gives_the_same(net):
    quantize(net, "w8a32")
    torch.compiler.reset()
    assert torch.allclose(torch.compile(net, backend="eager")(), net(), atol=1e-5)


class Reads(nn.Module):
    """A recurrent layer that is given lengths."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = flexible(), nn.Linear(SIZE, 4)

    def forward(self, x):
        return self.head(self.layer(x, lengths=LENGTHS)[0])


def test_codes_are_chosen_with_what_the_code_gives_to_torchs_forward():
    torch.manual_seed(0)
    model, batches = Reads().eval(), [torch.randn(3, 5, SIZE) for _ in range(4)]
    plain = copy.deepcopy(model)
    wanted = model(X)
    plan = quantize(model, "w4a32", calibration=batches)
    quantize(plain, "w4a32")
    assert plan.decisions[0].uncalibrated is None
    assert plan.decisions[0].output_error is not None
    assert not torch.equal(model.layer.weight_hh_l1, plain.layer.weight_hh_l1)
    assert (model(X) - wanted).norm() / wanted.norm() < 0.2


class Given(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Scaled(SIZE, SIZE, portion=0.7, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.skipif(not hasattr(torch.onnx, "ops"), reason="needs torch 2.8")
@pytest.mark.filterwarnings("ignore")  # torch's own, of its exporter
def test_the_code_is_in_the_onnx_file(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = Given().eval()
    quantize(model, "w8a32")
    report = export(model, tmp_path / "model.onnx", (X,))
    assert report.relative_error < 1e-5


class Counting(nn.LSTM):
    def forward(self, input, hx=None):
        self.calls = 1
        return super().forward(input, hx)


class InPlace(nn.LSTM):
    def forward(self, input, hx=None):
        self.weight_hh_l0.mul_(0.9)
        return super().forward(input, hx)


class Listing(nn.GRU):
    def forward(self, input, hx=None):
        return [self.seen.append(each) for each in super().forward(input, hx)]


class OwnApply(nn.GRU):
    def _apply(self, fn, recurse=True):
        return super()._apply(fn, recurse)


class OwnWay(nn.GRU):
    def __call__(self, input):
        return super().__call__(input)[0]


class Method(nn.GRU):
    """Has an attribute whose name a quantized layer has for its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.method = "mean"

    def forward(self, input, hx=None):
        out = super().forward(input, hx)[0]
        return out.mean(0) if self.method == "mean" else out[-1]


class Decorated(nn.GRU):
    @torch.no_grad()
    def forward(self, input, hx=None):
        self.weight_hh_l0.mul_(0.5)
        return super().forward(input, hx)


def counted(function):
    @functools.wraps(function)
    def wrapper(self, *args):
        self.calls += 1
        return function(self, *args)

    return wrapper


class Wrapped(nn.GRU):
    calls = 0

    @counted
    def forward(self, input, hx=None):
        return super().forward(input, hx)


class Sets(nn.GRU):
    def forward(self, input, hx=None):
        setattr(self, "n", 1)  # noqa: B010
        return super().forward(input, hx)


class Local(nn.GRU):
    def forward(self, input, hx=None):
        weight = self.weight_hh_l0
        weight *= 0.5
        return super().forward(input, hx)


class Parameters(nn.GRU):
    def forward(self, input, hx=None):
        return super().forward(input, hx)[0] * sum(each.norm() for each in self.parameters())


registered = []


class Registers(nn.GRU):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        registered.append(cls)


class Registered(Registers):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class Mixin:
    def doubled(self, x):
        return 2 * self.forward(x)[0] + setattr(self, "n", 1)


class MixedIn(nn.GRU, Mixin):
    pass


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        *((kind, f"{kind.__name__} has a forward of its own") for kind in (Method, Decorated, Wrapped, Sets, Local)),
        *((kind, f"{kind.__name__} has a forward of its own") for kind in (Parameters, Registered)),
        (MixedIn, "MixedIn adds doubled to nn.GRU"),
        (Counting, "Counting has a forward of its own"),
        (InPlace, "InPlace has a forward of its own"),
        (Listing, "Listing has a forward of its own"),
        (OwnApply, "OwnApply adds _apply to nn.GRU"),
        (OwnWay, "OwnWay adds __call__ to nn.GRU"),
    ],
)
def test_code_that_writes_or_takes_the_place_of_the_layers_own_keeps_a_layer_float(kind, reason):
    with quantized(nn.ModuleList([kind(SIZE, SIZE), nn.Linear(SIZE, SIZE)]), "w8a32") as plan:
        assert (plan.decisions[0].method, plan.decisions[0].reason) == ("float", reason)
    assert registered == [Registered]
