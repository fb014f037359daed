"""The command line.

Exit codes: 0 done, 1 the run failed or broke its own guard, 2 the request was wrong, 130 Ctrl-C, 143 terminated.

Commands import what they need when they run, so that this module itself needs the errors only.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bitmend.cli_options import (
    BitsOption,
    CalibrationOption,
    ClassNamesOption,
    Device,
    DeviceOption,
    DiskOption,
    GroupSizeOption,
    ImagesOption,
    JsonOption,
    LowMemoryOption,
    ModelArgument,
    OverwriteOption,
    PairsOption,
    PicturesOption,
    QuietOption,
    SeedOption,
    SequenceLengthOption,
    SequencesOption,
    SetOption,
    TemplatesOption,
    TextModelOption,
    TextOption,
    TowerOption,
    WindowLengthOption,
    WindowsOption,
    check_json_path,
    progress_of,
    recipe_keys,
    show_table,
    write_json,
)
from bitmend.cli_plan import plan
from bitmend.errors import QuantizationError, RequestError

INTERRUPTED, TERMINATED = 130, 143  # what shells make of SIGINT and SIGTERM: 128 and the number
WINDOWS_AT_ONCE, PICTURES_AT_ONCE = 8, 64
NOTHING_LEFT = "nothing unfinished was left behind"

app = typer.Typer(
    help="Compress trained networks to 4 bits and below, repair the damage, prove the repair.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Listing(StrEnum):
    """What `bitmend list` can list."""

    SOLVERS = "solvers"
    TRANSFORMS = "transforms"
    REPARAMETERISATIONS = "reparameterisations"
    COMPENSATORS = "compensators"
    RECIPES = "recipes"
    MODELS = "models"
    FORMATS = "formats"


@app.command()
def quantize(
    model: ModelArgument,
    recipe: Annotated[str, typer.Option(help="A shipped recipe, a solver's name, or a .toml file.")] = "gptq",
    bits: BitsOption = None,
    group_size: GroupSizeOption = None,
    assignment: SetOption = None,
    calibration: CalibrationOption = None,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    seed: SeedOption = None,
    device: DeviceOption = Device.AUTO,
    output: Annotated[Path | None, typer.Option(help="The folder to be; ./MODEL-RECIPE unless given.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a stopped run; start one where there is none.")
    ] = False,
    overwrite: OverwriteOption = False,
    activations_on_disk: DiskOption = False,
    low_memory: LowMemoryOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the request, show the recipe, write nothing.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let transformers run code that comes with the model.")
    ] = False,
    tower: TowerOption = None,
    quiet: QuietOption = False,
    log_json: Annotated[Path | None, typer.Option(help="Write the run report to this file too.")] = None,
) -> None:
    """Quantise a model into a new folder that transformers loads."""
    from bitmend.pipeline import run, towers
    from bitmend.pipeline.recipe import load_recipe

    check_json_path(log_json, made_by_run=output)
    plan = load_recipe(recipe, recipe_keys(assignment, bits, group_size, sequences, sequence_length, seed))
    options: dict[str, Any] = {
        "output": output,
        "resume": resume,
        "overwrite": overwrite,
        "device": device.value,
        "trust_remote_code": trust_remote_code,
        "tower": None if tower is None else tower.value,
    }
    if dry_run:
        target = towers.check_request(model, plan, calibration or (), **options)
        typer.echo(f"# would write {target}\n{plan.to_toml()}", nl=False)
        return
    options |= {"activations_on_disk": activations_on_disk, "low_memory": low_memory}
    options["progress"] = progress_of(quiet)
    with _telling_what_is_kept():
        report = towers.quantize(model, plan, calibration or (), **options)
    if log_json is not None:
        write_json(log_json, run.report_to_json(report))
    _show_run(report)
    run.check_guard(report)


app.command()(plan)


@app.command()
def compensate(
    model: Annotated[str, typer.Argument(help="The quantised model: a folder or a hub name.", show_default=False)],
    reference: Annotated[
        str, typer.Option(help="The model that it was made from: a folder or a hub name.", show_default=False)
    ],
    calibration: CalibrationOption = None,
    assignment: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a key of the compensator, for example structure=full.")
    ] = None,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    seed: SeedOption = None,
    device: DeviceOption = Device.AUTO,
    output: Annotated[Path | None, typer.Option(help="The folder to be; ./MODEL-qwt unless given.")] = None,
    overwrite: OverwriteOption = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let transformers run code that comes with the reference.")
    ] = False,
    quiet: QuietOption = False,
    log_json: Annotated[Path | None, typer.Option(help="Write the run report to this file too.")] = None,
) -> None:
    """Put small maps beside the blocks of a quantised model, ours or a peer's, where they repair what it has lost."""
    from bitmend.pipeline.compensate import compensate as put_beside
    from bitmend.pipeline.run import report_to_json

    check_json_path(log_json, made_by_run=output)
    report = put_beside(
        model,
        reference,
        calibration or (),
        output=output,
        overrides=recipe_keys(assignment, None, None, sequences, sequence_length, seed),
        overwrite=overwrite,
        device=device.value,
        trust_remote_code=trust_remote_code,
        progress=progress_of(quiet),
    )
    if log_json is not None:
        write_json(log_json, report_to_json(report))
    _show_run(report)


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub names.", show_default=False)],
    text: TextOption = None,
    images: ImagesOption = None,
    pairs: PairsOption = None,
    class_names: ClassNamesOption = None,
    templates: TemplatesOption = None,
    text_model: TextModelOption = None,
    reference: Annotated[str | None, typer.Option(help="The model to compare with, usually the original.")] = None,
    windows: WindowsOption = 160,
    window_length: WindowLengthOption = 512,
    pictures: PicturesOption = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows (8 unless given), pictures or sentences (64) that run at once.", min=1)
    ] = None,
    device: DeviceOption = Device.AUTO,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Score models on texts, pictures or sentence pairs: perplexity, top-1, embeddings, and agreement with a reference."""
    from bitmend.evaluate.evaluate import evaluate as score
    from bitmend.evaluate.zero_shot import read_zero_shot
    from bitmend.pipeline.run import choose_device
    from bitmend.report.summary import evaluation_rows

    check_json_path(json_file)
    if not text and not images and not pairs:
        raise RequestError(
            "evaluate needs at least one text, set of pictures or file of sentence pairs, but none came; pass --text FILE, "
            "--images PATH or --pairs FILE"
        )
    if class_names is None and (templates is not None or text_model is not None):
        raise RequestError("templates and a text model describe classes, but no classes came; pass --class-names FILE")
    report = score(
        models,
        texts=text or (),
        images=images or (),
        pairs=pairs or (),
        zero_shot=None if class_names is None else read_zero_shot(class_names, templates),
        text_model=text_model,
        reference=reference,
        windows=windows or None,
        window_length=window_length,
        pictures=pictures or None,
        batch_size=batch_size or (WINDOWS_AT_ONCE if text else PICTURES_AT_ONCE),
        device=choose_device(device.value),
        progress=progress_of(quiet),
    )
    if json_file is not None:
        write_json(json_file, report.to_dict())
    show_table(*evaluation_rows(report))


@app.command()
def compare(
    model: ModelArgument,
    recipes: Annotated[
        list[str],
        typer.Option(metavar="LIST", help="Separated by commas, see above; may be given again.", show_default=False),
    ],
    output: Annotated[Path, typer.Option(help="The folder to be.", show_default=False)],
    calibration: CalibrationOption = None,
    text: TextOption = None,
    bits: BitsOption = None,
    group_size: GroupSizeOption = None,
    assignment: SetOption = None,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    seed: SeedOption = None,
    windows: WindowsOption = 160,
    window_length: WindowLengthOption = 512,
    device: DeviceOption = Device.AUTO,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a comparison; run what is not finished, or new in the list.")
    ] = False,
    overwrite: OverwriteOption = False,
    discard_models: Annotated[
        bool, typer.Option("--discard-models", help="Keep the records of the runs, not the weights.")
    ] = False,
    activations_on_disk: DiskOption = False,
    low_memory: LowMemoryOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare recipes: the same calibration rows, the same texts, one table, best first.

    An entry of --recipes is RECIPE, LABEL=RECIPE, or LABEL=RECIPE:KEY=VALUE;KEY=VALUE with keys of its own:

    --recipes 'rtn,gptq,gptaq-1=gptaq:solver.residual_strength=1.0'
    """
    from bitmend.comparison import compare as run_comparison
    from bitmend.report.comparison import check_comparison, comparison_rows

    found = run_comparison(
        model,
        recipes,
        calibration or (),
        texts=text or (),
        output=output,
        overrides=recipe_keys(assignment, bits, group_size, sequences, sequence_length, seed),
        windows=windows or None,
        window_length=window_length,
        device=device.value,
        resume=resume,
        overwrite=overwrite,
        keep_models=not discard_models,
        activations_on_disk=activations_on_disk,
        low_memory=low_memory,
        progress=progress_of(quiet),
    )
    show_table(*comparison_rows(found))
    check_comparison(found)


@app.command()
def inspect(model: ModelArgument, json_file: JsonOption = None) -> None:
    """Count the bits of a checkpoint from its saved bytes."""
    from bitmend.formats.integrity import check_folder
    from bitmend.formats.ledger import ledger
    from bitmend.models.loading import resolve_model

    folder = resolve_model(model)
    check_folder(folder)
    account = ledger(folder)
    if json_file is not None:
        write_json(json_file, account.to_json())
    _show_ledger(str(model), account)


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="What to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="New tokens.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperature > 0.")] = 0,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Continue a text with a model."""
    from bitmend.evaluate.generation import generate_text
    from bitmend.pipeline.run import choose_device

    text = generate_text(
        model, prompt, tokens=tokens, temperature=temperature, seed=seed, device=choose_device(device.value)
    )
    typer.echo(text)


@app.command()
def export(
    model: ModelArgument,
    format_name: Annotated[str, typer.Option("--format", help="compressed-tensors or gptq.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The folder to be.", show_default=False)],
    overwrite: OverwriteOption = False,
) -> None:
    """Write a bitmend checkpoint in another tool's format, read it back and compare before it counts as done."""
    from bitmend.models.loading import resolve_model
    from bitmend.protocols import FORMATS

    target = FORMATS[format_name](overwrite=overwrite)
    events = target.export(resolve_model(model), output)
    for event in events:
        typer.echo(f"{event.where}: {event.message}", err=True)
    typer.echo(f"wrote {output}; {target.proof}")


@app.command(name="list")
def list_parts(
    kind: Annotated[Listing | None, typer.Argument(help="One kind; all of them unless given.")] = None,
) -> None:
    """List the parts that recipes can name."""
    from bitmend.report.listing import listing
    from bitmend.report.terminal import print_table

    for name in [kind] if kind is not None else list(Listing):
        print_table(name.value, ("name", "what it does", "source"), listing(name.value))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the quantised models go.")] = Path("out/demo"),
    bits: Annotated[int, typer.Option(help="Width of a code.", min=1, max=8)] = 3,
    quiet: QuietOption = False,
) -> None:
    """Run the main job on the embedded model: quantise, load, measure, compare."""
    from bitmend.demo import run_demo

    run_demo(output, bits=bits, progress=progress_of(quiet))


class _Terminated(BaseException):
    """SIGTERM came; like Ctrl-C, it lets the run tidy up."""


class _Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """A command was stopped and its work is kept; carries the exit code."""

    def __init__(self, code: int, kept: str) -> None:
        super().__init__(kept)
        self.code = code


def main() -> None:
    """Run the command line and leave with the exit code that the outcome asks for."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    _be_quiet_about_libraries()
    with _signals_as_exceptions() as received:
        code = _run(arguments, debug, received)
    sys.exit(code)


def _run(arguments: list[str], debug: bool, received: list[int]) -> int:
    try:
        code = app(args=arguments, prog_name="bitmend", standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except _Terminated:
        code = TERMINATED
    except _Stopped as stop:
        return _fail(f"stopped; {stop}", stop.code, debug)
    except Exception as error:
        if received:  # foreign code may make an error of its own out of the exception that a signal raised in it
            return _fail(f"stopped; {'; '.join(_notes(error)) or NOTHING_LEFT}", 128 + received[0], debug)
        if isinstance(error, QuantizationError):
            return _fail("; ".join([f"error: {error}", *_notes(error)]), error.exit_code, debug)
        return _fail_unexpectedly(error, debug)
    if code in (INTERRUPTED, TERMINATED):  # the option parser, too, makes this of Ctrl-C
        typer.echo(f"stopped; {NOTHING_LEFT}", err=True)
    return code if isinstance(code, int) else 0


@contextmanager
def _signals_as_exceptions() -> Iterator[list[int]]:
    """Raise an exception where SIGINT or SIGTERM comes, and yield the list of those that came."""
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _telling_what_is_kept() -> Iterator[None]:
    """Carry what a stopped run says of its kept work past the option parser, which knows of exit codes only."""
    try:
        yield
    except (KeyboardInterrupt, _Terminated) as stop:
        code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED
        for note in _notes(stop):
            raise _Stopped(code, note) from stop
        raise


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _fail(sentence: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    typer.echo(sentence, err=True)
    return code


def _fail_unexpectedly(error: Exception, debug: bool) -> int:
    show = getattr(error, "show", None)
    if show is not None:  # a usage error of the option parser: it knows how to print itself
        show()
        return int(getattr(error, "exit_code", 2))
    name, reason = type(error).__name__, " ".join(str(error).split())
    sentence = f"error: unexpected {name}: {reason} (run again with --debug for the traceback)"
    return _fail("; ".join([sentence, *_notes(error)]), 1, debug)


def _be_quiet_about_libraries() -> None:
    """Keep the advice of transformers off our own lines."""
    import transformers

    transformers.logging.set_verbosity_error()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _show_run(report: Any) -> None:
    from bitmend.report.summary import run_lines

    for line in run_lines(report):
        typer.echo(line)


def _show_ledger(model: str, account: Any) -> None:
    from bitmend.report.summary import ledger_rows, online_rows, scheme_rows
    from bitmend.report.terminal import print_table

    header, rows = ledger_rows(account)
    print_table(f"{model} ({account.format})", header, rows)
    header, rows = scheme_rows(account)
    if rows:
        print_table("schemes", header, rows)
    header, rows = online_rows(account)
    if rows:
        print_table("activations", header, rows)
