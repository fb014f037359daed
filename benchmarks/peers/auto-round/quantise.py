"""AutoRound: rounding learned by signed gradient descent, a GPTQ checkpoint. Started by `bench_peers.py` in its environment.

Defaults of the tool, 200 steps a block among them (`iters` changes that). Its packer writes into a subfolder of its own,
which is looked for here, and stores scales half of which are negative.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import protocol

RUN = protocol.start()

import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

WIDTHS = (2, 3, 4, 8)


def main():
    RUN.imports_done("auto-round")
    if RUN.bits not in WIDTHS:
        protocol.unsupported(f"AutoRound packs {WIDTHS} bits into GPTQ files, not {RUN.bits}")
    rows = RUN.load_rows()
    with RUN.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(RUN.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(RUN.model)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in torch.from_numpy(rows)]
    options = {"enable_torch_compile": False, **RUN.settings}
    with RUN.phase("quantise"):
        rounder = AutoRound(
            model,
            tokenizer,
            bits=RUN.bits,
            group_size=RUN.group_size,
            sym=True,
            dataset=DataLoader(batches, batch_size=None),
            nsamples=len(batches),
            seqlen=rows.shape[1],
            device_map="cpu",
            **options,
        )
        rounder.quantize_and_save(str(RUN.output / "model"), format="auto_gptq")
    RUN.told(**options, stream_dtype=str(model.dtype), packing="inside `quantise`")
    folders = {path.parent for path in RUN.output.rglob("config.json")}
    if len(folders) != 1:
        raise RuntimeError(
            f"one folder with config.json was expected below the output, found {sorted(map(str, folders))}"
        )
    RUN.finish(folders.pop(), "quantized")


if __name__ == "__main__":
    main()
