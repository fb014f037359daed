"""The cache beside what it keeps, unpacked; whole models with it are in tests/pipeline/test_kv_cache.py."""

import pytest
import torch
from torch import nn

from bitmend.errors import RequestError
from bitmend.linalg.hadamard import Rotation
from bitmend.models.attention import Prepared
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import AttentionScheme
from bitmend.runtime.packed_cache import PackedCache, PackedLayer, rounds_keys_and_values

SCHEMES = {
    "rotated, zero points": AttentionScheme(
        Rotation(8), keys=ActivationSpec(4, False, scale_bits=16), values=ActivationSpec(4, False, scale_bits=16)
    ),
    "3 bits, groups": AttentionScheme(
        keys=ActivationSpec(3, group_size=4, clip_ratio=0.9, scale_bits=16), values=ActivationSpec(3, scale_bits=16)
    ),
    "keys of 2, values of 8": AttentionScheme(keys=ActivationSpec(2), values=ActivationSpec(8, False)),
}


def states(tokens=7, width=8, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, tokens, width, generator=draw).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_what_attention_rounds_to(name, dtype):
    scheme = SCHEMES[name]
    keys, values = states(dtype=dtype)
    layer = PackedLayer(scheme)
    for start, stop in ((0, 3), (3, 4), (4, 7)):  # piece by piece
        got = layer.update(keys[:, :, start:stop], values[:, :, start:stop])
        assert layer.get_seq_length() == stop
        assert layer.get_mask_sizes(5) == (stop + 5, 0)
    assert all(isinstance(one, Prepared) and one.dtype == dtype for one in got)
    assert torch.equal(got[0].as_subclass(torch.Tensor), scheme.of_keys(keys))
    assert torch.equal(got[1].as_subclass(torch.Tensor), scheme.of_values(values))


def test_bytes_by_hand():
    # 3 rows, 2 heads, 7 tokens; 8 codes of 4 bits are one word; a scale of 2 bytes and a zero point of 1; keys and values.
    layer = PackedLayer(SCHEMES["rotated, zero points"])
    layer.update(*states())
    assert layer.num_bytes() == 2 * 3 * 2 * 7 * (4 + 2 + 1)
    assert layer.num_bytes() * 8 == 2 * 3 * 2 * 7 * 8 * ActivationSpec(4, False, scale_bits=16).bits_per_value(8)


def test_rows_tokens_and_order_can_be_changed():
    scheme = SCHEMES["3 bits, groups"]
    keys, values = states()
    layer = PackedLayer(scheme)
    layer.update(keys, values)
    layer.crop(-3)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    layer.batch_select_indices(torch.tensor([0, 1]))
    layer.batch_repeat_interleave(2)
    layer.offload()
    layer.prefetch()
    got, _ = layer.update(keys[[2, 2, 0, 0]][:, :, 4:5], values[[2, 2, 0, 0]][:, :, 4:5])
    assert torch.equal(got.as_subclass(torch.Tensor), scheme.of_keys(keys[[2, 2, 0, 0]][:, :, :5]))
    with pytest.raises(ValueError, match="negative number of tokens"):
        layer.crop(2)
    layer.reset()
    assert (layer.get_seq_length(), layer.num_bytes(), layer.get_max_length()) == (0, 0, -1)


def test_a_token_that_is_not_finite_is_not_hidden():
    keys, values = states()
    keys[0, 0, 2, 3] = torch.nan
    got, _ = PackedLayer(SCHEMES["rotated, zero points"]).update(keys, values)
    assert bool(got[0, 0, 2].isnan().all())
    assert int(got.isnan().any(-1).sum()) == 1


def test_needs_something_to_keep():
    with pytest.raises(ValueError, match="keys and values that are rounded"):
        PackedLayer(AttentionScheme(keys=ActivationSpec(4)))
    assert not rounds_keys_and_values(nn.Linear(1, 1))
    with pytest.raises(RequestError, match=r"needs a model that rounds its keys and values.*\[kv_cache\] section"):
        PackedCache(nn.Linear(1, 1))
