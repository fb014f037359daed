"""What this machine has left, in memory and on disk, and what this process holds of it.

In a container the limit of the control group counts, not that of the machine. Where a number cannot be had (macOS has
neither `/proc` nor control groups) it is None, and the forecast is told without a comparison.
"""

import ctypes
import re
import resource
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
# A control group without a limit says "max" (version 2) or a number near 2^63 (version 1).
NO_LIMIT = 2**60


def anonymous_bytes() -> int | None:
    """Return how much memory this process holds of its own, without the pages of files, or None where nobody can tell."""
    return _kilobytes(PROC / "self" / "status", "RssAnon")


def mapped_bytes() -> int | None:
    """Return how much of files, libraries foremost, is in the memory of this process; None where nobody can tell."""
    return _kilobytes(PROC / "self" / "status", "RssFile")


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far, pages of files counted."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """Return how many bytes may still be allocated before something is killed: the machine's, or the container's if fewer.

    Pages that only cache files are given back by the kernel when memory is short; they count as available.
    """
    left = [value for value in (_kilobytes(PROC / "meminfo", "MemAvailable"), *_left_in_groups()) if value is not None]
    return max(0, min(left)) if left else None


def available_device_memory(device: torch.device) -> int | None:
    """Return how many bytes are free on a CUDA device, those counted that torch keeps for itself; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_disk(path: Path) -> int | None:
    """Return how many bytes are free where `path` lies or will lie, or None where nobody can tell."""
    place = path.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def return_free_memory() -> None:
    """Give freed memory back to the system, where the allocator would keep it (glibc).

    It keeps what is smaller than 32 MB for later. The tensors of one block do not fit into the holes that those of the
    block before have left, so that without this a run grows by about half of each block's weights (docs/log.md).

    Cost: a walk over the free memory, some milliseconds.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------- control groups
def _left_in_groups() -> list[int]:
    """Return what each control group that this process is in, and each one around it, has left; both versions."""
    left = []
    for folder, names in _group_folders():
        limit, used = _number(folder / names[0]), _number(folder / names[1])
        if limit is None or used is None or limit >= NO_LIMIT:
            continue
        cached = _statistic(folder / "memory.stat", names[2])
        left.append(limit - used + cached)
    return left


def _group_folders() -> list[tuple[Path, tuple[str, str, str]]]:
    """Return the folders of this process's groups, from its own to the outermost, with the names of their files."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path:
            continue
        if controllers == "":
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / path.lstrip("/")
        # In a container the path is often that of the host, and only the root is there.
        found += [(folder, names) for folder in (inner, *inner.parents) if folder == root or root in folder.parents]
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    try:
        found = re.search(rf"^{name} (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _kilobytes(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
