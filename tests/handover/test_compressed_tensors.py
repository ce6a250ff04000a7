"""A Hugging Face model in the layout of compressed-tensors: ``from_pretrained`` reads what was written."""

import json

import pytest
import torch
from torch import nn

from tinyq_lightning import export, quantize
from tinyq_lightning.errors import ExportError

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the two libraries about themselves


def bert(kind="BertModel", **settings):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=30, num_hidden_layers=2, num_attention_heads=2, intermediate_size=62, **settings
    )
    return getattr(transformers, kind)(config).eval()


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)).eval()


def ids():
    return torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))


class Task(nn.Module):
    """Wraps the model, as a LightningModule does."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(30, 3)

    def forward(self, ids):
        return self.head(self.model(ids).last_hidden_state[:, 0])


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
def test_auto_model_reads_what_was_written(tmp_path, method):
    model = bert()
    quantize(model, method)
    report = export(model, tmp_path / "q", ids(), to="compressed-tensors")
    assert report.relative_error < (0.02 if method == "w8a8" else 1e-3)
    read = transformers.AutoModel.from_pretrained(tmp_path / "q").eval()
    with torch.no_grad():
        out, wanted = read(ids()).last_hidden_state, model(ids()).last_hidden_state
    torch.testing.assert_close(out, wanted, rtol=3e-2, atol=3e-2)
    held = transformers.utils.quantization_config.CompressedTensorsConfig(
        **json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    )
    assert held.quantization_config.config_groups["group_0"].weights.num_bits == 8


def test_a_wrapped_model_is_found_and_compared_inside_of_its_wrapper(tmp_path):
    task = Task(bert())
    quantize(task, {"method": "w8a8", "exclude": ["head"], "rules": [{"match": "*.query", "method": "w8a32"}]})
    inner = task.model
    report = export(task, tmp_path / "q", ids(), to="compressed-tensors")
    assert task.model is inner
    assert [each.name for each in report.outputs] == ["output"]
    read = transformers.AutoModel.from_pretrained(tmp_path / "q").eval()
    with torch.no_grad():
        torch.testing.assert_close(read(ids()).last_hidden_state, inner(ids()).last_hidden_state, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("method", ["w8a32", "w8a8"])
def test_a_head_that_is_tied_and_layers_of_other_kinds_are_floats(tmp_path, method):
    model = gpt2()
    quantize(model, method)
    with pytest.raises(ExportError, match="no linear layer of GPT2LMHeadModel is quantized for itself"):
        export(model, tmp_path / "q", ids(), to="compressed-tensors")
    model = bert("BertForMaskedLM")
    quantize(model, method)
    report = export(model, tmp_path / "q", ids(), to="compressed-tensors")
    assert report.relative_error < (0.02 if method == "w8a8" else 1e-3)
    assert any("written as floats" in note for note in report.notes)
    base = transformers.AutoModel.from_pretrained(tmp_path / "q", add_pooling_layer=False).eval()
    with torch.no_grad():
        out, wanted = base(ids()).last_hidden_state, model.bert(ids()).last_hidden_state
    torch.testing.assert_close(out, wanted, rtol=3e-2, atol=3e-2)


def test_a_module_without_such_a_model_is_an_error(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    quantize(model, "w8a8")
    with pytest.raises(ExportError, match="for a Hugging Face model, and Sequential holds none"):
        export(model, tmp_path / "q", torch.randn(2, 8), to="compressed-tensors")
    both = nn.ModuleDict({"one": bert(), "two": bert()})
    assert not list(tmp_path.iterdir())
    both.forward = lambda ids: both["one"](ids).last_hidden_state
    quantize(both, "w8a8")
    with pytest.raises(ExportError, match="holds several: one, two"):
        export(both, tmp_path / "q", ids(), to="compressed-tensors")


def test_save_pretrained_says_what_to_do(tmp_path):
    task = Task(bert())
    quantize(task, "w8a32")
    with pytest.raises(ValueError, match=r"export\(model, folder, inputs, to='compressed-tensors'\)"):
        task.model.save_pretrained(tmp_path / "q")
    assert not list(tmp_path.iterdir())
    bert().save_pretrained(tmp_path / "float")


def test_nothing_is_printed(tmp_path, capfd):
    model = bert()
    quantize(model, "w8a32")
    export(model, tmp_path / "q", ids(), to="compressed-tensors")
    assert capfd.readouterr() == ("", "")
