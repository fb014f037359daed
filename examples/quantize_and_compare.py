"""Quantise a small language model to 3 bits twice, to nearest and with GPTQ, and compare both with the original.

The text is the model's own: one set of samples to calibrate on, another to compare on. No network, no GPU, well under a
minute. What is printed last is the mean Kullback-Leibler divergence of the next-token distributions from those of the
original model, in nats a token: 0 is no damage at all.

Prints: ^KL at 3 bits: rtn (?P<rtn>\\d+\\.\\d+), gptq (?P<gptq>\\d+\\.\\d+)$
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitmend
from bitmend import assets

LENGTH = 256  # tokens in a row

KEYS = {
    "weights.bits": 3,
    "weights.group_size": -1,  # one scale per output channel: no other size divides both 64 and 172, save 1, 2 and 4
    "calibration.sequences": 32,
    "calibration.sequence_length": LENGTH,
}


def write_samples(folder: Path, output: Path, rows: int, seed: int) -> Path:
    """Write `rows` stories of the model itself to a text file."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    start = torch.full((rows, 1), tokenizer.bos_token_id)
    torch.manual_seed(seed)
    tokens = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, min_length=LENGTH, max_length=LENGTH
    )
    output.write_text("\n\n".join(tokenizer.batch_decode(tokens, skip_special_tokens=True)), encoding="utf-8")
    return output


def main() -> None:
    """Quantise, compare, print."""
    model = assets.path("stories-260k")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        fit = write_samples(model, work / "fit.txt", rows=40, seed=1)
        report_on = write_samples(model, work / "report.txt", rows=24, seed=2)
        for solver in ("rtn", "gptq"):
            bitmend.quantize(model, solver, [fit], output=work / solver, overrides=KEYS)
        report = bitmend.evaluate(
            [work / "rtn", work / "gptq"], texts=[report_on], reference=model, windows=16, window_length=LENGTH
        )
        rtn, gptq = (entry.texts[0].kl for entry in report.models)
    print(f"KL at 3 bits: rtn {rtn:.4f}, gptq {gptq:.4f}")


if __name__ == "__main__":
    main()
