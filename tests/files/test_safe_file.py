"""Files that are written whole or not at all: what a killed process leaves, permissions, and places that refuse."""

import errno
import fcntl
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import time

import pytest

from kvrun.errors import ModelFileError
from kvrun.files.safe_file import SafeFile, check_output

WRITES = """
import os, sys, time
from kvrun.files.safe_file import SafeFile

if sys.argv[2] == "named":
    del os.O_TMPFILE
with SafeFile(sys.argv[1], 0, private=True) as file:
    file.put(b"x" * (8 << 20))
    if sys.argv[3:] == ["renaming"]:
        os.replace = lambda *_: (print("ready", flush=True), time.sleep(600))
        file.commit()
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["unnamed", "named"])
def kind(request, monkeypatch):
    """Both ways to write: without a name, where the system has that, and under a temporary one."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


def write(path, data=b"new", **options):
    with SafeFile(path, len(data), **options) as file:
        file.put(data)
        file.commit()


def writer(path, *arguments):
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(path), *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def killed(process, by=signal.SIGKILL):
    process.send_signal(by)
    assert process.wait(60) == -by


def has_unnamed(folder):
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600))
        return True
    except (OSError, AttributeError):
        return False


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGHUP])
def test_what_a_killed_process_leaves(tmp_path, kind, by):
    """Nothing; under a temporary name, until the next one writes there."""
    path = tmp_path / "s.kv"
    path.write_bytes(b"old")
    process = writer(path, kind)
    assert path.read_bytes() == b"old"
    killed(process, by)
    if kind == "unnamed" and has_unnamed(tmp_path):
        assert os.listdir(tmp_path) == ["s.kv"]
    else:
        assert len(os.listdir(tmp_path)) == 2
    write(path)
    assert os.listdir(tmp_path) == ["s.kv"] and path.read_bytes() == b"new"


def test_killed_between_two_names(tmp_path):
    path = tmp_path / "s.kv"
    path.write_bytes(b"old")
    killed(writer(path, "unnamed", "renaming"))
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2
    write(path)
    assert os.listdir(tmp_path) == ["s.kv"]


def test_files_of_writers_at_work_are_left_alone(tmp_path, kind):
    path = tmp_path / "s.kv"
    other = writer(path, "named")
    (theirs,) = os.listdir(tmp_path)
    write(path)
    assert sorted(os.listdir(tmp_path)) == sorted([theirs, "s.kv"])
    killed(other)
    write(tmp_path / "s")  # of another name
    assert theirs in os.listdir(tmp_path)
    write(path)
    assert sorted(os.listdir(tmp_path)) == ["s", "s.kv"]


def test_files_of_other_machines_are_left_for_an_hour(tmp_path):
    """Their locks are not always seen here. So with those of versions that did not lock."""
    path, now = tmp_path / "s.kv", time.time()
    names = [".s.kv.00000000.11111111.tmp", ".s.kv.22222222.tmp"]
    others = [".s.kv.tmp", ".s.kv.x2222222.tmp", ".s.kw.22222222.tmp", "s.kv.22222222.tmp", ".s.kv.22222222.tmp.gz"]
    for name in names + others:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - 3000, now - 3000))
    write(path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, *others, "s.kv"])
    for name in names + others:
        os.utime(tmp_path / name, (now - 4000, now - 4000))
    with open(tmp_path / names[0], "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write(path)
        assert sorted(os.listdir(tmp_path)) == sorted([names[0], *others, "s.kv"])
    write(path)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "s.kv"])


def test_only_files_are_removed(tmp_path):
    write(tmp_path / "other")
    links = {".s.kv.11111111.tmp": os.mkdir, ".s.kv.22222222.tmp": os.mkfifo}
    for name, make in links.items():
        make(tmp_path / name)
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".s.kv.33333333.tmp").symlink_to(tmp_path / "other")
    write(tmp_path / "s.kv")
    assert len(os.listdir(tmp_path)) == 5 and (tmp_path / "other").read_bytes() == b"new"


def test_two_that_write_the_same(tmp_path, kind):
    """Both succeed, and the file is whole, from the one that was later."""
    path = tmp_path / "s.kv"
    with SafeFile(path, 0) as one, SafeFile(path, 0) as other:
        one.put(b"1" * 1_000_000)
        other.put(b"2" * 10)
        one.commit()
        assert path.read_bytes() == b"1" * 1_000_000
        other.commit()
    assert path.read_bytes() == b"2" * 10 and os.listdir(tmp_path) == ["s.kv"]


def test_many_processes_that_write_the_same(tmp_path, kind):
    code = WRITES.partition("with SafeFile")[0] + (
        "for i in range(40):\n"
        "    with SafeFile(sys.argv[1], 0, private=True) as file:\n"
        "        file.put(sys.argv[3].encode() * 100_000)\n"
        "        file.commit()\n"
    )
    path = tmp_path / "s.kv"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), kind, str(n)]) for n in range(4)]
    assert [process.wait(300) for process in processes] == [0] * 4
    content = path.read_bytes()
    assert content == content[:1] * 100_000 and os.listdir(tmp_path) == ["s.kv"]


# --- permissions ----------------------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_permissions_of_new_files(tmp_path, kind, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "model.bin")
        write(tmp_path / "s.kv", private=True)
    finally:
        os.umask(before)
    assert mode(tmp_path / "model.bin") == 0o666 & ~umask
    assert mode(tmp_path / "s.kv") == 0o600


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("old", [0o600, 0o640, 0o644, 0o660, 0o666, 0o700, 0o755])
def test_a_replaced_file_keeps_its_permissions(tmp_path, kind, old, private):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    os.chmod(path, old)
    with SafeFile(path, 0, private=private) as file:
        file.put(b"new")
        assert stat.S_IMODE(os.fstat(file._open.fileno()).st_mode) == 0o600
        file.commit()
    assert mode(path) == old and path.read_bytes() == b"new"


def test_a_replaced_file_keeps_its_owner(tmp_path, kind):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    try:
        os.chown(path, 1234, 2345)
    except PermissionError:
        pytest.skip("only root can give files away")
    os.chmod(path, 0o640)
    write(path)
    assert (os.stat(path).st_uid, os.stat(path).st_gid, mode(path)) == (1234, 2345, 0o640)


@pytest.mark.parametrize("old, new", [(0o660, 0o600), (0o664, 0o644), (0o644, 0o644), (0o604, 0o600), (0o777, 0o777)])
def test_permissions_where_the_group_cannot_be_kept(tmp_path, monkeypatch, old, new):
    """Whoever is in the new group was among all others, and the other way round."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    os.chmod(path, old)
    real = os.stat

    def other_group(name, *args, **options):
        info = real(name, *args, **options)
        if os.fspath(name) != str(path):
            return info
        return os.stat_result([*info[:5], info.st_gid + 1, *info[6:]])

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "stat", other_group)
    monkeypatch.setattr(os, "fchown", refuse)
    write(path)
    monkeypatch.undo()
    assert mode(path) == new


def access_list(*entries):
    """Linux's form of one: (tag, permissions, id) for each entry."""
    nobody = 0xFFFFFFFF
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, perm, *(rest or [nobody])) for tag, perm, *rest in entries
    )


OWNER, USER, GROUP, MASK, OTHER = 1, 2, 4, 0x10, 0x20
SHARED = access_list((OWNER, 6), (USER, 4, 4321), (GROUP, 0), (MASK, 4), (OTHER, 0))


def set_list(path, name):
    try:
        os.setxattr(path, name, SHARED)
    except (OSError, AttributeError):
        pytest.skip("no access lists here")


def test_a_replaced_file_keeps_its_access_list(tmp_path, kind, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    set_list(path, "system.posix_acl_access")
    write(path)
    assert os.getxattr(path, "system.posix_acl_access") == SHARED and mode(path) == 0o640

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    write(path)
    assert mode(path) == 0o600 and not os.listxattr(path)


def test_what_a_folder_gives_to_new_files_does_not_open_a_replaced_one(tmp_path, kind):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    os.chmod(path, 0o640)
    set_list(tmp_path, "system.posix_acl_default")
    write(path)
    assert mode(path) == 0o640 and not os.listxattr(path)
    write(tmp_path / "s.kv", private=True)
    assert mode(tmp_path / "s.kv") == 0o600


def test_links(tmp_path, kind):
    """What a symbolic link points to is replaced; the other names of a file keep the old one."""
    (tmp_path / "store").mkdir()
    path, real, other = tmp_path / "f", tmp_path / "store" / "real", tmp_path / "other"
    path.symlink_to(real)
    write(path, private=True)
    assert path.is_symlink() and real.read_bytes() == b"new" and mode(real) == 0o600
    os.link(real, other)
    write(path, b"newer")
    assert real.read_bytes() == b"newer" and other.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["f", "other", "store"] and os.listdir(tmp_path / "store") == ["real"]


# --- places that refuse ---------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("where", ["fsync", "fchmod", "replace"])
def test_a_disk_that_fails(tmp_path, kind, monkeypatch, code, where):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as broken:
        broken.setattr(os, where, fail)
        with pytest.raises(ModelFileError, match=f"f: cannot write: {os.strerror(code)}"):
            write(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_a_limit_of_size(tmp_path, kind):
    """As a full disk is: some of it is written."""
    path, before = tmp_path / "f", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(ModelFileError, match="f: cannot write: File too large"):
            write(path, bytes(8 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_systems_without_unnamed_files_and_locks(tmp_path, monkeypatch):
    """Each refusal of the system falls back to what it has."""
    real = os.open

    def no_unnamed(path, flags, *args, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *args, **options)

    def refuse(*_, **__):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    for module, name, function in [(os, "open", no_unnamed), (os, "link", refuse), (fcntl, "flock", refuse)]:
        with monkeypatch.context() as without:
            without.setattr(module, name, function)
            for _ in range(2):
                write(tmp_path / "f")
        assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 120, "a.b c'\"\n", "\udcff"])
def test_names(tmp_path, kind, name):
    killed(writer(tmp_path / name, "named"))
    for _ in range(2):
        write(tmp_path / name)
        assert os.listdir(tmp_path) == [name]


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    """Though the folder would allow it."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    os.chmod(path, 0o444)
    if os.geteuid() == 0:  # who may do everything
        real = os.access
        monkeypatch.setattr(os, "access", lambda name, how: name != str(path) and real(name, how))
    with pytest.raises(ModelFileError, match="f: cannot write: it is write-protected"):
        write(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_other_users_files_in_a_shared_folder(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    os.chmod(tmp_path, 0o1777)
    check_output(path)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(path).st_uid + 1)
    with pytest.raises(ModelFileError, match="another user's"):
        check_output(path)
