"""Quantise a model with GPTQModel on exactly the calibration rows of a file.

Run by the Python of GPTQModel's environment:

    python quantise_gptqmodel.py MODEL ROWS.npy OUT --bits 4 --group-size 128 --damping 0.01

ROWS.npy: int64 (rows, length) token ids. Each row is one batch of one sequence without padding, fed in file order.
OUT: a GPTQ checkpoint (format v1, also for asymmetric grids) and `peer.json` with the settings and the rows' hash.
"""

import argparse
import hashlib
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")  # it needs three, and takes fewer by itself on two cores

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from settings import quantize_config


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128, help="-1: one scale an output channel")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--live-groups", action="store_true", help="fit grids while rounding, not beforehand")
    parser.add_argument("--method", choices=["gptq", "gptaq"], default="gptq")
    parser.add_argument("--alpha", type=float, default=0.25, help="GPTAQ's factor of the residual term")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the streams")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"OUT must not exist yet: {options.output}")

    torch.set_num_threads(options.threads)
    rows = np.load(options.rows, allow_pickle=False)
    if rows.dtype != np.int64 or rows.ndim != 2:
        parser.error(f"ROWS must be int64 of shape (rows, length), not {rows.dtype} {rows.shape}")

    model = GPTQModel.load(str(options.model), quantize_config(options), dtype=getattr(torch, options.dtype))
    limit = model.model.config.max_position_embeddings
    if not 10 < rows.shape[1] <= limit:
        parser.error(f"rows of {rows.shape[1]} tokens would be dropped or cut; 11 to {limit} are left alone")
    calibration = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]

    started = time.perf_counter()
    log = model.quantize(
        calibration,
        batch_size=1,
        calibration_concat_size=None,
        calibration_sort=None,
        backend=BACKEND.GPTQ_TORCH,
    )
    seconds = time.perf_counter() - started
    model.save(str(options.output))

    record = {
        "method": options.method,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "rows_sha256": hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest(),
        "rows_shape": list(rows.shape),
        "attention": model.model.config._attn_implementation,
        "seconds": seconds,
        "versions": {name: version(name) for name in ("gptqmodel", "torch", "transformers")},
        "modules": [
            {k: str(v) for k, v in entry.items() if k in ("layer", "module", "loss", "damp", "samples")}
            for entries in (log or {}).values()
            for entry in entries
        ],
    }
    for name in ("model", "rows", "output"):
        record["settings"][name] = Path(record["settings"][name]).name
    (options.output / "peer.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{seconds:.1f} s -> {options.output}")


if __name__ == "__main__":
    main()
