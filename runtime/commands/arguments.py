"""Arguments of the commands: the one parser, what several commands take, and text that must be UTF-8."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from kvrun.errors import OptionError
from kvrun.options import number


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
            raise OptionError(f"{name}: must be a whole number, not {text!r}") from None

    return {"metavar": "N", "type": convert}


def real(name: str) -> dict[str, Any]:
    """Arguments of add_argument for a number."""

    def convert(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise OptionError(f"{name}: must be a number, not {text!r}") from None

    return {"metavar": "X", "type": convert}


# --- options of several commands -------------------------------------------------------------------


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options of `Model.session`, and `--threads`; for every command that runs a model."""
    add = parser.add_argument_group("cache and machine").add_argument
    add("--kv", metavar="FORMAT", default="f16", help="format of the key/value cache (f16)")
    add("--kv-k", metavar="FORMAT", help="format of the keys, if another")
    add("--kv-v", metavar="FORMAT", help="format of the values, if another")
    add("--ctx", **whole("ctx"), help="tokens kept (the model's context length, at most 8192)")
    add("--sinks", **whole("sinks"), default=4, help="first tokens that are always kept (4)")
    add("--window", **whole("window"), help="newest tokens kept unquantised (64; 128 with q2)")
    add("--threads", **whole("threads"), help="threads (the CPUs this process may use)")


def add_device_options(parser: Any) -> None:
    """`--device` and `--device-memory`, for every command that runs a model; `device_options` reads them."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="what runs the model: cuda is an NVIDIA GPU (cpu)")
    add("--device-memory", **real("device-memory"), help="GB of the GPU's memory to use at most (all)")


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


# --- text -------------------------------------------------------------------------------------------


def argument_text(argument: str, what: str) -> str:
    """An argument of the command line as text; Python hands over bytes it cannot decode as surrogates."""
    return utf8(os.fsencode(argument), what)


def utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None


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
