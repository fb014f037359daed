"""What a comparison of recipes found: plain values, their JSON file, and one table."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from bitmend.errors import GuardError, RequestError
from bitmend.pipeline.run import finite
from bitmend.protocols import RunReport
from bitmend.report.terminal import number

LAYOUT = 1  # of comparison.json; raised when a key changes its meaning


@dataclass
class Entry:
    """One recipe.

    Errors of layers are means over all sites, of the codes' output on held-out rows before any refit, against the
    full-precision network (see `SiteReport`, `streams` = 2); None without held-out rows.

    Attributes:
        label: its name and its folder.
        recipe: its keys as resolved, as in recipe.toml.
        status: `failed` when the run stopped, or when too many sites did not get what was asked for.
        error: the sentence of the failure.
        bits: per weight from the saved bytes, of `quantised_layers` and of the `whole_model`.
        calibration_sha256: of the rows that its run saw.
        sites: how many matrices were quantised.
        accepted: how many candidates were kept.
        held_out_error: of what was kept, round-to-nearest where a candidate was dropped.
        base_held_out_error: of round-to-nearest in its place, on the same inputs at the same bits.
        final_block_error: of the stream after the last block, as `BlockReport.relative_error`.
        events: how many there were; run.json has them all.
        degraded: how many of them say that a site did not get what was asked for.
        texts: one `TextResult` for each text, as JSON values.
        seconds: as in run.json.
        output: folder of the run, inside the comparison's.
    """

    label: str
    recipe: dict[str, Any]
    status: Literal["done", "failed"] = "failed"
    error: str | None = None
    bits: dict[str, float] = field(default_factory=dict)
    calibration_sha256: str | None = None
    sites: int = 0
    accepted: int = 0
    held_out_error: float | None = None
    base_held_out_error: float | None = None
    final_block_error: float | None = None
    events: int = 0
    degraded: int = 0
    texts: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    output: str | None = None

    @property
    def measured(self) -> bool:
        """Whether it was quantised and scored to the end; the guard may still have refused it."""
        return bool(self.texts)

    @property
    def error_ratio(self) -> float | None:
        """Held-out error of the layers over that of round-to-nearest."""
        if self.held_out_error is None or not self.base_held_out_error:
            return None
        return self.held_out_error / self.base_held_out_error

    def describe(self, report: RunReport) -> None:
        """Take over what a run report says."""
        sites = [site for block in report.blocks for site in block.sites]
        proved = [
            (site.held_out_error if site.accepted else site.base_held_out_error, site.base_held_out_error)
            for site in sites
            if site.held_out_error is not None
        ]
        self.bits = dict(report.bits)
        self.calibration_sha256 = report.calibration.get("sha256")
        self.sites, self.accepted = len(sites), sum(site.accepted for site in sites)
        if proved:
            self.held_out_error = sum(ours or 0.0 for ours, _ in proved) / len(proved)
            self.base_held_out_error = sum(base or 0.0 for _, base in proved) / len(proved)
        self.final_block_error = report.blocks[-1].relative_error if report.blocks else None
        self.events, self.degraded = len(report.events), sum(event.degrades for event in report.events)
        self.seconds = dict(report.seconds)


@dataclass
class Comparison:
    """Recipes on one model, the same rows and the same texts.

    Attributes:
        model: as it was named.
        model_sha256: of its config and weight files.
        calibration: summary of the rows, with their `sha256`.
        texts: `file` and `sha256` of each evaluation text.
        windows: how many windows of each text, at most; None for all.
        window_length: tokens in a window.
        device: where networks ran.
        versions: as in run.json.
        reference: `bits` and `texts` of the full-precision model; empty until it has been scored.
        entries: in the order in which they were asked for.
        layout: version of this list of keys.
    """

    model: str
    model_sha256: str
    calibration: dict[str, Any]
    texts: list[dict[str, str]]
    windows: int | None
    window_length: int
    device: str
    versions: dict[str, str]
    reference: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    layout: int = LAYOUT

    def entry(self, label: str) -> Entry | None:
        """Return the entry of a label, if there is one."""
        return next((entry for entry in self.entries if entry.label == label), None)

    def put(self, entry: Entry) -> None:
        """Add an entry in place of the one with its label."""
        labels = [other.label for other in self.entries]
        if entry.label in labels:
            self.entries[labels.index(entry.label)] = entry
        else:
            self.entries.append(entry)

    def to_json(self) -> str:
        """Return the content of comparison.json; a number that is not finite becomes null."""
        return json.dumps(finite(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def differences(self, other: "Comparison") -> list[str]:
        """Return in words what differs between the conditions of two comparisons."""
        parts = {
            "model": ("model_sha256",),
            "evaluation texts": ("texts",),
            "evaluation windows": ("windows", "window_length"),
            "device": ("device",),
            "versions": ("versions",),
        }
        rows = [comparison.calibration.get("sha256") for comparison in (self, other)]
        differing = [] if rows[0] == rows[1] else ["calibration rows"]
        for words, names in parts.items():
            if any(_condition(self, name) != _condition(other, name) for name in names):
                differing.append(words)
        return differing


def _condition(comparison: Comparison, name: str) -> Any:
    if name == "texts":  # a text may have moved
        return [text["sha256"] for text in comparison.texts]
    return getattr(comparison, name)


def read_comparison(path: Path) -> Comparison:
    """Return the comparison in a file that `to_json` gave.

    Raises:
        RequestError: it is no such file.
    """
    try:
        found = TypeAdapter(Comparison).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{path} is no comparison that can be gone on with ({reason}); pass --overwrite") from error
    if found.layout != LAYOUT:
        raise RequestError(f"{path} has the layout {found.layout}, need {LAYOUT}; pass --overwrite to make it anew")
    return found


def check_comparison(comparison: Comparison) -> None:
    """Fail a comparison in which a recipe failed.

    Raises:
        GuardError: names the first one.
    """
    failed = [entry for entry in comparison.entries if entry.status == "failed"]
    if failed:
        raise GuardError(
            f"{len(failed)} of {len(comparison.entries)} recipes failed (first: {failed[0].label}: {failed[0].error}); "
            "the others are complete"
        )


def comparison_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, best first: by divergence on the first text, what failed before it was scored at the end."""
    header = ["recipe", "bits: layers", "bits: model", "layer error / rtn"]
    names = [text["file"].replace("\\", "/").rsplit("/", 1)[-1] for text in comparison.texts]
    for name in names:
        suffix = f" {name}" if len(names) > 1 else ""
        header += [f"KL{suffix}", f"perplexity{suffix}"]
    header += ["solver s", "total s", "status"]
    rows = [_entry_row(entry, len(names)) for entry in sorted(comparison.entries, key=_rank)]
    if comparison.reference:
        bits, texts = comparison.reference["bits"], comparison.reference["texts"]
        rows.insert(0, ["full precision", "-", number(bits), "-", *_scores(texts, len(names)), "-", "-", "reference"])
    return header, rows


def _rank(entry: Entry) -> tuple[bool, float, str]:
    kl = entry.texts[0]["kl"] if entry.measured else None
    return kl is None, kl or 0.0, entry.label


def _entry_row(entry: Entry, num_texts: int) -> list[str]:
    bits = [number(entry.bits.get(name), 5) for name in ("quantised_layers", "whole_model")]
    seconds = [f"{entry.seconds[name]:.1f}" if name in entry.seconds else "-" for name in ("solve", "total")]
    return [entry.label, *bits, number(entry.error_ratio), *_scores(entry.texts, num_texts), *seconds, entry.status]


def _scores(texts: list[dict[str, Any]], num_texts: int) -> list[str]:
    if not texts:
        return ["-"] * (2 * num_texts)
    return [cell for text in texts for cell in (number(text["kl"]), number(text["perplexity"], 6))]
