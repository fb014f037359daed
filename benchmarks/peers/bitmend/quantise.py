"""bitmend itself, started like a peer: in a process of its own, on the same rows, measured in the same way.

`method` is a recipe; `settings` are recipe keys, and `low_memory`. A quarter of the rows is held out for the proof, as by
default; what passes is fitted again on all of them. `quantise` is the time of the loop over blocks (reading each block's
weights included), `save` the rest of the call: probe of the model, hashes, packing, writing.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import protocol

RUN = protocol.start()

import torch

from bitmend.calibrate.data import CalibrationSet, choose_held_out
from bitmend.pipeline.run import quantize

LOOP = ("embed", "load", "forward", "moments", "solve")


def main():
    RUN.imports_done("bitmend")
    keys = {"weights.bits": RUN.bits, "weights.group_size": RUN.group_size, **RUN.settings}
    low_memory = keys.pop("low_memory", False)
    calibration = ()
    if RUN.rows is not None:
        rows, seed = list(torch.from_numpy(RUN.load_rows())), keys.get("calibration.seed", 0)
        marks = choose_held_out(len(rows), keys.get("calibration.held_out", 0.25), seed)
        calibration = CalibrationSet(rows, marks, seed, "rows of the comparison")
    with RUN.phase("all"):
        output = RUN.output / "model"
        report = quantize(
            RUN.model, RUN.method, calibration, output=output, overrides=keys, device="cpu", low_memory=low_memory
        )
    loop = sum(report.seconds.get(name, 0.0) for name in LOOP)
    RUN.split("all", load=0.0, quantise=loop)
    RUN.solver_seconds(sum(site.seconds for block in report.blocks for site in block.sites))
    RUN.told(held_out=keys.get("calibration.held_out", 0.25), stream_dtype="the model's", low_memory=low_memory)
    dropped = sum(event.kind == "dropped" for event in report.events)
    RUN.note(dropped=dropped, seconds={name: report.seconds.get(name, 0.0) for name in LOOP})
    RUN.finish(RUN.output / "model", "folder")


if __name__ == "__main__":
    main()
