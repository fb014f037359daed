"""Compare bitmend's gptq with GPTQModel's, code by code, on a whole model.

    python compare.py --work out/gptqmodel [--rows 32] [--length 512]

Both get the same rows, grid (min-max, symmetric, static groups), damping (0.01) and natural column order. GPTQModel
quantises the model first. Then bitmend walks the same model with GPTQModel's weights in its quantised stream, so that at
every matrix both have read the same inputs, and solves each matrix anew. Left to run freely, two correct solvers part
ways: one tie decided differently changes the inputs of everything after it.

Prints, for each setting, the share of equal codes over all matrices and in the worst one, and the objective
tr(E G E^T) of bitmend's codes over that of GPTQModel's, on the moments that both were fitted to.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from bitmend import assets
from bitmend.calibrate.data import load_calibration
from bitmend.calibrate.dual_stream import BlockRun, DualStream
from bitmend.models.find import find_adapter
from bitmend.models.tokenizer import load_tokenizer
from bitmend.numerics.granularity import PerGroup
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.protocols import Need, Problem
from bitmend.solvers.gptq import Gptq

HERE = Path(__file__).parent
PEER_PYTHON = HERE.parents[2] / ".venv-gptqmodel" / "bin" / "python"
SETTINGS = ((4, 128), (3, 64), (2, 64))
DAMPING = 0.01


def run_peer(model, rows_file, bits, group_size, work):
    """Quantise with GPTQModel and return its decoded matrices by name."""
    checkpoint, decoded = work / f"w{bits}g{group_size}", work / f"w{bits}g{group_size}.safetensors"
    if not decoded.exists():
        command = [PEER_PYTHON, HERE / "quantise_gptqmodel.py", model, rows_file, checkpoint]
        command += ["--bits", bits, "--group-size", group_size, "--damping", DAMPING]
        subprocess.run([str(part) for part in command], check=True, cwd=work, capture_output=True)
        command = [sys.executable, HERE / "decode_gptq.py", checkpoint, decoded]
        subprocess.run([str(part) for part in command], check=True, cwd=work, capture_output=True)
    return load_file(decoded)


def compare(model, rows, peer, bits, group_size):
    """Return (name, share of equal codes, objective ratio, number of codes) of every matrix."""
    adapter = find_adapter(model)
    streams = DualStream(adapter, [(batch, False) for batch in rows.batches(1)], device=torch.device("cpu"))
    # GPTQModel keeps float32 scales while it solves, and rounds them to float16 only when it packs.
    spec = QuantSpec(UniformGrid(bits, symmetric=True), PerGroup(group_size), "minmax", torch.float32)
    found = []
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        block = adapter.describe_block(index, adapter.few_rows())
        run = BlockRun(streams, block, keep_inputs=False)
        for position, group in enumerate(block.groups):
            moments, _ = run.moments(position, frozenset({Need.INPUT_MOMENT}))
            for site in group.sites:
                weight = site.weight(block.module).float()
                solved = Gptq(damping=DAMPING, order="natural").solve(Problem(site, weight, spec, moments)).qtensor
                codes = peer[f"{site.name}.codes"].to(torch.int16) - 2 ** (bits - 1)
                groups = peer[f"{site.name}.g_idx"].long()
                theirs = codes * solved.qparams.scale[:, groups]
                equal = float((solved.codes == codes).float().mean())
                ratio = moments.output_error(weight, solved.dequantize()) / moments.output_error(weight, theirs)
                found.append((site.name, equal, ratio, codes.numel()))
                site.store_(block.module, theirs)
        run.finish_()
        adapter.release_block(index)
    return found


def main():
    """Run all settings and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = assets.path("books-7m")
    rows = load_calibration(
        [assets.path("books-calibration")],
        load_tokenizer(model),
        sequences=options.rows,
        sequence_length=options.length,
        held_out=0.0,
        seed=0,
    )
    rows_file = work / "rows.npy"
    np.save(rows_file, np.stack([row.numpy() for row in rows.rows]))
    print(f"rows: {len(rows)} x {options.length}, sha256 {rows.fingerprint[:12]}")
    results = []
    for bits, group_size in SETTINGS:
        peer = run_peer(model, rows_file, bits, group_size, work)
        found = compare(model, rows, peer, bits, group_size)
        total = sum(size for *_, size in found)
        equal = sum(share * size for _, share, _, size in found) / total
        worst = min(found, key=lambda one: one[1])
        ratios = [ratio for _, _, ratio, _ in found]
        print(
            f"W{bits} g{group_size}: {len(found)} matrices, equal codes {equal:.4%}, worst {worst[1]:.4%} ({worst[0]}), "
            f"objective ratio mean {np.mean(ratios):.6f}, from {min(ratios):.6f} to {max(ratios):.6f}"
        )
        results.append({"bits": bits, "group_size": group_size, "matrices": found})
    (work / "compare.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
