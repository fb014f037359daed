"""What everything that happens to activations while a model runs costs, beside the layer that reads them.

    python benchmarks/bench_online.py --tokens 1 512 --size 4096

Medians of alternating repeats, float32, threads as torch has them; the layer has as many outputs as inputs. Reading a packed
cache is compared with one attention of a token over the same cache unrounded, 32 heads of 128 features and 8 of keys.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from torch import nn

from bitmend.linalg.greedy_rotation import BlockRotation
from bitmend.linalg.hadamard import Rotation
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import AttentionScheme
from bitmend.runtime.packed_cache import PackedLayer

HEADS, KEY_HEADS, WIDTH = 32, 8, 128


def medians(works, repeats):
    """Return the median time of each work, in seconds, taken in turn; the first round is for warming up."""
    taken = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if repeat:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def at_a_layer(size, tokens, repeats):
    """Print a line for each thing that is done to the input of a layer."""
    values, weight = torch.randn(tokens, size), torch.randn(size, size)
    order = tuple(torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist())
    works = {
        "layer": partial(nn.functional.linear, values, weight),
        "quarot's rotation": partial(Rotation(size, 0).apply, values),
        "duquant's rotation, 256 + 256 steps": partial(
            BlockRotation(128, 0, tuple(range(128)) * 2, order, tuple(range(128)) * 2).apply, values
        ),
        "4 bits, a range for each token": partial(ActivationSpec(4).round, values),
        "4 bits, static range": partial(ActivationSpec(4, ranges=(3.0,)).round, values),
    }
    taken = medians(works, repeats)
    for name, seconds in taken.items():
        print(f"| {name} | {tokens} | {seconds / taken['layer']:.3f} | {seconds / tokens * 1e6:.1f} |")


def at_a_cache(length, repeats):
    """Print what reading a packed cache for one new token costs."""
    keys, values = (torch.randn(1, KEY_HEADS, length, WIDTH) for _ in range(2))
    query, one = torch.randn(1, HEADS, 1, WIDTH), torch.randn(1, KEY_HEADS, 1, WIDTH)
    attend = partial(nn.functional.scaled_dot_product_attention, enable_gqa=True)
    spec = ActivationSpec(4, symmetric=False, scale_bits=16)
    packed = PackedLayer(AttentionScheme(Rotation(WIDTH), keys=spec, values=spec))
    packed.update(keys, values)

    def with_packed():
        held = packed.update(one, one)
        attend(query, *held)
        packed.crop(-1)

    taken = medians({"unrounded": lambda: attend(query, keys, values), "packed": with_packed}, repeats)
    ratio = taken["packed"] / taken["unrounded"]
    print(f"| {length} | {ratio:.1f} | {taken['packed'] * 1e6:.0f} | {taken['unrounded'] * 1e6:.0f} |")


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print("| what | tokens | over the layer | us a token |\n|---|---|---|---|")
    for tokens in options.tokens:
        at_a_layer(options.size, tokens, options.repeats)
    print("\n| tokens in the cache | packed over unrounded | us, packed | us, unrounded |\n|---|---|---|---|")
    for length in options.lengths:
        at_a_cache(length, options.repeats)


if __name__ == "__main__":
    main()
