"""Products of float32 and bfloat16 by torch's default library and by `bitmend.numerics.products`, at the shapes of a run.

    OMP_NUM_THREADS=1 python benchmarks/bench_products.py

Prints how products are taken on this CPU, billions of operations a second of both ways, their ratio, and the largest error
of each against float64 as a share of the largest value. Each timing is
the best of five repetitions of a tenth of a second, after one that is not counted.
"""

import itertools
import time

import torch

from bitmend.numerics.products import kind, linear

SHAPES = {
    "moments, width 256": (256, 4096, 256),
    "moments, width 768": (768, 4096, 768),
    "layer 256 -> 256": (4096, 256, 256),
    "layer 256 -> 768": (4096, 256, 768),
    "layer 768 -> 256": (4096, 768, 256),
    "head 256 -> 8192": (4096, 256, 8192),
    "layer 1024 -> 2816": (2048, 1024, 2816),
}


def rate(function, operations):
    """Return operations a second in billions, the best of five."""
    function()
    best = 0.0
    for _ in range(5):
        started, runs = time.perf_counter(), 0
        while time.perf_counter() - started < 0.1:
            function()
            runs += 1
        best = max(best, runs * operations / (time.perf_counter() - started) / 1e9)
    return best


def main():
    """Measure and print."""
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {kind()}")
    print("| product | default | ours | ratio | error, default | error, ours |\n|---|---|---|---|---|---|")
    for (name, (rows, inner, columns)), dtype in itertools.product(SHAPES.items(), (torch.float32, torch.bfloat16)):
        if name.startswith("moments") and dtype != torch.float32:
            continue
        x, w = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        exact = x.double() @ w.double().T
        size = float(exact.abs().max())
        errors = [float((y.double() - exact).abs().max()) / size for y in (x @ w.T, linear(x, w))]
        operations = 2 * rows * inner * columns
        default = rate(lambda x=x, w=w: x @ w.T, operations)
        ours = rate(lambda x=x, w=w: linear(x, w), operations)
        label = f"{name}, {str(dtype).removeprefix('torch.')}"
        print(f"| {label} | {default:.0f} | {ours:.0f} | {ours / default:.2f} | {errors[0]:.1e} | {errors[1]:.1e} |")


if __name__ == "__main__":
    main()
