"""What a rotation while the model runs costs, beside the dense product with the same matrix and beside the layer behind it.

    python benchmarks/bench_rotation.py --tokens 1 512 --sizes 768 4096 11008 14336

Ratios of medians over alternating repeats, float32, threads as torch has them. The layer has as many inputs as the rotation
has features, and `--outputs` outputs.
"""

import argparse
import statistics
import time

import torch

from bitmend.linalg.hadamard import Rotation, factors


def seconds(work):
    """Return the time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[768, 4096, 11008, 14336])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print("| features | factors | tokens | rotation over dense product | rotation over the layer | us a token |")
    print("|---|---|---|---|---|---|")
    for size in options.sizes:
        rotation, dense = Rotation(size, 0), torch.randn(size, size)
        weight = torch.randn(options.outputs, size)
        for tokens in options.tokens:
            values = torch.randn(tokens, size)
            works = {
                "fast": lambda r=rotation, v=values: r.apply(v),
                "dense": lambda d=dense, v=values: v @ d,
                "layer": lambda w=weight, v=values: torch.nn.functional.linear(v, w),
            }
            taken = {name: [] for name in works}
            for repeat in range(options.repeats + 1):
                for name, work in works.items():
                    once = seconds(work)
                    if repeat:  # the first is for warming up
                        taken[name].append(once)
            median = {name: statistics.median(times) for name, times in taken.items()}
            sides = " x ".join(str(len(matrix)) for matrix in factors(size))
            ratios = " | ".join(f"{median['fast'] / median[other]:.3f}" for other in ("dense", "layer"))
            print(f"| {size} | {sides} | {tokens} | {ratios} | {median['fast'] / tokens * 1e6:.1f} |")


if __name__ == "__main__":
    main()
