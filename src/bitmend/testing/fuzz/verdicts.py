"""What a reader may make of a spoilt folder, and what it has made.

Right is one of three:

- `refused`: a `QuantizationError` whose message is one line;
- `same`: it is read, and every dequantised weight is that of the folder before it was spoilt, bit for bit;
- `other values`: it is read with other weights, and nobody could know: the mutation leaves a valid folder (its `values`)
  in a format without checksums, or whose checksums were made again after it.

Everything else is a defect: another exception, other weights where checksums should have told, a file outside of the folder
that is opened, a folder read that must be refused.
"""

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bitmend.errors import QuantizationError
from bitmend.evaluate.evaluate import evaluate
from bitmend.evaluate.generation import generate_text
from bitmend.evaluate.load import load_model
from bitmend.formats.gptq import GptqFormat
from bitmend.formats.integrity import check_folder
from bitmend.formats.ledger import ledger
from bitmend.formats.load import load
from bitmend.formats.manifest import Manifest
from bitmend.formats.quantized_folder import read_quantized
from bitmend.pipeline.run import quantize
from bitmend.runtime.conv import QuantConv2d
from bitmend.runtime.embedding import QuantEmbedding, TiedQuantHead
from bitmend.runtime.linear import QuantLinear
from bitmend.testing.fuzz.folders import GROUP, reseal, run_for_resume
from bitmend.testing.fuzz.mutations import MUTATIONS

LONGEST_MESSAGE = 4000
ALLOWED = ("refused", "same", "other values")
REFUSED = "refused"
Weights = dict[str, str]


# ---------------------------------------------------------------------------------------------- readers
def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().contiguous()
    content = plain.view(-1).view(torch.uint8).numpy().data
    return f"{plain.dtype} {tuple(plain.shape)} {hashlib.sha256(content).hexdigest()}"


def weights_of(model: nn.Module) -> Weights:
    """Return a digest of every weight of a model; of packed modules, of what they dequantise to.

    And one of what is done to activations while the model runs.
    """
    found = {name: _digest(tensor) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantConv2d | QuantEmbedding | TiedQuantHead):
            found[f"{name} dequantised"] = _digest(module.dequantize())
    manifest = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "manifest", None)
    if isinstance(manifest, Manifest):
        described = manifest.to_json()
        online = {key: described.get(key) for key in ("inputs", "outputs", "attentions", "rotations")}
        found["activations"] = hashlib.sha256(json.dumps(online, sort_keys=True).encode()).hexdigest()
    return found


def _load(folder: Path, place: Path) -> Weights:
    del place
    return weights_of(load(folder, dtype=torch.float32))


def _load_unverified(folder: Path, place: Path) -> Weights:
    del place
    return weights_of(load(folder, dtype=torch.float32, verify=False))


def _load_model(folder: Path, place: Path) -> Weights:
    del place
    return weights_of(load_model(folder, "cpu", torch.float32).model)


def _inspect(folder: Path, place: Path) -> Weights:
    del place
    check_folder(folder)
    ledger(folder).to_json()
    return {}


def _quantize(folder: Path, place: Path) -> Weights:
    keys = {"weights.group_size": GROUP, "weights.observer": "minmax"}
    quantize(folder, "rtn", output=place / "out", overrides=keys)
    return {name: _digest(tensor) for name, tensor in load_file(place / "out" / "model.safetensors").items()}


def _quantize_on_text(folder: Path, place: Path) -> Weights:
    keys = {"weights.group_size": GROUP, "calibration.sequences": 4, "calibration.sequence_length": 8}
    quantize(folder, "gptq", [_text(place)], output=place / "out", overrides=keys)
    return {}


def _evaluate(folder: Path, place: Path) -> Weights:
    evaluate([folder], texts=[_text(place)], windows=1, window_length=8).to_dict()
    return {}


def _generate(folder: Path, place: Path) -> Weights:
    del place
    generate_text(folder, "w3 w4", tokens=2, temperature=0.0, seed=0, device=torch.device("cpu"))
    return {}


def _export(folder: Path, place: Path) -> Weights:
    GptqFormat().export(folder, place / "out")
    return {name: _digest(tensor) for name, tensor in load_file(place / "out" / "model.safetensors").items()}


def _read_quantized(folder: Path, place: Path) -> Weights:
    del place
    return {name: _digest(tensor) for name, tensor in read_quantized(folder)}


def _resume(folder: Path, place: Path) -> Weights:
    run_for_resume(place.parent / "folders" / "plain", folder / "out", resume=True)
    return {name: _digest(tensor) for name, tensor in load_file(folder / "out" / "model.safetensors").items()}


def _text(place: Path) -> Path:
    path = place / "text.txt"
    path.write_text(" ".join(f"w{number * 7 % 90 + 3}" for number in range(64)))
    return path


Reader = Callable[[Path, Path], Weights]
READERS: Mapping[str, Reader] = {
    "load": _load,
    "load unverified": _load_unverified,
    "load_model": _load_model,
    "inspect": _inspect,
    "quantize": _quantize,
    "quantize on text": _quantize_on_text,
    "evaluate": _evaluate,
    "generate": _generate,
    "export": _export,
    "read_quantized": _read_quantized,
    "resume": _resume,
}

_PLAIN = ("load", "load", "load_model", "load_model", "inspect", "quantize", "quantize", "quantize on text", "evaluate")
_NATIVE = ("load", "load", "load unverified", "load_model", "inspect", "export", "generate")
_FOREIGN = ("read_quantized", "read_quantized", "read_quantized", "read_quantized", "inspect", "quantize")
_OTHER = ("load", "load_model", "inspect", "quantize", "quantize")  # models of other kinds than language models
_LOADED = ("load", "load", "load unverified", "load_model", "inspect")
KINDS: Mapping[str, tuple[str, ...]] = {
    "plain": _PLAIN,
    "plain-sharded": _PLAIN,
    "plain-tied": _PLAIN,
    "native": _NATIVE,
    "native-sharded": _NATIVE,
    "native-tied": tuple(reader for reader in _NATIVE if reader != "export"),
    "compressed-tensors": (*_FOREIGN, "load"),
    "compressed-tensors-asymmetric": _FOREIGN,
    "gptq": _FOREIGN,
    "gptq-v2": _FOREIGN,
    "awq": _FOREIGN,
    "stopped": ("resume",),
    "finished": ("resume",),
    "native-rotated": _LOADED,
    "native-static": _LOADED,
    "native-learned": _LOADED,
    "native-compensated": _LOADED,
    "plain-transformer": _OTHER,
    "native-transformer": _LOADED,
    "plain-convolutions": _OTHER,
    "native-convolutions": _LOADED,
    "plain-encoder": _OTHER,
    "native-encoder": _LOADED,
}
WITHOUT_MODEL = ("read_quantized",)
CHECKSUMMED = (*(kind for kind in KINDS if kind.startswith("native")), "stopped", "finished")


# ---------------------------------------------------------------------------------------------- one case
@dataclass(frozen=True)
class Verdict:
    """What came of one case.

    Attributes:
        seed: makes the case again.
        kind: of the folder.
        reader: what read it.
        mutations: how it was spoilt, in turn.
        outcome: one of `ALLOWED`, or the name of a defect.
        detail: the message or what was wrong.
    """

    seed: int
    kind: str
    reader: str
    mutations: tuple[str, ...]
    outcome: str
    detail: str


class Judge:
    """Runs cases in a folder of its own.

    It hears of every file that Python opens while a reader runs (`sys.addaudithook`, which cannot be undone, so that a
    process should have one judge).
    """

    def __init__(self, place: Path, kinds: Mapping[str, tuple[str, ...]] = KINDS) -> None:
        """Use the folders in `place/folders`, which `make_folders` has made."""
        self.place = place.resolve()
        self.kinds = kinds
        self._expected: dict[tuple[str, str], Weights] = {}
        self._opened: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._opened is not None and event == "open" and isinstance(arguments[0], (str, bytes, Path)):
            self._opened.append(str(arguments[0]))

    def expected(self, kind: str, reader: str) -> Weights:
        """Return what the reader makes of the folder as it was made; `{REFUSED: ""}` when it refuses that, too."""
        if (kind, reader) not in self._expected:
            copy, scratch = self._copy(kind)
            try:
                self._expected[kind, reader] = READERS[reader](copy, scratch)
            except QuantizationError:  # such as quantising what is quantised already
                self._expected[kind, reader] = {REFUSED: ""}
        return self._expected[kind, reader]

    def judge(self, seed: int) -> Verdict:
        """Run the case of that number."""
        chance = random.Random(seed)
        kind = chance.choice(sorted(self.kinds))
        reader = chance.choice(self.kinds[kind])
        expected = self.expected(kind, reader)
        folder, scratch = self._copy(kind)
        count = chance.choice([1, 1, 1, 2, 3])
        done: list[str] = []
        resealed = False
        for name in chance.sample(sorted(MUTATIONS), len(MUTATIONS)):
            # What a mutation finds may be spoilt by the one before; it then leaves the folder as it is.
            with suppress(LookupError, TypeError, AttributeError, ValueError, OSError, RecursionError):
                if MUTATIONS[name].change(folder, chance):
                    done.append(name)
            if len(done) == count:
                break
        if kind.startswith("native") and chance.random() < 0.5:
            reseal(folder)
            resealed = True
        unchecked = kind not in CHECKSUMMED or resealed or reader == "load unverified"
        outcome, detail = self._read(reader, folder, scratch, expected)
        applied = [MUTATIONS[name] for name in done]
        known = reader not in WITHOUT_MODEL
        if outcome == "other" and unchecked and any(one.values or (one.shapes and not known) for one in applied):
            outcome = "other values"
        if (
            outcome == "same"
            and reader != "resume"
            and any(MUTATIONS[name].refused for name in done)
            and len(done) == 1
        ):
            outcome = "read, although it must be refused"
        if outcome == "other":
            outcome = "wrong values"
        return Verdict(seed, kind, reader, tuple([*done, "resealed"] if resealed else done), outcome, detail)

    def _copy(self, kind: str) -> tuple[Path, Path]:
        scratch = self.place / "case"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        folder = scratch / "folder"
        shutil.copytree(self.place / "folders" / kind, folder)
        return folder, scratch

    def _read(self, reader: str, folder: Path, scratch: Path, expected: Weights) -> tuple[str, str]:
        before = _contents(scratch / "outside")
        self._opened = []
        try:
            found = READERS[reader](folder, scratch)
        except QuantizationError as error:
            message = str(error)
            one_line = message.isprintable() and 0 < len(message) <= LONGEST_MESSAGE
            outcome, detail = "refused" if one_line else "not one line", message[:300]
            if "allocate" in message or "memory" in message:
                outcome = "refused by the allocator"
        except BaseException as error:
            outcome, detail = f"{type(error).__name__}", _where(error)
        else:
            differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            outcome, detail = ("other", ", ".join(differing)[:300]) if differing else ("same", "")
        finally:
            opened, self._opened = self._opened, None
        outside = [path for path in opened if self._is_outside(path, folder)]
        if outside or before != _contents(scratch / "outside"):
            return "outside", f"{outcome}: {outside[:1]}"
        return outcome, detail

    def _is_outside(self, path: str, folder: Path) -> bool:
        del folder
        return path.startswith(str(self.place / "case" / "outside")) or path in ("/etc/passwd", "/dev/zero")


def _contents(folder: Path) -> dict[str, bytes]:
    if not folder.exists():
        return {}
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _where(error: BaseException) -> str:
    """Return the message and the last lines of bitmend in the traceback."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "bitmend" in code.co_filename and "fuzz" not in code.co_filename:
            lines.append(f"{Path(code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{' > '.join(lines[-4:])}: {str(error)[:200]!r}"
