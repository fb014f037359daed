"""Make a model with outliers like those of large language models out of a small one, without changing what it computes.

    python benchmarks/make_planted_model.py MODEL OUTPUT --calibration TEXT [--channels 4] [--channel-factor 64]
        [--neurons 2] [--first-token 2048]

Two things that models of billions of parameters have, and small ones lack, are planted by rescaling alone:

- *outlier channels*: the same few features of what every norm gives are `channel-factor` times larger for all tokens; the
layers
  that read them have their columns divided by it. The features are those of the largest mean magnitude.
- *massive activations of the first token*: in each MLP the `neurons` whose product is most peculiar to the first token (its
  magnitude there over that elsewhere) are scaled until it reaches `first-token` times the median magnitude; what reads them
  is divided likewise.

All factors are powers of two, so that every number of the model is exact in any floating-point type: the planted model
gives the same logits, but for the order in which sums are rounded. That is checked before anything is kept. Prints what was
planted.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from bitmend.calibrate.data import load_calibration
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.models.tokenizer import load_tokenizer
from bitmend.protocols import TokenBatch
from bitmend.sites import scale_norm_

TRACE = TokenBatch(torch.arange(8).unsqueeze(0) % 2)


def inputs_of(adapter, block, paths, streams, arguments):
    """Return what some layers of a block read on all rows, (row, token, feature)."""
    seen = {path: [] for path in paths}
    hooks = [
        block.module.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen[path].append(args[0].detach().float())
        )
        for path in paths
    ]
    for hidden in streams:
        adapter.run_block(block.index, hidden, arguments)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def plant_(adapter, block, streams, arguments, options, channels):
    """Rescale one block in place; return the channels and what was planted."""
    wiring = adapter.wiring_of(block, TRACE)
    targets = [target for _, target in wiring.gated]
    first_readers = [paths[0] for paths in wiring.readers.values()]
    read = inputs_of(adapter, block, [*targets, *first_readers], streams, arguments)
    if channels is None:
        size = sum(read[path].abs().mean((0, 1)) for path in first_readers)
        channels = size.topk(options.channels).indices
    factors = torch.ones(wiring.hidden)
    factors[channels] = options.channel_factor
    with torch.no_grad():
        for norm, readers in wiring.readers.items():
            scale_norm_(block.module.get_submodule(norm), factors)
            for path in readers:
                block.module.get_submodule(path).weight.div_(factors)
        planted = []
        for source, target in wiring.gated:
            values = read[target].abs()
            first, rest = values[:, 0].mean(0), values[:, 1:].mean((0, 1))
            chosen = (first / rest.clamp(min=1e-9)).topk(options.neurons).indices
            wanted = options.first_token * values[:, 1:].median() / first[chosen]
            powers = torch.tensor([2.0 ** max(0, round(math.log2(float(one)))) for one in wanted])
            scale = torch.ones(values.shape[-1])
            scale[chosen] = powers
            layer = block.module.get_submodule(source)
            layer.weight.mul_(scale.unsqueeze(1))
            if layer.bias is not None:
                layer.bias.mul_(scale)
            block.module.get_submodule(target).weight.div_(scale)
            grown = (values * scale).flatten(0, 1)
            planted.append({
                "block": block.index, "neurons": chosen.tolist(), "factors": powers.tolist(),
                "largest over median, first token": float((values[:, 0] * scale).amax() / values[:, 1:].median()),
                "largest over median, other tokens": float((values[:, 1:] * scale).amax() / values[:, 1:].median()),
                "tokens": len(grown),
            })  # fmt: skip
    return channels, planted


def main():
    """Plant, check, save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--channel-factor", type=float, default=64.0)
    parser.add_argument("--neurons", type=int, default=2)
    parser.add_argument("--first-token", type=float, default=2048.0)
    options = parser.parse_args()
    if options.channel_factor != 2.0 ** round(math.log2(options.channel_factor)):
        parser.error(f"--channel-factor must be a power of two; got {options.channel_factor}")
    if options.output.exists():
        parser.error(f"{options.output} exists; choose another output")
    rows = load_calibration(
        [options.calibration], load_tokenizer(options.model), sequences=16, sequence_length=256, held_out=0.0, seed=0
    )
    ids = torch.stack(list(rows.rows))
    adapter = HfCausalLm.open(options.model)
    batches = [TokenBatch(ids[start : start + 4]) for start in range(0, len(ids), 4)]
    streams = [adapter.block_inputs(batch).hidden for batch in batches]
    arguments = adapter.block_inputs(batches[0])
    tensors, channels, planted = {}, None, []
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        block = adapter.describe_block(index, TRACE)
        after = [adapter.run_block(index, hidden, arguments) for hidden in streams]
        channels, told = plant_(adapter, block, streams, arguments, options, channels)
        planted += told
        tensors |= {name: tensor.clone() for name, tensor in adapter.block_tensors(index).items()}
        streams = after
        adapter.release_block(index)
    tensors |= {name: tensor.clone() for name, tensor in adapter.outside_tensors()}
    temporary = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(options.model, temporary, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
    save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
    models = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (options.model, temporary)]
    with torch.no_grad():
        plain, changed = (model(ids[:4]).logits for model in models)
    error = float((plain - changed).norm() / plain.norm())
    told = {"channels": channels.tolist(), "channel factor": options.channel_factor, "neurons": planted}
    print(json.dumps(told | {"relative error of the logits, float32": error}, indent=1))
    if error > 1e-5:
        shutil.rmtree(temporary)
        raise SystemExit(f"the planted model must give the same logits, but they differ by {error:.2g} of their size")
    (temporary / "planted.json").write_text(json.dumps(told, indent=1))
    temporary.replace(options.output)


if __name__ == "__main__":
    main()
