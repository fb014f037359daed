"""Run as a script by `reopen.py`: computes logits of a compressed-tensors folder, without bitmend.

Usage: `python -P reopen_child.py EXPORT IDS_FILE LOGITS_FILE torch.DTYPE`
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def open_plainly(folder: str, dtype: Any, **options: Any) -> Any:
    """Return the model as any user of transformers gets it.

    Raises:
        RuntimeError: tensors are missing or left over.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if any(info.values()):
        raise RuntimeError(f"transformers reports {info}")
    return model


def open_dequantised(folder: str, dtype: Any) -> Any:
    """Return the dense model, unpacked by transformers while it loads: its only way to quantised experts.

    Raises:
        RuntimeError: tensors are missing or left over.
    """
    from transformers import CompressedTensorsConfig

    return open_plainly(folder, dtype, quantization_config=CompressedTensorsConfig(dequantize=True))


def open_by_decompressor(folder: str, dtype: Any) -> Any:
    """Return a dense model whose weights the library's own decompressor has unpacked, module by module.

    For zero points: transformers 5.23 with compressed-tensors 0.20 makes room for unpacked ones and then refuses the
    packed ones of the file.

    Raises:
        RuntimeError: tensors are missing or left over.
    """
    from transformers import AutoModelForCausalLM

    config, files = decompressed(folder, dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    left = set(model.state_dict()) - set(model.all_tied_weights_keys)
    for tensors in files:
        unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
        left -= set(tensors)
        if unexpected:
            raise RuntimeError(f"left over: {unexpected}")
    if left:
        raise RuntimeError(f"missing: {sorted(left)}")
    model.tie_weights()
    return model


def open_experts_by_decompressor(folder: str, dtype: Any) -> Any:
    """Return the same for a mixture of experts: transformers merges the single experts, so it must read them from a file.

    For experts with zero points or of several schemes, which it does not load.

    Raises:
        RuntimeError: tensors are missing or left over.
    """
    import json
    import tempfile

    from safetensors.torch import save_file

    config, files = decompressed(folder, dtype)
    with tempfile.TemporaryDirectory() as plain:
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(files):
            save_file(tensors, Path(plain) / f"{number}.safetensors", metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, f"{number}.safetensors")
        index = Path(plain) / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        config.save_pretrained(plain)
        return open_plainly(plain, dtype)


def decompressed(folder: str, dtype: Any) -> tuple[Any, Iterator[dict[str, Any]]]:
    """Return the config of the dense model, and file by file its tensors."""
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    quantization = QuantizationConfig.model_validate(config.quantization_config)
    del config.quantization_config
    targets = {target: scheme for scheme in quantization.config_groups.values() for target in scheme.targets}
    return config, (_dense(file, targets, dtype) for file in sorted(Path(folder).glob("*.safetensors")))


def _dense(file: Path, targets: dict[str, Any], dtype: Any) -> dict[str, Any]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.utils.match import match_targets
    from safetensors.torch import load_file
    from torch.nn import Linear

    tensors: dict[str, Any] = load_file(file)
    modules: dict[str, dict[str, Any]] = {}
    for name in [name for name in tensors if ".weight_" in name]:
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensors.pop(name)
    for name, parts in modules.items():
        scheme = targets[match_targets(name, Linear(1, 1), targets)[0]]
        parts["weight_scale"] = parts["weight_scale"].to(dtype)  # as readers do
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        tensors[f"{name}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return tensors


def way_of_opening(folder: str) -> Any:
    """Return the function that opens a folder, by what stands in its config and what its files hold."""
    import json

    from safetensors import safe_open

    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    symmetric = all(group["weights"]["symmetric"] for group in groups)
    names: list[str] = []
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names += opened.keys()
    found = (re.search(r"\.experts\.\d+\.\w+\.(weight\w*)$", name) for name in names)
    leaves = {match[1] for match in found if match}
    if not leaves - {"weight"}:
        return open_plainly if symmetric else open_by_decompressor
    alike = symmetric and len(groups) == 1 and "weight" not in leaves
    return open_dequantised if alike else open_experts_by_decompressor


def main(folder: str, asked: str, answer: str, dtype_name: str) -> None:
    """Write the logits of the model in `folder` on the tokens in `asked` to `answer`."""
    import torch
    from safetensors.torch import load_file, save_file

    dtype = getattr(torch, dtype_name.removeprefix("torch."))
    model = way_of_opening(folder)(folder, dtype).eval()
    with torch.no_grad():
        logits = model(load_file(asked)["ids"]).logits.float().contiguous()
    if "bitmend" in sys.modules:
        raise RuntimeError("bitmend was imported, so the export was not judged by its own reader alone")
    save_file({"logits": logits}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
