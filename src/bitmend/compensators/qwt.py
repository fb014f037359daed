"""QwT: beside each block, one linear map of what the block reads, which predicts what quantisation has lost in its output.

Source: QwT (Quantization without Tears, CVPR 2025, arXiv:2411.13918). For the tokens of some calibration rows, with x what
the quantised block reads and e what its output lacks,

    W, b = argmin mean ||e - x W - b||^2.

`target` says what is lacking: `trajectory`, the full-precision network at the same place, so that what earlier blocks left
behind is repaired, too; `local`, the full-precision block on the same x (the paper); `mix`, the share between both that
comes nearest to the former on rows it was not fitted to.

How we differ:
- Of tokens, only what the next norm can see is to be predicted (`scale_free`).
- The trajectory, because it is the whole network's output that counts (docs/decisions/0025).
- float64 on standardised inputs with a ridge, chosen by cross-validation over rows, where the paper inverts the normal
  matrix in float32. With an intercept and exact arithmetic the in-sample R^2 is never negative, so that the paper's gate
  (drop a map whose R^2 is not positive) tells where that inverse has failed, and nothing of other data.
- A map is kept where it lowers the error on held-out rows and on each fold that it was not fitted to. `gate = "in_sample"`
  and `solve = "float32_inverse"` are the paper's.
- It is not fitted again to the held-out rows afterwards: these go on to prove the blocks behind it, and the model.
- The constant is drawn towards zero by what it changes from fold to fold, as W is by its ridge.
- Cheaper structures: a constant, a scale and shift for each channel of the output (QwT-v2, arXiv:2505.20932), the best W of
  a rank (reduced-rank regression), blocks on the diagonal. `auto` takes the one with the smallest cross-validated error times
  4 to its bits for each weight of the block: a map has to do better than its bytes would as wider codes, at 6 dB a bit.
- b is fitted again after W has been rounded to the type that it is stored in.

Example: rows x = -1, 0, 1 with e = -1.5, 0.5, 2.5: W = 2, b = 0.5, and nothing is left. The best constant, 0.5, leaves 8/3.

Cost: of N tokens of width d, N d (d + t m) multiply-adds for the sums (t targets, outputs of width m), and for each fold and
ridge d^3 / 3 + 3 d^2 m; while a model runs, d m for each token, or less by the structure.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from bitmend.compensation import BIAS_DTYPE, CompensationShape, Structure
from bitmend.linalg.least_squares import (
    LinearMap,
    RegressionMoments,
    RegressionSums,
    add_up,
    best_constant,
    best_scale,
    explaining_directions,
    reduce_rank,
    ridge_map,
    with_mean,
)
from bitmend.protocols import COMPENSATORS, Compensated, CompensationProblem, Event

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
UNTRIED_RIDGE = 1e-2  # where there are too few rows to try
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the trajectory in a mix
RANK_SHARE = 16  # the width over the usual rank
AUTO_SHARES = (32, 16, 8, 4)  # the width over the ranks that `auto` tries
BIT = math.log(4)  # what one more bit a weight takes off the logarithm of an error, at 6 dB a bit
TARGETS = ("local", "trajectory")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class _Choice:
    """One way to fit: what cross-validation decides between."""

    shape: CompensationShape
    ridge: float = 0.0
    share: float = 0.0


@COMPENSATORS.register("qwt", paper="QwT, arXiv:2411.13918")
@dataclass(frozen=True)
class QwT:
    """A linear map from the input of a block to what its output lacks.

    Attributes:
        structure: of the map; `auto` tries all but `block_diagonal`, and several ranks.
        target: what the map is to predict; see the module.
        rank: of `low_rank`; 0: the width of the output over 16.
        groups: blocks of `block_diagonal`, fewer where these do not divide the widths; 0: one for each 64 inputs, as the
            paper has it on maps of pictures.
        gate: what a map must do to be kept: lower the error on held-out rows, or have a positive R^2 where it was fitted.
        solve: how: by ridge regression in float64, or by the paper's inverse in float32, which has no other structure than
            `full` and `block_diagonal`.
        scale_free: of what a token lacks, leave out the part along the token itself, which the next norm takes out. A map
            that brings back a part of the states' size, such as their mean, and not the rest, makes the error smaller and the
            output worse.
        token_cap: a token counts less from this many times the usual ||x||^2 on, so that a few massive ones do not decide.
        dtype: of all stored numbers but b.
    """

    structure: Literal["bias", "affine", "low_rank", "block_diagonal", "full", "auto"] = "auto"
    target: Literal["local", "trajectory", "mix"] = "trajectory"
    rank: Annotated[int, Field(ge=0)] = 0
    groups: Annotated[int, Field(ge=0)] = 0
    gate: Literal["held_out", "in_sample"] = "held_out"
    solve: Literal["ridge", "float32_inverse"] = "ridge"
    scale_free: bool = True
    token_cap: Annotated[float, Field(gt=0)] = 16.0
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    folds: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if self.solve == "float32_inverse" and self.structure not in ("full", "block_diagonal"):
            raise ValueError(
                "solve = 'float32_inverse' is the paper's, whose maps are full or block_diagonal; set structure"
            )
        for key, value, of in (("rank", self.rank, "low_rank"), ("groups", self.groups, "block_diagonal")):
            if value and self.structure != of:
                raise ValueError(
                    f"{key} is of structure = '{of}', but structure is '{self.structure}'; leave {key} out"
                )

    @property
    def targets(self) -> tuple[str, ...]:
        """Which of `TARGETS` must be measured."""
        return TARGETS if self.target == "mix" else (self.target,)

    @property
    def judges_model(self) -> bool:
        """Whether what the whole model gives is a second gate; the paper has none."""
        return self.gate == "held_out"

    def fit(self, problem: CompensationProblem) -> Compensated:
        """Return the map, or that there is none which helps.

        Raises:
            ValueError: no row came.
        """
        folds = [one for one in problem.folds if one.num_rows]
        if not folds:
            raise ValueError("qwt needs rows to fit to")
        choice, crossed = self._choose(problem.shape, folds, problem.num_weights)
        moments = add_up(folds).moments()
        shape, tensors, map = self._make(choice, moments, folds)
        held_out = problem.held_out.moments() if problem.held_out is not None else None
        target = len(self.targets) - 1
        found: dict[str, Any] = {
            "structure": shape.structure,
            "rank": shape.rank,
            "target": self.target,
            "trajectory_share": choice.share if self.target == "mix" else float(self.target == "trajectory"),
            "ridge": choice.ridge,
            "in_sample_r2": _removed(moments.error(map, target), moments.variance(target)),
            "removed_in_folds": crossed,
            "steady_share_of_constant": self._steady(choice, folds),
            "removed_held_out": None
            if held_out is None
            else _removed(held_out.error(map, target), held_out.energy(target)),
            "held_out_r2": None
            if held_out is None
            else _removed(held_out.error(map, target), held_out.variance(target)),
            "bytes": shape.num_bytes(DTYPES[self.dtype].itemsize),
        }
        keep, why = self._verdict(found)
        if not keep:
            return Compensated(None, {}, found | {"bytes": 0}, (Event("dropped", problem.where, why),))
        return Compensated(shape, tensors, found, tuple(self._overflow(tensors, problem.where)))

    def _verdict(self, found: Mapping[str, Any]) -> tuple[bool, str]:
        if self.gate == "in_sample":
            value = found["in_sample_r2"]
            kept = value > 0 or found["structure"] == "bias"  # it is 0 of every constant
            return kept, f"its R^2 on the rows it was fitted to is {value:.3g}; left out"
        parts = [*(found["removed_in_folds"] or []), found["removed_held_out"]]
        known = [one for one in parts if one is not None]
        if not known:
            return False, "there are no rows that it was not fitted to, so that nothing proves the map; left out"
        worst = min(known)
        return worst > 0, (
            f"the map would raise the error of the block by {-100 * worst:.2g} % on some of the rows that it was not fitted "
            "to; left out"
        )

    def _overflow(self, tensors: Mapping[str, Tensor], where: str) -> Iterator[Event]:
        if any(one.dtype == torch.bfloat16 for one in tensors.values()) and self.dtype == "float16":
            yield Event("fallback", where, "the map has numbers that float16 cannot hold; stored in bfloat16")

    # ------------------------------------------------------------------------------------------ choosing
    def _choices(self, shape: CompensationShape) -> list[_Choice]:
        shares = SHARES if self.target == "mix" else (0.0,)
        plain = self.solve == "float32_inverse" or self.structure == "bias"
        # Those that start from the same map stand side by side, so that only one such map is held.
        return [
            _Choice(made, ridge, share)
            for ridge in ((0.0,) if plain else RIDGES)
            for share in shares
            for made in self._shapes(shape)
            if made.structure != "bias" or ridge in (0.0, RIDGES[0])
        ]

    def _shapes(self, shape: CompensationShape) -> list[CompensationShape]:
        if self.structure != "auto":
            return [self._shaped(shape, self.structure)]
        ranks = {max(1, shape.outputs // share) for share in AUTO_SHARES}
        low = [replace(shape, structure="low_rank", rank=rank) for rank in sorted(ranks) if rank <= shape.inputs]
        return [self._shaped(shape, "bias"), self._shaped(shape, "affine"), *low, self._shaped(shape, "full")]

    def largest(self, shape: CompensationShape) -> CompensationShape:
        """Return the largest map that may come out at such a place."""
        return self._shaped(shape, "full" if self.structure == "auto" else self.structure)

    @property
    def num_solved(self) -> int:
        """How many maps are solved for on each fold."""
        structureless = self.structure in ("bias", "affine")
        return (
            0 if structureless else len({(c.ridge, c.share) for c in self._choices(CompensationShape("bias", 64, 64))})
        )

    def _shaped(self, shape: CompensationShape, structure: Structure) -> CompensationShape:
        rank = self.rank or max(1, shape.outputs // RANK_SHARE)
        common = math.gcd(shape.inputs, shape.outputs)
        wanted = min(common, self.groups or max(1, shape.inputs // 64))
        groups = next(count for count in range(wanted, 0, -1) if common % count == 0)
        if structure == "low_rank":
            return replace(shape, structure=structure, rank=min(rank, shape.inputs, shape.outputs))
        if structure == "block_diagonal":
            return replace(shape, structure=structure, groups=groups)
        return replace(shape, structure=structure)

    def _choose(
        self, shape: CompensationShape, folds: list[RegressionSums], num_weights: int
    ) -> tuple[_Choice, list[float] | None]:
        """Return what has the smallest error on rows it was not fitted to, and of each fold the share that it removes."""
        choices = self._choices(shape)
        if len(folds) < 2:
            choice = next((one for one in choices if one.ridge >= UNTRIED_RIDGE), choices[0])
            return choice, None
        target = len(self.targets) - 1
        errors: list[list[float]] = [[] for _ in choices]
        energies = []
        for fold in folds:
            judged = fold.moments()
            maps = _Maps(self, add_up([one for one in folds if one is not fold]).moments())
            for number, choice in enumerate(choices):
                errors[number].append(judged.error(maps.of(choice)[0], target) * judged.weight)
            energies.append(judged.energy(target) * judged.weight)
        best = min(
            range(len(choices)), key=lambda number: self._price(choices[number], sum(errors[number]), num_weights)
        )
        return choices[best], [_removed(error, energy) for error, energy in zip(errors[best], energies, strict=True)]

    def _steady(self, choice: _Choice, folds: list[RegressionSums]) -> float:
        """Return the share of mean e that is no accident of the rows: 1 - its variance over its square.

        Tokens of one row are alike, so that the mean of thousands of them may rest on a few rows; and a constant is added to
        every token alike, which the output feels far more than as much error that differs from token to token.
        """
        if len(folds) < 2:
            return 1.0
        means = torch.stack([_Maps(self, one.moments()).target(choice).mean_e[0] for one in folds])
        weights = torch.tensor([one.weight for one in folds], dtype=torch.float64, device=means.device)
        weights = (weights / weights.sum())[:, None]
        mean = (weights * means).sum(0)
        variance = (weights * (means - mean).square()).sum() / (len(folds) - 1)
        size = mean.square().sum()
        return max(0.0, 1 - float(variance / size)) if float(size) > 0 else 0.0

    def _price(self, choice: _Choice, error: float, num_weights: int) -> float:
        """Return what is to be smallest: an error; of `auto` its logarithm and what the bytes would do as wider codes."""
        if self.structure != "auto":
            return error
        bits = 8 * choice.shape.num_bytes(DTYPES[self.dtype].itemsize) / max(1, num_weights)
        return math.log(max(error, 1e-300)) + BIT * bits

    # ------------------------------------------------------------------------------------------ storing
    def _make(
        self, choice: _Choice, moments: RegressionMoments, folds: list[RegressionSums]
    ) -> tuple[CompensationShape, dict[str, Tensor], LinearMap]:
        """Return shape, stored tensors, and the map that these are, fitted to the moments of all folds together."""
        maps, shape, dtype = _Maps(self, moments), choice.shape, DTYPES[self.dtype]
        map, factors = maps.of(choice)
        mixed = maps.mixed
        if map.a is not None:
            scale = _stored(map.a, dtype)
            map = LinearMap(mixed.mean_e[0] - scale.double() * mixed.mean_y, a=scale.double())
            tensors = {"scale": scale}
        elif shape.structure == "bias":
            tensors = {}
        elif factors is not None:
            tensors = {"down": _stored(factors[0].T, dtype), "up": _stored(factors[1].T, dtype)}
            map = with_mean(replace(map, W=tensors["down"].double().T @ tensors["up"].double().T), mixed)
        else:
            assert map.W is not None
            tensors = {"weight": _stored(_without_zeros(map.W, shape.groups), dtype)}
            map = with_mean(replace(map, W=_with_zeros(tensors["weight"].double(), map.W, shape.groups)), mixed)
        if self.solve == "ridge":
            map = replace(map, b=map.b - (1 - self._steady(choice, folds)) * mixed.mean_e[0])
        tensors["bias"] = map.b.to(BIAS_DTYPE)
        return shape, tensors, map


class _Maps:
    """The maps of several choices for the same rows; what neighbours have in common is computed once.

    Attributes:
        mixed: the moments with the one target of the last choice.
    """

    mixed: RegressionMoments

    def __init__(self, method: QwT, moments: RegressionMoments) -> None:
        self._method, self._moments = method, moments
        self._share: float | None = None
        self._ridge: float | None = None
        self._full: LinearMap | None = None
        self._vectors: Tensor | None = None

    def target(self, choice: _Choice) -> RegressionMoments:
        """Return the moments with what a choice is to predict."""
        if choice.share != self._share:
            shares = [1 - choice.share, choice.share] if self._method.target == "mix" else [1.0]
            self.mixed = self._moments.mixed(torch.tensor(shares, dtype=torch.float64))
            self._share, self._ridge = choice.share, None
        return self.mixed

    def of(self, choice: _Choice) -> tuple[LinearMap, tuple[Tensor, Tensor] | None]:
        """Return a map, and its two factors where it has a low rank."""
        shape = choice.shape
        self.target(choice)
        if shape.structure == "bias":
            return best_constant(self.mixed), None
        if shape.structure == "affine":
            return best_scale(self.mixed, choice.ridge), None
        if self._method.solve == "float32_inverse":
            return _float32_inverse(self.mixed, shape.groups), None
        if choice.ridge != self._ridge or self._full is None:
            self._full, self._vectors = ridge_map(self.mixed, choice.ridge, shape.groups), None
            self._ridge = choice.ridge
        if shape.structure != "low_rank":
            return self._full, None
        if self._vectors is None:
            self._vectors = explaining_directions(self._full, self.mixed)
        down, up = reduce_rank(self._full, self._vectors, shape.rank)
        return with_mean(replace(self._full, W=down @ up), self.mixed), (down, up)


def _removed(error: float, of: float) -> float:
    """Return which share of an error is gone; below 0 where it has grown."""
    return 1 - error / of if of > 0 else 0.0


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in the type they are stored in; in bfloat16 where that type would make infinities of them."""
    stored = values.contiguous().to(dtype)
    return stored if bool(stored.isfinite().all()) else values.contiguous().to(torch.bfloat16)


def _without_zeros(W: Float[Tensor, "d m"], groups: int) -> Float[Tensor, "m part"]:
    """Return the blocks on the diagonal, transposed, one below the other."""
    d, m = W.shape
    parts = [
        W[group * d // groups : (group + 1) * d // groups, group * m // groups : (group + 1) * m // groups].T
        for group in range(groups)
    ]
    return torch.cat(parts)


def _with_zeros(weight: Float[Tensor, "m part"], like: Float[Tensor, "d m"], groups: int) -> Float[Tensor, "d m"]:
    """Return what `_without_zeros` was given."""
    W = torch.zeros_like(like)
    d, m = W.shape
    for group, block in enumerate(torch.split(weight, m // groups)):
        W[group * d // groups : (group + 1) * d // groups, group * m // groups : (group + 1) * m // groups] = block.T
    return W


def _float32_inverse(moments: RegressionMoments, groups: int) -> LinearMap:
    """Return the paper's solution: the inverse in float32 of the second moments of (x, 1), times those with e.

    Where torch finds the matrix singular there is no map: W is zero, as for a block that the paper leaves out.
    """
    P = moments.P[0]
    d, m = P.shape
    W, b = torch.zeros_like(P), moments.mean_e[0].clone()
    for group in range(groups):
        rows = slice(group * d // groups, (group + 1) * d // groups)
        columns = slice(group * m // groups, (group + 1) * m // groups)
        mean_x, mean_e = moments.mean_x[rows], moments.mean_e[0, columns]
        width = len(mean_x)
        normal = torch.ones(width + 1, width + 1, dtype=torch.float64, device=P.device)
        normal[:width, :width] = moments.C[rows, rows] + torch.outer(mean_x, mean_x)
        normal[width, :width] = normal[:width, width] = mean_x
        right = torch.cat([P[rows, columns] + torch.outer(mean_x, mean_e), mean_e[None]])
        inverse, failed = torch.linalg.inv_ex((moments.weight * normal).float())
        if int(failed) or not bool(inverse.isfinite().all()):
            continue
        solution = (inverse @ (moments.weight * right).float()).double()
        W[rows, columns], b[columns] = solution[:width], solution[width]
    return LinearMap(b, W=W)
