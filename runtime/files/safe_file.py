"""A file that is written whole or not at all: until all of it is on the disk, nothing can be seen of it.

While it is written it has no name where the system can do that (Linux, on most file systems), so that nothing is left
of it however the process ends. Elsewhere it has a temporary name, and is locked: the next file that is written under
the same name removes those that nobody holds any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterator
from functools import cache
from typing import IO, Any

from kvrun.errors import ModelFileError

_ACL = "system.posix_acl_access"
_SURELY_LEFT = 3600.0
"""Seconds after which a temporary file of another machine, whose locks may not be seen here, counts as left behind."""


class SafeFile:
    """A file that gets its name when it is complete; a context manager.

    `commit` gives it its final name, in place of what had it; leaving the block without that leaves nothing. `nbytes`
    is the size it will have. A new file has the permissions of any new file, or with `private` is the owner's alone;
    one that replaces another takes over its permissions and, where that is allowed, its owner. What a link points to
    is replaced, not the link. Raises ModelFileError if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], nbytes: int, private: bool = False) -> None:
        self.path = os.fspath(path)
        self._private = private
        self._target = check_output(self.path)
        _remove_left_behind(self._target)
        _check_room(self.path, self._target, nbytes)
        self._temporary: str | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Any:
        # Nothing may come between opening the file and being able to remove it, not even a signal.
        try:
            with self._reported():
                self._open_new()
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._forget_name()
        with contextlib.suppress(OSError):  # what was still buffered does not fit on the disk; the file is gone anyway
            if self._file is not None:
                self._file.close()
        self._file = None

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
        """Flush to disk and give it its name."""
        self._to_disk()
        self._name()

    def _begin(self) -> None:
        """Called when the file is open, for a subclass to write something first."""

    def _to_disk(self) -> None:
        with self._reported():
            self._open.flush()
            _take_access(self._open.fileno(), self._target)
            os.fsync(self._open.fileno())
            if hasattr(os, "posix_fadvise"):  # so that reading back reads from the disk and not from the page cache
                os.posix_fadvise(self._open.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _name(self) -> None:
        with self._reported():
            if self._temporary is None:
                self._link()
            if self._temporary is not None:
                os.replace(self._temporary, self._target)
                self._temporary = None
            _sync_folder(os.path.dirname(self._target))

    def _link(self) -> None:
        """Give the unnamed file its name, or a temporary one if there is a file to be replaced."""
        try:
            _link(self._open.fileno(), self._target)
        except FileExistsError:
            self._temporary = _temporary_name(self._target)
            _link(self._open.fileno(), self._temporary)

    def _forget_name(self) -> None:
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)
            self._temporary = None

    def _open_new(self) -> None:
        # What replaces a file is nobody else's until it has that file's permissions. Not tempfile, whose files are
        # always private.
        mode = 0o600 if self._private or os.path.exists(self._target) else 0o666
        fd = _open_unnamed(self._target, mode)
        while fd is None:
            self._temporary = _temporary_name(self._target)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            fd = os.open(self._temporary, flags, mode)
            if lock(fd) is False or not os.fstat(fd).st_nlink:  # taken for left behind by another in that moment
                os.close(fd)
                self._forget_name()
                fd = None
        self._file = os.fdopen(fd, "r+b", buffering=1 << 20)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelFileError(f"{self.path}: cannot write: {error.strerror or error}") from None


def check_output(path: str | os.PathLike[str]) -> str:
    """The real path to write to. Raises ModelFileError if a file cannot be created there."""
    path = os.fspath(path)
    try:
        target = os.path.realpath(path)
        reason = _refusal(path, target)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path!r}: cannot write: {error}") from None
    if reason:
        raise ModelFileError(f"{path}: cannot write: {reason}")
    return target


def _refusal(path: str, target: str) -> str | None:
    """Why no file can be put there, if so."""
    if os.path.isdir(target) or path.endswith(os.sep):
        return "it is a folder; give the name of a file in it"
    exists = os.path.exists(target)
    if exists and not os.path.isfile(target):  # renaming over a device or a pipe would remove it
        return "it exists and is not a regular file"
    if exists and not os.access(target, os.W_OK):
        return "it is write-protected"
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        return f"there is no folder {os.path.dirname(path)}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"no permission in folder {folder}"
    sticky = exists and os.stat(folder).st_mode & stat.S_ISVTX
    if sticky and os.geteuid() not in (0, os.stat(folder).st_uid, os.stat(target).st_uid):
        return f"it is another user's, and in {folder} only the owner can replace a file"
    return None


def _check_room(path: str, target: str, nbytes: int) -> None:
    try:
        disk = shutil.disk_usage(os.path.dirname(target))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot write: {error.strerror or error}") from None
    if disk.total and disk.free < nbytes:
        raise ModelFileError(
            f"{path}: cannot write: No space left on device "
            f"({nbytes / 1e6:.1f} MB needed, {disk.free / 1e6:.1f} MB free)"
        )


# --- files without a name -------------------------------------------------------------------------


def _open_unnamed(target: str, mode: int) -> int | None:
    """A new file in the target's folder that has no name yet; None where there is no such thing, or where it could not
    be given one in the end."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    fds: list[int] = []
    try:
        for permissions in (0o600, mode):
            fds.append(os.open(os.path.dirname(target), os.O_TMPFILE | os.O_RDWR, permissions))
        trial = _temporary_name(target)
        try:
            _link(fds[0], trial)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(trial)
        lock(fds[1])
        return fds.pop()
    except OSError:  # what is really wrong is met, and said, when a file is created by name
        return None
    finally:
        for fd in fds:
            os.close(fd)


def _link(fd: int, path: str) -> None:
    # A folder's descriptor, which an absolute path has no use for, makes Python call linkat, which can follow the link.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


# --- temporary names ------------------------------------------------------------------------------


def _temporary_name(target: str) -> str:
    folder, prefix = os.path.split(target)[0], _prefix(target)
    return os.path.join(folder, f"{prefix}{_machine()}.{os.urandom(4).hex()}.tmp")


def _prefix(target: str) -> str:
    name = os.path.basename(target)
    if len(os.fsencode(name)) > 200:  # a name has at most 255 bytes
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}."


@cache
def _machine() -> str:
    """Eight hexadecimal digits that two processes share if they see each other's locks: of this start of the system."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            name = file.read()
    except OSError:
        name = platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _remove_left_behind(target: str) -> None:
    """Remove the temporary files of this target whose writers are gone. Never fails: they are in nobody's way."""
    pattern = re.compile(re.escape(_prefix(target)) + r"(?:([0-9a-f]{8})\.)?[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError):
        for name in os.listdir(os.path.dirname(target)):
            match = pattern.fullmatch(name)
            if match:
                _remove_if_left(os.path.join(os.path.dirname(target), name), match[1] == _machine())


def _remove_if_left(path: str, ours: bool) -> None:
    """Remove a file of this user's that no process holds. `ours`: it is of this machine, so that a lock would be seen;
    of others only what nobody has written to for long."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            info = os.fstat(fd)
            mine = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()
            if mine and (ours or time.time() - info.st_mtime > _SURELY_LEFT) and lock(fd):
                os.unlink(path)
        finally:
            os.close(fd)


def lock(fd: int) -> bool | None:
    """Hold a file until it is closed; False if another process does, None where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None


# --- permissions ----------------------------------------------------------------------------------


def _take_access(fd: int, target: str) -> None:
    """Give a file the permissions, access list and owner of the one it will replace, or less where that is not allowed:
    never may anybody read it who could not read the other."""
    try:
        old, acl = os.stat(target), _access_list(target)
    except FileNotFoundError:
        return
    mode = stat.S_IMODE(old.st_mode) & 0o777
    for owner in (old.st_uid, -1):
        with contextlib.suppress(OSError):
            os.fchown(fd, owner, old.st_gid)
            break
    if os.fstat(fd).st_gid != old.st_gid:
        # Its group now has others in it, and those of the old one are among all others.
        least = mode & mode >> 3 & 0o007 if acl is None else 0
        mode, acl = mode & 0o700 | least << 3 | least, None
    if acl is None:
        with contextlib.suppress(OSError, AttributeError):  # what the folder gives to new files
            os.removexattr(fd, _ACL)
    else:
        try:
            os.setxattr(fd, _ACL, acl)
        except OSError:
            mode &= 0o700
    os.fchmod(fd, mode)


def _access_list(path: str) -> bytes | None:
    try:
        return os.getxattr(path, _ACL)
    except (OSError, AttributeError):  # it has none, or there are none on this system
        return None


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
