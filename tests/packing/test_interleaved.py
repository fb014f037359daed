import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.packing.interleaved import pack_interleaved, unpack_interleaved


def test_one_word_by_hand():
    """Channels 0..7 have the unsigned codes 1..8; from the lowest four bits up the word holds channels 0 2 4 6 1 3 5 7."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.int8) - 8
    (word,) = pack_interleaved(codes)[0].tolist()
    assert word & 0xFFFFFFFF == 0x86427531
    assert torch.equal(unpack_interleaved(torch.tensor([[word]], dtype=torch.int32)), codes)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_unpacking_undoes_packing(rows, words, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, 8 * words), generator=generator).to(torch.int8)
    packed = pack_interleaved(codes)
    assert packed.shape == (rows, words)
    assert torch.equal(unpack_interleaved(packed), codes)


def test_channels_that_do_not_fill_words_are_an_error():
    with pytest.raises(ValueError, match="eight output channels share a word; got 12"):
        pack_interleaved(torch.zeros(2, 12, dtype=torch.int8))
