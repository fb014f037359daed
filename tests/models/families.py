"""Tiny random models, one for each family of decoders, and what tracing should find in their blocks."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QKV = "self_attn.{q_proj,k_proj,v_proj}"
LLAMA_GROUPS = [
    (QKV, "input_layernorm"),
    ("self_attn.o_proj", None),
    ("mlp.{gate_proj,up_proj}", "post_attention_layernorm"),
    ("mlp.down_proj", None),
]
GEMMA_GROUPS = [
    (QKV, "input_layernorm"),
    ("self_attn.o_proj", None),
    ("mlp.{gate_proj,up_proj}", "pre_feedforward_layernorm"),
    ("mlp.down_proj", None),
]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        config_class: in transformers.
        groups: (name, norm) of each group of sites, in execution order.
        stem: path of the blocks.
        embedding: path of the embedding.
        head: path of the head, None when tied.
        changes: config keys beside or instead of `SIZES`; None takes a key away.
    """

    config_class: str
    groups: list[tuple[str, str | None]]
    stem: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str | None = "lm_head"
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> Any:
        """Return the config of a tiny model."""
        keys = {key: value for key, value in (SIZES | self.changes | changes).items() if value is not None}
        return getattr(transformers, self.config_class)(**keys)

    def build(self, **changes: Any) -> Any:
        """Return a tiny random model, biases and norms included."""
        config = self.config(**changes)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model


NOT_GQA = {"num_key_value_heads": None}
GPT2_GROUPS = [("attn.c_attn", "ln_1"), ("attn.c_proj", None), ("mlp.c_fc", "ln_2"), ("mlp.c_proj", None)]
OPT_GROUPS = [
    (QKV, "self_attn_layer_norm"),
    ("self_attn.out_proj", None),
    ("fc1", "final_layer_norm"),
    ("fc2", None),
]
OPT_CHANGES: dict[str, Any] = {**NOT_GQA, "ffn_dim": 24, "intermediate_size": None}
NEOX_GROUPS = [
    ("attention.query_key_value", "input_layernorm"),
    ("attention.dense", None),
    ("mlp.dense_h_to_4h", "post_attention_layernorm"),
    ("mlp.dense_4h_to_h", None),
]

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", LLAMA_GROUPS),
    "llama-tied": Family("LlamaConfig", LLAMA_GROUPS, head=None, changes={"tie_word_embeddings": True}),
    "mistral": Family("MistralConfig", LLAMA_GROUPS, changes={"sliding_window": 4}),
    "qwen2": Family("Qwen2Config", LLAMA_GROUPS),
    "qwen3": Family("Qwen3Config", LLAMA_GROUPS, changes={"head_dim": 8}),
    "gemma2": Family(
        "Gemma2Config",
        GEMMA_GROUPS,
        head=None,
        changes={"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        GEMMA_GROUPS,
        head=None,
        changes={
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "opt": Family(
        "OPTConfig", OPT_GROUPS, "model.decoder.layers", "model.decoder.embed_tokens", head=None, changes=OPT_CHANGES
    ),
    "opt-projected": Family(
        "OPTConfig",
        # Norms come last in these blocks: the first feeds the residual as well, so it is not the input's alone.
        [(QKV, None), ("self_attn.out_proj", None), ("fc1", None), ("fc2", None)],
        "model.decoder.layers",
        "model.decoder.embed_tokens",
        head=None,
        changes={**OPT_CHANGES, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "gpt2": Family(
        "GPT2Config",
        GPT2_GROUPS,
        "transformer.h",
        "transformer.wte",
        head=None,
        changes={**NOT_GQA, "intermediate_size": None, "n_inner": 24},
    ),
    "neox": Family("GPTNeoXConfig", NEOX_GROUPS, "gpt_neox.layers", "gpt_neox.embed_in", "lm_head", NOT_GQA),
    "neox-serial": Family(
        "GPTNeoXConfig",
        NEOX_GROUPS,
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        "lm_head",
        {**NOT_GQA, "use_parallel_residual": False},
    ),
    "phi3": Family(
        "Phi3Config",
        [
            ("self_attn.qkv_proj", "input_layernorm"),
            ("self_attn.o_proj", None),
            ("mlp.gate_up_proj", "post_attention_layernorm"),
            ("mlp.down_proj", None),
        ],
    ),
}


def expert_groups(path: str, gate: str, up: str, down: str, number: int = 4) -> list[tuple[str, str | None]]:
    """Return the groups of a mixture of experts: one step of all experts before the next."""
    first: list[tuple[str, str | None]] = [(f"{path}.{one}.{{{gate},{up}}}", None) for one in range(number)]
    return first + [(f"{path}.{one}.{down}", None) for one in range(number)]


ATTENTION: list[tuple[str, str | None]] = [(QKV, "input_layernorm"), ("self_attn.o_proj", None)]
QWEN_EXPERTS = expert_groups("mlp.experts", "gate_proj", "up_proj", "down_proj")
SHARED: list[tuple[str, str | None]] = [
    ("mlp.shared_expert.{gate_proj,up_proj}", None),
    ("mlp.shared_expert.down_proj", None),
]
FEW: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

EXPERT_FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "MixtralConfig", ATTENTION + expert_groups("mlp.experts", "w1", "w3", "w2"), changes={**LOCAL, "head_dim": 8}
    ),
    "qwen3-moe": Family(
        "Qwen3MoeConfig", ATTENTION + QWEN_EXPERTS, changes={**FEW, "head_dim": 8, "norm_topk_prob": True}
    ),
    "qwen2-moe": Family(
        "Qwen2MoeConfig",
        ATTENTION + SHARED + QWEN_EXPERTS,
        changes={**FEW, "shared_expert_intermediate_size": 16},
    ),
    "olmoe": Family("OlmoeConfig", ATTENTION + QWEN_EXPERTS, changes=LOCAL),
    # In its files the experts are packed, under other names than in transformers.
    "granite-moe": Family(
        "GraniteMoeConfig",
        ATTENTION + expert_groups("block_sparse_moe.experts", "gate_proj", "up_proj", "down_proj"),
        changes=LOCAL,
    ),
    # Transposed, gate and up alternating, with biases and a gating of its own; packed in its files.
    "gpt-oss": Family(
        "GptOssConfig",
        ATTENTION + QWEN_EXPERTS,
        changes={**LOCAL, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
}
