"""Writing of model files: streamed to a file without a name, read back, then named."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from kvrun.errors import ModelFileError
from kvrun.files.description import ModelDescription
from kvrun.files.model_file import (
    ALIGNMENT,
    FORMAT,
    MAX_HEADER,
    VERSION,
    ModelFile,
    Progress,
    header_checksum,
    open_model,
    tensor_sizes,
)
from kvrun.files.safe_file import SafeFile


class ModelFileWriter(SafeFile):
    """Writes a model file, streaming; a context manager.

        with ModelFileWriter(path, description, types, tokenizer_info=info, tokenizer=data, ...) as writer:
            for name in description.tensor_shapes():
                writer.write(name, chunks)
            model = writer.finish()

    `types` gives the weight type of every matrix. Every tensor is written once, in any order. `finish`
    flushes to disk, reads the file back against its checksums and only then gives it its name. Leaving the
    block without `finish` leaves nothing. Raises ModelFileError if the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        description: ModelDescription,
        types: Mapping[str, str],
        *,
        tokenizer_info: Mapping[str, Any],
        tokenizer: bytes | None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        sampling: Mapping[str, float] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self._shapes = description.tensor_shapes()
        self._types = dict(types)
        self._sizes = tensor_sizes(self._shapes, types)
        self._metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "model": description.to_json(),
            "weights": self._weights_json(),
            "tokenizer": dumps(dict(tokenizer_info)),
            "stop_ids": dumps(sorted(set(stop_ids))),
            "sampling": dumps(dict(sampling or {})),
            "source": dumps(dict(source or {})),
        }
        if chat_template is not None:
            self._metadata["chat_template"] = chat_template
        if tokenizer is not None:
            self._sizes[tokenizer_info["kind"]] = len(tokenizer)
        self._checksums: dict[str, str] = {}
        header = self._header()
        *starts, self.nbytes = itertools.accumulate(self._sizes.values(), initial=len(header))
        self._starts = dict(zip(self._sizes, starts, strict=True))
        self._tokenizer = tokenizer
        self._tokenizer_name = tokenizer_info["kind"]
        super().__init__(self.path, self.nbytes)

    def _begin(self) -> None:
        self.put(self._header())
        if self._tokenizer is not None:
            self.write(self._tokenizer_name, [self._tokenizer])

    def write(self, name: str, chunks: Iterable[Any]) -> None:
        """Write one tensor: its bytes in order, in any number of buffers (packed uint8, or float32)."""
        size, digest, written = self._sizes[name], hashlib.sha256(), 0
        if name in self._checksums:
            raise ValueError(f"tensor {name} is written twice")
        with self._reported():
            self._open.seek(self._starts[name])
        for chunk in chunks:
            part = memoryview(chunk).cast("B")
            written += len(part)
            if written > size:
                break
            digest.update(part)
            self.put(part)
        if written != size:
            raise ValueError(f"tensor {name} has {size} bytes, not {written}")
        self._checksums[name] = digest.hexdigest()

    def finish(self, progress: Progress | None = None) -> ModelFile:
        """Complete the file, check it, and move it to its final name. Returns it, open."""
        missing = [name for name in self._sizes if name not in self._checksums]
        if missing:
            raise ValueError(f"tensor {missing[0]} was not written")
        self.put(self._header(), at=0)
        self._to_disk()
        model = open_model(self.path, self._open)
        model.verify(progress)
        self._name()
        return model

    def _weights_json(self) -> str:
        matrices = {name: shape for name, shape in self._shapes.items() if len(shape) == 2}
        return dumps({name: {"type": self._types[name], "shape": list(shape)} for name, shape in matrices.items()})

    def _header(self) -> bytes:
        """The header. It is equally long with and without checksums, since a checksum has a fixed length."""
        checksums = {name: self._checksums.get(name, "0" * 64) for name in self._sizes}
        metadata = {**self._metadata, "checksums": dumps(checksums)}
        metadata["header_checksum"] = header_checksum(metadata)
        entries: dict[str, Any] = {"__metadata__": metadata}
        position = 0
        for name, size in self._sizes.items():
            vector = len(self._shapes.get(name, ())) == 1
            entries[name] = {
                "dtype": "F32" if vector else "U8",
                "shape": [size // 4 if vector else size],
                "data_offsets": [position, position + size],
            }
            position += size
        try:
            return header_bytes(self.path, entries)
        except UnicodeEncodeError:
            raise ModelFileError(f"{self.path}: the model's name or chat template is not valid text") from None


def header_bytes(path: str, entries: Mapping[str, Any]) -> bytes:
    """A safetensors header with its length field, padded so that the data starts on a 64-byte boundary."""
    text = dumps(entries).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ModelFileError(f"{path}: the header would have {len(text)} bytes, at most {MAX_HEADER} fit")
    return len(text).to_bytes(8, "little") + text


def dumps(value: Any) -> str:
    """Compact JSON, as headers contain it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
