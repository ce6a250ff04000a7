"""A quantized file runs in plain PyTorch: any class or function makes the module, and Lightning is not imported."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from models import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tinyq_lightning import TinyQCallback, export, load_quantized
from tinyq_lightning.errors import CheckpointError, ModelError

SERVER = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width, words=20):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, words)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


def small():
    return Net(16)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A quantized file of a LightningModule that holds ``self.net``, and one of a module that is the net itself."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "server.py").write_text(SERVER)
    space = {}
    exec(SERVER, space)

    class Task(LightningModule):
        def __init__(self, width=16, lr=0.1):
            super().__init__()
            self.save_hyperparameters()
            self.net = space["Net"](width)
            self.other = nn.Linear(4, 4)

        def forward(self, ids):
            return self.net(ids)

        def training_step(self, batch, index):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, index):
            self.log("val_loss", self.training_step(batch, index))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Whole(space["Net"], LightningModule):
        training_step, validation_step = Task.training_step, Task.validation_step
        configure_optimizers = Task.configure_optimizers

    data = DataLoader(TensorDataset(torch.randint(20, (8, 5))), batch_size=4)
    for name, module in (("task", Task()), ("whole", Whole(16))):
        callback = TinyQCallback("w8a8", dirpath=str(folder), filename=name, weights="current", report=False)
        trainer(folder, callback, max_epochs=1, enable_checkpointing=False).fit(module, data, data)
        assert callback.error is None
    ids = torch.randint(20, (3, 5))
    with torch.no_grad():
        wanted = load_quantized(folder / "task.ckpt", Task).net(ids)
        whole = load_quantized(folder / "whole.ckpt", Whole, width=16)(ids)
    torch.save({"ids": ids, "wanted": wanted, "whole": whole}, folder / "case.pt")
    return folder


@pytest.fixture
def server(folder, monkeypatch):
    """The names of the server, and the case; without gradients, as in serving."""
    monkeypatch.chdir(folder)
    space = {}
    exec(SERVER, space)
    with torch.no_grad():
        yield space | torch.load(folder / "case.pt")


WITHOUT_LIGHTNING = """
import importlib.abc, sys

REFUSED = "lightning", "lightning_utilities", "torchmetrics", "pytorch_lightning", "lightning_fabric"

class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *rest):
        if name.split(".")[0] in REFUSED:
            raise ImportError(name)

sys.meta_path.insert(0, Refusing())
import functools
import torch
from server import Net, small
from tinyq_lightning import QuantizationSpec, load_quantized, quantize, quantized, export

case = torch.load("case.pt")
with torch.no_grad():
    for net in (
        load_quantized("task.ckpt", Net, part="net"),
        load_quantized("task.ckpt", small, part="net"),
        load_quantized("task.ckpt", functools.partial(Net, 16), part="net"),
        load_quantized("task.ckpt", lambda: Net(16), part="net"),
        load_quantized("task.ckpt", "server:Net", part="net", width=16),
        load_quantized("task.ckpt", "server:small", part="net"),
    ):
        assert type(net) is Net and not net.training
        assert torch.equal(net(case["ids"]), case["wanted"])
        assert net.head.int8_weights.data_ptr() == net.embed.int8_weights.data_ptr()
    whole = load_quantized("whole.ckpt", Net, width=16)
    assert torch.equal(whole(case["ids"]), case["whole"])
    whole = load_quantized("whole.ckpt", small)
    export(whole, "net.pt2", case["ids"], overwrite=True)
quantize(Net(8), QuantizationSpec.from_dict({"method": "w8a16", "exclude": ["head"]}))
assert not [name for name in sys.modules if name.split(".")[0] in ("lightning", "torchmetrics")]
"""


def test_a_process_that_cannot_import_lightning_loads_and_runs_it(folder):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_LIGHTNING], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_stored_hyper_parameters_are_given_to_what_takes_them(server):
    seen = {}

    def makes(width, words=20):
        seen.update(width=width, words=words)
        return server["Net"](width, words)

    assert torch.equal(load_quantized("task.ckpt", makes, part="net")(server["ids"]), server["wanted"])
    assert seen == {"width": 16, "words": 20}
    with pytest.raises(CheckpointError, match=r"makes could not be built.*load_quantized\(path, makes, width=\.\.\.\)"):
        load_quantized("whole.ckpt", makes)
    with pytest.raises(CheckpointError, match=r"'embed' is \[20, 16\].*and \[20, 8\] in Net"):
        load_quantized("whole.ckpt", makes, width=8)


class Base(nn.Module):
    def __init__(self, config, **others):
        super().__init__()
        self.size = others["inferred"]
        self.seed = others["seed"] if "seed" in others else 0  # noqa: SIM401


class Derived(Base):
    def __init__(self, config, **kwargs):
        kwargs["size"] = 3  # written, not read
        super().__init__(config, **kwargs)


def test_an_error_names_all_arguments_that_are_still_needed(server):
    with pytest.raises(CheckpointError, match=r"load_quantized\(path, Derived, config=\.\.\., inferred=\.\.\.\)"):
        load_quantized("task.ckpt", Derived)
    with pytest.raises(CheckpointError, match=r"KeyError: 'inferred'.*\(path, Derived, inferred=\.\.\.\)"):
        load_quantized("task.ckpt", Derived, config=1)


def test_a_part_that_is_a_single_layer_is_an_error_that_names_the_module_above(server):
    with pytest.raises(CheckpointError, match=r"'net\.lstm' is a single quantized layer .*part='net' loads"):
        load_quantized("task.ckpt", lambda: torch.nn.LSTM(8, 8), part="net.lstm")


def test_a_part_is_asked_for_by_name(server):
    with pytest.raises(
        CheckpointError, match=r"no layer of that name\..*this one as its part 'net', give .*part='net'"
    ):
        load_quantized("task.ckpt", server["Net"])
    with pytest.raises(CheckpointError, match=r"no part 'nett' with tensors\. Its parts are: net, other"):
        load_quantized("task.ckpt", server["Net"], part="nett")


def test_safetensors_are_loaded_too(server, tmp_path):
    export("task.ckpt", tmp_path / "task.safetensors")
    net = load_quantized(tmp_path / "task.safetensors", server["Net"], part="net")
    assert torch.equal(net(server["ids"]), server["wanted"])


def test_what_makes_no_module_is_refused_in_short(server):
    net = server["Net"](16)
    with pytest.raises(ModelError) as raised:
        load_quantized("task.ckpt", net)
    assert "not a module: give Net instead of Net(...)" in str(raised.value)
    assert "Embedding" not in str(raised.value)
    for wrong, message in (
        (dict, "dict is no nn.Module"),
        (7, "not a int"),
        (lambda: {}, "returned a dict, not an nn.Module"),
        ("math:pi", "'math:pi' is neither a class nor a function"),
        ("server:nothing", "cannot be imported"),
        (functools.partial(list), "list returned a list"),
    ):
        with pytest.raises(ModelError, match=message):
            load_quantized("task.ckpt", wrong, part="net")


def test_strict_is_as_the_user_says(server):
    class More(server["Net"]):
        def __init__(self, width):
            super().__init__(width)
            self.more = nn.Linear(2, 2)

    with pytest.raises(CheckpointError, match="does not fit More"):
        load_quantized("task.ckpt", More, part="net")
    assert load_quantized("task.ckpt", More, part="net", strict=False).more.weight.shape == (2, 2)


def test_the_file_is_left_as_it_is(server, folder):
    before = Path("task.ckpt").read_bytes()
    load_quantized("task.ckpt", server["Net"], part="net")
    assert Path("task.ckpt").read_bytes() == before
