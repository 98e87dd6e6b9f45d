"""The chat of the command `kvrun MODEL`: with line editing on a terminal, line by line from a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kvrun.commands.arguments import LONGEST_TEXT, utf8
from kvrun.errors import KvrunError, OptionError

if TYPE_CHECKING:
    from kvrun.commands.answer import Answers


def chat(answer: Answers) -> int:
    """Answer what is typed until the end of input; returns the exit status. KeyboardInterrupt after Ctrl-C in an answer
    that is not typed for."""
    if sys.stdin is None:
        raise OptionError("standard input is closed")
    if answer.plain:
        print("kvrun: no chat template: the model goes on from your text as it is", file=sys.stderr)
    return _typed(answer) if sys.stdin.isatty() and sys.stdout.isatty() else _piped(answer)


def _piped(answer: Answers) -> int:
    lines = iter(lambda: sys.stdin.buffer.readline(LONGEST_TEXT + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST_TEXT:
            raise OptionError(f"line {number} of standard input is longer than {LONGEST_TEXT >> 20} MiB")
        prompt = utf8(line, f"line {number} of standard input").rstrip("\r\n")
        if prompt.strip() and not answer(prompt):
            raise KeyboardInterrupt
    return 0


def _typed(answer: Answers) -> int:
    from prompt_toolkit import PromptSession

    session: Any = PromptSession(
        "> ", multiline=True, key_bindings=_keys(), prompt_continuation="  ", reserve_space_for_menu=0
    )
    print("Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = session.prompt()
        except KeyboardInterrupt:  # drops the line being typed
            continue
        except EOFError:
            return 0
        if not prompt.strip():
            continue
        try:
            answer(prompt)
        except KvrunError as error:  # this prompt cannot be answered; the next one may be
            print(f"kvrun: {error}", file=sys.stderr)


def _keys() -> Any:
    """Enter sends, although pasted text and Alt-Enter may make several lines."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys
