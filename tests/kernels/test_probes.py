"""What a machine is found to be able to do."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tinyq_lightning.kernels import fbgemm, float16, integer, onednn
from tinyq_lightning.kernels.choice import choose_kernel
from tinyq_lightning.kernels.fbgemm import has_fbgemm_product
from tinyq_lightning.kernels.float16 import has_float16_product
from tinyq_lightning.kernels.int8 import has_int8_product
from tinyq_lightning.kernels.integer import has_plain_product
from tinyq_lightning.kernels.onednn import has_onednn_product, onednn_sums, pack_onednn, unpack_onednn
from tinyq_lightning.methods import METHODS


def test_an_operator_that_torch_lacks_or_that_fails_is_no_error(monkeypatch):
    for module in (fbgemm, integer, onednn):
        monkeypatch.setattr(module, "has_vnni", lambda: True)
    monkeypatch.setattr(onednn, "pack_onednn", lambda codes: (_ for _ in ()).throw(RuntimeError("no such operator")))
    monkeypatch.delattr(torch, "_int_mm")
    assert has_onednn_product.__wrapped__() is False
    assert has_plain_product.__wrapped__() is False
    for module in (fbgemm, float16, onednn):
        monkeypatch.setattr(module, "has_operator", lambda *names: False)
    assert has_onednn_product.__wrapped__() is False
    assert has_fbgemm_product.__wrapped__() is False
    assert has_float16_product.__wrapped__() is False


def test_a_product_that_saturates_is_not_taken_for_an_exact_one():
    if has_onednn_product():
        codes = torch.full((8, 64), -127, dtype=torch.int8)
        digits = torch.zeros(3, 64, dtype=torch.uint8)
        out = onednn_sums(digits, pack_onednn(codes), torch.ones(8), torch.zeros(8, dtype=torch.int32))
        assert (out == 64 * 127 * 128).all()
    if has_plain_product():
        codes, digits = torch.full((8, 64), 127, dtype=torch.int8), torch.full((3, 64), -128, dtype=torch.int8)
        assert (torch._int_mm(digits, codes.t()) == -64 * 127 * 128).all()
    if not has_int8_product():
        assert not choose_kernel("auto", METHODS["w8a8"], 4096, 4096).kernel.startswith("int8")


@pytest.mark.parametrize("probe", [has_plain_product, has_onednn_product, has_fbgemm_product, has_float16_product])
def test_what_a_probe_finds_does_not_depend_on_when_it_is_asked(probe, default_dtype):
    find = probe.__wrapped__
    found = find()
    default_dtype(torch.bfloat16)
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"):
        assert find() is found
    with FakeTensorMode():
        assert find() is found


def test_imported_under_another_default_dtype_the_digits_are_the_same():
    code = """
import torch
torch.set_default_dtype(torch.bfloat16)
from tinyq_lightning.kernels.fixed_point import _digits
numbers = torch.tensor([[1, -5, 100, -127]], dtype=torch.float32)
print([_digits(numbers.clone(), count, False)[0].tolist() for count in (1, 2)])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[[129, 123, 228, 1], [129, 123, 228, 1]]"


def test_packages_without_a_fast_kernel_import_and_run():
    code = """
import torch, torch.nn as nn
from tinyq_lightning.kernels import fbgemm, float16, integer, onednn
fbgemm.has_vnni = integer.has_vnni = onednn.has_vnni = lambda: False
fbgemm.has_operator = float16.has_operator = onednn.has_operator = lambda *names: False
from tinyq_lightning import quantize
model = nn.Sequential(nn.Linear(600, 600))
quantize(model, "w8a32")
assert model[0].choice.kernel == "float32", model[0].choice
assert model(torch.randn(2, 600)).shape == (2, 600)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("hidden", ["int8", "int8,float16", "quantized"])
def test_an_environment_variable_hides_products_to_play_another_machine(hidden):
    program = """
import torch
from tinyq_lightning.kernels.fbgemm import has_fbgemm_product
from tinyq_lightning.kernels.int8 import has_int8_product
from tinyq_lightning.kernels.float16 import has_float16_product
print(has_int8_product(), has_fbgemm_product(), has_float16_product())
"""
    without = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "TINYQ_WITHOUT": hidden}
    )
    int8, fbgemm, float16 = without.stdout.split()
    assert fbgemm == "False"
    assert int8 == ("False" if "int8" in hidden else str(has_int8_product()))
    assert float16 == "False" if hidden != "int8" else float16 == str(has_float16_product())


def test_hiding_what_there_is_not_is_an_error():
    program = "from tinyq_lightning.kernels.int8 import has_int8_product; has_int8_product()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "TINYQ_WITHOUT": "vnni"}
    )
    assert "TINYQ_WITHOUT hides vnni: it takes int8, int8-split, amx, float16, quantized" in done.stderr


@pytest.mark.skipif(not has_onednn_product(), reason="no int8 product of oneDNN's on this processor")
def test_codes_are_packed_as_they_are_whatever_their_strides():
    codes = torch.randint(-127, 128, (300, 200), dtype=torch.int8)
    for strided in (codes, codes.t(), codes[::2, 1:]):
        assert torch.equal(unpack_onednn(pack_onednn(strided)), strided)
