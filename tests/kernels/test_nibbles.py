"""Codes of four bits, two a byte: packing loses nothing, and what they expand to fits int8."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyq_lightning.kernels.nibbles import (
    GROUP,
    collapse,
    expand,
    four_bit_bytes,
    group_count,
    multipliers_of,
    pack_codes,
    pack_nibbles,
    packed_shapes,
    unpack_codes,
    unpack_nibbles,
)

sizes = st.tuples(st.integers(0, 5), st.integers(1, 3 * GROUP + 1))
seeds = st.integers(0, 2**16)


def random_integers(least, most, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, most + 1, shape, generator=generator)


@given(sizes, seeds)
def test_packing_and_unpacking_gives_the_same_numbers(size, seed):
    values = random_integers(0, 15, size, seed).to(torch.uint8)
    packed = pack_nibbles(values)
    assert packed.shape == (size[0], (size[1] + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, size[1]), values)
    codes = random_integers(-8, 7, size, seed).to(torch.int8)
    assert torch.equal(unpack_codes(pack_codes(codes), size[1]), codes)


@given(sizes, seeds)
def test_expanded_codes_are_multiplier_times_code_and_collapse_to_the_same_bytes(size, seed):
    rows, columns = size
    codes = random_integers(-8, 7, size, seed).to(torch.int8)
    multipliers = random_integers(1, 15, (rows, group_count(columns)), seed + 1).to(torch.uint8)
    packed, factors = pack_codes(codes), pack_nibbles(multipliers)
    expanded = expand(packed, factors, columns)
    assert expanded.dtype == torch.int8
    assert expanded.is_contiguous()
    assert torch.equal(expanded.int(), codes.int() * multipliers.int().repeat_interleave(GROUP, 1)[:, :columns])
    assert torch.equal(multipliers_of(factors, columns), multipliers)
    assert torch.equal(collapse(expanded, factors), packed)
    assert [tuple(packed.shape), tuple(factors.shape)] == [*packed_shapes(*size)]
    assert packed.numel() + factors.numel() == four_bit_bytes(*size)


def test_the_first_of_two_lies_in_the_low_bits():
    assert pack_nibbles(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x03]]
    assert pack_codes(torch.tensor([[-8, 7, -1]], dtype=torch.int8)).tolist() == [[0x78, 0x0F]]


def test_every_product_of_multiplier_and_code_fits_int8_and_comes_back():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(15, 2)
    multipliers = pack_nibbles(torch.arange(1, 16, dtype=torch.uint8)[:, None])
    expanded = expand(pack_codes(codes), multipliers, GROUP)
    assert (expanded.min(), expanded.max()) == (-120, 105)
    assert torch.equal(collapse(expanded, multipliers), pack_codes(codes))


def test_large_weights_take_four_and_an_eighth_bits_a_weight():
    assert 8 * four_bit_bytes(64, 1024) == 4.125 * 64 * 1024


def test_traced_and_wrapped_tensors_expand_to_the_same_codes():
    packed = random_integers(0, 255, (3, 48), 0).to(torch.uint8)
    factors = random_integers(1, 255, (3, 2), 1).to(torch.uint8)
    wanted = expand(packed, factors, 96)
    assert torch.equal(expand(torch.nn.Buffer(packed), torch.nn.Buffer(factors), 96), wanted)
    if not torch.__version__.startswith("2.7"):  # whose vmap views no bytes as other numbers
        assert torch.equal(torch.vmap(expand, (0, 0, None))(packed[None], factors[None], 96)[0], wanted)
    assert expand(packed.to("meta"), factors.to("meta"), 96).shape == wanted.shape
