"""`kvrun convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from kvrun.commands.arguments import Parser
from kvrun.commands.progress import stages
from kvrun.errors import ConvertError, one_line


def build_parser() -> argparse.ArgumentParser:
    from kvrun.convert.weight_types import TYPES, types_help

    parser = Parser(
        "kvrun convert", "Make a model file from a Hugging Face checkpoint folder or a GGUF file.", epilog=types_help()
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json, or a .gguf file")
    parser.add_argument("-o", "--output", metavar="MODEL", required=True, help="the model file to write")
    parser.add_argument(
        "--type",
        metavar="T",
        default="same",
        type=_weight_type,
        help=f"same (default), or {', '.join(kind for kind in TYPES if kind != 'same')}",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out (token ids only)")
    parser.add_argument(
        "--strict", action="store_true", help="refuse a checkpoint with tensors that the model does not need"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print the summary even when piped")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status. Errors are raised, for `kvrun.commands.main.main` to state."""
    args = build_parser().parse_args(argv)
    from kvrun.convert.pipeline import convert

    try:
        with stages() as progress:
            result = convert(
                args.checkpoint,
                args.output,
                args.type,
                tokenizer=not args.no_tokenizer,
                strict=args.strict,
                progress=progress,
            )
    except MemoryError:
        raise ConvertError(f"{args.checkpoint}: not enough memory to convert it") from None
    for note in result.notes:
        print("kvrun:", one_line(note), file=sys.stderr)
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
        f"{model.nbytes / 1e6:.1f} MB, {result.n_weights / 1e6:.1f} M weights at "
        f"{result.bits_per_weight:.2f} bits: " + ", ".join(f"{count} {name}" for name, count in sorted(types.items())),
        f"read back: all {len(model.tensor_nbytes)} checksums match; {result.seconds:.1f} s",
    ]
    print("\n".join(map(one_line, lines)), flush=True)
