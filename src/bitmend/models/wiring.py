"""Which layers of a block read a norm, which write to the residual stream, and which are joined linearly.

Nothing is taken from names: a layer reads a norm when it is given the very tensor that the norm returned, and a layer feeds
another linearly when twice the weights of the one give twice the input of the other, bit for bit. What is found is a guess
all the same until a transform that relies on it has been seen to keep the block's function (`pipeline/transforming.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitmend.models.experts import experts_of
from bitmend.models.tracing import is_norm
from bitmend.sites import Block, ModelEnds, ValueHeads, Wiring, read_matrix

Memory = tuple[int, int]


def find_wiring(block: Block, run: Callable[[], Any], hidden: int) -> Wiring:
    """Return how the layers of a loaded block hang together; of convolutions only which batch norms read them.

    Args:
        block: with its weights.
        run: runs it on a few tokens.
        hidden: features of the residual stream.

    Cost: a run of a few tokens, and one more for each layer that reads a norm.
    """
    module = block.module
    norms = [
        path for path, part in module.named_modules() if path and is_norm(part) and _features(part) in (hidden, None)
    ]
    holders = experts_of(module)
    in_experts = {site.path for group in block.groups if group.expert is not None for site in group.sites}
    # The features of a convolution are not the last axis of what it reads, which is what transforms turn and scale.
    sites = [site.path for site in block.sites if site.view.features_last]
    layers = [path for path in sites if path not in in_experts]
    made: dict[Memory, str] = {}
    given: dict[Memory, str] = {}
    readers: dict[str, list[str]] = {path: [] for path in norms}
    behind: dict[str, list[str]] = {path: [] for path in layers}
    convolved: dict[Memory, str] = {}
    scaled: dict[str, list[str]] = {site.path: [] for site in block.sites if not site.view.features_last}
    alive: list[Tensor] = []
    with ExitStack() as hooks, torch.no_grad():
        for path in norms:
            norm = module.get_submodule(path)
            hooks.callback(norm.register_forward_hook(_noting(path, made, alive)).remove)
            hook = _comparing([path], given, behind, alive)
            hooks.callback(norm.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for path in layers:
            hooks.callback(module.get_submodule(path).register_forward_hook(_noting(path, given, alive)).remove)
        for path in scaled:
            hooks.callback(module.get_submodule(path).register_forward_hook(_noting(path, convolved, alive)).remove)
        for path, part in module.named_modules() if scaled else ():
            if isinstance(part, nn.BatchNorm2d):
                hook = _comparing([path], convolved, scaled, alive)
                hooks.callback(part.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for path in [*layers, *block.routers, *holders]:
            inner = [f"{path}.{one}" for one in _first_layers(holders[path])] if path in holders else [path]
            hook = _comparing(inner, made, readers, alive)
            hooks.callback(module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        run()
    reading = {path for paths in readers.values() for path in paths}
    writers = tuple(path for path in sites if path not in reading)
    of_queries = {norm for path, after in behind.items() if path in reading for norm in after}
    feeds = list(_feeds(module, [path for path in layers if path in reading], [w for w in writers if w in layers], run))
    values = next((heads for pair in feeds if (heads := _value_heads(module, *pair)) is not None), None)
    return Wiring(
        hidden=hidden,
        readers={path: tuple(paths) for path, paths in readers.items() if paths},
        writers=writers,
        after_writers=tuple(path for path, paths in readers.items() if not paths and path not in of_queries),
        values=values,
        gated=tuple(pair for pair in feeds if values is None or pair != (values.source, values.target)),
        scaled=tuple((path, norm) for path, norms in scaled.items() for norm in norms),
    )


def find_ends(model: Any, hidden: int, blocks: tuple[str, ...], tied: bool, run: Callable[[], Any]) -> ModelEnds:
    """Return what lies around the blocks of a model.

    Args:
        model: of transformers.
        hidden: features of the residual stream.
        blocks: paths of the blocks.
        tied: whether the head shares the embedding's table.
        run: runs everything behind the last block on a few tokens.
    """
    paths = {id(part): path for path, part in model.named_modules()}
    head = model.get_output_embeddings()
    made: dict[Memory, str] = {}
    found: dict[str, list[str]] = {}
    alive: list[Tensor] = []
    with ExitStack() as hooks, torch.no_grad():
        for path, part in model.named_modules():
            if is_norm(part) and not path.startswith(tuple(f"{one}." for one in blocks)):
                found[path] = []
                hooks.callback(part.register_forward_hook(_noting(path, made, alive)).remove)
        read = _comparing(["head"], made, found, alive)
        hooks.callback(head.register_forward_pre_hook(read, with_kwargs=True).remove)
        run()
    norm = next((path for path, paths_read in found.items() if paths_read), None)
    embedding = paths[id(model.get_input_embeddings())]
    inside = tuple(f"{one}." for one in blocks)
    added = [
        path
        for path, part in model.named_modules()
        if isinstance(part, nn.Embedding) and part.embedding_dim == hidden and not path.startswith(inside)
    ]
    others = tuple(path for path in added if path != embedding)
    return ModelEnds(embedding, norm, paths[id(head)], tied, hidden, model, others)


def _features(norm: nn.Module) -> int | None:
    weight = getattr(norm, "weight", None)
    return None if weight is None else len(weight)


def _first_layers(experts: Any) -> list[str]:
    return [f"{number}.{leaf}" for number in range(experts.num_experts) for leaf in experts.steps()[0]]


def _memory(tensor: Tensor) -> Memory:
    return tensor.data_ptr(), tensor.numel()


def _noting(path: str, made: dict[Memory, str], alive: list[Tensor]) -> Callable[..., None]:
    def note(module: nn.Module, arguments: Any, output: Any) -> None:
        del module, arguments
        if isinstance(output, Tensor):
            alive.append(output)  # so that no later tensor gets its memory
            made[_memory(output)] = path

    return note


def _comparing(
    paths: list[str], made: dict[Memory, str], readers: dict[str, list[str]], alive: list[Tensor]
) -> Callable[..., None]:
    def compare(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        del module
        source = next(one for one in (*arguments, *options.values()) if isinstance(one, Tensor))
        alive.append(source)
        norm = made.get(_memory(source))
        if norm is not None:
            readers[norm] += [path for path in paths if path not in readers[norm]]

    return compare


def _feeds(
    module: nn.Module, sources: list[str], targets: list[str], run: Callable[[], Any]
) -> Iterator[tuple[str, str]]:
    """Yield the pairs in which twice the source's weights give exactly twice the target's input."""
    plain = _inputs_of(module, targets, run)
    for source in sources:
        with _doubled(module.get_submodule(source)):
            twice = _inputs_of(module, targets, run)
        for target in targets:
            if bool(plain[target].any()) and torch.equal(twice[target], 2 * plain[target]):
                yield source, target


def _inputs_of(module: nn.Module, paths: list[str], run: Callable[[], Any]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keeping(path: str) -> Callable[..., None]:
        def keep(part: nn.Module, arguments: tuple[Any, ...]) -> None:
            del part
            seen.setdefault(path, arguments[0].detach().clone())

        return keep

    with ExitStack() as hooks, torch.no_grad():
        for path in paths:
            hooks.callback(module.get_submodule(path).register_forward_pre_hook(keeping(path)).remove)
        run()
    return seen


@contextmanager
def _doubled(layer: nn.Module) -> Iterator[None]:
    """Double weight and bias of a layer, which every floating-point type does exactly, and halve them again."""
    parameters = list(layer.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(2)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.5)


def _value_heads(module: nn.Module, source: str, target: str) -> ValueHeads | None:
    """Return the heads between two layers, or None when the module that holds both has none."""
    holder = module.get_submodule(target.rpartition(".")[0])
    head_dim = getattr(holder, "head_dim", None)
    if not isinstance(head_dim, int) or source.rpartition(".")[0] != target.rpartition(".")[0]:
        return None
    made, read = read_matrix(module.get_submodule(source)).shape[0], read_matrix(module.get_submodule(target)).shape[1]
    if made % head_dim or read % made:
        return None
    return ValueHeads(source, target, head_dim, read // head_dim, made // head_dim)
