"""`kvrun MODEL`: one answer with -p or -f, otherwise a chat."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvrun.commands.arguments import (
    Parser,
    add_answer_options,
    add_cache_options,
    add_device_options,
    add_load_option,
    add_option,
    any_text,
    argument_text,
    default_model,
    given,
    joined,
    load_options,
    read_text,
    refuse_empty,
    standard_input,
    stream_options,
)
from kvrun.commands.output import Output
from kvrun.commands.signals import finishing
from kvrun.errors import OptionError
from kvrun.model import Model, load
from kvrun.options import AnswerKeywords, CacheKeywords, declared
from kvrun.version import __version__

if TYPE_CHECKING:
    from kvrun.session import Session

_TEXT_OPTIONS = {
    "-p": "--prompt",
    "--prompt": "--prompt",
    "-f": "--file",
    "--file": "--file",
    "--system": "--system",
    "--stop": "--stop",
    "--session": "--session",
}

_DESCRIPTION = """\
Run a language model: one answer with -p or -f, otherwise a chat.

  kvrun MODEL -p "prompt"       one answer on standard output, statistics on standard error
  kvrun MODEL                   chat until end of input (Ctrl-D); Ctrl-C stops an answer
  kvrun batch MODEL PROMPTS.jsonl -o ANSWERS.jsonl
                                many prompts, several at once
  kvrun convert CHECKPOINT -o MODEL
                                make a model file from a Hugging Face folder or a .gguf file
  kvrun inspect MODEL           what is in a model file
  kvrun bench MODEL             speed by format of the cache and depth
  kvrun perplexity MODEL --text FILE
                                what each format of the cache costs in quality, on a text
A model file called like a subcommand is given as ./convert or ./inspect."""


def main(argv: Sequence[str]) -> int:
    """Answer the prompt, or chat; the exit status. KeyboardInterrupt if Ctrl-C ended the answer."""
    args = _parse(argv)
    prompt = _prompt(args)
    model = load(args.model or default_model(), **load_options(args))
    with _session(model, args) as session:
        answer = Answers(session, args)
        if prompt is not None:
            if not answer(prompt):
                raise KeyboardInterrupt
            return 0
        from kvrun.commands.chat import chat

        return chat(answer)


# --- arguments ----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser("kvrun", _DESCRIPTION, usage="kvrun [MODEL] [options]")
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="model file; without it, the small default model")
    add("--version", action="version", version=f"kvrun {__version__}")
    add("-q", "--quiet", action="store_true", help="no statistics")
    _add_prompt_options(parser)
    add_answer_options(parser)
    add_cache_options(parser)
    memory = parser.add_argument_group("memory and device")
    add_load_option(memory, "mmap")
    add_device_options(memory)
    add_load_option(memory, "prefault")
    return parser


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    add = group.add_argument
    text: dict[str, Any] = {"metavar": "TEXT", "type": any_text}
    file = {**text, "metavar": "FILE"}
    add("-p", "--prompt", **text, help="answer this prompt; - reads it from standard input")
    add("-f", "--file", **file, help="answer the prompt in this file, less a line break at its end")
    add("--system", **text, help="system message that the conversation begins with")
    for name in ("raw", "think"):
        add_option(group, declared(AnswerKeywords)[name])
    add_load_option(group, "precise")
    add("--session", **file, help="go on from the session in this file if it is there; save it there at the end")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(joined(arguments, _TEXT_OPTIONS))
    if args.prompt is not None and args.file is not None:
        parser.error("-p and -f: only one of them can be the prompt")
    if args.think is False and args.raw:
        parser.error("--no-think needs the chat template that --raw leaves out")
    if args.system is not None and args.raw:
        parser.error("--system needs the chat template that --raw leaves out")
    return args


# --- prompts --------------------------------------------------------------------------------------


def _prompt(args: argparse.Namespace) -> str | None:
    """The prompt to answer, None for a chat. KvrunError if it is empty or no UTF-8."""
    if args.prompt == "-" or args.file == "-":
        text = read_text(standard_input(), "the prompt on standard input")
    elif args.file is not None:
        with open(args.file, "rb") as file:
            text = read_text(file, f"the prompt in {args.file}")
    elif args.prompt is not None:
        text = argument_text(args.prompt, "the prompt")
    else:
        return None
    if args.prompt in ("-", None):
        text = text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
    refuse_empty(text, args.raw)
    return text


# --- answers --------------------------------------------------------------------------------------


@contextmanager
def _session(model: Model, args: argparse.Namespace) -> Iterator[Session]:
    """A session for the answers; with --session the one in that file, and saved to it at the end."""
    cache = given(args, CacheKeywords)
    if args.session is None:
        yield model.session(**cache)
        return
    from kvrun.files.safe_file import check_output

    check_output(args.session)
    if os.path.lexists(args.session):
        session = model.restore(args.session)
        _check_cache(session, cache, args.session)
        if not args.quiet:
            print(f"[session {args.session}: {session.n_tokens} tokens so far]", file=sys.stderr)
    else:
        session = model.session(**cache)
    stopped = False
    try:
        yield session
    except (KeyboardInterrupt, SystemExit):
        stopped = True
        raise
    finally:
        with finishing(stopped):
            if session.n_tokens:
                session.save(args.session)


def _check_cache(session: Session, given: dict[str, Any], path: str) -> None:
    """A restored session has the cache it was saved with: OptionError if other options are given."""
    wanted = {**given, "kv_k": given["kv_k"] or given["kv"], "kv_v": given["kv_v"] or given["kv"]}
    has = {**asdict(session.cache), "kv_k": session.cache.k, "kv_v": session.cache.v}
    for name in ("kv_k", "kv_v", "ctx", "sinks", "window"):
        if wanted[name] not in (has[name], None):
            option = (name if given.get(name) is not None else "kv").replace("_", "-")
            raise OptionError(
                f"--{option}: the session in {path} has {has[name]}, not {wanted[name]}; leave the option out"
            )


class Answers:
    """Streams answers of one session to standard output, with the options of the command."""

    def __init__(self, session: Session, args: argparse.Namespace) -> None:
        self.session = session
        template = session.model.chat
        self.plain = args.raw or template is None
        self._quiet = args.quiet
        self._system = None if args.system is None else argument_text(args.system, "the system message")
        if self._system is not None and self.plain:
            raise OptionError("--system: the model has no chat template")
        if args.think is False:
            check_no_think(session.model)
        self._options = stream_options(args)
        session.model.draft_model(args.spec)  # what is wrong with it is no prompt's fault
        self._out = Output(sys.stdout)

    def __call__(self, prompt: str) -> bool:
        """Answer a prompt; False if Ctrl-C ended it. What was shown by then stays in the session."""
        turn: Any = prompt
        if self._system is not None and not self.session.messages:
            turn = [{"role": "system", "content": self._system}, {"role": "user", "content": prompt}]
        stream, complete = None, False
        try:
            before = self.session.n_tokens
            stream = self.session.stream(turn, **self._options)
            self._warn(before)
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

    def _warn(self, before: int) -> None:
        """Say that the answer will be made without some of the text: each time of a prompt, once of a conversation."""
        session, stats = self.session, self.session.stats
        ctx, sinks = session.cache.ctx, session.cache.sinks
        after = f" after the first {sinks}" if sinks else ""
        rest = f"the oldest {{}}{after} are left out of it; a larger --ctx keeps more"
        if stats.prompt_overflow:
            size, dropped = stats.prompt_overflow + ctx, stats.prompt_overflow
            _note(f"the prompt has {size:,} tokens, the cache keeps {ctx:,}: " + rest.format(f"{dropped:,}"))
        elif stats.evicted_tokens and before <= ctx:
            size, dropped = stats.evicted_tokens + ctx, stats.evicted_tokens
            _note(
                f"the text has {size:,} tokens with this prompt, the cache keeps {ctx:,}: "
                + rest.format(f"{dropped:,}")
            )

    def _report(self) -> None:
        session, stats = self.session, self.session.stats
        parts = [
            f"prompt {_rate(stats.prompt_tokens, stats.prompt_tokens_per_second)}",
            f"answer {_rate(stats.answer_tokens, stats.decode_tokens_per_second)}",
            f"KV cache {session.kv_bytes / 1e6:.1f} MB",
        ]
        if stats.seed is not None and (self._options["seed"] is None or self._options["seed"] < 0):
            parts.append(f"seed {stats.seed}")
        if self._options["spec"] not in (None, "none"):
            parts.append(f"{stats.accepted_tokens} of {stats.drafted_tokens} drafted tokens accepted")
        if stats.evicted_tokens:
            parts.append(f"{session.n_tokens} tokens so far, the cache keeps {session.cache.ctx}")
        print("[" + "; ".join(parts) + "]", file=sys.stderr, flush=True)


def check_no_think(model: Model) -> None:
    """OptionError if the model cannot be told not to think."""
    if model.chat is None:
        raise OptionError("--no-think: the model has no chat template")
    if not model.chat.without_thinking:
        raise OptionError("--no-think: the model's chat template has no switch for it (enable_thinking)")


def _note(text: str) -> None:
    print("kvrun:", text, file=sys.stderr, flush=True)


def _rate(tokens: int, speed: float) -> str:
    return f"{tokens} tokens" + (f", {speed:.1f} tok/s" if speed else "")
