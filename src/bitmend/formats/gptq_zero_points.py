"""Which zero points a GPTQ file means: version 1 stores one less than the zero point, version 2 stores it as it is.

A wrong guess moves every weight by one step, and such a model loads without complaint. `checkpoint_format` should say,
but old files do not, and some say the wrong thing (github.com/vllm-project/vllm/pull/38966). So the numbers are looked
at: a symmetric file stores the same number everywhere, 2^(b-1) - 1 or 2^(b-1); in an asymmetric one the mean weight is
close to 0, so that codes exceed the stored number by about 1 on average, or by about 0.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from bitmend.formats.read_gptq import GptqConfig, GptqLayer
from bitmend.protocols import Event

_WHERE = "zero points"
_JUDGED_BY_MEAN = 4  # layers that are unpacked when the stored numbers alone do not decide


def judge_zero_points(
    layers: Mapping[str, GptqLayer], config: GptqConfig, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, GptqLayer], list[Event]]:
    """Return the layers with the version of their zero points, and what the user must be told.

    A symmetric file is read as its numbers say, an asymmetric one as its config says; a config that says nothing leaves
    it to the numbers. Each of these but the agreement of both is an event.

    Cost: reads all zero points, and at most four layers.
    """
    constant = _version_by_constant(layers, tensors)
    found = constant or _version_by_mean(layers, tensors)
    claimed, version, events = config.version, config.version or found, []
    if claimed is None:
        events.append(
            Event(
                "zero_points_guessed",
                _WHERE,
                f"config.json does not say whether zero points are stored minus one; read as version {found}, because "
                f"{_reason(constant is not None, found)}",
            )
        )
    elif claimed != found and constant is not None and config.symmetric is not False:
        version = found
        events.append(
            Event(
                "zero_points_contradict",
                _WHERE,
                f"config.json announces zero points of version {claimed}, but {_reason(True, found)}; read as "
                f"version {found}",
            )
        )
    elif claimed != found:
        events.append(
            Event(
                "zero_points_contradict",
                _WHERE,
                f"read as version {claimed}, as config.json announces, but {_reason(constant is not None, found)}",
            )
        )
    judged = {name: replace(layer, version=version) for name, layer in layers.items()}
    if version == 1:
        events += _overflow_events(judged, tensors)
    return judged, events


def _reason(by_constant: bool, version: int) -> str:
    if by_constant:
        return f"all stored numbers are {'half the range minus one' if version == 1 else 'half the range'}"
    return f"the mean weight is then nearer to 0 than as version {3 - version}"


def _version_by_constant(layers: Mapping[str, GptqLayer], tensors: Mapping[str, Tensor]) -> int | None:
    versions = set()
    for layer in layers.values():
        stored, half = layer.stored_zero_point(tensors), 2 ** (layer.bits - 1)
        low, high = int(stored.min()), int(stored.max())
        versions.add({half - 1: 1, half: 2}.get(low) if low == high else None)
        if len(versions) > 1 or None in versions:
            return None
    return versions.pop()


def _version_by_mean(layers: Mapping[str, GptqLayer], tensors: Mapping[str, Tensor]) -> int:
    judged = list(layers.values())
    judged = judged[:: max(1, len(judged) // _JUDGED_BY_MEAN)][:_JUDGED_BY_MEAN]
    excess = 0.0
    for layer in judged:
        # As version 2, and with all scales 1, a weight is the code minus the stored number.
        weight = replace(layer, version=2).read(tensors)
        levels = replace(weight, scale=weight.scale.float().fill_(1.0)).dense()
        excess += levels.mean().item() / len(judged)
    return 1 if excess > 0.5 else 2


def _overflow_events(layers: Mapping[str, GptqLayer], tensors: Mapping[str, Tensor]) -> list[Event]:
    names = [name for name, layer in layers.items() if int(layer.stored_zero_point(tensors).max()) == 2**layer.bits - 1]
    if not names:
        return []
    return [
        Event(
            "zero_points_overflow",
            names[0],
            f"{len(names)} layers, the first is {names[0]}, store a zero point that version 1 cannot hold, one below "
            f"the range; it is read as GPTQModel reads it, other readers differ",
        )
    ]
