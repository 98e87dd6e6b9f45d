"""The command: answers, chat, exit status, and one line for everything that goes wrong."""

import io
import os
import re
import subprocess

import pytest

import kvrun
from kvrun.commands import main as cli
from kvrun.commands.arguments import default_model_path
from kvrun.commands.output import Output
from kvrun.version import __version__
from support import no_threads
from support.cases import some
from support.commands import KVRUN, Terminal, command, refused


def called(capsys, *arguments):
    """In this process: (exit status, standard output, standard error)."""
    status = cli.main([*arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


STEADY = ["-n", "12", "--seed", "3", "--ignore-eos"]


# --- answers --------------------------------------------------------------------------------------


def test_one_answer(model, capsys):
    status, out, err = called(capsys, model, "-p", "The cat", *STEADY)
    assert status == 0
    expected = kvrun.load(model).generate("The cat", max_tokens=12, seed=3, ignore_eos=True)
    assert out == expected + "\n" * (not expected.endswith("\n"))
    assert re.fullmatch(
        r"\[prompt \d+ tokens, [\d.]+ tok/s; answer 12 tokens, [\d.]+ tok/s; KV cache [\d.]+ MB\]\n", err
    )


def test_quiet(model, capsys):
    assert called(capsys, model, "-q", "-p", "The cat", *STEADY)[2] == ""


def test_raw_goes_on_from_the_text(model, capsys):
    raw = called(capsys, model, "--raw", "-q", "-p", "The cat", *STEADY)[1]
    expected = kvrun.load(model).generate("The cat", raw=True, max_tokens=12, seed=3, ignore_eos=True)
    assert raw.removesuffix("\n") == expected.removesuffix("\n")
    assert raw != called(capsys, model, "-q", "-p", "The cat", *STEADY)[1]


def test_where_the_prompt_comes_from(model, tmp_path, capsys):
    expected = called(capsys, model, "-q", "-p", "Straße 🚀", *STEADY)[1]
    file = tmp_path / "prompt.txt"
    file.write_bytes("Straße 🚀\r\n".encode())
    assert called(capsys, model, "-q", "-f", str(file), *STEADY)[1] == expected
    for arguments in (["-p", "-"], ["-f", "-"]):
        status, out, err = command(model, "-q", *arguments, *STEADY, stdin="Straße 🚀\n".encode())
        assert (status, out.decode(), err) == (0, expected, "")


def test_a_prompt_from_a_named_pipe(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen([*KVRUN, model, "-q", "-f", tmp_path / "pipe", *STEADY], stdout=subprocess.PIPE) as process:
        (tmp_path / "pipe").write_bytes(b"Stra\xc3\x9fe\n")
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 0
    assert out == command(model, "-q", "-p", "Straße", *STEADY)[1]


def test_system_message(model, capsys):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    expected = kvrun.load(model).generate(messages, max_tokens=12, seed=3, ignore_eos=True)
    out = called(capsys, model, "-q", "--system", "Be brief.", "-p", "a", *STEADY)[1]
    assert out.removesuffix("\n") == expected.removesuffix("\n")


def test_sampling_options_reach_the_session(model, capsys):
    options = [
        "--temperature",
        "1.5",
        "--top-k",
        "0",
        "--top-p",
        "1",
        "--min-p",
        "0",
        "--repeat-penalty",
        "1.3",
    ]
    expected = kvrun.load(model).generate(
        "a",
        max_tokens=12,
        seed=3,
        ignore_eos=True,
        temperature=1.5,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repeat_penalty=1.3,
    )
    out = called(capsys, model, "-q", "-p", "a", *STEADY, *options)[1]
    assert out.removesuffix("\n") == expected.removesuffix("\n")


def test_cache_options_reach_the_session(model, capsys):
    sizes = []
    for options in (
        [],
        ["--kv", "f16"],
        ["--kv", "f16", "--kv-v", "f32"],
        ["--kv", "f32"],
        ["--kv", "f16", "--ctx", "30000"],
        ["--kv", "f16", "--sinks", "8000"],
        ["--kv", "f16", "--window", "7000"],
        ["--kv", "q8"],
    ):
        err = called(capsys, model, "-p", "a", "-n", "1", "--seed", "1", "--ctx", "9000", *options)[2]
        sizes.append(float(err.split()[-2]))
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] < sizes[4] and len(set(sizes)) == 7
    assert sizes[0] == sizes[7]


def test_drafts(model, converted, capsys):
    """The same answer, and a line that says what became of them."""
    options = ["-p", "The cat", "-n", "200", "--temperature", "0", "--ignore-eos"]
    expected = called(capsys, model, *options)
    for spec in (["ngram"], ["ngram", "--spec-ngram-size-n", "1", "--spec-draft-n-max", "15"]):
        status, out, err = called(capsys, model, *options, "--spec", *spec)
        assert (status, out) == expected[:2]
        accepted, drafted = map(int, re.search(r"; (\d+) of (\d+) drafted tokens accepted\]\n", err).groups())
        assert 0 < accepted <= drafted
    draft = str(converted("grouped-tied", "q8_0"))
    status, out, err = called(capsys, model, *options, "--spec", draft)
    assert (status, out) == expected[:2] and re.search(r"; \d+ of \d+ drafted tokens accepted\]\n", err)
    for nothing in ([], ["--spec", "none"]):
        assert "drafted" not in called(capsys, model, *options, *nothing)[2]


def test_drafts_that_cannot_be(model, plain, tmp_path):
    """Said before the first prompt of a chat."""
    refused(command(model, "--spec", plain, stdin=b"a\n"), "spec: ", plain, "has other tokens than", model)
    refused(command(model, "--spec", tmp_path / "nowhere", stdin=b"a\n"), "nowhere")
    refused(
        command(model, "--spec", "ngram", "--spec-draft-n-max", "16", "-p", "a"), "spec_draft_n_max: ", "at most 15"
    )
    refused(
        command(model, "--spec", "ngram", "--spec-ngram-size-n", "0", "-p", "a"), "spec_ngram_size_n: ", "at least 1"
    )


def test_stop_strings(model, capsys):
    whole = called(capsys, model, "-q", "-p", "a", *STEADY)[1]
    cut = len(whole) // 2
    stop = whole[cut : cut + 3]
    out = called(capsys, model, "-q", "-p", "a", *STEADY, "--stop", "not in it", "--stop", stop)[1]
    assert out.removesuffix("\n") == whole[: whole.index(stop)].removesuffix("\n")


def test_prompts_that_look_like_options(model, capsys):
    for prompt in ("-n", "--help", "--", "--prompt=x", "- - -"):
        expected = kvrun.load(model).generate(prompt, max_tokens=12, seed=3, ignore_eos=True)
        status, out, _err = called(capsys, model, "-q", "-p", prompt, *STEADY)
        assert status == 0 and out.removesuffix("\n") == expected.removesuffix("\n")
    same = [called(capsys, model, "-q", *form, *STEADY)[1] for form in (["-px"], ["--prompt=x"], ["--prompt", "x"])]
    assert len(set(same)) == 1
    assert called(capsys, "-q", "-p", "a", "--stop", "--", *STEADY, model)[0] == 0


def test_a_prompt_that_does_not_fit(model, capsys):
    """Said before the answer, also without statistics."""
    ids = kvrun.load(model).tokenize("word " * 300)
    status, out, err = called(capsys, model, "--raw", "-p", "word " * 300, "--ctx", "132", *STEADY)
    line = (
        f"kvrun: the prompt has {len(ids):,} tokens, the cache keeps 132: the oldest {len(ids) - 132:,} after the "
        "first 4 are left out of it; a larger --ctx keeps more"
    )
    first, second = err.splitlines()
    assert status == 0 and out and first == line and second.endswith("the cache keeps 132]")
    assert called(capsys, model, "-q", "--raw", "-p", "word " * 300, "--ctx", "132", *STEADY)[2] == line + "\n"
    assert called(capsys, model, "-q", "--raw", "-p", "word " * 100, *STEADY)[2] == ""
    with subprocess.Popen(
        [*KVRUN, model, "--raw", "-p", "word " * 300, "--ctx", "132", "--ignore-eos"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr.readline().decode() == line + "\n"  # of an answer that never ends
        process.kill()


def test_a_conversation_that_outgrows_the_cache(model):
    """Said once, when a prompt does it."""
    lines = "".join(f"{'word ' * 10}{i}\n" for i in range(6))
    status, _out, err = command(model, "-q", "--ctx", "132", "--sinks", "0", *STEADY, stdin=lines.encode())
    assert status == 0
    assert re.fullmatch(
        r"kvrun: the text has \d+ tokens with this prompt, the cache keeps 132: the oldest \d+ are left out of it; "
        r"a larger --ctx keeps more\n",
        err,
    )


def test_a_seed_that_is_drawn_is_reported(model, capsys):
    options = ["-p", "a", "-n", "20", "--ignore-eos"]
    for seed in (["--seed", "-1"], []):
        _status, out, err = called(capsys, model, *options, *seed)
        drawn = re.search(r"; seed (\d+)\]", err)[1]
        assert called(capsys, model, "-q", *options, "--seed", drawn)[1] == out
    for seed in (["--seed", "5"], ["--temperature", "0"]):
        assert "seed" not in called(capsys, model, *options, *seed)[2]


# --- the model ------------------------------------------------------------------------------------


def test_the_default_model(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refused(called(capsys, "-p", "a"), str(tmp_path), "make demo", "kvrun convert")
    refused(called(capsys), "make demo")
    os.makedirs(tmp_path / "kvrun")
    os.symlink(model, default_model_path())
    assert default_model_path() == str(tmp_path / "kvrun" / "smollm2-135m-instruct.bin")
    assert called(capsys, "-q", "-p", "a", *STEADY)[0] == 0
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_model_path().startswith(os.path.expanduser("~"))


def test_files_that_are_no_model(tmp_path, capsys):
    refused(called(capsys, str(tmp_path / "none.bin"), "-p", "a"), "none.bin")
    refused(called(capsys, str(tmp_path), "-p", "a"), "folder")
    (tmp_path / "x.bin").write_bytes(b"garbage" * 100)
    refused(called(capsys, str(tmp_path / "x.bin"), "-p", "a"), "not a kvrun model file")
    refused(called(capsys, "a\nb", "-p", "a"))


def test_a_file_named_like_a_subcommand(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(model, "convert")
    assert called(capsys, "./convert", "-q", "-p", "a", *STEADY)[0] == 0
    assert called(capsys, "convert", "-p")[0] == 2


def test_subcommands(model, tmp_path, capsys):
    status, out, err = called(capsys, "inspect", model)
    assert status == 0 and out and not err
    assert called(capsys, "convert", str(tmp_path), "-o", str(tmp_path / "x.bin"))[0] == 1


# --- what goes wrong ------------------------------------------------------------------------------


def test_prompts_that_cannot_be(model, tmp_path, capsys, monkeypatch):
    for arguments in (["-p", ""], ["-p", " \n"], ["--raw", "-p", ""], ["-f", os.devnull]):
        refused(called(capsys, model, *arguments), "the prompt is empty")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    refused(called(capsys, model, "-p", "-"), "the prompt is empty")
    refused(command(model, "-p", b"caf\xe9"), "not UTF-8", "0xe9", "offset 3")
    refused(command(model, "-p", "-", stdin=b"caf\xe9"), "standard input", "not UTF-8")
    refused(command(model, stdin=b"caf\xe9\n"), "line 1 of standard input", "not UTF-8")
    assert command(model, "-q", *STEADY, stdin=b"fine\ncaf\xe9\n")[0] == 1
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    refused(called(capsys, model, "-f", str(tmp_path / "latin1")), "latin1", "not UTF-8")
    refused(called(capsys, model, "-f", str(tmp_path / "missing")), "missing: No such file")
    refused(called(capsys, model, "-f", str(tmp_path)), f"{tmp_path}: Is a directory")
    refused(called(capsys, model, "-f", ""), "'': No such file")
    if os.path.exists("/proc/self/mem"):
        refused(called(capsys, model, "-f", "/proc/self/mem"), "the prompt in /proc/self/mem cannot be read: ")
    refused(called(capsys, model, "-p", "a", "--system", os.fsdecode(b"\xff")), "system message")
    refused(called(capsys, model, "-p", "a", "--stop", os.fsdecode(b"\xff")), "stop string")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\0b\x01")))
    assert called(capsys, model, "-p", "-", *STEADY)[0] == 0


def test_a_prompt_that_does_not_end(model, capsys, monkeypatch):
    monkeypatch.setattr("kvrun.commands.arguments.LONGEST_TEXT", 1 << 20)
    refused(called(capsys, model, "-f", "/dev/zero"), "the prompt in /dev/zero is longer than 1 MiB")
    with open("/dev/zero", "rb") as endless:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(endless))
        refused(called(capsys, model, "-p", "-"), "the prompt on standard input is longer than 1 MiB")
    with open("/dev/zero", "rb") as endless:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(endless))
        monkeypatch.setattr("kvrun.commands.chat.LONGEST_TEXT", 1 << 20)
        refused(called(capsys, model), "line 1 of standard input is longer than 1 MiB")
    refused(called(capsys, "perplexity", model, "--text", "/dev/zero"), "the text in /dev/zero is longer than 1 MiB")


@pytest.mark.parametrize(
    "options, word",
    [
        (["--kv", "q9"], "f16"),
        (["--kv-k", "x"], "kv_k"),
        (["--ctx", "10"], "at least 132"),
        (["--ctx", "x"], "ctx"),
        (["--sinks", "-1"], "sinks"),
        (["--window", "1.5"], "window"),
        (["--threads", "0"], "threads"),
        (["--threads", "many"], "threads"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "hot"], "number"),
        (["--temperature", "nan"], "finite"),
        (["--top-k", "-1"], "top_k"),
        (["--top-p", "2"], "top_p"),
        (["--min-p", "-1"], "min_p"),
        (["--repeat-penalty", "0"], "repeat_penalty"),
        (["--seed", "1.5"], "seed"),
        (["--seed", str(2**64)], "18446744073709551615"),
        (["--top-k", str(2**31)], "at most 2147483647, not 2147483648"),
        (["--top-k", "9" * 5000], "top-k"),
        (["-n", "-2"], "max_tokens"),
        (["-n", "few"], "max-tokens"),
        (["--stop", ""], "stop string"),
        (["--ctx", "999999999999999"], "ctx"),
    ],
)
def test_option_values_that_cannot_be(model, capsys, options, word):
    refused(called(capsys, model, "-p", "a", *options), word)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["a", "b"],
        ["-p"],
        ["-n"],
        ["-p", "a", "-f", "b"],
        ["--temp", "1"],
        ["-p", "a", "--raw", "--system", "b"],
    ],
)
def test_wrong_usage(capsys, arguments):
    refused(called(capsys, *arguments), "--help", status=2)


def test_a_model_without_chat_template(plain, capsys):
    refused(called(capsys, plain, "-p", "a", "--system", "b"), "no chat template")
    assert called(capsys, plain, "-q", "-p", "a", *STEADY)[0] == 0
    status, _out, err = command(plain, "-q", *STEADY, stdin=b"a\nb\n")
    assert status == 0 and "no chat template" in err


def test_a_model_without_tokenizer(source, tmp_path, capsys):
    from kvrun.convert import convert

    convert(source("wide"), tmp_path / "m.bin", "f32", tokenizer=False)
    refused(called(capsys, str(tmp_path / "m.bin"), "-p", "a"), "without a tokenizer")


# --- help and version -----------------------------------------------------------------------------


def test_help_and_version(capsys):
    status, out, err = called(capsys, "--help")
    assert status == 0 and not err
    for word in ("-p", "--kv", "--ctx", "--ignore-eos", "kvrun convert", "kvrun inspect"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 100
    assert called(capsys, "--version") == (0, f"kvrun {__version__}\n", "")


# --- pipes, interruptions, terminals --------------------------------------------------------------


def test_a_locale_without_the_characters(model):
    wild = ["--temperature", "5", "--top-k", "0", "--top-p", "1", "--min-p", "0", "-n", "60", "--ignore-eos"]
    status, out, err = command(model, "-q", "-p", "a", "--seed", "1", *wild, env={"PYTHONIOENCODING": "ascii"})
    assert status == 0 and err == "" and out.isascii()


def test_chat_from_a_pipe_keeps_the_conversation(model):
    status, out, err = command(model, *STEADY, stdin=b"one\n\ntwo\r\nthree")
    assert status == 0
    session = kvrun.load(model).session()
    texts = ["".join(session.stream(p, max_tokens=12, seed=3, ignore_eos=True)) for p in ("one", "two", "three")]
    assert out.decode() == "".join(t + "\n" * (not t.endswith("\n")) for t in texts)
    assert len(err.splitlines()) == 3


def test_thinking_is_dimmed_on_a_terminal():
    class Screen(io.StringIO):
        def isatty(self):
            return True

    def shown(stream, begun, *pieces):
        out = Output(stream)
        out.expect_thinking(begun)
        for piece in pieces:
            out.write(piece)
        out.end()
        return stream.getvalue()

    dim = "\x1b[2m{}\x1b[22m".format
    assert shown(Screen(), False, "<think>a\x1b", "</think>b") == dim("<think>") + dim("a␛") + dim("</think>") + "b\n"
    assert shown(Screen(), True, "a</th", "ink>b\n") == dim("a") + dim("</think>") + "b\n"
    assert shown(Screen(), False, "<think") == "<think\n"
    assert shown(io.StringIO(), False, "<think>a</think>b") == "<think>a</think>b\n"


def test_no_think(model, plain, capsys):
    refused(called(capsys, model, "-p", "a", "--no-think"), "--no-think", "enable_thinking")
    refused(called(capsys, plain, "-p", "a", "--no-think"), "--no-think", "no chat template")
    assert called(capsys, model, "-p", "a", "--no-think", "--raw")[0] == 2


def test_chat_on_a_terminal(model):
    terminal = Terminal(model, "--ignore-eos", "--ctx", "200", "--seed", "1")
    terminal.read("Ctrl-D ends.*>")
    for prompt in ("hello\r", "two\x1b\rlines\r"):
        terminal.type(prompt)
        terminal.read(".{5000}")  # more than drawing a prompt takes: the answer, which would never end
        terminal.type("\x03")
        terminal.read(r"\[prompt \d+ tokens")
        terminal.read(">")
    terminal.type("not sent\x03")  # at the prompt Ctrl-C only drops the line
    terminal.read("not sent.*>")
    terminal.type("\x04")
    assert terminal.status() == 0


def test_a_terminal_gets_no_control_characters():
    class Screen:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    screen = Screen()
    output = Output(screen)
    output.write("a\x1b[2Jb\tc\x07\x9b\n é🚀")
    output.end()
    assert screen.text == "a␛[2Jb\tc␇\ufffd\n é🚀\n"


ANSWER, BENCH = ("-p", "Hi", "-n", "3"), ("bench", "--depth", "0", "--runs", "1", "--prefill", "8")
DECODE = (*BENCH, "--test", "decode", "--kv", "f16")


@pytest.mark.parametrize("arguments", some([ANSWER, BENCH, DECODE], [ANSWER, DECODE]), ids=" ".join)
def test_no_threads_are_to_be_had(model, arguments):
    name, *rest = arguments if arguments[0] == "bench" else ("", *arguments)
    environment = no_threads.environment(0)
    status, shown, said = command(*filter(None, [name]), model, "--threads", "4", *rest, env=environment)
    assert status == 0 and shown and "Traceback" not in said, said
