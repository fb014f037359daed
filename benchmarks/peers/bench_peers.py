"""bitmend beside other quantisers: the same rows, the same grid sizes, one evaluator, each tool in its own environment.

    python benchmarks/peers/environments.py                          # once; `make bench-peers` does both
    python benchmarks/peers/bench_peers.py --output out/peers
    python benchmarks/peers/bench_peers.py --output out/peers --timing

The first scores every contestant at W4 g128, W3 g128 and W2 g64. The second measures wall time and memory beside those of
GPTQModel in alternating runs, on books-7m and on a synthetic model of 8 blocks 1,024 wide. `--tune` tries settings of
GPTQModel for time.

Every finished run is one line of results.jsonl and is not repeated; delete the line to run it again. A tool that is not
installed, fails, or cannot do what is asked is a line with its reason. Exit code: 1 when a contestant failed or is not
installed (also in an earlier call), else 0. A width that a tool does not have is no failure.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from contestants import ACCURACY, OURS, TIMING, TUNE
from environments import interpreter
from measure import run_script
from tables import accuracy_table, timing_table

from bitmend import assets
from bitmend.calibrate.data import load_calibration
from bitmend.errors import UnknownNameError
from bitmend.models.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEXTS = ("books-eval", "wikitext2-test")
WIDTHS = {4: 128, 3: 128, 2: 64}  # bits -> group size
LENGTH = 512
ROWS = {"books-7m": 128, "wide": 32}
WARM_UP_ROWS = 4
WIDE = {"hidden": 1024, "intermediate": 2816, "blocks": 8, "heads": 16}


class Bench:
    """One folder of results."""

    def __init__(self, options):
        """Read what is there."""
        self.options = options
        self.folder = options.output.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "results.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.results = [json.loads(line) for line in lines]

    def run(self, key, contestant, *, model, rows, bits, threads, then=None):
        """Run one contestant unless its line is there. `then(record, checkpoint)` adds to the record."""
        if any(result["key"] == key for result in self.results):
            return
        work = self.folder / "work" / f"{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        (work / "output").mkdir(parents=True)
        python = (
            Path(sys.executable) if contestant.tool == OURS else interpreter(self.options.environments, contestant.tool)
        )
        settings = dict(contestant.settings)
        if contestant.tool == OURS:
            settings["calibration.seed"] = key.get("draw") or 0
        request = {
            "model": str(self.model(model)),
            "rows": None if rows is None else str(rows),
            "method": contestant.method,
            "bits": bits,
            "group_size": WIDTHS[bits],
            "threads": threads,
            "settings": settings,
            "output": str(work / "output"),
        }
        script = HERE / contestant.tool / "quantise.py"
        if python.exists():
            record = run_script(
                python, script, request, work, environment=self.environment(contestant), timeout=self.options.timeout
            )
        else:
            record = {
                "status": "failed",
                "reason": "not installed: benchmarks/peers/environments.py makes its environment",
            }
        if record["status"] == "ok" and then is not None:
            try:
                record |= then(record, work / "output" / record["checkpoint"])
            except Exception as error:  # one checkpoint that cannot be read must not end the others
                record |= {"status": "failed", "reason": f"reading it: {type(error).__name__}: {error}"[:400]}
        if record["status"] != "failed" or not self.options.keep_failed:
            shutil.rmtree(work, ignore_errors=True)
        self.keep({"key": key, **asdict(contestant), **record})

    def keep(self, result):
        """Append one line and say so."""
        self.results.append(result)
        with self.file.open("a") as file:
            file.write(json.dumps(result) + "\n")
        words = result["reason"] or " ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
        print(f"{json.dumps(result['key'])}: {result['status']}: {words}", flush=True)

    def environment(self, contestant):
        """Return the environment variables of a script: ours finds this checkout, peers must not."""
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        variables.pop("PYTHONPATH", None)
        if contestant.tool == OURS:
            variables["PYTHONPATH"] = str(ROOT / "src")
        return variables

    def model(self, name):
        """Return a model's folder; the wide one is made when it is first asked for."""
        if name != "wide":
            return assets.path(name)
        folder = self.folder / "wide"
        if not (folder / "config.json").exists():
            sizes = [part for key, value in WIDE.items() for part in (f"--{key}", str(value))]
            subprocess.run([sys.executable, HERE.parent / "make_wide_model.py", folder, *sizes], check=True)
        return folder

    def rows(self, count, draw):
        """Return the file with the calibration rows of a draw, as bitmend draws them."""
        file = self.folder / f"rows-{count}x{LENGTH}-draw{draw}.npy"
        if not file.exists():
            rows = load_calibration(
                [assets.path("books-calibration")],
                load_tokenizer(assets.path("books-7m")),
                sequences=count,
                sequence_length=LENGTH,
                held_out=0.0,
                seed=draw,
            )
            np.save(file, np.stack([row.numpy() for row in rows.rows]))
        return file


def accuracy(bench, options):
    """Run and score every contestant at every width, draw by draw."""
    from score import score

    try:
        texts = {name: assets.path(name) for name in TEXTS}
    except UnknownNameError as error:
        raise SystemExit(
            f"the accuracy part scores on {' and '.join(TEXTS)}: {error}; docs/data.md says where"
        ) from error
    reference = assets.path("books-7m")

    def scored(record, checkpoint):
        return score(checkpoint, record["reader"], record["notes"], reference, texts, bench.folder / "reference-cache")

    for draw in range(options.draws):
        for bits in options.bits:
            for contestant in chosen(ACCURACY, options):
                if draw and not contestant.uses_rows:
                    continue
                key = {"part": "accuracy", "name": contestant.name, "model": "books-7m", "bits": bits}
                rows = bench.rows(ROWS["books-7m"], draw) if contestant.uses_rows else None
                key["draw"] = draw if contestant.uses_rows else None
                bench.run(
                    key, contestant, model="books-7m", rows=rows, bits=bits, threads=options.threads[0], then=scored
                )
    write(bench, "accuracy.md", accuracy_table(bench.results))


def timing(bench, options, contestants, part):
    """Measure contestants in turn, again and again: A B C, A B C.

    Each peer runs once before that, on a few rows: in a new environment its first run may compile what later ones find.
    """
    for contestant in chosen(contestants, options):
        if contestant.tool != OURS and interpreter(options.environments, contestant.tool).exists():
            key = {"part": "warm-up", "name": contestant.name}
            bench.run(key, contestant, model="books-7m", rows=bench.rows(WARM_UP_ROWS, 0), bits=4, threads=2)
    for model in options.models:
        for threads in options.threads:
            for repeat in range(options.repeats):
                for contestant in chosen(contestants, options):
                    key = {"part": part, "name": contestant.name, "model": model, "bits": 4}
                    key |= {"threads": threads, "repeat": repeat}
                    rows = bench.rows(ROWS[model], 0)
                    bench.run(key, contestant, model=model, rows=rows, bits=4, threads=threads)
    write(bench, f"{part}.md", timing_table(bench.results, part))


def chosen(contestants, options):
    """Return the contestants that the options name, or all."""
    return [
        one
        for one in contestants
        if (not options.tools or one.tool in options.tools) and (not options.only or one.label in options.only)
    ]


def write(bench, name, table):
    """Write a table and show it."""
    (bench.folder / name).write_text(table)
    print(table)


def main():
    """Run one part; see the top of the file for the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--timing", action="store_true", help="the timing part alone")
    parser.add_argument("--tune", action="store_true", help="settings of GPTQModel for the timing part")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--tools", nargs="*", help="only these")
    parser.add_argument("--only", nargs="*", help="only contestants with these labels")
    parser.add_argument("--bits", nargs="*", type=int, default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--threads", nargs="*", type=int, default=None, help="accuracy: 1; timing: 1 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--keep-failed", action="store_true", help="leave the files of failed runs in OUTPUT/work")
    options = parser.parse_args()
    measured = options.timing or options.tune
    options.threads = options.threads or ([1, 2] if options.timing else [1])
    bench = Bench(options)
    if options.tables:
        write(bench, "accuracy.md", accuracy_table(bench.results))
        for part in ("tune", "timing"):
            write(bench, f"{part}.md", timing_table(bench.results, part))
    elif measured:
        timing(bench, options, TUNE if options.tune else TIMING, "tune" if options.tune else "timing")
    else:
        accuracy(bench, options)
    failed = [result for result in bench.results if result["status"] == "failed"]
    for result in failed:
        print(f"failed: {json.dumps(result['key'])}: {result['reason']}")
    sys.exit(int(bool(failed)))


if __name__ == "__main__":
    main()
