"""Inputs that the command line describes by shape and dtype."""

import argparse

import pytest
import torch
from torch import nn

from tinyq_lightning.command.bench import example_input
from tinyq_lightning.command.cli import _parser
from tinyq_lightning.command.shapes import InputShape, drawn


def test_inputs_are_drawn_by_shape_dtype_and_bound_and_are_the_same_each_time():
    shapes = [InputShape.parse(text) for text in ("2x3x4", "5", "2x400:int64:7", "3x2:bool", "4:bfloat16")]
    tensors = drawn(shapes)
    assert [tuple(each.shape) for each in tensors] == [(2, 3, 4), (5,), (2, 400), (3, 2), (4,)]
    dtypes = [torch.float32, torch.float32, torch.int64, torch.bool, torch.bfloat16]
    assert [each.dtype for each in tensors] == dtypes
    assert tensors[2].unique().tolist() == [*range(7)]
    assert all(torch.equal(one, other) for one, other in zip(tensors, drawn(shapes), strict=True))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3,32", "is not SHAPE"),
        ("2x", "is not SHAPE"),
        ("2x0", "has a size of 0"),
        ("2x3:float33", "'float33' in '2x3:float33' is none of float32"),
        ("2x3:float32:4", "is said of int64 and int32"),
        ("2x3:int64:0", "is 1 to"),
    ],
)
def test_what_describes_no_tensor_is_refused_in_words(text, reason):
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        InputShape.parse(text)


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (["3x32x32"], [(3, 32, 32)]),
        (["3", "32", "32"], [(3, 32, 32)]),
        (["8"], [(8,)]),
        (["4x8", "2x16:int64:7"], [(4, 8), (2, 16)]),
    ],
)
@pytest.mark.parametrize("command", ["bench", "export"])
def test_both_commands_take_both_spellings(command, words, sizes):
    args = _parser().parse_args([command, "q.ckpt", "--shape", *words, "--shape", "5"])
    assert [each.sizes for each in args.shape] == [*sizes, (5,)]


def test_inputs_of_bench_are_led_by_the_batch():
    shapes = [InputShape.parse("8"), InputShape.parse("3x2:int64:7")]
    (floats, numbers), named = example_input(nn.Identity(), shapes, 4)
    assert (floats.shape, numbers.shape, numbers.dtype, named) == ((4, 8), (4, 3, 2), torch.int64, {})
