"""A weight matrix as it lies in memory and in the file: words of codes, scales, words of zero points.

| tensor       | type       | shape                               |
|--------------|------------|-------------------------------------|
| `words`      | int32      | (out, ceil(in * bits / 32))         |
| `scale`      | as stored  | (rows, groups); rows = out, or 1 when one scale serves the whole matrix |
| `zero_words` | int32      | (ceil(rows * bits / 32), groups); packed along the rows; asymmetric grids only |
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn

from bitmend.errors import RequestError
from bitmend.numerics.granularity import PerGroup, PerTensor, PerToken, num_groups
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec
from bitmend.packing.bits import num_words, pack_codes, take_codes, unpack_codes

# Under these names the three tensors lie in a module and in a file.
WORDS, SCALE, ZERO_WORDS = "weight_packed", "weight_scale", "weight_zero_point"

# A multiple of this many rows starts on a whole word of zero points at every width.
ROW_STEP = 32
_TILE_BYTES = 4 << 20


@dataclass(frozen=True)
class PackedWeight:
    """A quantised matrix in packed form; a view of tensors that live elsewhere.

    Attributes:
        words: the codes.
        scale: in the type in which it is stored.
        zero_words: the zero points, or None on a symmetric grid.
        spec: how to read the three.
        shape: (out, in).
    """

    words: Int32[Tensor, "out words"]
    scale: Float[Tensor, "rows groups"]
    zero_words: Int32[Tensor, "zero_words groups"] | None
    spec: QuantSpec
    shape: tuple[int, int]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Float[Tensor, "rows in"]:
        """Return the weights of the rows `start:stop`, computed in float32 and rounded once to `dtype`.

        Args:
            start: a multiple of `ROW_STEP`.
            stop: at most the number of rows.
            dtype: of the result.
        """
        bits = self.spec.grid.bits
        codes = unpack_codes(self.words[start:stop], bits, self.shape[1])
        shared = self.scale.shape[0] == 1 != self.shape[0]
        first, last = (0, 1) if shared else (start, stop)
        zero_point = None
        if self.zero_words is not None:
            words = self.zero_words[first * bits // 32 : num_words(last, bits)]
            zero_point = unpack_codes(words.T, bits, last - first).T
        return _decode(codes, self.scale[first:last], zero_point, self.spec).to(dtype)

    def take(self, index: Int[Tensor, " taken"], dtype: torch.dtype) -> Float[Tensor, "taken in"]:
        """Return the weights of the rows with the numbers `index`; no other row is touched."""
        bits = self.spec.grid.bits
        codes = unpack_codes(self.words[index], bits, self.shape[1])
        shared = self.scale.shape[0] == 1 != self.shape[0]
        row = torch.zeros_like(index) if shared else index
        zero_point = None if self.zero_words is None else take_codes(self.zero_words, bits, row)
        return _decode(codes, self.scale[row], zero_point, self.spec).to(dtype)

    def tiles(self) -> range:
        """Return the first rows of tiles that take about 4 MB each in float32; `range.step` is their height."""
        height = max(ROW_STEP, _TILE_BYTES // (4 * max(1, self.shape[1])) // ROW_STEP * ROW_STEP)
        return range(0, self.shape[0], height)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Return the whole matrix; equal, bit for bit, to that of the `QTensor` that was packed."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.words.device)
        tiles = self.tiles()
        for start in tiles:
            stop = min(start + tiles.step, self.shape[0])
            weight[start:stop] = self.rows(start, stop, dtype)
        return weight

    def unpack(self) -> QTensor:
        """Return codes, scales and zero points as they were before packing."""
        bits = self.spec.grid.bits
        zero_point = None
        if self.zero_words is not None:
            zero_point = unpack_codes(self.zero_words.T, bits, self.scale.shape[0]).T.float()
        codes = unpack_codes(self.words, bits, self.shape[1])
        return QTensor(codes, QParams(self.scale.float(), zero_point), self.spec)


def pack(qtensor: QTensor) -> PackedWeight:
    """Return `qtensor` in packed form.

    Raises:
        RequestError: a scale that its storage type cannot hold exactly, so that what is loaded would not be what was
            solved for; or a zero point outside the grid.
    """
    spec, bits = qtensor.spec, qtensor.spec.grid.bits
    scale = qtensor.qparams.scale.to(spec.scale_dtype)
    if not torch.equal(scale.float(), qtensor.qparams.scale.float()):
        raise RequestError(
            f"scales must be rounded to the type in which they are stored before codes are chosen; some of them "
            f"change when cast to {spec.scale_dtype}"
        )
    zero_words = None
    if qtensor.qparams.zero_point is not None:
        zero_point = qtensor.qparams.zero_point
        low, high = spec.grid.min_code, spec.grid.max_code
        if not bool(((zero_point >= low) & (zero_point <= high) & (zero_point == zero_point.round())).all()):
            raise RequestError(f"zero points must be whole numbers from {low} to {high}, the codes of a {spec} weight")
        zero_words = pack_codes(zero_point.to(torch.int8).T, bits).T.contiguous()
    out, columns = qtensor.codes.shape
    return PackedWeight(pack_codes(qtensor.codes, bits), scale.contiguous(), zero_words, spec, (out, columns))


def packed_shapes(shape: tuple[int, int], spec: QuantSpec) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    """Return type and shape of each tensor of a packed matrix, under the name that it has in a module.

    Raises:
        RequestError: a granularity that is none of weights.
        RecipeError: a group size that does not divide the width.
    """
    if isinstance(spec.granularity, PerToken):
        raise RequestError("weights have one scale per tensor, per output channel or per group; got one per token")
    out, columns = shape
    rows = 1 if isinstance(spec.granularity, PerTensor) else out
    groups = num_groups(spec.granularity, columns)
    shapes: dict[str, tuple[torch.dtype, tuple[int, int]]] = {
        WORDS: (torch.int32, (out, num_words(columns, spec.grid.bits))),
        SCALE: (spec.scale_dtype, (rows, groups)),
    }
    if not spec.grid.symmetric:
        shapes[ZERO_WORDS] = (torch.int32, (num_words(rows, spec.grid.bits), groups))
    return shapes


def register_packed(module: nn.Module, shape: tuple[int, int], spec: QuantSpec, device: torch.device | None) -> None:
    """Give `module` uninitialised buffers for a packed matrix, to be filled by a loader."""
    for name, (dtype, size) in packed_shapes(shape, spec).items():
        module.register_buffer(name, torch.empty(size, dtype=dtype, device=device))


def fill_packed_(module: nn.Module, packed: PackedWeight) -> None:
    """Put the tensors of `packed` in place of the buffers that `register_packed` made."""
    module.register_buffer(WORDS, packed.words)
    module.register_buffer(SCALE, packed.scale)
    if packed.zero_words is not None:
        module.register_buffer(ZERO_WORDS, packed.zero_words)


def packed_of(module: nn.Module, shape: tuple[int, int], spec: QuantSpec) -> PackedWeight:
    """Return the packed matrix that lies in the buffers of `module`."""
    buffers = dict(module.named_buffers(recurse=False))
    return PackedWeight(buffers[WORDS], buffers[SCALE], buffers.get(ZERO_WORDS), spec, shape)


def _decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    scale = scale.float()
    zero_point = None if zero_point is None else zero_point.float()
    rows, columns = codes.shape
    groups = scale.shape[1]
    if isinstance(spec.granularity, PerGroup) and columns != groups * spec.granularity.size:
        return QTensor(codes, QParams(scale, zero_point), spec).dequantize()
    # Groups of one size: broadcasting gives the same numbers as spreading the scales to columns, without the copy.
    zero_point = None if zero_point is None else zero_point.unsqueeze(2)
    sections = codes.view(rows, groups, columns // groups)
    return spec.grid.decode(sections, scale.unsqueeze(2), zero_point).view(rows, columns)
