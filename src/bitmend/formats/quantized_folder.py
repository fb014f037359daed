"""Dense weights of quantised checkpoints that other tools wrote, one layer at a time.

GPTQ versions 1 and 2, AWQ for GEMM kernels, and compressed-tensors `pack-quantized`. The folder comes from a stranger:
everything that config.json and the headers of the files can say is judged before the first layer is unpacked.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitmend.errors import CheckpointError
from bitmend.formats.affine import PackedLayer
from bitmend.formats.gptq_zero_points import judge_zero_points
from bitmend.formats.integrity import read_config, read_records, weight_files
from bitmend.formats.manifest import QUANT_METHOD
from bitmend.formats.read_awq import awq_layers
from bitmend.formats.read_compressed_tensors import compressed_tensors_layers
from bitmend.formats.read_gptq import GptqConfig, GptqLayer, gptq_config, gptq_layers
from bitmend.formats.safetensors_file import StoredTensors, TensorRecord, parse_json
from bitmend.protocols import Event

# Older tools wrote their settings only here.
OLD_GPTQ_CONFIG = "quantize_config.json"


@dataclass(frozen=True)
class QuantizedFolder:
    """A quantised checkpoint, opened; iterate over it for the tensors of the dense model.

    Attributes:
        folder: where it lies.
        format: `gptq`, `gptq_v2`, `awq` or `compressed-tensors`.
        layers: full module path -> its description, such as `bits` and `shape`.
        events: what the user must be told, for example that zero points had to be guessed.
        dtype: of the dense weights.
    """

    folder: Path
    format: str
    layers: Mapping[str, PackedLayer]
    events: tuple[Event, ...]
    dtype: torch.dtype
    _tensors: StoredTensors

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of all tensors of the dense model, in the order of the files.

        `NAME.weight` of a quantised layer is rebuilt; everything else is as stored. Memory: one layer at a time.

        Raises:
            CheckpointError: values that are no scales, or groups that do not exist.
        """
        done = set()
        for key in self._tensors:
            name = key.rpartition(".")[0]
            if not self._is_part(key):
                yield key, self._tensors[key]
            elif name not in done:
                done.add(name)
                yield f"{name}.weight", self.dense(name)

    def dense(self, name: str) -> Float[Tensor, "out in"]:
        """Return the dense weight of one quantised layer: computed in float32, rounded once to `dtype`.

        Always (out, in), also where the model's own layer is a `Conv1D` of GPT-2, which stores (in, out).

        Raises:
            KeyError: no quantised layer has this name.
            CheckpointError: values that are no scales, or groups that do not exist.
        """
        return self.layers[name].read(self._tensors).dense().to(self.dtype)

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Names of the tensors that are stored as they are, such as norms and biases."""
        return tuple(key for key in self._tensors if not self._is_part(key))

    def stored(self, name: str) -> Tensor:
        """Return one tensor as the file has it.

        Raises:
            KeyError: there is no such tensor.
        """
        return self._tensors[name]

    def _is_part(self, key: str) -> bool:
        name, _, leaf = key.rpartition(".")
        return name in self.layers and leaf in self.layers[name].parts


def read_quantized(folder: str | Path, dtype: torch.dtype = torch.float32) -> QuantizedFolder:
    """Open a checkpoint in the format of another tool, to read its dense weights.

    ```python
    checkpoint = bitmend.formats.read_quantized("some-model-gptq")
    for event in checkpoint.events:
        print(event.message)
    for name, tensor in checkpoint:  # a state dict, one tensor at a time
        ...
    ```

    Args:
        folder: with config.json and safetensors files.
        dtype: of the dense weights; other tensors stay as they are.

    Raises:
        CheckpointError: a format that is not known, or a folder that is incomplete, altered or inconsistent.

    Cost: reads the headers; of GPTQ also zero points and groups, and at most four layers when it is not clear how zero
    points are stored.
    """
    folder = Path(folder)
    config = _quantization_config(folder)
    files = weight_files(folder)
    records, tensors = read_records(files), StoredTensors(files)
    method = config.get("quant_method")
    layers: Mapping[str, PackedLayer]
    events: list[Event] = []
    if method == "gptq":
        layers, name, events = _open_gptq(records, gptq_config(config), tensors)
    elif method == "awq":
        layers, name = awq_layers(records, config), "awq"
    elif method == "compressed-tensors":
        layers, name = compressed_tensors_layers(records, config, tensors), "compressed-tensors"
        events = _activation_events(config)
    elif method == QUANT_METHOD:
        raise CheckpointError(f"{folder} is in bitmend's own format; open it with bitmend.load")
    else:
        raise CheckpointError(
            f"quant_method must be gptq, awq or compressed-tensors in a checkpoint that bitmend reads; got {method!r:.80}"
        )
    return QuantizedFolder(folder, name, layers, tuple(events), dtype, tensors)


def _quantization_config(folder: Path) -> dict[str, Any]:
    config = read_config(folder).get("quantization_config")
    old = folder / OLD_GPTQ_CONFIG
    if config is None and old.is_file():
        config = {"quant_method": "gptq", **parse_json(old.read_bytes(), str(old))}
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder} is no quantised checkpoint: its config.json has no quantization_config; give a quantised one"
        )
    return config


def _is_ordered(group: Tensor | None) -> bool:
    return group is not None and bool((group.diff() < 0).any())


def _activation_events(config: Mapping[str, Any]) -> list[Event]:
    groups = config.get("config_groups")
    tables = groups.values() if isinstance(groups, dict) else ()
    if not any(isinstance(group, dict) and group.get("input_activations") for group in tables):
        return []
    return [
        Event("activations_ignored", "config_groups", "the model also rounds activations, which weights do not show")
    ]


def _open_gptq(
    records: Mapping[str, TensorRecord], config: GptqConfig, tensors: StoredTensors
) -> tuple[Mapping[str, GptqLayer], str, list[Event]]:
    layers, events = judge_zero_points(gptq_layers(records, config), config, tensors)
    ordered = [name for name, layer in layers.items() if _is_ordered(layer.group_of_column(tensors))]
    if ordered and not config.act_order:
        message = (
            f"{len(ordered)} layers, the first is {ordered[0]}, say of each column which group it has, although "
            f"config.json says desc_act = false; the file's groups are used"
        )
        events.append(Event("groups_contradict", ordered[0], message))
    version = next(iter(layers.values())).version
    return layers, "gptq" if version == 1 else "gptq_v2", events
