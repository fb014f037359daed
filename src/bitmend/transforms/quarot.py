"""QuaRot: rotate the network so that no feature stands out (arXiv 2404.00456), with rotations of any size.

Four rotations, of which the first two cost nothing while the model runs:

- the residual stream by a randomised Hadamard matrix: what reads it (behind a norm whose gain is folded into the readers)
  and what writes to it are rotated, and so are embedding and head;
- the values of each attention head: folded into the layers before and behind the attention;
- what the attention gives, across heads: while the model runs, with its inverse in the layer that reads it;
- what the MLP's last layer reads, likewise.

How we differ: sizes that have no Hadamard matrix get the nearest thing (`linalg/hadamard.py`); behind norms that subtract the
mean the rotation is one that keeps it (`rotating.py`); a head that shares the embedding's table is not cut loose, which would
cost as many bytes as the table, but the residual stream is rotated behind the embedding and back in front of the last norm,
while the model runs. The mean of the embedding is left as it is: subtracting it is no identity under a norm that does not
centre.
"""

from dataclasses import dataclass
from typing import ClassVar

from bitmend.linalg.hadamard import Rotation
from bitmend.protocols import TRANSFORMS, Calibrated, Transformed
from bitmend.rotating import (
    block_centres,
    ends_centre,
    rotate_ends_,
    rotate_residual_,
    rotate_values_,
    rotate_writers_,
)
from bitmend.sites import Block, ModelEnds, Wiring


@TRANSFORMS.register("quarot", paper="arXiv 2404.00456")
@dataclass(frozen=True)
class QuaRot:
    """Rotates residual stream, heads and MLP so that no feature stands out.

    Attributes:
        seed: of the random signs of the residual rotation.
        residual: rotate the residual stream.
        values: rotate inside each attention head.
        online: rotate what the layers read that write to the residual stream, while the model runs.
    """

    exact: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = False
    seed: int = 0
    residual: bool = True
    values: bool = True
    online: bool = True

    def residual_rotation(self, ends: ModelEnds) -> Rotation | None:
        """Return the rotation of the residual stream.

        Raises:
            ModelError: no norm before the head, or one that no rotation passes.
        """
        return self._of_residual(ends.hidden, ends_centre(ends)) if self.residual else None

    def apply_to_ends_(self, ends: ModelEnds) -> Transformed:
        """Rotate embedding and head, or what they give and read where they share a table.

        Raises:
            ModelError: as `residual_rotation`.
        """
        rotation = self.residual_rotation(ends)
        return Transformed() if rotation is None else rotate_ends_(ends, rotation)

    def apply_(self, block: Block, wiring: Wiring, streams: Calibrated | None) -> Transformed:
        """Rotate a block.

        Raises:
            ModelError: a norm or a layer that a rotation of the residual stream does not pass.
        """
        del streams
        if self.residual:
            rotate_residual_(block, wiring, self._of_residual(wiring.hidden, block_centres(block, wiring)))
        if self.values and wiring.values is not None:
            rotate_values_(block, wiring, Rotation(wiring.values.head_dim))
        return Transformed(rotate_writers_(block, wiring, across_heads=self.values) if self.online else {})

    def _of_residual(self, hidden: int, centres: bool) -> Rotation:
        return Rotation(hidden, self.seed, keeps_mean=centres)
