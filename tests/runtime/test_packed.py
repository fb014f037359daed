import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitmend.errors import RecipeError, RequestError
from bitmend.numerics.granularity import PerGroup, PerToken
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.runtime.packed import PackedWeight, pack, packed_shapes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 8), st.booleans(), st.sampled_from([-1, 0, 8, 16]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_packing_loses_nothing(random_qtensor, out, columns, bits, symmetric, group_size, scale_dtype):
    qtensor = random_qtensor(out, columns, bits, symmetric, group_size, scale_dtype)
    packed = pack(qtensor)
    back = packed.unpack()
    assert torch.equal(back.codes, qtensor.codes)
    assert torch.equal(back.qparams.scale, qtensor.qparams.scale)
    if not symmetric:
        assert torch.equal(back.qparams.zero_point, qtensor.qparams.zero_point)
    assert back.spec == qtensor.spec
    assert torch.equal(packed.dequantize(), qtensor.dequantize())
    shapes = packed_shapes((out, columns), qtensor.spec)
    assert list(shapes.values())[:2] == [
        (packed.words.dtype, packed.words.shape),
        (packed.scale.dtype, packed.scale.shape),
    ]
    assert (packed.zero_words is None) == (len(shapes) == 2)
    if packed.zero_words is not None:
        assert shapes["weight_zero_point"] == (torch.int32, packed.zero_words.shape)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_equal_those_of_the_whole_matrix(random_qtensor, symmetric, group_size, dtype):
    qtensor = random_qtensor(101, 40, 3, symmetric, group_size)
    packed, whole = pack(qtensor), qtensor.dequantize(dtype)
    assert torch.equal(packed.rows(64, 101, dtype), whole[64:101])
    index = torch.tensor([100, 0, 33, 33])
    assert torch.equal(packed.take(index, dtype), whole[index])


def test_a_tile_takes_four_megabytes():
    spec = QuantSpec(UniformGrid(4, True))
    packed = PackedWeight(torch.empty(0, 1, dtype=torch.int32), torch.empty(0, 1), None, spec, (10_000, 4096))
    assert packed.tiles().step * 4096 * 4 == 4 << 20
    wide = PackedWeight(torch.empty(0, 1, dtype=torch.int32), torch.empty(0, 1), None, spec, (64, 1 << 20))
    assert wide.tiles().step == 32


def test_scales_that_storage_would_change_are_refused(random_qtensor):
    qtensor = random_qtensor(4, 8)
    spec = QuantSpec(qtensor.spec.grid, qtensor.spec.granularity, "minmax", torch.bfloat16)
    with pytest.raises(RequestError, match=r"some of them change when cast to torch\.bfloat16"):
        pack(QTensor(qtensor.codes, qtensor.qparams, spec))


@pytest.mark.parametrize("value", [8.0, 0.5, float("nan")])
def test_zero_points_outside_the_grid_are_refused(random_qtensor, value):
    qtensor = random_qtensor(4, 8, 4, False)
    qparams = QParams(qtensor.qparams.scale, torch.full((4, 1), value))
    with pytest.raises(RequestError, match="zero points must be whole numbers from -8 to 7"):
        pack(QTensor(qtensor.codes, qparams, qtensor.spec))


def test_granularities_that_no_weight_has_are_refused():
    with pytest.raises(RequestError, match="got one per token"):
        packed_shapes((4, 8), QuantSpec(UniformGrid(4, True), PerToken()))
    with pytest.raises(RecipeError, match="group_size must divide"):
        packed_shapes((4, 8), QuantSpec(UniformGrid(4, True), PerGroup(3)))
