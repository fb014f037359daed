"""Whether a recipe fits a model: every grid against every site and attention, before anything is computed."""

from dataclasses import dataclass, field, replace

from bitmend.errors import ModelError, RecipeError, nearest_name
from bitmend.models.experts import refuse_packed
from bitmend.models.loading import CAUSAL_LM
from bitmend.numerics.granularity import num_groups
from bitmend.pipeline.recipe import Recipe
from bitmend.protocols import LearningTransform, ModelAdapter
from bitmend.rotating import RotatingTransform
from bitmend.sites import AttentionSite, Block


@dataclass
class _Found:
    """What a model can be quantised at.

    Attributes:
        widths: full name of a site -> width of its input.
        spatial: full names of sites that read pictures or maps of features, whose last axis is a place and no feature.
        groups: full names of sites that read the same input.
        attentions: where it attends, if that was asked.
        of_one_block: how many sites the first block has.
    """

    widths: dict[str, int] = field(default_factory=dict)
    spatial: set[str] = field(default_factory=set)
    groups: list[tuple[str, ...]] = field(default_factory=list)
    attentions: list[AttentionSite] = field(default_factory=list)
    of_one_block: int = 0


def check_recipe_fits(recipe: Recipe, adapter: ModelAdapter) -> None:
    """Check every grid against every site before anything is computed.

    Raises:
        RecipeError: a group size that does not fit a site (named), an override that matches nothing, transforms that are not
            to be had together.
        ModelError: packed experts in a form that cannot be quantised, or attention that cannot be rounded but is to be.
    """
    _check_transforms(recipe)
    if recipe.prefix is not None and adapter.reads == "tokens" and adapter.task != CAUSAL_LM:
        raise RecipeError("a prefix stands in front of what a decoder reads, and the model is none; leave prefix out")
    found = _find(adapter, attend=recipe.changes_attention)
    for name, width in found.widths.items():
        _check_site(recipe, adapter, name, width)
    _check_activations(recipe, adapter, found)
    for site in found.attentions:
        try:
            recipe.attention_scheme(site)
        except RecipeError as error:
            raise RecipeError(f"{site.name}: {error}") from error
    if recipe.changes_attention and not found.attentions:
        raise ModelError(
            "rounding keys and values, or a prefix, needs a model that attends, but no block of "
            f"{type(adapter.model).__name__} asks for the attention that it was told to use; leave kv_cache, attention and "
            "prefix out of the recipe"
        )
    _check_prefix(recipe, adapter)
    names = [*found.widths, *(site.name for site in found.attentions)]
    for override in recipe.overrides:
        if not any(override.matches(name) for name in names):
            hint = nearest_name(override.targets[0], names[: found.of_one_block])
            raise RecipeError(f"the override for {override.targets} matches no site of the model{hint}")
        if not override.skip and not any(override.matches(name) for name in found.widths):
            raise RecipeError(
                f"the override for {override.targets} matches attentions only, of which it can do nothing but skip the "
                "rounding; set skip = true, or name a layer"
            )


def _check_transforms(recipe: Recipe) -> None:
    """Refuse here what would be told only once a transform has learned, which may take an hour."""
    named = [(keys["name"], part) for keys, part in zip(recipe.transforms, recipe.build_transforms(), strict=True)]
    turning = [name for name, part in named if isinstance(part, RotatingTransform) and part.residual]
    if len(turning) > 1:
        raise RecipeError(
            f"two transforms rotate the residual stream: {' and '.join(turning)}; leave one out, or set its "
            "residual = false"
        )
    for name, part in named:
        if isinstance(part, LearningTransform) and recipe.activations is None:
            raise RecipeError(
                f"the transform {name} learns from the rounding of activations, but the recipe rounds none; set "
                "activations.bits, or take another transform"
            )


def _find(adapter: ModelAdapter, *, attend: bool) -> _Found:
    """Look at the blocks; one stands for all blocks with tensors of the same names and shapes."""
    if attend:
        adapter.prepare_attention_()
    known: dict[tuple[tuple[str, tuple[int, ...]], ...], tuple[Block, tuple[AttentionSite, ...]]] = {}
    found = _Found()
    for index, name in enumerate(adapter.block_names):
        module = adapter.model.get_submodule(name)
        structure = tuple((path, tuple(tensor.shape)) for path, tensor in module.state_dict().items())
        if structure not in known:
            refuse_packed(module)
            adapter.load_block(index)
            block = adapter.describe_block(index, adapter.few_rows())
            known[structure] = block, adapter.attentions_of(block, adapter.few_rows()) if attend else ()
            adapter.release_block(index)
        block, attentions = known[structure]
        names = {site.path: f"{name}.{site.path}" if site.path else name for site in block.sites}
        found.widths |= {names[site.path]: site.shape[1] for site in block.sites}
        found.spatial |= {names[site.path] for site in block.sites if not site.view.features_last}
        found.groups += [tuple(names[site.path] for site in group.sites) for group in block.groups]
        found.attentions += [replace(site, name=f"{name}.{site.path}".rstrip(".")) for site in attentions]
        found.of_one_block = found.of_one_block or len(block.sites)
    return found


def _check_activations(recipe: Recipe, adapter: ModelAdapter, found: _Found) -> None:
    """Refuse rounding that would be something else than it says."""
    if recipe.head is not None and recipe.head.activation_bits is not None and adapter.reads != "pictures":
        raise RecipeError("head.activation_bits is for models of pictures; leave it out")
    if recipe.activations is None:
        return
    if not recipe.activations.static and found.spatial:
        raise RecipeError(
            f"{sorted(found.spatial)[0]} is a convolution, whose input needs one range for all of it; set "
            "activations.static = true, with activations.observer"
        )
    for group in found.groups:
        bits = {spec.bits for spec in map(recipe.activation_spec, group) if spec is not None}
        if len(bits) > 1:
            raise RecipeError(
                f"{' and '.join(group)} read the same input, which is rounded once; give them the same activation_bits"
            )


def _check_prefix(recipe: Recipe, adapter: ModelAdapter) -> None:
    tokens = [] if recipe.prefix is None else recipe.prefix.tokens or []
    if recipe.prefix is not None and adapter.embedding_name is None:
        raise RecipeError("a prefix are tokens in front of a text, but the model reads none; leave prefix out")
    if adapter.embedding_name is None:
        return
    size = adapter.model.get_submodule(adapter.embedding_name).get_parameter("weight").shape[0]
    for token in tokens:
        if not 0 <= token < size:
            raise RecipeError(f"prefix.tokens must be numbers of tokens, from 0 to {size - 1}; got {token}")


def _check_site(recipe: Recipe, adapter: ModelAdapter, name: str, width: int) -> None:
    try:
        spec = recipe.scheme(name, adapter.dtype)
        if spec is not None:
            num_groups(spec.granularity, width)
        activations = recipe.activation_spec(name)
        if activations is not None:
            activations.check_width(width)
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error
