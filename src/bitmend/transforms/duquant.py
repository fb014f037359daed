"""DuQuant: rotate and permute what each layer reads so that its largest numbers vanish (arXiv 2406.01721).

What the layers behind a norm read, and what each layer reads that writes to the residual stream, is rotated in blocks, its
features are dealt to the blocks by size, and it is rotated once more, while the model runs; the weights undo it. The
rotations are made for some calibration tokens (`linalg/greedy_rotation.py`). Smoothing comes before it, as a transform of its
own.

How we differ: half of the tokens that a rotation is made for are those with the largest numbers of all calibration rows, the
others are taken evenly (the public code takes the mean over its rows, in which single tokens vanish).
"""

from dataclasses import dataclass
from typing import ClassVar

from bitmend.errors import CalibrationError, RecipeError
from bitmend.linalg.greedy_rotation import fit_block_rotation
from bitmend.linalg.learned_rotation import AnyRotation
from bitmend.protocols import TRANSFORMS, Calibrated, Transformed
from bitmend.sites import Block, Wiring, read_by_all, rotate_inputs_


@TRANSFORMS.register("duquant", paper="arXiv 2406.01721")
@dataclass(frozen=True)
class DuQuant:
    """Rotates and permutes what each layer reads, made for its largest numbers.

    Attributes:
        block: features that are rotated together; the largest divisor of a width up to it is taken.
        steps: that a rotation tries at most; those up to the smallest peak are kept.
        permute: deal the features to the blocks anew, and rotate a second time.
        tokens: calibration tokens that the rotations are made for.
        seed: of the random part of the rotations.
    """

    exact: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True
    block: int = 128
    steps: int = 256
    permute: bool = True
    tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block", "steps", "tokens"):
            if getattr(self, name) < 1:
                raise RecipeError(f"duquant: {name} must be at least 1; got {getattr(self, name)}")
        if self.seed < 0:
            raise RecipeError(f"duquant: seed must be 0 or more; got {self.seed}")

    def apply_(self, block: Block, wiring: Wiring, streams: Calibrated | None) -> Transformed:
        """Rotate what the layers of a block read.

        Raises:
            CalibrationError: no calibration rows.

        Cost: one run of the block on the fit rows, and for each input `2 steps` products of the tokens with a block.
        """
        if streams is None:
            raise CalibrationError("duquant needs calibration rows, but none came; pass --calibration FILE")
        together = [*wiring.readers.values(), *((path,) for path in wiring.writers)]
        asked = {read_by_all(block, paths): paths for paths in together}
        inputs: dict[str, AnyRotation] = {}
        # Layers that no token reaches stay as they are.
        for asked_of, values in streams.some_inputs(block, list(asked), self.tokens).items():
            size = largest_divisor(values.shape[1], self.block)
            rotation = fit_block_rotation(values, size, self.seed, self.steps, permute=self.permute)
            for path in asked[asked_of]:
                rotate_inputs_(block.module.get_submodule(path), rotation)
                inputs[path] = rotation
        return Transformed(inputs)


def largest_divisor(width: int, most: int) -> int:
    """Return the largest divisor of `width` that is at most `most`."""
    return next(size for size in range(min(width, most), 0, -1) if width % size == 0)
