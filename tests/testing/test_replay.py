import torch
import transformers

from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.numerics.products import FastLinear
from bitmend.protocols import TokenBatch
from bitmend.testing.replay import replay


def test_each_block_runs_once_and_is_forgotten(tiny_model):
    adapter = HfCausalLm.open(tiny_model, dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad(), FastLinear():
        assert torch.equal(replay(adapter, TokenBatch(ids)), model(input_ids=ids).logits)
    for index in range(len(adapter.block_names)):
        assert all(tensor.is_meta for tensor in adapter.block_tensors(index).values())
