"""A quantised matrix: codes, their scales, and the words that say how to read them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor

from bitmend.numerics.granularity import Granularity, PerChannel, PerGroup, group_of_column
from bitmend.numerics.uniform import UniformGrid

CHUNK_ENTRIES = 1 << 20  # entries rounded or decoded at a time

ObserverName = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantised.

    Attributes:
        grid: the levels.
        granularity: which entries share a scale.
        observer: how scales and zero points are chosen from the data.
        scale_dtype: the type in which scales are stored. Scales are rounded to it before any code is chosen, so that
            what is solved for is what is loaded.
    """

    grid: UniformGrid
    granularity: Granularity = field(default_factory=PerChannel)
    observer: ObserverName = "mse"
    scale_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        size = (
            f"g{self.granularity.size}" if isinstance(self.granularity, PerGroup) else type(self.granularity).__name__
        )
        return f"{self.grid.bits} bit {'symmetric' if self.grid.symmetric else 'asymmetric'} {size}"


@dataclass(frozen=True)
class QParams:
    """Scales and zero points of a matrix.

    Attributes:
        scale: distance of two levels, positive, in the units of the weight; float32 that the storage type can hold.
        zero_point: the code of the level 0, whole numbers in float32; None on a symmetric grid.
    """

    scale: Float[Tensor, "rows groups"]
    zero_point: Float[Tensor, "rows groups"] | None

    def per_column(self, group: Tensor) -> "QParams":
        """Return the same parameters spread to columns: entry (r, j) is that of group `group[j]`."""
        zero_point = None if self.zero_point is None else self.zero_point.index_select(1, group)
        return QParams(self.scale.index_select(1, group), zero_point)

    def of_rows(self, rows: Int64[Tensor, " picked"] | slice) -> "QParams":
        """Return the parameters of some rows."""
        return QParams(self.scale[rows], None if self.zero_point is None else self.zero_point[rows])


def stack_qparams(parts: Sequence[QParams]) -> QParams:
    """Return the parameters of matrices of one grid that lie one below the other."""
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    return QParams(torch.cat([part.scale for part in parts]), torch.cat(zero_points) if zero_points else None)


@dataclass(frozen=True)
class QTensor:
    """A quantised weight matrix.

    Attributes:
        codes: one code an entry, in the signed range of the grid.
        qparams: scales and zero points.
        spec: how to read both.
    """

    codes: Int8[Tensor, "out in"]
    qparams: QParams
    spec: QuantSpec

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Return the matrix that the codes stand for, computed in float32 and rounded once to `dtype`.

        Cost: one pass over the matrix; no memory beyond the result but for a few rows at a time.
        """
        group = group_of_column(self.spec.granularity, self.codes.shape[1]).to(self.codes.device)
        values = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for rows in _row_slices(values):
            spread = _of_rows(self.qparams, rows).per_column(group)
            values[rows] = self.spec.grid.decode(self.codes[rows], spread.scale, spread.zero_point)
        return values

    def rows(self, start: int, stop: int) -> "QTensor":
        """Return the quantised rows `start:stop`; exact, because rows never share a scale (except per tensor)."""
        per_row = self.qparams.scale.shape[0] != 1
        qparams = self.qparams.of_rows(slice(start, stop)) if per_row else self.qparams
        return replace(self, codes=self.codes[start:stop], qparams=qparams)


def stack_rows(parts: Sequence[QTensor]) -> QTensor:
    """Return matrices of one spec (at least one; scales of their own rows), one below the other."""
    return QTensor(torch.cat([part.codes for part in parts]), stack_qparams([p.qparams for p in parts]), parts[0].spec)


def quantize(weight: Float[Tensor, "out in"], qparams: QParams, spec: QuantSpec) -> QTensor:
    """Round every entry to its nearest level.

    Cost: one pass over the matrix; no memory beyond the codes but for a few rows at a time.
    """
    group = group_of_column(spec.granularity, weight.shape[1]).to(weight.device)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in _row_slices(weight):
        spread = _of_rows(qparams, rows).per_column(group)
        codes[rows] = spec.grid.encode(weight[rows], spread.scale, spread.zero_point)
    return QTensor(codes, qparams, spec)


def _row_slices(matrix: Tensor) -> Iterator[slice]:
    """Yield rows of about `CHUNK_ENTRIES` entries at a time: work arrays stay in the cache, and small."""
    height = max(1, CHUNK_ENTRIES // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), height):
        yield slice(start, start + height)


def _of_rows(qparams: QParams, rows: slice) -> QParams:
    """Return the parameters of some rows; one scale for the whole matrix serves all of them."""
    return qparams if len(qparams.scale) == 1 else qparams.of_rows(rows)
