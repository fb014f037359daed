"""Tiny models on disk, and the same models quantised by plain min-max rounding into bitmend's own format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from bitmend.formats.native import ManifestEntry, quantization_config, site_tensors
from bitmend.formats.writer import CheckpointWriter
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.numerics.granularity import PerChannel, PerGroup, PerTensor
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec, quantize
from bitmend.numerics.uniform import UniformGrid
from bitmend.sites import LAYER_VIEWS, layer_kind


def min_max(weight: torch.Tensor, spec: QuantSpec) -> QTensor:
    """Round to nearest with the simplest scales that the storage type can hold."""
    columns = weight.shape[1]
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else columns
    parts = list(weight.float().split(size, dim=1))
    low = torch.stack([part.amin(1) for part in parts], 1).clamp_(max=0)
    high = torch.stack([part.amax(1) for part in parts], 1).clamp_(min=0)
    if isinstance(spec.granularity, PerTensor):
        low, high = low.min().view(1, 1), high.max().view(1, 1)
    grid = spec.grid
    if grid.symmetric:
        scale, zero_point = torch.maximum(-low, high) / max(1, -grid.min_code), None
    else:
        scale = (high - low) / (grid.max_code - grid.min_code)
    scale = scale.clamp_(min=1e-6).to(spec.scale_dtype).float()
    if not grid.symmetric:
        zero_point = (grid.min_code - low / scale).round().clamp_(grid.min_code, grid.max_code)
    return quantize(weight.float(), QParams(scale, zero_point), spec)


def spec(bits=4, symmetric=True, group_size=16, ragged=False, scale_dtype=torch.float32) -> QuantSpec:
    granularity = PerTensor() if group_size == 0 else PerChannel() if group_size < 0 else PerGroup(group_size, ragged)
    return QuantSpec(UniformGrid(bits, symmetric), granularity, "minmax", scale_dtype)


def build(family: str, dtype: torch.dtype, tied: bool) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, tie_word_embeddings=tied,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    elif family == "mixtral":
        config = transformers.MixtralConfig(
            vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, num_local_experts=3, num_experts_per_tok=2,
            tie_word_embeddings=tied,
        )  # fmt: skip
        model = transformers.MixtralForCausalLM(config)
    elif family == "granite-moe":  # its checkpoints hold packed experts
        config = transformers.GraniteMoeConfig(
            vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, num_local_experts=3, num_experts_per_tok=2,
            tie_word_embeddings=tied,
        )  # fmt: skip
        model = transformers.GraniteMoeForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=tied, bos_token_id=0,
            eos_token_id=1,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # zero biases would hide a bias that is not loaded
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


@dataclass
class Quantised:
    """A model before and after."""

    source: Path
    output: Path
    qtensors: dict[str, QTensor]
    dense: transformers.PreTrainedModel  # the source model with the dequantised weights put in


def opened(source: Path) -> transformers.PreTrainedModel:
    """Return a saved model, experts taken apart as the pipeline does."""
    if not hasattr(transformers.AutoConfig.from_pretrained(source), "num_local_experts"):
        return transformers.AutoModelForCausalLM.from_pretrained(source)
    adapter = HfCausalLm.open(source)
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
    return adapter.model


def quantise(source: Path, output: Path, scheme: Callable[[str], QuantSpec | None], shard_bytes=None) -> Quantised:
    """Quantise a saved model the way the pipeline does: block by block, then what lies outside."""
    model = opened(source)
    entries, qtensors, tied, done = {}, {}, {}, set()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    for name, module in model.named_modules():
        chosen = scheme(name)
        kind = "embedding" if module is embedding else layer_kind(module)
        if chosen is None or kind is None or (module is head and is_tied):
            continue
        weight = module.weight.detach() if kind == "embedding" else LAYER_VIEWS[kind].read(module)
        qtensor = min_max(weight, chosen)
        qtensors[name] = qtensor
        entries[name] = ManifestEntry(chosen, tuple(weight.shape), kind)
        block = ".".join(name.split(".")[:3])
        parts.setdefault(block, {}).update(site_tensors(name, qtensor))
        if kind == "embedding":
            with torch.no_grad():
                module.weight.copy_(qtensor.dequantize(module.weight.dtype))
            if is_tied:
                tied[next(path for path, part in model.named_modules() if part is head)] = name
        else:
            LAYER_VIEWS[kind].write_(module, qtensor.dequantize(module.weight.dtype))
        done.add(f"{name}.weight")
    skipped = done | ({"lm_head.weight"} if is_tied else set())
    outside = {name: value for name, value in model.state_dict().items() if name not in skipped}
    with CheckpointWriter(source, output) as writer:
        if shard_bytes is not None:
            writer._max_shard_bytes = shard_bytes
        for block, tensors in parts.items():
            writer.add(block, tensors)
        writer.add("outside", outside)
        config = quantization_config(entries, tied=tied, provenance={"solver": "rtn"})
        writer.finish(config, {"recipe.toml": "[weights]\nbits = 4\n", "run.json": {"status": "done"}})
    return Quantised(source, output, qtensors, model.eval())


@pytest.fixture(scope="session")
def helpers():
    """The functions of this file; test modules cannot import each other."""

    class Helpers:
        min_max = staticmethod(min_max)
        spec = staticmethod(spec)
        build = staticmethod(build)
        quantise = staticmethod(quantise)

    return Helpers


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a tiny model and returns its folder."""

    def save(family="llama", dtype=torch.float32, tied=False) -> Path:
        folder = tmp_path / f"{family}-source"
        build(family, dtype, tied).save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text("{}")
        return folder

    return save


@pytest.fixture
def quantised(tmp_path, saved):
    """Return a function that saves and quantises a tiny model; by default all linears in the blocks to 4 bits."""

    def make(
        scheme=None, family="llama", dtype=torch.float32, tied=False, shard_bytes=None, scale_dtype=torch.float32
    ) -> Quantised:
        default = spec(scale_dtype=scale_dtype)

        def in_blocks(name: str) -> QuantSpec | None:
            return default if ".layers." in name or ".h." in name else None

        return quantise(saved(family, dtype, tied), tmp_path / "quantised", scheme or in_blocks, shard_bytes)

    return make


@pytest.fixture
def ids():
    """Fixed tokens."""
    return torch.arange(24).view(2, 12) * 7 % 96
