"""llm-compressor: its GPTQModifier, a compressed-tensors checkpoint. Started by `bench_peers.py` in its environment.

Defaults of the modifier: damping 0.01, activation order `static`, scheme WbA16 (symmetric, groups). `oneshot` has no call
that loads and saves apart from quantising, so the model is loaded before it and saved after it.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import protocol

RUN = protocol.start()

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def weights():
    """Return the arguments of the weights: a preset's, with our bits and group size."""
    return {
        "num_bits": RUN.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if RUN.group_size == -1 else "group",
        "group_size": None if RUN.group_size == -1 else RUN.group_size,
        "dynamic": False,
    } | RUN.settings.get("weights", {})


def main():
    RUN.imports_done("llmcompressor", "compressed-tensors")
    rows = RUN.load_rows()
    with RUN.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(RUN.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(RUN.model)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in torch.from_numpy(rows)]
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights()}},
        ignore=["lm_head"],
        **RUN.settings.get("modifier", {}),
    )
    with RUN.phase("quantise"):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=DataLoader(batches, batch_size=None),
            recipe=recipe,
            num_calibration_samples=len(batches),
            max_seq_length=rows.shape[1],
        )
    with RUN.phase("save"):
        model.save_pretrained(RUN.output / "model", save_compressed=True)
        tokenizer.save_pretrained(RUN.output / "model")
    RUN.told(
        damping=recipe.dampening_frac, actorder=str(recipe.actorder), weights=weights(), stream_dtype=str(model.dtype)
    )
    RUN.finish(RUN.output / "model", "quantized")


if __name__ == "__main__":
    main()
