"""Regular files: whatever else a path may name, a pipe, a device or a folder, is refused and never waited for."""

from __future__ import annotations

import errno
import os
import stat


def open_regular(path: str, flags: int) -> int:
    """An `opener` for `open` that accepts regular files only. Raises OSError, whose `strerror` says why, for anything
    else; FileNotFoundError only if there is nothing of this name, not for a link whose target is gone."""
    try:
        # Without O_NONBLOCK opening a named pipe would block forever.
        fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        if os.path.islink(path):
            raise OSError(errno.EINVAL, f"a link to {os.readlink(path)}, which is not there") from None
        raise
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(mode) else "not a regular file")
    return fd


def read_bytes(path: str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError as `open_regular` does."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            # A larger file is not read at all; one that grows, or has no size (in /proc), not beyond the limit.
            data = b"" if os.fstat(file.fileno()).st_size > limit else file.read(limit + 1) or b""
            size = max(len(data), os.fstat(file.fileno()).st_size)
    except ValueError:
        raise OSError(errno.EINVAL, "a NUL character in its name") from None
    if size > limit:
        raise OSError(errno.EFBIG, f"{size} bytes; {limit} are the limit for such a file")
    return data


def read_text(path: str, limit: int) -> str:
    """The same as text, which must be UTF-8; a byte order mark at its start is dropped."""
    return decoded(read_bytes(path, limit))


def decoded(data: bytes) -> str:
    """Bytes of a file as text, as `read_text` does it. Raises OSError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"not UTF-8 (byte {error.start})") from None
