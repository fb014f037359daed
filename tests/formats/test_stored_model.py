"""Quantised checkpoints opened for a repair; whole runs over them are in tests/pipeline/test_compensate.py."""

from dataclasses import replace

import pytest
import torch

from bitmend.errors import CheckpointError, RequestError
from bitmend.formats.affine import AffineWeight
from bitmend.formats.stored_model import _as_qtensor, entry_for, open_stored
from bitmend.pipeline.run import quantize

KEYS = {"weights.bits": 3, "weights.group_size": 8, "embedding.bits": 8}


def weight(bits=4, groups=2, symmetric=True):
    draw = torch.Generator().manual_seed(0)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (6, 16), generator=draw).to(torch.int8)
    zero = None if symmetric else torch.randint(-half, half, (6, groups), generator=draw).to(torch.int16)
    return AffineWeight(codes, zero, torch.rand(6, groups, generator=draw).half() + 0.5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_same_values_in_our_layout(groups, symmetric):
    given = weight(groups=groups, symmetric=symmetric)
    found = _as_qtensor("m", 4, given)
    assert torch.equal(found.dequantize(), given.dense())
    assert found.spec.scale_dtype == torch.float16


def test_what_our_layout_does_not_hold():
    given = weight()
    with pytest.raises(RequestError, match="m are not grouped with their neighbours"):
        _as_qtensor("m", 4, replace(given, group=torch.arange(16) % 2))
    with pytest.raises(RequestError, match="not positive"):
        _as_qtensor("m", 4, replace(given, scale=-given.scale))
    with pytest.raises(CheckpointError, match="zero points that are no codes"):
        _as_qtensor("m", 4, replace(given, zero_point=torch.full((6, 2), 9, dtype=torch.int16)))


def test_our_own_format_piece_by_piece(tiny_model, tmp_path):
    quantize(tiny_model, "rtn", output=tmp_path / "out", overrides=KEYS)
    stored = open_stored(tmp_path / "out")
    assert stored.format == "bitmend"
    block = "model.layers.0"
    inside, outside = stored.names_under(block), stored.names_outside([block, "model.layers.1"])
    assert not set(inside) & set(outside)
    assert {name for name, _ in stored.others(inside)} == {
        f"{block}.input_layernorm.weight",
        f"{block}.post_attention_layernorm.weight",
    }
    assert "model.embed_tokens" in stored.modules
    assert "model.norm.weight" in dict(stored.others(outside))
    name = f"{block}.mlp.up_proj"
    qtensor = stored.qtensor(name)
    assert entry_for(stored, name, qtensor, "linear").shape == tuple(qtensor.codes.shape)
    assert stored.kind("model.embed_tokens") == "embedding"


def test_an_unquantised_folder_is_refused(tiny_model):
    with pytest.raises(RequestError, match="is not quantised"):
        open_stored(tiny_model)
