"""A quantised checkpoint as what a repair starts from: its codes, and everything else, piece by piece.

bitmend's own format, and those of other tools (`quantized_folder.py`), whose codes are taken over as they are: same levels,
same scales, packed in our layout. What our layout cannot hold is refused: groups that are not neighbouring columns (act-order
with groups of its own), and negative scales.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from bitmend.errors import CheckpointError, RequestError
from bitmend.formats.affine import AffineWeight, PackedLayer
from bitmend.formats.integrity import check_files, read_config, weight_files
from bitmend.formats.manifest import QUANT_METHOD, Manifest, ManifestEntry
from bitmend.formats.native import read_site
from bitmend.formats.quantized_folder import OLD_GPTQ_CONFIG, QuantizedFolder, read_quantized
from bitmend.formats.safetensors_file import StoredTensors
from bitmend.linalg.learned_rotation import LearnedRotation
from bitmend.numerics.granularity import Granularity, PerChannel, PerGroup
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.protocols import Event
from bitmend.runtime.packed import SCALE, WORDS, ZERO_WORDS


@dataclass(frozen=True)
class StoredModel:
    """A quantised checkpoint, opened.

    Attributes:
        folder: where it lies.
        format: `bitmend`, `gptq`, `gptq_v2`, `awq` or `compressed-tensors`.
        manifest: of bitmend's own format; of others one without modules.
        modules: full paths of the quantised modules.
        events: what the user must be told.
    """

    folder: Path
    format: str
    manifest: Manifest
    modules: tuple[str, ...]
    events: tuple[Event, ...]
    _tensors: Mapping[str, Tensor]
    _layers: Mapping[str, PackedLayer] = field(default_factory=dict)

    def qtensor(self, name: str) -> QTensor:
        """Return the quantised weight of one module.

        Raises:
            CheckpointError: it is damaged.
            RequestError: of another tool's format, and nothing that our layout holds.
        """
        if name in self._layers:
            return _as_qtensor(name, self._layers[name].bits, self._layers[name].read(self._tensors))
        return read_site(self._tensors, name, self.manifest.modules[name])

    def kind(self, name: str) -> str:
        """Return how the model holds a module."""
        return self.manifest.modules[name].kind if name in self.manifest.modules else "linear"

    def others(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield those of the tensors that are no part of a quantised weight."""
        for name in names:
            if not self._is_part(name):
                yield name, self._tensors[name]

    def names_under(self, prefix: str) -> list[str]:
        """Return the names of all tensors of a module, of its quantised ones, too."""
        return [name for name in self._tensors if name.startswith(f"{prefix}.")]

    def names_outside(self, prefixes: Iterable[str]) -> list[str]:
        """Return the names of all tensors that are in none of these modules."""
        starts = tuple(f"{prefix}." for prefix in prefixes)
        return [name for name in self._tensors if not name.startswith(starts)]

    def _is_part(self, key: str) -> bool:
        name, _, leaf = key.rpartition(".")
        if name in self._layers:
            return leaf in self._layers[name].parts
        return name in self.manifest.modules and leaf in (WORDS, SCALE, ZERO_WORDS)


def open_stored(folder: Path) -> StoredModel:
    """Check a quantised checkpoint and open it.

    Raises:
        CheckpointError: files that are cut short, altered or inconsistent, or a format that is not known.
        RequestError: bitmend's own format with something that a map beside a block cannot be fitted to.

    Cost: of bitmend's own format reads every byte once, for the checksums.
    """
    described = read_config(folder).get("quantization_config")
    if described is None and not (folder / OLD_GPTQ_CONFIG).is_file():
        raise RequestError(
            f"{folder} is not quantised: its config.json has no quantization_config; give the quantised model here, and the "
            "one that it was made from as the reference"
        )
    if not isinstance(described, dict) or described.get("quant_method") != QUANT_METHOD:
        other: QuantizedFolder = read_quantized(folder)
        return StoredModel(
            folder,
            other.format,
            Manifest({}),
            tuple(other.layers),
            other.events,
            StoredTensors(weight_files(folder)),
            other.layers,
        )
    manifest = Manifest.from_json(described)
    _refuse_what_moves_the_basis(folder, manifest)
    files = weight_files(folder)
    check_files(files, manifest)
    return StoredModel(folder, QUANT_METHOD, manifest, tuple(manifest.modules), (), StoredTensors(files))


def _refuse_what_moves_the_basis(folder: Path, manifest: Manifest) -> None:
    """Refuse models whose states between blocks are not those of the reference."""
    if manifest.compensations:
        raise RequestError(f"{folder} has maps beside its blocks already; give the model without them")
    learned = any(isinstance(scheme.rotation, LearnedRotation) for scheme in manifest.inputs.values())
    prefix = any(scheme.prefix is not None for scheme in manifest.attentions.values())
    if manifest.outputs or learned or prefix:
        raise RequestError(
            f"{folder} rotates its residual stream or has a prefix, so that its states are not those of the reference; put "
            "[[compensators]] into the recipe that quantises it"
        )


def _as_qtensor(name: str, bits: int, weight: AffineWeight) -> QTensor:
    """Return codes of another tool in our layout, with the same values."""
    if weight.group is not None:
        raise RequestError(
            f"the columns of {name} are not grouped with their neighbours (act-order), which bitmend's layout does not hold; "
            "give a model whose groups are static"
        )
    if bool((weight.scale <= 0).any()):
        raise RequestError(f"{name} has scales that are not positive, which bitmend's layout does not hold")
    columns, groups = weight.codes.shape[1], weight.scale.shape[1]
    granularity: Granularity = PerChannel() if groups == 1 else PerGroup(columns // groups)
    spec = QuantSpec(UniformGrid(bits, weight.zero_point is None), granularity, "minmax", weight.scale.dtype)
    zero_point = None if weight.zero_point is None else weight.zero_point.float()
    qtensor = QTensor(weight.codes, QParams(weight.scale.float(), zero_point), spec)
    if zero_point is not None and not bool(
        ((zero_point >= spec.grid.min_code) & (zero_point <= spec.grid.max_code)).all()
    ):
        raise CheckpointError(f"{name} has zero points that are no codes of {bits} bits; write the file again")
    return qtensor


def entry_for(model: StoredModel, name: str, qtensor: QTensor, kind: str) -> ManifestEntry:
    """Return the line of a manifest for one module, as it will be written."""
    if name in model.manifest.modules:
        return model.manifest.modules[name]
    out, columns = qtensor.codes.shape
    return ManifestEntry(qtensor.spec, (out, columns), kind)
