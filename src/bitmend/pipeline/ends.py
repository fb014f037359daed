"""What lies outside the blocks: the token embedding and the head, at fewer bits if the recipe says so.

Both are rounded to nearest: an embedding is a table look-up and has no input moments. A head that is tied to the embedding
uses the embedding's table.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitmend.errors import NumericsError, RecipeError
from bitmend.formats.native import site_tensors
from bitmend.numerics.granularity import num_groups
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QTensor, QuantSpec, quantize, stack_rows
from bitmend.pipeline.recipe import EndSection, Recipe, WeightSection
from bitmend.protocols import ModelAdapter

PIECE_ENTRIES = 1 << 20  # of a table, rounded at a time


@dataclass(frozen=True)
class Ends:
    """Everything outside the blocks, ready to be written.

    Attributes:
        tensors: by the name under which they are stored.
        quantised: by module name.
        kinds: `embedding` or `linear`, by module name.
        tied: head -> embedding whose quantised table it uses.
    """

    tensors: dict[str, Tensor]
    quantised: dict[str, QTensor]
    kinds: dict[str, str]
    tied: dict[str, str]


def check_ends(adapter: ModelAdapter, recipe: Recipe) -> None:
    """Check what lies outside the blocks, and the sections `embedding` and `head`, before anything is computed.

    Raises:
        NumericsError: NaN or Inf in a tensor outside the blocks.
        RecipeError: a head section for a model whose head is tied, or a group size that does not fit.
    """
    for name, tensor in adapter.outside_tensors():
        if tensor.is_floating_point() and not all(bool(part.isfinite().all()) for part in _pieces(tensor)):
            raise NumericsError(f"the tensor {name} must be finite, but holds NaN or Inf; nothing was saved")
    if recipe.head is not None and not adapter.head_names:
        tied = "the model's head is tied to its embedding; set embedding.bits, which quantises both, not head.bits"
        none = "the model has no layer behind its blocks that makes its answer; leave head out"
        raise RecipeError(none if _path_of_head(adapter) is None else tied)
    if recipe.embedding is not None and adapter.embedding_name is None:
        raise RecipeError(
            "the model has no token embedding; leave embedding out (the layer that reads pictures is a site of its own)"
        )
    for name, section, _ in _wanted(adapter, recipe):
        width = adapter.model.get_submodule(name).get_parameter("weight").shape[1]
        try:
            num_groups(_spec(section, adapter.dtype).granularity, width)
        except RecipeError as error:
            raise RecipeError(f"{'embedding' if name == adapter.embedding_name else 'head'}: {error}") from error


def quantise_ends(adapter: ModelAdapter, recipe: Recipe) -> Ends:
    """Return all tensors outside the blocks, embedding and head rounded to nearest where the recipe asks for it."""
    wanted = {name: (section, kind) for name, section, kind in _wanted(adapter, recipe)}
    ends = Ends({}, {}, {}, {})
    for name, tensor in adapter.outside_tensors():
        module = name.removesuffix(".weight")
        if module not in wanted or module == name:
            ends.tensors[name] = tensor
            continue
        section, kind = wanted[module]
        spec = _spec(section, adapter.dtype)
        qtensor = _round_rows(tensor, spec)
        ends.quantised[module], ends.kinds[module] = qtensor, kind
        ends.tensors.update(site_tensors(module, qtensor))
    if recipe.embedding is not None and not adapter.head_names and adapter.embedding_name is not None:
        head = _path_of_head(adapter)
        if head is not None:
            ends.tied[head] = adapter.embedding_name
    return ends


def end_shapes(adapter: ModelAdapter, recipe: Recipe) -> list[tuple[tuple[int, int], QuantSpec, int]]:
    """Return of each end that will be quantised its shape, its grid and its bytes as loaded; for the forecast."""
    found = []
    for name, section, _ in _wanted(adapter, recipe):
        weight = adapter.model.get_submodule(name).get_parameter("weight")
        rows, columns = weight.shape
        found.append(((rows, columns), _spec(section, adapter.dtype), weight.nbytes))
    return found


def _wanted(adapter: ModelAdapter, recipe: Recipe) -> list[tuple[str, EndSection, str]]:
    """Return path, section and kind of each layer around the blocks that is to be rounded."""
    found: list[tuple[str, EndSection, str]] = []
    if recipe.embedding is not None and adapter.embedding_name is not None:
        found.append((adapter.embedding_name, recipe.embedding, "embedding"))
    if recipe.head is not None:
        found += [(name, recipe.head, "linear") for name in adapter.head_names]
    return found


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.flatten(), PIECE_ENTRIES)


def _round_rows(table: Tensor, spec: QuantSpec) -> QTensor:
    """Return a table rounded to nearest, some rows at a time: in float32 at once it would be the largest of all tensors."""
    parts = []
    for piece in torch.split(table, max(1, PIECE_ENTRIES // table.shape[1])):
        weight = piece.float()
        parts.append(quantize(weight, choose_qparams(weight, spec), spec))
    return stack_rows(parts)


def _path_of_head(adapter: ModelAdapter) -> str | None:
    model: Any = adapter.model
    head = model.get_output_embeddings()
    return None if head is None else next(name for name, module in adapter.model.named_modules() if module is head)


def _spec(section: EndSection, model_dtype: torch.dtype) -> QuantSpec:
    keys = section.model_dump(exclude={"activation_bits"})
    return WeightSection(**keys, symmetric=True).spec(model_dtype)
