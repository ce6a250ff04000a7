"""What is promised of malformed content with right digests: an error that names the file and the entry."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import random
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightnings import LightningModule, __version__
from models import Net, loader, trainer
from torch import nn

from tinyq_lightning import QuantizedCheckpointMixin, TinyQCallback, load_quantized, quantize
from tinyq_lightning.command.cli import main
from tinyq_lightning.errors import CheckpointError, TinyQError
from tinyq_lightning.file.checkpoint import _digests, make_checkpoint, read_checkpoint, write_checkpoint

DATA = Path(__file__).parents[1] / "data"


class MixedIn(QuantizedCheckpointMixin, Net):
    pass


def digested(content):
    """The content with the digests of its entries, as whoever makes a file can compute them."""
    with contextlib.suppress(TypeError, ValueError, AttributeError, KeyError, RecursionError):
        content["tinyq"]["digests"] = _digests(content)
    return content


def changed(path, target, way, value):
    content = torch.load(path, weights_only=True)
    place = content
    for key in way[:-1]:
        place = place[key]
    if value is None:
        del place[way[-1]]
    else:
        place[way[-1]] = value(place[way[-1]]) if callable(value) else value
    # written in Python: from 3.12 on the limit of recursions in C cannot be set
    torch.save(digested(content), target, pickle_module=SimpleNamespace(__name__="pickle", Pickler=pickle._Pickler))
    return target


def with_nan(scales):
    scales[0] = math.nan
    return scales


NESTED: tuple = ()
for _ in range(40):
    NESTED = (NESTED,) * 10  # 10⁴⁰ items, were each looked at

MALFORMED = [
    (("state_dict", "head.int8_weights"), lambda codes: torch.full_like(codes, -128), "head.int8_weights holds -128"),
    (("state_dict", "head.int8_weights"), lambda codes: codes.to_sparse(), "head.int8_weights holds no codes"),
    (("tinyq", "format_version"), -1, r"tinyq\.format_version"),
    (("tinyq", "format_version"), 0, r"tinyq\.format_version"),
    (("tinyq", "format_version"), True, r"tinyq\.format_version"),
    (("tinyq", "format_version"), 1.0, r"tinyq\.format_version"),
    (("tinyq", "format_version"), 10**9, "format version 1000000000 is newer"),
    (("tinyq", "spec", "exclude"), NESTED, r"tinyq\.spec"),
    (("tinyq", "label"), 3, r"tinyq\.label"),
    (("tinyq", "spec"), {"kernel": "os.system"}, r"tinyq\.spec"),
    (("tinyq", "metrics"), {"acc": 3}, r"tinyq\.metrics"),
    (("tinyq", "metrics"), {"acc": {"float": "x"}}, r"tinyq\.metrics"),
    (("tinyq", "plan"), {"a": 1}, r"tinyq\.plan"),
    (("tinyq", "plan", 1, "name"), 3, r"tinyq\.plan\[1\]"),
    (("tinyq", "plan", 1, "method"), ["w8a32"], r"tinyq\.plan\[1\]"),
    (("tinyq", "plan", 1, "aliases"), 5, r"tinyq\.plan\[1\]"),
    (("tinyq", "plan", 1, "tied_to"), [], r"tinyq\.plan\[1\]"),
    (("tinyq", "plan", 1, "bytes"), None, r"tinyq\.plan\[1\]"),
    (("tinyq", "plan", 1, "bytes"), "many", r"tinyq\.plan\[1\]"),
    (("tinyq", "dropped"), 3, r"tinyq\.dropped"),
    (("tinyq", "configs"), {"width": "module"}, r"tinyq\.configs"),
    (("tinyq", "configs"), {"width": "namespace"}, "hyper-parameter 'width' is no namespace"),
    (("tinyq", "configs"), {"no": "omegaconf"}, "hyper-parameter 'no' is no omegaconf"),
    (("tinyq", "types"), [{"path": [], "kind": "call"}], r"tinyq\.types"),
    (("tinyq", "types"), [{"path": ["width"], "kind": "enum"}], r"tinyq\.types"),
    (("tinyq", "types"), [{"path": ["no", 3], "kind": "path", "name": "PosixPath"}], r"hyper-parameter 'no\.3'"),
    (("tinyq", "types"), [{"path": ["width"], "kind": "tensor", "name": "Buffer"}], "'width' is no tensor"),
    (("tinyq", "float_sha256"), 3, r"tinyq\.float_sha256"),
    (("tinyq", "versions"), [], r"tinyq\.versions"),
    (("hyper_parameters",), [1, 2], "hyper_parameters"),
    (("hyper_parameters",), {3: 4}, "hyper_parameters"),
    (("hyper_parameters", "width"), -5, "hyper_parameters"),
    (("hyper_parameters", "width"), "wide", "hyper_parameters"),
    (("hyper_parameters", "width"), lambda width: {"a": 1}, "hyper_parameters"),
    (("hparams_name",), 3, "hparams_name"),
    (("state_dict",), [], "state_dict"),
    (("state_dict", "head.scales"), with_nan, r"state_dict\.head\.scales"),
    (("state_dict", "head.scales"), lambda scales: -scales, r"state_dict\.head\.scales"),
    (("state_dict", "head.scales"), lambda scales: scales * math.inf, r"state_dict\.head\.scales"),
    (("state_dict", "head.scales"), lambda scales: scales.double(), r"state_dict\.head\.scales"),
    (("state_dict", "head.scales"), lambda scales: scales[:2], r"state_dict\.head\.scales"),
    (("state_dict", "head.scales"), lambda scales: 3, r"state_dict\.head\.scales"),
    (("state_dict", "head.scales"), None, r"state_dict\.head\.scales"),
    (("state_dict", "head.int8_weights"), lambda codes: codes.int(), r"state_dict\.head\.int8_weights"),
    (("state_dict", "head.int8_weights"), lambda codes: codes[0], r"state_dict\.head\.int8_weights"),
    (("state_dict", "head.int8_weights"), lambda codes: codes[:, :3], "layer 'head' is"),
    (("state_dict", "head.int8_weights"), "codes", r"state_dict\.head\.int8_weights"),
    (("state_dict", "head.int8_weights"), None, "no codes of the layer 'head'"),
    (("state_dict", "head.bias"), lambda bias: bias[:1], r"head\.bias"),
    (("state_dict", "head.bias"), lambda bias: [1], r"head\.bias"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    module = Net()
    plan = quantize(module)
    base = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": __version__, "hparams_name": "kwargs"}
    base["hyper_parameters"] = {"width": 16, "lr": 0.02}
    metrics = {"acc": {"float": 1.0, "w8a32": 1.0, "delta": 0.0}}
    path = tmp_path_factory.mktemp("good") / "q.ckpt"
    write_checkpoint(make_checkpoint(base, module.state_dict(), plan, metrics, None, "validate"), path)
    return path


@pytest.mark.parametrize(
    ("way", "value", "message"), MALFORMED, ids=[f"{m}-{i}" for i, (_, _, m) in enumerate(MALFORMED)]
)
def test_a_malformed_entry_with_right_digests_is_named(good, tmp_path, way, value, message):
    path = changed(good, tmp_path / "odd.ckpt", way, value)
    for load in (
        lambda **more: load_quantized(path, Net, **more),
        lambda **more: MixedIn.load_from_checkpoint(path, **more),
    ):
        for strict in (None, False):
            if "head.bias" in way or "layer 'head'" in message:
                strict = None
            with pytest.raises(CheckpointError, match=message) as error:
                load(strict=strict)
            assert str(path) in str(error.value)


@pytest.mark.parametrize("way", [("more",), ("hyper_parameters", "more")])
def test_containers_that_are_nested_too_deeply_are_refused(good, tmp_path, way):
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(100_000)
        path = changed(good, tmp_path / "deep.ckpt", way, deep)
    finally:
        sys.setrecursionlimit(limit)
    for load in (load_quantized, lambda path, kind: MixedIn.load_from_checkpoint(path)):
        with pytest.raises(
            CheckpointError, match=r"deep\.ckpt: the file is damaged: its containers are nested too deep"
        ):
            load(path, Net)


def test_a_layer_without_codes_is_refused_by_a_trainer_as_well(good, tmp_path):
    path = changed(good, tmp_path / "odd.ckpt", ("state_dict", "head.int8_weights"), None)
    for module, callbacks in ((MixedIn(), []), (Net(), [TinyQCallback("w8a32", report=False)])):
        module.strict_loading = False
        with pytest.raises(CheckpointError, match="no codes of the layer 'head'"):
            trainer(tmp_path, *callbacks).test(module, loader(), ckpt_path=str(path), verbose=False, weights_only=True)


class KeepsPart(Net):
    """Saves what was trained only, as with a frozen encoder."""

    def __init__(self, without="body", width=16, lr=0.02):
        super().__init__(width, lr)
        self.strict_loading = False
        self.without = without

    def state_dict(self, *arguments, **more):
        state = super().state_dict(*arguments, **more)
        return OrderedDict((name, value) for name, value in state.items() if not name.startswith(self.without))


def test_saving_refuses_a_state_dict_without_the_codes_of_a_planned_layer():
    module = KeepsPart()
    plan = quantize(module)
    with pytest.raises(
        CheckpointError, match=r"no codes of the layer 'body\.0', which the plan has as w8a32: let state_dict"
    ):
        make_checkpoint({}, module.state_dict(), plan, {}, None, None)
    module = KeepsPart()
    plan = quantize(module, {"method": "w8a32", "exclude": ["body"]})
    make_checkpoint({}, module.state_dict(), plan, {}, None, None)


class Renames(LightningModule):
    """Its state dict has shorter names than its layers."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))

    def state_dict(self, *arguments, **more):
        state = super().state_dict(*arguments, **more)
        return OrderedDict((name.removeprefix("model."), value) for name, value in state.items())

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict({f"model.{name}": value for name, value in state_dict.items()}, strict, assign)


def test_a_class_that_renames_its_entries_saves_and_loads(tmp_path):
    module = Renames()
    plan = quantize(module)
    content = make_checkpoint({"epoch": 0, "global_step": 0}, module.state_dict(), plan, {}, None, None)
    write_checkpoint(content, tmp_path / "q.ckpt")
    loaded = load_quantized(tmp_path / "q.ckpt", Renames)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())


def places(value, way=()):
    """The paths of all that is in plain content."""
    yield way
    if len(way) > 8:  # content may contain itself
        return
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*way, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from places(item, (*way, i))


def odd_value(random_, old):
    """Something of another type, sign, size or form."""
    endless: list = []
    endless.append(endless)
    kinds = [
        None, True, -1, 0, 2**70, 1.5, math.nan, math.inf, 1j, "", "x", "w8a8", "float", "${oc.env:HOME}", b"x", [],
        (), {}, set(), {"class_path": "os.getcwd"}, {3: 4}, {None: None}, [[[]]], [None], {"a": {"b": [1]}}, endless,
        torch.float16, torch.device("cpu"), torch.zeros(0), torch.ones(2, 2), torch.tensor(math.nan),
        torch.zeros(3, dtype=torch.int8),
    ]  # fmt: skip
    if isinstance(old, torch.Tensor) and random_.random() < 0.7:
        nan = torch.full_like(old, math.nan, dtype=torch.float32)
        return random_.choice(
            [old.double(), old.int(), old.reshape(-1), old.unsqueeze(0), -old.float(), old.to(torch.complex64), nan]
        )
    return random_.choice(kinds)


def mutate(content, random_):
    *way, last = random_.choice([each for each in places(content) if each])
    place = content
    for key in way:
        place = place[key]
    if isinstance(place, tuple):
        return content
    action = random_.random()
    if action < 0.2:
        del place[last]
    elif action < 0.3 and isinstance(place, dict):
        place[random_.choice(["no", "a.b", "", 3, None])] = place.pop(last)
    elif action < 0.4 and isinstance(place, list):
        place.insert(last, copy.copy(place[last]))
    else:
        place[last] = odd_value(random_, place[last])
    return content


def fuzz(path, target, count, seed, by_commands):
    random_, wanted = random.Random(seed), read_checkpoint(path)["state_dict"]
    refused = 0
    for i in range(count):
        content = torch.load(path, weights_only=True)
        for _ in range(random_.choice([1, 1, 1, 2, 3])):
            content = mutate(content, random_)
        torch.save(digested(content), target)
        doors = [lambda: load_quantized(target, Net), lambda: MixedIn.load_from_checkpoint(target, weights_only=True)]
        for door in doors[: 2 if isinstance(content.get("tinyq"), dict) and "types" in content["tinyq"] else 1]:
            try:
                module = door()
                assert module.state_dict().keys() >= wanted.keys() - {"head.bias"}, f"{seed}/{i}"
            except TinyQError as error:
                refused += 1
                if str(target) not in str(error):
                    raise
        if by_commands:
            for command in ("inspect", "verify"):
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    assert main([command, str(target)]) in (0, 1), f"{seed}/{i}"
    return refused


@pytest.mark.slow
def test_mutated_content_loads_or_is_refused_by_name(good, tmp_path):
    assert fuzz(good, tmp_path / "odd.ckpt", 60, seed=0, by_commands=False) > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_none_of_many_mutated_files_raises_another_error(good, tmp_path, seed):
    shutil.copy(good, tmp_path / "good.ckpt")
    assert fuzz(tmp_path / "good.ckpt", tmp_path / "odd.ckpt", 250, seed, by_commands=True) > 50
