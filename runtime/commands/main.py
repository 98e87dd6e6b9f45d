"""The command `kvrun`: one answer, a chat, or a subcommand.

Exit status: 0 done, 1 a stated error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from kvrun.errors import KvrunError, OptionError
from kvrun.options import number
from kvrun.version import __version__

if TYPE_CHECKING:
    from kvrun.model import Model
    from kvrun.session import Session
    from kvrun.text.streaming import Thinking

COMMANDS = {
    "bench": "kvrun.commands.bench",
    "convert": "kvrun.convert.cli",
    "inspect": "kvrun.commands.inspect",
    "perplexity": "kvrun.commands.perplexity",
}
"""Subcommand: the module whose main(argv) runs it."""

# Their value may be any text, also one that begins with a dash.
_TEXT_OPTIONS = {
    "-p": "--prompt",
    "--prompt": "--prompt",
    "-f": "--file",
    "--file": "--file",
    "--system": "--system",
    "--stop": "--stop",
    "--session": "--session",
}
_MARK = "\0"  # put before such a value, since argparse drops one that is just "--"

_DESCRIPTION = """\
Run a language model: one answer with -p or -f, otherwise a chat.

  kvrun MODEL -p "prompt"       one answer on standard output, statistics on standard error
  kvrun MODEL                   chat until end of input (Ctrl-D); Ctrl-C stops an answer
  kvrun convert CHECKPOINT -o MODEL
                                make a model file from a Hugging Face folder or a .gguf file
  kvrun inspect MODEL           what is in a model file
  kvrun bench MODEL             speed by format of the cache and depth
  kvrun perplexity MODEL --text FILE
                                what each format of the cache costs in quality, on a text
A model file called like a subcommand is given as ./convert or ./inspect."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (those of the process by default); returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in COMMANDS:
            status = importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
        else:
            status = _run(_parse(arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
        return status or 0
    except KvrunError as error:
        return _fail(str(error))
    except SystemExit as stop:  # argparse, after --help or wrong usage
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except MemoryError as error:
        return _fail(f"not enough memory{f': {error}' if str(error) else ''}")


def default_model_path() -> str:
    """Where the default model lies: in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # the XDG specification has relative ones ignored
        folder = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return os.path.join(folder, "kvrun", "smollm2-135m-instruct.bin")


def _fail(message: str) -> int:
    text = " ".join(message.split("\n"))
    if sys.stderr is not None:
        print(f"kvrun: {text}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return 1


# --- arguments ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kvrun: {message} ({self.prog} --help shows the usage)\n")


def _text(argument: str) -> str:
    return argument.removeprefix(_MARK)


def _whole(name: str) -> dict[str, Any]:
    """Arguments of add_argument for a whole number."""

    def convert(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise OptionError(f"{name}: must be a whole number, not {text!r}") from None

    return {"metavar": "N", "type": convert}


def _real(name: str) -> dict[str, Any]:
    """Arguments of add_argument for a number."""

    def convert(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise OptionError(f"{name}: must be a number, not {text!r}") from None

    return {"metavar": "X", "type": convert}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kvrun",
        description=_DESCRIPTION,
        allow_abbrev=False,
        usage="kvrun [MODEL] [options]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
    )
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="model file; without it, the small default model")
    add("--version", action="version", version=f"kvrun {__version__}")
    add("-q", "--quiet", action="store_true", help="no statistics")
    _add_prompt_options(parser)
    _add_answer_options(parser)
    add_cache_options(parser)
    memory = parser.add_argument_group("memory and device")
    add_mmap_option(memory)
    add_device_options(memory)
    memory.add_argument("--prefault", action="store_true", help="have model and cache in memory before the first token")
    return parser


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompt").add_argument
    text, file = {"metavar": "TEXT", "type": _text}, {"metavar": "FILE", "type": _text}
    add("-p", "--prompt", **text, help="answer this prompt; - reads it from standard input")
    add("-f", "--file", **file, help="answer the prompt in this file, less a line break at its end")
    add("--system", **text, help="system message that the conversation begins with")
    add("--raw", action="store_true", help="go on from the text as it is, without the model's chat template")
    add("--no-think", action="store_true", help="tell the model to answer without thinking, if its template can")
    add("--precise", action="store_true", help="read it as precisely as the answer is made; about half as fast")
    add("--session", **file, help="go on from the session in this file if it is there; save it there at the end")


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    note = "Defaults of sampling in parentheses, where the model file has none of its own."
    add = parser.add_argument_group("answer", note).add_argument
    text = {"metavar": "TEXT", "type": _text}
    add("-n", "--max-tokens", **_whole("max-tokens"), default=-1, help="most tokens; -1: no limit (-1)")
    add("--stop", **text, action="append", default=[], help="end before this text; repeatable")
    add("--ignore-eos", action="store_true", help="go on where the model would end")
    add("--seed", **_whole("seed"), help="same seed, same text (random)")
    add("--temperature", **_real("temperature"), help="0 takes the likeliest token (0.8)")
    add("--top-k", **_whole("top-k"), help="the N likeliest tokens; 0: all (40)")
    add("--top-p", **_real("top-p"), help="the likeliest that hold this probability (0.95)")
    add("--min-p", **_real("min-p"), help="those X times as likely as the likeliest (0.05)")
    add("--repeat-penalty", **_real("repeat-penalty"), help="against repetition; 1: none (1)")


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options of `Model.session`, and `--threads`; for every command that runs a model."""
    add = parser.add_argument_group("cache and machine").add_argument
    add("--kv", metavar="FORMAT", default="f16", help="format of the key/value cache (f16)")
    add("--kv-k", metavar="FORMAT", help="format of the keys, if another")
    add("--kv-v", metavar="FORMAT", help="format of the values, if another")
    add("--ctx", **_whole("ctx"), help="tokens kept (the model's context length, at most 8192)")
    add("--sinks", **_whole("sinks"), default=4, help="first tokens that are always kept (4)")
    add("--window", **_whole("window"), help="newest tokens kept unquantised (64; 128 with q2)")
    add("--threads", **_whole("threads"), help="threads (the CPUs this process may use)")


def add_device_options(parser: Any) -> None:
    """`--device` and `--device-memory`, for every command that runs a model; `device_options` reads them."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="what runs the model: cuda is an NVIDIA GPU (cpu)")
    add("--device-memory", **_real("device-memory"), help="GB of the GPU's memory to use at most (all)")


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """As `load` takes them. OptionError for an amount of memory that is none."""
    limit = args.device_memory
    limit = None if limit is None else int(1e9 * number("device-memory", limit, low=0, high=1e6, above=True))
    return {"device": args.device, "device_memory": limit}


def add_mmap_option(parser: Any) -> None:
    parser.add_argument(
        "--no-mmap",
        dest="mmap",
        action="store_false",
        help="read the model into huge pages instead of mapping its file: starts later, decodes faster",
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(_joined(arguments))
    if args.prompt is not None and args.file is not None:
        parser.error("-p and -f: only one of them can be the prompt")
    if args.no_think and args.raw:
        parser.error("--no-think needs the chat template that --raw leaves out")
    if args.system is not None and args.raw:
        parser.error("--system needs the chat template that --raw leaves out")
    return args


def _joined(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with `-p TEXT` written as `--prompt=TEXT`, so that argparse takes any text for it."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            yield argument
            yield from rest
            return
        if argument in _TEXT_OPTIONS:
            value = next(rest, None)
            yield argument if value is None else f"{_TEXT_OPTIONS[argument]}={_MARK}{value}"
        else:
            yield argument


# --- prompts --------------------------------------------------------------------------------------


def _prompt(args: argparse.Namespace) -> str | None:
    """The prompt to answer, None for a chat. KvrunError if it is empty or no UTF-8."""
    if args.prompt == "-" or args.file == "-":
        text = utf8(_standard_input().read(), "the prompt on standard input")
    elif args.file is not None:
        with open(args.file, "rb") as file:
            text = utf8(file.read(), f"the prompt in {args.file}")
    elif args.prompt is not None:
        text = argument_text(args.prompt, "the prompt")
    else:
        return None
    if args.prompt in ("-", None):
        text = text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
    if not text.strip() and not (args.raw and text):
        raise OptionError("the prompt is empty")
    return text


def _standard_input() -> Any:
    if sys.stdin is None:
        raise OptionError("standard input is closed")
    return sys.stdin.buffer


def argument_text(argument: str, what: str) -> str:
    """An argument of the command line as text; Python hands over bytes it cannot decode as surrogates."""
    return utf8(os.fsencode(argument), what)


def utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None


# --- answers --------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    if sys.stdout is None:
        raise KvrunError("standard output is closed")
    from kvrun.model import load

    memory = {"mmap": args.mmap, "prefault": args.prefault, **device_options(args)}
    model = load(args.model or _default_model(), threads=args.threads, precise=args.precise, **memory)
    with _session(model, args) as session:
        answer = Answers(session, args)
        if prompt is not None:
            return 0 if answer(prompt) else 130
        from kvrun.commands.chat import chat

        return chat(answer)


@contextmanager
def _session(model: Model, args: argparse.Namespace) -> Iterator[Session]:
    """A session for the answers; with --session the one in that file, and saved to it at the end."""
    cache = {name: getattr(args, name) for name in ("kv", "kv_k", "kv_v", "ctx", "sinks", "window")}
    if args.session is None:
        yield model.session(**cache)
        return
    from kvrun.files.model_writer import check_output

    check_output(args.session)
    if os.path.lexists(args.session):
        session = model.restore(args.session)
        _check_cache(session, cache, args.session)
        if not args.quiet and sys.stderr is not None:
            print(f"[session {args.session}: {session.n_tokens} tokens so far]", file=sys.stderr)
    else:
        session = model.session(**cache)
    try:
        yield session
    finally:
        if session.n_tokens:
            session.save(args.session)


def _check_cache(session: Session, given: dict[str, Any], path: str) -> None:
    """A restored session has the cache it was saved with: OptionError if other options are given."""
    default = _parser().get_default
    kv = given["kv"] if given["kv"] != default("kv") else None
    wanted = {**given, "kv_k": given["kv_k"] or kv, "kv_v": given["kv_v"] or kv}
    has = {**asdict(session.cache), "kv_k": session.cache.k, "kv_v": session.cache.v}
    for name in ("kv_k", "kv_v", "ctx", "sinks", "window"):
        if wanted[name] not in (has[name], default(name)):
            option = name.replace("_", "-")
            raise OptionError(
                f"--{option}: the session in {path} has {has[name]}, not {wanted[name]}; leave the option out"
            )


def _default_model() -> str:
    path = default_model_path()
    if not os.path.exists(path):
        raise OptionError(
            f"no model is given and the default one is not there ({path}): run make demo in a "
            "checkout of kvrun, or make a model file with kvrun convert CHECKPOINT -o MODEL"
        )
    return path


class Answers:
    """Streams answers of one session to standard output, with the options of the command."""

    def __init__(self, session: Session, args: argparse.Namespace) -> None:
        self.session = session
        self.plain = args.raw or session.model.chat is None
        self._quiet = args.quiet
        self._system = None if args.system is None else argument_text(args.system, "the system message")
        if self._system is not None and self.plain:
            raise OptionError("--system: the model has no chat template")
        if args.no_think and self.plain:
            raise OptionError("--no-think: the model has no chat template")
        if args.no_think and not session.model.chat.can_think_or_not:
            raise OptionError("--no-think: the model's chat template has no switch for it (enable_thinking)")
        self._options: dict[str, Any] = {
            name: getattr(args, name)
            for name in (
                "max_tokens",
                "temperature",
                "top_k",
                "top_p",
                "min_p",
                "repeat_penalty",
                "seed",
                "ignore_eos",
                "raw",
            )
        }
        self._options["think"] = not args.no_think
        self._options["stop"] = [argument_text(stop, "the stop string") for stop in args.stop]
        self._out = _Output(sys.stdout)

    def __call__(self, prompt: str) -> bool:
        """Answer a prompt; False if Ctrl-C ended it. What was shown by then stays in the session."""
        turn: Any = prompt
        if self._system is not None and not self.session.messages:
            turn = [{"role": "system", "content": self._system}, {"role": "user", "content": prompt}]
        stream, complete = None, False
        try:
            stream = self.session.stream(turn, **self._options)
            if not self.plain:
                self._out.expect_thinking(self.session.answer_begins_thinking)
            for piece in stream:
                self._out.write(piece)
            complete = True
        except KeyboardInterrupt:
            if stream is not None:
                stream.close()
        self._out.end()
        if not self._quiet:
            self._report()
        return complete

    def _report(self) -> None:
        session, stats = self.session, self.session.stats
        parts = [
            f"prompt {_rate(stats.prompt_tokens, stats.prompt_tokens_per_second)}",
            f"answer {_rate(stats.answer_tokens, stats.decode_tokens_per_second)}",
            f"KV cache {session.kv_bytes / 1e6:.1f} MB",
        ]
        if session.n_tokens > session.cache.ctx:
            parts.append(f"{session.n_tokens} tokens so far, the cache keeps {session.cache.ctx}")
        if sys.stderr is not None:
            print("[" + "; ".join(parts) + "]", file=sys.stderr, flush=True)


def _rate(tokens: int, speed: float) -> str:
    return f"{tokens} tokens" + (f", {speed:.1f} tok/s" if speed else "")


class _Output:
    """Text to a stream at once. A terminal gets no control characters that a model may have written, and its
    thinking dimmed."""

    _visible = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._at_line_start = True
        self._thinking: Thinking | None = None
        if hasattr(stream, "reconfigure"):  # a locale that lacks a character must not end the answer
            stream.reconfigure(errors="replace")

    def expect_thinking(self, begun: bool) -> None:
        """The answer that comes may begin with thinking; `begun`: it goes on with it."""
        if self._terminal and os.environ.get("TERM") != "dumb":
            from kvrun.text.streaming import Thinking

            self._thinking = Thinking(begun)

    def write(self, text: str) -> None:
        self._show(self._thinking.push(text) if self._thinking else [(text, False)])

    def _show(self, parts: list[tuple[str, bool]]) -> None:
        for text, dim in parts:
            shown = text.translate(self._visible) if self._terminal else text
            # Each part ends as it began, so that nothing is left dimmed whenever it ends.
            self._stream.write(f"\x1b[2m{shown}\x1b[22m" if dim else shown)
            self._at_line_start = text.endswith("\n")
        self._stream.flush()

    def end(self) -> None:
        if self._thinking:
            self._show(self._thinking.finish())
            self._thinking = None
        if not self._at_line_start:
            self.write("\n")
