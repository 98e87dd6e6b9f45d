"""Threads of the core: after a fork, when the system gives none, several calls at a time, late ones, idle ones."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import kvrun
from kvrun._core import cpus
from kvrun.text.tokenizer import Tokenizer
from support import ROOT, compiled, needs, no_threads
from support.cases import some

WAIT = 120  # seconds: a bound for what would hang
PROMPT = "Once upon a time there was a little fox"


@pytest.fixture(scope="module")
def path(converted):
    return str(converted("grouped-tied"))


@pytest.fixture(autouse=True)
def many_cpus(monkeypatch):
    """More threads than there are CPUs are late all the time, which is what is tested here."""
    monkeypatch.setattr(cpus, "usable", lambda: 1000)


def tasks():
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


def answer(model):
    return "".join(model.session(kv="f16", ctx=256).stream(PROMPT, max_tokens=20, ignore_eos=True, seed=1, raw=True))


def in_child(model):
    """What a forked child answers; it is ended if it hangs."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:  # never back into pytest
        try:
            os.write(writes, answer(model).encode())
        finally:
            os._exit(0)
    os.close(writes)
    deadline = time.monotonic() + WAIT
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    with os.fdopen(reads, encoding="utf-8") as pipe:
        return pipe.read()


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@forks
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_forked_child_answers_and_so_does_its_parent_afterwards(path, threads):
    model = kvrun.load(path, threads=threads)
    assert in_child(model) == answer(model)  # loaded only
    assert in_child(model) == answer(model) != ""  # and after a generation


@forks
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_fork_in_the_middle_of_other_threads_calls(path):
    """Threads of the parent that were in a team, or just joining one, do not exist in the child."""
    model = kvrun.load(path, threads=3)
    expected, done = answer(model), threading.Event()

    def keep_on():
        while not done.is_set():
            answer(model)

    others = [threading.Thread(target=keep_on) for _ in range(2)]
    for other in others:
        other.start()
    try:
        assert [in_child(model) for _ in range(8)] == 8 * [expected]
    finally:
        done.set()
        for other in others:
            other.join()


@forks
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_makes_the_tokenizer(path, monkeypatch):
    """The thread that holds the model's lock does not exist in the child."""
    model, begun, forked, init = kvrun.load(path), threading.Event(), threading.Event(), Tokenizer.__init__

    def slow(self, *args):
        begun.set()
        forked.wait(WAIT)
        init(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "__init__", slow)
        other = threading.Thread(target=lambda: model.chat)
        other.start()
        assert begun.wait(WAIT)
        patch.setattr(Tokenizer, "__init__", init)
        in_the_child = in_child(model)
        forked.set()
        other.join()
    assert in_the_child == answer(model) != ""


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_multiprocessing(path, method, tmp_path):
    program = f"""
import multiprocessing, sys
import kvrun
from kvrun.text.tokenizer import Tokenizer
def answer(model):
    stream = model.session(kv="f16", ctx=256).stream({PROMPT!r}, max_tokens=20, ignore_eos=True, seed=1, raw=True)
    return "".join(stream)
def task(_):
    return answer(kvrun.load({path!r}, threads=2))
if __name__ == "__main__":
    expected = answer(kvrun.load({path!r}, threads=2))
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        assert pool.map(task, range(4)) == 4 * [expected]
    print("equal")
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=WAIT)
    assert (done.stdout, done.returncode) == ("equal\n", 0), done.stderr


def test_calls_of_several_threads_at_a_time(path):
    model = kvrun.load(path, threads=3)
    expected, found = answer(model), []
    others = [threading.Thread(target=lambda: found.append(answer(model))) for _ in range(6)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert found == 6 * [expected]


FEWER = """
import ctypes, os, sys, numpy, kvrun
from kvrun._core import cpus
cpus.usable = lambda: 1000
model = kvrun.load(sys.argv[1], threads=8)
left = ctypes.c_int.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "threads_left")
left.value = int(sys.argv[2])
before = len(os.listdir("/proc/self/task"))
session = model.session(kv="f16", ctx=256)
text = "".join(session.stream(sys.argv[3], max_tokens=20, ignore_eos=True, seed=1, raw=True))
print(len(os.listdir("/proc/self/task")) - before)
print(text, end="")
"""


@pytest.mark.parametrize("left", [0, 1, 3])
def test_fewer_threads_when_the_system_has_no_more(path, left):
    command = [sys.executable, "-c", FEWER, path, str(left), PROMPT]
    environment = no_threads.environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT)
    assert (done.returncode, done.stderr) == (0, "")
    started, _, text = done.stdout.partition("\n")
    assert int(started) == left and text == answer(kvrun.load(path, threads=1))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_threads_sleep_between_calls_and_are_used_again(path):
    model = kvrun.load(path, threads=4)
    answer(model)
    count = tasks()
    for _ in range(5):
        answer(kvrun.load(path, threads=4))
    assert tasks() == count
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25  # spinning threads would take half a second each


def test_signals_come_to_threads_of_the_program(path):
    """Python's own handlers would never run if the core's threads took them: those block all but their own faults."""
    masks = Path("/proc/self/task")
    if not masks.exists():
        pytest.skip("needs /proc")
    model = kvrun.load(path, threads=4)
    for _ in range(50):  # a thread blocks everything until it runs for the first time
        answer(model)
        ours = [t for t in masks.iterdir() if (t / "comm").read_text() == "kvrun\n"]
        blocked = [int((t / "status").read_text().partition("SigBlk:")[2].split()[0], 16) for t in ours]
        if len(ours) >= 3 and not any(mask >> (n - 1) & 1 for mask in blocked for n in (7, 8, 11)):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"{len(ours)} threads block {[hex(mask) for mask in blocked]}")
    assert all(mask >> (n - 1) & 1 for mask in blocked for n in (1, 2, 15))


COUNTS = """
import gc, os, sys, kvrun
from kvrun._core import cpus
def tasks():
    return len(os.listdir("/proc/self/task"))
def answer(model):
    stream = model.session(kv="f16", ctx=256).stream(sys.argv[2], max_tokens=20, ignore_eos=True, seed=1, raw=True)
    return "".join(stream)
text, before = answer(kvrun.load(sys.argv[1], threads=1)), tasks()
"""
FOLLOWING = """
model = kvrun.load(sys.argv[1], threads=64)
for count in (2, 4, 1):
    cpus.usable = lambda: count
    assert answer(model) == text
    print(tasks() - before)
"""
CLOSING = """
def open_and_close(count):
    for _ in range(count):
        assert answer(kvrun.load(sys.argv[1], threads=4)) == text
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
cpus.usable = lambda: 4
settled = open_and_close(20)
grown = open_and_close(200) - settled
print(tasks() - before, grown < 8e6 or grown)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "program, expected",
    [
        pytest.param(FOLLOWING, "1\n3\n3\n", id="no more threads than CPUs, as they change"),
        pytest.param(CLOSING, "0 True\n", id="engines that are closed leave no thread and no memory"),
    ],
)
def test_threads_and_memory_of_a_process(path, program, expected):
    command = [sys.executable, "-c", COUNTS + program, path, PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    assert (done.stdout, done.returncode) == (expected, 0), done.stderr


def test_as_many_threads_as_are_allowed(path):
    one, many = (kvrun.load(path, threads=n).session(kv="f32", ctx=256) for n in (1, 200))
    for session in (one, many):
        list(session.stream(PROMPT, max_tokens=3, ignore_eos=True, seed=1, raw=True))
    assert np.array_equal(one.evaluate(), many.evaluate())


NATIVE, THREAD_SANITIZER, ADDRESS_SANITIZER = (), ("-fsanitize=thread", "-g"), ("-fsanitize=address,undefined", "-g")


def stress(compiler, flags=(), runner=()):
    needs.program(compiler, "gcc" if compiler == "gcc" else "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")
    sources = [Path(__file__).with_name("team_stress.c"), ROOT / "_core/kernels/team.c"]
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Werror", "-pthread", *flags]
    objects = compiled.objects(([*command, f"-I{ROOT / '_core/kernels'}", "-c"], source) for source in sources)
    program = compiled.program(command, objects, [])
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=WAIT)
    if "ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("this system's random addresses are not those that the compiler's sanitizer knows")
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


@pytest.mark.parametrize("flags", some([NATIVE, THREAD_SANITIZER, ADDRESS_SANITIZER], [NATIVE]))
def test_the_team_alone(flags):
    """Every item counts once a step, whatever threads are late, and no memory is raced for."""
    stress("gcc", flags)


@pytest.mark.thorough
def test_the_team_alone_on_arm():
    """Whose memory is less orderly; the emulator keeps to what it promises, no more."""
    needs.program("qemu-aarch64", "qemu-user")
    stress("aarch64-linux-gnu-gcc", ["-static"], ["qemu-aarch64"])
