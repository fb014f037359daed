"""How many values share one scale.

All granularities speak of a matrix whose rows are output channels (weights) or tokens (activations) and whose columns
are input channels. The class says which entries share a scale:

| granularity      | matrix (4, 6) has scales of shape | who shares                          |
|------------------|-----------------------------------|-------------------------------------|
| `PerTensor()`    | (1, 1)                            | everything                          |
| `PerChannel()`   | (4, 1)                            | one row of a weight                 |
| `PerToken()`     | (4, 1)                            | one row of an activation            |
| `PerGroup(3)`    | (4, 2)                            | 3 neighbouring columns of one row   |
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from bitmend.errors import RecipeError


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole matrix."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each row of a weight, that is for each output channel."""


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of an activation, that is for each token."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each `size` neighbouring columns of each row.

    Attributes:
        size: columns in a group, > 0.
        ragged: accept a width that `size` does not divide; the last group is then shorter.
    """

    size: int
    ragged: bool = False

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise RecipeError(
                f"group_size must be a positive number of columns, or -1 for one scale per output channel; got {self.size}"
            )


Granularity = PerTensor | PerChannel | PerToken | PerGroup


def num_groups(granularity: Granularity, num_columns: int) -> int:
    """Return how many scales one row has.

    Raises:
        RecipeError: a group size that does not divide the width, without `ragged`; the sentence names the divisors.
    """
    if not isinstance(granularity, PerGroup):
        return 1
    whole, rest = divmod(num_columns, granularity.size)
    if rest and not granularity.ragged:
        raise RecipeError(
            f"group_size must divide the width of the weight, or be declared ragged (weights.ragged = true); got "
            f"group_size {granularity.size} for {num_columns} input channels, whose divisors are "
            f"{divisors_text(num_columns)}; choose one, or -1 for one scale per output channel"
        )
    return whole + bool(rest)


def group_of_column(granularity: Granularity, num_columns: int) -> Int[Tensor, " columns"]:
    """Return, for each column, the index of the scale that it uses."""
    num_groups(granularity, num_columns)
    columns = torch.arange(num_columns)
    return columns // granularity.size if isinstance(granularity, PerGroup) else torch.zeros_like(columns)


def divisors_text(number: int) -> str:
    """Return the divisors of `number` as a readable list, at most the twelve largest."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return ", ".join(str(d) for d in divisors[-12:])
