"""Solver time of the residual methods beside that of gptaq, alternating in one process.

    OMP_NUM_THREADS=1 python benchmarks/bench_solver_time.py --model books-7m --bits 3 --group-size -1 --repeats 3

Solver time is the sum over matrices of solving (on fit rows and again on all rows) and of the proof; streams and moments are
not in it. Few calibration rows are enough, because it does not depend on how many tokens the moments are means of. One
uncounted round warms up.
"""

import argparse
import statistics
import tempfile

import bitmend
from bitmend import assets

METHODS = {
    "gptq": ("gptq", {}),
    "gptaq": ("gptaq", {}),
    "qep": ("qep", {}),
    "marr": ("marr", {}),
    "marr, gptaq form": ("marr", {"solver.form": "gptaq"}),
    "strength_grid": ("strength_grid", {}),
    "descent": ("descent", {}),
}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="books-7m")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=16)
    options = parser.parse_args()
    rows = [assets.path("books-calibration")]
    seconds = {name: [] for name in METHODS}
    for repeat in range(options.repeats + 1):
        for name, (recipe, extra) in METHODS.items():
            keys = {"weights.bits": options.bits, "weights.group_size": options.group_size, **extra}
            keys |= {"calibration.sequences": options.sequences, "calibration.sequence_length": 512}
            keys |= {"calibration.held_out": 0.25, "calibration.two_streams": True}
            with tempfile.TemporaryDirectory() as folder:
                report = bitmend.quantize(
                    assets.path(options.model), recipe, rows, output=folder, overrides=keys, overwrite=True
                )
            if repeat:
                seconds[name].append(sum(site.seconds for block in report.blocks for site in block.sites))
    base = seconds["gptaq"]
    print(
        "| method | solver seconds, median | over gptaq, median of pairs | smallest | largest |\n|---|---|---|---|---|"
    )
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        print(
            f"| {name} | {statistics.median(values):.2f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} "
            f"| {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
