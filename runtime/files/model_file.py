"""The model file: a safetensors file with a fixed layout, read without copying (docs/format.md).

`read_model_file` checks every name, type, shape, offset and size against the model description and the
file's real length before anything is used. `kvrun.files.model_writer` writes such files.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np

from kvrun import _core
from kvrun.errors import ModelFileError, TokenizerError, one_line
from kvrun.files.description import ModelDescription, shortened, strict_json, text_json
from kvrun.files.regular import open_regular
from kvrun.options import SamplingKeywords, declared, saved_names

try:  # hashlib loads OpenSSL, which takes longer to start and more memory than a header's checksum is worth
    from _sha2 import sha256
except ImportError:
    try:
        from _sha256 import sha256  # before Python 3.12
    except ImportError:
        from hashlib import sha256

FORMAT = "kvrun"
VERSION = 1
ALIGNMENT = 64
MAX_HEADER = 100_000_000
TOKENIZER_KINDS = ("tokenizer.json", "tokenizer.model", "none")
SAMPLING_KEYS = tuple(saved_names("huggingface"))
_WHOLE = {name for name in SAMPLING_KEYS if declared(SamplingKeywords)[name].kind is int}
REQUIRED = (
    "format",
    "version",
    "model",
    "weights",
    "tokenizer",
    "stop_ids",
    "sampling",
    "source",
    "checksums",
    "header_checksum",
)
OPTIONAL = ("chat_template",)
MAX_TOKENS = 1 << 31
"""Ids of added tokens are below it."""
_CHUNK = 16 << 20
_SHRANK = "the file shrank while it was opened"
_MOST_NESTED = 16
_SHA256 = re.compile("[0-9a-f]{64}")

Progress = Callable[[int], None]
"""Called with the number of bytes processed since the last call."""


@dataclass(frozen=True)
class WeightTensor:
    """A packed matrix [rows, cols]; `data` is uint8 [n], read-only, 64-byte aligned, in the core's layout."""

    type: str
    rows: int
    cols: int
    data: np.ndarray


class Header(NamedTuple):
    """A parsed header with its length field: bytes, which are those before the data, and their SHA-256."""

    entries: dict[str, Any]
    nbytes: int
    fingerprint: str


class ModelFile:
    """An open model file. Its arrays are read-only views of the file's memory map, or of a copy of the file in memory,
    and keep it alive."""

    def __init__(
        self, path: str, memory: mmap.mmap | _core.MappedFile, header: Header, changed: tuple[int, int]
    ) -> None:
        meta = _Metadata(path, header.entries)
        self.path = path
        self.nbytes = len(memory)
        self.description: ModelDescription = meta.description
        self.weights: dict[str, WeightTensor] = {}
        self.vectors: dict[str, np.ndarray] = {}
        self.tokenizer_info: dict[str, Any] = meta.tokenizer
        self.stop_ids: list[int] = meta.stop_ids
        self.chat_template: str | None = meta.chat_template
        self.sampling: dict[str, float] = meta.sampling
        self.source: dict[str, Any] = meta.source
        self.fingerprint = header.fingerprint
        self._checksums = meta.checksums
        self._memory = memory
        self._changed = changed
        self._data_start = data_start = header.nbytes
        self._starts: dict[str, int] = {}
        self._spans: dict[str, memoryview] = {}
        buffer = memoryview(memory).toreadonly()
        for name, start, end in _checked_layout(path, meta, self.nbytes - data_start):
            self._starts[name] = data_start + start
            self._spans[name] = buffer[data_start + start : data_start + end]
            self._add(name, meta)

    def _add(self, name: str, meta: _Metadata) -> None:
        shape = meta.shapes.get(name)
        if shape is None:
            return
        if len(shape) == 1:
            self.vectors[name] = np.frombuffer(self._spans[name], dtype="<f4")
        else:
            data = np.frombuffer(self._spans[name], dtype=np.uint8)
            self.weights[name] = WeightTensor(meta.types[name], shape[0], shape[1], data)

    @property
    def tensor_nbytes(self) -> dict[str, int]:
        """Size in bytes of every stored tensor, the tokenizer included, in file order."""
        return {name: len(span) for name, span in self._spans.items()}

    def tokenizer_bytes(self) -> memoryview:
        """The tokenizer file as it was in the checkpoint; its name is `tokenizer_info["kind"]`. Raises
        TokenizerError if there is none."""
        kind = self.tokenizer_info["kind"]
        if kind == "none":
            raise TokenizerError(f"{self.path}: the model was converted without a tokenizer")
        return self._spans[kind]

    def prefault(self) -> None:
        """Load the whole file into memory now, so that the first tokens need not wait for it."""
        _core.touch(memoryview(self._memory).toreadonly())

    def verify(self, progress: Progress | None = None) -> None:
        """Read all data and compare checksums. Raises ModelFileError, which names the first tensor that is damaged."""
        import hashlib

        for name, span in self._spans.items():
            digest = hashlib.sha256()
            for start in range(0, len(span), _CHUNK):
                part = span[start : start + _CHUNK]
                digest.update(part)
                self._forget(self._starts[name] + start, len(part))
                if progress:
                    progress(len(part))
            if digest.hexdigest() != self._checksums[name]:
                raise ModelFileError(
                    f"{self.path}: tensor {name} is damaged (checksum differs): copy or convert it again"
                )

    def _forget(self, start: int, length: int) -> None:
        """Unmap pages that were only read once, so that the whole file does not count as memory in use."""
        if isinstance(self._memory, _core.MappedFile):
            self._memory.forget(start, length)

    def check_unchanged(self) -> None:
        """Raise ModelFileError if the mapped file is not what it was: if its length or its header has changed in place.

        That costs a microsecond. Another file that took its name does no harm: this one stays as it was.
        """
        if not isinstance(self._memory, _core.MappedFile):
            return
        fd = self._memory.fileno()
        now = _last_change(fd)
        if now == self._changed:
            return
        if now[0] != self.nbytes or sha256(os.pread(fd, self._data_start, 0)).hexdigest() != self.fingerprint:
            raise ModelFileError(f"{self.path}: the file was changed while it was in use: load it again")
        self._changed = now  # touched, or written anew with the same model


def read_model_file(path: str | os.PathLike[str], verify: bool = False, mapped: bool = True) -> ModelFile:
    """Map a model file (or without `mapped` read it into huge pages) and check its header, with `verify` all checksums.

    Raises ModelFileError if the file cannot be used, MemoryError if it is to be read into memory and does not fit.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb", opener=open_regular) as file:
            model = open_model(path, file, mapped)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the path
        raise ModelFileError(f"{path!r}: cannot read: {error}") from None
    if verify:
        model.verify()
    return model


def open_model(path: str, file: Any, mapped: bool = True) -> ModelFile:
    """The same of an open file, which messages call `path`. Raises OSError too."""
    size, _ = changed = _last_change(file.fileno())
    file.seek(0)
    header = _read_header(path, file, size)
    if mapped:
        return ModelFile(path, map_file(path, file.fileno(), size), header, changed)
    memory = _core.anonymous(size)
    _core.advise_huge(memory)
    file.seek(0)
    if file.readinto(memory) < size:
        raise ModelFileError(f"{path}: {_SHRANK}")
    return ModelFile(path, memory, header, changed)


def map_file(path: str, fd: int, size: int) -> _core.MappedFile:
    """An open file, mapped. If it then loses a page that is needed, the process ends with a line that says so."""
    line = f"kvrun: {one_line(path)}: the file was truncated while it was in use, or can no longer be read\n"
    try:
        return _core.MappedFile(fd, size, line.encode("utf-8", "replace"))
    except ValueError:
        raise ModelFileError(f"{path}: {_SHRANK}") from None


def _last_change(fd: int) -> tuple[int, int]:
    """(size in bytes, nanoseconds) of an open file's last change."""
    info = os.fstat(fd)
    return info.st_size, info.st_mtime_ns


def _read_header(path: str, file: Any, size: int) -> Header:
    """The header of a file of `size` bytes, parsed."""
    start = file.read(16)
    if start[:4] == b"GGUF":
        raise ModelFileError(f"{path}: a GGUF file; convert it first: kvrun convert {path} -o MODEL")
    length = int.from_bytes(start[:8], "little")
    if size < 10 or not 2 <= length <= MAX_HEADER or start[8:9] != b"{":
        raise ModelFileError(f"{path}: not a kvrun model file")
    if 8 + length > size:
        raise ModelFileError(f"{path}: truncated: the header has {length} bytes, the file {size}")
    text = start[8 : 8 + length] + file.read(max(0, length - 8))
    try:
        header = strict_json(text.decode("utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{path}: damaged header: {error}") from None
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: not a kvrun model file")
    meta = header.get("__metadata__")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ModelFileError(
            f"{path}: a safetensors file, but not a kvrun model; kvrun convert makes one from a checkpoint folder"
        )
    if (8 + length) % ALIGNMENT:
        raise ModelFileError(f"{path}: damaged header: data does not start on a {ALIGNMENT}-byte boundary")
    return Header(header, 8 + length, sha256(start[:8] + text).hexdigest())


class _Metadata:
    """The checked contents of a header: of `__metadata__`, and `entries`, all its others, in the order of the data.

    A header may announce any number of tensors; work and memory follow what it has, never what it announces.
    """

    def __init__(self, path: str, header: dict[str, Any]) -> None:
        self._path = path
        meta = header["__metadata__"]
        self.entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self._check_strings(meta)
        self._meta: dict[str, str] = meta
        if header_checksum(meta) != meta["header_checksum"]:
            raise ModelFileError(f"{path}: damaged header (checksum differs); copy or convert the file again")
        try:
            self.description = ModelDescription.from_json(meta["model"])
        except ModelFileError as error:
            raise ModelFileError(f"{path}: {error}") from None
        self.tokenizer = self._tokenizer()
        self.shapes = self._shapes(next(iter(header)))
        self.types = self._weight_types()
        self.stop_ids = self._stop_ids()
        self.chat_template = meta.get("chat_template")
        self.sampling = self._sampling()
        self.source = self._source()
        self.checksums = self._checksums()

    def _fail(self, field: str, reason: str) -> NoReturn:
        raise ModelFileError(f"{self._path}: metadata field {field}: {reason}")

    def _check_strings(self, meta: dict[str, Any]) -> None:
        version = meta.get("version")
        if not isinstance(version, str) or not version.isascii() or not version.isdigit() or len(version) > 9:
            self._fail("version", "missing or not a number")
        if int(version) > VERSION:
            raise ModelFileError(
                f"{self._path}: format version {version} is newer than this kvrun reads ({VERSION}); upgrade kvrun"
            )
        if int(version) != VERSION:
            self._fail("version", f"{version} was never published")
        for name in REQUIRED:
            if name not in meta:
                self._fail(name, "missing")
        for name, value in meta.items():
            if name not in REQUIRED and name not in OPTIONAL:
                self._fail(shortened(name), "unknown")
            if not isinstance(value, str):
                self._fail(name, "not a string")
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:  # the escapes of JSON can make what UTF-8 cannot encode
                self._fail(name, "not valid text")

    def _json(self, field: str) -> Any:
        try:
            return text_json(self._meta[field])
        except ValueError as error:
            self._fail(field, f"not valid JSON ({error})")

    def _object(self, field: str) -> dict[str, Any]:
        value = self._json(field)
        if not isinstance(value, dict):
            self._fail(field, "not a JSON object")
        return value

    def _shapes(self, first: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the description's tensors, each held against the header's entry at its place."""
        if first != "__metadata__":
            raise ModelFileError(f"{self._path}: damaged header: __metadata__ is not the first entry")
        kind, shapes, found = self.tokenizer["kind"], {}, iter(self.entries)
        for name, shape in self.description.tensors():
            self._check_place(name, next(found, None))
            shapes[name] = shape
        if kind != "none":
            self._check_place(kind, next(found, None))
        self._check_place(None, next(found, None))
        return shapes

    def _check_place(self, expected: str | None, found: str | None) -> None:
        if found == expected:
            return
        if expected is not None and expected not in self.entries:
            raise ModelFileError(f"{self._path}: tensor {expected} is missing")
        where = "at the end" if expected is None else f"where {expected} should be"
        raise ModelFileError(
            f"{self._path}: tensor {shortened(found)} is {where}: out of order, or not part of this model"
        )

    def _weight_types(self) -> dict[str, str]:
        entries = self._object("weights")
        matrices = {name: shape for name, shape in self.shapes.items() if len(shape) == 2}
        for name in entries:
            if name not in matrices:
                self._fail("weights", f"{shortened(name)} is not a matrix of this model")
        types = {}
        for name, shape in matrices.items():
            entry = entries.get(name)
            if not isinstance(entry, dict) or set(entry) != {"type", "shape"}:
                self._fail("weights", f"{name} is missing or has other fields than type and shape")
            if not _is_shape(entry["shape"], shape):
                self._fail("weights", f"{name} has shape {shortened(entry['shape'])}, not {list(shape)}")
            if not isinstance(entry["type"], str) or entry["type"] not in _core.WEIGHT_TYPES:
                self._fail("weights", f"{name} has the unknown type {shortened(entry['type'])}")
            if shape[1] % _core.column_multiple(entry["type"]):
                self._fail("weights", f"{name} has {shape[1]} columns, which is impossible for {entry['type']}")
            types[name] = entry["type"]
        return types

    def _tokenizer(self) -> dict[str, Any]:
        info = self._object("tokenizer")
        checks = self._tokenizer_fields()
        for key in info:
            if key not in checks:
                self._fail("tokenizer", f"{shortened(key)}: unknown field; the file may need a newer kvrun")
        for key, (check, what, optional) in checks.items():
            if key in info and not check(info[key]):
                self._fail("tokenizer", f"{key} is not {what}")
            if key not in info and not optional:
                self._fail("tokenizer", f"{key} is missing")
        return info

    def _tokenizer_fields(self) -> dict[str, tuple[Callable[[Any], bool], str, bool]]:
        """{field: (what its value must pass, the same in words, whether it may be absent)}"""
        flag = (lambda value: isinstance(value, bool), "true or false")
        token = (lambda value: value is None or self._is_token(value), "null or a token of the vocabulary")
        ids = (lambda value: isinstance(value, list) and all(map(_is_id, value)), "a list of token ids")
        table = (
            lambda value: isinstance(value, dict) and all(map(_is_id, value.values())),
            "a table of texts and token ids",
        )
        return {
            "kind": (lambda value: value in TOKENIZER_KINDS, f"one of {', '.join(TOKENIZER_KINDS)}", False),
            **dict.fromkeys(("add_bos", "add_eos"), (*flag, False)),
            **dict.fromkeys(("bos_id", "eos_id", "pad_id", "unk_id"), (*token, False)),
            "added_tokens": (*table, True),
            **dict.fromkeys(("legacy", "space_is_dummy"), (*flag, True)),
            **dict.fromkeys(("visible", "lstrip", "rstrip", "single_word"), (*ids, True)),
        }

    def _stop_ids(self) -> list[int]:
        ids = self._json("stop_ids")
        if not isinstance(ids, list) or not all(self._is_token(i) for i in ids):
            self._fail("stop_ids", "not a list of tokens of the vocabulary")
        return ids

    def _is_token(self, value: Any) -> bool:
        return type(value) is int and 0 <= value < self.description.vocab_size

    def _sampling(self) -> dict[str, float]:
        values = self._object("sampling")
        for key, value in values.items():
            if key not in SAMPLING_KEYS or type(value) not in (int, float) or not 0 <= value < 1e9:
                self._fail("sampling", f"{shortened(key)} is unknown or not a number of 0 or more")
            if key in _WHOLE and value != int(value):
                self._fail("sampling", f"{key} = {value} is not a whole number")
        return values

    def _source(self) -> dict[str, Any]:
        value = self._object("source")
        if not _is_shallow(value, _MOST_NESTED):
            self._fail("source", "nested too deeply")
        return value

    def _checksums(self) -> dict[str, str]:
        values = self._object("checksums")
        for name in self.entries:
            if name not in values:
                self._fail("checksums", f"{name} is missing")
            if not isinstance(values[name], str) or not _SHA256.fullmatch(values[name]):
                self._fail("checksums", f"{name} has {shortened(values[name])}, which is no SHA-256")
        if len(values) > len(self.entries):
            extra = next(name for name in values if name not in self.entries)
            self._fail("checksums", f"{shortened(extra)} is not a tensor of this model")
        return values


def _is_shallow(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in at most so many levels."""
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_TOKENS


def _is_shape(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, list) and value == list(shape) and all(type(n) is int for n in value)


def header_checksum(meta: Mapping[str, str]) -> str:
    """SHA-256 over key, NUL, value, NUL of all metadata except `header_checksum`, in the order of the keys."""
    digest = sha256()
    for key in sorted(meta):
        if key != "header_checksum":
            digest.update(f"{key}\0{meta[key]}\0".encode("utf-8", "surrogatepass"))
    checksum: str = digest.hexdigest()
    return checksum


def tensor_sizes(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> dict[str, int]:
    """Bytes of every tensor in file order, without the tokenizer."""
    return {
        name: 4 * shape[0] if len(shape) == 1 else _core.packed_size(types[name], shape[0], shape[1])
        for name, shape in shapes.items()
    }


def _checked_layout(path: str, meta: _Metadata, available: int) -> Iterable[tuple[str, int, int]]:
    """Yield (name, start, end) in file order. The description leaves the file no choice of layout."""
    position, sizes = 0, tensor_sizes(meta.shapes, meta.types)
    for name, entry in meta.entries.items():
        end = _checked_entry(path, name, entry, position, sizes.get(name), len(meta.shapes.get(name, ())) == 1)
        if end > available:
            raise ModelFileError(f"{path}: truncated: tensor {name} ends at data byte {shortened(end)} of {available}")
        yield name, position, end
        position = end
    if position != available:
        raise ModelFileError(f"{path}: {available - position} bytes too many after the last tensor")


def _checked_entry(path: str, name: str, entry: Any, start: int, size: int | None, vector: bool) -> int:
    """Check the header's entry of one tensor, which must start at `start` and have `size` bytes. Returns its end."""
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError(f"{where}: its header entry does not have exactly dtype, shape and data_offsets")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise ModelFileError(f"{where}: data_offsets are not two integers")
    if offsets[0] != start:
        raise ModelFileError(f"{where}: starts at data byte {shortened(offsets[0])}, not at {start}")
    nbytes = offsets[1] - offsets[0]
    if nbytes < 1 or size not in (None, nbytes):
        raise ModelFileError(f"{where}: has {shortened(nbytes)} bytes, not {size or 'one or more'}")
    dtype, shape = ("F32", (nbytes // 4,)) if vector else ("U8", (nbytes,))
    if entry["dtype"] != dtype or not _is_shape(entry["shape"], shape):
        raise ModelFileError(f"{where}: is not {dtype} {list(shape)}")
    return int(offsets[1])
