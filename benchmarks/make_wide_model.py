"""A llama with random weights and the tokenizer of books-7m, for measurements of time and memory.

    python benchmarks/make_wide_model.py out/wide --hidden 1024 --intermediate 2816 --blocks 8 --heads 16

Nothing about accuracy can be learned from it. bf16, grouped queries (half as many key heads), context 2,048, untied head.
"""

import argparse
import shutil
from pathlib import Path

import torch
import transformers

from bitmend import assets


def main():
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    small = assets.path("books-7m")
    config = transformers.LlamaConfig(
        vocab_size=transformers.AutoConfig.from_pretrained(small).vocab_size,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(options.seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(options.output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, options.output)
    print(f"{options.output}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
