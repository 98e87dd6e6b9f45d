"""The small files of a checkpoint folder: settings, tokenizers, the index, templates.

Each is read whole, so there is a limit to its size: real tokenizers have up to 40 MB, all others less than 20 MB. What
is not a regular file is refused.
"""

from __future__ import annotations

import json
import os
from typing import Any

from kvrun.errors import ConvertError
from kvrun.files.regular import decoded, read_bytes

LIMIT = 1 << 26
TOKENIZER_LIMIT = 1 << 28
"""Bytes that a file may have, and that a tokenizer may."""
POINTER = b"version https://git-lfs.github.com/spec"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_DEPTH = 100
"""Lists and objects inside each other that JSON may have; the largest real number is below 20."""


def read_file(folder: str, name: str) -> bytes | None:
    """The content of a file of the folder; None if there is none. Raises ConvertError if it cannot be read."""
    path = os.path.join(folder, name)
    try:
        data = read_bytes(path, TOKENIZER_LIMIT if name in _TOKENIZERS else LIMIT)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConvertError(f"{path}: cannot read: {error.strerror or error}") from None
    refuse_pointer(path, data)
    return data


def refuse_pointer(path: str, start: bytes) -> None:
    """Raise ConvertError if a file begins like those that Git leaves in the place of large files."""
    if start.startswith(POINTER):
        raise ConvertError(f"{path}: a pointer of Git LFS instead of the file; fetch that with: git lfs pull")


def read_text(folder: str, name: str) -> str | None:
    """The same as text, in UTF-8 with or without a byte order mark."""
    data = read_file(folder, name)
    try:
        return None if data is None else decoded(data)
    except OSError as error:
        raise ConvertError(f"{os.path.join(folder, name)}: cannot read: {error.strerror}") from None


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The JSON object in a text, as Python's reader and so transformers takes it: NaN and infinities are numbers, of
    equal keys the last one counts. Raises ConvertError, which names `where`."""
    try:
        values = json.loads(text, parse_int=_integer)
        if not isinstance(values, dict):
            raise ConvertError(f"{where}: not a JSON object")
        if _is_deep(values):
            raise RecursionError
    except ValueError as error:
        raise ConvertError(f"{where}: not valid JSON: {error}") from None
    except RecursionError:
        raise ConvertError(f"{where}: not usable: JSON nested more than {_DEPTH} deep") from None
    return values


def _integer(digits: str) -> int:
    if len(digits) > 1000:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than what works on them may call itself."""
    level = [value]
    for _ in range(_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return False
    return True
