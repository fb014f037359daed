"""What is refused before anything runs; sentences on weights are in test_run.py, on keys and values in test_kv_cache.py."""

import pytest

from bitmend.errors import RecipeError
from bitmend.models.find import find_adapter
from bitmend.pipeline.recipe import parse_recipe
from bitmend.pipeline.recipe_fits import check_recipe_fits
from bitmend.sites import AttentionSite


def check(tiny_model, **keys):
    adapter = find_adapter(tiny_model)
    check_recipe_fits(parse_recipe({"weights": {"group_size": 8}, **keys}), adapter)
    return adapter


def test_leaves_all_blocks_unloaded_and_the_attention_alone(tiny_model):
    adapter = check(tiny_model)
    assert all(parameter.is_meta for parameter in adapter.block(0).parameters())
    assert adapter.model.config._attn_implementation == "sdpa"
    adapter = check(tiny_model, kv_cache={"bits": 4})
    assert all(parameter.is_meta for parameter in adapter.block(1).parameters())
    assert adapter.model.config._attn_implementation == "bitmend_sdpa"


def test_an_override_may_name_an_attention_only_where_one_is_rounded(tiny_model):
    override = {"overrides": [{"targets": ["model.layers.1.self_attn"], "skip": True}]}
    check(tiny_model, kv_cache={}, **override)
    with pytest.raises(RecipeError, match=r"override for \['model\.layers\.1\.self_attn'\] matches no site"):
        check(tiny_model, **override)
    bits = {"overrides": [{"targets": ["model.layers.1.self_attn"], "bits": 3}]}
    with pytest.raises(RecipeError, match="matches attentions only, of which it can do nothing but skip"):
        check(tiny_model, kv_cache={}, **bits)


def test_the_last_override_decides_whether_an_attention_is_rounded():
    site = AttentionSite("a.self_attn", "self_attn", 4, 2, 8, 8)
    last = [{"targets": ["a.self_attn"], "skip": True}, {"targets": ["re:a"], "skip": False}]
    assert parse_recipe({"kv_cache": {}, "overrides": last[:1]}).attention_scheme(site) is None
    assert parse_recipe({"kv_cache": {}, "overrides": last}).attention_scheme(site) is not None


def test_groups_of_every_kind_must_fit(tiny_model):
    for keys, message in (
        ({"weights": {"group_size": 5}}, r"model\.layers\.0\.self_attn\.q_proj: group_size must divide"),
        ({"activations": {"group_size": 5}}, r"q_proj: activation group_size must divide .* 5 for 16"),
        ({"kv_cache": {"group_size": 8}}, r"model\.layers\.0\.self_attn: activation group_size must divide .* 8 for 4"),
    ):
        with pytest.raises(RecipeError, match=message):
            check(tiny_model, **keys)
