"""The tokenizer of a model folder."""

from pathlib import Path
from typing import Any

import transformers

from bitmend.errors import ModelError
from bitmend.models.bounds import refuse_special_files


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder.

    Raises:
        ModelError: there is none, or it cannot be read.
        CheckpointError: something in the folder is no file.
    """
    refuse_special_files(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer("")  # some settings, such as the longest text, are looked at only then
    except Exception as error:  # tokenizer classes raise whatever they like
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{folder}: a tokenizer is required to read text, but it could not be loaded ({reason}); copy the tokenizer "
            "files of the original model into the folder"
        ) from error
    return tokenizer
