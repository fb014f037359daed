"""Image models of full size with random weights, end to end: exactness of the replay, seconds, memory, what comes out.

    OMP_NUM_THREADS=1 python benchmarks/bench_full_size.py --work out/full-size

ViT-B/16, Swin-T, ResNet-50 of 1,000 classes and both towers of CLIP ViT-B/32, in float32, of the shapes that transformers'
configs have unless told otherwise. Of each: whether the blocks, replayed one by one from disk, give the very bits of the
model's own forward; a run of gptq at 4 bits a channel on 32 pictures of calibration-1024 (224 x 224 after the processor) or
32 lines of text, watched from outside as in `bench_forecast.py`; and the loaded result beside the original: its file, the
cosine of what both give on pictures that the run has not seen, and the time of a forward pass. Weights are random: errors
tell that nothing breaks, not how good a method is. Needs BITMEND_ASSETS.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from bench_forecast import measure

import bitmend
from bitmend import assets
from bitmend.models.find import find_adapter
from bitmend.models.hf_image import answer_of
from bitmend.protocols import ImageBatch, TokenBatch

ROWS, SEEN = 32, 8
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
KEYS = {"weights.bits": 4, "weights.group_size": -1, "calibration.sequences": ROWS}
STATIC = {
    "activations.bits": 8,
    "activations.static": True,
    "activations.symmetric": False,
    "activations.observer": "percentile",
}
MODELS = {
    "ViT-B/16": ("vit", None),
    "Swin-T": ("swin", None),
    "ResNet-50": ("resnet", None),
    "CLIP ViT-B/32, vision": ("clip", "vision"),
    "CLIP ViT-B/32, text": ("clip", "text"),
}


def build(kind):
    """Return a model with random weights."""
    torch.manual_seed(0)
    if kind == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
    if kind == "swin":
        return transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=1000))
    if kind == "resnet":
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    # The end of a text is that of the tokenizer which is copied beside it.
    return transformers.CLIPModel(transformers.CLIPConfig(text_config={"eos_token_id": 2, "bos_token_id": 1}))


def write(work, kind):
    """Write a model, with a processor and, for CLIP, a tokenizer, unless it is there; return its folder."""
    folder = work / "models" / kind
    if not folder.is_dir():
        model = build(kind).eval()
        part = folder.with_suffix(".partial")
        model.save_pretrained(part)
        (part / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        if kind == "clip":
            transformers.AutoTokenizer.from_pretrained(assets.path("books-7m")).save_pretrained(part)
        part.rename(folder)
    return folder


def batch_of(tower):
    """Return some rows that no run sees: noise, or token numbers."""
    draw = torch.Generator().manual_seed(1)
    if tower == "text":
        ids = torch.randint(5, 8000, (SEEN, 20), generator=draw)
        ids[:, -1] = 2
        return TokenBatch(ids)
    return ImageBatch(torch.randn(SEEN, 3, 224, 224, generator=draw))


def given(model, batch):
    """Return what a model gives, and the seconds of the faster of two passes."""
    call = {"input_ids": batch.ids} if isinstance(batch, TokenBatch) else {"pixel_values": batch.pixels}
    spent = []
    with torch.no_grad():
        for _ in range(2):
            started = time.perf_counter()
            output = model(**call)
            spent.append(time.perf_counter() - started)
    found = output.text_embeds if isinstance(batch, TokenBatch) else answer_of(output)
    return found, min(spent)


def replayed(folder, tower, batch):
    """Return what the blocks give, each read from disk, run, and forgotten."""
    adapter = find_adapter(folder, tower=tower)
    inputs = adapter.block_inputs(batch)
    hidden = inputs.hidden
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        hidden = adapter.forward_block(index, hidden, inputs)
        adapter.release_block(index)
    return adapter.forward_logits(hidden, batch)


def original(folder, tower):
    """Return the model of a folder, or one of its towers."""
    adapter = find_adapter(folder, tower=tower)
    if tower is None:
        return transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    return getattr(transformers, adapter.task).from_pretrained(folder, config=adapter.config).eval()


def rows_of(work, tower):
    """Return the calibration source of a tower."""
    if tower != "text":
        return assets.path("cifar10") / "calibration-1024.tar.gz"
    lines = work / "lines.txt"
    if not lines.is_file():
        text = assets.path("books-calibration").read_text(encoding="utf-8").split("\n")
        lines.write_text("\n".join(line for line in text if 20 < len(line) < 200)[:100_000], encoding="utf-8")
    return lines


def row(work, name, kind, tower):
    """Print one line of the table."""
    folder = write(work, kind)
    batch = batch_of(tower)
    model = original(folder, tower)
    expected, seconds = given(model, batch)
    with torch.no_grad():
        found = replayed(folder, tower, batch)
    exact = "to the bit" if torch.equal(found, expected) else f"{(found - expected).abs().max():.1e}"
    keys = KEYS | ({} if tower == "text" else STATIC)
    label = kind if tower is None else f"{kind}-{tower}"
    source = rows_of(work, tower)
    result = measure(work, label, folder, "gptq", keys, rows=(source,), named=False, tower=tower, keep=True)
    output = work / "runs" / label
    quantised = bitmend.load(output).eval()
    answer, packed = given(quantised, batch)
    cosine = torch.nn.functional.cosine_similarity(answer, expected, dim=-1).mean()
    weights = sum(parameter.numel() for parameter in model.parameters())
    cells = [
        name,
        f"{weights / 1e6:.1f}",
        exact,
        f"{result['seconds']:.0f}",
        f"{result['seconds'] / result['seconds_forecast']:.2f}",
        f"{result['ahead'] / 1e6:.0f}",
        f"{result['ahead_forecast'] / result['ahead']:.2f}",
        f"{weights * 4 / 1e6:.1f}",
        f"{sum(path.stat().st_size for path in output.glob('*.safetensors')) / 1e6:.1f}",
        f"{cosine:.4f}",
        f"{packed / seconds:.2f}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("out/full-size"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    (options.work / "runs").mkdir(parents=True, exist_ok=True)
    head = ["model", "weights (M)", "replay", "seconds", "of forecast", "peak (MB)", "forecast / peak", "float32 (MB)"]
    head += ["file (MB)", "cosine", "pass, packed / float32"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in options.models:
        row(options.work, name, *MODELS[name])


if __name__ == "__main__":
    main()
