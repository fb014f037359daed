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

from bitmend.protocols import TRANSFORMS
from bitmend.rotating import RotatingTransform


@TRANSFORMS.register("quarot", paper="arXiv 2404.00456")
@dataclass(frozen=True)
class QuaRot(RotatingTransform):
    """Rotates residual stream, heads and MLP so that no feature stands out.

    Attributes:
        seed: of the random signs of the residual rotation.
        residual: rotate the residual stream.
        values: rotate inside each attention head.
        online: rotate what the layers read that write to the residual stream, while the model runs.
    """

    needs_rows: ClassVar[bool] = False
