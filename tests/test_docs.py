"""Every block of code, YAML and message in README.md and docs/ is run, read or found."""

from __future__ import annotations

import ast
import inspect
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from exported_nets import HAS_ONNX
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from models import loader
from torchmetrics.classification import MulticlassAccuracy

from tinyq_lightning import QuantizationSpec, QuantizedModelSummary, TinyQCallback, summarize
from tinyq_lightning.command.cli import main
from tinyq_lightning.errors import ExportError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


class Net(LightningModule):
    """What the pages call ``Net``: layers by the names that they use, and a metric ``val_acc``."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.stem = torch.nn.Linear(8, width)
        block = [
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, width),
        ]
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(*block)])
        self.head = torch.nn.Linear(width, 4)
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.example_input_array = torch.zeros(2, 8)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)

    def test_step(self, batch, index):
        self.accuracy(self(batch[0]), batch[1])
        self.log("test_acc", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Data(LightningDataModule):
    """What the pages call ``datamodule``."""

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()

    def test_dataloader(self):
        return loader()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """The names that the pages use, in a folder with a float and a quantized file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "1")
    monkeypatch.setenv("PL_TRAINER_LOGGER", "False")
    monkeypatch.setenv("PL_TRAINER_ENABLE_PROGRESS_BAR", "False")
    trainer = Trainer(callbacks=[TinyQCallback("w8a32", report=False)], enable_checkpointing=False)
    model = Net()
    trainer.fit(model, Data())
    trainer.save_checkpoint("epoch=7.ckpt")
    assert main(["quantize", "epoch=7.ckpt", "--model", f"{__name__}:Net"]) == 0
    (tmp_path / "spec.yaml").write_text("method: w8a32\nexclude: [head]\n")
    names = {
        "Net": Net,
        "model": model,
        "datamodule": Data(),
        "Trainer": Trainer,
        "ModelCheckpoint": ModelCheckpoint,
        "TinyQCallback": TinyQCallback,
        "QuantizedModelSummary": QuantizedModelSummary,
        "summarize": summarize,
    }
    return {"__name__": "page", **names}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_every_page_runs(page, stage, recwarn):
    for block in blocks(page, "python"):
        needs_newer = not HAS_ONNX and re.search(r"\.onnx\b", block)
        with pytest.raises(ExportError, match=r"needs torch 2\.8") if needs_newer else nullcontext():
            exec(compile(block, f"{page.name}: {block.splitlines()[0]}", "exec"), stage)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_the_yaml_of_every_page_is_a_spec(page):
    for block in blocks(page, "yaml"):
        assert QuantizationSpec.from_dict(yaml.safe_load(block)).method in block


def test_every_link_leads_somewhere():
    included = re.compile(r'^--8<-- "(.*)"$', re.M)
    for page in PAGES:
        for target in [*(page.parent / link for link in LINK.findall(page.read_text()))]:
            assert target.exists(), f"{page.name} links to {target}"
        for target in included.findall(page.read_text()):
            assert (ROOT / target).is_file()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert sorted(re.findall(r"[\w-]+\.md", navigation)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_every_message_of_the_troubleshooting_is_one_of_the_package():
    said = " ".join(
        node.value
        for file in (ROOT / "tinyq_lightning").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(headings) > 10
    assert [heading for heading in headings if heading not in said] == []


def test_the_page_of_the_callback_has_every_argument():
    page = (ROOT / "docs" / "callback.md").read_text()
    arguments = set(inspect.signature(TinyQCallback).parameters)
    assert {name for name in arguments if f"`{name}`" not in page} == set()


def test_the_page_of_the_yaml_has_every_key():
    shown = yaml.safe_load(blocks(ROOT / "docs" / "spec.md", "yaml")[0])
    known = set(QuantizationSpec().to_dict())
    assert known - set(shown) <= {"methods", "keep"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
