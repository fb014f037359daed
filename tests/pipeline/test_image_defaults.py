import torch

from bitmend.numerics.granularity import PerChannel
from bitmend.pipeline.image_defaults import with_image_defaults
from bitmend.pipeline.recipe import load_recipe


def resolved(keys=None):
    return with_image_defaults(load_recipe("gptq", keys), "stem.conv")


def test_ends_have_eight_bits_and_weights_one_scale_a_channel():
    recipe = resolved({"weights.bits": 3, "activations.bits": 4})
    assert recipe.scheme("stem.conv", torch.float32).grid.bits == 8
    assert recipe.activation_spec("stem.conv").bits == 8
    assert recipe.scheme("block.fc", torch.float32).grid.bits == 3
    assert recipe.activation_spec("block.fc").bits == 4
    assert recipe.head.bits == 8
    assert recipe.head_activation_spec().bits == 8
    assert recipe.weights.group_size == -1


def test_what_the_recipe_says_stays():
    first = [{"targets": ["stem.conv"], "bits": 5}]
    keys = {"weights.group_size": 64, "activations.bits": 4, "head.bits": 4, "head.activation_bits": 6}
    recipe = resolved(keys | {"overrides": first})
    assert recipe.weights.group_size == 64
    assert resolved({"weights.group_size": 64}).scheme("stem.conv", torch.float32).granularity == PerChannel()
    assert recipe.head.bits == 4
    assert recipe.scheme("stem.conv", torch.float32).grid.bits == 5
    assert recipe.activation_spec("stem.conv").bits == 8
    assert [override.bits for override in recipe.overrides] == [8, 5]
    spec = resolved({"head.bits": 4, "head.activation_bits": 6, "activations.bits": 3}).head_activation_spec()
    assert spec.bits == 6


def test_other_overrides_win_where_they_come_later():
    recipe = resolved({"weights.bits": 4, "overrides": [{"targets": ["re:block.*"], "bits": 2}]})
    assert recipe.scheme("block.fc", torch.float32).grid.bits == 2
    assert recipe.scheme("stem.conv", torch.float32).grid.bits == 8


def test_recipes_for_texts_stay_as_they_are():
    recipe = load_recipe("gptq")
    assert with_image_defaults(recipe, None) is recipe
    assert recipe.head is None
