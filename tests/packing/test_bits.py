import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from bitmend.packing.bits import num_words, pack_codes, take_codes, unpack_codes

BITS = range(1, 9)


def random_codes(bits, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1))
    return torch.randint(low, -low, (rows, columns), generator=generator).to(torch.int8)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 200), st.integers(0, 1000))
def test_unpacking_undoes_packing(bits, rows, columns, seed):
    codes = random_codes(bits, rows, columns, seed)
    words = pack_codes(codes, bits)
    assert words.shape == (rows, num_words(columns, bits))
    assert torch.equal(unpack_codes(words, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 97])
def test_words_are_those_of_compressed_tensors(bits, columns):
    codes = random_codes(bits, 7, columns)
    words = pack_codes(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packing_the_transpose_is_their_packing_along_the_rows(bits):
    zero_points = random_codes(bits, 41, 3)
    words = pack_codes(zero_points.T, bits).T.contiguous()
    assert torch.equal(words, pack_to_int32(zero_points, bits, packed_dim=0))
    index = torch.tensor([0, 40, 7, 7, 31, 32])
    assert torch.equal(take_codes(words, bits, index), zero_points[index])


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes_survive(bits):
    ends = torch.tensor([[-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] * 20], dtype=torch.int8)
    assert torch.equal(unpack_codes(pack_codes(ends, bits), bits, 40), ends)


def test_a_row_of_three_bit_codes_by_hand():
    # Unsigned 1, 2, ..., 11: code k at bit 3k, so the eleventh (1011) begins at bit 30 and continues in word 1.
    unsigned = [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 6]
    total = sum(value << (3 * k) for k, value in enumerate(unsigned))
    words = pack_codes(torch.tensor([unsigned], dtype=torch.int8) - 4, 3)
    assert [int(word) & 0xFFFFFFFF for word in words[0]] == [total & 0xFFFFFFFF, total >> 32]


def test_rows_packed_in_several_steps_equal_rows_packed_at_once(monkeypatch):
    codes = random_codes(5, 50, 70)
    whole = pack_codes(codes, 5)
    monkeypatch.setattr("bitmend.packing.bits._CODES_AT_ONCE", 200)
    assert torch.equal(pack_codes(codes, 5), whole)
    assert torch.equal(unpack_codes(whole, 5, 70), codes)


def test_wrong_width_and_wrong_number_of_words_are_errors():
    codes = random_codes(4, 2, 8)
    with pytest.raises(ValueError, match="a code is 1 to 8 bits wide; got 9"):
        pack_codes(codes, 9)
    with pytest.raises(ValueError, match="9 codes of 4 bits take 2 words; got 1"):
        unpack_codes(pack_codes(codes, 4), 4, 9)
