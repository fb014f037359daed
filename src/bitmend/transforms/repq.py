"""RepQ-ViT's reparameterisation: what a LayerNorm gives is moved so that all its features share one range.

Features behind a LayerNorm differ in range by an order of magnitude, so that one scale for all of them wastes most codes on
most features. With the range [low_c, high_c] of feature c on calibration rows and w_c its width,

    x'_c = x_c / r_c - b_c,    r_c = w_c / mean(w),    b_c = mean(w) (low_c / w_c - mean(low / w)),

has one range for all c. It is folded into gain and bias of the norm, and back into the columns and the bias of the layers
that read it (arXiv 2212.08254, section 3.3, written with ranges in place of scales and zero points: r and b depend on
neither the bits nor the grid).

How we differ: ranges are quantiles of an even sample of the rows; features that never vary stay as they are; where the norm
or a layer has no bias, features are scaled and not shifted. The other half of the paper, levels in powers of sqrt(2) behind
the softmax, is `attention.probability_grid = "log_sqrt2"`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitmend.errors import CalibrationError, RecipeError
from bitmend.protocols import TRANSFORMS, Calibrated, Event, Transformed
from bitmend.sites import Block, Wiring, read_by_all, read_matrix, scale_norm_, write_matrix_

SAMPLED_TOKENS = 1 << 14


@TRANSFORMS.register("repq", paper="arXiv 2212.08254")
@dataclass(frozen=True)
class RepQ:
    """Gives all features behind a norm one range.

    Attributes:
        share: the quantile that a feature's range reaches up to, and 1 - share down to; 1 for the ends of the sample.
    """

    exact: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True
    share: float = 0.9999

    def __post_init__(self) -> None:
        if not 0.5 < self.share <= 1:
            raise RecipeError(f"repq: share must lie above 0.5 and be at most 1; got {self.share}")

    def apply_(self, block: Block, wiring: Wiring, streams: Calibrated | None) -> Transformed:
        """Reparameterise every norm of a block that layers read.

        Raises:
            CalibrationError: no calibration rows.

        Cost: one run of the block on the fit rows, and one pass over the weights of the layers.
        """
        if streams is None:
            raise CalibrationError("repq needs calibration rows, but none came; pass --calibration")
        asked = {norm: read_by_all(block, paths) for norm, paths in wiring.readers.items()}
        norms = sum(isinstance(part, nn.LayerNorm) for part in block.module.modules())
        events: tuple[Event, ...] = ()
        if len(asked) < norms:
            message = f"layers read {len(asked)} of {norms} norms as they are; what the others give is moved nowhere"
            events = (Event("norms_left", block.name, message),)
        if not asked:
            return Transformed(events=events)
        samples = streams.some_inputs(block, list(asked.values()), SAMPLED_TOKENS, evenly=True)
        for norm, paths in wiring.readers.items():
            if asked[norm] not in samples:
                continue
            layers = [block.module.get_submodule(path) for path in paths]
            shifts = all(isinstance(getattr(part, "bias", None), Tensor) for part in (*layers, _norm(block, norm)))
            scale, shift = one_range(samples[asked[norm]].double(), self.share)
            _move_(_norm(block, norm), layers, scale, shift if shifts else torch.zeros_like(shift))
        return Transformed(events=events)


def one_range(
    values: Float[Tensor, "token features"], share: float
) -> tuple[Float[Tensor, " features"], Float[Tensor, " features"]]:
    """Return r and b of the module's text.

    Example:
        >>> r, b = one_range(torch.tensor([[0.0, -1.0], [1.0, 2.0]], dtype=torch.float64), 1.0)
        >>> r.tolist(), [round(value, 6) for value in b.tolist()]  # widths 1 and 3
        ([0.5, 1.5], [0.333333, -0.333333])
    """
    low, high = (torch.quantile(values, one, dim=0) for one in (1 - share, share))
    width = high - low
    varies = width > 0
    if not bool(varies.any()):
        return torch.ones_like(width), torch.zeros_like(width)
    place = torch.where(varies, low / torch.where(varies, width, 1.0), 0.0)
    mean_width, mean_place = width[varies].mean(), place[varies].mean()
    scale = torch.where(varies, width / mean_width, 1.0)
    return scale, torch.where(varies, mean_width * (place - mean_place), 0.0)


def _norm(block: Block, path: str) -> nn.Module:
    return block.module.get_submodule(path)


@torch.no_grad()
def _move_(
    norm: nn.Module, layers: list[nn.Module], scale: Float[Tensor, " features"], shift: Float[Tensor, " features"]
) -> None:
    """Let the norm give x / scale - shift, and the layers what they gave."""
    held = next(norm.parameters())
    scale, shift = scale.to(held.device), shift.to(held.device)
    scale_norm_(norm, 1 / scale)
    moves = bool(shift.any())
    if moves:
        bias = norm.get_parameter("bias")
        bias.copy_(bias.double() - shift)
    for layer in layers:
        weight = read_matrix(layer).double() * scale
        write_matrix_(layer, weight)
        if moves:
            bias = layer.get_parameter("bias")
            bias.copy_(bias.double() + weight @ shift)
