import pytest
import torch
import transformers

from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.protocols import ADAPTERS, ModelAdapter, TokenBatch


def replay(adapter, batch):
    inputs = adapter.block_inputs(batch)
    hidden = inputs.hidden
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        hidden = adapter.run_block(index, hidden, inputs)
        adapter.release_block(index)
    return adapter.logits(hidden, batch)


def reference(folder, batch, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    mask = None if batch.mask is None else batch.mask.long()
    with torch.no_grad():
        return model(batch.ids, attention_mask=mask).logits


@pytest.mark.parametrize("rows", ["full_rows", "ragged_rows"])
def test_replay_equals_the_models_own_forward_bit_for_bit(saved, family_name, rows, request):
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
    assert adapter.head_name == family.head
