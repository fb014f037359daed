import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitmend.errors import CheckpointError, ModelError
from bitmend.models.loading import empty_model, read_config
from bitmend.models.shards import SINGLE_FILE, ShardedWeights
from bitmend.models.tensor_source import TensorSource

CPU = torch.device("cpu")


@pytest.fixture
def opened(saved, tmp_path):
    """Return a function that saves a model with changed tensors and gives its source."""

    def open_changed(name, change=lambda tensors: tensors, dtype=torch.float32, **changes):
        source = saved(name, **changes)
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        save_file(change(load_file(source / SINGLE_FILE)), tmp_path / SINGLE_FILE)
        model = empty_model(read_config(tmp_path), dtype)
        return TensorSource(model, ShardedWeights(tmp_path), dtype=dtype, device=CPU)

    return open_changed


def filled(source):
    source.fill(source.names)
    source.tie()
    return source.model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["gpt2", "opt", "neox"])
def test_a_prefix_may_be_missing_or_extra(opened, name):
    expected = filled(opened(name))
    prefix = opened(name).model.base_model_prefix + "."
    bare = opened(name, lambda tensors: {key.removeprefix(prefix): tensor for key, tensor in tensors.items()})
    assert same(filled(bare), expected)
    if name == "neox":
        return  # its head has another name in files, which no prefix goes with
    extra = opened(name, lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()})
    assert same(filled(extra), expected)


def test_names_from_before_a_renaming(opened):
    source = opened("neox")
    assert source.stored_name("lm_head.weight") == "embed_out.weight"
    assert torch.equal(filled(source)["lm_head.weight"], source.weights.get("embed_out.weight"))


def test_a_tied_head_follows_the_embedding(opened):
    source = opened("llama-tied")
    assert source.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    filled(source)
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight


def test_a_tied_embedding_may_be_stored_as_the_head(opened):
    source = opened(
        "llama-tied", lambda tensors: {k.replace("model.embed_tokens", "lm_head"): v for k, v in tensors.items()}
    )
    filled(source)
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
    assert source.stored_name("model.embed_tokens.weight") == "lm_head.weight"


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_head_that_is_stored_beside_the_embedding_is_tied_only_when_equal(opened, shift):
    def change(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + shift}

    source = opened("llama-tied", change)
    assert bool(source.ties) == (shift == 0.0)
    state = filled(source)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"] + shift)


def test_missing_tensors_are_named(opened):
    def change(tensors):
        return {name.replace("down_proj", "w2"): tensor for name, tensor in tensors.items() if "norm" not in name}

    with pytest.raises(
        ModelError,
        match=r"lacks 10 of the 30 tensors that LlamaForCausalLM needs: model\.layers\.0\.mlp\.down_proj\.weight, .* "
        r"and 6 more; tensors of unknown use: model\.layers\.0\.mlp\.w2\.weight, .*; give the complete model",
    ):
        opened("llama", change)


def test_experts_that_would_have_to_be_merged(families, tmp_path):
    sizes = {
        key: getattr(families["llama"].config(), key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")
    }
    config = transformers.MixtralConfig(**sizes, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"gate_up_proj.*; they have to be merged from tensors stored one by one"):
        TensorSource(empty_model(config), ShardedWeights(tmp_path), dtype=torch.float32, device=CPU)


def test_shapes_of_another_config(opened, saved, tmp_path):
    source = saved("llama")
    content = json.loads((source / "config.json").read_text()) | {"intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"gate_proj\.weight in .* has shape \(24, 16\), need \(32, 16\) by the config; give the"
    ):
        TensorSource(empty_model(read_config(tmp_path)), ShardedWeights(source), dtype=torch.float32, device=CPU)


def test_what_was_read_is_a_copy(opened):
    source = opened("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    source.fill([name])
    source.model.get_parameter(name).zero_()
    source.fill([name])
    assert source.model.get_parameter(name).abs().sum() > 0


def test_modules_that_must_stay_wide(saved):
    folder = saved("llama")
    model = empty_model(read_config(folder), torch.bfloat16)
    model._keep_in_fp32_modules_strict = {"input_layernorm"}
    source = TensorSource(model, ShardedWeights(folder), dtype=torch.bfloat16, device=CPU)
    state = filled(source)
    assert state["model.layers.0.input_layernorm.weight"].dtype == torch.float32
    assert state["model.layers.0.post_attention_layernorm.weight"].dtype == torch.bfloat16
