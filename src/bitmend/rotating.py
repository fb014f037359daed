"""Rotating a network without changing what it computes: the residual stream, the heads, and what is rotated while it runs.

The residual stream is rotated by changing what reads it and what writes to it. Between them stands a norm: one that divides
by the root mean square passes any rotation once its gain is folded into its readers; one that also subtracts the mean passes
those that keep the mean (`Rotation.keeps_mean`), once its bias is folded into theirs, too. (QuaRot, arXiv 2404.00456, folds
the subtraction into the layers that write and puts another norm in place; here the model keeps its modules.)

Which rotations these are, random or learned, is for the transforms to say.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitmend.errors import ModelError
from bitmend.linalg.hadamard import Rotation
from bitmend.linalg.learned_rotation import LearnedRotation, StreamRotation
from bitmend.online import ROTATION_CODES
from bitmend.protocols import Calibrated, Transformed
from bitmend.sites import (
    PIECE_ENTRIES,
    Block,
    ModelEnds,
    Wiring,
    centring_norm,
    norm_gain,
    read_matrix,
    rotate_inputs_,
    set_unit_gain_,
)

RESIDUAL = "residual"  # name of the rotation of the residual stream
WITHOUT = "set residual = false of the transform, which leaves the rotations inside the blocks"


@dataclass(frozen=True)
class RotatingTransform:
    """A transform that rotates residual stream, heads and what its writers read; where it starts from are Hadamard matrices.

    Attributes:
        seed: of the random signs of the residual rotation.
        residual: rotate the residual stream.
        values: rotate inside each attention head.
        online: rotate what the layers read that write to the residual stream, while the model runs.
    """

    exact: ClassVar[bool] = True
    seed: int = 0
    residual: bool = True
    values: bool = True
    online: bool = True

    def residual_rotation(self, ends: ModelEnds) -> StreamRotation | None:
        """Return the rotation of the residual stream.

        Raises:
            ModelError: no norm before the head, or one that no rotation passes.
        """
        if not self.residual:
            return None
        return self._turned(RESIDUAL, Rotation(ends.hidden, self.seed, keeps_mean=ends_centre(ends)))

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
            start = Rotation(wiring.hidden, self.seed, keeps_mean=block_centres(block, wiring))
            rotate_residual_(block, wiring, self._turned(RESIDUAL, start))
        if self.values and wiring.values is not None:
            rotate_values_(block, wiring, self._turned(of_values(block), Rotation(wiring.values.head_dim)))
        return Transformed(rotate_writers_(block, wiring, across_heads=self.values) if self.online else {})

    def _turned(self, name: str, start: Rotation) -> StreamRotation:
        """Return the rotation of that name, which may have gone on from where it starts."""
        del name
        return start


def of_values(block: Block) -> str:
    """Return the name of the rotation inside the heads of a block."""
    return f"values.{block.index}"


def ends_centre(ends: ModelEnds) -> bool:
    """Return whether the norm before the head subtracts the mean.

    Raises:
        ModelError: no norm before the head, or one that no rotation passes.
    """
    if ends.norm is None:
        raise ModelError(
            f"rotating the residual stream needs a norm whose result the output head reads, but this model has none; "
            f"{WITHOUT}"
        )
    return _centres(ends.model.get_submodule(ends.norm), ends.norm, ends.hidden)


def block_centres(block: Block, wiring: Wiring) -> bool:
    """Return whether a norm of the block that layers read subtracts the mean.

    Raises:
        ModelError: a norm that no rotation passes, because of what it does or where it stands.
    """
    if wiring.after_writers:
        raise ModelError(
            f"the residual stream of {block.name} cannot be rotated: {wiring.after_writers[0]} multiplies what is added to "
            f"it feature by feature; {WITHOUT}"
        )
    norms = [(block.module.get_submodule(path), f"{block.name}.{path}") for path in wiring.readers]
    return any(_centres(norm, name, wiring.hidden) for norm, name in norms)


def rotate_ends_(ends: ModelEnds, rotation: StreamRotation) -> Transformed:
    """Rotate embeddings and head by a rotation of the residual stream.

    Where head and embedding share a table, or the head has no bias for that of the norm, what they give and read is rotated
    while the model runs instead.

    Raises:
        ModelError: as `ends_centre`.
    """
    ends_centre(ends)
    assert ends.norm is not None
    model = ends.model
    for path in ends.added:
        rotate_inputs_(model.get_submodule(path), rotation)
    if ends.tied:
        return _while_it_runs(ends, {ends.norm: rotation.inverse}, {ends.embedding: rotation})
    rotate_inputs_(model.get_submodule(ends.embedding), rotation)
    norm, head = model.get_submodule(ends.norm), model.get_submodule(ends.head)
    if _adds_bias(norm, ends.hidden) and getattr(head, "bias", None) is None:
        return _while_it_runs(ends, {ends.norm: rotation.inverse}, {})
    fold_norm_(norm, ends.norm, {ends.head: head}, ends.hidden)
    rotate_inputs_(head, rotation)
    return Transformed()


def rotate_residual_(block: Block, wiring: Wiring, rotation: StreamRotation) -> None:
    """Let a block read and write a rotated residual stream.

    Raises:
        ModelError: a norm that the rotation does not pass, or a layer that reads or writes the stream in another way.
    """
    block_centres(block, wiring)
    module, hidden = block.module, wiring.hidden
    for norm, readers in wiring.readers.items():
        layers = {f"{block.name}.{path}": module.get_submodule(path) for path in readers}
        fold_norm_(module.get_submodule(norm), f"{block.name}.{norm}", layers, hidden)
        for layer in layers.values():
            rotate_inputs_(layer, rotation)
    for path in wiring.writers:
        layer = module.get_submodule(path)
        if read_matrix(layer).shape[0] != hidden:
            raise ModelError(
                f"the residual stream of {block.name} cannot be rotated: {path} neither reads a norm nor writes {hidden} "
                f"features; {WITHOUT}"
            )
        rotate_outputs_(layer, rotation)


def rotate_values_(block: Block, wiring: Wiring, rotation: StreamRotation) -> None:
    """Rotate the values inside each head, and undo it in the layer behind the attention."""
    if wiring.values is not None:
        rotate_outputs_(block.module.get_submodule(wiring.values.source), rotation)
        rotate_inputs_(block.module.get_submodule(wiring.values.target), rotation)


def rotate_writers_(block: Block, wiring: Wiring, *, across_heads: bool) -> dict[str, Rotation]:
    """Rotate what the layers read that write to the residual stream, while the model runs; return path -> rotation.

    Args:
        block: loaded.
        wiring: of the block.
        across_heads: what stands behind the attention is rotated across heads, because it is rotated inside them already.
    """
    inputs = {path: writer_rotation(block, wiring, path, across_heads=across_heads) for path in wiring.writers}
    for path, rotation in inputs.items():
        rotate_inputs_(block.module.get_submodule(path), rotation)
    return inputs


def writer_rotation(block: Block, wiring: Wiring, path: str, *, across_heads: bool) -> Rotation:
    """Return how what a layer reads that writes to the residual stream is rotated while the model runs."""
    values = wiring.values
    if across_heads and values is not None and path == values.target:
        return Rotation(values.heads, inner=values.head_dim)
    return Rotation(read_matrix(block.module.get_submodule(path)).shape[1])


def fold_norm_(norm: nn.Module, name: str, readers: dict[str, nn.Module], hidden: int) -> None:
    """Move gain and bias of a norm into the layers that read it.

    Raises:
        ModelError: a norm that no rotation passes, or a bias that a reader has no place for.
    """
    gain = norm_gain(norm, hidden)
    if gain is not None:
        for layer in readers.values():
            _scale_inputs_(layer, gain)
        set_unit_gain_(norm, hidden)
        return
    found = centring_norm(norm, hidden)
    if found is None:
        raise _no_passage(norm, name)
    gain, bias = found
    for path, layer in readers.items():
        _shift_(layer, path, name, bias)
        _scale_inputs_(layer, gain)
    weight = getattr(norm, "weight", None)
    with torch.no_grad():
        if weight is not None:
            weight.fill_(1.0 if torch.equal(gain, weight.detach().double()) else 0.0)
        if getattr(norm, "bias", None) is not None:
            norm.get_parameter("bias").zero_()


def rotate_outputs_(layer: nn.Module, rotation: StreamRotation) -> None:
    """Rotate what a layer gives, its bias included."""
    for columns in torch.split(read_matrix(layer), max(1, PIECE_ENTRIES // len(read_matrix(layer))), dim=1):
        columns.copy_(rotation.apply(columns.double().T).T)
    bias: Tensor | None = getattr(layer, "bias", None)
    if isinstance(bias, Tensor):
        with torch.no_grad():
            bias.copy_(rotation.apply(bias.double()))


def _while_it_runs(
    ends: ModelEnds, inputs: dict[str, StreamRotation], outputs: dict[str, StreamRotation]
) -> Transformed:
    """Return rotations that run with the model; learned ones with their codes, which the embedding holds."""
    tables = [inputs, outputs]
    tensors = {}
    for table in tables:
        for path, rotation in table.items():
            if isinstance(rotation, LearnedRotation):
                table[path] = replace(rotation, holder=ends.embedding)
                tensors[f"{ends.embedding}.{ROTATION_CODES}"] = rotation.codes()
    return Transformed(inputs, outputs, tensors)


def _centres(norm: nn.Module, name: str, hidden: int) -> bool:
    if norm_gain(norm, hidden) is not None:
        return False
    if centring_norm(norm, hidden) is None:
        raise _no_passage(norm, name)
    return True


def _adds_bias(norm: nn.Module, hidden: int) -> bool:
    found = centring_norm(norm, hidden)
    return found is not None and bool(found[1].any())


def _scale_inputs_(layer: nn.Module, gain: Tensor) -> None:
    for rows in torch.split(read_matrix(layer), max(1, PIECE_ENTRIES // len(gain))):
        rows.copy_(rows.double() * gain.to(rows.device))


def _shift_(layer: nn.Module, path: str, name: str, bias: Tensor) -> None:
    """Let a layer add what it makes of the bias of the norm that it reads."""
    if not bool(bias.any()):
        return
    held: Tensor | None = getattr(layer, "bias", None)
    if not isinstance(held, Tensor):
        raise ModelError(
            f"the residual stream cannot be rotated: {name} adds a bias, for which {path}, which reads it, has no place; "
            f"{WITHOUT}"
        )
    weight = read_matrix(layer)
    with torch.no_grad():
        held.copy_(held.double() + weight.double() @ bias.to(weight.device))


def _no_passage(norm: nn.Module, name: str) -> ModelError:
    return ModelError(
        f"the residual stream cannot be rotated: {name} ({type(norm).__name__}) is no norm that divides by the root mean "
        f"square or by the standard deviation; {WITHOUT}"
    )
