"""Several recipes on one model: the same rows, the same reference, one table.

Recipes run one after the other, each as `quantize` would run it, on calibration rows that are drawn once. Each model is then
scored against the full-precision one, whose hidden states are kept inside the output folder. comparison.json is written anew
after every recipe, so that a stopped comparison goes on at the recipe that was under way, after its last finished matrix.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitmend.errors import CheckpointError, OutputError, QuantizationError, RequestError, ResumeError
from bitmend.evaluate.evaluate import evaluate
from bitmend.evaluate.load import LoadedModel, check_context
from bitmend.evaluate.windows import read_windows
from bitmend.formats.ledger import ledger
from bitmend.formats.safetensors_file import sync
from bitmend.models.find import find_adapter
from bitmend.models.fingerprint import model_fingerprint
from bitmend.models.loading import resolve_model
from bitmend.models.tokenizer import load_tokenizer
from bitmend.pipeline.calibration_rows import Rows, draw_calibration
from bitmend.pipeline.recipe_list import LabelledRecipe, check_same_rows, parse_recipe_list
from bitmend.pipeline.run import check_guard, choose_device, quantize, versions
from bitmend.protocols import ModelAdapter, Progress, RunReport, SilentProgress
from bitmend.report.comparison import Comparison, Entry, read_comparison

RECORD = "comparison.json"
MODELS = "models"
CACHE = "reference-cache"
DOCUMENTS = ("run.json", "recipe.toml", "ledger.json")  # stay when a model is discarded


def compare(
    model: str | Path,
    recipes: Sequence[str],
    calibration: Sequence[str | Path],
    *,
    texts: Sequence[str | Path],
    output: str | Path,
    overrides: Mapping[str, Any] | None = None,
    windows: int | None = 160,
    window_length: int = 512,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    keep_models: bool = True,
    activations_on_disk: bool = False,
    low_memory: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Quantise a model with several recipes on the same calibration rows, and score the results on the same texts.

    Args:
        model: a local folder with a full-precision model, or a hub name.
        recipes: lists of recipes, such as `["rtn,gptq", "gptaq-1=gptaq:solver.residual_strength=1.0"]`; see
            `pipeline.recipe_list`.
        calibration: text files, JSON lines, token arrays or `hf:` names.
        texts: UTF-8 files that the results are scored on; none of them should be calibration data.
        output: the folder to be: comparison.json, and models/LABEL for each recipe.
        overrides: recipe keys to replace in all recipes.
        windows: how many windows of each text, at most; None for all.
        window_length: tokens in a window.
        device: `auto`, `cpu` or `cuda`.
        resume: go on with a comparison of the same conditions; recipes that are finished are not run again, others that
            it holds stay in it.
        overwrite: replace an existing comparison, as soon as the request has been checked.
        keep_models: keep the weights of each model; without, only its run.json, recipe.toml and ledger.json stay.
        activations_on_disk: keep the calibration activations memory-mapped.
        low_memory: compute results of wide layers once more in place of keeping them; changes no result.
        progress: where progress is shown; None shows nothing.

    Returns:
        What comparison.json says. A recipe that failed is in it with its sentence; `report.comparison.check_comparison`
        refuses such a comparison.

    Raises:
        RequestError: the request cannot be carried out as it stands; nothing was written.
        OutputError: comparison.json could not be written.
    """
    shown = progress or SilentProgress()
    # Errors against the full-precision network for all of them: those of gptq and of gptaq could not be compared otherwise.
    plans = parse_recipe_list(recipes, {"calibration.two_streams": True, **(overrides or {})})
    check_same_rows(plans)
    if not texts:
        raise RequestError(
            "a comparison needs at least one text to score models on, but none came (held-out calibration rows choose "
            "between candidates, so that they cannot judge); pass --text FILE"
        )
    if not calibration:
        raise RequestError("a comparison needs calibration rows, but none came; pass --calibration FILE")
    place, folder, target = choose_device(device), resolve_model(model), Path(output)
    _check_output(target, folder, resume, overwrite)
    adapter = find_adapter(folder, device=place)
    if adapter.reads != "tokens":
        raise RequestError(
            "a comparison scores models on texts, and the model reads pictures; run `bitmend quantize` for each recipe, then "
            "`bitmend evaluate MODEL... --images PATH`"
        )
    _check_texts(adapter, str(model), texts, windows, window_length)
    # Their calibration keys agree; rows are as short as the longest prefix that one of them may put in front needs them.
    longest = max(plans, key=lambda plan: 0 if plan.recipe.prefix is None else plan.recipe.prefix.most_tokens)
    rows = draw_calibration(longest.recipe, adapter, calibration, shown)
    assert rows is not None  # there are sources
    comparison = Comparison(
        model=str(model),
        model_sha256=model_fingerprint(folder),
        calibration=rows.summary(),
        texts=[{"file": str(text), "sha256": _sha256(Path(text))} for text in texts],
        windows=windows,
        window_length=window_length,
        device=place.type,
        versions=versions(),
    )
    if resume:
        comparison = _earlier(target / RECORD, comparison, plans)
    run = _Run(folder, rows, target, place, comparison, keep_models, activations_on_disk, low_memory, shown)
    run.open(overwrite)
    run.score_reference()
    run.run_all(plans)
    return comparison


@dataclass(frozen=True)
class _Run:
    """A comparison under way."""

    model: Path
    rows: Rows
    output: Path
    device: torch.device
    comparison: Comparison
    keep_models: bool
    activations_on_disk: bool
    low_memory: bool
    progress: Progress

    def open(self, overwrite: bool) -> None:
        """Make the folder, without what is to be replaced."""
        if overwrite and self.output.exists():
            for name in (RECORD, MODELS, CACHE):
                _remove(self.output / name)
        self.save()

    def save(self) -> None:
        """Write comparison.json in one step, so that it is never half there."""
        path = self.output / RECORD
        temporary = path.with_suffix(".json.tmp")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(self.comparison.to_json().encode())
                sync(file)
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OutputError(f"{path} could not be written: {error.strerror or error}") from error

    def score_reference(self) -> None:
        """Score the full-precision model itself, unless it has been before."""
        if self.comparison.reference:
            return
        bits = None
        with suppress(CheckpointError):  # weights that are in no safetensors file have no ledger
            bits = ledger(self.model).bits_per_weight_model
        self.comparison.reference = {"bits": bits, "texts": self.score(self.model)}
        self.save()

    def score(self, model: Path) -> list[dict[str, Any]]:
        """Return the results of one model on all texts."""
        found = evaluate(
            [model],
            texts=[text["file"] for text in self.comparison.texts],
            reference=self.model,
            windows=self.comparison.windows,
            window_length=self.comparison.window_length,
            device=self.device,
            progress=self.progress,
            cache_dir=self.output / CACHE,
        )
        scored: list[dict[str, Any]] = found.to_dict()["models"][0]["texts"]
        return scored

    def run_all(self, plans: Sequence[LabelledRecipe]) -> None:
        """Run what is not finished yet."""
        for position, plan in enumerate(plans, start=1):
            where = f"{plan.label} ({position} of {len(plans)})"
            earlier = self.comparison.entry(plan.label)
            if earlier is not None and earlier.measured:
                self.progress.say(f"{where}: finished before, not run again")
                continue
            self.progress.say(f"{where}: quantising")
            try:
                entry = self.run_one(plan)
            except KeyboardInterrupt:
                self.progress.say(f"{where}: stopped; {position - 1} of {len(plans)} are finished, --resume goes on")
                raise
            if entry.error is not None:
                self.progress.say(f"{where}: failed: {entry.error}")
            self.comparison.put(entry)
            self.save()

    def quantise(self, plan: LabelledRecipe, folder: Path) -> RunReport:
        """Quantise with one recipe, from where an earlier comparison was stopped if that still fits."""
        options: dict[str, Any] = {
            "output": folder,
            "device": self.device.type,
            "activations_on_disk": self.activations_on_disk,
            "low_memory": self.low_memory,
            "progress": self.progress,
        }
        try:
            return quantize(self.model, plan.recipe, self.rows, resume=True, **options)
        except ResumeError as error:
            self.progress.say(f"{plan.label}: cannot go on ({error}); started again")
            return quantize(self.model, plan.recipe, self.rows, overwrite=True, **options)

    def run_one(self, plan: LabelledRecipe) -> Entry:
        """Quantise and score with one recipe; what is raised on purpose is recorded."""
        entry = Entry(plan.label, _recipe_keys(plan))
        folder = self.output / MODELS / plan.label
        try:
            _remove(folder)  # of a run that was stopped before its model had been scored
            report = self.quantise(plan, folder)
            entry.describe(report)
            entry.output = f"{MODELS}/{plan.label}"
            entry.texts = self.score(folder)
            check_guard(report)
            entry.status = "done"
        except QuantizationError as error:
            entry.error = str(error)
        finally:
            if not self.keep_models:
                _discard(folder)
        return entry


def _recipe_keys(plan: LabelledRecipe) -> dict[str, Any]:
    keys: dict[str, Any] = plan.recipe.model_dump(mode="json", exclude_none=True)
    return keys


# ---------------------------------------------------------------------------------------------- before the first recipe
def _check_output(output: Path, model: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise RequestError("--resume goes on with a comparison and --overwrite replaces it; pass one of them")
    if output.exists() and not output.is_dir():
        raise RequestError(f"the output {output} is a file; choose another name")
    inside, source = output.resolve(), model.resolve()
    if inside == source or source in inside.parents or inside in source.parents:
        raise RequestError(f"the output {output} must lie outside the model folder {model}, and must not hold it")
    if not output.exists():
        return
    if not (resume or overwrite):
        raise RequestError(
            f"the output folder {output} exists already; pass --resume to go on with it, or --overwrite to replace it"
        )
    # A slip of the finger must not mix a comparison into somebody's home folder.
    if any(output.iterdir()) and not (output / RECORD).is_file():
        raise RequestError(f"{output} is not empty and holds no {RECORD}, so it is neither gone on with nor replaced")


def _check_texts(
    adapter: ModelAdapter, name: str, texts: Sequence[str | Path], windows: int | None, window_length: int
) -> None:
    """Refuse texts and windows that the evaluation would refuse after the first recipe has run for hours."""
    tokenizer = load_tokenizer(adapter.folder)
    check_context(LoadedModel(name, adapter.model, tokenizer), window_length)
    for text in texts:
        read_windows(Path(text), tokenizer, windows=windows, window_length=window_length)


def _earlier(record: Path, wanted: Comparison, plans: Sequence[LabelledRecipe]) -> Comparison:
    """Return the comparison to go on with: the recorded one where there is one of the same conditions.

    Raises:
        RequestError: its conditions differ, or a finished recipe has other keys now.
    """
    if not record.is_file():
        return wanted
    found = read_comparison(record)
    found.entries = [entry for entry in found.entries if entry.measured]  # what failed on the way is tried again
    differing = found.differences(wanted)
    for plan in plans:
        entry = found.entry(plan.label)
        if entry is not None and entry.recipe != _recipe_keys(plan):
            differing.append(f"recipe {plan.label!r}")
    if differing:
        raise RequestError(
            f"{record.parent} holds a comparison with another {', another '.join(differing)}; "
            "choose another output, or pass --overwrite to replace it"
        )
    found.model, found.texts = wanted.model, wanted.texts  # the same files, perhaps in another place
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- files
def _discard(folder: Path) -> None:
    """Remove everything of a model folder but the record of its run."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in DOCUMENTS:
                _remove(path)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} could not be removed: {error.strerror or error}") from error
