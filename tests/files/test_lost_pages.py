"""Model files that are truncated or written over while they are mapped: one line instead of a signal or nonsense."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import kvrun
from kvrun import _core
from kvrun.errors import ModelFileError
from kvrun.files.model_file import read_model_file
from support.model_files import open_writer, write_all

START = """
import ctypes, faulthandler, gc, mmap, os, signal, sys, threading
import numpy as np
import kvrun
from kvrun.files.model_file import read_model_file

def lose(path):
    os.truncate(path, 0)

def other_map():
    "A file of its own, mapped by others than kvrun, that loses its pages."
    with open(sys.argv[1] + ".other", "w+b") as file:
        file.write(bytes(1 << 16))
        file.flush()
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    os.truncate(file.name, 0)
    return data

path = sys.argv[1]
"""
LOST = "the file was truncated while it was in use, or can no longer be read"


def run(path, code):
    done = subprocess.run([sys.executable, "-c", START + code, str(path)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def path(converted, tmp_path):
    return Path(shutil.copy(converted("grouped-tied"), tmp_path / "model.bin"))


def in_one_line(path, code, out=""):
    assert run(path, code) == (1, out, f"kvrun: {path}: {LOST}\n")


USES = {
    "verify": "model = read_model_file(path); lose(path); model.verify()",
    "prefault": "model = read_model_file(path); lose(path); model.prefault()",
    "tokenizer": "model = read_model_file(path); lose(path); bytes(model.tokenizer_bytes())",
    "arrays": "a = read_model_file(path).vectors['norm.weight']; gc.collect(); lose(path); print(a.sum())",
    "one of many": "models = [read_model_file(path) for _ in range(300)]; lose(path); models[123].verify()",
    "engine": """
model = kvrun.load(path, threads=4)
kv = model.engine.new_cache(k="f16", v="f16", ctx=512, sinks=4, window=64)
lose(path)
model.engine.forward(np.arange(40, dtype=np.int32), kv)
""",
    "thread": """
model = read_model_file(path)
lose(path)
thread = threading.Thread(target=model.verify)
thread.start()
thread.join()
""",
    "after another": "read_model_file(path); gc.collect(); model = read_model_file(path); lose(path); model.verify()",
}


@pytest.mark.parametrize("use", USES)
def test_a_file_that_is_truncated_in_use(path, use):
    in_one_line(path, USES[use])


@pytest.mark.parametrize("when", ["before", "after"])
def test_beside_faulthandler(path, when):
    """Which pytest and many programs turn on. Installed later, it has its say before."""
    enable = "faulthandler.enable()\n"
    code = (
        (enable if when == "before" else "") + "model = read_model_file(path)\n" + (enable if when == "after" else "")
    )
    status, out, err = run(path, code + "lose(path)\nmodel.verify()")
    assert (status, out) == (1, "") and err.endswith(f"kvrun: {path}: {LOST}\n")
    assert ("Bus error" in err) == (when == "after")


def test_in_a_forked_process(path):
    code = """
model = read_model_file(path)
child = os.fork()
if child == 0:
    lose(path)
    model.verify()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    status, out, err = run(path, code)
    assert (status, out, err) == (0, "1\n", f"kvrun: {path}: {LOST}\n")


@pytest.mark.parametrize("open_too", ["model = read_model_file(path)", "read_model_file(path); gc.collect()"])
@pytest.mark.parametrize("dumps", [False, True])
def test_other_maps_are_left_to_whoever_had_the_signal(path, dumps, open_too):
    code = ("faulthandler.enable()\n" if dumps else "") + open_too + "\nother_map()[0]"
    status, out, err = run(path, code)
    assert (status, out) == (-signal.SIGBUS, "") and LOST not in err and ("Bus error" in err) == dumps


def test_a_handler_that_was_there_still_gets_signals(path):
    code = """
signal.signal(signal.SIGBUS, lambda *_: print("caught", flush=True))
model = read_model_file(path)
for _ in range(3):
    os.kill(os.getpid(), signal.SIGBUS)
lose(path)
model.verify()
"""
    in_one_line(path, code, out="caught\n" * 3)


@pytest.mark.parametrize("sent", ["os.kill(os.getpid(), signal.SIGBUS)", "signal.raise_signal(signal.SIGBUS)"])
def test_the_signal_itself_still_ends_a_process(path, sent):
    assert run(path, f"model = read_model_file(path)\n{sent}") == (-signal.SIGBUS, "", "")


def test_the_handler_comes_back_where_there_is_none(path):
    """pytest's faulthandler restores what it found at its start."""
    code = """
model = read_model_file(path)
signal.signal(signal.SIGBUS, signal.SIG_DFL)
model = read_model_file(path)
lose(path)
model.verify()
"""
    in_one_line(path, code)


def test_names_cannot_write_to_the_terminal(tmp_path, path):
    odd = shutil.copy(path, tmp_path / "a\n\x1b[2Jb\udcff")
    status, _, err = run(odd, USES["verify"])
    assert status == 1 and err == f"kvrun: {tmp_path}/a \ufffd[2Jb\ufffd: {LOST}\n"


def test_the_command(path):
    code = """
import kvrun.commands.main
real = read_model_file
def lost(*args, **options):
    model = real(*args, **options)
    lose(path)
    return model
kvrun.commands.inspect.read_model_file = lost
sys.exit(kvrun.commands.main.main(["inspect", "--verify", path]))
"""
    in_one_line(path, "import kvrun.commands.inspect\n" + code)


def test_a_checkpoint_that_is_truncated_while_it_is_read(path):
    """The one place of the converter that maps: matrices that are stored transposed."""
    code = """
from kvrun.convert.tensors import StoredTensor
from kvrun.convert.views import TransposedTensor
with open(path, "wb") as file:
    file.write(bytes(4 * 4096 * 64))
tensor = TransposedTensor.of(StoredTensor("w", path, 0, (4096, 64), "f32", 256))
assert tensor.raw(0, 8).shape == (8, 4096 * 4)
stored = np.frombuffer
def lost(data, *args, **options):
    lose(path)
    return stored(data, *args, **options)
np.frombuffer = lost
tensor.raw(0, 8)
"""
    in_one_line(path, code)


# --- what can be told before anything is used -----------------------------------------------------


def answer(model):
    return model.generate([5, 6, 7], temperature=0, max_tokens=12, ignore_eos=True, raw=True)


def write_over(path, content):
    """In place, as `cp` does."""
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()
    os.utime(path, (1, 1))


def test_a_file_that_is_written_over(path, converted):
    model = kvrun.load(path)
    session = model.session()
    list(session.stream([5, 6, 7], max_tokens=3, ignore_eos=True))
    content = path.read_bytes()
    for other in (content + b"x", converted("grouped-tied", "q8_0").read_bytes(), content[:-1]):
        write_over(path, other)
        for use in (lambda: list(session.stream([8], max_tokens=0)), lambda: answer(model)):
            with pytest.raises(
                ModelFileError, match="model.bin: the file was changed while it was in use: load it again"
            ):
                use()
        write_over(path, content)
        list(session.stream([8], max_tokens=0))


def test_another_model_of_the_same_size(tmp_path):
    with open_writer(tmp_path / "a.bin") as one, open_writer(tmp_path / "b.bin", stop_ids=[2, 7]) as other:
        for writer in (one, other):
            write_all(writer)
            writer.finish()
    model, other = read_model_file(tmp_path / "a.bin"), (tmp_path / "b.bin").read_bytes()
    assert len(other) == model.nbytes
    model.check_unchanged()
    write_over(tmp_path / "a.bin", other)
    with pytest.raises(ModelFileError, match="changed while it was in use"):
        model.check_unchanged()


def test_changes_that_do_no_harm(path, converted, tmp_path):
    """Touched, written anew with the same, and another file that takes its name, as kvrun convert writes one."""
    model = kvrun.load(path)
    expected = answer(model)
    os.utime(path)
    assert answer(model) == expected
    write_over(path, path.read_bytes())
    assert answer(model) == expected
    os.replace(shutil.copy(converted("wide"), tmp_path / "new"), path)
    assert answer(model) == expected
    os.unlink(path)
    assert answer(model) == expected


def test_a_copy_in_memory_needs_no_file(path):
    model = kvrun.load(path, mmap=False)
    expected = answer(model)
    os.truncate(path, 0)
    assert answer(model) == expected
    model.file.verify()


# --- the map itself -------------------------------------------------------------------------------


def test_the_map(tmp_path):
    content = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "f").write_bytes(content)
    with open(tmp_path / "f", "rb") as file:
        mapped = _core.MappedFile(file.fileno(), len(content), b"")
        for size in (0, -1, len(content) + 1, 1 << 62):
            with pytest.raises(ValueError, match="fewer bytes"):
                _core.MappedFile(file.fileno(), size, b"")
    unread = os.open(tmp_path / "f", os.O_WRONLY)
    with pytest.raises(PermissionError):
        _core.MappedFile(unread, 1, b"")
    os.close(unread)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _core.MappedFile(10**6, 1, b"")
    view = memoryview(mapped)
    assert view.readonly and len(mapped) == len(content) and bytes(view) == content
    for start, length in [(0, 100_000), (5000, 20), (4096, 10**9), (99_999, 1), (200_000, 5), (-5, 3), (0, 0)]:
        mapped.forget(start, length)
        assert bytes(view) == content
    assert os.fstat(mapped.fileno()).st_size == len(content)
    array = np.frombuffer(mapped, np.uint8)
    del mapped, view
    assert array.tobytes() == content


def test_maps_of_many_threads(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 10_000)
    failures = []

    def work():
        for _ in range(300):
            with open(tmp_path / "f", "rb") as file:
                maps = [_core.MappedFile(file.fileno(), 10_000, b"line") for _ in range(3)]
            if any(bytes(memoryview(m)) != b"x" * 10_000 for m in maps):
                failures.append(1)

    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
