"""Standard input, output and error that are closed, full, or left by whoever was at their other end."""

import os
import re
import subprocess
from functools import cache

import pytest

from support.cases import some
from support.commands import KVRUN, refused

STEADY = ["-n", "12", "--seed", "3", "--ignore-eos"]
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


@pytest.fixture(scope="module")
def commands(model, source, tmp_path_factory):
    """Arguments of every command; what it does takes no long time."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "text").write_text("a long text " * 200)
    return {
        "answer": [model, "-p", "a", *STEADY],
        "chat": [model, *STEADY],
        "inspect": ["inspect", model],
        "json": ["inspect", model, "--json"],
        "bench": ["bench", model, "--test", "decode", "--depth", "0", "--kv", "f32", "--runs", "1"],
        "perplexity": ["perplexity", model, "--text", str(folder / "text"), "--kv", "q8", "--ctx", "200"],
        "convert": ["convert", str(source("wide")), "-o", str(folder / "out.bin"), "-v"],
        "help": ["--help"],
        "bench help": ["bench", "--help"],
        "version": ["--version"],
        "usage": [model, "--nonsense"],
        "no model": [os.devnull, "-p", "a"],
    }


def run(arguments, redirection):
    """(exit status, what of standard output is left, and of standard error) with a shell's redirection."""
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *KVRUN, *arguments], input=b"a\n", capture_output=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.fixture(scope="module")
def usual(commands):
    """usual(name): the exit status of a command, and its standard output, when nobody listens to its standard error."""
    return cache(lambda name: run(commands[name], "2>/dev/null")[:2])


RIGHT = {"usage": 2, "no model": 1}
NAMES = ["answer", "chat", "inspect", "json", "bench", "perplexity", "convert", "help", "bench help", "version"]
QUICK = ["answer", "inspect", "convert", "bench help"]


@pytest.mark.crossed
@pytest.mark.parametrize("name", some([*NAMES, "usage", "no model"], [*QUICK, "usage"]))
@pytest.mark.parametrize("redirection", [pytest.param("2>/dev/full", marks=needs_full), "2>&-"])
def test_standard_error_does_not_count(commands, usual, name, redirection):
    (status, out), found = usual(name), run(commands[name], redirection)
    assert found[0] == status == RIGHT.get(name, 0) and not found[2]
    if name not in ("bench", "convert"):  # which say how long things took
        assert found[1] == out and bool(found[1]) == (name not in RIGHT)


@needs_full
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_standard_output_that_is_full(commands, name):
    refused(run(commands[name], ">/dev/full"), "standard output: No space left on device")


@pytest.mark.crossed
@pytest.mark.parametrize("name", some(NAMES, QUICK))
@pytest.mark.parametrize("redirection", [">&-", ">&- <&-"])
def test_standard_output_that_is_closed(commands, name, redirection):
    if name == "convert":  # its result is a file
        assert run(commands[name], redirection) == (0, b"", "")
    else:
        refused(run(commands[name], redirection), "standard output is closed")


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_all_closed(commands, name):
    assert run(commands[name], "<&- >&- 2>&-") == (int(name != "convert"), b"", "")


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_standard_input_that_is_closed(commands, name):
    if name == "chat":
        refused(run(commands[name], "<&-"), "standard input is closed")
    else:
        assert run(commands[name], "<&-")[0] == 0


def test_a_prompt_on_standard_input_that_is_closed(commands):
    assert not run(commands["answer"][:1] + ["-p", "-"], "<&-")[1]


@pytest.mark.crossed
@pytest.mark.parametrize("name", some([*NAMES, "endless"], [*QUICK, "endless"]))
@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_leaves(commands, name, both):
    """Nothing is complained of."""
    endless = [*commands["answer"][:3], "--raw", "--ignore-eos", "--ctx", "200"]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT if both else subprocess.PIPE)
    with subprocess.Popen([*KVRUN, *commands.get(name, endless)], stdin=subprocess.DEVNULL, **output) as process:
        if name != "chat":  # which has nothing to say here
            assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 0
        assert both or re.fullmatch(rb"(\[prompt .*\n)?", process.stderr.read())
