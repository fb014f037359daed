"""`bitmend plan`: what a run would take, without running it."""

from pathlib import Path
from typing import Annotated

import typer

from bitmend.cli_options import (
    BitsOption,
    CalibrationOption,
    Device,
    DeviceOption,
    DiskOption,
    GroupSizeOption,
    JsonOption,
    LowMemoryOption,
    ModelArgument,
    SeedOption,
    SequenceLengthOption,
    SequencesOption,
    SetOption,
    TowerOption,
    check_json_path,
    recipe_keys,
    show_table,
    write_json,
)


def plan(
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
    output: Annotated[Path | None, typer.Option(help="Where the run would write; for the free disk there.")] = None,
    activations_on_disk: DiskOption = False,
    low_memory: LowMemoryOption = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let transformers run code that comes with the model.")
    ] = False,
    tower: TowerOption = None,
    json_file: JsonOption = None,
) -> None:
    """Forecast memory, disk and time of `bitmend quantize` with the same options; nothing is written.

    Without --calibration the rows that the recipe asks for are assumed. Exit code 2 when the run would not fit.
    """
    from bitmend.pipeline import run
    from bitmend.pipeline.recipe import load_recipe
    from bitmend.report.plan import plan_lines, plan_rows

    check_json_path(json_file)
    found = run.plan(
        model,
        load_recipe(recipe, recipe_keys(assignment, bits, group_size, sequences, sequence_length, seed)),
        calibration or (),
        output=output,
        device=device.value,
        activations_on_disk=activations_on_disk,
        low_memory=low_memory,
        trust_remote_code=trust_remote_code,
        tower=None if tower is None else tower.value,
    )
    if json_file is not None:
        write_json(json_file, found.to_json())
    show_table(*plan_rows(found))
    for line in plan_lines(found):
        typer.echo(line)
