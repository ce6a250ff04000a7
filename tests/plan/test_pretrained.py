"""A model of PEFT saves its adapters, and not those that are quantized."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from tinyq_lightning import load_quantized, quantize
from tinyq_lightning.errors import ModelError
from tinyq_lightning.file.checkpoint import make_checkpoint, write_checkpoint


class Adapted(nn.Module):
    """A linear layer with adapters by name, as PEFT has them."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"one": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"one": nn.Linear(2, 8, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["one"](self.lora_A["one"](x))


class PeftModel(nn.Module):
    """Has the name and the place of PEFT's own class, which is not installed here."""

    def __init__(self):
        super().__init__()
        self.base_model = nn.ModuleDict({"two": Adapted(nn.Linear(8, 8))})
        self.peft_config = {"one": {}}

    def forward(self, x):
        return self.base_model["two"](x)

    def save_pretrained(self, folder):
        return folder


PeftModel.__module__ = "peft.peft_model"


@pytest.mark.parametrize(("exclude", "said"), [([], "one"), (["*.one*"], None), (["*base_layer"], "one")])
def test_adapters_are_saved_unless_they_are_quantized(tmp_path, exclude, said):
    task = nn.ModuleDict({"net": PeftModel()})
    quantize(task, {"exclude": exclude})
    model = task["net"]
    for each in (model, copy.deepcopy(model)):
        if said is None:
            assert each.save_pretrained("folder") == "folder"
        else:
            with pytest.raises(ModelError, match=r"adapter 'one' under names that PEFT does not load.*'\*\.one\*'"):
                each.save_pretrained("folder")


def test_so_are_those_of_a_file(tmp_path):
    model = PeftModel()
    plan = quantize(model)
    write_checkpoint(make_checkpoint({}, model.state_dict(), plan, {}, None, None), tmp_path / "q.ckpt")
    with pytest.raises(ModelError, match="adapter 'one'"):
        load_quantized(tmp_path / "q.ckpt", PeftModel).save_pretrained("folder")
