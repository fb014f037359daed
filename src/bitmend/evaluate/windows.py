"""A text as token windows that do not overlap: what language models are scored on.

The whole file is one stream of tokens. No special token is added, except that a tokenizer which begins every text with
its beginning-of-text token puts one at the start of the stream (not of each window).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from bitmend.calibrate.sources import decode_utf8, encode, without_cut_character
from bitmend.errors import RequestError

WHOLE_TEXT_BYTES = 16 * 2**20
BYTES_PER_TOKEN = 32


@dataclass(frozen=True)
class TokenWindows:
    """The first windows of one text.

    Attributes:
        file: the text, as the user named it.
        ids: token numbers.
    """

    file: str
    ids: Int64[Tensor, "window token"]

    @property
    def sha256(self) -> str:
        """SHA-256 over the window length and the token numbers."""
        raw = self.ids.contiguous().numpy().astype("<i8", copy=False).tobytes()
        return hashlib.sha256(self.ids.shape[1].to_bytes(8, "little") + raw).hexdigest()

    def batches(self, batch_size: int) -> Iterator[slice]:
        """Yield slices of at most `batch_size` windows."""
        for start in range(0, len(self.ids), batch_size):
            yield slice(start, min(start + batch_size, len(self.ids)))


def read_windows(path: Path, tokenizer: Any, *, windows: int | None, window_length: int) -> TokenWindows:
    """Tokenise a UTF-8 text once and return its first `windows` windows (None: all), or all when it has fewer.

    When a number of windows is asked of a file above 16 MiB, only its first max(16 MiB, 32 bytes a wanted token) up to
    a line end are tokenised, unless they turn out to hold too few tokens.

    Args:
        path: the text.
        tokenizer: a transformers tokenizer.
        windows: how many, at least 1.
        window_length: tokens in a window, at least 2, so that there is something to predict.

    Raises:
        RequestError: no such file, not UTF-8, or less than one window of text.
    """
    if (windows is not None and windows < 1) or window_length < 2:
        raise RequestError(
            f"evaluation windows: at least 1 window of at least 2 tokens is required, but {windows} of {window_length} "
            "came; raise --windows or --window-length"
        )
    if not path.is_file():
        raise RequestError(f"{path}: a text file is required, but there is none; check the path")
    limit = None if windows is None else max(WHOLE_TEXT_BYTES, BYTES_PER_TOKEN * windows * window_length)
    if limit is not None and path.stat().st_size <= limit:
        limit = None
    stream = _token_stream(path, tokenizer, limit)
    if limit is not None and windows is not None and len(stream) < windows * window_length:
        stream = _token_stream(path, tokenizer, None)
    available = len(stream) // window_length
    if available == 0:
        raise RequestError(
            f"{path}: at least one window of {window_length} tokens is required, but the text has {len(stream)}; "
            "give a longer text or a smaller --window-length"
        )
    count = available if windows is None else min(windows, available)
    ids = torch.from_numpy(stream[: count * window_length]).reshape(count, window_length)
    return TokenWindows(str(path), ids)


def _token_stream(path: Path, tokenizer: Any, limit: int | None) -> np.ndarray:
    with path.open("rb") as file:
        raw = file.read() if limit is None else file.read(limit)
    if limit is not None:
        raw = raw[: raw.rfind(b"\n") + 1] or without_cut_character(raw)
    ids = encode(tokenizer, decode_utf8(raw, str(path)))
    begin = tokenizer.bos_token_id
    # Asked with a letter: some tokenizers return nothing at all for an empty text. The letter itself may be unknown,
    # and the token for that may be the beginning of text, hence the comparison of lengths.
    probe = tokenizer("a")["input_ids"]
    if begin is not None and probe[0] == begin and len(probe) > len(encode(tokenizer, "a")):
        ids = np.concatenate([np.array([begin], dtype=np.int64), ids])
    return ids
