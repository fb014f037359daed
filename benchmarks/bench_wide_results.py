"""What it is worth to keep the results of wide layers: one model quantised with and without, in turn.

    OMP_NUM_THREADS=1 python benchmarks/bench_wide_results.py MODEL --recipes gptq gptaq --repeats 2

Processor seconds of the whole call, and the forecast of its memory; the weights must be equal byte for byte.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import bitmend
from bitmend import assets
from bitmend.pipeline import plan


def run(options, recipe, share, output):
    """Return processor seconds, the report and the bytes of the weights."""
    plan.AMPLE_SHARE = share
    keys = {"weights.bits": 4, "weights.group_size": 128}
    keys |= {"calibration.sequences": options.sequences, "calibration.sequence_length": options.length}
    started = time.process_time()
    report = bitmend.quantize(
        options.model, recipe, [assets.path("books-calibration")], output=output, overrides=keys, overwrite=True
    )
    seconds = time.process_time() - started
    return seconds, report, [path.read_bytes() for path in sorted(output.glob("*.safetensors"))]


def main():
    """Run all pairs and print one line a recipe."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["gptq", "gptaq"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    print("| recipe | again (s) | kept (s) | kept over again | forecast again (MB) | kept (MB) |\n" + "|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in options.recipes:
            pairs = []
            for _ in range(options.repeats):
                again, kept = (run(options, recipe, share, Path(folder) / "out") for share in (0.0, 1.0))
                if again[1].forecast["wide_results_kept"] or not kept[1].forecast["wide_results_kept"]:
                    raise SystemExit("not enough memory to keep the results of wide layers")
                if again[2] != kept[2]:
                    raise SystemExit(f"{recipe}: the files differ")
                pairs.append((again, kept))
            first, second = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
            ratio = statistics.median(kept[0] / again[0] for again, kept in pairs)
            memory = [pairs[0][side][1].forecast["host_bytes"] / 1e6 for side in (0, 1)]
            print(
                f"| {recipe} | {first:.1f} | {second:.1f} | {ratio:.2f} | {memory[0]:.0f} | {memory[1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
