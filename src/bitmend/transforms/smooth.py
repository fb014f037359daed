"""SmoothQuant: move the size of large input features into the weights that read them (arXiv 2211.10438).

Feature j of what some layers read is divided by `s_j = max|x_j|^a / max|W_j|^(1-a)` and the columns j of these layers are
multiplied by it. The division is folded into whatever made the feature: the gain (and bias) of a norm, the rows of the layer
before the attention, the rows of `up_proj` before `down_proj`.

How we differ: layers behind the attention and behind the MLP's product are smoothed as well as those behind a norm; where
heads are shared by several queries (GQA), all heads that read one value share their factors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitmend.errors import CalibrationError, RecipeError
from bitmend.protocols import TRANSFORMS, Calibrated, Transformed
from bitmend.sites import Block, Wiring, read_by_all, read_matrix, scale_norm_, write_matrix_


@TRANSFORMS.register("smooth", paper="arXiv 2211.10438")
@dataclass(frozen=True)
class Smooth:
    """Moves the size of large input features into the weights.

    Attributes:
        strength: the exponent a: 0 evens out the weights, 1 the inputs.
        norms: smooth what the layers behind a norm read.
        values: what the layer behind the attention reads.
        gated: what the layer behind the MLP's product reads.
    """

    exact: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True
    strength: float = 0.5
    norms: bool = True
    values: bool = True
    gated: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise RecipeError(f"smooth: strength must lie between 0 and 1; got {self.strength}")

    def apply_(self, block: Block, wiring: Wiring, streams: Calibrated | None) -> Transformed:
        """Smooth a block.

        Raises:
            CalibrationError: no calibration rows.

        Cost: one run of the block on the fit rows, and one pass over its weights.
        """
        if streams is None:
            raise CalibrationError("smooth needs calibration rows, but none came; pass --calibration FILE")
        module = block.module
        readers = {norm: paths for norm, paths in wiring.readers.items() if self.norms}
        targets = [target for _, target in wiring.gated if self.gated]
        values = wiring.values if self.values else None
        asked = {norm: read_by_all(block, paths) for norm, paths in readers.items()}
        paths = [*asked.values(), *targets, *([values.target] if values else [])]
        largest = streams.largest_inputs(block, paths)
        for norm, members in readers.items():
            layers = [module.get_submodule(path) for path in members]
            factors = self._factors(largest[asked[norm]], layers)
            scale_norm_(module.get_submodule(norm), 1 / factors)
            _scale_columns_(layers, factors)
        for source, target in wiring.gated if self.gated else ():
            layer = module.get_submodule(target)
            factors = self._factors(largest[target], [layer])
            _scale_rows_(module.get_submodule(source), 1 / factors)
            _scale_columns_([layer], factors)
        if values is not None:
            layer = module.get_submodule(values.target)
            shape = (values.source_heads, values.heads // values.source_heads, values.head_dim)
            shared = self._factors(largest[values.target], [layer], shape)
            _scale_rows_(module.get_submodule(values.source), 1 / shared.reshape(shape)[:, 0].flatten())
            _scale_columns_([layer], shared)
        return Transformed()

    def _factors(
        self, inputs: Float[Tensor, " features"], layers: list[nn.Module], shared: tuple[int, int, int] | None = None
    ) -> Float[Tensor, " features"]:
        """Return the factor of each feature; 1 where inputs or weights are all zero.

        Args:
            inputs: largest magnitude of each feature.
            layers: that read it.
            shared: shape to read the features in, where the middle axis shares its factors.
        """
        weights = torch.stack([read_matrix(layer).abs().amax(0).double() for layer in layers]).amax(0)
        inputs = inputs.double().to(weights.device)
        if shared is not None:
            inputs, weights = (
                one.reshape(shared).amax(1, keepdim=True).expand(shared).flatten() for one in (inputs, weights)
            )
        factors = inputs**self.strength / weights ** (1 - self.strength)
        return torch.where((inputs > 0) & (weights > 0), factors, 1.0)


def _scale_columns_(layers: list[nn.Module], factors: Float[Tensor, " in"]) -> None:
    for layer in layers:
        write_matrix_(layer, read_matrix(layer).double() * factors)


def _scale_rows_(layer: nn.Module, factors: Float[Tensor, " out"]) -> None:
    write_matrix_(layer, read_matrix(layer).double() * factors.unsqueeze(1))
    bias: Tensor | None = getattr(layer, "bias", None)
    if isinstance(bias, Tensor):
        with torch.no_grad():
            bias.mul_(factors)
