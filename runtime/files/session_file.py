"""The session file: a safetensors file with the state of a cache and of the text in it (docs/format.md).

It can only be used with the model it was saved with, which it names by its fingerprint. Everything in it is checked
when it is read, also against checksums: with a damaged cache a model would not fail but answer nonsense.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np

from kvrun import _core
from kvrun.errors import KvrunError, ModelFileError
from kvrun.files.description import shortened, strict_json
from kvrun.files.model_file import MAX_HEADER, header_checksum
from kvrun.files.model_writer import dumps, header_bytes
from kvrun.files.regular import open_regular
from kvrun.files.safe_file import SafeFile
from kvrun.options import MAX_CTX, CacheOptions
from kvrun.text.templates import check_messages

FORMAT = "kvrun-session"
_FIELDS = ("format", "version", "model", "cache", "conversation", "checksums", "header_checksum")
_VERSIONS = {"1": _FIELDS, "2": (*_FIELDS, "history")}
_DTYPES = {"kv": "U8", "tokens": "I32", "logits": "F32"}
_NUMPY: dict[str, np.dtype[Any]] = {"U8": np.dtype("<u1"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4")}


@dataclass(frozen=True)
class SavedHistory:
    """How a text came about. `written`: [start, end) of the tokens that were written one by one, all others having been
    read. `story`: the conversation in it, rendered, to the end of its last answer. `answers`: (tokens, characters) of
    text and story to the end of each.
    """

    written: tuple[tuple[int, int], ...]
    story: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SavedSession:
    """What a session file holds.

    `model`: the model file's fingerprint. `n_tokens`, `lost`, `kv`: the cache, as `KVCache.load_state` takes
    it. `pending`: tokens that follow and are not in the cache. `recent`: the last ones, for the repeat
    penalty. `tokens`: int32, all of the text, or None if some were evicted. `logits`: float32 [vocab] or
    None. `text`: the rendered conversation, None if the text is not a conversation. `history`: None if it is not
    known, or if nothing but a single pending token was written and no answer ends before the text does.
    """

    model: str
    cache: CacheOptions
    n_tokens: int
    lost: int
    kv: np.ndarray
    pending: list[int]
    recent: list[int]
    tokens: np.ndarray | None
    logits: np.ndarray | None
    messages: list[dict[str, Any]]
    text: str | None
    history: SavedHistory | None = None


# --- writing --------------------------------------------------------------------------------------


def write_session_file(path: str | os.PathLike[str], saved: SavedSession) -> None:
    """Write the file whole or not at all (`SafeFile`): the owner's alone, unless it replaces one that others may read.
    Raises ModelFileError if it cannot be written."""
    tensors = {"kv": saved.kv, "tokens": saved.tokens, "logits": saved.logits}
    arrays = {
        name: np.ascontiguousarray(value, _NUMPY[_DTYPES[name]]) for name, value in tensors.items() if value is not None
    }
    metadata = {
        "format": FORMAT,
        "version": "1" if saved.history is None else "2",
        "model": saved.model,
        "cache": dumps({**asdict(saved.cache), "n_tokens": saved.n_tokens, "lost": saved.lost}),
        "conversation": _conversation(saved),
        "checksums": dumps({name: hashlib.sha256(array.data).hexdigest() for name, array in arrays.items()}),
    }
    if saved.history is not None:
        metadata["history"] = _history(saved.history, saved.text)
    metadata["header_checksum"] = header_checksum(metadata)
    sizes = {name: len(array) for name, array in arrays.items()}
    header = header_bytes(os.fspath(path), {"__metadata__": metadata, **_entries(sizes)})
    with SafeFile(path, len(header) + sum(array.nbytes for array in arrays.values()), private=True) as file:
        file.put(header)
        for array in arrays.values():
            file.put(array)
        file.commit()


def _conversation(saved: SavedSession) -> str:
    value = {name: getattr(saved, name) for name in ("messages", "text", "pending", "recent")}
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: any text can be in it
    except (TypeError, ValueError, RecursionError) as error:
        raise KvrunError(f"the session cannot be saved: its messages are not JSON: {error}") from None


def _history(history: SavedHistory, text: str | None) -> str:
    value = {**asdict(history), "story": None if history.story == text else history.story}
    return json.dumps(value, separators=(",", ":"))


def _entries(sizes: Mapping[str, int]) -> dict[str, Any]:
    """The header's entries for tensors with these numbers of elements, one after the other."""
    entries, position = {}, 0
    for name, size in sizes.items():
        end = position + size * _NUMPY[_DTYPES[name]].itemsize
        entries[name] = {"dtype": _DTYPES[name], "shape": [size], "data_offsets": [position, end]}
        position = end
    return entries


# --- reading --------------------------------------------------------------------------------------


def read_session_file(path: str | os.PathLike[str], model: str, vocab_size: int) -> SavedSession:
    """Read and check a session file of the model with this fingerprint. Raises ModelFileError if it cannot be used."""
    path = os.fspath(path)
    try:
        with open(path, "rb", opener=open_regular) as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).read(model, vocab_size)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the path
        raise ModelFileError(f"{path!r}: cannot read: {error}") from None
    except MemoryError:
        raise ModelFileError(f"{path}: not enough memory to read this session") from None


class _Reader:
    def __init__(self, path: str, file: Any, size: int) -> None:
        self._path, self._file, self._size = path, file, size

    def read(self, model: str, vocab_size: int) -> SavedSession:
        header, start = self._header()
        meta = header["__metadata__"]
        if meta["model"] != model:
            raise ModelFileError(
                f"{self._path}: saved with another model; a session can only continue with the model file it began with"
            )
        self._vocab_size = vocab_size
        cache = self._object(meta, "cache", ("k", "v", "ctx", "sinks", "window", "n_tokens", "lost"))
        n_tokens, lost = self._count(cache, "n_tokens"), self._count(cache, "lost")
        talk = self._object(meta, "conversation", ("messages", "text", "pending", "recent"))
        pending, recent = self._tokens(talk, "pending"), self._tokens(talk, "recent")
        entries = {name: value for name, value in header.items() if name != "__metadata__"}
        sizes = self._sizes(entries, n_tokens + len(pending), self._size - start)
        arrays = self._arrays(sizes, self._object(meta, "checksums", tuple(sizes)))
        tokens = arrays.get("tokens")
        if tokens is not None and len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            self._damaged("tokens outside the vocabulary")
        text = self._text(talk["text"])
        return SavedSession(
            model,
            self._cache(cache),
            n_tokens,
            lost,
            arrays["kv"],
            pending,
            recent,
            tokens,
            arrays.get("logits"),
            self._messages(talk["messages"]),
            text,
            self._history(meta, text, tokens),
        )

    def _damaged(self, what: str) -> NoReturn:
        raise ModelFileError(f"{self._path}: damaged session file: {what}")

    def _header(self) -> tuple[dict[str, Any], int]:
        """The header, checked as far as possible without the model, and the offset at which the data starts."""
        start = self._file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= MAX_HEADER:
            raise ModelFileError(f"{self._path}: not a kvrun session file")
        if 8 + length > self._size:
            raise ModelFileError(
                f"{self._path}: truncated, or not a kvrun session file: the header has {length} bytes, "
                f"the file {self._size}"
            )
        text = self._file.read(length)
        try:
            header = strict_json(text.decode("utf-8"))
        except ValueError as error:
            raise ModelFileError(f"{self._path}: damaged, or not a kvrun session file: {error}") from None
        self._check_metadata(header.get("__metadata__") if isinstance(header, dict) else None)
        try:
            same = header_bytes(self._path, header) == start + text
        except (UnicodeEncodeError, RecursionError):
            same = False
        if not same:
            self._damaged("the header is not as it was written")
        return header, 8 + length

    def _check_metadata(self, meta: Any) -> None:
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise ModelFileError(f"{self._path}: not a kvrun session file")
        version = meta.get("version")
        if not isinstance(version, str) or version not in _VERSIONS:
            raise ModelFileError(
                f"{self._path}: session format version {shortened(version)}; this kvrun reads versions "
                f"{' and '.join(_VERSIONS)}"
            )
        if set(meta) != set(_VERSIONS[version]) or not all(isinstance(value, str) for value in meta.values()):
            self._damaged("its metadata fields are not those of a session")
        if header_checksum(meta) != meta["header_checksum"]:
            self._damaged("the header's checksum differs")

    def _object(self, meta: dict[str, str], field: str, keys: tuple[str, ...]) -> dict[str, Any]:
        try:
            value = strict_json(meta[field])
        except ValueError as error:
            self._damaged(f"metadata field {field}: {error}")
        if not isinstance(value, dict) or set(value) != set(keys):
            self._damaged(f"metadata field {field} does not have the entries {', '.join(keys)}")
        return value

    def _count(self, values: dict[str, Any], name: str, limit: int = 1 << 60) -> int:
        value = values[name]
        if type(value) is not int or not 0 <= value < limit:
            self._damaged(f"metadata field cache: {name} = {shortened(value)} is not a number of tokens")
        return value

    def _cache(self, values: dict[str, Any]) -> CacheOptions:
        for name in ("k", "v"):
            if not isinstance(values[name], str) or values[name] not in _core.KV_FORMATS:
                self._damaged(f"metadata field cache: {name} = {shortened(values[name])} is no format of a cache")
        return CacheOptions(
            values["k"], values["v"], *(self._count(values, name, MAX_CTX + 1) for name in ("ctx", "sinks", "window"))
        )

    def _tokens(self, values: dict[str, Any], name: str) -> list[int]:
        value = values[name]
        if not isinstance(value, list) or not all(
            type(token) is int and 0 <= token < self._vocab_size for token in value
        ):
            self._damaged(f"metadata field conversation: {name} is not a list of tokens of the vocabulary")
        return value

    def _messages(self, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            self._damaged("metadata field conversation: messages is not a list")
        try:
            return check_messages(value)
        except KvrunError as error:
            self._damaged(f"metadata field conversation: messages: {error}")

    def _text(self, value: Any) -> str | None:
        if value is not None and not isinstance(value, str):
            self._damaged("metadata field conversation: text is not a text")
        return value

    def _history(self, meta: dict[str, str], text: str | None, tokens: np.ndarray | None) -> SavedHistory | None:
        if "history" not in meta:
            return None
        if tokens is None:
            self._damaged("metadata field history: the file does not have the tokens that it is about")
        value = self._object(meta, "history", ("written", "story", "answers"))
        story = text if value["story"] is None else value["story"]
        if not isinstance(story, str | None):
            self._damaged("metadata field history: story is not a text")
        written = self._pairs(value, "written")
        places = [place for run in written for place in run]
        if any(a >= b for a, b in pairwise(places)) or places[-1:] > [len(tokens)]:
            self._damaged(f"metadata field history: written is not runs of the {len(tokens)} tokens, in their order")
        story, answers = story or "", self._pairs(value, "answers")
        if any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise((*answers, (len(tokens) + 1, len(story))))):
            self._damaged(
                f"metadata field history: answers are not places in {len(tokens)} tokens and {len(story)} characters, "
                "in their order"
            )
        return SavedHistory(written, story, answers)

    def _pairs(self, values: dict[str, Any], name: str) -> tuple[tuple[int, int], ...]:
        value = values[name]
        if not isinstance(value, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair) for pair in value
        ):
            self._damaged(f"metadata field history: {name} is not a list of pairs of numbers")
        return tuple((first, second) for first, second in value)

    def _sizes(self, entries: dict[str, Any], n_tokens: int, available: int) -> dict[str, int]:
        """The number of elements of every tensor, in file order. The header determines all of them but that of kv."""
        sizes = {"kv": 0, "tokens": n_tokens, "logits": self._vocab_size}
        sizes = {name: size for name, size in sizes.items() if name == "kv" or name in entries}
        try:
            sizes["kv"] = entries["kv"]["data_offsets"][1]
            expected = _entries(sizes)
        except (KeyError, TypeError, IndexError):
            expected = None
        if entries != expected or type(sizes["kv"]) is not int or sizes["kv"] < 0:
            self._damaged("its tensors are not those of this session")
        needed = max(entry["data_offsets"][1] for entry in entries.values())
        if needed != available:
            what = "truncated" if needed > available else "damaged session file"
            raise ModelFileError(f"{self._path}: {what}: {needed} bytes of data belong to it, not {available}")
        return sizes

    def _arrays(self, sizes: dict[str, int], checksums: dict[str, Any]) -> dict[str, np.ndarray]:
        arrays = {}
        for name, size in sizes.items():
            array = arrays[name] = np.empty(size, _NUMPY[_DTYPES[name]])
            if size and self._file.readinto(array.data.cast("B")) != array.nbytes:
                raise ModelFileError(f"{self._path}: truncated while it was read")
            if hashlib.sha256(array.data).hexdigest() != checksums[name]:
                self._damaged(f"tensor {name}: the checksum differs")
        return arrays
