"""`kvrun convert`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvrun.commands.arguments import Parser
from kvrun.commands.progress import stages
from kvrun.errors import ConvertError, one_line

_EPILOG = """\
types:
  same    keep the type, and every value, of tensors that have one of those below; others are dequantised:
          Q2_K and Q3_K become q6_k, fp8 becomes bf16, all other types of GGUF become q8_0
  f32, f16, bf16
          plain numbers
  q8_0, q6_k, q4_1, q4_k, q4_0
          8.5, 6.6, 5.0, 4.5 and 4.5 bits per weight, GGML's arithmetic; q4_k is better than q4_1 and q4_0.
          All matrices are quantised but routers of experts; with q4_1 and q4_0 embedding and output head
          become q8_0, with q4_k q6_k (a GGUF file that has them in the type asked for keeps them). A tensor
          that already has its type keeps every value.
  q4_k_m  q4_k, but q6_k for the output head and, in half of the layers, V and down: llama.cpp's Q4_K_M

q4_k and q6_k take a multiple of 256 columns; a tensor with another number becomes q4_1 or q8_0.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "kvrun convert", "Make a model file from a Hugging Face checkpoint folder or a GGUF file.", epilog=_EPILOG
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json, or a .gguf file")
    parser.add_argument("-o", "--output", metavar="MODEL", required=True, help="the model file to write")
    parser.add_argument(
        "--type",
        metavar="T",
        default="same",
        type=_weight_type,
        help="same (default), f32, f16, bf16, q8_0, q6_k, q4_k_m, q4_k, q4_1 or q4_0",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out (token ids only)")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the summary even when piped")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status. Errors are raised, for `kvrun.commands.main.main` to state."""
    args = build_parser().parse_args(argv)
    from kvrun.convert.pipeline import convert

    try:
        with _terminable(), stages() as progress:
            result = convert(
                args.checkpoint, args.output, args.type, tokenizer=not args.no_tokenizer, progress=progress
            )
    except MemoryError:
        raise ConvertError(f"{args.checkpoint}: not enough memory to convert it") from None
    if args.verbose or sys.stdout.isatty():
        _print_summary(result)
    return 0


def _weight_type(value: str) -> str:
    from kvrun.convert.weight_types import TYPES

    if value not in TYPES:
        raise argparse.ArgumentTypeError(f"unknown type {value!r} (choose from {', '.join(TYPES)})")
    return value


def _print_summary(result: Any) -> None:
    model = result.model
    types: dict[str, int] = {}
    for weight in model.weights.values():
        types[weight.type] = types.get(weight.type, 0) + 1
    lines = [
        f"{model.path}: {model.description.name} ({model.description.architecture})",
        *result.notes,
        f"{model.nbytes / 1e6:.1f} MB, {result.n_weights / 1e6:.1f} M weights at "
        f"{result.bits_per_weight:.2f} bits: " + ", ".join(f"{count} {name}" for name, count in sorted(types.items())),
        f"read back: all {len(model.tensor_nbytes)} checksums match; {result.seconds:.1f} s",
    ]
    print("\n".join(map(one_line, lines)), flush=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that the temporary file is removed."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
