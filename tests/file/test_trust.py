"""What is promised of files: nothing that they name is imported or called, unless the user trusts them."""

from __future__ import annotations

import inspect
import io
import sys
import types
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Callable, List  # noqa: UP035

import pytest
import torch
from lightnings import LightningCLI, LightningModule, Trainer, __version__
from models import Net, loader, trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tinyq_lightning import QuantizedCheckpointMixin, TinyQCallback, load_quantized, quantize
from tinyq_lightning.command.cli import main
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.checkpoint import _digests, make_checkpoint, write_checkpoint

# Before omegaconf 2.4 the function of this name was another, without `replace`.
has_it = "replace" in inspect.signature(getattr(OmegaConf, "register_resolver", len)).parameters
register_resolver = OmegaConf.register_resolver if has_it else OmegaConf.register_new_resolver
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning with a new jsonargparse
CALLED: list[str] = []


def call(*arguments: Any) -> str:
    """What a file must not reach: as a class path, an instantiator, a resolver."""
    CALLED.append(str(arguments))
    return "called"


class Called:
    def __init__(self, *arguments: Any, **more: Any) -> None:
        call(*arguments)


class Act(Enum):
    relu = "r"
    gelu = "g"


class Open(LightningModule):
    """Takes anything, in every way that LightningCLI knows."""

    def __init__(
        self,
        backbone=None,
        head: nn.Module | None = None,
        function: Callable[[Any], Any] | None = None,
        kind: type | None = None,
        table: dict[str, Any] | None = None,
        name: str = "n",
        act: Act = Act.relu,
        **more: Any,
    ):
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "head", "function", "kind"])
        self.linear = nn.Linear(4, 4)
        self.got = {"backbone": backbone, "head": head, "function": function, "kind": kind, "table": table} | more
        self.name, self.act = name, act


class OpenMixed(QuantizedCheckpointMixin, Open):
    pass


class Takes(LightningModule):
    """Reads its configuration, as users' classes do."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.values = [config[key] for key in config]


class TakesMixed(QuantizedCheckpointMixin, Takes):
    pass


class TakesConfigs(LightningModule):
    """Its annotations name a class that resolves what is in it."""

    def __init__(self, config: DictConfig, several: dict[str, DictConfig] | None = None):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.values = [each[key] for each in (config, *(several or {}).values()) for key in each]


class TakesConfigsMixed(QuantizedCheckpointMixin, TakesConfigs):
    pass


def written(path: Path, module: LightningModule, hyper_parameters: dict, top: dict | None = None, **tinyq: Any) -> str:
    """A file that says what its maker wants, with right digests."""
    plan = quantize(module)
    base = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": __version__}
    content = make_checkpoint(base, module.state_dict(), plan, {}, None, None)
    content |= {"hyper_parameters": hyper_parameters, **(top or {})}
    content["tinyq"] |= tinyq
    content["tinyq"]["digests"] = _digests(content)
    write_checkpoint(content, path)
    return str(path)


HERE = __name__
CLASS_PATH = {"class_path": f"{HERE}.Called", "init_args": {}}
HOSTILE = {
    "untyped": {"backbone": CLASS_PATH},
    "module": {"head": CLASS_PATH},
    "by name": {"head": f"{HERE}.Called"},
    "function": {"function": f"{HERE}.call"},
    "class": {"kind": f"{HERE}.Called"},
    "nested": {"table": {"a": [{"b": CLASS_PATH}]}},
    "through kwargs": {"other": {"deep": CLASS_PATH}},
    "another class": {"_class_path": f"{HERE}.OpenMixed"},
    "no class of the kind": {"_class_path": f"{HERE}.Called"},
}


@pytest.fixture(autouse=True)
def _nothing_called():
    CALLED.clear()
    yield
    assert CALLED == []


@pytest.mark.parametrize("door", ["load_quantized", "mixin", "open file", "command"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_class_path_at_any_depth_is_refused_by_name_and_calls_nothing(tmp_path, capsys, what, door):
    stored = {"_instantiator": "lightning.pytorch.cli.instantiate_module", **HOSTILE[what]}
    path = written(tmp_path / "q.ckpt", Open(), stored)
    wanted = ("OpenMixed" if door != "command" else "Open") if what == "another class" else HERE
    kind = Open if what == "another class" else OpenMixed
    if door == "command":
        model = f"{HERE}:{'OpenMixed' if what != 'another class' else 'Open'}"
        assert main(["bench", path, "--model", model, "--shape", "4"]) == 1
        told = capsys.readouterr().err
    elif door == "load_quantized":
        with pytest.raises(CheckpointError, match=wanted) as error:
            load_quantized(path, kind)
        told = str(error.value)
    else:
        if what == "another class":
            stored["_class_path"] = f"{HERE}.Open"
            path = written(tmp_path / "q.ckpt", Open(), stored)
        source = io.BytesIO(Path(path).read_bytes()) if door == "open file" else path
        with pytest.raises(CheckpointError, match=f"{HERE}") as error:
            OpenMixed.load_from_checkpoint(source)
        told = str(error.value)
    assert "trust=True" in told
    assert "--trust" in told


@dataclass
class Conf:
    width: int = 1
    name: str = ""
    act: Act = Act.relu
    inner: dict[str, int] | None = None


class Typed(LightningModule):
    def __init__(
        self,
        conf: Conf | None = None,
        plain: Conf = Conf(),  # noqa: B008
        confs: dict[str, Conf] | None = None,
        many: list[Conf] | None = None,
        both: str | Conf = "",
        table: dict[str, int] | None = None,
        bare: List | None = None,  # noqa: UP006
        texts: list[str] | None = None,
        sizes: dict[str, int] | list[int] | None = None,
    ):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.got = {name: value for name, value in locals().items() if name in Typed.__init__.__annotations__}


@pytest.fixture
def module_on_disk(tmp_path, monkeypatch):
    """A module that could be imported, and nothing may import; gives texts that name it."""
    (tmp_path / "tinyq_evil.py").write_text("class X: pass\n")
    (tmp_path / "conf.yaml").write_text("class_path: tinyq_evil.X\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "{class_path: tinyq_evil.X}", str(tmp_path / "conf.yaml"), "tinyq_evil.X"
    assert "tinyq_evil" not in sys.modules


@pytest.mark.parametrize("which", range(3))
def test_text_is_not_read_as_yaml_or_as_a_file_where_an_object_is_built(tmp_path, module_on_disk, which):
    text = module_on_disk[which]
    places = {
        "conf": text,
        "plain": text,
        "confs": {"a": text},
        "many": [text],
        "table": text,
        "bare": text,
        "nested": {"inner": text},
        "unknown": {"no": text},
        "sizes": [[text]],
    }
    for name, value in places.items():
        for argument in [name] if name in Typed.__init__.__annotations__ else ["conf", "plain"]:
            stored = {"_instantiator": "lightning.pytorch.cli.instantiate_module", argument: value}
            path = written(tmp_path / "q.ckpt", Typed(), stored)
            with pytest.raises(CheckpointError, match=f"{argument}: .*trust=True"):
                load_quantized(path, Typed)


def test_values_that_fit_their_types_are_built(tmp_path, module_on_disk):
    text = module_on_disk[0]
    conf = {"width": 3, "name": text, "act": "gelu", "inner": {"a": 1}}
    stored = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "conf": conf,
        "confs": {"a": conf},
        "many": [conf],
        "both": text,
        "table": {"a": 1},
        "texts": [text],
        "sizes": [1, 2],
    }
    got = load_quantized(written(tmp_path / "q.ckpt", Typed(), stored), Typed).got
    built = Conf(3, text, Act.gelu, {"a": 1})
    assert (got["conf"], got["confs"], got["many"]) == (built, {"a": built}, [built])
    assert (got["both"], got["table"], got["texts"], got["sizes"]) == (text, {"a": 1}, [text], [1, 2])


class Outer:
    class Inside(Open):
        pass


def test_the_class_a_file_names_is_compared_without_asking_a_module_for_it(tmp_path, monkeypatch):
    """``__getattr__`` of a module can import what it is asked for."""
    lazy = types.ModuleType("tinyq_lazy")
    lazy.__getattr__ = call
    monkeypatch.setitem(sys.modules, "tinyq_lazy", lazy)
    stored = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    path = written(tmp_path / "q.ckpt", Open(), {**stored, "_class_path": "tinyq_lazy.Net"})
    with pytest.raises(CheckpointError, match=r"made from tinyq_lazy\.Net"):
        load_quantized(path, Open)
    path = written(tmp_path / "q.ckpt", Open(), {**stored, "_class_path": f"{HERE}.Outer.Inside"})
    assert type(load_quantized(path, Outer.Inside)) is Outer.Inside
    with pytest.raises(CheckpointError, match=r"made from .*Outer\.Inside"):
        load_quantized(path, Open)


@pytest.mark.parametrize("instantiator", [f"{HERE}.call", "subprocess.Popen", 3])
def test_an_instantiator_of_the_file_is_not_called(tmp_path, instantiator):
    path = written(tmp_path / "q.ckpt", Open(), {"_instantiator": instantiator, "name": "x", "act": "gelu"})
    for module in (
        load_quantized(path, Open),
        OpenMixed.load_from_checkpoint(path),
        load_quantized(path, Open, trust=1),
    ):
        assert (module.name, module.act) == ("x", Act.gelu), "as LightningCLI reads it"


@pytest.mark.parametrize("how", ["entry", "nested", "all"])
@pytest.mark.parametrize("text", ["${tinyq_call:1}", "a${tinyq_call:1}", "\\\\${tinyq_call:2}", "${a.${tinyq_call:3}}"])
def test_an_interpolation_of_the_file_is_not_resolved(tmp_path, how, text):
    register_resolver("tinyq_call", call, replace=True)
    if how == "all":
        top, stored, more = {"hparams_name": "config", "hparams_type": "DictConfig"}, {"x": [{"y": text}]}, {}
    elif how == "entry":
        top, stored, more = {}, {"config": {"y": text}}, {"configs": {"config": "omegaconf"}}
    else:
        note = {"path": ["config", "x"], "kind": "omegaconf"}
        top, stored, more = {}, {"config": {"x": {"y": text}}}, {"types": [note]}
    path = written(tmp_path / "q.ckpt", Takes({}), stored, top, **more)
    for load in (load_quantized, lambda path, kind: TakesMixed.load_from_checkpoint(path)):
        with pytest.raises(CheckpointError, match=r"interpolation.*trust=True \(--trust"):
            load(path, Takes)
    assert load_quantized(path, Takes, config={"a": 1}).values == [1], "given by hand"


@pytest.mark.parametrize("name", ["config", "several"])
@pytest.mark.parametrize("top", [{}, {"hparams_name": "config"}])
def test_a_class_of_the_users_annotations_resolves_nothing_either(tmp_path, name, top):
    """The notes of a file may name that class as one of mappings."""
    register_resolver("tinyq_call", call, replace=True)
    text = "${tinyq_call:1}"
    stored = {"config": {"y": text}} if name == "config" else {"config": {"y": 1}, "several": {"a": {"y": text}}}
    where = [] if top else [name] if name == "config" else [name, "a"]
    note = {"path": where, "kind": "mapping", "class": "omegaconf.dictconfig.DictConfig"}
    path = written(tmp_path / "q.ckpt", TakesConfigs(OmegaConf.create({})), stored, top, types=[note])
    for load in (load_quantized, lambda path, kind: TakesConfigsMixed.load_from_checkpoint(path)):
        with pytest.raises(CheckpointError, match=r"interpolation.*trust=True \(--trust"):
            load(path, TakesConfigs)


@pytest.mark.parametrize("how", ["entry", "nested"])
@pytest.mark.parametrize("text", ['a: "\\x24{tinyq_call:1}"', "a: 1", "[1, 2]", b"a: 1"])
def test_text_is_no_configuration(tmp_path, how, text):
    """OmegaConf reads text as YAML, in which an interpolation can be written without its characters."""
    register_resolver("tinyq_call", call, replace=True)
    if how == "entry":
        stored, more = {"config": text}, {"configs": {"config": "omegaconf"}}
    else:
        stored, more = {"config": {"x": text}}, {"types": [{"path": ["config", "x"], "kind": "omegaconf"}]}
    path = written(tmp_path / "q.ckpt", Takes({}), stored, **more)
    for load in (load_quantized, lambda path, kind: TakesMixed.load_from_checkpoint(path)):
        with pytest.raises(CheckpointError, match=r"is no omegaconf: a configuration is made from a dict or a list"):
            load(path, Takes)


def test_the_spec_in_a_file_resolves_nothing(tmp_path, capsys):
    register_resolver("tinyq_call", call, replace=True)
    module = Open()
    spec = {"method": "w8a32", "exclude": ["${tinyq_call:1}"], "rules": []}
    path = written(tmp_path / "q.ckpt", module, {}, spec=spec)
    assert main(["inspect", path]) == 0
    assert main(["verify", path]) == 0


def test_text_that_looks_like_an_interpolation_comes_back_as_text(tmp_path):
    texts = ["${oc.env:HOME}", "a\\${b}", "\\\\${c}", "plain"]
    module = Takes(OmegaConf.create({}))
    plan = quantize(module)
    config = OmegaConf.create(
        {f"k{i}": text.replace("\\", "\\\\").replace("${", "\\${") for i, text in enumerate(texts)}
    )
    base = {"epoch": 0, "global_step": 0, "hyper_parameters": {"config": config}}
    write_checkpoint(make_checkpoint(base, module.state_dict(), plan, {}, None, None), tmp_path / "q.ckpt")
    assert load_quantized(tmp_path / "q.ckpt", Takes).values == [config[key] for key in config]


class Back(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(8, width)

    def forward(self, x):
        return self.linear(x)


class FromYaml(Net):
    def __init__(
        self,
        back: nn.Module,
        act: Act = Act.relu,
        sizes: tuple[int, int] = (1, 2),
        root: Path = Path("."),
        note: str = "",
        lr: float = 0.02,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.back, self.act, self.sizes, self.root, self.note = back, act, sizes, root, note

    def forward(self, x):
        return super().forward(self.back(x))


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.filterwarnings("ignore:Attribute 'back' is an instance of `nn.Module`")
def test_what_lightning_cli_stored_loads_with_trust_or_with_the_object_given(tmp_path):
    callback = TinyQCallback("w8a32", report=False, dirpath=tmp_path)
    cli = LightningCLI(
        FromYaml,
        run=False,
        save_config_callback=None,
        trainer_defaults={"callbacks": [callback], "max_epochs": 1, "logger": False, "enable_checkpointing": False},
        args=[
            f"--model.back={HERE}.Back",
            "--model.back.width=8",
            "--model.act=gelu",
            "--model.sizes=[3,4]",
            "--model.root=/a/b",
            "--model.note=os.system",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ],
    )
    cli.trainer.fit(cli.model, loader(), loader(seed=1))
    path = callback.quantized_path
    with pytest.raises(CheckpointError, match=rf"back: {HERE}\.Back.*load_quantized\(path, FromYaml, back=\.\.\."):
        load_quantized(path, FromYaml)
    x = next(iter(loader()))[0]
    wanted = load_quantized(path, FromYaml, trust=True)
    given = load_quantized(path, FromYaml, back=Back(8))
    assert torch.equal(wanted(x), given(x))
    for module in (wanted, given):
        assert (module.act, module.sizes, module.root, module.note) == (Act.gelu, (3, 4), Path("/a/b"), "os.system")


def test_a_trainer_restores_a_file_that_names_things_and_calls_none(tmp_path):
    stored = {"_instantiator": f"{HERE}.call", "width": CLASS_PATH}
    path = written(tmp_path / "q.ckpt", Net(), stored)
    run: Trainer = trainer(tmp_path, TinyQCallback("w8a32", report=False))
    run.validate(Net(), loader(), ckpt_path=path, verbose=False, weights_only=True)
