"""A checkpoint on disk, of either form, opened."""

from __future__ import annotations

import os
import re

from kvrun.convert.checkpoint import Checkpoint
from kvrun.errors import ConvertError


def open_checkpoint(path: str, tokenizer: bool = True) -> Checkpoint:
    """Read everything but the tensors' data. `path` is a Hugging Face folder or a GGUF file."""
    if not os.path.exists(path):
        hint = "; download the checkpoint first and give its folder" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else ""
        raise ConvertError(f"{path}: no such file or folder{hint}")
    if os.path.isdir(path):
        from kvrun.convert.huggingface import open_folder

        return open_folder(path, tokenizer)
    magic = b""
    try:
        if os.path.isfile(path):  # opening a named pipe would block forever
            with open(path, "rb") as file:
                magic = file.read(4)
    except OSError as error:
        raise ConvertError(f"{path}: cannot read: {error.strerror}") from None
    if magic != b"GGUF":
        raise ConvertError(
            f"{path}: neither a GGUF file nor a folder; for a Hugging Face checkpoint give the "
            "folder with its config.json"
        )
    from kvrun.convert.gguf_source import open_gguf

    return open_gguf(path, tokenizer)
