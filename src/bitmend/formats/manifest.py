"""What `quantization_config` in config.json says of a bitmend checkpoint.

```json
{"quant_method": "bitmend", "format_version": 1,
 "schemes": [{"layout": "uniform", "bits": 4, "symmetric": true, "group_size": 32, "ragged": false,
              "scale_dtype": "bfloat16", "observer": "mse"}],
 "modules": {"model.layers.0.mlp.up_proj": {"scheme": 0, "shape": [128, 64], "kind": "linear"}},
 "tied": {"lm_head": "model.embed_tokens"},
 "provenance": {"solver": "gptq"},
 "files": {"model.safetensors": "<sha256>"}, "seal": "<sha256>"}
```

Every quantised module is listed; equal schemes are stored once. A convolution of pictures is a matrix, too: its weight with
all axes but the first flattened; readers that do not know its kind refuse it. A scheme's `layout` names which tensors lie in
the file and how they are read (`formats/native.py`); a later way of storing (masks, codebooks, matrices beside a block) is a
new layout name, which readers that do not know it refuse. `files` is dropped when transformers saves the model again.
What is done to activations while the model runs stands beside them, from format version 2 on; a folder without it is written
as version 1, and readers of version 1 refuse one with it:

```json
{"inputs": {"model.layers.0.mlp.down_proj": {"rotation": {"size": 768, "seed": null, "inner": 1, "transposed": false},
                                             "activations": {"bits": 4, "symmetric": true, "group_size": -1,
                                                             "clip_ratio": 0.9}}},
 "outputs": {"model.embed_tokens": {"rotation": {"size": 256, "seed": 0, "inner": 1, "transposed": false}}}}
```

What happens inside the attention comes with format version 3, for each module that attends; what is not done is left out.
Rotations that are made for a layer's inputs come with it, too: several layers read the same, so that each stands once in
`rotations`, and `inputs` names it by its place:

```json
{"attentions": {"model.layers.0.self_attn": {"rotation": {"size": 64, "seed": null, "inner": 1, "transposed": false},
                                             "keys": {"bits": 4, "symmetric": false, "group_size": -1, "clip_ratio": 1.0,
                                                      "scale_bits": 16},
                                             "values": {"bits": 4, "...": "..."}}},
 "inputs": {"model.layers.0.mlp.up_proj": {"rotation": {"shared": 0}}},
 "rotations": [{"block": 128, "seed": 0, "first": "17 3", "order": "5 0 ...", "second": "9", "transposed": false}]}
```

Static ranges (`"ranges": [2.5]` beside the other keys of a grid) and a prefix come with format version 4:

```json
{"attentions": {"model.layers.0.self_attn": {"prefix": {"tokens": 2, "heads": 2, "key_width": 64, "value_width": 64}}}}
```

The keys and values of the prefix are tensors of the module that attends, `prefix_key` and `prefix_value`. Rotations that keep
the mean (`"keeps_mean": true` beside their other keys) come with format version 5, and so do learned ones: `holder` names the
module with the tensor `rotation_codes`, half a skew-symmetric matrix (`linalg/learned_rotation.py`):

```json
{"inputs": {"model.norm": {"rotation": {"size": 256, "seed": 0, "inner": 1, "transposed": true,
                                        "holder": "model.embed_tokens"}}}}
```

Ranges with zero points (`"lows": [-0.2]` beside `ranges`) come with format version 5, too, and so do grids whose levels are
not evenly spaced, which say their `kind`; without one it is `uniform`. Queries, keys and values have uniform grids only:

```json
{"inputs": {"encoder.layer.0.output.dense": {"activations": {"kind": "twin_gelu", "bits": 4, "range": 2.5}}},
 "attentions": {"encoder.layer.0.attention": {"probabilities": {"kind": "log_sqrt2", "bits": 4, "range": 0.9}},
                "encoder.layer.1.attention": {"probabilities": {"kind": "twin_softmax", "bits": 4, "split_exponent": 6}}}}
```

The maps beside blocks (`compensation.py`) come with format version 6; their tensors are those of a module `compensation` of
the block:

```json
{"compensations": {"model.layers.0": {"structure": "low_rank", "inputs": 256, "outputs": 256, "rank": 16, "groups": 1,
                                      "channels_first": false, "stride": 1, "clamped": false}}}
```

`seal` is over `schemes`, `modules` and `tied`, and over all of the above where there are any: two
schemes may give tensors of the same shapes (groups of 16 and ragged groups of 20 of a width of 32), so that the files alone
cannot tell a scheme that was changed. Folders of older versions have none.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from bitmend.compensation import STRUCTURES, CompensationShape
from bitmend.errors import CheckpointError, RecipeError, RequestError
from bitmend.linalg.greedy_rotation import BlockRotation
from bitmend.linalg.hadamard import Rotation
from bitmend.linalg.learned_rotation import AnyRotation, LearnedRotation, StreamRotation
from bitmend.numerics.activation_ranges import AnyRounding
from bitmend.numerics.activations import ActivationSpec
from bitmend.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from bitmend.numerics.log_sqrt2 import LogSqrt2Spec
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.twin_uniform import TwinGeluSpec, TwinSoftmaxSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.online import AttentionScheme, InputScheme, PrefixShape

QUANT_METHOD = "bitmend"
FORMAT_VERSION, VERSION_WITH_INPUTS, VERSION_WITH_ATTENTION, VERSION_WITH_RANGES, VERSION_WITH_GRIDS = 1, 2, 3, 4, 5
VERSION_WITH_COMPENSATIONS = VERSION_LATEST = 6
LARGEST_COMPENSATED = 1 << 20  # features of a block; what a hostile file may ask for
LARGEST_ROTATION = 1 << 20  # features; what a hostile file may ask for
UNKEPT_SCALE_BITS = 32  # of activations that no cache keeps
OPERANDS = ("queries", "keys", "values", "probabilities")
UNIFORM = "uniform"  # kind of a grid of activations that says none
# Kind -> its class, and the type of what it has beside its bits.
OTHER_GRIDS: Mapping[str, tuple[type[LogSqrt2Spec | TwinSoftmaxSpec | TwinGeluSpec], str, type]] = {
    "log_sqrt2": (LogSqrt2Spec, "range", float),
    "twin_softmax": (TwinSoftmaxSpec, "split_exponent", int),
    "twin_gelu": (TwinGeluSpec, "range", float),
}
PREFIX = ("tokens", "heads", "key_width", "value_width")
LARGEST_PREFIX = 1 << 20  # entries of its keys or values
LARGEST_HEADS = 4096  # ranges of one grid
LARGEST_BLOCK, LARGEST_STEPS = 4096, 4096  # of a rotation in blocks
LARGEST_LEARNED = 1 << 15  # features of a learned rotation
LARGEST_LIST = 8 * LARGEST_ROTATION  # characters
NUMBERS = re.compile(r"(\d{1,7}( \d{1,7})*)?")
BLOCK_ROTATION = ("block", "seed", "first", "order", "second", "transposed")
LATELY = 8  # rotations among which an equal one is looked for: the layers that share one stand together
LAYOUTS = ("uniform",)
KINDS = ("linear", "conv1d", "conv2d", "grouped_conv2d", "embedding")
SCALE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
OBSERVERS = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class ManifestEntry:
    """One quantised module.

    Attributes:
        spec: how its weight is quantised.
        shape: (out, in); (tokens, features) of an embedding; (out, in / groups * kernel height * kernel width) of a
            convolution.
        kind: `linear`, `conv1d` (GPT-2), `conv2d` (of pictures, in one group), `grouped_conv2d` or `embedding`.
        layout: which tensors hold it.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    kind: str = "linear"
    layout: str = "uniform"


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint's `quantization_config`.

    Attributes:
        modules: full module path -> what it is.
        tied: path of a head -> path of the quantised embedding whose table it uses.
        provenance: where the numbers come from; free.
        files: name of a weight file -> its sha256, or empty when unknown.
        inputs: full module path -> what is done to what the module reads, while the model runs.
        outputs: full module path -> how what the module gives is rotated.
        attentions: full module path -> how the module rounds what it attends with.
        compensations: full path of a block -> the map beside it.
    """

    modules: Mapping[str, ManifestEntry]
    tied: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, InputScheme] = field(default_factory=dict)
    outputs: Mapping[str, StreamRotation] = field(default_factory=dict)
    attentions: Mapping[str, AttentionScheme] = field(default_factory=dict)
    compensations: Mapping[str, CompensationShape] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the dictionary that goes into config.json."""
        schemes: list[dict[str, Any]] = []
        modules = {}
        for name, entry in self.modules.items():
            scheme = {"layout": entry.layout, **spec_to_json(entry.spec)}
            if scheme not in schemes:
                schemes.append(scheme)
            modules[name] = {"scheme": schemes.index(scheme), "shape": list(entry.shape), "kind": entry.kind}
        inputs = {name: input_to_json(scheme) for name, scheme in self.inputs.items()}
        shared = _share_rotations_(inputs)
        config: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": self._version(bool(shared))}
        config |= {"schemes": schemes, "modules": modules, "tied": dict(self.tied)}
        if config["format_version"] >= VERSION_WITH_INPUTS:
            config["inputs"] = inputs
            config["outputs"] = {name: input_to_json(InputScheme(one)) for name, one in self.outputs.items()}
        if config["format_version"] >= VERSION_WITH_ATTENTION:
            config["attentions"] = {name: attention_to_json(one) for name, one in self.attentions.items()}
            config["rotations"] = shared
        if config["format_version"] >= VERSION_WITH_COMPENSATIONS:
            config["compensations"] = {name: one.to_json() for name, one in self.compensations.items()}
        config |= {"provenance": dict(self.provenance), "files": dict(self.files)}
        return config | {"seal": _seal(config)}

    def _version(self, shares: bool) -> int:
        """Return the oldest format version that holds all of this, so that older readers read what they can."""
        if self.compensations:
            return VERSION_WITH_COMPENSATIONS
        if self._came_with_grids():
            return VERSION_WITH_GRIDS
        static = any(isinstance(spec, ActivationSpec) and spec.ranges is not None for spec in self._activations())
        if static or any(one.prefix is not None for one in self.attentions.values()):
            return VERSION_WITH_RANGES
        if self.attentions or shares:
            return VERSION_WITH_ATTENTION
        return VERSION_WITH_INPUTS if self.inputs or self.outputs else FORMAT_VERSION

    def _came_with_grids(self) -> str:
        """Return in words what came with the fifth format version, or nothing."""
        rotations: list[AnyRotation | None] = [one.rotation for one in self.inputs.values()]
        rotations += [*(one.rotation for one in self.attentions.values()), *self.outputs.values()]
        if any(isinstance(one, LearnedRotation) or (isinstance(one, Rotation) and one.keeps_mean) for one in rotations):
            return "rotations that keep the mean or were learned"
        if any(not isinstance(spec, ActivationSpec) or spec.lows is not None for spec in self._activations()):
            return "ranges with zero points or grids that are not uniform"
        return ""

    def _activations(self) -> list[AnyRounding]:
        specs = [one.activations for one in self.inputs.values()]
        specs += [getattr(one, name) for one in self.attentions.values() for name in OPERANDS]
        return [spec for spec in specs if spec is not None]

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Manifest":
        """Read the dictionary back.

        Raises:
            CheckpointError: a key that is missing or has the wrong type, a layout or version that this release does not
                know, a scheme that is impossible, or a seal that differs.
        """
        version = _get(config, "format_version", int)
        if not FORMAT_VERSION <= version <= VERSION_LATEST:
            raise CheckpointError(
                f"quantization_config has format_version {version}, this release reads up to {VERSION_LATEST}; "
                f"load it with the release of bitmend that wrote it, or a newer one"
            )
        schemes = [_scheme_from_json(item) for item in _get(config, "schemes", list)]
        modules = {name: _entry_from_json(name, item, schemes) for name, item in _get(config, "modules", dict).items()}
        tied = _get(config, "tied", dict)
        for head, embedding in tied.items():
            if not isinstance(embedding, str) or embedding not in modules or modules[embedding].kind != "embedding":
                raise CheckpointError(f"quantization_config.tied ties {head!r} to {embedding!r}, which is no embedding")
        files = _get(config, "files", dict)
        if not all(isinstance(digest, str) for digest in files.values()):
            raise CheckpointError("quantization_config.files must map file names to sha256 digests")
        if "seal" in config and config["seal"] != _seal(config):
            raise CheckpointError(
                "schemes, modules or tied of quantization_config are not those that were written (their seal differs); copy "
                "config.json again"
            )
        inputs, outputs, attentions = {}, {}, {}
        if version >= VERSION_WITH_INPUTS:
            shared = _get(config, "rotations", list) if version >= VERSION_WITH_ATTENTION else []
            read = [block_rotation_from_json(one) for one in shared]
            inputs = {name: input_from_json(name, one, read) for name, one in _get(config, "inputs", dict).items()}
            schemes_out = {name: input_from_json(name, one) for name, one in _get(config, "outputs", dict).items()}
            for name, one in schemes_out.items():
                if not isinstance(one.rotation, (Rotation, LearnedRotation)) or one.activations is not None:
                    raise CheckpointError(
                        f"quantization_config.outputs[{name!r}] must hold a rotation and nothing else"
                    )
                outputs[name] = one.rotation
        if version >= VERSION_WITH_ATTENTION:
            tables = _get(config, "attentions", dict)
            attentions = {name: attention_from_json(name, one) for name, one in tables.items()}
        compensations = _compensations_of(config, version)
        provenance = _get(config, "provenance", dict)
        found = cls(modules, tied, provenance, files, inputs, outputs, attentions, compensations)
        found._refuse_older_version(version)
        return found

    def _refuse_older_version(self, version: int) -> None:
        """Refuse a version that does not know what was read."""
        needed = self._version(shares=False)
        if needed > version:
            what = self._came_with_grids() or "ranges or a prefix"
            raise CheckpointError(
                f"quantization_config has format_version {version}, but holds {what}, which came with {needed}; copy "
                "config.json again"
            )

    def with_files(self, files: Mapping[str, str]) -> "Manifest":
        """Return the same manifest with other checksums."""
        return replace(self, files=dict(files))


def quantization_config(
    sites: Mapping[str, ManifestEntry],
    *,
    tied: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    inputs: Mapping[str, InputScheme] | None = None,
    outputs: Mapping[str, StreamRotation] | None = None,
    attentions: Mapping[str, AttentionScheme] | None = None,
    compensations: Mapping[str, CompensationShape] | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint; the writer adds the checksums of the files.

    Args:
        sites: full module path -> what it is, in the order of the model.
        tied: path of a head -> path of the quantised embedding that it shares; only when the embedding is quantised.
        provenance: anything that JSON holds: recipe, versions, calibration hash.
        inputs: full module path -> what is done to what the module reads, while the model runs.
        outputs: full module path -> how what the module gives is rotated.
        attentions: full module path -> how the module rounds what it attends with.
        compensations: full path of a block -> the map beside it.
    """
    tables = (inputs or {}, outputs or {}, attentions or {}, compensations or {})
    return Manifest(sites, tied or {}, provenance or {}, {}, *tables).to_json()


def input_to_json(scheme: InputScheme) -> dict[str, Any]:
    """Return what is done to an input as plain JSON; what is not done is left out."""
    found: dict[str, Any] = {}
    if scheme.rotation is not None:
        found["rotation"] = _rotation_to_json(scheme.rotation)
    if scheme.activations is not None:
        found["activations"] = _activations_to_json(scheme.activations)
    return found


def input_from_json(name: str, item: Any, shared: Sequence[BlockRotation] = ()) -> InputScheme:
    """Return what `input_to_json` wrote.

    Args:
        name: of the module.
        item: the JSON.
        shared: rotations that are stored once for several modules.

    Raises:
        CheckpointError: a missing or unknown key, a wrong type or an impossible value; names the module.
    """
    where = f"what quantization_config does to activations at {name}"
    if not isinstance(item, dict) or not item or not set(item) <= {"rotation", "activations"}:
        raise CheckpointError(f"{where} must be a table of rotation or activations; got {item!r:.80}")
    rotation = _rotation_from_json(where, item, shared) if "rotation" in item else None
    return InputScheme(rotation, _activations_from_json(where, item, "activations") if "activations" in item else None)


def attention_to_json(scheme: AttentionScheme) -> dict[str, Any]:
    """Return how a module rounds what it attends with, as plain JSON; what is not done is left out."""
    found: dict[str, Any] = {} if scheme.rotation is None else {"rotation": _rotation_to_json(scheme.rotation)}
    specs = {name: getattr(scheme, name) for name in OPERANDS}
    found |= {name: _activations_to_json(spec) for name, spec in specs.items() if spec is not None}
    return found if scheme.prefix is None else found | {"prefix": asdict(scheme.prefix)}


def attention_from_json(name: str, item: Any) -> AttentionScheme:
    """Return what `attention_to_json` wrote.

    Raises:
        CheckpointError: a missing or unknown key, a wrong type or an impossible value; names the module.
    """
    where = f"what quantization_config does inside the attention {name}"
    if not isinstance(item, dict) or not item or not set(item) <= {"rotation", "prefix", *OPERANDS}:
        raise CheckpointError(f"{where} must be a table of rotation, prefix, {', '.join(OPERANDS)}; got {item!r:.80}")
    rotation = _rotation_from_json(where, item) if "rotation" in item else None
    if rotation is not None and not isinstance(rotation, Rotation):
        raise CheckpointError(f"{where} must rotate heads by size and seed; got {item['rotation']!r:.80}")
    specs: dict[str, Any] = {key: _activations_from_json(where, item, key) for key in OPERANDS if key in item}
    for key, spec in specs.items():
        if key != "probabilities" and not isinstance(spec, ActivationSpec):
            raise CheckpointError(f"{where} must round {key} on a uniform grid; got {item[key]!r:.80}")
    prefix = _prefix_from_json(where, item) if "prefix" in item else None
    return AttentionScheme(rotation, prefix=prefix, **specs)


def compensation_from_json(name: str, item: Any) -> CompensationShape:
    """Return the map beside a block as `CompensationShape.to_json` wrote it.

    Raises:
        CheckpointError: a missing or unknown key, a wrong type or an impossible value; names the block.
    """
    where = f"the map of quantization_config beside {name}"
    known = {field.name: field.type for field in fields(CompensationShape)}
    if not isinstance(item, dict) or set(item) != set(known):
        raise CheckpointError(f"{where} must say {', '.join(known)}; got {item!r:.80}")
    structure = _get(item, "structure", str)
    numbers = {key: _get(item, key, int) for key in ("inputs", "outputs", "rank", "groups", "stride")}
    flags = {key: _get(item, key, bool) for key in ("channels_first", "clamped")}
    inputs, outputs, rank, groups, stride = numbers.values()
    possible = min(inputs, outputs) >= 1 and max(inputs, outputs) <= LARGEST_COMPENSATED and 1 <= stride <= inputs + 8
    ranked = 1 <= rank <= min(inputs, outputs) if structure == "low_rank" else rank == 0
    grouped = groups >= 1 and inputs % groups == outputs % groups == 0 if structure == "block_diagonal" else groups == 1
    same = inputs == outputs or flags["channels_first"]
    if structure not in STRUCTURES or not (possible and ranked and grouped and same):
        raise CheckpointError(f"{where} is impossible; got {item!r:.200}")
    return CompensationShape(structure, **numbers, **flags)


def _compensations_of(config: Mapping[str, Any], version: int) -> dict[str, CompensationShape]:
    found = _get(config, "compensations", dict) if version >= VERSION_WITH_COMPENSATIONS else {}
    return {name: compensation_from_json(name, one) for name, one in found.items()}


def _prefix_from_json(where: str, item: Mapping[str, Any]) -> PrefixShape:
    about = _get(item, "prefix", dict)
    if set(about) != set(PREFIX):
        raise CheckpointError(f"{where} must say {', '.join(PREFIX)} of a prefix; got {about!r:.80}")
    shape = PrefixShape(**{key: _get(about, key, int) for key in PREFIX})
    entries = [math.prod(sides) for sides in shape.shapes.values()]
    if min(asdict(shape).values()) < 1 or max(entries) > LARGEST_PREFIX:
        raise CheckpointError(f"{where} must have a prefix of 1 to {LARGEST_PREFIX} numbers; got {about!r:.80}")
    return shape


def _rotation_to_json(rotation: AnyRotation) -> dict[str, Any]:
    if isinstance(rotation, LearnedRotation):
        start = replace(rotation.base, transposed=rotation.transposed)
        return {**_rotation_to_json(start), "holder": rotation.holder}
    if isinstance(rotation, Rotation):
        about = asdict(rotation)
        if not rotation.keeps_mean:  # as folders of version 2 have it
            del about["keeps_mean"]
        return about
    found = {key: getattr(rotation, key) for key in BLOCK_ROTATION}
    # As text: config.json is written with one number a line, which would take three times as much.
    return {key: " ".join(map(str, value)) if isinstance(value, tuple) else value for key, value in found.items()}


def block_rotation_from_json(item: Any) -> BlockRotation:
    """Return a rotation in blocks as `input_to_json` wrote it.

    Raises:
        CheckpointError: a missing or unknown key, a wrong type or an impossible value.
    """
    where = "a rotation of quantization_config"
    if not isinstance(item, dict) or set(item) != set(BLOCK_ROTATION):
        raise CheckpointError(f"{where} must say {', '.join(BLOCK_ROTATION)}; got {item!r:.80}")
    texts = [_get(item, key, str) for key in ("first", "order", "second")]
    if not all(len(text) <= LARGEST_LIST and NUMBERS.fullmatch(text) for text in texts):
        raise CheckpointError(f"{where} must list whole numbers below 10^7 with a space between two; got {item!r:.80}")
    first, order, second = (tuple(map(int, text.split())) for text in texts)
    block, seed = _get(item, "block", int), _get(item, "seed", int)
    if not 1 <= block <= LARGEST_BLOCK or max(len(first), len(second)) > LARGEST_STEPS or seed < 0:
        raise CheckpointError(
            f"{where} must have blocks of 1 to {LARGEST_BLOCK}, at most {LARGEST_STEPS} steps and a seed of 0 or more; got "
            f"{item!r:.80}"
        )
    try:
        return BlockRotation(block, seed, first, order, second, _get(item, "transposed", bool))
    except ValueError as error:
        raise CheckpointError(f"{where} is impossible: {error}") from error


def _share_rotations_(inputs: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the number of a rotation in blocks in its place, and return those rotations, equal ones of neighbours once."""
    shared: list[dict[str, Any]] = []
    for scheme in inputs.values():
        rotation = scheme.get("rotation", {})
        if "order" not in rotation:
            continue
        start = max(0, len(shared) - LATELY)
        if rotation not in shared[start:]:
            shared.append(rotation)
        scheme["rotation"] = {"shared": shared.index(rotation, start)}
    return shared


def _rotation_from_json(where: str, item: Mapping[str, Any], shared: Sequence[BlockRotation] = ()) -> AnyRotation:
    about = _get(item, "rotation", dict)
    if "order" in about:
        return block_rotation_from_json(about)
    if "shared" in about:
        place = _get(about, "shared", int)
        if not 0 <= place < len(shared):
            raise CheckpointError(f"{where} names rotation {place}, but there are {len(shared)}")
        return shared[place]
    seed, sides = about.get("seed"), (_get(about, "size", int), _get(about, "inner", int))
    usual = {"size", "seed", "inner", "transposed"}
    if set(about) - {"keeps_mean", "holder"} != usual or not (seed is None or type(seed) is int):
        raise CheckpointError(f"{where} must say size, seed, inner and transposed of a rotation; got {about!r:.80}")
    if not all(1 <= side <= LARGEST_ROTATION for side in sides):
        raise CheckpointError(f"{where} must rotate 1 to {LARGEST_ROTATION} features; got {sides[0]} x {sides[1]}")
    if "holder" in about and sides[0] > LARGEST_LEARNED:
        raise CheckpointError(f"{where} must have learned at most {LARGEST_LEARNED} features; got {sides[0]}")
    keeps_mean = _get(about, "keeps_mean", bool) if "keeps_mean" in about else False
    transposed = _get(about, "transposed", bool)
    try:
        if "holder" not in about:
            return Rotation(sides[0], seed, sides[1], transposed, keeps_mean)
        start = Rotation(sides[0], seed, sides[1], keeps_mean=keeps_mean)
        return LearnedRotation(start, _not_loaded, transposed, _get(about, "holder", str))
    except ValueError as error:
        raise CheckpointError(f"{where} is impossible: {error}") from error


def _not_loaded() -> Tensor:
    raise CheckpointError("the codes of a learned rotation lie in the weight files; load the model")


def _activations_to_json(spec: AnyRounding) -> dict[str, Any]:
    found = asdict(spec)
    if not isinstance(spec, ActivationSpec):
        if None in found.values():
            raise RequestError("static ranges must be found before they are stored, but there are none yet")
        return {"kind": next(kind for kind, (grid, _, _) in OTHER_GRIDS.items() if grid is type(spec)), **found}
    if spec.scale_bits == UNKEPT_SCALE_BITS:  # as folders of version 2 have it
        del found["scale_bits"]
    if spec.ranges is None:
        del found["ranges"]
    elif not spec.ranges:
        raise RequestError("static ranges must be found before they are stored, but there are none yet")
    else:
        found["ranges"] = list(spec.ranges)
    if spec.lows is None:
        del found["lows"]
    else:
        found["lows"] = list(spec.lows)
    return found


def _activations_from_json(where: str, item: Mapping[str, Any], key: str) -> AnyRounding:
    about = _get(item, key, dict)
    kind = _get(about, "kind", str) if "kind" in about else UNIFORM
    if kind == UNIFORM:
        return _uniform_from_json(where, about)
    if kind not in OTHER_GRIDS:
        raise CheckpointError(
            f"{where} has a grid of the kind {kind!r:.80}, this release reads {', '.join((UNIFORM, *OTHER_GRIDS))}; load it "
            "with a newer bitmend"
        )
    grid, extra, of_type = OTHER_GRIDS[kind]
    if set(about) != {"kind", "bits", extra}:
        raise CheckpointError(f"{where} must say kind, bits and {extra} of a grid; got {about!r:.80}")
    try:
        return grid(_get(about, "bits", int), _get(about, extra, of_type))
    except RecipeError as error:
        raise CheckpointError(f"{where} is impossible: {error}") from error


def _uniform_from_json(where: str, about: Mapping[str, Any]) -> ActivationSpec:
    keys = (_get(about, "bits", int), _get(about, "symmetric", bool), _get(about, "group_size", int))
    scale_bits = _get(about, "scale_bits", int) if "scale_bits" in about else UNKEPT_SCALE_BITS
    ranges, lows = (_ends_from_json(where, about, end) for end in ("ranges", "lows"))
    try:
        return ActivationSpec(*keys, _get(about, "clip_ratio", float), scale_bits, ranges, lows)
    except RecipeError as error:
        raise CheckpointError(f"{where} is impossible: {error}") from error


def _ends_from_json(where: str, about: Mapping[str, Any], key: str) -> tuple[float, ...] | None:
    if key not in about:
        return None
    ends = tuple(_get(about, key, list))
    if not 1 <= len(ends) <= LARGEST_HEADS or not all(type(value) is float for value in ends):
        raise CheckpointError(f"{where} must have 1 to {LARGEST_HEADS} {key}, numbers; got {about!r:.80}")
    return ends


def spec_to_json(spec: QuantSpec) -> dict[str, Any]:
    """Return a scheme as plain JSON; `group_size` is -1 for one scale per output channel, 0 for one in all.

    Raises:
        RequestError: a granularity of activations, or a scale type that no reader knows.
    """
    granularity = spec.granularity
    if isinstance(granularity, PerToken):
        raise RequestError("weights have one scale per tensor, per output channel or per group; got one per token")
    scale_dtype = str(spec.scale_dtype).removeprefix("torch.")
    if scale_dtype not in SCALE_DTYPES:
        raise RequestError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}; got {scale_dtype}")
    group_size, ragged = (-1 if isinstance(granularity, PerChannel) else 0), False
    if isinstance(granularity, PerGroup):
        group_size, ragged = granularity.size, granularity.ragged
    return {
        "bits": spec.grid.bits,
        "symmetric": spec.grid.symmetric,
        "group_size": group_size,
        "ragged": ragged,
        "scale_dtype": scale_dtype,
        "observer": spec.observer,
    }


def spec_from_json(scheme: Mapping[str, Any]) -> QuantSpec:
    """Return the scheme that `spec_to_json` wrote.

    Raises:
        CheckpointError: a missing key, a wrong type or an impossible value.
    """
    scale_dtype = _get(scheme, "scale_dtype", str)
    observer = _get(scheme, "observer", str)
    group_size, ragged = _get(scheme, "group_size", int), _get(scheme, "ragged", bool)
    if scale_dtype not in SCALE_DTYPES or observer not in OBSERVERS or group_size < -1:
        raise CheckpointError(
            f"a scheme of quantization_config has scale_dtype {scale_dtype!r}, observer {observer!r} and group_size "
            f"{group_size}; known are {', '.join(SCALE_DTYPES)}; {', '.join(OBSERVERS)}; and -1, 0 or more"
        )
    granularity = PerTensor() if group_size == 0 else PerChannel() if group_size < 0 else PerGroup(group_size, ragged)
    try:
        grid = UniformGrid(_get(scheme, "bits", int), _get(scheme, "symmetric", bool))
    except RecipeError as error:
        raise CheckpointError(f"a scheme of quantization_config is impossible: {error}") from error
    return QuantSpec(grid, granularity, observer, SCALE_DTYPES[scale_dtype])


def _seal(config: Mapping[str, Any]) -> str:
    sealed = [config["schemes"], config["modules"], config["tied"]]
    sealed += [
        config[key] for key in ("inputs", "outputs", "attentions", "rotations", "compensations") if key in config
    ]
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def _scheme_from_json(item: Any) -> tuple[str, QuantSpec]:
    if not isinstance(item, dict):
        raise CheckpointError(f"each of quantization_config.schemes must be a table; got {item!r:.80}")
    layout = _get(item, "layout", str)
    if layout not in LAYOUTS:
        raise CheckpointError(
            f"quantization_config uses the layout {layout!r}, this release reads {', '.join(LAYOUTS)}; "
            f"load it with a newer bitmend"
        )
    return layout, spec_from_json(item)


def _entry_from_json(name: str, item: Any, schemes: list[tuple[str, QuantSpec]]) -> ManifestEntry:
    if not isinstance(item, dict):
        raise CheckpointError(f"quantization_config.modules[{name!r}] must be a table; got {item!r:.80}")
    scheme, shape, kind = _get(item, "scheme", int), _get(item, "shape", list), _get(item, "kind", str)
    if not 0 <= scheme < len(schemes):
        raise CheckpointError(f"{name} uses scheme {scheme} of quantization_config, which has {len(schemes)}")
    if len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape):
        raise CheckpointError(f"the shape of {name} in quantization_config must be [out, in]; got {shape!r:.80}")
    if kind not in KINDS:
        raise CheckpointError(f"{name} is of kind {kind!r} in quantization_config; known: {', '.join(KINDS)}")
    layout, spec = schemes[scheme]
    return ManifestEntry(spec, (shape[0], shape[1]), kind, layout)


def _get(table: Mapping[str, Any], key: str, kind: type) -> Any:
    value = table.get(key)
    if type(value) is not kind:  # exactly: in Python, True is an int
        what = "nothing" if value is None else f"{value!r:.80}"
        raise CheckpointError(f"quantization_config needs {key!r} to be of type {kind.__name__}; got {what}")
    return value
