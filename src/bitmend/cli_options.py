"""What several commands of the command line share: their options, and what is made of them."""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bitmend.errors import RequestError


class Device(StrEnum):
    """Where networks run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Tower(StrEnum):
    """Parts of a model with two towers."""

    VISION = "vision"
    TEXT = "text"


ModelArgument = Annotated[str, typer.Argument(help="A local model folder or a hub name.", show_default=False)]
DeviceOption = Annotated[Device, typer.Option(help="auto takes CUDA where there is one.")]
TowerOption = Annotated[
    Tower | None,
    typer.Option(
        help="Of a model with two towers, such as CLIP: the part to take, as a model of its own.", show_default=False
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]
BitsOption = Annotated[int | None, typer.Option(help="Width of a code, 1 to 8 (weights.bits).")]
GroupSizeOption = Annotated[
    int | None, typer.Option(help="Input channels that share a scale; -1: one per output channel.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Replace a recipe key, for example solver.damping=0.05.")
]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Text, .jsonl, .npy or hf:NAME; for a model of pictures a folder, .tar or .npz of them; may be given again."
    ),
]
SequencesOption = Annotated[int | None, typer.Option(help="Calibration rows, or pictures.")]
SequenceLengthOption = Annotated[int | None, typer.Option(help="Tokens in a calibration row.")]
SeedOption = Annotated[int | None, typer.Option(help="Which rows are drawn and which are held out.")]
TextOption = Annotated[list[Path] | None, typer.Option(help="A UTF-8 text; may be given again.")]
ImagesOption = Annotated[
    list[Path] | None, typer.Option(help="Pictures in class folders, a .tar of them or an .npz; may be given again.")
]
PicturesOption = Annotated[int, typer.Option(help="Pictures of each set; 0 for all.", min=0)]
PairsOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="Sentence pairs for encoders: two columns and perhaps a score, tabs between; may be given again."
    ),
]
ClassNamesOption = Annotated[
    Path | None, typer.Option(help="Names of the classes, one a line: an encoder of pictures becomes a classifier.")
]
TemplatesOption = Annotated[
    Path | None, typer.Option(help="With --class-names: descriptions with {} for the name, one a line.")
]
TextModelOption = Annotated[
    str | None,
    typer.Option(help="With --class-names: what embeds the descriptions; a model with two towers needs none."),
]
WindowsOption = Annotated[int, typer.Option(help="Windows of each text; 0 for all.", min=0)]
WindowLengthOption = Annotated[int, typer.Option(help="Tokens in a window.", min=2)]
DiskOption = Annotated[
    bool, typer.Option("--activations-on-disk", help="Keep calibration activations on disk, not in memory.")
]
LowMemoryOption = Annotated[
    bool, typer.Option("--low-memory", help="Compute wide layers twice in place of keeping what they give.")
]


def progress_of(quiet: bool) -> Any:
    """Return where a command shows its progress."""
    from bitmend.protocols import SilentProgress
    from bitmend.report.terminal import TerminalProgress

    return SilentProgress() if quiet else TerminalProgress()


def recipe_keys(
    assignment: list[str] | None,
    bits: int | None,
    group_size: int | None,
    sequences: int | None,
    sequence_length: int | None,
    seed: int | None,
) -> dict[str, Any]:
    """Return the recipe keys that the options of a command set.

    Raises:
        RequestError: a key that is set twice, by `--set` and by an option of its own.
    """
    from bitmend.pipeline.recipe import parse_assignments

    short = {
        "weights.bits": bits,
        "weights.group_size": group_size,
        "calibration.sequences": sequences,
        "calibration.sequence_length": sequence_length,
        "calibration.seed": seed,
    }
    keys = parse_assignments(assignment or [])
    for key, value in short.items():
        if value is not None and key in keys:
            raise RequestError(
                f"{key} is set twice, by --set to {keys[key]!r} and by its own option to {value}; keep one"
            )
    return keys | {key: value for key, value in short.items() if value is not None}


def check_json_path(path: Path | None, made_by_run: Path | None = None) -> None:
    """Refuse a file that cannot be written before hours of work are lost on it."""
    if path is None or (made_by_run is not None and path.resolve().parent == made_by_run.resolve()):
        return
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RequestError(
            f"the result cannot be written to {path}: need a file in an existing folder that may be written; choose another"
        )


def write_json(path: Path, content: Any) -> None:
    """Write a result as JSON.

    Raises:
        RequestError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"the result could not be written to {path}: {error.strerror}") from error


def show_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table without a title."""
    from bitmend.report.terminal import print_table

    print_table("", header, rows)
