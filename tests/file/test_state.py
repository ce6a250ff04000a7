"""Sparse tensors and tensor subclasses in the state dict are saved as what they are, or refused before training."""

from __future__ import annotations

import pytest
import torch
from models import Net, keeper, loader, trainer
from torch import nn

from tinyq_lightning import QuantizedCheckpointMixin, TinyQCallback, export, load_quantized
from tinyq_lightning.errors import ModelError
from tinyq_lightning.file import check_state, digest_of


class Tagged(torch.Tensor):
    pass


class Graph(Net):
    """A network with its adjacency as a sparse buffer, a tagged buffer and a parameter of a type of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("adjacency", torch.eye(8).to_sparse())
        self.register_buffer("tagged", torch.ones(8).as_subclass(Tagged))

    def forward(self, x):
        tagged = self.tagged.as_subclass(torch.Tensor)
        return super().forward(torch.sparse.mm(self.adjacency, x.T).T * tagged)


def test_sparse_and_tagged_buffers_are_saved_and_loaded(tmp_path):
    callback, model = TinyQCallback("w8a32", report=False), Graph()
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=1).fit(model, loader(), loader(seed=1))
    again = load_quantized(callback.quantized_path, Graph)
    assert again.adjacency.layout == torch.sparse_coo
    assert torch.equal(again.adjacency.to_dense(), torch.eye(8))
    x = torch.randn(5, 8)
    torch.testing.assert_close(again(x), model.eval()(x), atol=0.05, rtol=0.05)


def test_a_sparse_tensor_counts_by_its_entries():
    eye = torch.eye(4).to_sparse()
    assert digest_of(eye) == digest_of(torch.eye(4).to_sparse())
    assert digest_of(eye) != digest_of(torch.eye(4))
    assert digest_of(eye) != digest_of(2 * eye)


class Rows(nn.Module):
    def __init__(self, state=None):
        super().__init__()
        self.state = state
        if state is None:
            self.register_buffer("rows", torch.eye(4).to_sparse_csr())

    def get_extra_state(self):
        return self.state


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize(("state", "said"), [(None, "'rows' is a Tensor of layout sparse_csr"), (object(), "object")])
def test_what_a_file_cannot_hold_is_refused_by_name(state, said):
    module = Rows(state)
    with pytest.raises(ModelError, match=said):
        check_state(module.state_dict())


class Versioned(QuantizedCheckpointMixin, Net):
    """Counts its versions by text, as some models of transformers do."""

    _version = "0.0.5"  # type: ignore[assignment]


class VersionedByPair(QuantizedCheckpointMixin, Net):
    _version = (1, 2)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Versioned, VersionedByPair])
def test_a_model_may_count_its_versions_as_it_likes(tmp_path, kind):
    callback, model = TinyQCallback("w8a32", report=False, strict=True), kind()
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=1).fit(model, loader(), loader(seed=1))
    export(callback.quantized_path, tmp_path / "net.safetensors")
    paths = callback.quantized_path, tmp_path / "net.safetensors"
    doors = [kind.load_from_checkpoint(paths[0]), *(load_quantized(path, kind) for path in paths)]
    x = torch.randn(5, 8)
    assert len({tuple(module.eval()(x).flatten().tolist()) for module in doors}) == 1
    assert all(module.state_dict()._metadata[""] == {"version": kind._version} for module in doors)


def test_a_version_that_is_no_plain_data_is_refused_before_training(tmp_path):
    class Odd(Net):
        _version = object()  # type: ignore[assignment]

    with pytest.raises(
        ModelError, match="the _version of the model is of the type object, which a quantized checkpoint"
    ):
        trainer(tmp_path, TinyQCallback("w8a32")).fit(Odd(), loader(), loader(seed=1))
