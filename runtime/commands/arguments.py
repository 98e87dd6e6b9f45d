"""Arguments of the commands: the one parser, what several commands take, and text that must be UTF-8."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NoReturn

from kvrun.errors import OptionError
from kvrun.options import (
    AnswerKeywords,
    CacheKeywords,
    LoadKeywords,
    Option,
    SamplingKeywords,
    SpeculationKeywords,
    StreamKeywords,
    declared,
    number,
    shown,
)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, whose options are written out, and whose description is kept as it is.

    `parse_args` raises SystemExit after --help (status 0) and for wrong usage (2).
    """

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
            **options,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kvrun: {message} ({self.prog} --help shows the usage)\n")


def whole(name: str) -> dict[str, Any]:
    """Arguments of add_argument for a whole number."""

    def convert(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise OptionError(f"{name}: must be a whole number, not {shown(text)}") from None

    return {"metavar": "N", "type": convert}


def real(name: str) -> dict[str, Any]:
    """Arguments of add_argument for a number."""

    def convert(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise OptionError(f"{name}: must be a number, not {shown(text)}") from None

    return {"metavar": "X", "type": convert}


def several(name: str, type: Callable[[str], Any] = str, **more: Any) -> dict[str, Any]:
    """Arguments of add_argument for values with spaces or commas between them, each made by `type` and, where these are
    given, one of `choices`; `more`: other arguments."""
    choices = more.pop("choices", None)

    class Extend(argparse.Action):
        def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
            text = values if isinstance(values, str) else " ".join(values)
            items = re.split(r"\s*,\s*|\s+", text.strip())
            if "" in items:
                raise OptionError(f"{name}: a value is missing in {shown(text)}")
            for item in items:
                if choices is not None and item not in choices:
                    raise argparse.ArgumentError(self, f"{shown(item)} is not one of {', '.join(choices)}")
            setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), *map(type, items)])

    return {"nargs": "+", "action": Extend, **more}


# --- declared options --------------------------------------------------------------------------------


def add_option(parser: Any, option: Option, *, usual: str | None = None, **more: Any) -> None:
    """The argument of a declared option, None where it is not given. `usual`: its default here, if another; `more`
    goes to `add_argument`."""
    names = [option.short] if option.short else []
    dashed = option.name.replace("_", "-")
    usual = option.default_text if usual is None else usual
    if option.kind is bool:
        names.append(f"--no-{dashed}" if option.default else f"--{dashed}")
        kind: dict[str, Any] = {"action": "store_const", "const": not option.default}
    else:
        names.append(f"--{dashed}")
        kind = {int: whole, float: real}[option.kind](dashed) if option.kind in (int, float) else {}
        kind |= {"choices": option.choices} if option.choices else {}
    text = option.help + (f" ({usual})" if usual else "")
    parser.add_argument(*names, **{"dest": option.name, "help": text, **kind, **more})


def given(args: argparse.Namespace, group: type) -> dict[str, Any]:
    """The options of a group that the arguments have, None for those that are not given."""
    return {name: getattr(args, name) for name in declared(group) if hasattr(args, name)}


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options of `Model.session`, and `--threads`."""
    group = parser.add_argument_group("cache and machine")
    for option in declared(CacheKeywords).values():
        add_option(group, option, **({"metavar": "FORMAT"} if option.kind is str else {}))
    add_load_option(group, "threads")


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Where an answer ends, how its tokens are chosen, and what is drafted. `--stop` is an `any_text`."""
    note = "Defaults of sampling in parentheses, where the model file has none of its own."
    group = parser.add_argument_group("answer", note)
    options = declared(AnswerKeywords)
    add_option(group, options["max_tokens"])
    add_option(group, options["stop"], metavar="TEXT", type=any_text, action="append")
    add_option(group, options["ignore_eos"])
    for option in declared(SamplingKeywords).values():
        add_option(group, option)
    group = parser.add_argument_group("speed")
    for option in declared(SpeculationKeywords).values():
        add_option(group, option, **({"metavar": "ngram|MODEL"} if option.name == "spec" else {}))


def stream_options(args: argparse.Namespace) -> dict[str, Any]:
    """As `Session.stream` takes them. OptionError for a stop string that is not UTF-8."""
    return {
        **given(args, StreamKeywords),
        "stop": [argument_text(stop, "the stop string") for stop in args.stop or ()],
    }


def add_load_option(parser: Any, name: str) -> None:
    """An option of `load` by its name."""
    add_option(parser, declared(LoadKeywords)[name])


def add_device_options(parser: Any) -> None:
    """`--device` and `--device-memory`, for every command that runs a model."""
    add_load_option(parser, "device")
    parser.add_argument("--device-memory", **real("device-memory"), help="GB of the GPU's memory to use at most (all)")


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """As `load` takes them. OptionError if `--device-memory` is not a positive number."""
    limit = args.device_memory
    limit = None if limit is None else int(1e9 * number("device-memory", limit, low=0, high=1_000_000, above=True))
    return {**given(args, LoadKeywords), "device_memory": limit}


# --- options whose value may be any text ------------------------------------------------------------


_MARK = "\0"  # put before such a value, since argparse drops one that is just "--"


def joined(arguments: Iterable[str], options: Mapping[str, str]) -> Iterator[str]:
    """The arguments with `-p TEXT` written as `--prompt=TEXT`, so that argparse takes any text for it, also one that
    begins with a dash. `options`: those that are, and their long names; their type must be `any_text`."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            yield argument
            yield from rest
            return
        if argument in options:
            value = next(rest, None)
            yield argument if value is None else f"{options[argument]}={_MARK}{value}"
        else:
            yield argument


def any_text(argument: str) -> str:
    """The type of such an option."""
    return argument.removeprefix(_MARK)


# --- text -------------------------------------------------------------------------------------------


def argument_text(argument: str, what: str) -> str:
    """An argument of the command line as text; Python hands over bytes it cannot decode as surrogates."""
    return utf8(os.fsencode(argument), what)


def utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None


LONGEST_TEXT = 64 << 20
"""Bytes of a text that is read, from a file or a pipe."""


def read_text(file: BinaryIO, what: str) -> str:
    """All of a text. OptionError if it cannot be read, is not UTF-8, or longer than any should be: a device may never
    end."""
    try:
        data = file.read(LONGEST_TEXT + 1)
    except OSError as error:
        raise OptionError(f"{what} cannot be read: {error.strerror}") from None
    if len(data) > LONGEST_TEXT:
        raise OptionError(f"{what} is longer than {LONGEST_TEXT >> 20} MiB")
    return utf8(data, what)


def refuse_empty(prompt: str, raw: bool) -> None:
    """OptionError for a prompt without text; plain text to go on from may be white space."""
    if not prompt.strip() and not (raw and prompt):
        raise OptionError("the prompt is empty")


def standard_input() -> Any:
    """The bytes of standard input. OptionError if it is closed."""
    if sys.stdin is None:
        raise OptionError("standard input is closed")
    return sys.stdin.buffer


# --- the default model ------------------------------------------------------------------------------


def default_model_path() -> str:
    """Where the default model lies: in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # the XDG specification has relative ones ignored
        folder = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return os.path.join(folder, "kvrun", "smollm2-135m-instruct.bin")


def default_model() -> str:
    """The default model's file. OptionError if it is not there."""
    path = default_model_path()
    if not os.path.exists(path):
        raise OptionError(
            f"no model is given and the default one is not there ({path}): run make demo in a "
            "checkout of kvrun, or make a model file with kvrun convert CHECKPOINT -o MODEL"
        )
    return path
