"""Layers that a model holds past its registered modules are replaced there too, or stay float with the reason."""

from __future__ import annotations

import io
import weakref
from collections import OrderedDict, deque
from functools import cached_property, lru_cache, partial

import pytest
import torch
from lightnings import LightningModule
from models import Net, keeper, loader, trainer
from torch import nn

from tinyq_lightning import TinyQCallback, load_quantized, quantize, quantized
from tinyq_lightning.layers import QuantizedLinear


class Pair(nn.Module):
    """Two layers; a subclass says by which way its forward reaches the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)
        self.hold()

    def hold(self):
        pass

    def reached(self):
        return self.first

    def forward(self, x):
        return self.second(self.reached()(x))


class InAList(Pair):
    def hold(self):
        self.held = [self.first]

    def reached(self):
        return self.held[0]


class InADeque(InAList):
    def hold(self):
        self.held = deque([self.first])


class InDicts(Pair):
    def hold(self):
        self.held = {"a": OrderedDict(b=[0, self.first])}

    def reached(self):
        return self.held["a"]["b"][1]


class AsAnAttribute(Pair):
    def hold(self):
        object.__setattr__(self, "held", self.first)

    def reached(self):
        return vars(self)["held"]


class Cached(Pair):
    @cached_property
    def held(self):
        return self.first

    def hold(self):
        assert self.held

    def reached(self):
        return self.held


class Owner:
    def __init__(self, layer):
        self.layer = layer


class InAnObject(Pair):
    def hold(self):
        self.owner = Owner(self.first)

    def reached(self):
        return self.owner.layer


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class InAnUnregisteredModule(Pair):
    def hold(self):
        self.held = [Wrapper(self.first)]

    def reached(self):
        return self.held[0]


class Compiled(Pair):
    def hold(self):
        self.first = torch.compile(self.first, backend="eager")


class CompiledInItself(Pair):
    def hold(self):
        self.first.compile(backend="eager")


class Attention(nn.Module):
    """One attention, called through a list; as ``compiled`` it is wrapped by torch.compile."""

    compiled = False

    def __init__(self):
        super().__init__()
        attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.attention = torch.compile(attention, backend="eager") if self.compiled else attention
        self.held = [self.attention]

    def forward(self, x):
        return self.held[0](x, x, x)[0]


class CompiledAttention(Attention):
    compiled = True


class NamedBesides(nn.Module):
    """As the heads of Mask2Former are written: layers in a plain list, each registered by its number."""

    def __init__(self):
        super().__init__()
        self.layers = []
        for number in range(3):
            layer = nn.Linear(16, 16) if number else nn.Sequential(nn.Linear(16, 16), nn.ReLU())
            self.add_module(str(number), layer)
            self.layers.append(layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


REPLACED = [
    *(InAList, InADeque, InDicts, AsAnAttribute, Cached, InAnObject, InAnUnregisteredModule),
    *(Compiled, CompiledInItself, Attention, CompiledAttention, NamedBesides),
]


@torch.no_grad()
@pytest.mark.parametrize("make", REPLACED)
def test_a_layer_is_replaced_wherever_the_model_can_exchange_it(make):
    model, x = make().eval(), torch.randn(5, 3, 16)
    wanted = model(x).detach()
    with quantized(model, "w8a8") as plan:
        assert {decision.method for decision in plan} == {"w8a8"}
        inside = model(x)
    assert torch.equal(model(x), wanted)  # put back everywhere
    quantize(model, "w8a8")
    assert torch.equal(model(x), inside)
    for layer in [module for module in model.modules() if isinstance(module, QuantizedLinear)]:
        scales = layer.scales.clone()
        layer.scales.zero_()
        layer.unpack()
        assert not torch.equal(model(x), inside)  # the layer takes effect
        layer.scales.copy_(scales)
        layer.unpack()


class InATuple(InAList):
    def hold(self):
        self.held = (self.first,)


class Partial(Pair):
    def hold(self):
        self.held = partial(Wrapper.forward, Wrapper(self.first))

    def reached(self):
        return self.held


class PartialArgument(Partial):
    def hold(self):
        self.held = partial(lambda layer, x: layer(x), self.first)


class BoundMethod(Partial):
    def hold(self):
        self.held = self.first.forward


class Closure(Partial):
    def hold(self):
        layer = self.first
        self.held = lambda x: layer(x)


class DefaultArgument(Partial):
    def hold(self):
        def held(x, *, layer=self.first):
            return layer(x)

        self.held = held


class CompiledFunction(Partial):
    def hold(self):
        self.held = torch.compile(self.first.forward, backend="eager")


class CompiledBesides(Partial):
    def hold(self):
        object.__setattr__(self, "held", torch.compile(self.first, backend="eager"))


class Slots:
    __slots__ = ("layer",)


class InSlots(InAnObject):
    def hold(self):
        self.owner = Slots()
        self.owner.layer = self.first


class CachedByItsClass(Pair):
    def hold(self):
        self.reached()

    @lru_cache  # noqa: B019 - what keeps the module alive is what is tested
    def reached(self):
        return self.first


class WeakReference(Pair):
    def hold(self):
        self.held = weakref.ref(self.first)

    def reached(self):
        return self.held()


class WeakProxy(Pair):
    def hold(self):
        self.held = [weakref.proxy(self.first)]

    def reached(self):
        return self.held[0]


REGISTRY = {}


class GlobalRegistry(Pair):
    def hold(self):
        REGISTRY["first"] = self.first

    def reached(self):
        return REGISTRY["first"]


class HookThatClosesOverIt(Pair):
    def hold(self):
        layer = self.first
        self.second.register_forward_pre_hook(lambda module, args: (args[0] + 0 * layer.weight.sum(),))


FIXED = [
    *(InATuple, PartialArgument, BoundMethod, Closure, DefaultArgument, CompiledFunction, CompiledBesides),
    *(InSlots, CachedByItsClass, WeakReference, WeakProxy, HookThatClosesOverIt),
]


@pytest.mark.parametrize("make", FIXED)
def test_a_layer_that_cannot_be_exchanged_everywhere_stays_float_and_reloads(make):
    model, x = make().eval(), torch.randn(5, 16)
    first = model.first
    plan = {decision.name: decision for decision in quantize(model, "w8a32")}
    assert plan["first"].method == "float"
    assert plan["first"].reason.endswith("holds it too, where it cannot be replaced")
    assert plan["first"].decided_by == "layer"
    assert model.first is first
    assert isinstance(model.second, QuantizedLinear)
    file, other = io.BytesIO(), make().eval()
    torch.save(model.state_dict(), file)
    quantize(other, "w8a32")
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(other(x), model(x))


def test_a_layer_in_a_global_that_the_model_reads_stays_float_or_is_exchanged_there():
    model, x = GlobalRegistry().eval(), torch.randn(5, 16)
    wanted = model(x).detach()
    with quantized(model, "w8a8") as plan:
        inside = model(x)
        assert {decision.method for decision in plan} == {"w8a8"}
        assert REGISTRY["first"] is model.first
    assert not torch.equal(inside, wanted)
    assert REGISTRY["first"] is model.first


def test_what_does_not_hold_a_layer_itself_does_not_keep_it_float():
    model = Pair()
    model.watcher = partial(print, "forward")
    model.step = model.reached  # bound to the model, which stays
    model.numbers = list(range(100_000))
    model.again = [model]
    seen = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output))
    assert {decision.method for decision in quantize(model)} == {"w8a32"}


class HeldInAList(Net):
    """A LightningModule whose forward reaches its head through a list."""

    def __init__(self):
        super().__init__()
        self.order = [self.body, self.head]

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


def test_a_saved_model_with_its_layers_in_a_list_gives_the_measured_outputs_again(tmp_path):
    callback = TinyQCallback("w8a8", report=False)
    model = HeldInAList()
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=1).fit(model, loader(), loader(seed=1))
    head = model.head
    assert model.order[1] is head
    assert isinstance(head, nn.Linear)
    assert not isinstance(head, QuantizedLinear)
    again: LightningModule = load_quantized(callback.quantized_path, HeldInAList)
    assert isinstance(again.order[1], QuantizedLinear)
    x = torch.randn(6, 8)
    error = (again(x) - model.eval()(x)).norm() / model(x).norm()
    assert 0 < error < 0.1
