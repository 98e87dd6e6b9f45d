"""Writing of model files: streamed under a temporary name, read back, then renamed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

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
    read_model_file,
    tensor_sizes,
)


class SafeFile:
    """A file that is written under a temporary name in the same folder; a context manager.

    `commit` gives it its final name; leaving the block without that removes the file. `nbytes` is the size it will
    have. Raises ModelFileError if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], nbytes: int) -> None:
        self.path = os.fspath(path)
        self._target = check_output(self.path, nbytes)
        self._temporary: str | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Any:
        # Nothing may come between opening the file and being able to remove it, not even a signal.
        try:
            with self._reported():
                self._open_temporary()
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary is None:
            return
        try:
            if self._file is not None:
                self._file.close()
        except OSError:  # what was still buffered does not fit on the disk; the file is removed anyway
            pass
        with suppress(FileNotFoundError):
            os.unlink(self._temporary)
        self._temporary = None

    @property
    def _open(self) -> IO[bytes]:
        """The file, which is there within the block."""
        assert self._file is not None
        return self._file

    def put(self, data: Any, at: int | None = None) -> None:
        """Write a buffer at an offset, or after what was written last."""
        with self._reported():
            if at is not None:
                self._open.seek(at)
            self._open.write(data)

    def commit(self) -> None:
        """Flush to disk and rename."""
        self._to_disk()
        self._rename()

    def _begin(self) -> None:
        """Called when the file is open, for a subclass to write something first."""

    def _to_disk(self) -> None:
        with self._reported():
            self._open.flush()
            os.fsync(self._open.fileno())
            if hasattr(os, "posix_fadvise"):  # so that reading back reads from the disk and not from the page cache
                os.posix_fadvise(self._open.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._open.close()

    def _rename(self) -> None:
        assert self._temporary is not None
        with self._reported():
            os.replace(self._temporary, self._target)
            self._temporary = None
            _sync_folder(os.path.dirname(self._target))

    def _open_temporary(self) -> None:
        folder, name = os.path.split(self._target)
        self._temporary = os.path.join(folder, f".{name[:200]}.{os.urandom(4).hex()}.tmp")
        # Not tempfile: its files are private, and a model file should have the permissions of any new file.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._file = os.fdopen(os.open(self._temporary, flags, 0o666), "r+b", buffering=1 << 20)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelFileError(f"{self.path}: cannot write: {error.strerror or error}") from None


class ModelFileWriter(SafeFile):
    """Writes a model file, streaming, under a temporary name in the same folder; a context manager.

        with ModelFileWriter(path, description, types, tokenizer_info=info, tokenizer=data, ...) as writer:
            for name in description.tensor_shapes():
                writer.write(name, chunks)
            model = writer.finish()

    `types` gives the weight type of every matrix. Every tensor is written once, in any order. `finish`
    flushes to disk, reads the file back against its checksums and only then gives it its name. Leaving the
    block without `finish` removes the temporary file. Raises ModelFileError if the file cannot be written.
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
        assert self._temporary is not None
        model = read_model_file(self._temporary)
        model.verify(progress)
        self._rename()
        model.path = self.path
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


def check_output(path: str | os.PathLike[str], nbytes: int = 0) -> str:
    """The real path to write to. Raises ModelFileError if a file of `nbytes` cannot be created there."""
    path = os.fspath(path)
    try:
        target = os.path.realpath(path)
        if os.path.isdir(target) or path.endswith(os.sep):
            raise ModelFileError(f"{path}: cannot write: it is a folder; give the name of a file in it")
        # Renaming over a device or a pipe would remove it.
        if os.path.exists(target) and not os.path.isfile(target):
            raise ModelFileError(f"{path}: cannot write: it exists and is not a regular file")
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            raise ModelFileError(f"{path}: cannot write: there is no folder {os.path.dirname(path)}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ModelFileError(f"{path}: cannot write: no permission in folder {folder}")
        disk = shutil.disk_usage(folder)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path!r}: cannot write: {error}") from None
    if disk.total and disk.free < nbytes:
        raise ModelFileError(
            f"{path}: cannot write: No space left on device "
            f"({nbytes / 1e6:.1f} MB needed, {disk.free / 1e6:.1f} MB free)"
        )
    return target


def dumps(value: Any) -> str:
    """Compact JSON, as headers contain it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _sync_folder(folder: str) -> None:
    """Make the rename durable where the system can sync a folder."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)
