"""A checkpoint on disk, of either form, opened."""

from __future__ import annotations

import os
import re

from kvrun.convert.checkpoint import Checkpoint
from kvrun.convert.small_files import POINTER, refuse_pointer
from kvrun.errors import ConvertError
from kvrun.files.regular import open_regular

_BEFORE_GGUF = (b"lmgg", b"fmgg", b"tjgg", b"algg")
"""What files of llama.cpp's older formats begin with: ggml, ggmf, ggjt, ggla."""


def open_checkpoint(path: str, tokenizer: bool = True) -> Checkpoint:
    """Read everything but the tensors' data. `path` is a Hugging Face folder or a GGUF file."""
    if os.path.isdir(path):
        from kvrun.convert.huggingface import open_folder

        return open_folder(path, tokenizer)
    start = _first_bytes(path)
    refuse_pointer(path, start)
    magic = start[:4]
    if magic != b"GGUF":
        if magic in _BEFORE_GGUF:
            raise ConvertError(f"{path}: a GGML file of the time before GGUF (2023); get the model as a GGUF file")
        found = "neither a GGUF file nor a folder" if magic else "an empty file"
        raise ConvertError(f"{path}: {found}; for a Hugging Face checkpoint give the folder with its config.json")
    from kvrun.convert.gguf_source import open_gguf

    return open_gguf(path, tokenizer)


def _first_bytes(path: str) -> bytes:
    try:
        with open(path, "rb", opener=open_regular) as file:
            return file.read(len(POINTER))
    except FileNotFoundError:
        hint = "; download the checkpoint first and give its folder" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else ""
        raise ConvertError(f"{path}: no such file or folder{hint}") from None
    except OSError as error:
        raise ConvertError(f"{path}: cannot read: {error.strerror}") from None
    except ValueError:
        raise ConvertError(f"{path!r}: no file has a NUL character in its name") from None
