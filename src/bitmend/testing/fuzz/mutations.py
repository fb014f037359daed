"""Ways to spoil a model folder, each drawn from a seeded generator, so that a case can be made again from its number.

A mutation changes a folder in place. Some things are known of each, for the verdict:

- `values`: it may leave a folder that is valid and holds other numbers, such as a flipped bit in a tensor. Where a format
  has no checksum nobody can know.
- `shapes`: it may leave a valid file with a tensor of another shape, which only a reader that knows the model can refuse.
- `refused`: a folder that it has changed must never be read.
"""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
HUGE = (2**31, 2**40, 2**63, 2**64, 10**30, 10**5000)
ODD: tuple[Any, ...] = (None, True, -1, 0, 1, 3, 10**9, 10**30, "", "x", [], {}, 1.5, float("nan"), [[]], "é", "\ud800")
DEEP = 100_000

Change = Callable[[Path, random.Random], bool]


@dataclass(frozen=True)
class Mutation:
    """One way to spoil a folder.

    Attributes:
        name: in reports.
        change: spoils the folder; returns False when the folder has nothing of that kind.
        values: see the module.
        shapes: see the module.
        refused: see the module.
    """

    name: str
    change: Change
    values: bool
    shapes: bool
    refused: bool


MUTATIONS: dict[str, Mutation] = {}


def mutation(*, values: bool = False, shapes: bool = False, refused: bool = False) -> Callable[[Change], Change]:
    """Register a function under its name."""

    def register(change: Change) -> Change:
        name = change.__name__
        MUTATIONS[name] = Mutation(name, change, values, shapes, refused)
        return change

    return register


# ---------------------------------------------------------------------------------------------- files and their parts
def _weights(folder: Path, chance: random.Random) -> Path | None:
    files = sorted(path for path in folder.rglob("*.safetensors") if path.is_file())
    files = [path for path in files if path.stat().st_size > 16 and not path.is_symlink()]
    return chance.choice(files) if files else None


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file.

    Raises:
        ValueError: it is none (any more).
    """
    if len(data) < 8 or (length := struct.unpack("<Q", data[:8])[0]) > len(data) - 8:
        raise ValueError("no header")
    table = json.loads(data[8 : 8 + length].decode())
    if not isinstance(table, dict):
        raise ValueError("no table")  # noqa: TRY004 - as the others: it is no safetensors file
    return table, data[8 + length :]


def join(text: bytes, rest: bytes) -> bytes:
    """Return a safetensors file from the text of its header and its data."""
    return struct.pack("<Q", len(text)) + text + rest


def _edit_header(folder: Path, chance: random.Random, edit: Callable[[dict[str, Any], list[str]], bool]) -> bool:
    """Change the table of a header; `edit` gets it and the names of the tensors."""
    path = _weights(folder, chance)
    if path is None:
        return False
    try:
        table, rest = split(path.read_bytes())
    except ValueError:
        return False
    names = [name for name, item in table.items() if name != "__metadata__" and isinstance(item, dict)]
    names = [name for name in names if {"dtype", "shape", "data_offsets"} <= set(table[name])]
    if not names or not edit(table, names):
        return False
    with _any_integers():
        path.write_bytes(join(json.dumps(table).encode(), rest))
    return True


class _any_integers:  # noqa: N801 - used like a function
    """Lift the limit on the digits of a number that is written."""

    def __enter__(self) -> None:
        import sys

        self._before = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)

    def __exit__(self, *reason: object) -> None:
        import sys

        sys.set_int_max_str_digits(self._before)


def _edit_json(path: Path, edit: Callable[[Any], Any]) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    content = edit(content)
    if content is None:
        return False
    with _any_integers():
        path.write_text(json.dumps(content))
    return True


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield every path into a JSON value, but the empty one."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def spoil_value(content: Any, chance: random.Random, within: Sequence[Any] = ()) -> Any:
    """Replace, remove or rename one value anywhere in (a part of) a JSON value; None when there is nothing."""
    found = [path for path in places(content) if path[: len(within)] == tuple(within)]
    if not found:
        return None
    path = chance.choice(found)
    table = content
    for key in path[:-1]:
        table = table[key]
    key, old = path[-1], table[path[-1]]
    others = list(ODD)
    if type(old) is int:
        others += [old + 1, old * 2, -old, str(old), 2 * old + 1, 10**7, 10**12]
    if isinstance(old, bool):
        others += [not old] * 4
    if isinstance(old, str):
        others += [old + "x", old.upper(), old + "\n\x1b[2J", "x" * 100_000]
    match chance.randrange(5):
        case 0 if isinstance(table, dict):
            del table[key]
        case 1 if isinstance(table, dict):
            table[f"{key}x"] = table.pop(key)
        case _:
            table[key] = chance.choice(others)
    return content


# ---------------------------------------------------------------------------------------------- bytes of weight files
def _edit_bytes(folder: Path, chance: random.Random, edit: Callable[[bytes], bytes]) -> bool:
    path = _weights(folder, chance)
    if path is None:
        return False
    data = path.read_bytes()
    changed = edit(data)
    path.write_bytes(changed)
    return changed != data


@mutation()
def header_length(folder: Path, chance: random.Random) -> bool:
    """Another announced length of the header."""

    def edit(data: bytes) -> bytes:
        true = struct.unpack("<Q", data[:8])[0]
        wrong = [0, 1, 2, 7, true - 1, true + 1, true + 8, len(data), len(data) - 8, 10**8, 2**63, 2**64 - 1]
        return struct.pack("<Q", chance.choice(wrong) % 2**64) + data[8:]

    return _edit_bytes(folder, chance, edit)


@mutation(values=True)
def header_byte(folder: Path, chance: random.Random) -> bool:
    """Flip bits of, insert or remove bytes in the header's text. May relabel a tensor's type."""

    def edit(data: bytes) -> bytes:
        length = min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
        text, rest = bytearray(data[8 : 8 + length]), data[8 + length :]
        for _ in range(chance.choice([1, 1, 2, 5])):
            at = chance.randrange(max(1, len(text)))
            match chance.randrange(3):
                case 0 if text:
                    text[at] ^= 1 << chance.randrange(8)
                case 1:
                    text[at:at] = bytes([chance.randrange(256)])
                case _:
                    del text[at : at + 1]
        return join(bytes(text), rest)

    return _edit_bytes(folder, chance, edit)


@mutation()
def header_text(folder: Path, chance: random.Random) -> bool:
    """Another text of the same header or of none: other encodings, white space, deep nesting, no table."""

    def edit(data: bytes) -> bytes:
        length = min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
        text, rest = data[8 : 8 + length], data[8 + length :]
        plain = text.decode(errors="replace")
        return join(
            chance.choice(
                [
                    plain.encode("utf-16"), b"\xef\xbb\xbf" + text, b"  " + text, text + b"   ", text + b"\0\0",
                    text + b"}", b"", b"[]", b"null", b"{}", b"3", b'"x"', b"[" * DEEP, b'{"a":' * DEEP, b"NaN",
                    text.replace(b"{", b"{\xff", 1), text.replace(b":", b": ", 3), b"{" + text, b"9" * 10_000,
                ]
            ),
            rest,
        )  # fmt: skip

    return _edit_bytes(folder, chance, edit)


@mutation(refused=True)
def cut(folder: Path, chance: random.Random) -> bool:
    """Cut a weight file short."""
    return _edit_bytes(folder, chance, lambda data: data[: chance.randrange(len(data))])


@mutation(refused=True)
def grow(folder: Path, chance: random.Random) -> bool:
    """Append bytes to a weight file."""
    return _edit_bytes(folder, chance, lambda data: data + chance.randbytes(chance.choice([1, 8, 4096])))


@mutation(values=True)
def data_bytes(folder: Path, chance: random.Random) -> bool:
    """Flip bits in the data of a weight file."""

    def edit(data: bytes) -> bytes:
        start = 8 + min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
        altered = bytearray(data)
        if start < len(data):
            for _ in range(chance.choice([1, 1, 10, 1000])):
                altered[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
        return bytes(altered)

    return _edit_bytes(folder, chance, edit)


@mutation(values=True)
def data_block(folder: Path, chance: random.Random) -> bool:
    """Set the whole data of one tensor to one byte: zeros, NaN, the largest or the least whole number."""

    def edit(data: bytes) -> bytes:
        try:
            table, rest = split(data)
            name = chance.choice([name for name in table if name != "__metadata__"])
            first, last = table[name]["data_offsets"]
            if not 0 <= first <= last <= len(rest):
                return data
        except (ValueError, IndexError, KeyError, TypeError):
            return data
        start = len(data) - len(rest)
        fill = bytes([chance.choice([0, 0xFF, 0x7F, 0x80])])
        return data[: start + first] + fill * (last - first) + data[start + last :]

    return _edit_bytes(folder, chance, edit)


# ---------------------------------------------------------------------------------------------- entries of a header
@mutation(values=True)
def dtype(folder: Path, chance: random.Random) -> bool:
    """Another type of a tensor; one of the same width is as valid as the true one."""
    types = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", 3, None]

    def edit(table: dict[str, Any], names: list[str]) -> bool:
        table[chance.choice(names)]["dtype"] = chance.choice(types)
        return True

    return _edit_header(folder, chance, edit)


@mutation(shapes=True)
def shape(folder: Path, chance: random.Random) -> bool:
    """Another shape of a tensor: huge, negative, no whole number, nested, missing, other sides of the same size."""

    def edit(table: dict[str, Any], names: list[str]) -> bool:
        item = table[chance.choice(names)]
        sides = item["shape"]
        wrong: list[Any] = [None, 3, "x", {}, [[]], [sides], [], sides[::-1], [*sides, 1], [1, *sides], [10**18] * 300]
        wrong += [
            [2] * 5000,
            [0, 10**30],
            [*sides, 0, 10**5000],
            [1] * 1000 + (sides if isinstance(sides, list) else []),
        ]
        if sides and isinstance(sides, list):
            at = chance.randrange(len(sides))
            for side in [*HUGE, -1, -(2**63), 0, 1.5, float(3), True, None, "2", float("inf")]:
                wrong.append([*sides[:at], side, *sides[at + 1 :]])
            wrong += [[-side if type(side) is int else side for side in sides]]
        if chance.random() < 0.1:
            del item["shape"]
        else:
            item["shape"] = chance.choice(wrong)
        return True

    return _edit_header(folder, chance, edit)


@mutation()
def offsets(folder: Path, chance: random.Random) -> bool:
    """Other offsets of a tensor: overlap, gap, beyond the file, reversed, huge, no whole numbers, missing."""

    def edit(table: dict[str, Any], names: list[str]) -> bool:
        item = table[chance.choice(names)]
        pair = item["data_offsets"]
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(end) is int for end in pair):
            return False
        first, last = pair
        step = chance.choice([-8, -4, 4, 8, 64])
        wrong: list[Any] = [None, [], [first], [first, last, last], [last, first], [first + step, last + step], "x"]
        wrong += [[first, last + step], [first + step, last], [-8, last - first - 8], [first, float(last)], [[], {}]]
        wrong += [[huge, huge + last - first] for huge in HUGE] + [[first, huge] for huge in HUGE] + [[True, last]]
        item["data_offsets"] = chance.choice(wrong)
        return True

    return _edit_header(folder, chance, edit)


@mutation()
def entry(folder: Path, chance: random.Random) -> bool:
    """An entry that is no entry, has a key too many, or a name that occurs twice."""

    def edit(table: dict[str, Any], names: list[str]) -> bool:
        name = chance.choice(names)
        if chance.random() < 0.5:
            table[name] = chance.choice([None, [], {}, 3, "x", {**table[name], "more": 1}])
        else:
            table["__metadata__"] = chance.choice([None, [], 3, {"a": 3}, {"a": None}, {"": ""}, {"a": {"b": "c"}}])
        return True

    return _edit_header(folder, chance, edit)


@mutation(refused=True)
def duplicate_key(folder: Path, chance: random.Random) -> bool:
    """A tensor that the header describes twice."""

    def edit(data: bytes) -> bytes:
        try:
            table, rest = split(data)
            name = chance.choice([name for name in table if name != "__metadata__"])
        except (ValueError, IndexError):
            return data
        again = f"{{{json.dumps(name)}: {json.dumps(table[name])}, ".encode()
        return join(again + json.dumps(table).encode()[1:], rest)

    return _edit_bytes(folder, chance, edit)


@mutation(values=True)
def removed(folder: Path, chance: random.Random) -> bool:
    """Remove a tensor, its bytes too."""

    def edit(data: bytes) -> bytes:
        try:
            table, rest = split(data)
            name = chance.choice([name for name in table if name != "__metadata__"])
            first, last = table.pop(name)["data_offsets"]
            for item in table.values():
                if "data_offsets" in item and item["data_offsets"][0] >= last:
                    item["data_offsets"] = [end - (last - first) for end in item["data_offsets"]]
            return join(json.dumps(table).encode(), rest[:first] + rest[last:])
        except (ValueError, IndexError, KeyError, TypeError):
            return data

    return _edit_bytes(folder, chance, edit)


@mutation(values=True)
def renamed(folder: Path, chance: random.Random) -> bool:
    """Another name of a tensor: a letter more, control characters, very long, a number that is none, none at all."""

    def edit(table: dict[str, Any], names: list[str]) -> bool:
        name = chance.choice(names)
        wrong = [
            name + "x",
            name.replace("0", "1"),
            "x\n\x1b[2J" + name,
            "y" * 100_000 + name,
            "",
            ".",
            "model.²." + name,
        ]
        wrong += [
            "\ud800" + name,
            name.rpartition(".")[0],
            "model." + "9" * 5000 + "." + name,
            name.upper(),
            "../" + name,
        ]
        table[chance.choice(wrong)] = table.pop(name)
        return True

    return _edit_header(folder, chance, edit)


@mutation(values=True)
def swapped(folder: Path, chance: random.Random) -> bool:
    """Two tensors in each other's place."""

    def edit(table: dict[str, Any], names: list[str]) -> bool:
        one, other = chance.choice(names), chance.choice(names)
        table[one], table[other] = table[other], table[one]
        return one != other

    return _edit_header(folder, chance, edit)


@mutation(values=True)
def added(folder: Path, chance: random.Random) -> bool:
    """A tensor more, of no bytes or of some."""

    def edit(data: bytes) -> bytes:
        try:
            table, rest = split(data)
        except ValueError:
            return data
        parts = [name.rpartition(".")[0] for name in table if name != "__metadata__"] or ["x"]
        leaf = chance.choice(
            ["weight", "bias", "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale"]
        )
        size = chance.choice([0, 4, 64])
        stored = {
            "dtype": chance.choice(["F32", "I32"]),
            "shape": [size // 4],
            "data_offsets": [len(rest), len(rest) + size],
        }
        table[f"{chance.choice(parts)}.{leaf}"] = stored
        return join(json.dumps(table).encode(), rest + bytes(size))

    return _edit_bytes(folder, chance, edit)


# ---------------------------------------------------------------------------------------------- the index of shards
@mutation(refused=True)
def index_outside(folder: Path, chance: random.Random) -> bool:
    """An index that names a file elsewhere; where it can, the file is moved there, so that reading it would work."""
    outside = folder.parent / "outside"

    def edit(content: Any) -> Any:
        table = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
            return None
        old = chance.choice(sorted(set(table.values())))
        outside.mkdir(exist_ok=True)
        if (folder / old).is_file():
            (outside / "part.safetensors").write_bytes((folder / old).read_bytes())
        wrong = ["../outside/part.safetensors", str(outside / "part.safetensors"), "..\\outside\\part.safetensors"]
        wrong += [f"../{folder.name}/{old}", "/dev/zero", "/etc/passwd", "..", ".", "", f"{old}\0", "config.json"]
        wrong += [f"{old}/../../outside/part.safetensors", "C:\\part.safetensors", "file:///etc/passwd", "\ud800"]
        new = chance.choice(wrong)
        every = chance.random() < 0.7
        content["weight_map"] = {
            name: new if file == old and (every or number == 0) else file
            for number, (name, file) in enumerate(table.items())
        }
        return content if new in content["weight_map"].values() else None

    return _edit_json(folder / INDEX_FILE, edit)


@mutation(values=True)
def index_value(folder: Path, chance: random.Random) -> bool:
    """One value of the index."""
    return _edit_json(folder / INDEX_FILE, lambda content: spoil_value(content, chance))


@mutation()
def index_text(folder: Path, chance: random.Random) -> bool:
    """No index but something else."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return False
    text = path.read_bytes()
    path.write_bytes(chance.choice([b"", b"[]", b"{}", b"\xff", b"[" * DEEP, text[: len(text) // 2], text + b"x"]))
    return True


# ---------------------------------------------------------------------------------------------- config.json and others
@mutation(values=True)
def config_value(folder: Path, chance: random.Random) -> bool:
    """One value of config.json, wherever it stands."""
    return _edit_json(folder / "config.json", lambda content: spoil_value(content, chance))


@mutation(values=True)
def quantization_value(folder: Path, chance: random.Random) -> bool:
    """One value of `quantization_config`: the manifest of bitmend's own format, or another tool's settings."""
    return _edit_json(folder / "config.json", lambda content: spoil_value(content, chance, ["quantization_config"]))


SIZES = (
    "hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "num_labels", "initializer_range", "n_layer", "num_experts", "rope_theta",
    "sliding_window", "max_window_layers", "pad_token_id", "num_return_sequences", "max_length", "chunk_size_feed_forward",
)  # fmt: skip


@mutation()
def config_size(folder: Path, chance: random.Random) -> bool:
    """A size that no file could fill."""

    def edit(content: Any) -> Any:
        if not isinstance(content, dict):
            return None
        key = chance.choice(SIZES)
        content[key] = chance.choice([10**5, 10**7, 10**9, 2**31, 2**63, 10**30, -(10**9), 1e9, "9" * 9, [10**9]])
        return content

    return _edit_json(folder / "config.json", edit)


QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "bits": (0, 1, 2, 3, 5, 8, 16, 1000, -4, "4", 4.0, True, None),
    "group_size": (0, 1, 8, 32, 64, 10**12, -2, -128, "16", 16.0, None, False),
    "sym": (True, False, "yes", None, 1),
    "desc_act": (True, False, 1, None),
    "checkpoint_format": ("gptq", "gptq_v2", "marlin", None, 3, []),
    "quant_method": ("gptq", "awq", "compressed-tensors", "bitmend", "bitsandbytes", "magic", "", None, 3, [], {}),
    "version": ("gemm", "GEMM", "gemv", "exllama", None, 4),
    "format": ("pack-quantized", "dense", "float-quantized", None, 3),
    "dynamic": ({}, {"+:(a+)+$": {"bits": 8}}, [], "x", {"-:.*": {}}),
    "config_groups": ({}, [], None, {"a": 3}, {"a": {}}, {"a": {"targets": ["re:((a|b|.)*)*!$"], "weights": {}}}),
    "format_version": (0, 2, "1", None),
    "files": ({}, None, [], {"model.safetensors": "0" * 64}, {"../x": "0"}),
    "tied": ({"lm_head": "lm_head"}, {"model": "model.embed_tokens"}, {"": ""}, [], {"lm_head": "model.embed_tokens"}),
    "schemes": ([], [[]], [3], None),
    "modules": ({}, [], {"model.norm": {"scheme": 0, "shape": [1, 32], "kind": "linear"}}),
    "transform_config": ({"a": 1}, 3),
    "verify": (False, 0),
    "load_in_4bit": (True,),
    "ignore": ([], None, ["re:(x+x+)+y"], 3),
    "modules_to_not_convert": (["lm_head"], 3, None),
}


@mutation(values=True)
def quantization_known(folder: Path, chance: random.Random) -> bool:
    """A key of `quantization_config` that readers know, with a value that is odd, impossible or another's."""

    def edit(content: Any) -> Any:
        if not isinstance(content, dict):
            return None
        if chance.random() < 0.1:
            content["quantization_config"] = chance.choice([None, [], 3, "x", True, {}])
            return content
        described = content.get("quantization_config")
        if not isinstance(described, dict):
            described = content["quantization_config"] = {}
        known = [key for key in QUANTIZATION if key in described]
        key = chance.choice(known if known and chance.random() < 0.6 else list(QUANTIZATION))
        described[key] = chance.choice(QUANTIZATION[key])
        return content

    return _edit_json(folder / "config.json", edit)


@mutation(values=True)
def scheme_weights(folder: Path, chance: random.Random) -> bool:
    """One value of the weights of a group of compressed-tensors, or of a scheme of bitmend's own format."""
    keys: dict[str, tuple[Any, ...]] = {
        "num_bits": (0, 1, 2, 3, 5, 8, 64, "4"), "bits": (0, 1, 2, 3, 5, 8, 64, "4"), "strategy": ("channel", "tensor", 3),
        "group_size": (0, 1, 8, 32, -1, 10**12, "16"), "symmetric": (True, False, None), "ragged": (True, False, 0),
        "type": ("float", 3), "scale_dtype": ("float16", "bfloat16", "float32", "float64"), "actorder": ("group", 3),
        "targets": (["Linear"], ["re:(.*)*x"], ["re:["], [3], "Linear", [], ["re:.*self_attn.*"]), "layout": ("x", 3),
        "observer": ("mse", "minmax", "percentile", "x"),
    }  # fmt: skip

    def edit(content: Any) -> Any:
        described = content.get("quantization_config") if isinstance(content, dict) else None
        found = [path for path in places(described) if path[-1] in keys]
        if not found:
            return None
        for path in chance.sample(found, min(len(found), chance.choice([1, 1, 2]))):
            table: Any = described
            for key in path[:-1]:
                table = table[key]
            table[path[-1]] = chance.choice(keys[path[-1]])
        return content

    return _edit_json(folder / "config.json", edit)


@mutation()
def json_text(folder: Path, chance: random.Random) -> bool:
    """A JSON file of the folder that is cut, empty, no table, not UTF-8 or nested deeply."""
    files = sorted(path for path in folder.rglob("*.json") if path.is_file() and not path.is_symlink())
    if not files:
        return False
    path = chance.choice(files)
    text = path.read_bytes()
    wrong = [b"", b"[]", b"3", b"null", b"\xff\xfe{", b"[" * DEEP, b'{"a":' * DEEP, text[: len(text) // 2], text + b"x"]
    wrong += [
        b"\xef\xbb\xbf" + text,
        b'{"a": 1, "a": 2}',
        b'"\\ud800"',
        b"{}",
        b"9" * 10_000,
        text.replace(b"e", b"\0"),
    ]
    path.write_bytes(chance.choice(wrong))
    return True


@mutation(values=True)
def json_value(folder: Path, chance: random.Random) -> bool:
    """One value of a JSON file of the folder that is not config.json: tokenizer, generation, reports, the journal."""
    files = sorted(path for path in folder.rglob("*.json") if path.is_file() and path.name != "config.json")
    return bool(files) and _edit_json(chance.choice(files), lambda content: spoil_value(content, chance))


@mutation()
def tokenizer_bytes(folder: Path, chance: random.Random) -> bool:
    """Flip bytes of tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file() or path.is_symlink():
        return False
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 5, 100])):
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return True


# ---------------------------------------------------------------------------------------------- files that are none
@mutation()
def special_file(folder: Path, chance: random.Random) -> bool:
    """A pipe, a folder, a link to /dev/zero, to nowhere or to itself in the place of a file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return False
    path = chance.choice(files)
    path.unlink()
    match chance.randrange(6):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(folder.parent / "nowhere")
        case 4:
            path.symlink_to(path)
        case _:
            path.write_bytes(b"")
    return True


@mutation()
def stray_file(folder: Path, chance: random.Random) -> bool:
    """A file more that is no file: a pipe, a folder, an endless link, garbage, under a name that readers look for."""
    name = chance.choice(
        ["x.safetensors", "model.bin", "pytorch_model.bin", "adapter_config.json", "merges.txt", "vocab.json",
         "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "tokenizer.model",
         "quantize_config.json", "model.safetensors.index.json", "LICENSE", "modeling_x.py"]
    )  # fmt: skip
    inside = sorted(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())
    path = chance.choice([folder, folder, *inside]) / name
    if path.exists() or path.is_symlink():
        return False
    match chance.randrange(5):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(folder.parent / "nowhere")
        case _:
            path.write_bytes(chance.randbytes(chance.choice([0, 1, 100])))
    return True


@mutation()
def missing_file(folder: Path, chance: random.Random) -> bool:
    """Remove a file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return False
    chance.choice(files).unlink()
    return True


@mutation()
def linked_folder(folder: Path, chance: random.Random) -> bool:
    """A folder in the folder that is a link to somewhere else, whose files nobody may touch."""
    inside = sorted(
        path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink() and path.name != "out"
    )
    inside = [path for path in inside if not path.name.endswith(".partial")]
    if not inside:
        return False
    path = chance.choice(inside)
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)
    return True
