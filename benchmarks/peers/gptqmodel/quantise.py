"""GPTQModel: GPTQ and GPTAQ, a GPTQ checkpoint of version 1. Started by `bench_peers.py` in GPTQModel's environment.

Settings: `variant` is `defaults` (what `QuantizeConfig` does when only bits and group size are given; the default) or
`plain` (everything beyond the method switched off, as `settings.py` has it); `mse`: exponent of its search for scales,
which is off by default. For time: `dtype` of weights and streams (`auto`, which on a CPU is bfloat16), `batch_size`,
`workers` (of its thread pool).
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parent.parent))
import protocol

RUN = protocol.start()
# On two cores it takes one by itself, which is too few.
os.environ["GPTQMODEL_CPU_WORKERS"] = str(RUN.settings.get("workers", 3))

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig
from settings import quantize_config

WIDTHS = (2, 3, 4, 8)


def configuration():
    if RUN.settings.get("variant", "defaults") == "plain":
        options = SimpleNamespace(
            bits=RUN.bits,
            group_size=RUN.group_size,
            asymmetric=False,
            desc_act=False,
            live_groups=False,
            damping=0.01,
            method=RUN.method,
            alpha=0.25,
        )
        return quantize_config(options)
    gptaq = GPTAQConfig(device="cpu") if RUN.method == "gptaq" else None
    mse = RUN.settings.get("mse", 0.0)
    return QuantizeConfig(bits=RUN.bits, group_size=RUN.group_size, gptaq=gptaq, mse=mse, device="cpu")


def main():
    RUN.imports_done("gptqmodel")
    if RUN.bits not in WIDTHS:
        protocol.unsupported(f"GPTQModel packs {WIDTHS} bits, not {RUN.bits}")
    rows = RUN.load_rows()
    dtype = RUN.settings.get("dtype", "auto")
    with RUN.phase("load"):
        model = GPTQModel.load(
            str(RUN.model), configuration(), dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
    limit = model.model.config.max_position_embeddings
    if not 10 < rows.shape[1] <= limit:
        protocol.unsupported(f"rows of {rows.shape[1]} tokens would be dropped or cut; 11 to {limit} are left alone")
    calibration = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    with RUN.phase("quantise"):
        log = model.quantize(
            calibration,
            batch_size=RUN.settings.get("batch_size", 1),
            calibration_concat_size=None,
            calibration_sort=None,
            backend=BACKEND.GPTQ_TORCH,
        )
    with RUN.phase("save"):
        model.save(str(RUN.output / "model"))
    entries = [entry for group in (log or {}).values() for entry in group if "time" in entry]
    RUN.solver_seconds(sum(float(entry["time"]) for entry in entries))
    config = model.quantize_config
    told = {
        name: str(getattr(config, name))
        for name in ("damp_percent", "act_group_aware", "desc_act", "static_groups", "mse", "sym")
    }
    RUN.told(**told, stream_dtype=str(model.model.dtype), backend="gptq_torch")
    RUN.note(modules=len(entries), dampings=sorted({entry["damp"] for entry in entries}))
    RUN.finish(RUN.output / "model", "quantized")


if __name__ == "__main__":
    main()
