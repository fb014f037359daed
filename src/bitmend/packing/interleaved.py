"""Four-bit codes in the order in which AWQ packs them: eight output channels in a word, even ones first.

| bits of a word | 0-3 | 4-7 | 8-11 | 12-15 | 16-19 | 20-23 | 24-27 | 28-31 |
|----------------|-----|-----|------|-------|-------|-------|-------|-------|
| output channel | 0   | 2   | 4    | 6     | 1     | 3     | 5     | 7     |

The order suits a kernel that turns two codes at once into half precision. Source: the GEMM layout of AutoAWQ
(github.com/casper-hansen/AutoAWQ).
"""

from jaxtyping import Int8, Int32
from torch import Tensor

from bitmend.packing.bits import pack_codes, unpack_codes

# Output channel of each place in a word, and place of each output channel.
_CHANNELS = [0, 2, 4, 6, 1, 3, 5, 7]
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def pack_interleaved(codes: Int8[Tensor, "rows columns"]) -> Int32[Tensor, "rows words"]:
    """Return the words of codes in the signed range -8 .. 7; the columns are output channels.

    Raises:
        ValueError: a number of columns that is no multiple of 8.
    """
    return pack_codes(_reordered(codes, _CHANNELS), 4)


def unpack_interleaved(words: Int32[Tensor, "rows words"]) -> Int8[Tensor, "rows columns"]:
    """Return the codes of all words, eight for each; the inverse of `pack_interleaved`."""
    return _reordered(unpack_codes(words, 4, 8 * words.shape[1]), _PLACES)


def _reordered(codes: Tensor, order: list[int]) -> Tensor:
    rows, columns = codes.shape
    if columns % 8:
        raise ValueError(f"eight output channels share a word; got {columns}")
    return codes.view(rows, columns // 8, 8)[:, :, order].reshape(rows, columns)
