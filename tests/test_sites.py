from itertools import product

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitmend.errors import RequestError
from bitmend.sites import LAYER_VIEWS, Block, LinearSite, SiteGroup, layer_kind


def test_a_linear_and_a_conv1d_with_the_same_function_present_the_same_weight():
    linear, conv = nn.Linear(3, 2, bias=False), Conv1D(2, 3)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for module in (linear, conv):
        LAYER_VIEWS[layer_kind(module)].write_(module, weight)
    x = torch.tensor([[1.0, 0.0, -1.0]])
    assert torch.equal(linear(x), conv(x))
    assert torch.equal(LAYER_VIEWS["linear"].read(linear), weight)
    assert torch.equal(LAYER_VIEWS["conv1d"].read(conv), weight)
    assert tuple(conv.weight.shape) == (3, 2)


def test_other_layers_are_no_sites():
    assert layer_kind(nn.LayerNorm(4)) is None
    assert layer_kind(nn.Embedding(4, 2)) is None


def test_inputs_are_flattened_to_tokens():
    assert LAYER_VIEWS["linear"].tokens(nn.Linear(3, 2), torch.zeros(2, 5, 3)).shape == (10, 3)
    assert LAYER_VIEWS["conv1d"].tokens(Conv1D(2, 3), torch.zeros(5, 3)).shape == (5, 3)


def test_a_site_reads_and_stores_inside_its_block():
    block = nn.ModuleDict({"proj": nn.Linear(3, 2, dtype=torch.bfloat16)})
    site = LinearSite("model.layers.0.proj", "proj", "linear", (2, 3))
    site.store_(block, torch.full((2, 3), 0.5))
    assert site.weight(block).dtype == torch.bfloat16
    assert torch.equal(site.weight(block).float(), torch.full((2, 3), 0.5))
    group = SiteGroup("proj", (site,), None)
    assert Block("model.layers.0", 0, block, (group,)).sites == (site,)


# ---------------------------------------------------------------------------------------------- convolutions
CONV2D, GROUPED = LAYER_VIEWS["conv2d"], LAYER_VIEWS["grouped_conv2d"]
GEOMETRIES = [
    {"kernel_size": size, "stride": stride, "padding": padding, "dilation": dilation}
    for size, stride, padding, dilation in product(
        [(1, 1), (3, 3), (2, 3), (5, 1)], [(1, 1), (2, 1), (3, 2)], [(0, 0), (1, 2), "same", "valid"], [(1, 1), (2, 1)]
    )
    if padding != "same" or stride == (1, 1)
]


def whole_numbers(*shape):
    """Products and sums of these are exact in float32, in whatever order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).float()


def convolution(**geometry):
    layer = nn.Conv2d(3, 4, bias=False, **geometry)
    with torch.no_grad():
        layer.weight.copy_(whole_numbers(*layer.weight.shape))
    return layer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda one: "-".join(map(str, one.values())))
def test_patches_times_the_matrix_are_the_convolution(geometry):
    layer, pictures = convolution(**geometry), whole_numbers(2, 3, 11, 13)
    given = CONV2D.tokens(layer, pictures) @ CONV2D.read(layer).T
    wanted = layer(pictures).detach()
    assert torch.equal(given, wanted.movedim(1, -1).reshape(-1, 4))
    for rows in (1, 7, 60, 10_000):  # less than a line of the output, less than a picture, or pictures
        parts = list(CONV2D.pieces(layer, pictures, rows))
        assert torch.equal(torch.cat(parts), CONV2D.tokens(layer, pictures))
        assert max(map(len, parts)) <= max(rows, wanted.shape[-1])


def test_a_piece_is_all_that_is_unfolded():
    """12 pictures of 4 x 5 places: pieces of 3 pictures, of 2 lines, of a line."""
    layer, pictures = convolution(kernel_size=3, padding="same"), whole_numbers(12, 3, 4, 5)
    assert [len(part) for part in CONV2D.pieces(layer, pictures, 70)] == [60] * 4
    assert [len(part) for part in CONV2D.pieces(layer, pictures, 14)] == [10] * 24
    assert [len(part) for part in CONV2D.pieces(layer, pictures, 0)] == [5] * 48


def test_patches_by_hand():
    """Columns run over channels first; what lies outside the picture is zero."""
    layer = nn.Conv2d(2, 1, (1, 2), padding=(0, 1))
    picture = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    rows = torch.tensor([[0.0, 1.0, 0.0, 3.0], [1.0, 2.0, 3.0, 4.0], [2.0, 0.0, 4.0, 0.0]])
    assert torch.equal(CONV2D.tokens(layer, picture.unsqueeze(0)), rows)
    assert torch.equal(CONV2D.tokens(layer, picture), rows)  # one picture alone, as nn.Conv2d takes it
    assert torch.equal(torch.cat(list(CONV2D.pieces(layer, picture, 2))), rows)


def test_an_even_kernel_puts_the_odd_zero_below_and_right():
    layer = nn.Conv2d(1, 1, 2, padding="same")
    rows = CONV2D.tokens(layer, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    assert rows.tolist() == [[1, 2, 3, 4], [2, 0, 4, 0], [3, 4, 0, 0], [4, 0, 0, 0]]


def test_pieces_of_a_linear_are_its_tokens():
    layer, inputs = nn.Linear(3, 2), torch.randn(2, 5, 3)
    parts = list(LAYER_VIEWS["linear"].pieces(layer, inputs, 4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat(parts), inputs.view(10, 3))
    assert [len(part) for part in LAYER_VIEWS["conv1d"].pieces(Conv1D(2, 3), inputs, 0)] == [1] * 10


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_matrix_of_a_convolution_comes_back(groups, layout):
    layer = nn.Conv2d(4, 8, (3, 2), groups=groups).to(torch.bfloat16, memory_format=layout)
    view = LAYER_VIEWS[layer_kind(layer)]
    matrix = whole_numbers(8, 4 // groups * 6)
    view.write_(layer, matrix)
    assert torch.equal(view.read(layer).float(), matrix)
    assert torch.equal(layer.weight.float(), matrix.view(8, 4 // groups, 3, 2))
    assert layer.weight.is_contiguous(memory_format=layout)
    if layout is torch.contiguous_format:
        assert view.read(layer).data_ptr() == layer.weight.data_ptr()


class Scaled(nn.Conv2d):
    def forward(self, inputs):
        return super().forward(2 * inputs)


class Standardised(nn.Conv2d):
    def _conv_forward(self, inputs, weight, bias):
        return super()._conv_forward(inputs, weight / weight.std(), bias)


class Depthwise(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, groups=channels)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv2d(4, 4, 3), "conv2d"),
        (nn.Conv2d(4, 4, 3, groups=2), "grouped_conv2d"),
        (Depthwise(4), "grouped_conv2d"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), None),
        (Scaled(4, 4, 3), None),
        (Standardised(4, 4, 3), None),
        (nn.ConvTranspose2d(4, 4, 3), None),
        (nn.Conv1d(4, 4, 3), None),
    ],
    ids=lambda one: getattr(type(one), "__name__", None),
)
def test_kinds_of_convolutions(layer, kind):
    assert layer_kind(layer) == kind


def test_a_grouped_convolution_has_no_rows():
    layer, pictures = nn.Conv2d(4, 4, 3, groups=2), torch.randn(1, 4, 5, 5)
    assert not GROUPED.one_input
    assert all(view.one_input for kind, view in LAYER_VIEWS.items() if kind != "grouped_conv2d")
    for ask in (lambda: GROUPED.tokens(layer, pictures), lambda: GROUPED.pieces(layer, pictures, 4)):
        with pytest.raises(
            RequestError, match=r"got Conv2d in 2 groups, .* round it to nearest, which needs no inputs"
        ):
            ask()


def test_layers_that_make_the_same_rows():
    same = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 9, 3, padding="same"), nn.Conv2d(3, 1, (3, 3), padding=(1, 1))]
    assert len({CONV2D.reading(layer) for layer in same}) == 1
    others = [nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 3, 1, 1, 2)]
    assert len({CONV2D.reading(layer) for layer in (same[0], *others)}) == 5
    assert LAYER_VIEWS["linear"].reading(nn.Linear(3, 2)) == LAYER_VIEWS["conv1d"].reading(Conv1D(2, 3))
    assert LAYER_VIEWS["linear"].reading(nn.Linear(3, 2)) != CONV2D.reading(others[0])


def test_a_convolution_gives_what_a_picture_too_small_gives():
    layer = nn.Conv2d(1, 1, 3)
    for read in (layer, lambda pictures: CONV2D.tokens(layer, pictures)):
        with pytest.raises(RuntimeError):
            read(torch.zeros(1, 1, 2, 2))
