"""Linear regression from sums over rows: the sums, ridge solutions, and the error of any linear map, without the rows.

Symbols (rows are samples): x input (d), y output (m) of something, e what y lacks (m), one e for each target. Sums are kept
of x, y, e, x x^T, x e^T, and of y^2, y e and e^2 channel by channel. From them follow, for every map f(x, y) = x W + a y + b
with either W or a zero, the best of its kind and

    mean ||e - f(x, y)||^2 = sum_c var_c + mean_c^2,

var and mean those of channel c of e - f. No row is kept, so that tokens may be as many as there are.

Numbers: x is counted from a fixed shift near its mean, so that centring cancels little; products in float32 of some thousand
rows at a time are added up in float64; the solve is float64 on inputs of unit variance, with a ridge relative to that
variance. The normal equations in float32 and without it fail on residual streams, whose condition reaches 1e15.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitmend.linalg.moments import CHUNK_TOKENS
from bitmend.numerics.products import linear

DEAD = 1e-12  # variance over the median variance, below which an input says nothing
EIGENVALUE_CUT = 1e-6  # of the largest, where a factorisation fails


@dataclass(frozen=True)
class LinearMap:
    """f(x, y) = x W + a y + b.

    Attributes:
        W: None: zero.
        a: None: zero; never together with W.
        b: always there.
    """

    b: Float[Tensor, " m"]
    W: Float[Tensor, "d m"] | None = None
    a: Float[Tensor, " m"] | None = None

    def apply(self, x: Float[Tensor, "row d"], y: Float[Tensor, "row m"]) -> Float[Tensor, "row m"]:
        """Return f(x, y) in float64."""
        found = self.b.expand(len(x), -1)
        if self.W is not None:
            found = found + x.double() @ self.W
        return found if self.a is None else found + y.double() * self.a


@dataclass(frozen=True)
class RegressionMoments:
    """Means and centred second moments of some rows; all float64.

    Attributes:
        weight: sum of the weights of the rows.
        mean_x: of x itself.
        C: covariance of x.
        mean_e: of each target.
        P: covariance of x with each target.
        var_e: variance of each channel of each target.
        mean_y: of y.
        var_y: variance of each channel.
        cov_ye: of y and e, channel by channel, for each target.
    """

    weight: float
    mean_x: Float[Tensor, " d"]
    C: Float[Tensor, "d d"]
    mean_e: Float[Tensor, "target m"]
    P: Float[Tensor, "target d m"]
    var_e: Float[Tensor, "target m"]
    mean_y: Float[Tensor, " m"]
    var_y: Float[Tensor, " m"]
    cov_ye: Float[Tensor, "target m"]

    def energy(self, target: int) -> float:
        """Return mean ||e||^2: the error without any map."""
        return float((self.var_e[target] + self.mean_e[target].square()).sum())

    def variance(self, target: int) -> float:
        """Return mean ||e - mean e||^2: the error with the best constant."""
        return float(self.var_e[target].sum())

    def error(self, map: LinearMap, target: int) -> float:
        """Return mean ||e - f(x, y)||^2.

        Cost: d^2 m multiply-adds where there is a W.
        """
        mean, variance = self.mean_e[target] - map.b, self.var_e[target]
        if map.W is not None:
            mean = mean - self.mean_x @ map.W
            variance = variance - 2 * (map.W * self.P[target]).sum(0) + (map.W * (self.C @ map.W)).sum(0)
        if map.a is not None:
            mean = mean - map.a * self.mean_y
            variance = variance - 2 * map.a * self.cov_ye[target] + map.a.square() * self.var_y
        return float((variance.clamp(min=0) + mean.square()).sum())

    def mixed(self, shares: Float[Tensor, " target"]) -> "RegressionMoments":
        """Return the moments with one target, the sum of all with these shares; its variances are unknown (NaN)."""
        shares = shares.to(self.P)
        unknown = torch.full_like(self.var_e[:1], torch.nan)
        return RegressionMoments(
            self.weight,
            self.mean_x,
            self.C,
            (shares @ self.mean_e)[None],
            torch.einsum("t,tdm->dm", shares, self.P)[None],
            unknown,
            self.mean_y,
            self.var_y,
            (shares @ self.cov_ye)[None],
        )


class RegressionSums:
    """Running sums from which `RegressionMoments` are made.

    Attributes:
        num_rows: how many rows came.

    Cost: for N rows, N d (d + t m) multiply-adds for t targets; 8 d (d + t m) bytes.
    """

    def __init__(self, inputs: int, outputs: int, targets: int, shift: Float[Tensor, " d"]) -> None:
        """Start with nothing.

        Args:
            inputs: d.
            outputs: m.
            targets: how many e there are for a row.
            shift: from which x is counted; sums that are to be added must have the same.
        """

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=shift.device)

        self.shift = shift.double()
        self.num_rows = 0
        self.weight = 0.0
        self._x, self._xx, self._xe = zeros(inputs), zeros(inputs, inputs), zeros(targets, inputs, outputs)
        self._y, self._yy = zeros(outputs), zeros(outputs)
        self._e, self._ee, self._ye = zeros(targets, outputs), zeros(targets, outputs), zeros(targets, outputs)

    def add_(
        self,
        x: Float[Tensor, "row d"],
        y: Float[Tensor, "row m"],
        errors: Sequence[Float[Tensor, "row m"]],
        weights: Float[Tensor, " row"] | None = None,
    ) -> None:
        """Add rows.

        Args:
            x: inputs, any floating dtype.
            y: outputs.
            errors: what y lacks, for each target.
            weights: how much each row counts; None: 1.
        """
        for start in range(0, len(x), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            part = [one[rows].float() for one in (x, y, *errors)]
            weighted = None if weights is None else weights[rows].float()
            self._add_chunk_(part[0] - self.shift.float(), part[1], part[2:], weighted)
        self.num_rows += len(x)
        self.weight += len(x) if weights is None else float(weights.double().sum())

    def _add_chunk_(self, x: Tensor, y: Tensor, errors: Sequence[Tensor], weights: Tensor | None) -> None:
        def total(values: Tensor) -> Tensor:
            return (values if weights is None else values * weights[:, None]).sum(0, dtype=torch.float64)

        left = (x if weights is None else x * weights[:, None]).T.contiguous()
        self._x += total(x)
        self._xx += linear(left, x.T.contiguous())
        self._y += total(y)
        self._yy += total(y.square())
        for target, e in enumerate(errors):
            self._xe[target] += linear(left, e.T.contiguous())
            self._e[target] += total(e)
            self._ee[target] += total(e.square())
            self._ye[target] += total(y * e)

    def is_finite(self) -> bool:
        """Return whether neither NaN nor Inf came."""
        return all(bool(one.isfinite().all()) for one in (self._xx, self._xe, self._ee, self._yy))

    def moments(self) -> RegressionMoments:
        """Return the moments of all rows so far, at least one of positive weight."""
        n = self.weight
        x, y, e = self._x / n, self._y / n, self._e / n
        return RegressionMoments(
            n,
            x + self.shift,
            self._xx / n - torch.outer(x, x),
            e,
            self._xe / n - torch.einsum("d,tm->tdm", x, e),
            (self._ee / n - e.square()).clamp(min=0),
            y,
            (self._yy / n - y.square()).clamp(min=0),
            self._ye / n - y * e,
        )


def add_up(sums: Sequence[RegressionSums]) -> RegressionSums:
    """Return new sums over the rows of all, which have one shift.

    Raises:
        ValueError: they count x from different shifts.
    """
    first = sums[0]
    if any(not torch.equal(one.shift, first.shift) for one in sums):
        raise ValueError("sums with different shifts cannot be added")
    targets, inputs, outputs = first._xe.shape
    found = RegressionSums(inputs, outputs, targets, first.shift)
    for one in sums:
        found.num_rows += one.num_rows
        found.weight += one.weight
        for name in ("_x", "_xx", "_xe", "_y", "_yy", "_e", "_ee", "_ye"):
            getattr(found, name).add_(getattr(one, name))
    return found


# ---------------------------------------------------------------------------------------------- the best of a kind
def best_constant(moments: RegressionMoments) -> LinearMap:
    """Return f = mean e of the first target."""
    return LinearMap(moments.mean_e[0].clone())


def best_scale(moments: RegressionMoments, ridge: float) -> LinearMap:
    """Return f = a y + b, channel by channel, of the first target.

    a = cov(y, e) / ((1 + ridge) var y), drawn towards 0; 0 where y does not vary.
    """
    varies = moments.var_y > DEAD * moments.var_y.median()
    a = torch.where(varies, moments.cov_ye[0] / (moments.var_y * (1 + ridge)), 0.0)
    return LinearMap(moments.mean_e[0] - a * moments.mean_y, a=a)


def ridge_map(moments: RegressionMoments, ridge: float, groups: int = 1) -> LinearMap:
    """Return f = x W + b of the first target with the least mean ||e - f||^2 + ridge sum_j var_j ||W_j||^2.

    With D^2 the variances of x and C' = D^-1 C D^-1, W = D^-1 (C' + ridge I)^-1 D^-1 P. Inputs that do not vary get no
    weight.

    Args:
        moments: of the rows to fit.
        ridge: relative to the variance of an input; > 0.
        groups: W is block-diagonal with so many equal blocks, each a regression of its own.

    Cost: d^3 / 3 + 2 d^2 m multiply-adds, less by groups^2.
    """
    P = moments.P[0]
    d, m = P.shape
    W = torch.zeros_like(P)
    for group in range(groups):
        rows = slice(group * d // groups, (group + 1) * d // groups)
        columns = slice(group * m // groups, (group + 1) * m // groups)
        W[rows, columns] = _solve(moments.C[rows, rows], P[rows, columns], ridge)
    return with_mean(LinearMap(moments.mean_e[0], W=W), moments)


def with_mean(map: LinearMap, moments: RegressionMoments) -> LinearMap:
    """Return the map with the b for which e - f has the mean 0, whatever W has been rounded to since it was solved for."""
    assert map.W is not None
    return LinearMap(moments.mean_e[0] - moments.mean_x @ map.W, W=map.W)


def explaining_directions(map: LinearMap, moments: RegressionMoments) -> Float[Tensor, "m m"]:
    """Return the eigenvectors of P^T W as columns, directions of the output: first those that a ridge solution explains best.

    Cost: d m^2 multiply-adds, and about 9 m^3 operations for the eigenvectors.
    """
    assert map.W is not None
    explained = moments.P[0].T @ map.W
    return torch.linalg.eigh((explained + explained.T) / 2).eigenvectors.flip(1)


def reduce_rank(map: LinearMap, directions: Float[Tensor, "m m"], rank: int) -> tuple[Tensor, Tensor]:
    """Return (d, rank) and (rank, m) whose product is the best W of this rank, given the ridge solution of full rank.

    W V V^T with V the first of `explaining_directions` (reduced-rank regression). The truncated singular values of W itself
    leave out what inputs of large variance need.
    """
    assert map.W is not None
    first = directions[:, :rank]
    return map.W @ first, first.T.contiguous()


def _solve(C: Float[Tensor, "d d"], P: Float[Tensor, "d m"], ridge: float) -> Float[Tensor, "d m"]:
    variances = C.diagonal()
    alive = variances > DEAD * variances.median().clamp(min=torch.finfo(C.dtype).tiny)
    scale = torch.where(alive, variances.clamp(min=0).sqrt(), 1.0)
    standard = torch.where(alive[:, None] & alive[None], C / scale[:, None] / scale[None], 0.0)
    standard.diagonal().add_(ridge + (~alive).double())
    wanted = torch.where(alive[:, None], P / scale[:, None], 0.0)
    factor, failed = torch.linalg.cholesky_ex(standard)
    if int(failed):
        values, vectors = torch.linalg.eigh(standard)
        kept = values > EIGENVALUE_CUT * values[-1]
        found = vectors[:, kept] @ ((vectors[:, kept].T @ wanted) / values[kept, None])
    else:
        found = torch.cholesky_solve(wanted, factor)
    return found / scale[:, None]
