"""The kernel of Triton: its arithmetic by Triton's interpreter, its code by Triton's compiler; neither needs a GPU.

What layers do with it is shown with a product of torch's in its place.
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import exact, normal, random_layer, relative_error

from tinyq_lightning.kernels import choose_kernel, fused, packed_linear
from tinyq_lightning.kernels.choice import FORMS
from tinyq_lightning.methods import METHODS

INTERPRETED = """
import torch
from tinyq_lightning.kernels.triton_product import fused_product
generator = torch.Generator().manual_seed(0)
for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3)):  # the interpreter has no bfloat16
    for rows, features, outputs in ((1, 130, 40), (19, 256, 64), (3, 7, 5), (16, 128, 32), (0, 4, 4)):
        codes = torch.randint(-127, 128, (outputs, features), generator=generator).to(torch.int8)
        x = torch.randn(rows, features, generator=generator).to(dtype)
        scales, bias = torch.rand(2, outputs, generator=generator)
        for added in (None, bias, bias.to(dtype), torch.stack([bias, bias], 1)[:, 0]):
            expected = (x.double() @ codes.double().t()) * scales.double() + (0 if added is None else added.double())
            out = fused_product(x, codes, scales, added)
            assert (out.dtype, out.shape) == (dtype, expected.shape)
            assert (out.double() - expected).norm() <= bound * expected.norm()
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tinyq_lightning.kernels.triton_product import _kernel
for capability in (80, 90):
    for dtype in ("fp32", "fp16", "bf16"):
        floats = {name: f"*{dtype}" for name in ("x", "bias", "out")}
        sizes = dict.fromkeys(("rows", "outputs", "features"), "i32")
        settings = {"has_bias": True, "block_rows": 16, "block_outputs": 32, "block_features": 128}
        signature = {**floats, **sizes, "codes": "*i8", "scales": "*fp32", **dict.fromkeys(settings, "constexpr")}
        signature = {name: signature[name] for name in _kernel.arg_names}
        made = triton.compile(ASTSource(_kernel, signature, settings), target=GPUTarget("cuda", capability, 32))
        assert ("mma" in made.asm["ptx"]) == (dtype != "fp32")
        assert made.metadata.shared < 48 * 1024
"""


@pytest.fixture
def played(monkeypatch):
    """A GPU that has the kernel, whose product is torch's."""

    def product(x, codes, scales, bias):
        out = (x.float() @ codes.float().t()) * scales
        return (out if bias is None else out + bias.float()).to(x.dtype)

    monkeypatch.setattr(fused, "has_fused_product", lambda: True)
    name = "tinyq_lightning.kernels.triton_product"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(fused_product=product))


def run(program, **environment):
    pytest.importorskip("triton")
    script = f"import os\nos.environ.update({environment})\n{program}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_the_interpreter_gives_the_product():
    run(INTERPRETED, TRITON_INTERPRET="1")


def test_it_compiles_for_gpus_with_their_matrix_instructions():
    run(COMPILED)


def test_activations_as_they_are_take_it_for_few_rows(played):
    for method in METHODS.values():
        choice = choose_kernel("auto", method, 64, 64, "cuda")
        assert (choice.few == "fused" and choice.few_rows == 33) == (not method.rounds)
    assert choose_kernel("auto", METHODS["w8a32"], 64, 64, "cuda").bytes_a_weight == 1
    assert choose_kernel("compact", METHODS["w8a32"], 64, 64, "cuda").few == "fused"
    assert choose_kernel("reference", METHODS["w8a32"], 64, 64, "cuda").few_rows == 0
    assert choose_kernel("auto", METHODS["w8a32"], 64, 64, "cpu").few != "fused"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_form_takes_every_dtype_and_gives_gradients(dtype, played):
    layer = random_layer("w8a32", 12, 20)
    form = FORMS["fused"](layer.int8_weights, layer.scales)
    x = normal(2, 3, 20).to(dtype).requires_grad_()
    out = packed_linear(METHODS["w8a32"], form, x, layer.scales, layer.bias)
    assert (out.dtype, out.shape) == (dtype, (2, 3, 12))
    assert relative_error(out, exact(layer, x.detach())) < 1e-2
    out.sum().backward()
    of_x = (layer.int8_weights.double() * layer.scales.double()[:, None]).sum(0)
    assert relative_error(x.grad, of_x.expand(2, 3, 20)) < 1e-2


def test_autocast_decides_what_it_multiplies(played):
    layer = random_layer("w8a32", 12, 20)
    form = FORMS["fused"](layer.int8_weights, layer.scales)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_linear(METHODS["w8a32"], form, normal(3, 20), layer.scales, None).dtype == torch.bfloat16


def test_a_kernel_that_is_wrong_or_fails_is_not_taken(played, monkeypatch):
    assert fused._is_right("cpu")
    sys.modules["tinyq_lightning.kernels.triton_product"].fused_product = lambda x, codes, *_: x @ codes.t().to(x.dtype)
    assert not fused._is_right("cpu")
    monkeypatch.undo()
    assert not fused.has_fused_product.__wrapped__() or torch.cuda.is_available()
