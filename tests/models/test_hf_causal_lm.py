import gc
import json
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.protocols import TokenBatch
from bitmend.testing.replay import replay


@pytest.fixture
def reference(products_as_run):
    """The logits of the model that transformers loads from a folder."""

    def logits(folder, batch, **options):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        mask = None if batch.mask is None else batch.mask.long()
        with torch.no_grad(), products_as_run(model, HfCausalLm.open(folder).block_names):
            return model(batch.ids, attention_mask=mask).logits

    return logits


@pytest.mark.parametrize("rows", ["full_rows", "ragged_rows"])
def test_replay_equals_the_models_own_forward_bit_for_bit(saved, family_name, rows, request, reference):
    batch = request.getfixturevalue(rows)
    folder = saved(family_name)
    found = replay(HfCausalLm.open(folder), batch)
    assert torch.equal(found, reference(folder, batch))


def test_groups_and_norms(saved, family_name, family, full_rows):
    adapter = HfCausalLm.open(saved(family_name))
    for index in (0, 2):
        adapter.load_block(index)
        block = adapter.describe_block(index, full_rows)
        assert [(group.name, group.norm) for group in block.groups] == family.groups
        assert block.unread == ()
        assert block.name == f"{family.stem}.{index}"
        assert all(site.name == f"{block.name}.{site.path}" for site in block.sites)
        assert all(site.weight(block.module).shape == site.shape for site in block.sites)
        adapter.release_block(index)


def test_names(saved, family_name, family):
    adapter = HfCausalLm.open(saved(family_name))
    assert adapter.block_names == tuple(f"{family.stem}.{index}" for index in range(3))
    assert adapter.embedding_name == family.embedding
    assert adapter.head_names == (() if family.head is None else (family.head,))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_padding_does_not_reach_real_tokens(saved, name, ragged_rows):
    adapter = HfCausalLm.open(saved(name))
    together = replay(adapter, ragged_rows)
    for row, length in enumerate(ragged_rows.mask.sum(1).tolist()):
        alone = replay(adapter, TokenBatch(ragged_rows.ids[row : row + 1, :length]))
        torch.testing.assert_close(together[row : row + 1, :length], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_bfloat16(saved, name, full_rows, reference):
    folder = saved(name, dtype=torch.bfloat16)
    adapter = HfCausalLm.open(folder)
    assert adapter.dtype == torch.bfloat16
    found = replay(adapter, full_rows)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, reference(folder, full_rows))


def test_another_dtype_than_the_models_own(saved, full_rows, reference):
    folder = saved("llama", dtype=torch.bfloat16)
    found = replay(HfCausalLm.open(folder, dtype=torch.float32), full_rows)
    assert torch.equal(found, reference(folder, full_rows, dtype=torch.float32))


def test_dtype_of_the_files_when_the_config_has_none(saved, tmp_path):
    folder = saved("llama", dtype=torch.bfloat16)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("dtype") == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert HfCausalLm.open(tmp_path).dtype == torch.bfloat16


def test_sharded_checkpoint(saved, full_rows, reference):
    folder = saved("llama", shard="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert torch.equal(replay(HfCausalLm.open(folder), full_rows), reference(folder, full_rows))


def test_pickled_checkpoint(saved, tmp_path, full_rows, reference):
    folder = saved("llama")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert torch.equal(replay(HfCausalLm.open(tmp_path), full_rows), reference(folder, full_rows))


def loaded_blocks(adapter):
    return [
        index
        for index in range(len(adapter.block_names))
        if any(not parameter.is_meta for parameter in adapter.block(index).parameters())
    ]


def test_only_the_asked_block_is_loaded(saved, family_name, full_rows):
    adapter = HfCausalLm.open(saved(family_name))
    assert loaded_blocks(adapter) == []
    for index in range(3):
        block = adapter.load_block(index)
        assert block is adapter.block(index)
        assert loaded_blocks(adapter) == [index]
        assert not any(parameter.is_meta for parameter in block.parameters())
        adapter.release_block(index)
    assert loaded_blocks(adapter) == []


def test_no_tensor_of_a_released_block_stays_behind(saved):
    adapter = HfCausalLm.open(saved("llama"))
    kept = weakref.ref(adapter.load_block(1).get_parameter("mlp.down_proj.weight"))
    assert kept() is not None
    adapter.release_block(1)
    gc.collect()
    assert kept() is None


def test_loading_again_forgets_changes(saved):
    adapter = HfCausalLm.open(saved("llama"))
    weight = adapter.load_block(0).get_parameter("mlp.down_proj.weight")
    before = weight.clone()
    weight.zero_()
    assert torch.equal(adapter.load_block(0).get_parameter("mlp.down_proj.weight"), before)


def test_all_tensors_together_are_the_model(saved, family_name, tmp_path, full_rows, reference):
    folder = saved(family_name)
    adapter = HfCausalLm.open(folder)
    tensors = dict(adapter.outside_tensors())
    assert not any(name.startswith(block) for name in tensors for block in adapter.block_names)
    for index in range(3):
        adapter.load_block(index)
        tensors |= adapter.block_tensors(index)
    head = adapter._path_of("get_output_embeddings")
    assert (f"{head}.weight" in tensors) == bool(adapter.head_names)
    assert all(f"{head}.weight" in tensors for head in adapter.head_names)
    assert not any(tensor.is_meta for tensor in tensors.values())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert torch.equal(reference(tmp_path, full_rows), reference(folder, full_rows))


def test_a_head_that_was_cut_loose_is_yielded(saved):
    adapter = HfCausalLm.open(saved("llama-tied"))
    assert "lm_head.weight" not in dict(adapter.outside_tensors())
    adapter.model.lm_head.weight = torch.nn.Parameter(adapter.model.lm_head.weight * 2)
    assert "lm_head.weight" in dict(adapter.outside_tensors())


def test_stored_name(saved):
    assert HfCausalLm.open(saved("neox")).stored_name("lm_head.weight") == "embed_out.weight"
    assert HfCausalLm.open(saved("llama")).stored_name("lm_head.weight") == "lm_head.weight"


def test_forward_block_has_gradients_and_run_block_has_none(saved, full_rows):
    adapter = HfCausalLm.open(saved("llama"))
    inputs = adapter.block_inputs(full_rows)
    adapter.load_block(0)
    hidden = inputs.hidden.clone().requires_grad_()
    assert adapter.forward_block(0, hidden, inputs).requires_grad
    assert not adapter.run_block(0, hidden, inputs).requires_grad


def test_blocks_are_in_order_after_a_failed_forward(saved, full_rows):
    adapter = HfCausalLm.open(saved("llama"))
    with pytest.raises(IndexError):
        adapter.block_inputs(TokenBatch(full_rows.ids + 1000))
    assert not any("forward" in adapter.block(index).__dict__ for index in range(3))


def test_tracing_leaves_no_hooks_and_changes_no_weight(saved, full_rows):
    adapter = HfCausalLm.open(saved("llama"))
    block = adapter.load_block(0)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    adapter.describe_block(0, full_rows)
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules())


def test_dropout_is_off(saved, full_rows, reference):
    folder = saved("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    adapter = HfCausalLm.open(folder)
    assert torch.equal(replay(adapter, full_rows), reference(folder, full_rows))


def test_padding_mask_is_passed_only_when_there_is_one(saved, full_rows, ragged_rows):
    adapter = HfCausalLm.open(saved("llama"))
    assert adapter.block_inputs(full_rows).arguments[0][1]["attention_mask"] is None
    assert adapter.block_inputs(ragged_rows).arguments[0][1]["attention_mask"].shape == (3, 1, 11, 11)
