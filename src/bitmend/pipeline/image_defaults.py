"""What a recipe leaves open and models of pictures want otherwise than language models.

As is usual in that field (QwT, RepQ-ViT's copy in it, BRECQ), the layer that reads the pictures and the head have 8 bits,
weights and inputs; and weights share one scale for each output channel, because widths such as 192 or 27 have no 128 in them.
"""

from bitmend.pipeline.recipe import HeadSection, OverrideSection, Recipe

BITS_OF_ENDS = 8


def with_image_defaults(recipe: Recipe, first_layer: str | None) -> Recipe:
    """Return the recipe as it is meant for a model of pictures; that of any other model as it is.

    Every key that the recipe sets itself stays.

    Args:
        recipe: as it was asked for.
        first_layer: path of the layer that reads the pictures; None: the model reads none.
    """
    if first_layer is None:
        return recipe
    changes: dict[str, object] = {}
    if "group_size" not in recipe.weights.model_fields_set:
        changes["weights"] = recipe.weights.model_copy(update={"group_size": -1})
    if "head" not in recipe.model_fields_set:
        changes["head"] = HeadSection(bits=BITS_OF_ENDS)
    rounded = None if recipe.activations is None else BITS_OF_ENDS
    first = OverrideSection(targets=[first_layer], bits=BITS_OF_ENDS, group_size=-1, activation_bits=rounded)
    changes["overrides"] = [first, *recipe.overrides]  # later ones win, key by key
    return recipe.model_copy(update=changes)
