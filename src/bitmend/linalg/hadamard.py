"""Rotations that spread each number over all others: randomised Hadamard matrices of any size, in O(n log n).

A Hadamard matrix has entries -1 and +1 and orthogonal rows. Sizes that are powers of two are made by Sylvester's doubling,
sizes 4k by Paley's two constructions where a prime allows one (`paley`). Any other size n is written as m * 2^p, and the
odd rest m, for which no such matrix exists, gets a discrete Hartley matrix, with entries of at most sqrt(2/m): orthogonal
all the same, and spreading almost as evenly. The product of a Kronecker product of small matrices needs no large matrix:
each factor is applied along an axis of its own.

A rotation may keep the mean of what it rotates: one of the other n - 1 directions, between two reflections that swap the
direction of the mean with the first axis. It passes through a norm that subtracts the mean as any rotation passes through one
that does not.

A rotation is stored as its size and a seed; the signs are drawn by a fixed rule (`random_signs`), not by torch's generator,
whose numbers may change from release to release.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST_DOUBLINGS = 6  # in one factor: a product with 64 columns is faster than six passes with 2
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q of size n, applied to the last axis, or to blocks of it.

    A last axis of width `outer * size * inner` is read as that many numbers along three axes, and Q works on the middle one:
    `inner = head_dim` mixes heads, `size = head_dim` with `inner = 1` works inside each head.

    Attributes:
        size: n.
        seed: of the random signs in front of the Hadamard matrix; None for no signs.
        inner: neighbouring numbers that are rotated alike.
        transposed: apply Q^T, which undoes Q, instead.
        keeps_mean: (1, ..., 1) Q = (1, ..., 1); of whole axes only (`inner = 1`).

    Cost: none until it is applied, so that a size from a file can be checked against the model first. The factors of a size
    are kept then; an odd rest m takes m^2 numbers.
    """

    size: int
    seed: int | None = None
    inner: int = 1
    transposed: bool = False
    keeps_mean: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.inner < 1:
            raise ValueError(f"a rotation needs a size and an inner width of at least 1; got {self.size}, {self.inner}")
        if self.keeps_mean and (self.size < 2 or self.inner > 1):
            raise ValueError(
                f"a rotation that keeps the mean needs at least 2 features, rotated one by one; got {self.size} x "
                f"{self.inner}"
            )

    def __str__(self) -> str:
        across = f" x {self.inner}" if self.inner > 1 else ""
        mean = ", which keeps their mean" if self.keeps_mean else ""
        return f"rotation of {self.size}{across} features{mean}{', undone' if self.transposed else ''}"

    @property
    def inverse(self) -> "Rotation":
        """The rotation that undoes this one."""
        return replace(self, transposed=not self.transposed)

    def apply(self, values: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Return `values @ Q` (or `@ Q^T`), block by block, in the dtype of `values`.

        Raises:
            ValueError: a width that is no multiple of `size * inner`.

        Cost: width * (sum of the factors) multiplications a row; float16 and bfloat16 are computed in float32.
        """
        width = values.shape[-1]
        if width % (self.size * self.inner):
            raise ValueError(f"a rotation of {self.size} x {self.inner} must divide the width; got {width}")
        exact = values.double() if values.dtype == torch.float64 else values.float()
        if self.keeps_mean:
            return self._beside_mean(exact.reshape(-1, self.size)).reshape(values.shape).to(values.dtype)
        blocks = exact.reshape(-1, self.size, self.inner)
        if self.seed is not None and not self.transposed:
            blocks = blocks * self._signs(blocks)
        blocks = _kronecker(blocks, factors(self.size), self.transposed)
        if self.seed is not None and self.transposed:
            blocks = blocks * self._signs(blocks)
        return blocks.reshape(values.shape).to(values.dtype)

    def _beside_mean(self, blocks: Tensor) -> Tensor:
        """Rotate what is left beside the mean.

        The first row of the matrices that spread is even, and so nearly what the reflection sends to one axis: one feature
        would hardly be spread. With signs behind them, too, it is.
        """
        blocks = mean_to_first(blocks)
        rest, inner = blocks[:, 1:], Rotation(self.size - 1, self.seed, 1, self.transposed)
        signs = random_signs(self.size - 1, 1 if self.seed is None else ~self.seed).to(rest)
        rest = inner.apply(rest * signs) if self.transposed else inner.apply(rest) * signs
        return mean_to_first(torch.cat([blocks[:, :1], rest], 1))

    def matrix(self) -> Float[Tensor, "size size"]:
        """Return Q itself, float64; for tests and for learning from it."""
        return replace(self, inner=1).apply(torch.eye(self.size, dtype=torch.float64))

    def _signs(self, like: Tensor) -> Tensor:
        assert self.seed is not None
        return random_signs(self.size, self.seed).to(like).unsqueeze(1)


def mean_to_first(values: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
    """Return values reflected so that the direction (1, ..., 1) and the first axis change places; its own inverse."""
    size = values.shape[-1]
    if size == 1:
        return values
    even = 1 / math.sqrt(size)
    # The mirror is (1, 0, ..., 0) - (even, ..., even), of squared length 2 - 2 even.
    along = (values[..., :1] - even * values.sum(-1, keepdim=True)) / (1 - even)
    reflected = values + even * along
    reflected[..., :1] -= along
    return reflected


def _kronecker(
    blocks: Float[Tensor, "batch size inner"], matrices: tuple[Tensor, ...], transposed: bool
) -> Float[Tensor, "batch size inner"]:
    """Return the product with the Kronecker product of `matrices` along the middle axis."""
    batch, size, inner = blocks.shape
    before = 1
    for matrix in matrices:
        side = len(matrix)
        after = size // before // side * inner
        matrix = matrix.to(blocks) if transposed else matrix.T.to(blocks)
        # Q acts from the right on rows: out[j] = sum_i x[i] Q[i, j], that is Q^T in front of a column.
        blocks = blocks.reshape(-1, side) @ matrix.T if after == 1 else matrix @ blocks.reshape(-1, side, after)
        before *= side
    return blocks.reshape(batch, size, inner)


@cache
def factors(size: int) -> tuple[Float[Tensor, "side side"], ...]:
    """Return orthogonal float64 matrices whose Kronecker product has `size` rows, entries as even as they can be made."""
    odd, twos = size, 1
    while odd % 2 == 0:
        odd, twos = odd // 2, twos * 2
    found: list[Tensor] = []
    if odd > 1:
        # The smallest multiple 4 * odd, 8 * odd, ... that has a Hadamard matrix, if it is not too large to be worth it.
        for side in (odd * 4, odd * 8, odd * 16):
            matrix = paley(side) if size % side == 0 else None
            if matrix is not None:
                found, twos = [matrix / math.sqrt(side)], size // side
                break
        else:
            found = [hartley(odd)]
    doublings = twos.bit_length() - 1
    parts = -(-doublings // LARGEST_DOUBLINGS)
    for part in range(parts):
        side = 2 ** (doublings // parts + (part < doublings % parts))
        found.append(sylvester(side) / math.sqrt(side))
    return tuple(found) or (torch.ones(1, 1, dtype=torch.float64),)


def sylvester(size: int) -> Float[Tensor, "size size"]:
    """Return the Hadamard matrix of a power of two, symmetric, entries -1 and +1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def paley(size: int) -> Float[Tensor, "size size"] | None:
    """Return a Hadamard matrix of `size` by Paley's first or second construction, or None where no prime gives one.

    First: size = q + 1 for a prime q = 3 mod 4. Second: size = 2 (q + 1) for a prime q = 1 mod 4. (Powers of primes would
    give more sizes; they are left out.) Source: R. E. A. C. Paley, On orthogonal matrices, 1933.
    """
    if is_prime(size - 1) and (size - 1) % 4 == 3:
        core = _bordered(size - 1, antisymmetric=True)
        return core + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if size % 2 == 0 and is_prime(half - 1) and (half - 1) % 4 == 1:
        core, one = _bordered(half - 1, antisymmetric=False), torch.eye(half, dtype=torch.float64)
        pairs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        middle = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, pairs) + torch.kron(one, middle)
    return None


def _bordered(prime: int, *, antisymmetric: bool) -> Float[Tensor, "side side"]:
    """Return the conference matrix of a prime: zero on the diagonal, -1 and +1 elsewhere, orthogonal rows."""
    squares = {number * number % prime for number in range(1, prime)}
    symbol = [0.0, *(1.0 if number in squares else -1.0 for number in range(1, prime))]
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = -1 if antisymmetric else 1
    for row in range(prime):
        matrix[row + 1, 1:] = torch.tensor([symbol[(row - column) % prime] for column in range(prime)])
    return matrix


def hartley(size: int) -> Float[Tensor, "size size"]:
    """Return the orthogonal discrete Hartley matrix: (cos + sin)(2 pi i j / size) / sqrt(size); symmetric."""
    places = torch.arange(size)
    # The product is reduced first, so that large sizes keep all digits.
    angles = (places.outer(places) % size).double() * (2 * math.pi / size)
    return (angles.cos() + angles.sin()) / math.sqrt(size)


def is_prime(number: int) -> bool:
    """Return whether `number` is a prime."""
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


@cache
def random_signs(size: int, seed: int) -> Float[Tensor, " size"]:
    """Return `size` signs, -1 or +1, that depend on the seed alone: bits of the SplitMix64 sequence that starts there.

    Source: G. L. Steele, D. Lea, C. H. Flood, Fast splittable pseudorandom number generators, 2014.
    """
    signs, state = [], seed & _MASK
    for _ in range(size):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        signs.append(1.0 if (mixed ^ (mixed >> 31)) >> 63 else -1.0)
    return torch.tensor(signs, dtype=torch.float64)
