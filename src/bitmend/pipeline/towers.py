"""Models with two towers, such as CLIP: each tower is a run of its own, and both results become one model again.

The vision tower reads the pictures among the calibration sources, the text tower the texts. Both runs work in
`OUTPUT.towers/`, each with a journal of its own, so that a stopped run goes on where it stood.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from bitmend.errors import RequestError, ResumeError
from bitmend.formats.integrity import read_config as read_json_config
from bitmend.formats.integrity import weight_files
from bitmend.formats.manifest import Manifest, quantization_config
from bitmend.formats.writer import CheckpointWriter, check_output
from bitmend.models.architecture import TOWERS, tower_class, tower_config, two_towers
from bitmend.models.bounds import stored
from bitmend.models.loading import empty_model, read_config, resolve_model
from bitmend.models.shards import ShardedWeights
from bitmend.pipeline import run
from bitmend.pipeline.calibration_rows import Rows
from bitmend.pipeline.recipe import Recipe, load_recipe
from bitmend.pipeline.run import versions, write_report
from bitmend.protocols import Progress, RunReport, SilentProgress

SUFFIX = ".towers"
ARCHIVES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".npz")  # of pictures


def quantize(
    model: str | Path,
    recipe: str | Path | Recipe = "gptq",
    calibration: Sequence[str | Path] | Rows = (),
    *,
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tower: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> RunReport:
    """Quantise a model folder into a new model folder: `pipeline.run.quantize`, whose arguments these are.

    Of a model with two towers, such as CLIP, both are quantised, one after the other, unless `tower` names one. The vision
    tower is calibrated on those sources that are folders or archives, the text tower on the others.

    Returns:
        The report that is also written to `run.json`; of two towers with the blocks of both, and their calibration under
        their names.

    Raises:
        RequestError, ResumeError, NumericsError, FactorizationError, OutputError: as `pipeline.run.quantize`.
    """
    folder = resolve_model(model)
    asked = {"overrides": overrides, "resume": resume, "overwrite": overwrite, "progress": progress, **options}
    config = read_config(folder, bool(options.get("trust_remote_code")))
    if tower is not None or not two_towers(config):
        return run.quantize(model, recipe, calibration, output=output, tower=tower, **asked)
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    asked["overrides"] = overrides if isinstance(recipe, Recipe) else None
    target = Path(output) if output is not None else Path(f"{folder.resolve().name}-{plan.name}")
    check_output(folder, target, overwrite, resumable=True, resume=resume)
    sources = sources_of_towers(plan, calibration)
    work = target.resolve().with_name(target.resolve().name + SUFFIX)
    if resume and target.exists() and not work.exists() and not overwrite:
        raise ResumeError(
            f"{target} is finished, so that there is nothing to go on with; pass --overwrite to make it again"
        )
    shown = progress or SilentProgress()
    reports = {}
    for name in TOWERS:
        shown.say(f"{name} tower")
        reports[name] = run.quantize(model, plan, sources[name], output=work / name, tower=name, **asked)
    joined = _join(folder, plan, work, target, reports, overwrite or resume)
    shutil.rmtree(work, ignore_errors=True)
    return joined


def sources_of_towers(plan: Recipe, calibration: Sequence[str | Path] | Rows) -> dict[str, list[str | Path]]:
    """Return which sources each tower is calibrated on.

    Raises:
        RequestError: rows that were drawn before, which are of one kind, or no source for a tower whose solver needs rows.
    """
    if not isinstance(calibration, Sequence):
        raise RequestError(
            "a model with two towers needs pictures and texts, but rows of one kind came; give files, or quantise one tower "
            f"with --tower {' or '.join(TOWERS)}"
        )
    pictures = [source for source in calibration if _is_of_pictures(source)]
    found = {"vision": pictures, "text": [source for source in calibration if source not in pictures]}
    missing = [name for name in TOWERS if not found[name]]
    if plan.needs_rows and missing:
        kind = "folder or archive of pictures" if missing[0] == "vision" else "text"
        raise RequestError(
            f"the recipe {plan.name!r} needs calibration data for both towers, but no {kind} came; pass one more "
            f"--calibration, or quantise one tower with --tower"
        )
    return found


def _is_of_pictures(source: str | Path) -> bool:
    path = Path(source)
    return not str(source).startswith("hf:") and (path.is_dir() or path.suffix in ARCHIVES)


def _join(
    folder: Path, plan: Recipe, work: Path, target: Path, reports: Mapping[str, RunReport], replace: bool
) -> RunReport:
    """Write one model of two finished towers and what the source holds beside them, and return the report of both."""
    report = _report_of_both(reports, str(target))
    manifests = [Manifest.from_json(read_json_config(work / name)["quantization_config"]) for name in TOWERS]
    with CheckpointWriter(folder, target, overwrite=replace) as writer:
        for name in TOWERS:
            for file in weight_files(work / name):
                writer.add(f"{name} {file.name}", _tensors(file))
        writer.add("beside both towers", dict(_beside(folder)))
        config = quantization_config(
            {name: entry for one in manifests for name, entry in one.modules.items()},
            tied={head: table for one in manifests for head, table in one.tied.items()},
            provenance={"recipe": report.recipe, "versions": versions(), "calibration": report.calibration},
            inputs={name: scheme for one in manifests for name, scheme in one.inputs.items()},
            outputs={name: rotation for one in manifests for name, rotation in one.outputs.items()},
            attentions={name: scheme for one in manifests for name, scheme in one.attentions.items()},
        )
        loader = read_config(folder).architectures[0]
        documents = {"recipe.toml": plan.to_toml(), "README.md": run.HOW_TO_LOAD.format(loader=loader, export="")}
        writer.finish(config, documents, check=lambda made: write_report(made, report))
    return report


def _tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dictionary)


def _beside(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield what belongs to neither tower, as it is stored: CLIP's scale of the cosines."""
    config = read_config(folder)
    parts: set[str] = set()
    for name in TOWERS:
        task = tower_class(config, name)
        assert task is not None
        tower: nn.Module = empty_model(tower_config(config, name), held=stored(folder), task=task)
        parts |= {part for part, _ in tower.named_children()}
    weights = ShardedWeights(folder)
    for name in weights.names():
        if name.partition(".")[0] not in parts:
            yield name, weights.get(name).clone()


def _report_of_both(reports: Mapping[str, RunReport], output: str) -> RunReport:
    first = reports[TOWERS[0]]
    seconds: dict[str, float] = {}
    for report in reports.values():
        for phase, spent in report.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    return RunReport(
        model=first.model,
        recipe=first.recipe,
        versions=first.versions,
        calibration={name: report.calibration for name, report in reports.items()},
        blocks=[block for report in reports.values() for block in report.blocks],
        events=[event for report in reports.values() for event in report.events],
        seconds=seconds,
        peak_memory_bytes=max(report.peak_memory_bytes for report in reports.values()),
        output=output,
        fingerprint={
            f"{name}: {part}": text for name, report in reports.items() for part, text in report.fingerprint.items()
        },
        forecast={name: report.forecast for name, report in reports.items()},
        status="done",
    )
