"""What is promised to ``on_load_checkpoint``: it finds the entries of a training, and what is gone is asked for."""

from __future__ import annotations

import enum

import pytest
import torch
from models import Net, keeper, loader, trainer
from torch import nn

from tinyq_lightning import QuantizedCheckpointMixin, TinyQCallback, load_quantized
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.hooks import HookView

pytestmark = pytest.mark.filterwarnings("ignore:the quantized checkpoint holds plain data only")


class Reads(Net):
    """Stores objects, and reads entries of the training, as forecasting packages do."""

    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.criterion = nn.MSELoss()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["loss_fn"] = self.criterion
        checkpoint["special"] = {"loss": self.criterion, "n": 1}
        checkpoint["words"] = {"a": [1]}

    def on_load_checkpoint(self, checkpoint):
        assert list(checkpoint["callbacks"]) is not None
        self.schedulers = len(checkpoint["lr_schedulers"]) + len(checkpoint["optimizer_states"])
        self.loops = checkpoint["loops"].get("fit_loop")
        self.criterion = self.read(checkpoint)
        self.words = checkpoint.pop("words")
        checkpoint["state_dict"] = dict(checkpoint["state_dict"])

    def read(self, checkpoint):
        return checkpoint["loss_fn"]


class Gets(Reads):
    def read(self, checkpoint):
        return checkpoint.get("special") and checkpoint.get("loss_fn")


class OnlyWords(Reads):
    def read(self, checkpoint):
        assert checkpoint.get("no such entry") is None
        assert "no such entry" not in checkpoint


class Asks(Reads):
    def read(self, checkpoint):
        return checkpoint["loss_fn"] if "loss_fn" in checkpoint and "loss_fn" in checkpoint else None


class Puts(Reads):
    def read(self, checkpoint):
        return checkpoint.setdefault("loss_fn", nn.L1Loss())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reads")
    callback = TinyQCallback("w8a32", report=False)
    trainer(folder, keeper(folder), callback, max_epochs=1).fit(Reads(), loader(), loader(seed=1))
    return callback.quantized_path


def mixed(kind):
    return type("Mixed", (QuantizedCheckpointMixin, kind), {"__module__": __name__})


def test_entries_of_the_training_are_there_and_empty(path, tmp_path):
    for module in (load_quantized(path, OnlyWords), mixed(OnlyWords).load_from_checkpoint(path)):
        assert (module.schedulers, module.loops, module.words) == (0, None, {"a": [1]})
    module = OnlyWords()
    run = trainer(tmp_path, TinyQCallback("w8a32", report=False))
    run.validate(module, loader(seed=1), ckpt_path=path, verbose=False, weights_only=True)
    assert module.words == {"a": [1]}


@pytest.mark.parametrize(("kind", "name"), [(Reads, "loss_fn"), (Gets, "special"), (Puts, "loss_fn")])
def test_an_object_that_a_hook_reads_is_asked_for_by_name_by_every_door(path, tmp_path, kind, name):
    doors = [
        lambda: load_quantized(path, kind),
        lambda: mixed(kind).load_from_checkpoint(path),
        lambda: trainer(tmp_path).test(mixed(kind)(), loader(), ckpt_path=path, verbose=False, weights_only=True),
        lambda: trainer(tmp_path, TinyQCallback(report=False)).test(
            kind(), loader(), ckpt_path=path, verbose=False, weights_only=True
        ),
    ]
    for door in doors:
        with pytest.raises(CheckpointError, match=rf"reads '{name}', which the file could not hold: give it as it was"):
            door()


def test_a_hook_that_goes_on_without_an_object_is_warned_of_by_its_name(path, tmp_path):
    doors = [
        lambda: load_quantized(path, Asks),
        lambda: mixed(Asks).load_from_checkpoint(path),
        lambda: trainer(tmp_path, TinyQCallback(report=False)).test(
            Asks(), loader(), ckpt_path=path, verbose=False, weights_only=True
        ),
    ]
    for door in doors:
        with pytest.warns(UserWarning, match="asks for 'loss_fn', which the file could not hold: give it") as told:
            door()
        assert sum("asks for 'loss_fn'" in str(each.message) for each in told) == 1
    loss = nn.L1Loss()
    assert load_quantized(path, Asks, loss_fn=loss).criterion is loss


def test_an_object_that_is_given_reaches_the_hook(path):
    loss = nn.L1Loss()
    for kind in (Reads, Gets):
        assert load_quantized(path, kind, loss_fn=loss, special={"loss": loss}).criterion is loss
        module = mixed(kind).load_from_checkpoint(path, loss_fn=loss, special={"loss": loss})
        assert module.criterion is loss
        assert module.training
    assert "loss_fn" not in torch.load(path, weights_only=True)


class Kind(enum.Enum):
    SMALL = 1


class ReadsDeep(Net):
    """Reads and changes what lies deep in the entries, as code does that resumes with another learning rate."""

    def __init__(self, width=16, lr=0.02, kind: Kind | None = None):
        super().__init__(width, lr)
        self.save_hyperparameters()
        self.kind = kind

    def setup(self, stage):
        self.teacher = nn.LayerNorm(2)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["words"] = {"a": [1]}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = checkpoint["hyper_parameters"]["lr"]
        checkpoint["lr_schedulers"][-1]["base_lrs"] = [1.0]
        self.next_epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] + 1
        self.best = [each for each in checkpoint["callbacks"].values() if each["best_model_path"]]
        self.scale = checkpoint.get("MixedPrecision")
        self.words = checkpoint["words"].pop("a")
        self.stored = checkpoint["hyper_parameters"].pop("kind")
        if not hasattr(self, "teacher"):
            for name in [name for name in checkpoint["state_dict"] if name.startswith("teacher")]:
                del checkpoint["state_dict"][name]

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("method", ["w8a32", "w4a32"])
def test_a_hook_reads_and_changes_what_lies_deep_and_the_file_keeps_it(tmp_path, method):
    callback = TinyQCallback(method, report=False, strict=True)
    module = ReadsDeep(kind=Kind.SMALL)
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=1).fit(module, loader(), loader(seed=1))
    tested = ReadsDeep(kind=Kind.SMALL)
    for run in (trainer(tmp_path, TinyQCallback(report=False)), trainer(tmp_path, TinyQCallback(when="test_start"))):
        run.test(tested, loader(), ckpt_path=callback.quantized_path, verbose=False, weights_only=True)
    doors = (load_quantized, lambda path, kind: mixed(kind).load_from_checkpoint(path))
    for each in (tested, *(door(callback.quantized_path, ReadsDeep) for door in doors)):
        assert (each.next_epoch, each.best, each.scale, each.words) == (1, [], None, [1])
        assert each.stored is Kind.SMALL
    assert load_quantized(callback.quantized_path, ReadsDeep, lr=1.0).hparams.lr == 1.0
    content = torch.load(callback.quantized_path, weights_only=True)
    assert (content["hyper_parameters"]["kind"], content["words"]) == (1, {"a": [1]})
    assert "teacher.weight" in content["state_dict"]


class PutsWeights(Net):
    """Puts float weights where it read them, and takes the whole state dict."""

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint.pop("state_dict")
        state["head.weight"] = 1.0 * state["head.weight"]
        if self.hparams.lr != 0:
            checkpoint["state_dict"] = state


def test_float_weights_that_a_hook_puts_beside_their_codes_are_not_loaded(path):
    want = load_quantized(path, Net).state_dict()
    for lr in (0.1, 0.0):
        found = load_quantized(path, PutsWeights, lr=lr).state_dict()
        assert all(torch.equal(found[name], value) for name, value in want.items())


def test_a_pair_of_one_tuple_deep_down_is_copied_once(path):
    content, pair = torch.load(path, weights_only=True), (1,)
    for _ in range(40):
        pair = (pair, pair)
    assert HookView({**content, "extra": pair}, Net, "q.ckpt")["extra"][0][1][0]


class ReadsWeights(Net):
    """Asks the state dict for float weights by their names, as code that grows a vocabulary or a head does."""

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        self.rows = state["head.weight"].shape[0]
        self.largest = state.get("head.weight").abs().max()
        self.answers = ("head.weight" in state, "head.bias" in state, "other.weight" in state)
        self.keys = list(state)


@pytest.mark.parametrize("method", ["w8a32", "w4a32"])
def test_a_hook_finds_the_float_weights_by_their_names(tmp_path, method):
    callback = TinyQCallback(method, report=False)
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=1).fit(ReadsWeights(), loader(), loader(seed=1))
    module, run = ReadsWeights(), trainer(tmp_path, TinyQCallback("w8a32", report=False))
    run.validate(module, loader(seed=1), ckpt_path=callback.quantized_path, verbose=False, weights_only=True)
    doors = (load_quantized, lambda path, kind: mixed(kind).load_from_checkpoint(path))
    for each in (module, *(door(callback.quantized_path, ReadsWeights) for door in doors)):
        assert each.rows == 4
        assert each.answers == (True, True, False)
        assert torch.equal(each.largest, each.head.weight.abs().max())
        assert {"head.int8_weights", "head.int4_weights"}.intersection(each.keys)
        assert "head.weight" not in each.keys


class ReadsArgument(Net):
    """Reads an argument from the stored hyper-parameters, as code does that looks up names of variables there."""

    def __init__(self, width=16, lr=0.02, criterion=None):
        super().__init__(width, lr)
        self.save_hyperparameters()

    def on_load_checkpoint(self, checkpoint):
        self.read = checkpoint["hyper_parameters"]["criterion"]
        checkpoint["hyper_parameters"].update(width=self.hparams.width)


@pytest.mark.filterwarnings(
    "ignore:Attribute 'criterion'", "ignore:TinyQ. the quantized checkpoint holds plain data only"
)
def test_an_argument_that_a_hook_reads_is_asked_for_by_name_by_every_door(tmp_path):
    callback, given = TinyQCallback("w8a32", report=False, strict=True), {"criterion": nn.L1Loss()}
    trainer(tmp_path, callback, max_epochs=0).fit(ReadsArgument(**given), loader(), loader(seed=1))
    for load in (load_quantized, lambda path, kind, **given: mixed(kind).load_from_checkpoint(path, **given)):
        assert load(callback.quantized_path, ReadsArgument, **given).read is given["criterion"]
    doors = ((mixed(ReadsArgument), []), (ReadsArgument, [TinyQCallback(report=False)]))
    for kind, callbacks in doors:
        run, module = trainer(tmp_path, *callbacks), kind(**given)
        with pytest.raises(CheckpointError, match=r"reads 'criterion', which the file could not hold: give it as it"):
            run.test(module, loader(), ckpt_path=callback.quantized_path, verbose=False, weights_only=True)


def test_an_error_of_a_hook_names_the_file(path):
    class Fails(Reads):
        def read(self, checkpoint):
            return checkpoint["epoch"]["no"]

    with pytest.raises(CheckpointError, match=r"\.ckpt: on_load_checkpoint of Fails failed: TypeError"):
        load_quantized(path, Fails)


class Told(Net):
    """Keeps an argument in an entry of its own as well, under the same name."""

    def __init__(self, width=16, lr=0.02, parameters=None):
        super().__init__(width, lr)
        self.save_hyperparameters()
        self.parameters_of_data = parameters

    def on_save_checkpoint(self, checkpoint):
        checkpoint["parameters"] = self.parameters_of_data

    def on_load_checkpoint(self, checkpoint):
        self.read = checkpoint["parameters"]


class ToldMore(Told):
    """As forecasting packages have it: the class itself does not name the argument."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


@pytest.mark.parametrize("kind", [Told, ToldMore])
@pytest.mark.parametrize("wrap", [lambda each: each, lambda each: {"scaler": each, "n": 1}])
@pytest.mark.filterwarnings("ignore:TinyQ. the quantized checkpoint holds plain data only", "ignore:Attribute")
def test_an_argument_that_is_an_entry_too_is_given_once(tmp_path, kind, wrap):
    callback, given = TinyQCallback("w8a32", report=False, strict=True), wrap(nn.MSELoss())
    trainer(tmp_path, callback, max_epochs=0).fit(kind(parameters=given), loader(), loader(seed=1))
    with pytest.raises(CheckpointError, match="parameters"):
        load_quantized(callback.quantized_path, kind)
    for load in (load_quantized, lambda path, kind, **more: mixed(kind).load_from_checkpoint(path, **more)):
        module = load(callback.quantized_path, kind, parameters=given)
        assert module.read is given
        assert module.parameters_of_data is given
