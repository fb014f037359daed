"""One run from a model folder to a smaller model folder: check the request, calibrate, quantise, write, report."""

import json
import math
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bitmend.compensation import Compensation
from bitmend.errors import (
    GuardError,
    OutputError,
    QuantizationError,
    RequestError,
    ResumeError,
)
from bitmend.formats.ledger import ledger
from bitmend.formats.manifest import ManifestEntry, quantization_config
from bitmend.formats.writer import PARTS, CheckpointWriter, check_output, partial_folder
from bitmend.models.find import find_adapter
from bitmend.models.loading import CAUSAL_LM, resolve_model
from bitmend.online import AttentionScheme, InputScheme
from bitmend.pipeline.calibration_rows import Rows, batches_of, draw_calibration, expected_batches
from bitmend.pipeline.compensating import final_maps_
from bitmend.pipeline.ends import check_ends, quantise_ends
from bitmend.pipeline.fingerprint import fingerprint_of
from bitmend.pipeline.forecast import BatchShape
from bitmend.pipeline.image_defaults import with_image_defaults
from bitmend.pipeline.machine import peak_memory_bytes
from bitmend.pipeline.plan import (
    Baseline,
    Plan,
    batch_shapes,
    gather_facts,
    limits_at,
    rates_for,
    settle,
    timed,
)
from bitmend.pipeline.quantize import quantise_blocks
from bitmend.pipeline.recipe import Recipe, load_recipe
from bitmend.pipeline.recipe_fits import check_recipe_fits
from bitmend.pipeline.resume import Journal, check_partial, entry_of, finished_run, has_learned, remove_leftovers
from bitmend.pipeline.transforming import Transforms
from bitmend.protocols import Batch, ModelAdapter, Progress, RunReport, SilentProgress

DEGRADED_SHARE = 0.05
ACTIVATIONS = "activations"
# transformers skips a format that it does not know: it warns, and fills the quantised layers with random numbers.
HOW_TO_LOAD = """This model was quantised with bitmend. Import bitmend before it is loaded, else transformers leaves its
quantised layers random:

    import bitmend
    from transformers import {loader}

    model = {loader}.from_pretrained("this folder")

{export}What was done stands in recipe.toml and run.json; where each byte went, in ledger.json.
"""
EXPORT = "`bitmend export --format compressed-tensors` writes a folder that loads without bitmend. "


def quantize(
    model: str | Path,
    recipe: str | Path | Recipe = "gptq",
    calibration: Sequence[str | Path] | Rows = (),
    *,
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    activations_on_disk: bool = False,
    low_memory: bool = False,
    trust_remote_code: bool = False,
    tower: str | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """Quantise a model folder into a new model folder.

    What is finished is kept in `OUTPUT.partial` as the run goes on. A run that is stopped (Ctrl-C, a kill, a full disk)
    goes on from there with `resume`, and ends in the same files, bit for bit, apart from times and memory in run.json.

    Args:
        model: a local folder with a full-precision model, or a hub name.
        recipe: the name of a shipped recipe or of a solver, a `.toml` file, or a `Recipe`.
        calibration: text files, JSON lines, token arrays or `hf:` names; not needed by data-free solvers. Rows that were
            drawn before are taken as they are, whatever the recipe says of drawing.
        output: the folder to be; None: `./MODEL-RECIPE`.
        overrides: recipe keys to replace, for example `{"weights.bits": 3, "solver.damping": 0.05}`.
        resume: go on with a stopped run of the same request; do nothing when it is finished, start when there is none.
        overwrite: replace an existing output folder (at the very end), and forget a stopped run.
        device: `auto`, `cpu` or `cuda`; auto takes CUDA where there is one.
        activations_on_disk: keep the calibration activations memory-mapped beside the output.
        low_memory: compute results of wide layers once more in place of keeping them; changes no result.
        trust_remote_code: let transformers run code that comes with the model.
        tower: `vision` or `text`: quantise that part of a model with two towers, such as CLIP, into a model of its own.
        progress: where progress is shown; None shows nothing.

    Returns:
        The report that is also written to `run.json`.

    Raises:
        RequestError: the request cannot be carried out as it stands; nothing was written.
        ResumeError: with `resume`, what lies at the output was made with another request, or is damaged; it stays.
        NumericsError: NaN or Inf in weights or activations; nothing is left behind.
        FactorizationError: moments that stay indefinite; names the site; nothing is left behind.
        OutputError: the disk is full or fails; what is finished is kept.

    Cost: to go on takes one forward of both streams through each finished block, beside what is left to do.

    A run in which more than 5 % of the sites did not get what was asked for is for the caller to refuse: `check_guard`.
    """
    started, baseline = time.perf_counter(), Baseline.take()
    progress = progress or SilentProgress()
    request = _Request.check(
        model, recipe, calibration, output, overrides, device, trust_remote_code, overwrite, resume, tower=tower
    )
    plan, adapter, target = request.recipe, request.adapter, request.output
    rows = draw_calibration(plan, adapter, calibration, progress)
    fingerprint = fingerprint_of(plan, adapter.folder, rows, versions(), request.device, tower)
    if resume and (finished := finished_run(target, fingerprint)) is not None:
        remove_leftovers(target, fingerprint)
        progress.say(f"nothing to do: {target} is finished, and was made with the same request")
        return finished
    batches = batches_of(rows, adapter)
    ahead = _look_ahead(request, batch_shapes(batches), started, baseline, activations_on_disk, low_memory, resume)
    progress.say(ahead.line())
    if ahead.spilled:
        progress.say(ahead.spill_line())
    report = RunReport(
        model=str(model),
        tower=tower,
        recipe=plan.model_dump(exclude_none=True),
        versions=versions(),
        calibration={} if rows is None else rows.summary(),
        output=str(target),
        fingerprint=fingerprint,
        forecast=ahead.record(),
    )
    with CheckpointWriter(adapter.folder, target, overwrite, resumable=True, resume=resume) as writer:
        journal = _open_journal(writer, fingerprint, adapter.block_names, progress, resume=resume, overwrite=overwrite)
        with _keeping_work(writer, journal):
            activations = writer.partial / ACTIVATIONS if ahead.facts.on_disk else None
            parts, forced = plan.build_transforms(), plan.forced_transforms()
            transforms = Transforms(adapter, parts, adapter.few_rows(), forced)
            entries, inputs, attentions, compensations = _write_blocks(
                request, batches, report, progress, journal, activations, transforms, ahead.facts.keep_wide
            )
            ends = quantise_ends(adapter, plan)
            for name, qtensor in ends.quantised.items():
                entries[name] = entry_of(qtensor, ends.kinds[name])
            writer.add("outside", ends.tensors | transforms.tensors)
            report.seconds |= journal.seconds_before_resume()
            report.seconds["total"] = time.perf_counter() - started + report.seconds.get("before_resume", 0.0)
            report.peak_memory_bytes = peak_memory_bytes()
            report.status = "done"
            inputs |= {name: InputScheme(rotation) for name, rotation in transforms.inputs.items()}
            maps, without = final_maps_(report, compensations)
            config = quantization_config(
                entries,
                tied=ends.tied,
                provenance=_provenance(report),
                inputs=inputs,
                outputs=transforms.outputs,
                attentions=attentions,
                compensations=maps,
            )
            documents = {"recipe.toml": plan.to_toml(), "README.md": how_to_load(adapter)}
            base = None if tower is None else adapter.config.to_dict()
            writer.finish(
                config, documents, base=base, check=lambda folder: write_report(folder, report), without=without
            )
    return report


def plan(
    model: str | Path,
    recipe: str | Path | Recipe = "gptq",
    calibration: Sequence[str | Path] | Rows = (),
    *,
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "auto",
    activations_on_disk: bool = False,
    low_memory: bool = False,
    trust_remote_code: bool = False,
    tower: str | None = None,
) -> Plan:
    """Forecast memory, disk and time of a run, without running it. Without calibration the recipe's rows are assumed.

    Arguments as of `quantize`.

    Raises:
        RequestError: the request cannot be carried out as it stands, or does not fit; nothing was written.
    """
    started, baseline = time.perf_counter(), Baseline.take()
    asked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    request = _Request.check(
        model, asked, calibration, output, None, device, trust_remote_code, True, False, False, tower
    )
    if calibration or not request.recipe.needs_rows:
        drawn = draw_calibration(request.recipe, request.adapter, calibration, SilentProgress())
        shapes = batch_shapes(batches_of(drawn, request.adapter))
    else:
        shapes = expected_batches(request.recipe, request.adapter)
    return _look_ahead(request, shapes, started, baseline, activations_on_disk, low_memory, resume=False)


def _look_ahead(
    request: "_Request",
    shapes: Sequence[BatchShape],
    started: float,
    baseline: Baseline,
    on_disk: bool,
    low_memory: bool,
    resume: bool,
) -> Plan:
    """Forecast a run and decide where its activations go, and which are kept."""
    facts = gather_facts(
        request.adapter, request.recipe, shapes, request.device, baseline=baseline, on_disk=on_disk and bool(shapes)
    )
    if resume and has_learned(request.output):
        facts = replace(facts, learning=None)
    settled = settle(facts, limits_at(request.output, request.device), request.output, low_memory=low_memory)
    parts = partial_folder(request.output.resolve()) / PARTS
    finished = len(list(parts.glob("*.safetensors"))) if resume else 0
    rates = rates_for(facts, request.device)
    return timed(settled, rates, finished_blocks=finished, before=time.perf_counter() - started)


def _write_blocks(
    request: "_Request",
    batches: list[tuple[Batch, bool]],
    report: RunReport,
    progress: Progress,
    journal: Journal,
    activations: Path | None,
    transforms: Transforms,
    keep_wide: bool,
) -> tuple[dict[str, ManifestEntry], dict[str, InputScheme], dict[str, AttentionScheme], dict[str, Compensation]]:
    """Quantise the blocks that are not finished, write each at once, and return the manifest's lines for all blocks.

    That is for each module how it is quantised, what is done to its input, and how it attends, while the model runs; and for
    blocks the maps beside them.
    """
    entries: dict[str, ManifestEntry] = {}
    inputs: dict[str, InputScheme] = {}
    attentions: dict[str, AttentionScheme] = {}
    compensations: dict[str, Compensation] = {}
    for index in range(journal.num_finished):
        block = journal.read_block(index, request.device)
        entries |= block.entries()
        inputs |= block.inputs
        attentions |= block.attentions
        compensations |= block.beside()
        report.blocks.append(block.report)
        report.events += block.events
    blocks = quantise_blocks(
        request.adapter,
        request.recipe,
        batches,
        report,
        progress,
        device=request.device,
        directory=activations,
        journal=journal,
        transforms=transforms,
        keep_wide=keep_wide,
    )
    with closing(blocks):
        for block in blocks:
            journal.keep_block(block)
            entries |= block.entries()
            inputs |= block.inputs
            attentions |= block.attentions
            compensations |= block.beside()
    return entries, inputs, attentions, compensations


def _open_journal(
    writer: CheckpointWriter,
    fingerprint: Mapping[str, str],
    block_names: tuple[str, ...],
    progress: Progress,
    *,
    resume: bool,
    overwrite: bool,
) -> Journal:
    if resume:
        return Journal.go_on(writer, fingerprint, block_names, progress.say)
    try:
        return Journal(writer, fingerprint, replaces_output=overwrite)
    except OutputError:
        writer.abort()  # nothing is lost, and what is left could not be gone on with
        raise


@contextmanager
def _keeping_work(writer: CheckpointWriter, journal: Journal) -> Iterator[None]:
    """Keep the partial folder when a run is stopped that can be gone on with; remove it when it would fail again."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(writer.partial / ACTIVATIONS, ignore_errors=True)
        fails_again = isinstance(error, QuantizationError) and not isinstance(error, (OutputError, ResumeError))
        if fails_again or journal.is_empty:
            writer.abort()
        else:
            error.add_note(journal.summary())
        raise
    shutil.rmtree(writer.partial / ACTIVATIONS, ignore_errors=True)


def check_request(
    model: str | Path,
    recipe: str | Path | Recipe,
    calibration: Sequence[str | Path] | Rows,
    *,
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    tower: str | None = None,
) -> Path:
    """Check everything that can be checked without running the model, and return the folder that would be written.

    Raises:
        RequestError: as `quantize` would.
    """
    request = _Request.check(
        model, recipe, calibration, output, overrides, device, trust_remote_code, overwrite, resume, tower=tower
    )
    rows = draw_calibration(request.recipe, request.adapter, calibration, SilentProgress())
    if resume:
        fingerprint = fingerprint_of(request.recipe, request.adapter.folder, rows, versions(), request.device, tower)
        if finished_run(request.output, fingerprint) is None:
            check_partial(request.output, fingerprint)
    return request.output


def write_report(folder: Path, report: RunReport) -> None:
    """Write run.json into a complete folder, with the bits that its files really take."""
    account = ledger(folder)
    report.bits = {"quantised_layers": account.bits_per_weight or 0.0, "whole_model": account.bits_per_weight_model}
    text = json.dumps(report_to_json(report), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "run.json").write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Request:
    """A request that can be carried out."""

    recipe: Recipe
    adapter: ModelAdapter
    output: Path
    device: torch.device

    @classmethod
    def check(
        cls,
        model: str | Path,
        recipe: str | Path | Recipe,
        calibration: Sequence[str | Path] | Rows,
        output: str | Path | None,
        overrides: Mapping[str, Any] | None,
        device: str,
        trust_remote_code: bool,
        overwrite: bool,
        resume: bool,
        needs_rows: bool = True,
        tower: str | None = None,
    ) -> "_Request":
        if isinstance(recipe, Recipe) and overrides:
            raise RequestError("overrides go with the name of a recipe; change the Recipe object itself instead")
        plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
        place = choose_device(device)
        folder = resolve_model(model)
        part = "" if tower is None else f"-{tower}"
        target = Path(output) if output is not None else Path(f"{folder.resolve().name}{part}-{plan.name}")
        # The writer checks again; this answer comes before the model is opened.
        check_output(folder, target, overwrite, resumable=True, resume=resume)
        if needs_rows and plan.needs_rows and not calibration:
            raise RequestError(
                f"the recipe {plan.name!r} needs calibration data, but none came; "
                "pass --calibration FILE (text, .jsonl, .npy; for a model of pictures a folder of them, a .tar or .npz)"
            )
        adapter = find_adapter(folder, device=place, trust_remote_code=trust_remote_code, tower=tower)
        plan = with_image_defaults(plan, adapter.first_layer)
        check_recipe_fits(plan, adapter)
        check_ends(adapter, plan)
        return cls(plan, adapter, target, place)


def report_to_json(report: RunReport) -> dict[str, Any]:
    """Return a run report as JSON values; a number that is not finite becomes None."""
    plain: dict[str, Any] = finite(asdict(report))
    return plain


def finite(value: Any) -> Any:
    """Return nested JSON values in which a number that is not finite is None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose_device(device: str) -> torch.device:
    """Return the torch device of `auto`, `cpu` or `cuda`.

    Raises:
        RequestError: another word, or CUDA where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"device must be auto, cpu or cuda; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("device cuda was asked for, but this torch sees no CUDA device; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("bitmend", "torch", "scipy", "transformers", "safetensors", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def how_to_load(adapter: ModelAdapter) -> str:
    """Return README.md of a folder that was made from the adapter's model."""
    return HOW_TO_LOAD.format(loader=adapter.task, export=EXPORT if adapter.task == CAUSAL_LM else "")


def _provenance(report: RunReport) -> dict[str, Any]:
    return {"recipe": report.recipe, "versions": report.versions, "calibration": report.calibration}


def check_guard(report: RunReport) -> None:
    """Fail a run in which too many sites did not get what was asked for.

    Raises:
        GuardError: more than 5 % of the sites; the output is complete and its run.json names them.
    """
    degraded = [event for event in report.events if event.degrades]
    sites = sum(len(block.sites) for block in report.blocks) + sum(event.kind == "unread" for event in degraded)
    if sites and len(degraded) > DEGRADED_SHARE * sites:
        raise GuardError(
            f"{len(degraded)} of {sites} sites did not get what was asked for (first: {degraded[0].where}: "
            f"{degraded[0].message}); {report.output} is complete and its run.json names them all"
        )
