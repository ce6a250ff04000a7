"""Folders of torch.distributed.checkpoint are read tensor by tensor, and nothing that they name is called."""

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightnings import __version__
from models import Net
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.serialization import _get_layout

from tinyq_lightning import load_quantized
from tinyq_lightning.command import main
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file import Folder, open_checkpoint, read_checkpoint


@pytest.fixture
def module():
    return Net()


@pytest.fixture
def folder(module, tmp_path):
    """A folder as Lightning's strategies write it, by one process."""
    path = tmp_path / "epoch=1.ckpt"
    state = {"state_dict": module.state_dict(), "optimizer_0": {"state": {"head.weight": {"step": torch.ones(())}}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.save(state, checkpoint_id=path, no_dist=True)
    rest = {"epoch": 1, "global_step": 12, "pytorch-lightning_version": __version__}
    torch.save({**rest, "hyper_parameters": dict(module.hparams), "loops": {"x": torch.ones(2)}}, path / "meta.pt")
    return path


def test_a_folder_has_the_content_of_a_file_with_its_tensors_read_when_asked_for(folder, module):
    with open_checkpoint(f"{folder}/") as source:
        assert isinstance(source, Folder)
        content = source.content
        assert (content["epoch"], content["hyper_parameters"]["width"]) == (1, 16)
        assert all(value.is_meta for value in content["state_dict"].values())
        assert content["state_dict"].keys() == module.state_dict().keys()
        for name, value in module.state_dict().items():
            assert torch.equal(source.read(content["state_dict"][name]), value)
        assert torch.equal(source.read_all(content)["loops"]["x"], torch.ones(2))


def test_quantize_takes_a_folder_and_leaves_the_file_of_the_same_weights(folder, module, tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    with Folder(folder) as source:
        torch.save(source.read_all(source.content), tmp_path / "whole" / "epoch=1.ckpt")
    for path in (folder, tmp_path / "whole" / "epoch=1.ckpt"):
        assert main(["quantize", str(path), "--model", "models:Net", "--method", "w8a16"]) == 0
    assert "epoch=1.ckpt  " in capsys.readouterr().out
    one, other = tmp_path / "w8a16-epoch=1.ckpt", tmp_path / "whole" / "w8a16-epoch=1.ckpt"
    states = [read_checkpoint(path)["state_dict"] for path in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert load_quantized(one, Net).head.int8_weights.shape == (4, 16)
    assert main(["verify", str(one), "--float", str(folder), "--model", "models:Net"]) == 0
    assert main(["inspect", str(folder), "--model", "models:Net"]) == 0
    assert main(["evaluate", str(folder), str(one), "--model", "models:Net", "--data", "models:Blobs"]) == 0


class Planted:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_what_the_metadata_names_is_not_called(folder, tmp_path):
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "trace")))
    with pytest.raises(CheckpointError, match=r"\.metadata names posix\.mkdir"):
        Folder(folder, trust=True)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("named", [Metadata, MetadataIndex, TensorProperties, _get_layout])
def test_the_metadata_changes_no_class_and_no_function_that_it_names(folder, named):
    """The code BUILD of pickle sets attributes of whatever is on its stack, a class too."""
    attribute = pickle.dumps((None, {"planted": 1}), 2)[2:-1]
    name = f"c{named.__module__}\n{named.__name__}\n".encode()
    (folder / ".metadata").write_bytes(b"\x80\x02" + name + attribute + b"b.")
    with pytest.raises(CheckpointError, match=r"epoch=1\.ckpt.*\.metadata"):
        Folder(folder)
    assert not hasattr(named, "planted")


def test_what_a_shard_or_the_rest_names_is_not_called(folder, tmp_path):
    torch.save({"x": Planted(tmp_path / "trace")}, folder / "meta.pt")
    with pytest.raises(CheckpointError, match="more than tensors and plain data"):
        Folder(folder)
    assert not (tmp_path / "trace").exists()


def altered(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_damage_is_told_by_the_name_of_the_folder(folder):
    shard = folder / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with Folder(folder) as source, pytest.raises(CheckpointError, match="truncated or damaged"):
        source.read_all(source.content)
    shard.write_bytes(whole)
    kept = (folder / ".metadata").read_bytes()

    def grow(metadata):
        metadata.state_dict_metadata["state_dict.head.weight"].size = torch.Size((10**6, 10**6))

    def leave(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = f"../{info.relative_path}"

    def swap(metadata):
        found = {index.fqn: info for index, info in metadata.storage_data.items()}
        one, other = found["state_dict.head.weight"], found["state_dict.head.bias"]
        one.offset, other.offset, one.length, other.length = other.offset, one.offset, other.length, one.length

    def move(metadata):
        for stored in metadata.state_dict_metadata.values():
            if hasattr(stored, "chunks"):
                stored.chunks[0].offsets = torch.Size(1 for _ in stored.size)
        metadata.storage_data = {
            MetadataIndex(index.fqn, [1 for _ in index.offset] if index.offset is not None else None): info
            for index, info in metadata.storage_data.items()
        }

    def rename(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = ".."

    def flatten(metadata):
        for stored in metadata.state_dict_metadata.values():
            if hasattr(stored, "chunks"):
                stored.chunks[0].sizes = 5

    for change, told in (
        (grow, "do not make up head.weight"),
        (leave, "outside of the folder"),
        (swap, "does not hold"),
        (move, "the part of .* cannot be read"),
        (rename, "the part of .* cannot be read"),
        (flatten, r"\.metadata cannot be read"),
    ):
        altered(folder, change)
        with pytest.raises(CheckpointError, match=f"epoch=1.ckpt.*{told}"), Folder(folder) as source:
            source.read_all(source.content)
        (folder / ".metadata").write_bytes(kept)
    (folder / ".metadata").write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        Folder(folder)


def test_a_folder_of_something_else_is_refused_with_what_it_lacks(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no file \.metadata.*convert_zero_checkpoint_to_fp32_state_dict"):
        open_checkpoint(tmp_path)
    (folder / "meta.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no file meta\.pt"):
        open_checkpoint(folder)
