"""Check that GPTQModel reads what `bitmend export --format gptq` writes.

    python check_export.py MODEL --work FOLDER

MODEL is a float16 folder with a tokenizer, whose layers have sides that 32 divides. It is rounded to nearest at each
width, symmetric and (where version 1 of the format can hold the zero points) asymmetric, exported, and read by GPTQModel
in its own environment. Every weight must be equal bit for bit in float16 to that of bitmend's reader, and the logits to
those of a dense model with these weights, up to the order of sums in float16.

GPTQModel 7.6 loads asymmetric files of version 1 only where `meta` says that it wrote them. To check the bytes all the
same, that is written into the copy made here.
"""

import argparse
import json
import subprocess
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import bitmend
from bitmend.errors import RequestError
from bitmend.formats import read_quantized
from bitmend.formats.gptq import GptqFormat

HERE = Path(__file__).parent
PEER_PYTHON = HERE.parents[2] / ".venv-gptqmodel" / "bin" / "python"
LOGIT_TOLERANCE = 1e-2


def export(model, work, bits, symmetric, group_size):
    """Quantise and export, or return the sentence that says why not."""
    name = f"w{bits}{'s' if symmetric else 'a'}"
    keys = {"weights.bits": bits, "weights.symmetric": symmetric, "weights.group_size": group_size}
    bitmend.quantize(model, "rtn", output=work / f"{name}-native", overrides=keys, overwrite=True)
    try:
        GptqFormat(overwrite=True).export(work / f"{name}-native", work / name)
    except RequestError as error:
        return str(error)
    if not symmetric:
        claim_peers_work(work / name)
    return work / name


def claim_peers_work(folder):
    for name in ("config.json", "quantize_config.json"):
        config = json.loads((folder / name).read_text())
        config.get("quantization_config", config)["meta"]["quantizer"] = ["gptqmodel:7.6.0"]
        (folder / name).write_text(json.dumps(config, indent=2))


def compare(folder, peer_python, work):
    """Return how many matrices there are, how many are equal, and the relative difference of the logits."""
    model = transformers.AutoModelForCausalLM.from_config(plain_config(folder), dtype=torch.float16).eval()
    model.load_state_dict(dict(read_quantized(folder, torch.float16)), strict=False)
    model.tie_weights()
    tokens = torch.arange(32).view(2, 16) * 7 % model.config.vocab_size
    save_file({"tokens": tokens}, work / "tokens.safetensors")
    command = [peer_python, HERE / "read_export.py", folder, work / "tokens.safetensors", work / "found.safetensors"]
    subprocess.run([str(part) for part in command], check=True, cwd=work, capture_output=True)
    found = load_file(work / "found.safetensors")
    with torch.inference_mode():
        expected = model(tokens).logits.float()
    difference = ((found.pop("logits") - expected).norm() / expected.norm()).item()
    state = model.state_dict()
    return len(found), sum(torch.equal(found[name], state[name]) for name in found), difference


def plain_config(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return config


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    work, failed = options.work.resolve(), False
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            what = f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}"
            made = export(str(options.model.resolve()), work, bits, symmetric, options.group_size)
            if isinstance(made, str):
                print(f"{what}: not exported: {made}")
                continue
            count, equal, difference = compare(made, options.peer_python.absolute(), work)
            failed |= count == 0 or equal != count or not difference < LOGIT_TOLERANCE
            print(f"{what}: {equal} of {count} matrices equal, logits differ by {difference:.1e}")
    if failed:
        raise SystemExit("GPTQModel does not read the export as it should")


if __name__ == "__main__":
    main()
