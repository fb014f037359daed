"""Models with two towers, such as CLIP: each tower is a run of its own, and both results become one model again.

The vision tower reads the pictures among the calibration sources, the text tower the texts. Both runs work in
`OUTPUT.towers/`, each with a journal of its own, so that a stopped run goes on where it stood.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from bitmend.errors import RequestError, ResumeError
from bitmend.formats.folder_lock import FolderLock
from bitmend.formats.integrity import read_config as read_json_config
from bitmend.formats.integrity import weight_files
from bitmend.formats.manifest import Manifest, quantization_config
from bitmend.formats.safetensors_file import parse_json
from bitmend.formats.writer import CheckpointWriter, check_output, partial_folder
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
MARK = "towers.json"  # in the folder of both runs: whose it is, and whether OUTPUT is to be replaced
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".npz")  # of pictures


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
        The report that is also written to `run.json`; of two towers with the blocks of both, and their recipes and
        calibration under their names.

    Raises:
        RequestError, ResumeError, NumericsError, FactorizationError, OutputError: as `pipeline.run.quantize`.

    Cost: of two towers that of both runs; to put them together the memory of one shard of weights, and both on disk twice.
    """
    trusts = bool(options.get("trust_remote_code"))
    folder = resolve_model(model)
    asked: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
    if tower is not None or not two_towers(read_config(folder, trusts)):
        asked |= {"overrides": overrides, "progress": progress, **options}
        return run.quantize(model, recipe, calibration, output=output, tower=tower, **asked)
    request = _Request.of(folder, recipe, calibration, output, overrides, **asked)
    with request.working() as (work, replaces):
        of_each: dict[str, Any] = {
            "resume": resume,
            "device": options.get("device", "auto"),
            "trust_remote_code": trusts,
        }
        for name in TOWERS:
            run.check_request(
                model, request.plans[name], request.sources[name], output=work / name, tower=name, **of_each
            )
        shown = progress or SilentProgress()
        reports = {}
        for name in TOWERS:
            shown.say(f"{name} tower")
            of_each = {"output": work / name, "tower": name, "resume": resume, "progress": progress, **options}
            reports[name] = run.quantize(model, request.plans[name], request.sources[name], **of_each)
        return _join(request, work, reports, replaces, trusts)


def check_request(
    model: str | Path,
    recipe: str | Path | Recipe,
    calibration: Sequence[str | Path] | Rows,
    *,
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    tower: str | None = None,
    **options: Any,
) -> Path:
    """Check everything that can be checked without running the model, as `pipeline.run.check_request`, of both towers.

    Raises:
        RequestError: as `quantize` would.
    """
    folder = resolve_model(model)
    if tower is not None or not two_towers(read_config(folder, bool(options.get("trust_remote_code")))):
        keys = {"output": output, "overrides": overrides, "tower": tower, **options}
        return run.check_request(model, recipe, calibration, **keys)
    asked = {key: bool(options.pop(key, False)) for key in ("resume", "overwrite")}
    request = _Request.of(folder, recipe, calibration, output, overrides, **asked)
    for name in TOWERS:
        made = {"output": request.work / name, "tower": name, "overwrite": True, **options}
        run.check_request(model, request.plans[name], request.sources[name], **made)
    return request.target


@dataclass(frozen=True)
class _Request:
    """A request for both towers.

    Attributes:
        folder: the model.
        plan: the recipe as it was asked for.
        plans: for each tower, without what means nothing to it.
        sources: for each tower.
        target: the folder to be.
        resume: go on with a stopped run.
        overwrite: replace what is there.
    """

    folder: Path
    plan: Recipe
    plans: Mapping[str, Recipe]
    sources: Mapping[str, list[str | Path]]
    target: Path
    resume: bool
    overwrite: bool

    @classmethod
    def of(
        cls,
        folder: Path,
        recipe: str | Path | Recipe,
        calibration: Sequence[str | Path] | Rows,
        output: str | Path | None,
        overrides: Mapping[str, Any] | None,
        resume: bool,
        overwrite: bool,
    ) -> "_Request":
        if isinstance(recipe, Recipe) and overrides:
            raise RequestError("overrides go with the name of a recipe; change the Recipe object itself instead")
        plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
        target = Path(output) if output is not None else Path(f"{folder.resolve().name}-{plan.name}")
        check_output(folder, target, overwrite, resumable=True, resume=resume)
        plans = {"vision": _without_text(plan), "text": plan}
        request = cls(folder, plan, plans, sources_of_towers(plan, calibration), target.resolve(), resume, overwrite)
        request._check_work()
        return request

    @property
    def work(self) -> Path:
        """Where both runs work."""
        return self.target.with_name(self.target.name + SUFFIX)

    def _check_work(self) -> None:
        """Refuse a folder that is not ours, or a stopped run that nobody speaks of."""
        work = self.work
        if self.folder.resolve().is_relative_to(work):
            raise RequestError(
                f"the model {self.folder} lies in {work}, where both runs would work; choose another output"
            )
        if work.exists() and not (work / MARK).is_file():
            raise RequestError(f"{work} is where both runs would work, but holds something else; choose another output")
        if work.exists() and not (self.resume or self.overwrite):
            raise RequestError(
                f"{work} holds a stopped run; pass --resume to go on with it, or --overwrite to start again"
            )
        if self.resume and not self.overwrite and self.target.exists() and not work.exists():
            raise ResumeError(
                f"{self.target} is finished, so that there is nothing to go on with; pass --overwrite to make it again"
            )

    @contextmanager
    def working(self) -> Iterator[tuple[Path, bool]]:
        """Hold the folder of both runs, and yield it and whether OUTPUT is to be replaced; it goes when all is done.

        What can be gone on with stays.
        """
        work = self.work
        work.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(work)
        try:
            if self.overwrite:
                _empty(work)
            mark = work / MARK
            if not mark.is_file():
                mark.write_text(json.dumps({"replaces_output": self.overwrite}), encoding="utf-8")
            yield work, bool(parse_json(mark.read_bytes(), str(mark)).get("replaces_output"))
            _empty(work)
        finally:
            with suppress(OSError):  # something is left to go on with
                if not any(path.name != MARK for path in work.iterdir()):
                    _empty(work)
                    work.rmdir()
            lock.release()


def _empty(work: Path) -> None:
    """Remove what runs of both towers leave, and nothing else."""
    for name in TOWERS:
        for path in (work / name, partial_folder(work / name)):
            shutil.rmtree(path, ignore_errors=True)
    (work / MARK).unlink(missing_ok=True)


def _without_text(plan: Recipe) -> Recipe:
    """Return a recipe without the length of texts and the token embedding, which a tower of pictures has not."""
    calibration = plan.calibration.model_copy(update={"sequence_length": None})
    return plan.model_copy(update={"calibration": calibration, "embedding": None})


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
    name = str(source)
    return not name.startswith("hf:") and (Path(source).is_dir() or name.lower().endswith(ARCHIVES))


def _join(request: _Request, work: Path, reports: Mapping[str, RunReport], replaces: bool, trusts: bool) -> RunReport:
    """Write one model of two finished towers and what the source holds beside them, and return the report of both."""
    folder = request.folder
    report = _report_of_both(reports, str(request.target))
    manifests = [Manifest.from_json(read_json_config(work / name)["quantization_config"]) for name in TOWERS]
    with CheckpointWriter(folder, request.target, overwrite=replaces) as writer:
        for name in TOWERS:
            for file in weight_files(work / name):
                writer.add(f"{name} {file.name}", _tensors(file))
        writer.add("beside both towers", dict(_beside(folder, trusts)))
        config = quantization_config(
            {name: entry for one in manifests for name, entry in one.modules.items()},
            tied={head: table for one in manifests for head, table in one.tied.items()},
            provenance={"recipe": report.recipe, "versions": versions(), "calibration": report.calibration},
            inputs={name: scheme for one in manifests for name, scheme in one.inputs.items()},
            outputs={name: rotation for one in manifests for name, rotation in one.outputs.items()},
            attentions={name: scheme for one in manifests for name, scheme in one.attentions.items()},
            compensations={name: shape for one in manifests for name, shape in one.compensations.items()},
        )
        loader = read_config(folder, trusts).architectures[0]
        documents = {
            "recipe.toml": request.plan.to_toml(),
            "README.md": run.HOW_TO_LOAD.format(loader=loader, export=""),
        }
        writer.finish(config, documents, check=lambda made: write_report(made, report))
    return report


def _tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dictionary)


def _beside(folder: Path, trusts: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield what belongs to neither tower, as it is stored: CLIP's scale of the cosines."""
    config = read_config(folder, trusts)
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
        recipe={name: report.recipe for name, report in reports.items()},
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
