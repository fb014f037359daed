"""Which model a folder holds, as one digest: two folders with the same one hold the same weights and the same config."""

import hashlib
from pathlib import Path

HASHED_WHOLE_BYTES = 2 * 10**9
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def model_fingerprint(folder: Path) -> str:
    """Return a SHA-256 over the config and the weight files of a model folder.

    Up to 2 GB of weights are read whole. Of more, only the first mebibyte of each file (with the header, hence names
    and shapes), its size and its time of change count.

    Cost: about a second a gigabyte.
    """
    # Regular files only: a pipe would be waited for, a link to a device be read for ever.
    files = sorted(path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern) if path.is_file())
    whole = sum(path.stat().st_size for path in files) < HASHED_WHOLE_BYTES
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            if whole:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                status = path.stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
                digest.update(file.read(2**20))
    return digest.hexdigest()
