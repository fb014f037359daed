"""The forecast beside what runs really take: three shapes, a model larger than its memory, growth, a block of an 8B model.

    OMP_NUM_THREADS=1 python benchmarks/bench_forecast.py shapes --work out/forecast
    OMP_NUM_THREADS=1 python benchmarks/bench_forecast.py stream --work out/forecast
    OMP_NUM_THREADS=1 python benchmarks/bench_forecast.py growth --work out/forecast --plots docs/results
    OMP_NUM_THREADS=2 python benchmarks/bench_forecast.py block --work out/forecast

Each run is a process of its own. Another process reads its anonymous memory (RssAnon in /proc/PID/status) and the size of its
partial folder every 50 ms; what it held after its imports is taken off. *Ahead* is what it takes after the forecast was made:
before that a tokenizer is at work on the texts. Models are made by `synthetic_model.py`. Results are
kept in WORK/NAME.json, so that a stopped measurement goes on.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from synthetic_model import weight_bytes, write_model

SHAPES = {
    "small": {"width": 128, "intermediate": 352, "blocks": 2, "heads": 4, "key_heads": 2},
    "middle": {"width": 256, "intermediate": 704, "blocks": 4, "heads": 4, "key_heads": 2},
    "large": {"width": 512, "intermediate": 1408, "blocks": 6, "heads": 8, "key_heads": 4},
}
STREAMED = {"width": 2048, "intermediate": 5632, "blocks": 40, "heads": 16, "key_heads": 4, "shard_bytes": 400e6}
GROWN = {"width": 128, "intermediate": 352, "blocks": 4, "heads": 4, "key_heads": 2}
BLOCK = {"width": 4096, "intermediate": 14336, "blocks": 1, "heads": 32, "key_heads": 8}  # one of Llama-3-8B
SECONDS_BETWEEN = 0.05
CHILD = """
import json, sys, time
import bitmend, torch, transformers
from bitmend import assets
from bitmend.pipeline.run import quantize
from bitmend.pipeline.machine import anonymous_bytes
from bitmend.protocols import SilentProgress
from pathlib import Path
class Marking(SilentProgress):
    def say(self, line):
        if line.startswith("forecast:"):
            Path(asked["mark"]).touch()
            asked["cpu"] = time.process_time()
asked = json.loads(sys.argv[1])
print(json.dumps(anonymous_bytes()), flush=True)
sys.stdin.readline()
rows = [assets.path(name) if asked["named"] else Path(name) for name in asked["rows"]]
report = quantize(asked["model"], asked["recipe"], rows, output=asked["output"], overrides=asked["keys"],
    tower=asked["tower"], progress=Marking())
sites = [site.diagnostics.get("passes", 0) for block in report.blocks for site in block.sites]
print(json.dumps({"seconds": report.seconds, "forecast": report.forecast,
    "passes": sum(sites) / max(1, len(sites)), "cpu": time.process_time() - asked["cpu"]}))
"""


def measure(work, name, model, recipe, keys, *, rows=("books-calibration",), named=True, tower=None, keep=False):
    """Run once, watched, and return what was forecast and what came; a result that is there already is read.

    Rows are names of assets, or paths where they are not `named`. The output is removed unless it is to be kept.
    """
    record = work / f"{name}.json"
    if record.is_file():
        return json.loads(record.read_text())
    output = work / "runs" / name
    for folder in (output, Path(f"{output}.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    asked = {"model": str(model), "recipe": recipe, "keys": keys, "output": str(output)}
    asked |= {"rows": [str(one) for one in rows], "named": named, "tower": tower}
    mark = work / f"{name}.mark"
    mark.unlink(missing_ok=True)
    asked["mark"] = str(mark)
    command = [sys.executable, "-c", CHILD, json.dumps(asked)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    baseline = json.loads(child.stdout.readline())
    started = time.perf_counter()
    child.stdin.write("\n")
    child.stdin.flush()
    memory, ahead, disk = 0, 0, 0
    while child.poll() is None:
        now = anonymous(child.pid) - baseline
        memory = max(memory, now)
        if mark.exists():  # the forecast has been made
            ahead = max(ahead, now)
        disk = max(disk, bytes_in(Path(f"{output}.partial")))
        time.sleep(SECONDS_BETWEEN)
    wall = time.perf_counter() - started
    found = json.loads(child.stdout.read())
    forecast = found["forecast"]
    result = {
        "name": name,
        "weights": weight_bytes(model),
        "passes": found["passes"],
        "cpu": found["cpu"],
        "memory": memory,
        "memory_forecast": forecast["host_bytes"],
        "ahead": ahead,
        "ahead_forecast": forecast["host_bytes_ahead"],
        "disk": disk,
        "disk_forecast": forecast["partial_bytes"],
        "output": bytes_in(output),
        "output_forecast": forecast["output_bytes"],
        "seconds": wall,
        "seconds_forecast": forecast["seconds"]["total"],
        "phases": found["seconds"],
        "phases_forecast": forecast["seconds"],
    }
    if not keep:
        shutil.rmtree(output)
    record.write_text(json.dumps(result, indent=1))
    return result


def anonymous(pid):
    """Return the anonymous memory of a process in bytes; 0 when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def bytes_in(folder):
    """Return the size of all files in a folder; files and folders that vanish meanwhile count nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).stat().st_size
            except OSError:
                continue
    return total


def keys_of(sequences=32, length=256, **more):
    """Return recipe keys of a run."""
    keys = {"weights.bits": 4, "weights.group_size": 32, "calibration.sequences": sequences}
    return {**keys, "calibration.sequence_length": length, **more}


def header():
    """Print the header of the table."""
    columns = ["run", "weights MB"]
    for what in ("memory MB", "ahead MB", "disk MB"):
        columns += [what, "forecast", "ratio"]
    columns += ["output ratio", "forecast s", "clock", "ratio", "CPU", "ratio"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")


def row(result):
    """Print one row of the table; ratios are forecast over measured."""
    cells = [result["name"], f"{result['weights'] / 1e6:.1f}"]
    for what in ("memory", "ahead", "disk"):
        got, said = result[what], result[f"{what}_forecast"]
        cells += [f"{got / 1e6:.1f}", f"{said / 1e6:.1f}", f"{said / got:.2f}"]
    cells.append(f"{result['output_forecast'] / result['output']:.2f}")
    # After the forecast, on the clock and in processor seconds of the one thread: a clock also tells of other work.
    spent = result["phases_forecast"]["open"]
    clock, cpu, said = result["phases"]["total"] - spent, result["cpu"], result["seconds_forecast"] - spent
    cells += [f"{said:.1f}", f"{clock:.1f}", f"{said / clock:.2f}", f"{cpu:.1f}", f"{said / cpu:.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def shapes(work, _plots):
    """Three shapes, gptq and marr."""
    header()
    for shape, sizes in SHAPES.items():
        model = write_model(work / "models" / shape, **sizes)
        for recipe in ("gptq", "marr"):
            row(measure(work, f"{shape}-{recipe}", model, recipe, keys_of()))


def stream(work, _plots):
    """A model of 40 blocks, whose run must hold less than a quarter of it."""
    model = write_model(work / "models" / "streamed", **STREAMED)
    header()
    minmax = {"weights.observer": "minmax"}
    # gptq in the attention layers only, without held-out rows: 40 blocks with all layers take an hour on one thread.
    attention = {**minmax, "calibration.held_out": 0.0, "overrides": [{"targets": ["re:.*mlp.*"], "skip": True}]}
    text = ("books-calibration",)
    for name, recipe, rows, keys in (("stream-rtn", "rtn", (), minmax), ("stream-gptq", "gptq", text, attention)):
        result = measure(work, name, model, recipe, keys_of(4, 64, **keys), rows=rows)
        row(result)
        share = result["memory"] / result["weights"]
        below = result["memory"] < result["memory_forecast"]
        print(f"{name}: {share:.3f} of the weights' bytes; below the forecast: {below}", flush=True)


def block(work, _plots):
    """One block of the shape of Llama-3-8B, 8,192 tokens, gptq and marr."""
    model = write_model(work / "models" / "block", **BLOCK)
    header()
    for recipe in ("gptq", "marr"):
        result = measure(work, f"block-{recipe}", model, recipe, keys_of(16, 512, **{"weights.group_size": 128}))
        row(result)
        print(json.dumps({phase: round(seconds, 1) for phase, seconds in result["phases"].items()}), flush=True)


def growth(work, plots):
    """Time and memory against tokens, blocks and width, each with the slope that is expected."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    series = {
        "tokens": ((4096, 8192, 16384), 1.0, lambda tokens: (GROWN, keys_of(tokens // 256))),
        "blocks": ((4, 8, 16), 1.0, lambda blocks: ({**GROWN, "blocks": blocks}, keys_of(16))),
        "width": ((128, 256, 512), 2.0, lambda width: (_wide(width), keys_of(16))),
    }
    header()
    for name, (values, slope, of) in series.items():
        results = []
        for value in values:
            sizes, keys = of(value)
            model = write_model(work / "models" / "-".join(str(part) for part in sizes.values()), **sizes)
            results.append(measure(work, f"growth-{name}-{value}", model, "gptaq", keys))
            row(results[-1])
        figure, axes = pyplot.subplots(1, 2, figsize=(8, 3))
        for axis, what, unit in zip(axes, ("seconds", "memory"), (1, 1e6), strict=True):
            got, said = zip(*(_ahead(result, what, unit) for result in results), strict=True)
            axis.loglog(values, got, "o-", label="measured")
            axis.loglog(values, said, "x--", label="forecast")
            power = slope if what == "seconds" else min(slope, 2.0)
            axis.loglog(
                values, [got[-1] * (value / values[-1]) ** power for value in values], ":", label=f"slope {power:g}"
            )
            axis.set_xlabel(name)
            axis.set_ylabel("processor seconds" if what == "seconds" else "anonymous MB above baseline")
            axis.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(plots / f"2026-11-20_cpu-2_forecast-{name}.png", dpi=70)
        pyplot.close(figure)


def _ahead(result, what, unit):
    """Return what was measured and forecast: memory after the forecast, processor seconds."""
    if what == "memory":
        return result["ahead"] / unit, result["ahead_forecast"] / unit
    return result["cpu"], result["seconds_forecast"] - result["phases_forecast"]["open"]


def _wide(width):
    return {"width": width, "intermediate": width * 11 // 4, "blocks": 2, "heads": 4, "key_heads": 2}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("shapes", "stream", "growth", "block"))
    parser.add_argument("--work", type=Path, default=Path("out/forecast"))
    parser.add_argument("--plots", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    (options.work / "runs").mkdir(parents=True, exist_ok=True)
    {"shapes": shapes, "stream": stream, "growth": growth, "block": block}[options.what](options.work, options.plots)


if __name__ == "__main__":
    main()
