import torch
import transformers

from bitmend.models.hf_blocks import own_dtype
from bitmend.models.hf_causal_lm import HfCausalLm


def test_blocks_lie_on_disk_until_they_are_loaded(tiny, tmp_path):
    model = tiny.build()
    adapter = HfCausalLm.open(tiny.save(tmp_path / "m", model))
    name = adapter.block_names[1]
    assert all(parameter.is_meta for parameter in adapter.block(1).parameters())
    adapter.load_block(1)
    held = adapter.block_tensors(1)
    assert all(key.startswith(f"{name}.") for key in held)
    assert all(torch.equal(tensor, model.get_parameter(key)) for key, tensor in held.items() if "rotary" not in key)
    assert all(parameter.is_meta for parameter in adapter.block(0).parameters())
    adapter.release_block(1)
    assert all(parameter.is_meta for parameter in adapter.block(1).parameters())


def test_what_lies_outside_is_told_once(tiny, tmp_path):
    adapter = HfCausalLm.open(tiny.save(tmp_path / "m", tiny.build("llama-tied")))
    names = [name for name, _ in adapter.outside_tensors()]
    assert sorted(names) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_the_dtype_of_a_config():
    config = transformers.ViTConfig(hidden_size=8, num_attention_heads=2)
    assert own_dtype(config) is None
    config.dtype = torch.bfloat16
    assert own_dtype(config) is torch.bfloat16
    config.dtype = "float16"
    assert own_dtype(config) is torch.float16
