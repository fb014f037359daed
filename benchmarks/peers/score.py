"""Score a checkpoint that a contestant wrote: bits from its bytes, perplexity and KL by bitmend's evaluator.

Files of other tools are read by bitmend's own readers into a dense float32 network, so that nobody's kernel comes between the
numbers in the file and the score.
"""

import copy

import torch
import transformers

import bitmend
from bitmend.evaluate.load import LoadedModel
from bitmend.formats import read_quantized
from bitmend.models.tokenizer import load_tokenizer

WINDOWS, LENGTH = 160, 512


def score(folder, reader, notes, reference, texts, cache, windows=WINDOWS):
    """Return bits, scores by text, and what the reader had to say.

    Args:
        folder: the checkpoint.
        reader: `quantized` or `folder`, from the script's answer.
        notes: of the script's answer; `quantised_bits` where the file cannot tell.
        reference: folder of the full-precision model.
        texts: name -> file.
        cache: where the reference's hidden states are kept.
        windows: of each text.
    """
    events = []
    if reader == "quantized":
        source, events = dense_model(folder, reference)
    else:
        source = folder
    report = bitmend.evaluate(
        [source],
        texts=list(texts.values()),
        reference=reference,
        windows=windows,
        window_length=LENGTH,
        cache_dir=cache,
    )
    scores = {
        name: {
            "kl": text.kl,
            "kl_se": text.kl_standard_error,
            "perplexity": text.perplexity,
            "top1": text.top1_agreement,
        }
        for name, text in zip(texts, report.models[0].texts, strict=True)
    }
    return {"bits": bits_of(folder, notes, reference), "scores": scores, "reader_events": events}


def dense_model(folder, reference):
    """Return the network in a checkpoint of another tool with dense float32 weights, and the reader's events."""
    checkpoint = read_quantized(folder, torch.float32)
    config = copy.deepcopy(transformers.AutoConfig.from_pretrained(reference))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict({name: value.float() for name, value in checkpoint}, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or not set(missing) <= tied:
        raise ValueError(f"{folder.name} does not fill the model: missing {missing}, left over {unexpected}")
    model.tie_weights()
    return LoadedModel(folder.name, model, load_tokenizer(reference)), [event.message for event in checkpoint.events]


def bits_of(folder, notes, reference):
    """Return bits per weight, of quantised layers and of the whole model; `from` says who counted."""
    if "quantised_bits" not in notes:
        account = bitmend.ledger(folder)
        return {
            "layers": account.bits_per_weight,
            "model": account.bits_per_weight_model,
            "from": f"file ({account.format})",
        }
    plain = bitmend.ledger(reference)
    other = 8 * plain.file_bytes - plain.bits["header"] - 16 * notes["quantised_weights"]
    return {
        "layers": notes["quantised_bits"] / notes["quantised_weights"],
        "model": (notes["quantised_bits"] + other) / plain.parameters,
        "from": "its own tensors in memory",
    }
