"""Typed facts about a model: which matrices can be quantised, which share an input, in which order they run.

Whatever a layer looks like in its model (a linear, GPT-2's transposed `Conv1D`, a convolution of pictures), a site presents
it as a weight `(out, in)` and inputs `(token, in)`. That translation exists here and nowhere else; a new kind of layer is
one more `LayerView`.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from bitmend.errors import RequestError
from bitmend.linalg.learned_rotation import AnyRotation
from bitmend.routing import Expert

PIECE_ENTRIES = 1 << 20  # of a matrix, rotated at a time: in float64 at once it would be four times the matrix


@runtime_checkable
class LayerView(Protocol):
    """How one class of layers holds its weight and takes its input.

    Attributes:
        one_input: whether all outputs read the same columns, so that the inputs can be had as rows; else the layer can be
            rounded to nearest, which needs no inputs.
        features_last: whether the columns are the last axis of what the layer reads, and the outputs that of what it gives.
    """

    one_input: ClassVar[bool]
    features_last: ClassVar[bool]

    def matches(self, module: nn.Module) -> bool:
        """Return whether this view can read `module`."""
        ...

    def read(self, module: nn.Module) -> Float[Tensor, "out in"]:
        """Return the weight as (out, in); a view of the module's own memory where possible."""
        ...

    def write_(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
        """Overwrite the module's weight with `weight`, cast to the module's dtype."""
        ...

    def reading(self, module: nn.Module) -> Hashable:
        """Return a key that is equal for two layers exactly when they make the same rows of the same input."""
        ...

    def tokens(self, module: nn.Module, inputs: Float[Tensor, "*batch"]) -> Float[Tensor, "token in"]:
        """Return what the layer reads as one row per token.

        Raises:
            RequestError: the outputs do not read the same columns (`one_input` is False).
        """
        ...

    def pieces(self, module: nn.Module, inputs: Float[Tensor, "*batch"], rows: int) -> Iterator[Tensor]:
        """Yield the rows of `tokens` in order, about `rows` at a time.

        The unfolded input of a convolution, 9 times its input for kernels of 3 x 3, then never lies in memory whole.

        Raises:
            RequestError: as of `tokens`.
        """
        ...


@dataclass(frozen=True)
class LinearView:
    """`nn.Linear`: the weight is (out, in) already."""

    one_input: ClassVar[bool] = True
    features_last: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def read(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return module.get_parameter("weight").detach()

    def write_(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
        with torch.no_grad():
            module.get_parameter("weight").copy_(weight)

    def reading(self, module: nn.Module) -> Hashable:
        del module
        return ()

    def tokens(self, module: nn.Module, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "token in"]:
        del module
        return inputs.detach().reshape(-1, inputs.shape[-1])

    def pieces(self, module: nn.Module, inputs: Float[Tensor, "*batch in"], rows: int) -> Iterator[Tensor]:
        yield from torch.split(self.tokens(module, inputs), max(1, rows))


@dataclass(frozen=True)
class Conv1dView:
    """GPT-2's `Conv1D` of transformers: a linear whose weight is stored as (in, out)."""

    one_input: ClassVar[bool] = True
    features_last: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        # By name: this layer must not import transformers, and the class has no other mark than `nf`, its output width.
        return type(module).__name__ == "Conv1D" and hasattr(module, "nf")

    def read(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return module.get_parameter("weight").detach().T

    def write_(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
        with torch.no_grad():
            module.get_parameter("weight").copy_(weight.T)

    def reading(self, module: nn.Module) -> Hashable:
        return LinearView().reading(module)

    def tokens(self, module: nn.Module, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "token in"]:
        return LinearView().tokens(module, inputs)

    def pieces(self, module: nn.Module, inputs: Float[Tensor, "*batch in"], rows: int) -> Iterator[Tensor]:
        yield from LinearView().pieces(module, inputs, rows)


@dataclass(frozen=True)
class Conv2dView:
    """`nn.Conv2d` in one group: the product of a matrix with the patches of the pictures, one for each place of the output.

    A place of the output is a token. Columns run over input channels, then rows, then columns of the kernel.
    """

    one_input: ClassVar[bool] = True
    features_last: ClassVar[bool] = False

    def matches(self, module: nn.Module) -> bool:
        return _is_convolution(module) and module.groups == 1

    def read(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return module.get_parameter("weight").detach().flatten(1)

    def write_(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
        with torch.no_grad():
            kernels = module.get_parameter("weight")
            kernels.copy_(weight.reshape(kernels.shape))

    def reading(self, module: nn.Module) -> Hashable:
        assert isinstance(module, nn.Conv2d)
        return module.kernel_size, module.stride, _padding(module), module.dilation, module.groups

    def tokens(
        self, module: nn.Module, inputs: Float[Tensor, "*picture channel height width"]
    ) -> Float[Tensor, "token in"]:
        return _rows(_patches(module, inputs))

    def pieces(
        self, module: nn.Module, inputs: Float[Tensor, "*picture channel height width"], rows: int
    ) -> Iterator[Tensor]:
        patches = _patches(module, inputs)
        high, wide = patches.shape[2:4]
        band = max(1, min(high, rows // wide))
        for pictures in torch.split(patches, max(1, rows // (high * wide))):
            for part in torch.split(pictures, band, dim=2):
                yield _rows(part)


@dataclass(frozen=True)
class GroupedConv2dView:
    """`nn.Conv2d` in several groups, a depthwise one among them.

    Each group of output channels reads input channels of its own, so that the layer is no single product of matrices and has
    no rows of inputs. Its weight is (out, in / groups * kernel height * kernel width), to be rounded to nearest.
    """

    one_input: ClassVar[bool] = False
    features_last: ClassVar[bool] = False

    def matches(self, module: nn.Module) -> bool:
        return _is_convolution(module) and module.groups > 1

    def read(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return Conv2dView().read(module)

    def write_(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
        Conv2dView().write_(module, weight)

    def reading(self, module: nn.Module) -> Hashable:
        return Conv2dView().reading(module)

    def tokens(self, module: nn.Module, inputs: Float[Tensor, "*batch"]) -> Float[Tensor, "token in"]:
        del inputs
        _refuse_rows(module)

    def pieces(self, module: nn.Module, inputs: Float[Tensor, "*batch"], rows: int) -> Iterator[Tensor]:
        del inputs, rows
        _refuse_rows(module)


def _is_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a module computes what `nn.Conv2d` does, padded with zeros; a subclass may compute something else."""
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        return False
    kind = type(module)
    return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward


def _padding(convolution: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return how many zeros are put left, right, above and below, whether given as numbers or as a word."""
    if isinstance(convolution.padding, str):
        sizes = zip(convolution.kernel_size, convolution.dilation, strict=True)
        totals = [dilation * (size - 1) if convolution.padding == "same" else 0 for size, dilation in sizes]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(one, one) for one in convolution.padding]
    (above, below), (left, right) = sides
    return left, right, above, below


def _patches(
    module: nn.Module, inputs: Float[Tensor, "*picture channel height width"]
) -> Float[Tensor, "pictures channel high wide kernel_high kernel_wide"]:
    """Return what each place of the output reads, without a copy except for the padding."""
    assert isinstance(module, nn.Conv2d)
    pictures = inputs.detach() if inputs.ndim == 4 else inputs.detach().unsqueeze(0)
    padding = _padding(module)
    patches = functional.pad(pictures, padding) if any(padding) else pictures
    shape = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(shape, start=2):
        patches = patches.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return patches


def _rows(
    patches: Float[Tensor, "pictures channel high wide kernel_high kernel_wide"],
) -> Float[Tensor, "token in"]:
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def _refuse_rows(module: nn.Module) -> NoReturn:
    groups = getattr(module, "groups", None)
    raise RequestError(
        f"inputs as rows need a layer that is one product of matrices; got {type(module).__name__} in {groups} groups, each "
        "of which reads channels of its own; round it to nearest, which needs no inputs"
    )


LAYER_VIEWS: dict[str, LayerView] = {
    "linear": LinearView(),
    "conv1d": Conv1dView(),
    "conv2d": Conv2dView(),
    "grouped_conv2d": GroupedConv2dView(),
}


def read_matrix(module: nn.Module) -> Float[Tensor, "out in"]:
    """Return the weight of a layer as (out, in); of a module that is no site, such as a router, its own `weight`."""
    kind = layer_kind(module)
    return module.get_parameter("weight").detach() if kind is None else LAYER_VIEWS[kind].read(module)


def write_matrix_(module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
    """Overwrite the weight that `read_matrix` returns, cast to its dtype."""
    kind = layer_kind(module)
    (LinearView() if kind is None else LAYER_VIEWS[kind]).write_(module, weight)


def rotate_inputs_(layer: nn.Module, rotation: AnyRotation) -> None:
    """Make a layer that reads rotated inputs give what it gave; of an embedding, rotate what it gives."""
    for rows in torch.split(read_matrix(layer), max(1, PIECE_ENTRIES // read_matrix(layer).shape[1])):
        rows.copy_(rotation.apply(rows.double()))


def read_by_all(block: "Block", paths: tuple[str, ...]) -> str:
    """Return one of some layers with the same input that every token reaches; the first where there is none."""
    in_experts = {site.path for group in block.groups if group.expert is not None for site in group.sites}
    return next((path for path in paths if path not in in_experts), paths[0])


def layer_kind(module: nn.Module) -> str | None:
    """Return the name of the view that reads `module`, or None when it cannot be a site."""
    return next((kind for kind, view in LAYER_VIEWS.items() if view.matches(module)), None)


def norm_gain(norm: nn.Module, features: int) -> Float[Tensor, " features"] | None:
    """Return the gain of a norm that divides by the root mean square and multiplies by a gain, float64.

    None for any other norm: one that subtracts the mean, or adds a bias. It is read from what the norm does to numbers,
    because the stored weight may stand for 1 + weight.
    """
    reference = next(norm.parameters(), torch.zeros(()))
    draw = torch.Generator().manual_seed(0)
    values = (torch.randn(4, features, generator=draw) * 3 + 1).to(reference)
    with torch.no_grad():
        gains = norm(values).double() * values.double().square().mean(-1, keepdim=True).sqrt() / values.double()
    slack = 0.05 if reference.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if not torch.allclose(gains, gains[:1].expand_as(gains), rtol=slack, atol=slack):
        return None
    weight = getattr(norm, "weight", None)
    gain = gains.mean(0)
    if weight is None:
        return gain
    # Exactly, where the weight says it.
    exact = weight.detach().double()
    return min((exact, exact + 1), key=lambda one: float((one - gain).abs().sum()))


def centring_norm(
    norm: nn.Module, features: int
) -> tuple[Float[Tensor, " features"], Float[Tensor, " features"]] | None:
    """Return gain and bias of a norm that subtracts the mean and divides by the standard deviation, float64.

    None for any other norm. Read from what the norm does to numbers, as in `norm_gain`.
    """
    reference = next(norm.parameters(), torch.zeros(()))
    draw = torch.Generator().manual_seed(0)
    values = (torch.randn(8, features, generator=draw) * 3 + 1).to(reference)
    with torch.no_grad():
        given = norm(values).double()
    exact = values.double()
    centred = (exact - exact.mean(-1, keepdim=True)) / exact.std(-1, correction=0, keepdim=True)
    nought = torch.zeros(features, dtype=torch.float64, device=given.device)
    gain, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    gain = nought + 1 if gain is None else gain.detach().double()
    bias = nought if bias is None else bias.detach().double()
    if gain.shape != nought.shape or bias.shape != nought.shape:
        return None
    slack = 0.05 if reference.dtype in (torch.float16, torch.bfloat16) else 1e-3
    for found in (gain, gain + 1):  # the stored weight may stand for 1 + weight
        if torch.allclose(given, centred * found + bias, rtol=slack, atol=slack):
            return found, bias
    return None


def scale_norm_(norm: nn.Module, factors: Float[Tensor, " features"]) -> None:
    """Multiply what a norm gives by a factor for each feature, in its weight and bias.

    Raises:
        ValueError: it has no weight to change.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None:
        raise ValueError("a norm without a weight cannot take up factors")
    gain = norm_gain(norm, len(weight))
    offset = 0.0 if gain is None or torch.equal(gain, weight.detach().double()) else 1.0
    with torch.no_grad():
        weight.copy_((weight.double() + offset) * factors - offset)
        if bias is not None:
            bias.mul_(factors)


def set_unit_gain_(norm: nn.Module, features: int) -> None:
    """Set the weight of a norm so that its gain is 1 for all features.

    Raises:
        ValueError: neither ones nor zeros make it so.
    """
    weight = getattr(norm, "weight", None)
    if weight is None:
        return
    for value in (1.0, 0.0):
        with torch.no_grad():
            weight.fill_(value)
        gain = norm_gain(norm, features)
        if gain is not None and bool((gain == 1).all()):
            return
    raise ValueError("the gain of a norm is neither its weight nor 1 + its weight")


@dataclass(frozen=True)
class LinearSite:
    """One matrix that can be quantised.

    Attributes:
        name: the module's full path in the model, for example `model.layers.0.mlp.down_proj`.
        path: the same inside its block, for example `mlp.down_proj`.
        kind: a key of `LAYER_VIEWS`.
        shape: (out, in), of the weight as a matrix.
    """

    name: str
    path: str
    kind: str
    shape: tuple[int, int]

    @property
    def view(self) -> LayerView:
        """How to read the layer."""
        return LAYER_VIEWS[self.kind]

    def weight(self, block: nn.Module) -> Float[Tensor, "out in"]:
        """Return the weight in its model dtype."""
        return self.view.read(block.get_submodule(self.path))

    def store_(self, block: nn.Module, weight: Float[Tensor, "out in"]) -> None:
        """Overwrite the weight inside `block`."""
        self.view.write_(block.get_submodule(self.path), weight)


@dataclass(frozen=True)
class SiteGroup:
    """Sites that read the same rows of the same input, hence share its moments.

    Attributes:
        name: the paths of the sites joined by `+`, with their common part once: `self_attn.{q_proj,k_proj,v_proj}`.
        sites: in execution order.
        norm: path in the block of the module whose output is this input, or None when it is not a norm, something else reads
            it, too, or the sites are convolutions.
        expert: where the sites stand in a mixture of experts; None for sites that every token reaches.
        rows_per_place: rows of a site's product for one place of the hidden states: 1 where a token is a row; for a picture
            as many as a layer makes of it.
        entries_per_place: of what a site reads for one place; None: a row's width for each row. A convolution reads each
            entry several times.
    """

    name: str
    sites: tuple[LinearSite, ...]
    norm: str | None
    expert: Expert | None = None
    rows_per_place: float = 1.0
    entries_per_place: float | None = None


@dataclass(frozen=True)
class Block:
    """One repeated piece of the network, with its sites in execution order.

    Attributes:
        name: full path in the model, for example `model.layers.0`.
        index: position in execution order, from 0.
        module: the module itself, weights loaded.
        groups: in execution order; together they hold every site once.
        unread: paths of layers with weights of two dimensions that never ran, so that nothing is known of their input.
        routers: paths of layers that choose experts or weigh a shared one; by rule they are no sites.
    """

    name: str
    index: int
    module: nn.Module
    groups: tuple[SiteGroup, ...]
    unread: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[LinearSite, ...]:
        """All sites in execution order."""
        return tuple(site for group in self.groups for site in group.sites)


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a block, whose queries, keys and values can be rounded.

    Attributes:
        name: the module's full path in the model, for example `model.layers.0.self_attn`.
        path: the same inside its block.
        heads: of the queries.
        key_heads: of keys and values.
        key_width: features of a head of queries and keys.
        value_width: features of a head of values.
    """

    name: str
    path: str
    heads: int
    key_heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class ValueHeads:
    """Two layers with nothing but attention between them: what the first gives reaches the second linearly, head by head.

    Attributes:
        source: path in the block of the layer that makes the values.
        target: of the layer that reads them, weighted and repeated.
        head_dim: features of a head.
        heads: heads that the target reads.
        source_heads: heads that the source makes; each is read by `heads / source_heads` heads of the target.
    """

    source: str
    target: str
    head_dim: int
    heads: int
    source_heads: int


@dataclass(frozen=True)
class Wiring:
    """How the layers of a block hang together, for transforms that move something from one to the next.

    Attributes:
        hidden: features of the residual stream.
        readers: path of a norm -> the layers that read what it returns, routers and first layers of experts included.
        writers: layers whose results are added to the residual stream.
        after_writers: norms between a writer and the residual stream.
        values: the layers before and behind the attention, or None when the values are made in one layer with others.
        scaled: (convolution, batch norm) pairs where the norm reads the very tensor that the convolution gives.
        gated: (source, target) pairs of equal width where a feature of the target's input grows by the positive factor by
            which the same feature of the source's output does: `up_proj` and `down_proj`, or two layers with a ReLU between
            them.
    """

    hidden: int
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    after_writers: tuple[str, ...]
    values: ValueHeads | None
    gated: tuple[tuple[str, str], ...]
    scaled: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ModelEnds:
    """What lies before the first and behind the last block.

    Attributes:
        embedding: path of the token embedding.
        norm: path of the last norm, or None when the head reads something else.
        head: path of the output head.
        tied: whether the head shares the embedding's table.
        hidden: features of the residual stream.
        model: holds all of them.
        added: paths of further embeddings as wide as the residual stream, such as that of positions.
    """

    embedding: str
    norm: str | None
    head: str
    tied: bool
    hidden: int
    model: nn.Module
    added: tuple[str, ...] = ()
