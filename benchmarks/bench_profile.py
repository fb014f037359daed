"""Where the time of one run goes: phases of the loop, parts of the solver, and the share of matrix products.

    python benchmarks/bench_profile.py --model books-7m --recipe gptq --bits 3 --sequences 128 --length 512

Runs three times: to warm up, plain for the clock (phases and parts by wall time), then under torch's profiler for the share
of matrix products (aten::mm, addmm, bmm, oneDNN's linear and fused attention, self time), because the profiler slows small
operations down. `--profiler-only` is the last of these alone.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

import bitmend
from bitmend import assets, protocols
from bitmend.linalg import moments, strength
from bitmend.solvers import descent, gptaq, gptq

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::addmv",
    "mkldnn::_linear_pointwise",
    "attention",
)
PARTS = (
    ("sweep", gptq, "column_sweep"),
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
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--clock-only", action="store_true", help="without the run under the profiler")
    which.add_argument("--profiler-only", action="store_true", help="only the run under the profiler")
    options = parser.parse_args()
    keys = {"weights.bits": options.bits, "calibration.sequences": options.sequences}
    keys["calibration.sequence_length"] = options.length
    keys["weights.group_size"] = options.group_size
    model = Path(options.model) if Path(options.model).is_dir() else assets.path(options.model)

    def run(folder):
        rows = [assets.path("books-calibration")]
        return bitmend.quantize(model, options.recipe, rows, output=folder, overrides=keys)

    words = f"{options.model}, {options.recipe}, {options.bits} bits, {options.sequences} x {options.length} tokens"
    print(f"{words}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        if not options.profiler_only:
            show_clock(run, Path(folder))
        if not options.clock_only:
            show_products(run, Path(folder))


def show_clock(run, folder):
    """Run to warm up and once for the clock, and print where the time went."""
    parts = defaultdict(float)
    run(folder / "warm")
    originals = [(module, attribute, getattr(module, attribute)) for _, module, attribute in PARTS]
    for (name, module, attribute), (_, _, original) in zip(PARTS, originals, strict=True):
        setattr(module, attribute, timed(parts, name, original))
    report = run(folder / "plain")
    for module, attribute, original in originals:
        setattr(module, attribute, original)
    total = report.seconds["total"]
    print(f"{total:.1f} s")
    phases = ("embed", "load", "forward", "moments", "solve")
    for phase in phases:
        print(f"  {phase:<14}{report.seconds.get(phase, 0.0) / total:6.1%}")
    rest = total - sum(report.seconds.get(phase, 0.0) for phase in phases)
    print(f"  {'open, write':<14}{rest / total:6.1%}")
    print("inside solve, and inside moments the factor's input:")
    for name, spent in parts.items():
        print(f"  {name:<14}{spent / total:6.1%}")


def show_products(run, folder):
    """Run under the profiler and print the share of matrix products, and what else took most.

    The record is added up and dropped after each sweep of columns: kept whole, it would outgrow the run on large layers.
    """
    spent = defaultdict(float)

    def gather(profiler):
        for event in profiler.key_averages():
            if not event.key.startswith("ProfilerStep"):  # all that is Python between operations
                spent[event.key] += event.self_cpu_time_total

    def stepping(function):
        def wrapper(*arguments, **options):
            try:
                return function(*arguments, **options)
            finally:
                profiler.step()

        return wrapper

    pieces = schedule(wait=0, warmup=0, active=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=pieces, on_trace_ready=gather) as profiler:
        for name, module, attribute in PARTS:
            if name == "sweep":
                setattr(module, attribute, stepping(getattr(module, attribute)))
        run(folder / "profiled")
    everything = sum(spent.values())
    products = sum(seconds for key, seconds in spent.items() if any(name in key for name in PRODUCTS))
    print(f"matrix products: {products / everything:.1%} of the profiled time, {everything / 1e6:.0f} s")
    others = {key: seconds for key, seconds in spent.items() if not any(name in key for name in PRODUCTS)}
    for key in sorted(others, key=others.__getitem__, reverse=True)[:8]:
        print(f"  {key:<40}{others[key] / everything:6.1%}")


if __name__ == "__main__":
    main()
