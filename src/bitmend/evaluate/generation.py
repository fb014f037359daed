"""Continue a text with a model, to hear how it speaks."""

from pathlib import Path
from typing import Any

import torch

from bitmend.errors import CheckpointError, RequestError
from bitmend.evaluate.load import load_model
from bitmend.runtime.packed_cache import cache_option, rounds_keys_and_values


def generate_text(
    model: str | Path, prompt: str, *, tokens: int, temperature: float, seed: int, device: torch.device
) -> str:
    """Return the prompt and its continuation.

    Args:
        model: a folder or hub name.
        prompt: not empty.
        tokens: how many new tokens, at most.
        temperature: 0 always takes the likeliest token.
        seed: of the draws when the temperature is above 0.
        device: where the network runs.

    Raises:
        RequestError: an empty prompt, more tokens than the model's context holds, or a model that reads none.
        ModelError, CheckpointError: the model cannot be loaded.
    """
    if not prompt:
        raise RequestError(
            "generate needs a prompt of at least one character, but an empty one came; pass --prompt TEXT"
        )
    loaded = load_model(model, device, torch.float32)
    if loaded.reads != "tokens":
        raise RequestError(f"{model} reads pictures, and only language models continue a text; give one of them")
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise RequestError(
            f"generate needs a prompt of at least one token, but {prompt!r} holds none; pass --prompt TEXT with a word"
        )
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    if context is not None and not isinstance(context, int):
        raise CheckpointError(
            f"{model}: a whole number of tokens is required as max_position_embeddings, but config.json says {context!r}; "
            "copy the file again"
        )
    if context is not None and length + tokens > context:
        raise RequestError(
            f"prompt and continuation must fit the model's context of {context} tokens, but are {length} + {tokens}; "
            f"pass --tokens {max(1, context - length)} or a shorter prompt"
        )
    torch.manual_seed(seed)
    generator: Any = loaded.model
    cache = cache_option(generator) if rounds_keys_and_values(generator) else {}
    choice = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        output = generator.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            pad_token_id=_pad_token(loaded.tokenizer),
            **choice,
            **cache,
        )
    return str(loaded.tokenizer.decode(output[0], skip_special_tokens=True))


def _pad_token(tokenizer: Any) -> int | None:
    """Return the padding token, or the end of text; token 0 is a token like any other."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
