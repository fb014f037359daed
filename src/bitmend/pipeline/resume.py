"""The journal of a run: what is finished, kept so that a stopped run goes on where it was and ends in the same bytes.

In `OUTPUT.partial/`:

| file | what it holds |
|---|---|
| `journal/journal.json` | fingerprint of the run, and whether it may replace an older OUTPUT |
| `journal/BBBB-SSSS.safetensors` | site S, in execution order, of the block B under way: codes, scales, report, events |
| `journal/learned.safetensors` | what transforms have learned before the first block |
| `parts/BBBB.safetensors` | the finished block B: all its tensors, reports and events |

Each file is written in one step (`formats/record.py`). A finished block takes the place of its sites. What is believed is
an unbroken row of finished blocks from the first one on, then an unbroken row of sites of the next block; whatever lies
behind a missing or damaged file is done again.

The activations in front of the block under way are not kept: `pipeline/quantize.py` runs the finished blocks again
(docs/decisions/0013).
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmend.compensation import Compensation
from bitmend.errors import CheckpointError, RequestError, ResumeError
from bitmend.formats.folder_lock import FolderLock
from bitmend.formats.integrity import check_folder
from bitmend.formats.manifest import (
    ManifestEntry,
    attention_from_json,
    attention_to_json,
    compensation_from_json,
    input_from_json,
    input_to_json,
    spec_from_json,
    spec_to_json,
)
from bitmend.formats.native import compensation_tensors, read_compensation, read_site, site_tensors
from bitmend.formats.record import TEMPORARY, read_record, write_json, write_record
from bitmend.formats.safetensors_file import parse_json
from bitmend.formats.writer import PARTS, CheckpointWriter, output_error, partial_folder, replaced_folder
from bitmend.numerics.qtensor import QTensor
from bitmend.online import AttentionScheme, InputScheme
from bitmend.pipeline.fingerprint import differences
from bitmend.protocols import BlockReport, Event, RunReport, SiteReport, Solution, SolvedSite, TransformReport
from bitmend.sites import Block

JOURNAL_VERSION = 2
FOLDER, HEAD, LEARNED = "journal", "journal.json", "learned.safetensors"
SUFFIX = ".safetensors"
START_AGAIN = "pass --overwrite to start again, or choose another output"


@dataclass(frozen=True)
class QuantisedBlock:
    """One finished block.

    Attributes:
        name: full path in the model.
        sites: the quantised matrices by full module name.
        kinds: how each of them was held in the model, a key of `sites.LAYER_VIEWS`.
        rest: all other tensors of the block by full tensor name.
        report: what `run.json` says of it.
        events: what the user must be told of it and its sites.
        inputs: what is done to the inputs of its layers while the model runs, by full module name.
        attentions: how its attention rounds its operands while the model runs, by full module name.
        compensation: the map beside it; None: none.
    """

    name: str
    sites: dict[str, QTensor]
    kinds: dict[str, str]
    rest: dict[str, Tensor]
    report: BlockReport
    events: tuple[Event, ...] = ()
    inputs: dict[str, InputScheme] = field(default_factory=dict)
    attentions: dict[str, AttentionScheme] = field(default_factory=dict)
    compensation: Compensation | None = None

    def beside(self) -> dict[str, Compensation]:
        """Return the map beside the block by the block's name; empty where there is none."""
        return {} if self.compensation is None else {self.name: self.compensation}

    def entries(self) -> dict[str, ManifestEntry]:
        """Return the line of the manifest for each quantised matrix."""
        return {name: entry_of(qtensor, self.kinds[name]) for name, qtensor in self.sites.items()}


def entry_of(qtensor: QTensor, kind: str) -> ManifestEntry:
    """Return the manifest's line for a quantised matrix."""
    out, width = qtensor.codes.shape
    return ManifestEntry(qtensor.spec, (out, width), kind)


class Journal:
    """The finished blocks and sites of one run; see the module.

    Attributes:
        num_finished: how many blocks are finished.
    """

    def __init__(self, writer: CheckpointWriter, fingerprint: Mapping[str, str], *, replaces_output: bool) -> None:
        """Start an empty journal in the partial folder of `writer`.

        Raises:
            OutputError: it cannot be written.
        """
        self._writer = writer
        self._folder = writer.partial / FOLDER
        self._started = time.perf_counter()
        self._earlier_seconds = 0.0
        self._num_sites = 0
        self.num_finished = 0
        head = {
            "journal_version": JOURNAL_VERSION,
            "fingerprint": dict(fingerprint),
            "replaces_output": replaces_output,
        }
        try:
            self._folder.mkdir(exist_ok=True)
            write_json(self._folder / HEAD, head)
        except OSError as error:
            raise output_error(writer.output, error) from error

    @classmethod
    def go_on(
        cls,
        writer: CheckpointWriter,
        fingerprint: Mapping[str, str],
        block_names: tuple[str, ...],
        say: Callable[[str], None],
    ) -> "Journal":
        """Take over what an earlier run has finished; start an empty journal where there was none.

        Args:
            writer: has locked the partial folder and kept its parts.
            fingerprint: of this run.
            block_names: of the model, in order.
            say: gets a line for each file that is damaged and therefore not believed.

        Raises:
            ResumeError: the journal is that of another request, or of another version of the journal, or it is no journal.
        """
        head = check_partial(writer.output, fingerprint)
        if head is None:
            return cls(writer, fingerprint, replaces_output=False)
        journal = cls(writer, fingerprint, replaces_output=head["replaces_output"])
        journal._adopt_blocks(block_names, say)
        journal._adopt_sites(say)
        return journal

    @property
    def is_empty(self) -> bool:
        """Whether nothing is finished, so that nothing is lost without it."""
        return self.num_finished == 0 and self._num_sites == 0 and self.learned() is None

    def seconds_before_resume(self) -> dict[str, float]:
        """Return how long earlier processes worked on what is kept of them, for the report; empty when there were none."""
        return {"before_resume": self._earlier_seconds} if self._earlier_seconds else {}

    def summary(self) -> str:
        """Return what is kept, in words."""
        learned = "" if self.learned() is None else "what transforms learned, "
        return (
            f"{learned}{self.num_finished} finished blocks and {self._num_sites} finished matrices of the next one are kept "
            f"in {self._writer.partial}; the same command with --resume goes on"
        )

    # ------------------------------------------------------------------------------------------ what transforms learned
    def keep_learned(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what transforms have learned to disk.

        Raises:
            OutputError: the disk is full or fails.
        """
        try:
            write_record(self._folder / LEARNED, tensors, {})
        except OSError as error:
            raise output_error(self._writer.output, error) from error

    def learned(self) -> dict[str, Tensor] | None:
        """Return what an earlier process has learned, or None where it has not, or where the file is damaged."""
        try:
            return read_record(self._folder / LEARNED)[0] if (self._folder / LEARNED).is_file() else None
        except CheckpointError:
            return None

    # ------------------------------------------------------------------------------------------ finished blocks
    def keep_block(self, block: QuantisedBlock) -> None:
        """Write a finished block to disk, in place of its sites.

        Raises:
            OutputError: the disk is full or fails.
        """
        tensors = dict(block.rest)
        if block.compensation is not None:
            tensors |= compensation_tensors(block.name, block.compensation)
        for name, qtensor in block.sites.items():
            tensors |= site_tensors(name, qtensor)
        described = {
            name: {"spec": spec_to_json(entry.spec), "shape": list(entry.shape), "kind": entry.kind}
            for name, entry in block.entries().items()
        }
        values = {"sites": described, "report": asdict(block.report), "events": _events_to_json(block.events)}
        values["inputs"] = {name: input_to_json(scheme) for name, scheme in block.inputs.items()}
        values["attentions"] = {name: attention_to_json(scheme) for name, scheme in block.attentions.items()}
        if block.compensation is not None:
            values["compensation"] = block.compensation.shape.to_json()
        self._writer.add(block.name, tensors, {**values, "seconds": self._seconds()})
        self.num_finished += 1
        self._num_sites = 0
        for path in self._site_files():
            _remove(path)

    def read_block(self, index: int, device: torch.device) -> QuantisedBlock:
        """Return a finished block, its sites on `device`, without its other tensors.

        Raises:
            CheckpointError: the file is damaged.
        """
        return _read_part(self._writer.partial / PARTS / f"{index:04d}{SUFFIX}", device)[0]

    def _adopt_blocks(self, names: tuple[str, ...], say: Callable[[str], None]) -> None:
        while self.num_finished < len(names) and self._writer.next_part.is_file():
            path = self._writer.next_part
            try:
                block, seconds = _read_part(path, torch.device("cpu"))
            except CheckpointError as error:
                say(f"{error}; it is not believed, and the run goes on from before it")
                return
            if block.name != names[self.num_finished]:
                return
            self._writer.adopt()
            self._earlier_seconds = seconds
            self.num_finished += 1

    # ------------------------------------------------------------------------------------------ solved sites
    def keep_site(self, solved: SolvedSite) -> None:
        """Write the next solved site of the block under way to disk.

        Raises:
            OutputError: the disk is full or fails.
        """
        qtensor = solved.solution.qtensor
        values = {
            "site": solved.site.name,
            "spec": spec_to_json(qtensor.spec),
            "shape": list(qtensor.codes.shape),
            "kind": solved.site.kind,
            "report": asdict(solved.report),
            "events": _events_to_json(solved.solution.events),
            "carried": dict(solved.carried),
            "seconds": self._seconds(),
        }
        try:
            write_record(self._site_file(self._num_sites), site_tensors(solved.site.name, qtensor), values)
        except OSError as error:
            raise output_error(self._writer.output, error) from error
        self._num_sites += 1

    def known_sites(self, block: Block, device: torch.device) -> dict[str, SolvedSite]:
        """Return the solved sites of the block under way by name, on `device`.

        Raises:
            ResumeError: they are not sites of this block.
            CheckpointError: a file has been damaged since the journal was opened.
        """
        sites = {site.name: site for site in block.sites}
        known = {}
        for position in range(self._num_sites):
            path = self._site_file(position)
            tensors, values = read_record(path)
            with _as_written(path):
                site = sites.get(values["site"])
                if site is None or site.shape != tuple(values["shape"]):
                    raise ResumeError(f"{path} holds {values['site']}, which is no site of {block.name}; {START_AGAIN}")
                qtensor = _qtensor_of(tensors, site.name, values, device)
                solution = Solution(qtensor, events=_events_from_json(values["events"]))
                known[site.name] = SolvedSite(site, solution, SiteReport(**values["report"]), values["carried"])
        return known

    def _adopt_sites(self, say: Callable[[str], None]) -> None:
        while (path := self._site_file(self._num_sites)).is_file():
            try:
                _, values = read_record(path)
            except CheckpointError as error:
                say(f"{error}; it is not believed, and the run goes on from before it")
                break
            with _as_written(path):
                self._earlier_seconds = float(values["seconds"])
            self._num_sites += 1
        believed = {self._site_file(position) for position in range(self._num_sites)}
        for path in self._site_files():
            if path not in believed:
                _remove(path)

    def _site_file(self, position: int) -> Path:
        return self._folder / f"{self.num_finished:04d}-{position:04d}{SUFFIX}"

    def _site_files(self) -> list[Path]:
        return [path for suffix in (SUFFIX, SUFFIX + TEMPORARY) for path in self._folder.glob(f"*-*{suffix}")]

    def _seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._started


def _remove(path: Path) -> None:
    """Remove what is not believed, whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- may it go on?
def read_head(partial: Path) -> dict[str, Any] | None:
    """Return what journal.json says, or None where nothing has been journaled yet.

    Raises:
        ResumeError: the journal is damaged or of another version, or the folder is none that bitmend made.
    """
    path = partial / FOLDER / HEAD
    # What lies in there is read, written and removed; it must not lie elsewhere.
    links = [found for found in (partial / FOLDER, partial / PARTS, path) if found.is_symlink()]
    if links:
        raise ResumeError(f"{links[0]} is a link, and a run makes none; do not trust this folder, and {START_AGAIN}")
    if not path.is_file():
        # Killed before the first file was whole: folders, and perhaps a file that never got its name.
        if any(found.is_file() and found.suffix != TEMPORARY for found in partial.rglob("*")):
            raise ResumeError(f"{partial} holds no journal of a run, so there is nothing to go on with; {START_AGAIN}")
        return None
    try:
        head = parse_json(path.read_bytes(), str(path))
    except CheckpointError as error:
        raise ResumeError(f"{error}; {START_AGAIN}") from error
    version = head.get("journal_version")
    if version != JOURNAL_VERSION:
        raise ResumeError(
            f"{path} has journal_version {version}, this release of bitmend goes on with {JOURNAL_VERSION}; go on with the "
            f"release that wrote it, or {START_AGAIN}"
        )
    fingerprint = head.get("fingerprint")
    texts = isinstance(fingerprint, dict) and all(isinstance(part, str) for part in fingerprint.values())
    if not texts or not isinstance(head.get("replaces_output"), bool):
        raise ResumeError(f"{path} must hold a fingerprint and replaces_output, but one is missing; {START_AGAIN}")
    return head


def has_learned(output: Path) -> bool:
    """Return whether a stopped run of this output has journaled what its transforms learned."""
    return (partial_folder(output.resolve()) / FOLDER / LEARNED).is_file()


def check_partial(output: Path, fingerprint: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what the journal of a stopped run says, or None where there is none, after checking that it is of this request.

    Raises:
        ResumeError: it is of another request, damaged, or not ours.
    """
    partial = partial_folder(output)
    head = read_head(partial)
    if head is not None:
        check_same(partial, head["fingerprint"], fingerprint)
    return head


def check_same(place: Path, found: Mapping[str, Any], wanted: Mapping[str, str]) -> None:
    """Refuse to go on with the work of another request.

    Raises:
        ResumeError: the fingerprints differ; says in which parts.
    """
    differing = differences(found, wanted)
    if differing:
        raise ResumeError(
            f"{place} was made with another {', another '.join(differing)}; give the same request to go on, or {START_AGAIN}"
        )


def finished_run(output: Path, fingerprint: Mapping[str, str]) -> RunReport | None:
    """Return the report of a finished output of the same request, or None when there is something left to do.

    Raises:
        ResumeError: OUTPUT is a finished model of another request, and no stopped run was about to replace it; or its files
            are damaged.

    Cost: reads every byte of a finished output, for the checksums.
    """
    if not output.exists() or not any(output.iterdir()):
        return None
    path = output / "run.json"
    values: dict[str, Any] = parse_json(path.read_bytes(), str(path)) if path.is_file() else {}
    found = values.get("fingerprint")
    if isinstance(found, dict):
        found = {part: str(value) for part, value in found.items()}
    if isinstance(found, dict) and not differences(found, fingerprint):
        check_folder(output)
        with _as_written(path):
            return report_from_json(values)
    if (head := read_head(partial_folder(output))) is not None and head["replaces_output"]:
        return None
    if not isinstance(found, dict) or not found:
        raise ResumeError(f"{output} does not say what it was made with, so it cannot be gone on with; {START_AGAIN}")
    check_same(output, found, fingerprint)
    return None


def remove_leftovers(output: Path, fingerprint: Mapping[str, str]) -> None:
    """Remove what a run left that was killed when its output was finished; not what is in use or of another request.

    The model that was there before is removed while the partial folder says whose it is: that folder goes last.
    """
    partial = partial_folder(output)
    if not partial.is_dir():
        return
    with suppress(RequestError, OSError):  # of another request, damaged, or in use: not ours to remove
        head = read_head(partial)  # None: the journal itself is gone, and no other file is left
        if head is None or not differences(head["fingerprint"], fingerprint):
            lock = FolderLock(partial)
            if output.is_dir():
                shutil.rmtree(replaced_folder(output), ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)
            lock.release()


# ---------------------------------------------------------------------------------------------- from and to JSON
def report_from_json(values: Mapping[str, Any]) -> RunReport:
    """Return the report that a run.json was made of."""
    blocks = [_block_report(block) for block in values["blocks"]]
    return RunReport(**{**values, "blocks": blocks, "events": list(_events_from_json(values["events"]))})


def _block_report(values: Mapping[str, Any]) -> BlockReport:
    sites = [SiteReport(**site) for site in values["sites"]]
    transforms = [TransformReport(**one) for one in values.get("transforms", [])]
    return BlockReport(**{**values, "sites": sites, "transforms": transforms})


def _events_to_json(events: tuple[Event, ...]) -> list[dict[str, Any]]:
    return [asdict(event) for event in events]


def _events_from_json(values: list[dict[str, Any]]) -> tuple[Event, ...]:
    return tuple(Event(**event) for event in values)


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Make of values of other kinds than the journal writes, under whatever checksum, a damaged file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not hold what a run writes there ({type(error).__name__}: {error}); {START_AGAIN}"
        ) from error


def _read_part(path: Path, device: torch.device) -> tuple[QuantisedBlock, float]:
    """Return a finished block, and how many seconds of work led to it."""
    tensors, values = read_record(path)
    with _as_written(path):
        return _part_of(path, tensors, values, device)


def _part_of(
    path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], device: torch.device
) -> tuple[QuantisedBlock, float]:
    described = values.get("sites")
    if described is None:
        raise CheckpointError(f"{path} holds no block")
    sites = {name: _qtensor_of(tensors, name, about, device) for name, about in described.items()}
    kinds = {name: about["kind"] for name, about in described.items()}
    events = _events_from_json(values["events"])
    inputs = {name: input_from_json(name, about) for name, about in values["inputs"].items()}
    attentions = {name: attention_from_json(name, about) for name, about in values.get("attentions", {}).items()}
    report = _block_report(values["report"])
    name, about = values["part"], values.get("compensation")
    compensation = None if about is None else read_compensation(tensors, name, compensation_from_json(name, about))
    block = QuantisedBlock(name, sites, kinds, {}, report, events, inputs, attentions, compensation)
    return block, float(values["seconds"])


def _qtensor_of(tensors: Mapping[str, Tensor], name: str, about: Mapping[str, Any], device: torch.device) -> QTensor:
    out, width = about["shape"]
    placed = {key: tensor.to(device) for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    return read_site(placed, name, ManifestEntry(spec_from_json(about["spec"]), (out, width), about["kind"]))
