"""What is promised of hyper-parameters: they come back as they were, or are asked for by name."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import Enum, Flag, IntEnum
from pathlib import Path, PurePosixPath

import pytest
import torch
from lightnings import AttributeDict, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tinyq_lightning import QuantizedCheckpointMixin, load_quantized, quantize
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file import open_checkpoint
from tinyq_lightning.file.checkpoint import make_checkpoint, warn_of_left_out, write_checkpoint
from tinyq_lightning.file.from_float import quantize_file
from tinyq_lightning.spec import as_spec


class Act(Enum):
    RELU = "relu"
    GELU = (1, 2)


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Flags(Flag):
    A = 1
    B = 2


class Bunch(dict):
    def __getattr__(self, name):
        return self[name]


Sizes = namedtuple("Sizes", "width depth")


class Loose(LightningModule):
    """Says nothing of the types."""

    def __init__(self, value=None, width=4, **more):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.value, self.more = value, more


class Mixed(QuantizedCheckpointMixin, Loose):
    pass


class Knows(Loose):
    """Refers to the classes of its arguments."""

    class Inner(Enum):
        X = 1

    def __init__(self, value: Act | Level | Flags | Bunch | list[Sizes] | None = None, width: int = 4):
        super().__init__(value, width)


def saved(path, hyper_parameters, kind=Loose, top=None):
    module = kind()
    plan = quantize(module)
    base = {"epoch": 0, "global_step": 0, "hyper_parameters": hyper_parameters, **(top or {})}
    write_checkpoint(make_checkpoint(base, module.state_dict(), plan, {}, None, None), path)
    torch.load(path, weights_only=True)
    return path


def same(one, other):
    if isinstance(one, dict) and not isinstance(one, Namespace):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Namespace):
        return type(one) is type(other) and same(vars(one), vars(other))
    return type(one) is type(other) and one == other


COME_BACK = {
    "plain": {"a": [1, 2.5, None, True, "x", b"y", 1j], "b": (1, (2,)), 3: {4, 5}},
    "frozenset": frozenset("abc"),
    "path": Path("/data"),
    "pure path": PurePosixPath("/data/x"),
    "namespace": Namespace(a=1, b=Namespace(c=[Path("x")])),
    "namespace in containers": {"model": [Namespace(a=1), (Namespace(b=2), Path("y"))]},
    "defaultdict": defaultdict(int, a=1),
    "defaultdict of lists": {"deep": defaultdict(list, a=[1])},
    "ordered": OrderedDict(b=1, a=2),
    "counter": Counter("abb"),
    "attributes": AttributeDict(a=1, b=AttributeDict(c=2)),
    "size": torch.Size([2, 3]),
    "dtype": {"dtype": torch.float16, "device": torch.device("cpu")},
    "text": {"t": "${oc.env:HOME}"},
}


@pytest.mark.parametrize("value", COME_BACK.values(), ids=COME_BACK)
def test_values_of_known_types_come_back_as_they_were(tmp_path, value):
    path = saved(tmp_path / "q.ckpt", {"value": value, "other": value, "width": 4})
    for module in (load_quantized(path, Loose), Mixed.load_from_checkpoint(path)):
        assert same(module.value, value), module.value
        assert same(module.more["other"], value), "through **kwargs"
    if isinstance(value, defaultdict):
        assert module.value.default_factory is value.default_factory


def test_configurations_come_back_at_any_depth(tmp_path):
    config = OmegaConf.create({"a": {"b": [1, 2]}, "c": "${a.b}", "act": Act.RELU, "path": Path("x")})
    path = saved(tmp_path / "q.ckpt", {"value": {"cfg": [config]}}, Knows)
    (back,) = load_quantized(path, Knows).value["cfg"]
    assert isinstance(back, DictConfig)
    assert (back.a.b, back.c, back.act, back.path) == ([1, 2], [1, 2], Act.RELU, Path("x"))


OF_CLASSES = {
    "enum": Act.RELU,
    "enum of a tuple": Act.GELU,
    "int enum": Level.HIGH,
    "flags": Flags.A | Flags.B,
    "inner class": Knows.Inner.X,
    "attribute dict": Bunch(a=Bunch(b=Act.RELU)),
    "named tuple": Sizes(1, (2, Act.GELU)),
    "nested": {"a": [{"b": (Act.RELU, Sizes(1, 2))}]},
}


@pytest.mark.parametrize("value", OF_CLASSES.values(), ids=OF_CLASSES)
def test_values_of_classes_come_back_if_the_module_refers_to_the_class_and_are_asked_for_if_not(tmp_path, value):
    path = saved(tmp_path / "q.ckpt", {"value": value, "width": 4}, Knows)
    assert same(load_quantized(path, Knows).value, value)
    for load in (
        lambda **more: load_quantized(path, Loose, **more),
        lambda **more: Mixed.load_from_checkpoint(path, **more),
    ):
        with pytest.raises(CheckpointError, match=r"value.* needs .* does not refer to.*trust=True") as told:
            load()
        load(**{str(told.value).split(": ")[1].split(" needs")[0]: 1})
        assert load(value=1).value == 1
    assert same(load_quantized(path, Loose, trust=True).value, value)


KEYS = {
    "enum": {Act.RELU: 1, "a": 2},
    "pair": {(1, 2): 3},
    "text with a dot": {"net.0": nn.GELU()},
    "number": {1: nn.GELU},
}


@pytest.mark.parametrize("value", KEYS.values(), ids=KEYS)
def test_a_mapping_with_an_entry_that_no_dotted_name_gives_is_asked_for_whole(tmp_path, value):
    path = saved(tmp_path / "q.ckpt", {"value": {"deep": value, "depth": 3}, "width": 4})
    with pytest.raises(CheckpointError, match=r"could not hold value\.deep, which Loose was made with"):
        load_quantized(path, Loose)
    assert load_quantized(path, Loose, **{"value.deep": value}).value == {"deep": value, "depth": 3}


class Odd(str):
    """Text with a meaning of its own."""


class Marked(torch.Tensor):
    """A tensor with a meaning of its own."""


UNHELD = {
    "tensor of a class": torch.ones(2).as_subclass(Marked),
    "tensor without values": torch.ones(2, device="meta"),
    "module": nn.GELU(),
    "class": nn.GELU,
    "function": len,
    "text of a class": Odd("x"),
    "defaultdict of a function": defaultdict(lambda: 1),
    "set of enums": {Act.RELU},
    "list with an object": [1, nn.GELU()],
    "tuple deep": ({"a": [nn.GELU()]},),
}


@pytest.mark.parametrize("held", UNHELD.values(), ids=UNHELD)
def test_only_the_entry_that_cannot_be_held_is_dropped_and_it_is_asked_for_by_its_name(tmp_path, held):
    hyper_parameters = {"value": {"deep": {"cls": held, "d_h": 300}, "depth": 3}, "width": 4, "through": held}
    path = saved(tmp_path / "q.ckpt", hyper_parameters)
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"] == {"value": {"deep": {"d_h": 300}, "depth": 3}, "width": 4}
    assert stored["tinyq"]["dropped"] == ["hyper_parameters.value.deep.cls", "hyper_parameters.through"]
    for load in (
        lambda **more: load_quantized(path, Loose, **more),
        lambda **more: Mixed.load_from_checkpoint(path, **more),
    ):
        with pytest.raises(
            CheckpointError, match=r"could not hold value\.deep\.cls, through.*'value\.deep\.cls': \.\.\."
        ):
            load()
        module = load(through=held, **{"value.deep.cls": held})
        assert module.value == hyper_parameters["value"]
        assert module.more["through"] is held
        assert load(through=1, value=2).value == 2
        with pytest.raises(CheckpointError, match=r"no argument value\.no\.cls"):
            load(through=1, **{"value.no.cls": 1, "value.deep.cls": 2})


@pytest.mark.parametrize("own", [{}, {"value": len}])
def test_only_what_loading_takes_is_asked_for(tmp_path, own):
    module = Loose()
    plan = quantize(module)
    base = {"hyper_parameters": own, "datamodule_hyper_parameters": {"fn": len}}
    content = make_checkpoint(base, module.state_dict(), plan, {}, None, None)
    with pytest.warns(UserWarning, match="left out: .*datamodule_hyper_parameters.fn") as caught:
        warn_of_left_out(content)
    told = str(caught[0].message)
    assert ("load_quantized(path, Net, value=...)" in told) == bool(own)
    assert ("load_quantized" in told) == bool(own)
    write_checkpoint(content, tmp_path / "q.ckpt")
    assert load_quantized(tmp_path / "q.ckpt", Loose, **own).value is own.get("value")


class OnlyA(Loose):
    def __init__(self, a=None, c=None):
        super().__init__()


def test_classes_are_told_of_what_is_asked_for_alone(tmp_path):
    path = saved(tmp_path / "q.ckpt", {"a": Act.RELU, "b": Level.HIGH, "c": Act.GELU})
    with pytest.raises(CheckpointError, match=r": a, c need \S*\.Act, which.*: give them as they were, as in"):
        load_quantized(path, OnlyA)
    with pytest.raises(CheckpointError, match=r": c needs \S*\.Act, which.*: give it as it was, as in"):
        load_quantized(path, OnlyA, a=1)


class Config(Loose):
    def __init__(self, config):
        super().__init__(config)


@pytest.mark.parametrize("kind", [dict, OmegaConf.create])
def test_arguments_saved_as_one_object_are_asked_for_below_its_name(tmp_path, kind):
    values = {"a": 1, "act": nn.GELU() if kind is dict else "${oc.env:NO_SUCH_VARIABLE}", "e": Act.RELU}
    top = {"hparams_name": "config"} | ({} if kind is dict else {"hparams_type": DictConfig})
    dropped = "config.act, which.*; config.e needs"
    path = saved(tmp_path / "q.ckpt", kind(values), top=top)
    with pytest.raises(CheckpointError, match=dropped):
        load_quantized(path, Config)
    value = load_quantized(path, Config, **{"config.act": 3, "config.e": 4}).value
    assert (value.a, value.act, value.e) == (1, 3, 4)
    assert type(value) is (AttributeDict if kind is dict else DictConfig)
    assert load_quantized(path, Config, config=5).value == 5


def test_what_contains_itself_or_is_too_deep_is_dropped_by_name(tmp_path):
    cycle: dict = {"a": 1}
    cycle["self"] = [cycle]
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    path = saved(tmp_path / "q.ckpt", {"value": {"cycle": cycle, "deep": deep, "b": 2}})
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"value": {"cycle": {"a": 1}, "b": 2}}
    with pytest.raises(CheckpointError, match=r"could not hold value\.cycle\.self, value\.deep"):
        load_quantized(path, Loose)


TENSORS = {
    "tensor": torch.ones(2),
    "parameter": nn.Parameter(torch.ones(2)),
    "frozen parameter": nn.Parameter(torch.ones(2), requires_grad=False),
    "whole numbers": nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False),
    "buffer": nn.Buffer(torch.ones(2)),
    "buffer of no file": nn.Buffer(torch.ones(2), persistent=False),
    "gradient": torch.ones(2, requires_grad=True),
}


def traits(tensor):
    """What a module registers it as."""
    is_buffer = isinstance(tensor, nn.Buffer)
    return type(tensor), is_buffer, is_buffer and tensor.persistent, tensor.requires_grad, tensor.tolist()


@pytest.mark.parametrize("value", TENSORS.values(), ids=TENSORS)
def test_tensors_come_back_as_what_a_module_registered_them_as(tmp_path, value):
    path = saved(tmp_path / "q.ckpt", {"value": value, "deep": {"a": [1, (value,)]}, "width": 4}, lambda: Loose(value))
    for module in (load_quantized(path, Loose), Mixed.load_from_checkpoint(path)):
        assert traits(module.value) == traits(module.more["deep"]["a"][1][0]) == traits(value)
        assert set(dict(module.named_parameters())) - {"linear.bias"} == (
            {"value"} if isinstance(value, nn.Parameter) else set()
        )


@pytest.mark.parametrize("value", TENSORS.values(), ids=TENSORS)
def test_a_float_file_gives_them_to_the_class_as_they_were(tmp_path, value):
    base = {"state_dict": Loose(value).state_dict(), "hyper_parameters": {"value": value}}
    torch.save(base | {"pytorch-lightning_version": "2.5.0"}, tmp_path / "float.ckpt")
    with open_checkpoint(tmp_path / "float.ckpt") as source:
        content, _ = quantize_file(source, Loose, as_spec("w8a32"), {})
    write_checkpoint(content, tmp_path / "q.ckpt")
    assert traits(load_quantized(tmp_path / "q.ckpt", Loose).value) == traits(value)
