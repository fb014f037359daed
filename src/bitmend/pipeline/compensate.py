"""Maps beside the blocks of a model that is quantised already, by bitmend or by another tool.

The codes stay as they are. Both networks are run block by block, as when a model is quantised: the reference, from which
the quantised model was made, is read block by block from its folder; its weights are then overwritten with what the
quantised checkpoint holds. The result is a folder in bitmend's own format.

A run that is stopped leaves nothing and is started again: a fit takes a few passes over the calibration rows.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmend.calibrate.dual_stream import BlockRun, DualStream
from bitmend.compensation import Compensation, CompensationShape
from bitmend.errors import ModelError, NumericsError, RequestError
from bitmend.formats.manifest import ManifestEntry, quantization_config
from bitmend.formats.native import compensation_tensors, site_tensors
from bitmend.formats.stored_model import StoredModel, entry_for, open_stored
from bitmend.formats.writer import CheckpointWriter, check_output
from bitmend.models.attention import attach_attention
from bitmend.models.find import find_adapter
from bitmend.models.loading import resolve_model
from bitmend.online import attach_input
from bitmend.pipeline.calibration_rows import Rows, batches_of, draw_calibration
from bitmend.pipeline.compensating import Compensating, final_maps_
from bitmend.pipeline.machine import peak_memory_bytes, return_free_memory
from bitmend.pipeline.recipe import Recipe, parse_recipe
from bitmend.pipeline.run import choose_device, how_to_load, versions, write_report
from bitmend.protocols import BlockReport, ModelAdapter, Progress, RunReport, SilentProgress
from bitmend.sites import Block

DEFAULT = "qwt"
# Two unrelated streams of the same size differ by twice their energy; what rounding does to one block stays far below.
UNRELATED = 1.0
# What rounding to another 16-bit type, and to few bits, may change of the embedding: it is the same in both models.
ROUNDED, EIGHT_BITS = 0.01, 0.1


def compensate(
    model: str | Path,
    reference: str | Path,
    calibration: Sequence[str | Path] | Rows,
    *,
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> RunReport:
    """Put maps beside the blocks of a quantised model that predict what it has lost, and write it to a new folder.

    Args:
        model: the folder of the quantised model: bitmend's own format, compressed-tensors, GPTQ or AWQ.
        reference: folder or hub name of the model that it was made from.
        calibration: text files, JSON lines, token arrays or `hf:` names; pictures for models of pictures.
        output: the folder to be; None: `./MODEL-qwt`.
        overrides: keys of the compensator (`{"structure": "full"}`), and of calibration with their section
            (`{"calibration.sequences": 64}`).
        overwrite: replace an existing output folder.
        device: `auto`, `cpu` or `cuda`.
        trust_remote_code: let transformers run code that comes with the reference.
        progress: where progress is shown; None shows nothing.

    Returns:
        The report that is also written to `run.json`.

    Raises:
        RequestError: the request cannot be carried out, or the reference is not what the model was made from; nothing was
            written.
        CheckpointError: the quantised model is damaged.
        NumericsError: NaN or Inf on the way.

    The verdict over the whole model sends all states through the head of the quantised model.

    Cost: for each block two passes of all rows in full precision (one with `target = "trajectory"`, the default) and one in
    the quantised network, beside the fit.
    """
    started = time.perf_counter()
    progress = progress or SilentProgress()
    recipe = _recipe(overrides or {})
    folder = resolve_model(model)
    stored = open_stored(folder)
    adapter = find_adapter(reference, device=choose_device(device), trust_remote_code=trust_remote_code)
    target = Path(output) if output is not None else Path(f"{folder.resolve().name}-{DEFAULT}")
    for source in (folder, adapter.folder):  # neither must be overwritten
        check_output(source, target, overwrite)
    rows = draw_calibration(recipe, adapter, calibration, progress)
    if rows is None:
        raise RequestError("a map is fitted to calibration rows, but none came; pass --calibration FILE")
    report = RunReport(
        model=str(model),
        recipe=recipe.model_dump(exclude_none=True),
        versions=versions(),
        calibration=rows.summary(),
        events=list(stored.events),
        output=str(target),
    )
    with CheckpointWriter(folder, target, overwrite) as writer:
        run = _Run(stored, adapter, recipe, report, writer)
        run.blocks_(batches_of(rows, adapter), progress)
        run.outside_()
        report.seconds["total"] = time.perf_counter() - started
        report.peak_memory_bytes = peak_memory_bytes()
        report.status = "done"
        maps, without = final_maps_(report, run.compensations)
        writer.finish(
            run.config(maps),
            {"recipe.toml": recipe.to_toml(), "README.md": how_to_load(adapter)},
            check=lambda made: write_report(made, report),
            without=without,
        )
    return report


def _recipe(overrides: Mapping[str, Any]) -> Recipe:
    """Return a recipe that holds the compensator and how rows are drawn; its solver does nothing here.

    Raises:
        RecipeError: a key that neither has.
    """
    part: dict[str, Any] = {"name": DEFAULT}
    calibration: dict[str, Any] = {}
    for key, value in overrides.items():
        section, _, last = key.rpartition(".")
        if section == "calibration":
            calibration[last] = value
        elif section in ("", "compensator"):
            part[last] = value
        else:
            raise RequestError(f"compensate has keys of the compensator and of calibration only; got {key!r}")
    return parse_recipe(
        {"name": "compensate", "solver": {"name": "rtn"}, "compensators": [part], "calibration": calibration}
    )


class _Run:
    """One pass through all blocks.

    Attributes:
        compensations: the map beside each block that has one.
    """

    def __init__(
        self, stored: StoredModel, adapter: ModelAdapter, recipe: Recipe, report: RunReport, writer: CheckpointWriter
    ) -> None:
        self._stored, self._adapter, self._report, self._writer = stored, adapter, report, writer
        self._compensating = Compensating(adapter, recipe.build_compensator())
        self._entries: dict[str, ManifestEntry] = {}
        self._provenance = {"base": stored.format, "compensator": (recipe.compensators or [{}])[0]}
        self._known = False  # whether the states of both have been compared
        self.compensations: dict[str, Compensation] = {}
        # Which block each module belongs to that something is done to; "" where it is none.
        described = (*stored.modules, *stored.manifest.inputs, *stored.manifest.attentions)
        self._block_of = {name: _outer(name, adapter.block_names) for name in described}
        modules = dict(adapter.model.named_modules())
        unknown = [name for name in self._modules_of("") if name not in modules]
        if unknown:
            raise _mismatch(f"the quantised model has {unknown[0]}, which the reference lacks")

    def _modules_of(self, block: str) -> list[str]:
        """Return the quantised modules of a block; of "" those around the blocks."""
        return [name for name in self._stored.modules if self._block_of[name] == block]

    # ------------------------------------------------------------------------------------------ blocks
    def blocks_(self, batches: Sequence[Any], progress: Progress) -> None:
        """Take both streams through all blocks, fit what stands beside them, and write each."""
        adapter = self._adapter
        if self._stored.manifest.attentions:
            adapter.prepare_attention_()
        device = next((one.device for _, one in adapter.outside_tensors()), torch.device("cpu"))
        streams = DualStream(adapter, batches, device=device)
        try:
            self._take_ends_()
            for position, batch in enumerate(streams.batches):
                streams.x_q.replace_(position, adapter.block_inputs(batch.tokens).hidden)
            names = adapter.block_names
            for index in progress.track(range(len(names)), "fitting maps", len(names)):
                self._block_(index, streams)
                adapter.release_block(index)
                return_free_memory()
            judged, told = self._compensating.judge(streams)
            self._report.blocks[-1].compensation |= {"model": judged} if judged else {}
            self._report.events += told
        finally:
            streams.close()
            self._compensating.close()

    def _block_(self, index: int, streams: DualStream) -> None:
        started = time.perf_counter()
        adapter = self._adapter
        adapter.load_block(index)
        block = adapter.describe_block(index, adapter.few_rows())
        report = BlockReport(block.name)
        self._report.blocks.append(report)
        run = BlockRun(streams, block, keep_inputs=False)
        self._compensating.before_(block, streams, nullcontext())
        tensors = self._overwrite_(block)
        with self._rounding(block):
            compensation, events = self._compensating.finish_(block, run, streams, report)
        self._report.events += events
        error = report.compensation.get("error_without", report.relative_error)
        if error is None or not math.isfinite(error):
            raise NumericsError(f"the output of {block.name} must be finite, but holds NaN or Inf; nothing was saved")
        if error > UNRELATED and not self._known:
            raise _mismatch(f"behind {block.name} their states have nothing in common (relative error {error:.2g})")
        self._known = self._known or bool(block.sites)
        if compensation is not None:
            self.compensations[block.name] = compensation
            tensors |= compensation_tensors(block.name, compensation)
        report.seconds = time.perf_counter() - started
        self._writer.add(block.name, tensors)

    @torch.no_grad()
    def _overwrite_(self, block: Block) -> dict[str, Tensor]:
        """Make of a block of the reference the block that the quantised checkpoint holds; return all it holds of it."""
        stored, adapter = self._stored, self._adapter
        sites = {site.name: site for site in block.sites}
        found: dict[str, Tensor] = {}
        state = block.module.state_dict()
        missing = {f"{block.name}.{name}" for name in state}
        for name in self._modules_of(block.name):
            if name not in sites:
                raise _mismatch(f"the quantised model has {name}, which is no layer of the reference")
            qtensor = stored.qtensor(name)
            if tuple(qtensor.codes.shape) != sites[name].shape:
                raise _mismatch(f"{name} has the shape {tuple(qtensor.codes.shape)}, there {sites[name].shape}")
            sites[name].store_(block.module, qtensor.dequantize(adapter.dtype))
            self._entries[name] = entry_for(stored, name, qtensor, sites[name].kind)
            found |= site_tensors(name, qtensor)
            missing.discard(f"{name}.weight")
        for name, tensor in stored.others(stored.names_under(block.name)):
            place = state.get(name.removeprefix(f"{block.name}."))
            if place is None or place.shape != tensor.shape:
                raise _mismatch(
                    f"the quantised model has {name} of shape {tuple(tensor.shape)}, and the reference has not"
                )
            place.copy_(tensor)
            found[name] = tensor
            missing.discard(name)
        if missing:
            raise _mismatch(f"the reference has {min(missing)}, which the quantised model lacks")
        return found

    @contextmanager
    def _rounding(self, block: Block) -> Iterator[None]:
        """Round and rotate what the block's layers read, as the quantised model does."""
        manifest = self._stored.manifest
        with ExitStack() as attached:
            for name, scheme in manifest.inputs.items():
                if self._block_of[name] == block.name:
                    module = block.module.get_submodule(name.removeprefix(block.name).lstrip("."))
                    attached.callback(attach_input(module, scheme).remove)
            for name, attention in manifest.attentions.items():
                if self._block_of[name] == block.name:
                    module = block.module.get_submodule(name.removeprefix(block.name).lstrip("."))
                    attached.callback(attach_attention(module, attention))
            yield

    # ------------------------------------------------------------------------------------------ around the blocks
    @torch.no_grad()
    def _take_ends_(self) -> None:
        """Overwrite what lies around the blocks of the reference with what the quantised checkpoint holds."""
        stored, adapter = self._stored, self._adapter
        state = adapter.model.state_dict()
        missing = {name for name, _ in adapter.outside_tensors()}
        for name in self._modules_of(""):
            missing.discard(f"{name}.weight")
            table = adapter.model.get_submodule(name).get_parameter("weight")
            weight = stored.qtensor(name).dequantize(adapter.dtype)
            if table.shape != weight.shape:
                raise _mismatch(f"{name} has the shape {tuple(weight.shape)}, there {tuple(table.shape)}")
            if name == adapter.embedding_name and _differ(table, weight, EIGHT_BITS):
                raise _mismatch(f"their {name} differ")
            table.copy_(weight)
        for name, tensor in stored.others(stored.names_outside(adapter.block_names)):
            place = state.get(name)
            if place is None or place.shape != tensor.shape:
                raise _mismatch(
                    f"the quantised model has {name} of shape {tuple(tensor.shape)}, and the reference has not"
                )
            if name == f"{adapter.embedding_name}.weight" and _differ(place, tensor, ROUNDED):
                raise _mismatch(f"their {name} differ")
            place.copy_(tensor)
            missing.discard(name)
        if missing:
            raise _mismatch(f"the reference has {min(missing)}, which the quantised model lacks")

    def outside_(self) -> None:
        """Write what lies around the blocks, as it is."""
        stored = self._stored
        tensors = dict(stored.others(stored.names_outside(self._adapter.block_names)))
        for name in self._modules_of(""):
            qtensor = stored.qtensor(name)
            self._entries[name] = entry_for(stored, name, qtensor, stored.kind(name))
            tensors |= site_tensors(name, qtensor)
        self._writer.add("outside", tensors)

    def config(self, maps: Mapping[str, CompensationShape]) -> dict[str, Any]:
        """Return the `quantization_config` of the result, with these maps beside its blocks."""
        manifest = self._stored.manifest
        order = {name: place for place, name in enumerate(self._stored.modules)}
        entries = dict(sorted(self._entries.items(), key=lambda item: order[item[0]]))
        return quantization_config(
            entries,
            tied=manifest.tied,
            provenance={**manifest.provenance, **self._provenance},
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            attentions=manifest.attentions,
            compensations=maps,
        )


def _outer(name: str, blocks: Sequence[str]) -> str:
    """Return the block that a module is or lies in, or nothing."""
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), "")


def _differ(one: Tensor, other: Tensor, allowed: float) -> bool:
    """Return whether two tables differ by more than rounding explains, relative to their size."""
    difference = (one.float() - other.float()).norm()
    return bool(difference > allowed * one.float().norm())


def _mismatch(what: str) -> ModelError:
    return ModelError(
        f"the reference is not the model that the quantised one was made from: {what}; give the right one"
    )
