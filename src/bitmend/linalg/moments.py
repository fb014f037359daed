"""Second moments of a layer's input in the quantised and in the full-precision network.

Symbols (columns are tokens in the papers, rows here): x = input in the quantised network, x~ = input in the
full-precision network, dx = x~ - x, N = tokens.

    G = mean x x^T        C = mean dx x^T        D = mean dx dx^T          (all (in, in); C is not symmetric)

They are sufficient for every closed-form objective of a linear layer: with W the weight, Q its quantised form, E = Q - W,

    mean ||Q x - W x~||^2 = tr(E G E^T) - 2 tr(E C^T W^T) + tr(W D W^T).

Products are taken in float32 a chunk of tokens at a time, sums are kept in float64.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bitmend.linalg.cholesky import InverseFactor, factor_inverse
from bitmend.numerics.products import linear

ResultT = TypeVar("ResultT")
CHUNK_TOKENS = 4096
PANEL = 128  # rows of a symmetric product that are computed at once; thinner ones pay off where the whole is small
SMALL_PANEL, SMALL_WIDTH = 64, 512
QUADRATIC_PANEL = 512  # columns of E that are multiplied at once in tr(E G E^T)
BLURRED = 1e-4  # error over energy below which products of moments are taken in float64


@dataclass(frozen=True)
class Moments:
    """Moments of one group's input over one set of rows.

    Attributes:
        G: mean x x^T, float64.
        C: mean dx x^T, float64; None when the full-precision stream was not asked for.
        D: mean dx dx^T, float64; None likewise.
        num_tokens: how many tokens the means are over.
    """

    G: Float[Tensor, "in in"]
    C: Float[Tensor, "in in"] | None
    D: Float[Tensor, "in in"] | None
    num_tokens: int
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def remember(self, key: Hashable, compute: Callable[[], ResultT]) -> ResultT:
        """Return what `compute` gives, computed once for all sites that share these moments."""
        if key not in self._known:
            self._known[key] = compute()
        result: ResultT = self._known[key]
        return result

    def inverse_factor(self, damping: float, order: str) -> InverseFactor:
        """Return the factor of (G + damping mean(diag G) I)^-1, computed once for all sites that share these moments.

        Raises:
            FactorizationError: G stays indefinite after the whole damping ladder.
        """
        return self.remember(("inverse_factor", damping, order), lambda: factor_inverse(self.G, damping, order))

    @property
    def factors(self) -> tuple[InverseFactor, ...]:
        """The factors that have been computed so far."""
        return tuple(known for known in self._known.values() if isinstance(known, InverseFactor))

    def output_error(self, weight: Float[Tensor, "out in"], quantised: Float[Tensor, "out in"]) -> float:
        """Return the mean over tokens of ||Q x - W x~||^2, with x~ = x when C or D are unknown.

        Cost: one (out, in) x (in, in) product in float64 for each known moment; `relative_errors` does it in float32.
        """
        W = weight.double()
        E = quantised.double() - W
        error = torch.sum((E @ self.G) * E)
        if self.C is not None and self.D is not None:
            error = error - 2 * torch.sum(E * (W @ self.C)) + torch.sum((W @ self.D) * W)
        return float(error)

    def output_energy(self, weight: Float[Tensor, "out in"]) -> float:
        """Return the mean over tokens of ||W x||^2, the scale against which errors are read."""
        W = weight.double()
        return float(torch.sum((W @ self.G) * W))


def relative_errors(
    weight: Float[Tensor, "out in"], quantised: Sequence[Float[Tensor, "out in"]], moments: Moments
) -> list[float]:
    """Return for each quantised form Q of a weight W the mean over tokens of ||Q x - W x~||^2 over that of ||W x||^2.

    x~ = x when C or D are unknown. Products are taken in float32 and their parts summed in float64; an error so small that
    float32 would blur it is computed again in float64. A silent layer (no energy) has the error 0, or infinity.

    Cost: half an (out, in) x (in, in) product for each Q and for W, because G is symmetric; one for C and half for D.
    """
    energy, errors = energy_and_errors(weight, quantised, moments)
    return [relative(error, energy) for error in errors]


def relative(error: float, energy: float) -> float:
    """Return an error over an energy: of a silent layer (no energy) 0 where it has no error either, else infinity."""
    return error / energy if energy else 0.0 if error == 0 else float("inf")


def energy_and_errors(
    weight: Float[Tensor, "out in"],
    quantised: Sequence[Float[Tensor, "out in"]],
    moments: Moments,
    energy: float | None = None,
) -> tuple[float, list[float]]:
    """Return the mean over tokens of ||W x||^2, and for each Q that of ||Q x - W x~||^2; as `relative_errors`.

    Args:
        weight: W.
        quantised: forms of it.
        moments: of the tokens.
        energy: known already, of these or of other tokens: what comes back then, and one product less.
    """
    differences = [Q - weight for Q in quantised]
    known = [] if energy is None else [energy]
    energy, *errors = [*known, *_quadratics([weight, *differences] if energy is None else differences, moments.G)]
    if moments.C is not None and moments.D is not None:
        pull = product_for_sums(weight, moments.C.T)
        (constant,) = _quadratics([weight], moments.D)
        errors = [error + constant - 2 * _inner(pull, E) for error, E in zip(errors, differences, strict=True)]
    del differences
    exact = [
        moments.output_error(weight, Q) if error <= BLURRED * energy else error
        for error, Q in zip(errors, quantised, strict=True)
    ]
    return energy, exact


def product_for_sums(left: Float[Tensor, "out in"], right: Float[Tensor, "other in"]) -> Float[Tensor, "out other"]:
    """Return `left right^T`, taken in float32, to be summed in float64.

    Such a sum is exact to about 1e-6 of itself, unless a few directions of the input have nearly all the energy: with
    activations 1,000 times the others, spread over many channels, to 2e-4.
    """
    return linear(left.float(), right.float())


def _quadratics(matrices: Sequence[Float[Tensor, "out in"]], G: Float[Tensor, "in in"]) -> list[float]:
    """Return tr(E G E^T) of each E for a symmetric G, from what is on and below its diagonal."""
    totals = [0.0] * len(matrices)
    for start in range(0, len(G), QUADRATIC_PANEL):
        columns, later = slice(start, start + QUADRATIC_PANEL), slice(start + QUADRATIC_PANEL, None)
        panel = G[start:, columns].float()  # of all matrices: it takes as long to make as a product with it
        for index, E in enumerate(matrices):
            product = product_for_sums(E[:, columns], panel)
            totals[index] += _inner(product[:, :QUADRATIC_PANEL], E[:, columns])
            totals[index] += 2 * _inner(product[:, QUADRATIC_PANEL:], E[:, later])
    return totals


def _inner(one: Float[Tensor, "out in"], other: Float[Tensor, "out in"]) -> float:
    return float((one * other).sum(dtype=torch.float64))


def merge(first: Moments, second: Moments) -> Moments:
    """Return the moments over the tokens of both."""
    return _mix(first, second, lambda one, a, other, b: (a * one).add_(b * other))


def merge_(first: Moments, second: Moments) -> Moments:
    """Return the moments over the tokens of both, in the memory of `first`; neither can be used afterwards."""
    return _mix(first, second, lambda one, a, other, b: one.mul_(a).add_(other.mul_(b)))


def _mix(first: Moments, second: Moments, add: Callable[[Tensor, float, Tensor, float], Tensor]) -> Moments:
    total = first.num_tokens + second.num_tokens
    a, b = first.num_tokens / total, second.num_tokens / total

    def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else add(one, a, other, b)

    return Moments(add(first.G, a, second.G, b), both(first.C, second.C), both(first.D, second.D), total)


class MomentSums:
    """Running sums from which `Moments` are made.

    Cost: for T tokens of width I, T I^2 operations for G and for D, which are symmetric, and 2 T I^2 for C; 8 I^2 bytes each.
    """

    def __init__(self, width: int, *, cross: bool, residual: bool, device: torch.device) -> None:
        def zeros() -> Tensor:
            return torch.zeros(width, width, dtype=torch.float64, device=device)

        self.G = zeros()
        self.C = zeros() if cross else None
        self.D = zeros() if residual else None
        self.num_tokens = 0
        self._means: Moments | None = None

    def add_(self, x: Float[Tensor, "token in"], x_fp: Float[Tensor, "token in"] | None) -> None:
        """Add tokens.

        Args:
            x: inputs in the quantised network, any floating dtype.
            x_fp: inputs of the same tokens in the full-precision network; needed when C or D were asked for.

        Raises:
            ValueError: the means have been taken already.
        """
        if self._means is not None:
            raise ValueError("the sums have become means; start new sums to add tokens")
        for start in range(0, len(x), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            inputs = x[rows].float().T.contiguous()
            _add_upper_half(self.G, inputs)
            if x_fp is not None and (self.C is not None or self.D is not None):
                residual = x_fp[rows].float().T.contiguous() - inputs
                if self.C is not None:
                    self.C += linear(residual, inputs)
                if self.D is not None:
                    _add_upper_half(self.D, residual)
        self.num_tokens += len(x)

    def means(self) -> Moments:
        """Return the moments of all tokens added so far (at least one), in the memory of the sums, which end here."""
        if self._means is None:
            for total in (self.G, self.D):
                if total is not None:
                    _mirror(total)
            for total in (self.G, self.C, self.D):
                if total is not None:
                    total /= self.num_tokens  # in place: a wide layer's sums take gigabytes, and copies as much again
            self._means = Moments(self.G, self.C, self.D, self.num_tokens)
        return self._means


def _panels(width: int) -> Iterator[slice]:
    size = SMALL_PANEL if width < SMALL_WIDTH else PANEL
    for start in range(0, width, size):
        yield slice(start, min(start + size, width))


def _add_upper_half(total: Float[Tensor, "in in"], x: Float[Tensor, "in token"]) -> None:
    """Add x x^T, on and above the diagonal (and a little below it, inside the panels on the diagonal)."""
    for rows in _panels(len(total)):
        total[rows, rows.start :] += linear(x[rows], x[rows.start :])


def _mirror(total: Float[Tensor, "in in"]) -> None:
    """Copy what is above the diagonal to below it."""
    for rows in _panels(len(total)):
        corner = total[rows, rows]
        corner.copy_(corner.triu() + corner.triu(1).T)
        total[rows.stop :, rows] = total[rows, rows.stop :].T
