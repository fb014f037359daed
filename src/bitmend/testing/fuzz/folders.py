"""Small valid model folders of every kind that bitmend reads or writes, to be spoilt.

Two llama blocks of width 32 with a vocabulary of 96 words, a vision transformer, a residual network and a BERT as small; a
folder takes some 100 kB.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from bitmend.calibrate.data import CalibrationSet
from bitmend.calibrate.images import ImageSet
from bitmend.formats import compressed_tensors
from bitmend.formats.gptq import GptqFormat
from bitmend.formats.native_source import open_native
from bitmend.formats.writer import INDEX_FILE, SINGLE_FILE, CheckpointWriter
from bitmend.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from bitmend.packing.interleaved import pack_interleaved
from bitmend.pipeline.calibration_rows import Rows
from bitmend.pipeline.resume import Journal
from bitmend.pipeline.run import quantize

VOCABULARY, WIDTH, GROUP = 96, 32, 16
SITES_BEFORE_STOP = 9  # of 14: the first block is finished, and two matrices of the second


class _Stopped(BaseException):
    """Stands for a kill while a folder of a stopped run is made."""


def make_folders(place: Path) -> None:
    """Make a folder of each kind under its name in `place`.

    Cost: about five seconds.
    """
    place.mkdir(parents=True, exist_ok=True)
    plain = _plain(place / "plain")
    _sharded(plain, place / "plain-sharded")
    tied = _plain(place / "plain-tied", tie_word_embeddings=True)
    _native(plain, place / "native", {"weights.bits": 4})
    _native(tied, place / "native-tied", {"weights.bits": 3, "weights.symmetric": False, "embedding.bits": 8})
    _sharded(place / "native", place / "native-sharded")
    _native(plain, place / "asymmetric", {"weights.bits": 4, "weights.symmetric": False})
    for name, source in (("compressed-tensors", "native"), ("compressed-tensors-asymmetric", "asymmetric")):
        _compressed_tensors(place / source, place / name)
    GptqFormat().export(place / "native", place / "gptq")
    _gptq_v2(place / "gptq", place / "gptq-v2")
    _awq(place / "asymmetric", place / "awq")
    _stopped(plain, place / "stopped")
    _finished(plain, place / "finished")
    _with_online_parts(plain, place)
    _of_pictures(place)
    encoder = _encoder(place / "plain-encoder")
    _native(encoder, place / "native-encoder", {"weights.bits": 4, "embedding.bits": 8})


def _with_online_parts(plain: Path, place: Path) -> None:
    """Quantise with what runs beside the weights: rotations, rounded inputs, keys and values, static ranges, a prefix."""
    rows = CalibrationSet(
        [torch.randint(3, VOCABULARY, (24,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)],
        torch.tensor([False, True, False, False]),
    )
    rounded = {"weights.bits": 4, "activations.bits": 4}
    quarot = {"transforms": [{"name": "quarot", "force": True}], "kv_cache.bits": 4}
    _native(plain, place / "native-rotated", rounded | quarot, rows)
    static = {
        "activations.static": True,
        "activations.observer": "percentile",
        "kv_cache.bits": 4,
        "kv_cache.static": True,
        "kv_cache.symmetric": True,
    }
    _native(plain, place / "native-static", rounded | static | {"prefix.tokens": [5, 9]}, rows)
    beside = {"compensators": [{"name": "qwt", "structure": "low_rank", "gate": "in_sample"}]}
    _native(plain, place / "native-compensated", {"weights.bits": 4} | beside, rows)
    learned = {"transforms": [{"name": "spinquant", "steps": 1, "force": True}], "kv_cache.bits": 4}
    _native(plain, place / "native-learned", rounded | learned, rows)


def _of_pictures(place: Path) -> None:
    """Make a vision transformer and a residual network, and quantise them with static ranges on every kind of grid."""
    draw = torch.Generator().manual_seed(0)
    rows = ImageSet(torch.randn(4, 3, 8, 8, generator=draw), torch.tensor([False, True, False, False]))
    torch.manual_seed(0)
    transformer = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=8, patch_size=4, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_labels=16,
        )
    )  # fmt: skip
    residual = CifarResNetForImageClassification(
        CifarResNetConfig(blocks_per_stage=1, stage_channels=[16, 16, 16], image_size=8)
    )
    for name, model in (("plain-transformer", transformer), ("plain-convolutions", residual)):
        model.save_pretrained(place / name)
        size = {"height": 8, "width": 8}
        _write(place / name / "preprocessor_config.json", {"image_processor_type": "ViTImageProcessor", "size": size})
    static: dict[str, Any] = {"activations.bits": 4, "activations.static": True, "activations.symmetric": False}
    static["activations.observer"] = "percentile"
    twin = {"activations.after_gelu": "twin", "attention.static": True, "attention.probability_grid": "log_sqrt2"}
    attended = {f"attention.{name}_bits": 4 for name in ("query", "key", "value", "probability")}
    keys = {"weights.bits": 3, "weights.group_size": -1, **static}
    _native(place / "plain-transformer", place / "native-transformer", keys | twin | attended, rows)
    _native(place / "plain-convolutions", place / "native-convolutions", keys, rows)


def _encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _plain(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    keys: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys | changes))
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def _native(source: Path, output: Path, keys: Mapping[str, Any], rows: Rows | Sequence[Path] = ()) -> None:
    asked = {"weights.group_size": GROUP, "weights.observer": "minmax", **keys}
    quantize(source, "rtn", rows, output=output, overrides=asked)


def _sharded(source: Path, output: Path) -> None:
    """Write the tensors of `source` again in three files with an index; checksums are left out of the manifest."""
    shutil.copytree(source, output)
    tensors = load_file(output / SINGLE_FILE)
    (output / SINGLE_FILE).unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = names[number * len(names) // 3 : (number + 1) * len(names) // 3]
        save_file({name: tensors[name] for name in part}, output / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write(output / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    reseal(output)


def reseal(folder: Path) -> None:
    """Give a folder in bitmend's own format the checksums of its files as they are; leave any other alone."""
    from bitmend.formats.safetensors_file import sha256_of

    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # spoilt already
        path = folder / "config.json"
        config: Any = json.loads(path.read_bytes()) if path.is_file() else None
        if config["quantization_config"]["quant_method"] == "bitmend":
            files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
            config["quantization_config"]["files"] = {path.name: sha256_of(path) for path in files}
            _write(folder / "config.json", config)


def _compressed_tensors(source: Path, output: Path) -> None:
    """Export without opening the export in another process."""
    with mock.patch.object(compressed_tensors, "compare_logits"):
        compressed_tensors.CompressedTensors().export(source, output)


def _gptq_v2(source: Path, output: Path) -> None:
    """Turn a symmetric export into version 2 with activation order."""
    shutil.copytree(source, output)
    tensors = load_file(output / SINGLE_FILE)
    for name in [name for name in tensors if name.endswith(".qzeros")]:
        tensors[name] = tensors[name] + 0x11111111
        group = name.replace(".qzeros", ".g_idx")
        generator = torch.Generator().manual_seed(0)
        tensors[group] = tensors[group][torch.randperm(len(tensors[group]), generator=generator)]
    save_file(tensors, output / SINGLE_FILE, {"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] |= {"desc_act": True, "checkpoint_format": "gptq_v2"}
    _write(output / "config.json", config)


def _awq(source: Path, output: Path) -> None:
    checkpoint = open_native(source, "AWQ")
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.exported:
        qtensor = checkpoint.packed(name).unpack()
        zero_point = qtensor.qparams.zero_point
        assert zero_point is not None
        tensors[f"{name}.qweight"] = pack_interleaved(qtensor.codes.T.contiguous())
        tensors[f"{name}.qzeros"] = pack_interleaved(zero_point.T.to(torch.int8).contiguous())
        tensors[f"{name}.scales"] = qtensor.qparams.scale.T.to(torch.float16).contiguous()
    with CheckpointWriter(source, output) as writer:
        writer.add("modules", tensors)
        for number, part in enumerate(checkpoint.other_tensors()):
            writer.add(str(number), part)
        config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
        writer.finish(config, {})


def _stopped(source: Path, place: Path) -> None:
    """Leave `out.partial` of a run that was killed."""
    original, count = Journal.keep_site, 0

    def keep_site(journal: Journal, solved: Any) -> None:
        nonlocal count
        count += 1
        original(journal, solved)
        if count == SITES_BEFORE_STOP:
            raise _Stopped

    place.mkdir()
    with mock.patch.object(Journal, "keep_site", keep_site), suppress(_Stopped):
        run_for_resume(source, place / "out", resume=False)


def _finished(source: Path, place: Path) -> None:
    place.mkdir()
    run_for_resume(source, place / "out", resume=False)


def run_for_resume(source: Path, output: Path, *, resume: bool) -> None:
    """Run the request of the stopped and of the finished folder."""
    keys = {"weights.group_size": GROUP, "weights.observer": "minmax"}
    quantize(source, "rtn", output=output, overrides=keys, resume=resume)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))
