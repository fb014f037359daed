"""Run GPTQModel's own solver on one matrix and keep everything that it used and returned.

Run by the Python of GPTQModel's environment. The comparison of two solvers on an identical Hessian needs no model:

    python dump_layer.py IN.npz OUT.npz --bits 4 --group-size 128 --damping 0.01

IN.npz: `weight` (out, in), `inputs` (tokens, in), and for `--method gptaq` also `native_inputs` (tokens, in), the
inputs of the full-precision stream. `--rows R` feeds the tokens as R equal batches, as calibration rows arrive.

OUT.npz, all without pickle:
    weight        (out, in) float32   the weight as the solver saw it
    hessian       (in, in)  float32   second moment before dead columns and damping, 2/N times the sum over tokens
    cross         (in, in)  float32   GPTAQ only: the same for (native - input) input^T
    factor        (in, in)  float32   U, upper, H^-1 = U^T U, of the permuted, repaired and damped Hessian
    perm          (in,)     int64     the rounding order; 0, 1, 2, ... without act-order
    codes         (out, in) int32     unsigned, 0 .. 2^bits - 1, in the weight's own column order
    scale, zero   (out, groups) float32   before the file's rounding to fp16
    g_idx         (in,)     int32     group of each column
    dequantized   (out, in) float32   as the solver returned it: (code - zero) * scale with the float32 scale
    damping, loss float64             the share of the mean diagonal that was used; the solver's own loss
    settings      JSON as text
"""

import argparse
import json
import os
from importlib.metadata import version

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")  # it needs three, and takes fewer by itself on two cores

import numpy as np
import torch
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.looper.native_processor import NATIVE_INPUTS_STATE_KEY
from gptqmodel.quantization import GPTAQ, GPTQ
from settings import quantize_config


def solve(weight, inputs, native_inputs, options):
    config = quantize_config(options)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    module = NamedModule(linear, name="layer", full_name="layer", layer_index=0)
    batches = [part[None] for part in inputs.chunk(options.rows)]
    if options.method == "gptaq":
        module.state[NATIVE_INPUTS_STATE_KEY] = [part[None] for part in native_inputs.chunk(options.rows)]
        task = GPTAQ(module=module, qcfg=config)
    else:
        task = GPTQ(module=module, qcfg=config)
        task.fallback = None
    task.quantizer.configure(perchannel=True)

    with torch.inference_mode():
        for batch in batches:
            task.add_batch(batch, linear(batch))
        cross = None
        if options.method == "gptaq":
            cross = task.dXXT.clone()
        else:
            task.finalize_hessian()
        hessian = task.H.clone()

        kept = {}
        original = task.hessian_inverse

        def keep_factor(H):
            factor, damping = original(H)
            kept["factor"] = factor.clone()
            return factor, damping

        task.hessian_inverse = keep_factor
        dequantized, scale, zero, g_idx, _, loss, damping, _ = task.quantize(blocksize=options.block_size)

    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1
    perm = torch.argsort(diagonal, descending=True) if options.desc_act else torch.arange(weight.shape[1])
    spread_scale, spread_zero = scale[:, g_idx.long()].float(), zero[:, g_idx.long()].float()
    codes = torch.round((dequantized.float() + spread_zero * spread_scale) / spread_scale)
    codes = codes.clamp(0, 2**options.bits - 1).to(torch.int32)
    result = {
        "weight": weight.float(),
        "hessian": hessian,
        "factor": kept["factor"],
        "perm": perm,
        "codes": codes,
        "scale": scale.float(),
        "zero": zero.float(),
        "g_idx": g_idx,
        "dequantized": dequantized.float(),
        "damping": torch.tensor(float(damping), dtype=torch.float64),
        "loss": torch.tensor(float(loss), dtype=torch.float64),
    }
    if cross is not None:
        result["cross"] = cross
    return {name: value.numpy() for name, value in result.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128, help="-1: one scale an output channel")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--live-groups", action="store_true", help="fit grids while rounding, not beforehand")
    parser.add_argument("--method", choices=["gptq", "gptaq"], default="gptq")
    parser.add_argument("--alpha", type=float, default=0.25, help="GPTAQ's factor of the residual term")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    with np.load(options.input, allow_pickle=False) as data:
        weight = torch.from_numpy(data["weight"]).to(dtype)
        inputs = torch.from_numpy(data["inputs"]).to(dtype)
        native = torch.from_numpy(data["native_inputs"]).to(dtype) if options.method == "gptaq" else None
    result = solve(weight, inputs, native, options)
    settings = dict(vars(options), gptqmodel=version("gptqmodel"), torch=torch.__version__)
    np.savez(options.output, settings=np.array(json.dumps(settings)), **result)
    error = result["dequantized"] - result["weight"]
    objective = np.einsum("ij,jk,ik->", error.astype(np.float64), result["hessian"].astype(np.float64), error) / 2
    print(f"objective per token {objective:.6g}, damping {float(result['damping']):.4g} -> {options.output}")


if __name__ == "__main__":
    main()
