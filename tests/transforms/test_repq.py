import pytest
import torch
from torch import nn

from bitmend.calibrate.dual_stream import DualStream
from bitmend.errors import CalibrationError, RecipeError
from bitmend.models.hf_image import HfImage
from bitmend.protocols import ImageBatch
from bitmend.transforms.repq import RepQ, one_range


@pytest.fixture
def block_of(tmp_path):
    """Return a loaded block of a tiny vision transformer, its wiring and the streams in front of it."""
    import transformers

    config = transformers.ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).double()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.copy_(torch.logspace(-1, 1, 16))  # features of very different ranges
                part.bias.normal_(0, 3)
    model.save_pretrained(tmp_path / "vit")
    adapter = HfImage.open(tmp_path / "vit", dtype=torch.float64)
    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    streams = DualStream(adapter, [(ImageBatch(pixels), False)], device=torch.device("cpu"))
    adapter.load_block(0)
    streams.run_full_precision_(0)
    streams.run_quantised_(0)
    adapter.load_block(1)
    block = adapter.describe_block(1, adapter.few_rows())
    return block, adapter.wiring_of(block, adapter.few_rows()), streams


def ranges(streams, block, path):
    values = streams.some_inputs(block, [path], 10_000, evenly=True)[path]
    return values.amin(0), values.amax(0)


def test_all_features_get_one_range(block_of):
    block, wiring, streams = block_of
    low, high = ranges(streams, block, "mlp.fc1")
    assert float((high - low).max() / (high - low).min()) > 20
    RepQ(share=1.0).apply_(block, wiring, streams)
    for path in ("mlp.fc1", "attention.q_proj"):
        low, high = ranges(streams, block, path)
        assert float((high - low).max() / (high - low).min()) < 1 + 1e-5
        assert torch.allclose(low, low.mean().expand(16), rtol=0, atol=1e-4 * float((high - low).mean()))


def test_the_block_computes_what_it_did(block_of):
    block, wiring, streams = block_of
    hidden = streams.x_q[0].clone()
    before = streams.adapter.run_block(1, hidden, streams.batches[0].inputs)
    RepQ().apply_(block, wiring, streams)
    after = streams.adapter.run_block(1, hidden, streams.batches[0].inputs)
    assert torch.allclose(before, after, rtol=0, atol=1e-11)


def test_by_hand():
    # Features from 0 to 1 and from -1 to 2: widths 1 and 3, mean 2; places of the low ends 0 and -1/3, mean -1/6.
    scale, shift = one_range(torch.tensor([[0.0, -1.0], [1.0, 2.0]], dtype=torch.float64), 1.0)
    assert scale.tolist() == [0.5, 1.5]
    assert shift.tolist() == pytest.approx([2 * (0 + 1 / 6), 2 * (-1 / 3 + 1 / 6)])
    moved = torch.tensor([[0.0, -1.0], [1.0, 2.0]], dtype=torch.float64) / scale - shift
    assert moved.tolist() == [pytest.approx([-1 / 3, -1 / 3]), pytest.approx([5 / 3, 5 / 3])]


def test_features_that_never_vary_stay_as_they_are():
    scale, shift = one_range(torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=torch.float64), 1.0)
    assert (float(scale[0]), float(shift[0])) == (1.0, 0.0)
    scale, shift = one_range(torch.zeros(4, 3, dtype=torch.float64), 1.0)
    assert scale.tolist() == [1.0] * 3
    assert shift.tolist() == [0.0] * 3


def test_without_a_bias_features_are_scaled_only(block_of):
    block, wiring, streams = block_of
    layer = block.module.get_submodule("mlp.fc1")
    layer.bias = None
    hidden = streams.x_q[0].clone()
    before = streams.adapter.run_block(1, hidden, streams.batches[0].inputs)
    RepQ(share=1.0).apply_(block, wiring, streams)
    assert torch.allclose(before, streams.adapter.run_block(1, hidden, streams.batches[0].inputs), rtol=0, atol=1e-11)
    low, high = ranges(streams, block, "mlp.fc1")
    assert float((high - low).max() / (high - low).min()) < 1 + 1e-5


@pytest.mark.parametrize("share", [0.5, 1.1, float("nan")])
def test_impossible_shares_are_refused(share):
    with pytest.raises(RecipeError, match=r"share must lie above 0\.5"):
        RepQ(share)


def test_rows_are_needed(block_of):
    block, wiring, _ = block_of
    with pytest.raises(CalibrationError, match="repq needs calibration rows"):
        RepQ().apply_(block, wiring, None)
