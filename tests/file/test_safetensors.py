"""What is promised of the export: other readers find the tensors, and the way back loses nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from models import Net
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.checkpoint import make_checkpoint, read_checkpoint, write_checkpoint
from tinyq_lightning.file.safetensors import read_safetensors, write_safetensors
from tinyq_lightning.plan import Plan
from tinyq_lightning.spec import QuantizationSpec


class Odd(Net):
    """Ties, an empty buffer, memory that is not contiguous, a state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.LayerNorm(4), nn.LayerNorm(4)
        self.two.weight = self.one.weight
        self.register_buffer("nothing", torch.empty(0, 3))
        self.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)

    def get_extra_state(self):
        return {"words": ("a", b"b"), "nan": float("nan"), 3: {1, 2}}

    def set_extra_state(self, state):
        pass


def checkpoint(path):
    module = Odd()
    plan = quantize(module)
    base = {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {"sizes": (1, 2), "table": torch.arange(3), "kind": torch.float16, "at": 1j},
    }
    write_checkpoint(make_checkpoint(base, module.state_dict(), plan, {}, None, None), path)
    return path


def test_there_and_back_gives_the_same_bytes(tmp_path):
    path = checkpoint(tmp_path / "q.ckpt")
    write_safetensors(read_checkpoint(path), tmp_path / "q.safetensors")
    write_checkpoint(read_safetensors(tmp_path / "q.safetensors"), tmp_path / "back.ckpt")
    assert (tmp_path / "back.ckpt").read_bytes() == Path(path).read_bytes()


def test_other_readers_find_tensors_and_plan(tmp_path):
    path = checkpoint(tmp_path / "q.ckpt")
    content = read_checkpoint(path)
    write_safetensors(content, tmp_path / "q.safetensors")
    with safe_open(tmp_path / "q.safetensors", "np") as file:
        codes, scales = file.get_tensor("head.int8_weights"), file.get_tensor("head.scales")
        tinyq = json.loads(file.metadata()["tinyq"])
    assert (str(codes.dtype), str(scales.dtype)) == ("int8", "float32")
    assert tinyq["plan"] == content["tinyq"]["plan"]
    weight = torch.from_numpy(codes).float() * torch.from_numpy(scales)[:, None]
    assert torch.equal(
        weight, content["state_dict"]["head.int8_weights"] * content["state_dict"]["head.scales"][:, None]
    )


def test_a_damaged_export_comes_back_whole_or_is_refused_by_name(tmp_path):
    path, dice = tmp_path / "q.safetensors", random.Random(0)
    write_safetensors(read_checkpoint(checkpoint(tmp_path / "q.ckpt")), path)
    data, wanted = path.read_bytes(), read_checkpoint(tmp_path / "q.ckpt")["tinyq"]["digests"]
    refusals = []
    for _ in range(200):
        changed, place = bytearray(data), dice.randrange(len(data))
        changed[place] ^= 1 << dice.randrange(8)
        path.write_bytes(changed if dice.random() < 0.8 else data[:place])
        try:
            assert read_safetensors(path)["tinyq"]["digests"] == wanted
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all(refusal.startswith(f"{path}: ") for refusal in refusals)
    with pytest.raises(CheckpointError, match="no such file"):
        read_safetensors(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    "odd",
    [
        {"dtype": "nn"},
        {"dtype": "hub"},
        {"dtype": "no_such"},
        {"dtype": []},
        {"float": 10**400},
        {"complex": [10**400, 1]},
        {"device": "no_such"},
    ],
    ids=str,
)
def test_a_value_that_no_export_has_is_refused_as_damage(tmp_path, odd):
    path = tmp_path / "q.safetensors"
    write_safetensors(read_checkpoint(checkpoint(tmp_path / "q.ckpt")), path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    content = json.loads(metadata["checkpoint"])
    content["dict"].append(["odd", odd])
    save_file(tensors, path, metadata | {"checkpoint": json.dumps(content)})
    with pytest.raises(CheckpointError, match=r"q\.safetensors: the file is damaged"):
        read_safetensors(path)


@pytest.mark.parametrize("rows", [4, 6, 1])
def test_a_weight_tied_to_its_transpose_is_exported_in_full(tmp_path, rows):
    """As a tied Conv1D of Hugging Face, or ``head.weight = embed.weight.t()``, keeps it."""
    weight = torch.randn(rows, 4)
    content = read_checkpoint(checkpoint(tmp_path / "q.ckpt"))
    state = content["state_dict"]
    state["embed.weight"], state["out.weight"], state["out.same"] = weight, weight.t(), weight.t()
    made = make_checkpoint({"epoch": 0}, state, Plan((), QuantizationSpec()), {}, None, None)
    write_safetensors(made, tmp_path / "q.safetensors")
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("embed.weight"), weight)
        assert torch.equal(file.get_tensor("out.weight"), weight.t())
    again = read_safetensors(tmp_path / "q.safetensors")["state_dict"]
    assert torch.equal(again["out.weight"], weight.t())
    assert torch.equal(again["out.same"], weight.t())
