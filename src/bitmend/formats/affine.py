"""What the formats of other tools have in common: a weight is (code - zero point) * scale, and each column has a group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int8, Int16
from torch import Tensor

from bitmend.errors import CheckpointError

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class AffineWeight:
    """One matrix, unpacked.

    Attributes:
        codes: one an entry, in the signed range.
        zero_point: the code of the level 0; None when that is 0 everywhere.
        scale: distance of two levels; may be negative in files of other tools.
        group: of each column, or None when groups are neighbouring columns, all of one size.
    """

    codes: Int8[Tensor, "out in"]
    zero_point: Int16[Tensor, "out groups"] | None
    scale: Float[Tensor, "out groups"]
    group: Int[Tensor, " in"] | None = None

    def dense(self) -> Float[Tensor, "out in"]:
        """Return the matrix in float32, each entry with one rounding. Cost: three such matrices at once."""
        out, columns = self.codes.shape
        groups = self.scale.shape[1]
        levels = self.codes.float()
        scale, zero_point = self.scale.float(), None if self.zero_point is None else self.zero_point.float()
        if self.group is None:
            levels = levels.view(out, groups, columns // groups)
            scale, zero_point = scale.unsqueeze(2), None if zero_point is None else zero_point.unsqueeze(2)
        else:
            scale, zero_point = scale[:, self.group], None if zero_point is None else zero_point[:, self.group]
        if zero_point is not None:
            levels -= zero_point
        return levels.mul_(scale).view(out, columns)


@runtime_checkable
class PackedLayer(Protocol):
    """One quantised layer of a file, described by the headers alone.

    Attributes:
        name: full module path.
        bits: width of a code.
        shape: (out, in).
        parts: the last part of the names of the tensors that hold its weight.
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def parts(self) -> tuple[str, ...]: ...

    def read(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """Read and unpack the layer.

        Raises:
            CheckpointError: values that are no scales, or groups that do not exist.
        """
        ...


def finite_scale(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """Return the scales stored under `key`.

    Raises:
        CheckpointError: one of them is not a finite number.
    """
    scale = tensors[key]
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{key} must hold finite scales; some are infinite or NaN; download the file again")
    return scale


def valid_groups(tensors: Mapping[str, Tensor], key: str, num_groups: int) -> Tensor:
    """Return the group of each column stored under `key`.

    Raises:
        CheckpointError: a group that does not exist.
    """
    group = tensors[key]
    low, high = int(group.min()), int(group.max())
    if low < 0 or high >= num_groups:
        raise CheckpointError(
            f"{key} must hold numbers from 0 to {num_groups - 1}, one of the groups of its layer; got {low} to {high}"
        )
    return group


def group_tensor_or_none(group: Tensor, num_groups: int) -> Tensor | None:
    """Return None in the place of group numbers that only say 0, 0, ..., 1, 1, ... in groups of one size."""
    columns = len(group)
    if columns % num_groups:
        return group
    regular = torch.arange(columns) // (columns // num_groups)
    return None if torch.equal(group.long(), regular) else group
