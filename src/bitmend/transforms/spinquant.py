"""SpinQuant: rotations that are learned on the network whose activations they make easy to round (arXiv 2405.16406).

The rotations are those of QuaRot. That of the residual stream (R1) and those of the values inside each head (R2, one for
each block) are learned: with the activations rounded and the weights in full precision, as the paper has it for GPTQ, the
network shall give what it gives without rounding. Those that run with the model stay fixed Hadamard matrices, so that
learned ones cost nothing while it runs (where the head shares the embedding's table, two small dense products a token).

Nothing is rotated while learning: rounding in a rotated basis, round(x R) R^T, is done to what the layers read.

How we differ from the paper and its code: the loss is the divergence from the full-precision logits, not the cross-entropy of
the text, which a few rows teach by heart; gradients see the scales of the rounding (`ActivationSpec.round_with_gradient`);
one Cayley transform from a Hadamard matrix and Adam in place of Cayley steps (`linalg/learned_rotation.py`); what the
attention gives is rotated across heads while the model runs, as QuaRot does.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from bitmend.errors import NumericsError, RecipeError
from bitmend.linalg.hadamard import Rotation
from bitmend.linalg.learned_rotation import LearnedRotation, StreamRotation, codes_of, learned_size, rotated_by
from bitmend.numerics.activations import ActivationSpec
from bitmend.numerics.products import product
from bitmend.protocols import TRANSFORMS, OpenNetwork, Progress
from bitmend.rotating import (
    RESIDUAL,
    RotatingTransform,
    block_centres,
    ends_centre,
    fold_norm_,
    of_values,
    writer_rotation,
)
from bitmend.sites import Block, Wiring

BETAS = (0.9, 0.95)


@TRANSFORMS.register("spinquant", paper="arXiv 2405.16406")
@dataclass(frozen=True)
class SpinQuant(RotatingTransform):
    """Rotates as QuaRot does, residual stream and heads by rotations that were learned.

    Before anything is learned they are those that learning starts from.

    Attributes:
        seed: of the random signs of the residual rotation that learning starts from.
        steps: of Adam.
        rows: calibration rows of each step.
        learning_rate: of the first step, in units of the skew-symmetric matrices; falls to 0 on a line.
        residual: rotate the residual stream.
        values: rotate inside each attention head.
        online: rotate what the layers read that write to the residual stream, while the model runs.
    """

    needs_rows: ClassVar[bool] = True
    steps: Annotated[int, Field(ge=1, le=100_000)] = 100
    rows: Annotated[int, Field(ge=1, le=4096)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    _learned: Mapping[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # tensors

    def with_learned(self, learned: Mapping[str, Tensor]) -> "SpinQuant":
        """Return the transform that applies what `learn` returned."""
        turned = replace(self)
        object.__setattr__(turned, "_learned", dict(learned))
        return turned

    def _turned(self, name: str, start: Rotation) -> StreamRotation:
        codes = self._learned.get(name)
        return start if codes is None else LearnedRotation(start, lambda: codes)

    @property
    def num_passes(self) -> int:
        """Rows that pass the network with gradients."""
        return self.steps * self.rows

    def learn(self, network: OpenNetwork, progress: Progress) -> dict[str, Tensor]:
        """Return the codes of the rotations, learned on rounded activations.

        Raises:
            RecipeError: no layer rounds what it reads.
            ModelError: a norm that no rotation passes.
            NumericsError: the loss is not finite.

        Cost: `steps` times `rows` rows through the network four times: without rounding, with it, and with it again for the
        gradient, which takes as long once more. The whole network in float32, and what one block keeps for the gradient.
        """
        learning = _Learning(network, self)
        optimiser = torch.optim.Adam(learning.generators.values(), lr=self.learning_rate, betas=BETAS)
        order = _draw(network.num_rows, self.steps * self.rows, self.seed)
        for step in progress.track(range(self.steps), "learning rotations", self.steps):
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate * (1 - step / self.steps)
            learning.gradient_(order[step * self.rows : (step + 1) * self.rows])
            optimiser.step()
        return {name: codes_of(upper) for name, upper in learning.generators.items()}


def _draw(count: int, wanted: int, seed: int) -> list[int]:
    """Return row numbers: all rows in random order, as often as it takes."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < wanted:
        drawn += torch.randperm(count, generator=generator).tolist()
    return drawn[:wanted]


class _Learning:
    """The matrices under way, and the rounding in the bases that they make.

    Attributes:
        generators: name -> what stands above the diagonal of the skew-symmetric matrix.
    """

    def __init__(self, network: OpenNetwork, part: SpinQuant) -> None:
        """Fold the norms of the network and see what is rounded where."""
        self._network, self._part = network, part
        self._starts: dict[str, Rotation] = {}
        self._made: dict[str, Tensor] = {}
        self._rounded: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        self._shared: list[_Once] = []
        if part.residual:
            ends_centre(network.ends)  # refused now, and not when everything has been learned
        for block, wiring in network.blocks:
            self._read_norms(block, wiring)
            self._read_writers(block, wiring)
        if not self._rounded:
            raise RecipeError(
                "spinquant learns from the rounding of activations, but nothing is rounded; set activations.bits, or take "
                "quarot"
            )
        if not self._starts:
            raise RecipeError(
                "spinquant has nothing to learn: neither the residual stream nor values of this model are to be rotated; set "
                "residual or values = true, or take quarot"
            )
        device = next(network.blocks[0][0].module.parameters()).device
        self.generators = {
            name: torch.zeros(learned_size(start), learned_size(start), device=device, requires_grad=True)
            for name, start in self._starts.items()
        }

    def gradient_(self, rows: list[int]) -> float:
        """Set the gradients of the generators to those of the mean loss over some rows; return the loss.

        Raises:
            NumericsError: the loss is not finite.
        """
        with torch.enable_grad():
            matrices = {name: rotated_by(self._starts[name], upper) for name, upper in self.generators.items()}
        self._made = {name: matrix.detach().requires_grad_() for name, matrix in matrices.items()}
        total = 0.0
        for row in rows:
            with torch.no_grad():
                wanted = self._network.logits(row).float().log_softmax(-1)
            with torch.enable_grad(), self._rounding():
                found = self._network.logits(row).float().log_softmax(-1)
                loss = (wanted.exp() * (wanted - found)).sum(-1).mean() / len(rows)
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            self._forget()
        if not torch.isfinite(torch.tensor(total)):
            raise NumericsError(
                f"the loss of learned rotations must be finite, but is {total}; lower learning_rate of spinquant"
            )
        for upper in self.generators.values():
            upper.grad = None
        used = [name for name, matrix in self._made.items() if matrix.grad is not None]
        torch.autograd.backward([matrices[name] for name in used], [self._made[name].grad for name in used])
        return total

    def _read_norms(self, block: Block, wiring: Wiring) -> None:
        turns = self._part.residual
        start = Rotation(wiring.hidden, self._part.seed, keeps_mean=turns and block_centres(block, wiring))
        for norm, paths in wiring.readers.items():
            layers = {f"{block.name}.{path}": block.module.get_submodule(path) for path in paths}
            if turns:
                fold_norm_(block.module.get_submodule(norm), f"{block.name}.{norm}", layers, wiring.hidden)
            shared: dict[ActivationSpec, _Once] = {}
            for path in paths:
                spec = self._network.rounding(block, path)
                if spec is None:
                    continue
                if turns:
                    self._starts[RESIDUAL] = start
                if spec not in shared:
                    matrix = _reader(self._made_of, RESIDUAL) if turns else None
                    shared[spec] = _Once(self._rounder(spec, matrix, None))
                    self._shared.append(shared[spec])
                self._rounded.append((block.module.get_submodule(path), shared[spec]))

    def _read_writers(self, block: Block, wiring: Wiring) -> None:
        part, values = self._part, wiring.values
        for path in wiring.writers:
            spec = self._network.rounding(block, path)
            if spec is None:
                continue
            online = writer_rotation(block, wiring, path, across_heads=part.values) if part.online else None
            matrix = None
            if part.values and values is not None and path == values.target:
                name = of_values(block)
                self._starts[name] = Rotation(values.head_dim)
                matrix = _reader(self._made_of, name)
            rounded = self._rounder(spec, matrix, online)
            self._rounded.append((block.module.get_submodule(path), rounded))

    def _made_of(self, name: str) -> Tensor:
        return self._made[name]

    def _rounder(
        self, spec: ActivationSpec, matrix: Callable[[], Tensor] | None, online: Rotation | None
    ) -> Callable[[Tensor], Tensor]:
        """Return what rounds in a rotated basis: first by a matrix under way, if any, then by one that stays."""

        def rounded(values: Tensor) -> Tensor:
            turn = None if matrix is None else matrix()
            turned = values if turn is None else _in_blocks(values, turn)
            turned = turned if online is None else online.apply(turned)
            turned = spec.round_with_gradient(turned)
            turned = turned if online is None else online.inverse.apply(turned)
            return turned if turn is None else _in_blocks(turned, turn.T)

        return rounded

    def _rounding(self) -> ExitStack:
        hooks = ExitStack()
        for block, _ in self._network.blocks:
            # Also when a block is computed again: what is remembered holds all that its gradient needs.
            hooks.callback(block.module.register_forward_pre_hook(lambda *_: self._forget()).remove)
        for module, rounded in self._rounded:
            hooks.callback(module.register_forward_pre_hook(_hook(rounded)).remove)
        return hooks

    def _forget(self) -> None:
        for one in self._shared:
            one.forget()


def _reader(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


def _hook(rounded: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, arguments: (rounded(arguments[0]), *arguments[1:])


class _Once:
    """Computes for layers that are given the very same tensor one after the other: for the first of them."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        self._compute = compute
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, values: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not values:
            self._last = values, self._compute(values)
        return self._last[1]

    def forget(self) -> None:
        """Let the last answer go."""
        self._last = None


def _in_blocks(values: Tensor, matrix: Tensor) -> Tensor:
    """Return each block of features, as wide as the matrix, times the matrix."""
    return product(values.reshape(-1, len(matrix)), matrix).reshape(values.shape)
