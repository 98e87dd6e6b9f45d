"""Ctrl-C, SIGTERM and SIGHUP: what is there is saved, what is temporary removed; the status names the signal."""

import os
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

import kvrun
from kvrun.commands import main as cli
from kvrun.commands import signals
from support.cases import some
from support.commands import KVRUN, Terminal

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
every_signal = pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
# All that is done between a signal and the end, it does alike for SIGTERM and SIGHUP.
each_way = pytest.mark.parametrize("number", some(ALL, ALL[:2]), ids=lambda number: number.name)
ENDLESS = ["--ignore-eos", "--ctx", "200", "--seed", "1"]


def started(*arguments, command=KVRUN, **options):
    # Unbuffered: `communicate` does not see what a buffer has.
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    return subprocess.Popen([*command, *map(str, arguments)], **pipes, **options)


def ended(process, number, *more):
    """Standard output and standard error of a process that ended for a signal, as it should. `more`: statuses that
    are right as well."""
    out, err = process.communicate(timeout=60)
    assert process.returncode in (128 + number, *more) and b"Traceback" not in err and b"gnored" not in err, (
        err.decode()
    )
    return out, err.decode()


def read_until(stream, word):
    for line in stream:
        if word in line:
            return
    raise AssertionError(f"{word!r} never came")


# --- what it is doing when the signal comes ---------------------------------------------------------


@every_signal
def test_in_an_answer(model, number, tmp_path):
    with started(model, "-p", "a", "--session", tmp_path / "s.kv", *ENDLESS) as process:
        shown = process.stdout.read(5)
        process.send_signal(number)
        out, _err = ended(process, number)
    session = kvrun.load(model).restore(tmp_path / "s.kv")
    assert os.listdir(tmp_path) == ["s.kv"]
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    # A signal may come between a piece and its being shown.
    assert session.messages[1]["content"].startswith((shown + out).decode().removesuffix("\n"))
    assert "".join(session.stream("b", max_tokens=3, ignore_eos=True))


READING = """
import sys, time
import kvrun.commands.answer as answer
from kvrun.commands.main import main
load = answer.load
class Slow:
    def __init__(self, engine): self.engine = engine
    def __getattr__(self, name): return getattr(self.engine, name)
    def forward(self, *args, **options):
        logits = self.engine.forward(*args, **options)
        print("fed", file=sys.stderr, flush=True)
        time.sleep(0.2)
        return logits
def slow(*args, **options):
    model = load(*args, **options)
    model.engine = Slow(model.engine)
    return model
answer.load = slow
sys.exit(main())
"""


@each_way
def test_while_a_prompt_is_read(model, number, tmp_path):
    command = [sys.executable, "-c", READING]
    (tmp_path / "prompt").write_text("word " * 4000)
    arguments = [model, "-f", tmp_path / "prompt", "--session", tmp_path / "s.kv", *ENDLESS]
    with started(*arguments, command=command) as process:
        read_until(process.stderr, b"fed")
        process.send_signal(number)
        ended(process, number)
    session = kvrun.load(model).restore(tmp_path / "s.kv")
    assert session.n_tokens > 1000 and session.messages[0]["role"] == "user"
    assert "".join(session.stream("b", max_tokens=3, ignore_eos=True))
    assert sorted(os.listdir(tmp_path)) == ["prompt", "s.kv"]


@each_way
def test_waiting_for_a_line(model, number, tmp_path):
    with started(model, "-n", "5", "--session", tmp_path / "s.kv", *ENDLESS) as process:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        read_until(process.stderr, b"[prompt")
        process.send_signal(number)
        assert process.wait(60) == 128 + number and not process.stderr.read()
    assert kvrun.load(model).restore(tmp_path / "s.kv").messages[0] == {"role": "user", "content": "hello"}


@pytest.mark.crossed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("answering", [False, True])
def test_a_chat_on_a_terminal(model, number, answering, tmp_path):
    terminal = Terminal(model, "--session", str(tmp_path / "s.kv"), *ENDLESS)
    before = termios.tcgetattr(terminal.fd)
    terminal.read("Ctrl-D ends.*>")
    terminal.type("hello\r")
    terminal.read(".{5000}")
    if not answering:
        terminal.type("\x03")
        terminal.read(r"\[prompt \d+ tokens.*>")
    os.kill(terminal.pid, number)
    terminal.read("$")
    deadline = time.monotonic() + 60
    while not os.path.exists(tmp_path / "s.kv") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert termios.tcgetattr(terminal.fd)[:4] == before[:4]
    assert terminal.status() == 128 + number
    assert kvrun.load(model).restore(tmp_path / "s.kv").messages[0] == {"role": "user", "content": "hello"}


@pytest.mark.crossed
@every_signal
@pytest.mark.parametrize("module", ["kvrun.commands.streams", "numpy._core.multiarray", "kvrun._core", "kvrun.model"])
def test_while_it_starts(model, number, module):
    """Python says on standard error what it has just imported."""
    command = [sys.executable, "-X", "importtime", "-m", "kvrun"]
    with started(model, "-p", "a", *ENDLESS, command=command) as process:
        read_until(process.stderr, f" {module}\n".encode())
        process.send_signal(number)
        ended(process, number, *([-number] if number != signal.SIGINT else []))  # before there is a handler


@pytest.mark.crossed
@each_way
@pytest.mark.parametrize("name, module", [("bench", "kvrun.model"), ("perplexity", "kvrun.text.tokenizer")])
def test_the_other_commands(model, number, name, module, tmp_path):
    (tmp_path / "text").write_text("word " * 200_000)
    options = {"bench": ["--runs", "1000"], "perplexity": ["--text", tmp_path / "text"]}[name]
    command = [sys.executable, "-X", "importtime", "-m", "kvrun"]
    with started(name, model, *options, command=command) as process:
        read_until(process.stderr, f" {module}\n".encode())
        time.sleep(0.3)
        process.send_signal(number)
        out, _err = ended(process, number)
        assert not out


# --- how often it comes, and to whom ----------------------------------------------------------------


def test_ignored_ones_stay_ignored(model):
    def as_nohup_does():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with started(model, "-p", "a", *ENDLESS, preexec_fn=as_nohup_does) as process:
        process.stdout.read(5)
        process.send_signal(signal.SIGHUP)
        assert sum(len(process.stdout.read(1)) for _ in range(2_000)) == 2_000
        process.send_signal(signal.SIGTERM)
        ended(process, signal.SIGTERM)


def test_one_that_is_sent_twice_is_one(model, tmp_path):
    """As timeout sends it, and a terminal that is closed."""
    with started(model, "-p", "a", "--session", tmp_path / "s.kv", *ENDLESS) as process:
        process.stdout.read(5)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode in (143, 129)  # they wait together, and the system says in which order
    assert os.listdir(tmp_path) == ["s.kv"]


@every_signal
def test_what_must_be_finished(number):
    done = []
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else signals.Ended), signals.endable():
        with signals.finishing(stopped=False):
            signal.raise_signal(number)
            signal.raise_signal(number)  # belongs to it
            done.append("saved")
        done.append("went on")
    assert done == ["saved"]


@every_signal
def test_one_that_comes_again_ends_at_once(number, monkeypatch):
    monkeypatch.setattr(signals, "TOGETHER", -1)
    done = []
    before = [signal.getsignal(each) for each in ALL]
    for stopped in (False, True):
        with pytest.raises((KeyboardInterrupt, signals.Ended)), signals.endable(), signals.finishing(stopped):
            signal.raise_signal(number)
            if not stopped:
                signal.raise_signal(number)
            done.append("saved")
        signal.signal(number, before[ALL.index(number)])
    assert not done and [signal.getsignal(each) for each in ALL] == before


def test_handlers_are_put_back(model, capsys):
    before = [signal.getsignal(number) for number in ALL]
    assert cli.main([model, "-q", "-p", "a", "-n", "1"]) == 0
    assert [signal.getsignal(number) for number in ALL] == before


def test_in_another_thread_than_the_main_one(model, capsys):
    found = []
    thread = threading.Thread(target=lambda: found.append(cli.main([model, "-q", "-p", "a", "-n", "1"])))
    thread.start()
    thread.join()
    assert found == [0]
