"""Rotations that are made for the numbers they rotate: block by block, with a permutation between two of them.

Source: DuQuant (arXiv 2406.01721). A small orthogonal matrix with an even first row is put where the largest number stands,
again and again, and the steps up to the smallest peak are kept; the features are then dealt to the blocks in a zigzag of
their sizes, so that no block has all of the large ones, and rotated so once more.

How we differ: the first row of the small matrix stays even. (In the public code a random matrix is multiplied from the other
side, which leaves one entry of it even and the rest random.) The random part is made of fixed signs and Hartley matrices
(`linalg/hadamard.py`), not by a generator whose numbers change from release to release.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bitmend.linalg.hadamard import Rotation

PATIENCE = 64  # steps that may pass without a smaller peak


@dataclass(frozen=True)
class BlockRotation:
    """An orthogonal map of the last axis: blocks rotated alike, features in another order, blocks rotated alike again.

    Attributes:
        block: features of a block.
        seed: of the small matrix.
        first: the feature of a block at which each step of the first rotation puts the small matrix; none: no rotation.
        order: which feature stands where afterwards; its length is the width.
        second: as `first`, of the second rotation.
        transposed: undo it all.

    Cost: two products with a block a feature, and a pass over memory.
    """

    block: int
    seed: int
    first: tuple[int, ...]
    order: tuple[int, ...]
    second: tuple[int, ...]
    transposed: bool = False
    _made: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        if self.block < 1 or not self.order or len(self.order) % self.block:
            raise ValueError(f"blocks of {self.block} features must divide the width; got {len(self.order)}")
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError("the order of a rotation must name each feature once")
        if not all(0 <= step < self.block for step in (*self.first, *self.second)):
            raise ValueError(f"the steps of a rotation must be features of a block of {self.block}")

    @property
    def size(self) -> int:
        """Features that are rotated together."""
        return len(self.order)

    @property
    def inner(self) -> int:
        """Neighbouring numbers that are rotated alike: one."""
        return 1

    def __str__(self) -> str:
        undone = ", undone" if self.transposed else ""
        return f"rotation of {self.size} features in blocks of {self.block}, permuted{undone}"

    @property
    def inverse(self) -> "BlockRotation":
        """The rotation that undoes this one."""
        return replace(self, transposed=not self.transposed)

    def apply(self, values: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Return the rotated values, in their dtype; float16 and bfloat16 are computed in float32.

        Raises:
            ValueError: another width.
        """
        if values.shape[-1] != self.size:
            raise ValueError(f"a rotation of {self.size} features must have the width; got {values.shape[-1]}")
        exact = values.double() if values.dtype == torch.float64 else values.float()
        first, second, order = self._matrices(exact)
        if self.transposed:
            turned = self._in_blocks(exact, second.T)
            turned = self._in_blocks(torch.empty_like(turned).index_copy_(-1, order, turned), first.T)
        else:
            turned = self._in_blocks(self._in_blocks(exact, first).index_select(-1, order), second)
        return turned.to(values.dtype)

    def _in_blocks(self, values: Tensor, matrix: Tensor) -> Tensor:
        return (values.reshape(-1, self.block) @ matrix).reshape(values.shape)

    def _matrices(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kind = f"{like.dtype} {like.device}"
        if f"first {kind}" not in self._made:
            for name, steps in (("first", self.first), ("second", self.second)):
                self._made[f"{name} {kind}"] = product_of_steps(self.block, self.seed, steps).to(like)
            self._made[f"order {kind}"] = torch.tensor(self.order, device=like.device)
        return self._made[f"first {kind}"], self._made[f"second {kind}"], self._made[f"order {kind}"]


@cache
def small_matrix(block: int, seed: int) -> Float[Tensor, "block block"]:
    """Return an orthogonal float64 matrix whose first row is 1 / sqrt(block) throughout, its other rows random."""
    even = torch.full((block,), 1 / math.sqrt(block), dtype=torch.float64)
    matrix = torch.eye(block, dtype=torch.float64)
    if block == 1:
        return matrix
    mirror = matrix[0] - even
    reflection = matrix - 2 * mirror.outer(mirror) / mirror.dot(mirror)  # takes the first unit vector to the even one
    # Two passes of signs and an even matrix: hardly anything of either is left to see.
    matrix[1:, 1:] = Rotation(block - 1, 2 * seed).matrix() @ Rotation(block - 1, 2 * seed + 1).matrix()
    return matrix @ reflection


def product_of_steps(block: int, seed: int, steps: tuple[int, ...]) -> Float[Tensor, "block block"]:
    """Return the product of the steps, in order; float64."""
    turned = torch.eye(block, dtype=torch.float64)
    small = small_matrix(block, seed)
    for feature in steps:
        turned = _step(turned, small, feature)
    return turned


def _step(values: Tensor, small: Tensor, feature: int) -> Tensor:
    """Return `values` times the small matrix with its first row and column in the place of a feature."""
    if feature == 0:
        return values @ small
    values = values.clone()
    values[:, [0, feature]] = values[:, [feature, 0]]
    turned = values @ small
    turned[:, [0, feature]] = turned[:, [feature, 0]]
    return turned


def greedy_steps(values: Float[Tensor, "token width"], block: int, seed: int, most: int) -> tuple[int, ...]:
    """Return at which features to put the small matrix, so that the largest magnitude gets as small as it does.

    Args:
        values: what is to be rotated.
        block: features of a block, which divides the width.
        seed: of the small matrix.
        most: steps to try while one of the last `PATIENCE` lowered the peak; those up to the smallest peak are returned.

    Cost: `most` products of all values with a block, in float32: only the place of the largest is asked for.
    """
    turned = values.float().reshape(-1, block)
    small = small_matrix(block, seed).to(turned)
    steps: list[int] = []
    sizes = turned.abs().amax(0)
    kept, lowest = 0, float(sizes.max())
    for number in range(most):
        steps.append(int(sizes.argmax()))
        turned = _step(turned, small, steps[-1])
        sizes = turned.abs().amax(0)
        peak = float(sizes.max())
        if peak < lowest:
            kept, lowest = number + 1, peak
        if len(steps) - kept == PATIENCE:
            break
    return tuple(steps[:kept])


def zigzag(sizes: Float[Tensor, " width"], block: int) -> Int64[Tensor, " width"]:
    """Return an order of features that deals them to the blocks by size, back and forth, largest first.

    The order puts feature `order[i]` at place i.
    """
    count = len(sizes) // block
    dealt = sizes.argsort(descending=True, stable=True).view(block, count).clone()
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.reshape(-1)


def fit_block_rotation(
    values: Float[Tensor, "token width"], block: int, seed: int, most: int, *, permute: bool
) -> BlockRotation:
    """Return the rotation that is made for some tokens.

    Args:
        values: the tokens.
        block: features of a block, which divides the width.
        seed: of the small matrix.
        most: steps to try in each rotation.
        permute: whether the features are dealt to the blocks anew and rotated a second time.
    """
    width = values.shape[1]
    first = greedy_steps(values, block, seed, most)
    if not permute:
        return BlockRotation(block, seed, first, tuple(range(width)), ())
    turned = BlockRotation(block, seed, first, tuple(range(width)), ()).apply(values.double())
    order = zigzag(turned.abs().amax(0), block)
    second = greedy_steps(turned[:, order], block, seed, most)
    return BlockRotation(block, seed, first, tuple(order.tolist()), second)
