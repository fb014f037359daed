"""Opens an export with the reader that it is meant for, in a process of its own, and compares logits.

In a process of its own, because a reader in this one might be helped by what bitmend has imported or registered. The
other process runs `reopen_child.py`, which imports transformers and compressed_tensors only.
"""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmend.errors import ExportError
from bitmend.formats.load import load
from bitmend.runtime.embedding import QuantEmbedding
from bitmend.runtime.linear import QuantLinear

# Largest accepted root mean square of the difference, over that of the logits. Both sides multiply by the same weights
# and differ only in the order of sums, which in half precision is visible.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_ROWS, _COLUMNS = 2, 16


def compare_logits(source: Path, export: Path, dtype: torch.dtype | None = None) -> float:
    """Return how far the logits of an export are from those of bitmend's own checkpoint, on fixed tokens.

    Args:
        source: the checkpoint in bitmend's own format.
        export: the folder to judge.
        dtype: to compute in; None for float32 where it fits in half of the free memory, else the model's own.

    Returns:
        Root mean square of the difference over that of the logits.

    Raises:
        ExportError: the reader fails, or the logits differ.
    """
    model = load(source, verify=False, dtype=dtype or "auto")
    if dtype is None:
        dtype = torch.float32 if _fits_float32(model) else model.dtype
        model = model.to(dtype)
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(_ROWS * _COLUMNS).view(_ROWS, _COLUMNS) * 7919 + 13) % vocabulary
    with torch.no_grad():
        expected = model(ids).logits.float()
    del model
    gc.collect()  # the other process needs the memory
    found = _logits_of_export(export, ids, dtype)
    if found.shape != expected.shape:
        raise ExportError(
            f"reopened, the export gives logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
    error = ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
    if not error <= _TOLERANCE[dtype]:  # written so that NaN fails
        raise ExportError(
            f"reopened by its own reader, the export gives other logits than {source}: relative difference "
            f"{error:.2e}, allowed {_TOLERANCE[dtype]:.0e}; it was removed"
        )
    return error


def _logits_of_export(export: Path, ids: Tensor, dtype: torch.dtype) -> Float[Tensor, "rows columns vocabulary"]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "ids.safetensors", Path(folder) / "logits.safetensors"
        save_file({"ids": ids}, asked)
        child = Path(__file__).with_name("reopen_child.py")
        # -P: without it the folder of the script, with its module compressed_tensors, would shadow the package.
        command = [sys.executable, "-P", str(child), str(export), str(asked), str(answer), str(dtype)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
            raise ExportError(f"compressed-tensors cannot open the export, which was removed: {reason}")
        return load_file(answer)["logits"]


def _fits_float32(model: torch.nn.Module) -> bool:
    packed = [module for module in model.modules() if isinstance(module, QuantLinear | QuantEmbedding)]
    weights = sum(module.shape[0] * module.shape[1] for module in packed)
    dense = 4 * (weights + sum(parameter.numel() for parameter in model.parameters()))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return dense < free / 2
