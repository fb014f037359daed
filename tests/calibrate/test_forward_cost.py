"""The watched forward is compared with bytes counted by hand and with larger batches that really run."""

import pytest
import torch

from bitmend.calibrate.forward_cost import ForwardCost, Growth, _watch, argument_tensors, measure_forward
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.protocols import TokenBatch


def opened(folder):
    adapter = HfCausalLm.open(folder)
    adapter.load_block(0)
    return adapter


@pytest.fixture(scope="module")
def adapter(tiny_model):
    return opened(tiny_model)


@pytest.mark.parametrize(("rows", "length"), [(1, 64), (4, 24), (3, 50)])
def test_work_of_a_larger_batch_is_foretold(adapter, rows, length):
    cost = measure_forward(adapter, 0, 8)
    assert cost.work_bytes(rows, length) == pytest.approx(max(_watch(adapter, 0, rows, length).live), rel=0.02)


def test_attention_that_keeps_its_scores_grows_with_the_square(tiny, tmp_path):
    model = tiny.build()
    model.config._attn_implementation = "eager"
    folder = tiny.save(tmp_path / "eager", model)
    adapter = opened(folder)
    adapter.model.set_attn_implementation("eager")
    cost = measure_forward(adapter, 0, 8)
    assert cost.attention_bytes == 0
    assert max(growth.scores for growth in cost.work) > 0
    assert cost.work_bytes(2, 60) == pytest.approx(max(_watch(adapter, 0, 2, 60).live), rel=0.02)


def test_attention_results_are_those_of_the_queries(adapter):
    cost = measure_forward(adapter, 0, 8)
    config = adapter.config
    width = config.num_attention_heads * config.head_dim
    assert cost.attention_bytes == width * adapter.dtype.itemsize
    assert cost.attention_macs == 2 * width
    assert cost.timed_tokens == 8
    assert cost.seconds > 0


def test_arguments_are_rotary_tables(adapter):
    cost = measure_forward(adapter, 0, 8)
    inputs = adapter.block_inputs(TokenBatch(torch.ones(2, 20, dtype=torch.int64)))
    assert cost.arguments.at(2, 20) == pytest.approx(
        sum(tensor.nbytes for tensor in argument_tensors(inputs)), rel=0.01
    )


def test_growth_is_never_negative():
    assert Growth(-10.0, 1.0).at(1, 5) == 0.0
    assert Growth(1.0, 2.0, 4.0, 3.0).at(2, 5) == 1 + 2 * 10 + 4 * 5 + 3 * 50


def test_the_largest_operation_counts():
    cost = ForwardCost((Growth(100.0, 0.0), Growth(0.0, 1.0)), Growth(0.0, 0.0), 0.0, 0.0, 1.0, 1)
    assert cost.work_bytes(1, 10) == 100
    assert cost.work_bytes(1, 1000) == 1000
