import pytest
import torch

from bitmend.errors import CheckpointError
from bitmend.formats.native import ManifestEntry, read_site, site_shapes, site_tensors

CASES = [
    (bits, symmetric, group_size, dtype)
    for bits in range(1, 9)
    for symmetric in (True, False)
    for group_size in (-1, 0, 8)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("bits", "symmetric", "group_size", "dtype"), CASES)
def test_a_site_comes_back_bit_for_bit(helpers, bits, symmetric, group_size, dtype):
    spec = helpers.spec(bits, symmetric, group_size, ragged=True, scale_dtype=dtype)
    qtensor = helpers.min_max(torch.randn(13, 21), spec)
    tensors = site_tensors("layer.q", qtensor)
    entry = ManifestEntry(spec, (13, 21))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()} == site_shapes("layer.q", entry)
    assert tensors["layer.q.weight_scale"].dtype == dtype
    back = read_site(tensors, "layer.q", entry)
    assert torch.equal(back.codes, qtensor.codes)
    assert torch.equal(back.qparams.scale, qtensor.qparams.scale)
    assert symmetric or torch.equal(back.qparams.zero_point, qtensor.qparams.zero_point)
    assert torch.equal(back.dequantize(), qtensor.dequantize())


def test_the_names_and_shapes_of_the_format(helpers):
    spec = helpers.spec(3, False, 16, scale_dtype=torch.bfloat16)
    assert site_shapes("m", ManifestEntry(spec, (40, 64))) == {
        "m.weight_packed": (torch.int32, (40, 6)),
        "m.weight_scale": (torch.bfloat16, (40, 4)),
        "m.weight_zero_point": (torch.int32, (4, 4)),
    }


def test_tensors_that_differ_from_the_manifest_are_refused(helpers):
    spec = helpers.spec(4, True, 8)
    tensors = site_tensors("m", helpers.min_max(torch.randn(4, 16), spec))
    entry = ManifestEntry(spec, (4, 16))
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks m\.weight_scale"):
        read_site({"m.weight_packed": tensors["m.weight_packed"]}, "m", entry)
    with pytest.raises(
        CheckpointError, match=r"m\.weight_packed must be torch\.int32 of shape \(4, 2\) by the manifest"
    ):
        read_site(tensors | {"m.weight_packed": torch.zeros(4, 3, dtype=torch.int32)}, "m", entry)
    with pytest.raises(CheckpointError, match=r"m\.weight_scale must be torch\.float32"):
        read_site(tensors | {"m.weight_scale": torch.zeros(4, 2, dtype=torch.bfloat16)}, "m", entry)
