"""A llama with random weights of any size, written shard by shard: what the forecast and the streaming are measured on.

    python benchmarks/synthetic_model.py out/synthetic --width 1024 --intermediate 2816 --blocks 40 --shard-bytes 300e6

The shapes come from a transformers config, the tensors' names from the empty model of that config; tokenizer files are those
of an embedded model. One tensor is in memory at a time, so that the model may be larger than the memory.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig

from bitmend import assets
from bitmend.formats.safetensors_file import header_text
from bitmend.formats.writer import INDEX_FILE, companions
from bitmend.models.loading import empty_model

VOCABULARY_OF = "books-7m"  # whose tokenizer is copied


def write_model(
    folder, *, width, intermediate, blocks, heads=8, key_heads=4, context=2048, vocabulary=None, shard_bytes=500e6
):
    """Write config, tokenizer and shards, unless the folder holds the model already; return the folder."""
    folder = Path(folder)
    source = assets.path(VOCABULARY_OF)
    if (folder / INDEX_FILE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in companions(source):
        shutil.copyfile(file, folder / file.name)
    vocabulary = vocabulary or json.loads((source / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes = {name: tuple(place.shape) for name, place in empty_model(config).state_dict().items()}
    weight_map, total = {}, 0
    for number, names in enumerate(_shards(shapes, shard_bytes), start=1):
        file = f"model-{number:05d}.safetensors"
        _write_shard(folder / file, {name: shapes[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
        total += sum(2 * torch.Size(shapes[name]).numel() for name in names)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


def _shards(shapes, shard_bytes):
    names, size = [], 0
    for name, shape in shapes.items():
        names.append(name)
        size += 2 * torch.Size(shape).numel()
        if size >= shard_bytes:
            yield names
            names, size = [], 0
    if names:
        yield names


def _write_shard(path, shapes):
    generator = torch.Generator().manual_seed(len(shapes) + sum(map(len, shapes)))
    with path.open("wb") as file:
        file.write(header_text({name: (torch.bfloat16, shape) for name, shape in shapes.items()}, {"format": "pt"}))
        for shape in shapes.values():
            if len(shape) == 1:  # norms
                tensor = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5, generator=generator)
            file.write(tensor.view(torch.uint8).numpy().data)


def weight_bytes(folder):
    """Return how many bytes the tensors of a model folder take."""
    index = Path(folder) / INDEX_FILE
    if index.exists():
        return json.loads(index.read_text())["metadata"]["total_size"]
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def main():
    """Write one model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    for name, value in (("width", 1024), ("intermediate", 2816), ("blocks", 40), ("heads", 8), ("key-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=None)
    parser.add_argument("--shard-bytes", type=float, default=500e6)
    options = vars(parser.parse_args())
    folder = write_model(options.pop("folder"), **options)
    print(f"{folder}: {weight_bytes(folder) / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
