"""Float32 products by torch's default library and by `bitmend.numerics.products`, at the shapes of a run.

    OMP_NUM_THREADS=1 python benchmarks/bench_products.py

Prints billions of operations a second of both, their ratio, and the largest error of each against float64. Each timing is
the best of five repetitions of a tenth of a second, after one that is not counted.
"""

import time

import torch

from bitmend.numerics.products import linear

SHAPES = {
    "moments, width 256": (256, 4096, 256),
    "moments, width 768": (768, 4096, 768),
    "layer 256 -> 256": (4096, 256, 256),
    "layer 256 -> 768": (4096, 256, 768),
    "layer 768 -> 256": (4096, 768, 256),
    "head 256 -> 8192": (4096, 256, 8192),
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
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| product | default | ours | ratio | error, default | error, ours |\n|---|---|---|---|---|---|")
    for name, (rows, inner, columns) in SHAPES.items():
        x, w = torch.randn(rows, inner), torch.randn(columns, inner)
        exact = x.double() @ w.double().T
        size = float(exact.abs().max())
        errors = [float((y.double() - exact).abs().max()) / size for y in (x @ w.T, linear(x, w))]
        operations = 2 * rows * inner * columns
        default = rate(lambda x=x, w=w: x @ w.T, operations)
        ours = rate(lambda x=x, w=w: linear(x, w), operations)
        print(f"| {name} | {default:.0f} | {ours:.0f} | {ours / default:.2f} | {errors[0]:.1e} | {errors[1]:.1e} |")


if __name__ == "__main__":
    main()
