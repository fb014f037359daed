"""Run as a script by `reopen.py`: computes logits of a compressed-tensors folder, without bitmend.

Usage: `python -P reopen_child.py EXPORT IDS_FILE LOGITS_FILE torch.DTYPE`
"""

import sys
from pathlib import Path
from typing import Any


def open_plainly(folder: str, dtype: Any) -> Any:
    """Return the model as any user of transformers gets it.

    Raises:
        RuntimeError: tensors are missing or left over.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if any(info.values()):
        raise RuntimeError(f"transformers reports {info}")
    return model


def open_by_decompressor(folder: str, dtype: Any) -> Any:
    """Return a dense model whose weights the library's own decompressor has unpacked, module by module.

    For zero points: transformers 5.23 with compressed-tensors 0.20 makes room for unpacked ones and then refuses the
    packed ones of the file.

    Raises:
        RuntimeError: tensors are missing or left over.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    quantization = QuantizationConfig.model_validate(config.quantization_config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    targets = {target: scheme for scheme in quantization.config_groups.values() for target in scheme.targets}
    left = set(model.state_dict()) - set(model.all_tied_weights_keys)
    for file in Path(folder).glob("*.safetensors"):
        tensors = load_file(file)
        modules: dict[str, dict[str, Any]] = {}
        for name in [name for name in tensors if ".weight_" in name]:
            module, _, leaf = name.rpartition(".")
            modules.setdefault(module, {})[leaf] = tensors.pop(name)
        for name, parts in modules.items():
            scheme = targets[match_targets(name, model.get_submodule(name), targets)[0]]
            parts["weight_scale"] = parts["weight_scale"].to(dtype)  # as readers do
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            tensors[f"{name}.weight"] = compressor.decompress(parts, scheme)["weight"]
        unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
        left -= set(tensors)
        if unexpected:
            raise RuntimeError(f"left over: {unexpected}")
    if left:
        raise RuntimeError(f"missing: {sorted(left)}")
    model.tie_weights()
    return model


def main(folder: str, asked: str, answer: str, dtype_name: str) -> None:
    """Write the logits of the model in `folder` on the tokens in `asked` to `answer`."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    dtype = getattr(torch, dtype_name.removeprefix("torch."))
    groups = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["config_groups"]
    symmetric = all(group["weights"]["symmetric"] for group in groups.values())
    model = (open_plainly if symmetric else open_by_decompressor)(folder, dtype).eval()
    with torch.no_grad():
        logits = model(load_file(asked)["ids"]).logits.float().contiguous()
    if "bitmend" in sys.modules:
        raise RuntimeError("bitmend was imported, so the export was not judged by its own reader alone")
    save_file({"logits": logits}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
