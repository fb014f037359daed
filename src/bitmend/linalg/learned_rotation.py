"""Rotations that have been learned: a fixed one, followed by the Cayley transform of a skew-symmetric matrix.

Source: SpinQuant (arXiv 2405.16406) learns rotations on the Stiefel manifold by Cayley steps. Here the whole way from where
it starts is one Cayley transform, C = (I + A)^-1 (I - A) with A skew-symmetric, which is orthogonal whatever A is: learning
needs no manifold, a stored rotation is half a matrix of 16-bit numbers, and rounding these leaves it exactly orthogonal.
Out of reach are turns of a plane by more than 126 degrees: entries of A end at 2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from bitmend.linalg.greedy_rotation import BlockRotation
from bitmend.linalg.hadamard import Rotation, mean_to_first

STEP = 2.0**-14  # of a code; the entries of A reach from -2 to 2


@dataclass(frozen=True, eq=False)
class LearnedRotation:
    """`base`, then the Cayley transform of a learned matrix; applied to the last axis, or to blocks of it.

    Attributes:
        base: where learning started; if it keeps the mean, so does this.
        codes: gives the entries of A above its diagonal, row by row, in units of `STEP`. They may lie in a module.
        transposed: undo it all.
        holder: path of the module that holds the codes in a finished model; empty where weights have taken it up.

    Cost: a product with a dense matrix, which is made when it is first applied: one solve of its size in float64.
    """

    base: Rotation
    codes: Callable[[], Int16[Tensor, " entries"]]
    transposed: bool = False
    holder: str = ""
    _made: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.base.inner != 1 or self.base.transposed:
            raise ValueError(
                f"a learned rotation starts from one of single features that is not undone; got {self.base}"
            )

    @property
    def size(self) -> int:
        """Features that are rotated together."""
        return self.base.size

    @property
    def inner(self) -> int:
        """Neighbouring numbers that are rotated alike: one."""
        return 1

    @property
    def keeps_mean(self) -> bool:
        """Whether it keeps the mean of what it rotates."""
        return self.base.keeps_mean

    @property
    def inverse(self) -> "LearnedRotation":
        """The rotation that undoes this one."""
        return replace(self, transposed=not self.transposed)

    def __str__(self) -> str:
        mean = ", which keeps their mean" if self.keeps_mean else ""
        return f"learned rotation of {self.size} features{mean}{', undone' if self.transposed else ''}"

    def apply(self, values: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Return the values rotated block by block, in their dtype; float16 and bfloat16 are computed in float32.

        Raises:
            ValueError: a width that is no multiple of the size, or codes of another number.
        """
        if values.shape[-1] % self.size:
            raise ValueError(f"a rotation of {self.size} features must divide the width; got {values.shape[-1]}")
        exact = values.double() if values.dtype == torch.float64 else values.float()
        codes = self.codes()
        version = 0 if codes.is_inference() else codes._version
        kind = f"{exact.dtype} {exact.device} {codes.data_ptr()} {version}"
        if kind not in self._made:
            with torch.inference_mode(False), torch.no_grad():  # it may be used with gradients of other things later
                self._made[kind] = self.matrix().to(exact.dtype).to(exact.device)
        matrix = self._made[kind]
        blocks = exact.reshape(-1, self.size) @ (matrix.T if self.transposed else matrix)
        return blocks.reshape(values.shape).to(values.dtype)

    def matrix(self) -> Float[Tensor, "size size"]:
        """Return the rotation that `transposed` undoes, float64, on the CPU."""
        return rotated_by(self.base, generator_of(self.codes().cpu(), learned_size(self.base)))


def learned_size(base: Rotation) -> int:
    """Return the size of A: a rotation that keeps the mean learns in the directions beside it."""
    return base.size - base.keeps_mean


def num_codes(size: int) -> int:
    """Return how many entries a matrix has above its diagonal."""
    return size * (size - 1) // 2


def generator_of(codes: Int16[Tensor, " entries"], size: int) -> Float[Tensor, "size size"]:
    """Return A with its entries below the diagonal left zero, float64.

    Raises:
        ValueError: not as many codes as a matrix of that size has entries above its diagonal.
    """
    if codes.shape != (num_codes(size),):
        raise ValueError(
            f"a learned rotation of {size} features needs {num_codes(size)} codes; got {tuple(codes.shape)}"
        )
    upper = torch.zeros(size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    upper[rows, columns] = codes.double() * STEP
    return upper


def codes_of(upper: Float[Tensor, "size size"]) -> Int16[Tensor, " entries"]:
    """Return the nearest codes of what stands above the diagonal."""
    rows, columns = torch.triu_indices(len(upper), len(upper), 1, device=upper.device)
    limits = torch.iinfo(torch.int16)
    return (upper.detach()[rows, columns] / STEP).round().clamp(limits.min, limits.max).to(torch.int16).cpu()


def rotated_by(base: Rotation, upper: Float[Tensor, "learned learned"]) -> Float[Tensor, "size size"]:
    """Return the matrix of `base` times the Cayley transform of a skew-symmetric matrix; with gradients, if they are on.

    Args:
        base: where learning starts.
        upper: what stands above the diagonal counts, its dtype is that of the answer.
    """
    skew = upper.triu(1)
    skew = skew - skew.T
    one = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    turn = torch.linalg.solve(one + skew, one - skew)
    if base.keeps_mean:
        beside = torch.nn.functional.pad(turn, (1, 0, 1, 0))
        beside[0, 0] = 1
        turn = mean_to_first(mean_to_first(beside).T).T
    return base.matrix().to(turn) @ turn


AnyRotation = Rotation | BlockRotation | LearnedRotation  # that may be at work while a model runs
StreamRotation = Rotation | LearnedRotation  # of the residual stream
