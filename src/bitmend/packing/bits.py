"""Codes <-> 32-bit words, densely: no padding between codes, only after the last one of a row.

A code of b bits in the signed range gets 2^(b-1) added. Element k of a row then occupies the bits k*b .. k*b + b-1 of
the row, where bit n is bit n % 32 of word n // 32, least significant first; a code may straddle two words. So 32 codes
fill exactly b words, and a row of n codes takes ceil(n*b/32) words. This is the `pack-quantized` layout of
compressed-tensors, taken over so that exporting to it copies the words.
"""

import torch
from jaxtyping import Int, Int8, Int32
from torch import Tensor

_WORD = 32
_LOW_HALF = 0xFFFFFFFF
# Codes handled at once. Packing widens each code to 64 bits several times over, so a whole large matrix at once would
# take more memory than the unquantised weight.
_CODES_AT_ONCE = 1 << 18


def num_words(num_codes: int, bits: int) -> int:
    """Return how many 32-bit words a row of `num_codes` codes takes."""
    return -(-num_codes * bits // _WORD)


def pack_codes(codes: Int8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """Return the words that hold `codes`.

    Args:
        codes: in the signed range -2^(bits-1) .. 2^(bits-1)-1; not checked.
        bits: width of a code, 1 to 8.

    Raises:
        ValueError: a width outside 1..8.

    Cost: one pass, a few dozen bytes for each of the 2^18 codes handled at once.
    """
    _check_bits(bits)
    rows, columns = codes.shape
    words = torch.empty(rows, num_words(columns, bits), dtype=torch.int32, device=codes.device)
    step = max(1, _CODES_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        words[start : start + step] = _pack_rows(codes[start : start + step], bits)
    return words


def unpack_codes(words: Int32[Tensor, "rows words"], bits: int, num_columns: int) -> Int8[Tensor, "rows columns"]:
    """Return the first `num_columns` codes of each row; the inverse of `pack_codes`.

    Raises:
        ValueError: a width outside 1..8, or a number of words that does not belong to `num_columns`.

    Cost: one pass, a few dozen bytes for each of the 2^18 codes handled at once.
    """
    _check_bits(bits)
    if words.shape[1] != num_words(num_columns, bits):
        raise ValueError(
            f"{num_columns} codes of {bits} bits take {num_words(num_columns, bits)} words; got {words.shape[1]}"
        )
    rows = words.shape[0]
    codes = torch.empty(rows, num_columns, dtype=torch.int8, device=words.device)
    step = max(1, _CODES_AT_ONCE // max(1, num_columns))
    for start in range(0, rows, step):
        codes[start : start + step] = _unpack_rows(words[start : start + step], bits)[:, :num_columns]
    return codes


def take_codes(
    words: Int32[Tensor, "words columns"], bits: int, index: Int[Tensor, " taken"]
) -> Int8[Tensor, "taken columns"]:
    """Return some rows of a matrix that was packed along its rows, that is, transposed before packing.

    Zero points are stored so. Nothing but the words of the asked rows is unpacked.
    """
    _check_bits(bits)
    bit = index.to(torch.int64) * bits
    word = bit // _WORD
    low = words[word].to(torch.int64) & _LOW_HALF
    # A code that ends in the last word has nothing above it; the clamp only keeps the index legal.
    high = words[(word + 1).clamp_(max=words.shape[0] - 1)].to(torch.int64) << _WORD
    unsigned = ((low | high) >> (bit % _WORD)[:, None]) & (2**bits - 1)
    return (unsigned - 2 ** (bits - 1)).to(torch.int8)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    sections = -(-columns // _WORD)
    unsigned = torch.zeros(rows, sections * _WORD, dtype=torch.int64, device=codes.device)
    unsigned[:, :columns] = codes.to(torch.int64) + 2 ** (bits - 1)
    word, offset = _places(bits, codes.device)
    shifted = unsigned.view(rows, sections, _WORD) << offset
    # One word more than needed takes the (empty) upper halves of the last codes, which saves a special case.
    filled = torch.zeros(rows, sections, bits + 1, dtype=torch.int64, device=codes.device)
    filled.index_add_(2, word, shifted & _LOW_HALF)
    filled.index_add_(2, word + 1, shifted >> _WORD)
    filled = filled[:, :, :bits].reshape(rows, sections * bits)[:, : num_words(columns, bits)]
    return (filled - ((filled >> (_WORD - 1)) << _WORD)).to(torch.int32)


def _unpack_rows(words: Tensor, bits: int) -> Tensor:
    rows = words.shape[0]
    if _WORD % bits == 0:  # no code straddles: stay in 32 bits; the mask removes the copies of the sign bit
        shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
        unsigned = (words.unsqueeze(2) >> shifts).bitwise_and_(2**bits - 1)
        return unsigned.sub_(2 ** (bits - 1)).reshape(rows, -1).to(torch.int8)
    sections = -(-words.shape[1] // bits)
    padded = torch.zeros(rows, sections * bits, dtype=torch.int64, device=words.device)
    padded[:, : words.shape[1]] = words.to(torch.int64) & _LOW_HALF
    padded = padded.view(rows, sections, bits)
    word, offset = _places(bits, words.device)
    high = padded[:, :, (word + 1).clamp_(max=bits - 1)] << _WORD
    unsigned = ((padded[:, :, word] | high) >> offset) & (2**bits - 1)
    return unsigned.sub_(2 ** (bits - 1)).reshape(rows, -1).to(torch.int8)


def _places(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return word and bit offset, within a section of 32 codes, at which each code starts."""
    bit = torch.arange(_WORD, device=device) * bits
    return bit // _WORD, bit % _WORD


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"a code is 1 to 8 bits wide; got {bits}")
