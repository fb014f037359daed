"""QuaRot: rotate the network so that no feature stands out (arXiv 2404.00456), with rotations of any size.

Four rotations, of which the first two cost nothing while the model runs:

- the residual stream by a randomised Hadamard matrix: what reads it (behind a norm whose gain is folded into the readers)
  and what writes to it are rotated, and so are embedding and head;
- the values of each attention head: folded into the layers before and behind the attention;
- what the attention gives, across heads: while the model runs, with its inverse in the layer that reads it;
- what the MLP's last layer reads, likewise.

How we differ: sizes that have no Hadamard matrix get the nearest thing (`linalg/hadamard.py`); a head that shares the
embedding's table is not cut loose, which would cost as many bytes as the table, but the residual stream is rotated behind the
embedding and back in front of the last norm, while the model runs. The mean of the embedding is left as it is: subtracting
it is no identity under a norm that does not centre.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitmend.errors import ModelError
from bitmend.linalg.hadamard import Rotation
from bitmend.protocols import TRANSFORMS, Calibrated, Transformed
from bitmend.sites import (
    PIECE_ENTRIES,
    Block,
    ModelEnds,
    Wiring,
    norm_gain,
    read_matrix,
    rotate_inputs_,
    set_unit_gain_,
)


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
        """Return the rotation of the residual stream."""
        return Rotation(ends.hidden, self.seed) if self.residual else None

    def apply_to_ends_(self, ends: ModelEnds) -> Transformed:
        """Rotate embedding and head, or what they give and read where they share a table.

        Raises:
            ModelError: no norm before the head, or one that a rotation does not pass.
        """
        rotation = self.residual_rotation(ends)
        if rotation is None:
            return Transformed()
        if ends.norm is None:
            raise ModelError(
                "quarot needs a norm whose result the output head reads, but this model has none; set residual = false of "
                "the transform, which leaves the rotations inside the blocks"
            )
        norm = ends.model.get_submodule(ends.norm)
        if ends.tied:
            _gain_of(norm, ends.norm, ends.hidden)
            return Transformed({ends.norm: rotation.inverse}, {ends.embedding: rotation})
        embedding, head = ends.model.get_submodule(ends.embedding), ends.model.get_submodule(ends.head)
        rotate_inputs_(embedding, rotation)
        _fold_gain_(norm, ends.norm, [head], ends.hidden)
        rotate_inputs_(head, rotation)
        return Transformed()

    def apply_(self, block: Block, wiring: Wiring, streams: Calibrated | None) -> Transformed:
        """Rotate a block.

        Raises:
            ModelError: a norm that a rotation does not pass.
        """
        del streams
        module = block.module
        if self.residual:
            self._rotate_residual_(block, wiring)
        values = wiring.values if self.values else None
        if values is not None:
            inside = Rotation(values.head_dim)
            _rotate_outputs_(module.get_submodule(values.source), inside)
            rotate_inputs_(module.get_submodule(values.target), inside)
        inputs: dict[str, Rotation] = {}
        for path in wiring.writers if self.online else ():
            layer = module.get_submodule(path)
            if values is not None and path == values.target:
                rotation = Rotation(values.heads, inner=values.head_dim)
            else:
                rotation = Rotation(read_matrix(layer).shape[1])
            rotate_inputs_(layer, rotation)
            inputs[path] = rotation
        return Transformed(inputs)

    def _rotate_residual_(self, block: Block, wiring: Wiring) -> None:
        module, hidden = block.module, wiring.hidden
        if wiring.after_writers:
            raise ModelError(
                f"quarot cannot rotate the residual stream of {block.name}: {wiring.after_writers[0]} multiplies what is "
                "added to it feature by feature; set residual = false of the transform, which leaves the rotations inside "
                "the blocks"
            )
        rotation = Rotation(hidden, self.seed)
        for norm, readers in wiring.readers.items():
            layers = [module.get_submodule(path) for path in readers]
            _fold_gain_(module.get_submodule(norm), f"{block.name}.{norm}", layers, hidden)
            for layer in layers:
                rotate_inputs_(layer, rotation)
        for path in wiring.writers:
            layer = module.get_submodule(path)
            if read_matrix(layer).shape[0] != hidden:
                raise ModelError(
                    f"quarot cannot rotate the residual stream of {block.name}: {path} neither reads a norm nor writes "
                    f"{hidden} features; set residual = false of the transform"
                )
            _rotate_outputs_(layer, rotation)


def _fold_gain_(norm: nn.Module, name: str, readers: list[nn.Module], hidden: int) -> None:
    """Move the gain of a norm into the layers that read it."""
    gain = _gain_of(norm, name, hidden)
    for layer in readers:
        for rows in torch.split(read_matrix(layer), max(1, PIECE_ENTRIES // hidden)):
            rows.copy_(rows.double() * gain.to(rows.device))
    set_unit_gain_(norm, hidden)


def _gain_of(norm: nn.Module, name: str, hidden: int) -> Tensor:
    gain = norm_gain(norm, hidden)
    if gain is None:
        raise ModelError(
            f"quarot needs norms that divide by the root mean square, but {name} ({type(norm).__name__}) subtracts a mean "
            "or adds a bias, which a rotation does not keep; set residual = false of the transform, which leaves the "
            "rotations inside the blocks"
        )
    return gain


def _rotate_outputs_(layer: nn.Module, rotation: Rotation) -> None:
    """Rotate what a layer gives, its bias included."""
    for columns in torch.split(read_matrix(layer), max(1, PIECE_ENTRIES // len(read_matrix(layer))), dim=1):
        columns.copy_(rotation.apply(columns.double().T).T)
    bias: Tensor | None = getattr(layer, "bias", None)
    if isinstance(bias, Tensor):
        with torch.no_grad():
            bias.copy_(rotation.apply(bias.double()))
