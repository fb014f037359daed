"""Where the time of one run goes: phases of the loop, parts of the solver, and the share of matrix products.

    python benchmarks/bench_profile.py --model books-7m --recipe gptq --bits 3 --sequences 128 --length 512

Runs twice: plain for the clock (phases and parts by wall time), then under torch's profiler for the share of matrix
products (aten::mm, addmm, bmm and fused attention, self time), because the profiler slows small operations down.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import bitmend
from bitmend import assets, protocols
from bitmend.linalg import moments, strength
from bitmend.solvers import descent, gptaq, gptq

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "attention")
PARTS = (
    ("sweep", gptq, "round_columns"),
    ("sweep", gptaq, "round_columns"),
    ("sweep", strength, "round_columns"),
    ("sweep", descent, "column_sweep"),
    ("factor", moments, "factor_inverse"),
    ("scale search", protocols, "choose_qparams"),
    ("scale search", strength, "choose_qparams"),
    ("scale search", descent, "choose_qparams"),
)


def timed(seconds, name, function):
    """Return `function` with its wall time added to `seconds[name]`."""

    def wrapper(*arguments, **options):
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] += time.perf_counter() - started

    return wrapper


def main():
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="books-7m", help="a name of an asset, or a folder")
    parser.add_argument("--recipe", default="gptq")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--clock-only", action="store_true", help="without the third run, under the profiler")
    options = parser.parse_args()
    keys = {"weights.bits": options.bits, "calibration.sequences": options.sequences}
    keys["calibration.sequence_length"] = options.length
    keys["weights.group_size"] = options.group_size
    model = Path(options.model) if Path(options.model).is_dir() else assets.path(options.model)

    def run(folder):
        rows = [assets.path("books-calibration")]
        return bitmend.quantize(model, options.recipe, rows, output=folder, overrides=keys)

    parts = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "warm")
        for name, module, attribute in PARTS:
            setattr(module, attribute, timed(parts, name, getattr(module, attribute)))
        report = run(Path(folder) / "plain")
        total, spent_in = report.seconds["total"], dict(parts)
        if not options.clock_only:
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                run(Path(folder) / "profiled")
    print(
        f"{options.model}, {options.recipe}, {options.bits} bits, {options.sequences} x {options.length} tokens, "
        f"{torch.get_num_threads()} threads: {total:.1f} s"
    )
    for phase in ("embed", "load", "forward", "moments", "solve"):
        print(f"  {phase:<14}{report.seconds.get(phase, 0.0) / total:6.1%}")
    rest = total - sum(report.seconds.get(phase, 0.0) for phase in ("embed", "load", "forward", "moments", "solve"))
    print(f"  {'open, write':<14}{rest / total:6.1%}")
    print("inside solve, and inside moments the factor's input:")
    for name, spent in spent_in.items():
        print(f"  {name:<14}{spent / total:6.1%}")
    if options.clock_only:
        return
    events = profiler.key_averages()
    everything = sum(event.self_cpu_time_total for event in events)
    products = sum(event.self_cpu_time_total for event in events if any(name in event.key for name in PRODUCTS))
    print(f"matrix products: {products / everything:.1%} of the profiled time")


if __name__ == "__main__":
    main()
