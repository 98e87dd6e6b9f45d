"""`kvrun perplexity`: the command, and its table; `kvrun.measure.quality` measures, `kvrun.measure.plots` draws."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kvrun import _core
from kvrun.commands.arguments import (
    Parser,
    add_device_options,
    add_load_option,
    add_option,
    load_options,
    read_text,
    several,
    whole,
)
from kvrun.commands.progress import counted
from kvrun.measure import plots
from kvrun.measure.caches import REFERENCE, cache_options, default_formats, fitting
from kvrun.measure.quality import measure, results, text_chunks
from kvrun.model import load
from kvrun.options import CacheKeywords, CacheOptions, declared, integer
from kvrun.session import new_cache

CTX = 2048

_DESCRIPTION = """\
Measure what each format of the key/value cache costs in quality.

The text is cut into chunks of --ctx tokens and the second half of each is scored, every token seeing the
cache as in decoding. Shown for each format: perplexity and its ratio to that with an exact (f32) cache, the
mean Kullback-Leibler divergence of the next token's distribution from the exact one, and how often both find
the same token the likeliest.

Chunks run with activations as precise as in decoding. Those of ordinary prefill, int8 for block-quantised
weights, round away more than a good cache does and would hide it; --fast uses them in half the time."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("kvrun perplexity", _DESCRIPTION)
    add = parser.add_argument
    add("model", metavar="MODEL", help="model file")
    add("--text", metavar="FILE", required=True, help="UTF-8 text to measure on")
    add(
        "--kv",
        **several("kv", metavar="FORMAT"),
        help=f"cache formats, K/V for a pair ({' '.join(default_formats())})",
    )
    add("--ctx", **whole("ctx"), help="tokens of a chunk (2048, or the model's context length if less)")
    add("--chunks", **whole("chunks"), help="most chunks to read (all)")
    add("--cache-ctx", **whole("cache-ctx"), help="tokens the caches keep; the exact one keeps all (all)")
    add_option(parser, declared(CacheKeywords)["sinks"])
    add_option(parser, declared(CacheKeywords)["window"], usual="by format")
    add_load_option(parser, "threads")
    add_device_options(parser)
    add("--fast", action="store_true", help="activations of ordinary prefill, for a rough figure")
    add("--json", action="store_true", help="machine-readable output")
    add("--plot", metavar="FILE", help="draw KL divergence and agreement by bits; .png, .svg or .pdf")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status. Errors are raised, for `kvrun.commands.main.main` to state."""
    args = build_parser().parse_args(argv)
    if args.plot is not None:
        plots.check(args.plot)
    report = run(args)
    if args.plot is not None:
        plots.quality(report, args.plot)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The report, as JSON has it."""
    chunk_limit = None if args.chunks is None else integer("chunks", args.chunks, low=1)
    with open(args.text, "rb") as file:
        text = read_text(file, f"the text in {args.text}").removeprefix("\ufeff")
    model = load(args.model, precise=not args.fast, **load_options(args))
    length = model.description.context_length
    ctx = min(CTX, length) if args.ctx is None else integer("ctx", args.ctx, low=4, high=1 << 24)
    options = _caches(args, length, ctx)
    chunks, n_tokens = text_chunks(model, text, ctx, chunk_limit)
    engine = model.engine
    caches = [new_cache(engine, cache) for _, cache in options]
    with counted("tokens", len(chunks) * (ctx - 1) * len(caches)) as advance:
        scores = measure(engine, chunks, caches, advance)
    return {
        "model": args.model,
        "text": args.text,
        "tokens": n_tokens,
        "ctx": ctx,
        "chunks": len(chunks),
        "scored_tokens": scores[0].tokens,
        "sinks": options[0][1].sinks,
        "precise": not args.fast,
        "isa": _core.isa(),
        "threads": model.threads,
        "results": [asdict(result) for result in results(options, scores)],
    }


def _caches(args: argparse.Namespace, length: int, ctx: int) -> list[tuple[str, CacheOptions]]:
    """The exact cache, which keeps the whole chunk, then those asked for, each once."""
    sizes = {"sinks": args.sinks, "window": args.window}
    exact = fitting(REFERENCE, length, ctx, **sizes)
    names = args.kv or default_formats()
    if args.cache_ctx is None:
        others = [fitting(name, length, ctx, **sizes) for name in names]
    else:
        others = [cache_options(name, length, ctx=args.cache_ctx, **sizes) for name in names]
    return [exact, *(item for item in dict(others).items() if item != exact)]


def show(report: dict[str, Any]) -> None:
    """The report as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("cache", "bits", "window", "perplexity", "ratio", "KL mean", "top-1"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in _rows(report["results"]):
        table.add_row(*row)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 100)
    console.print(table)
    tokens, ctx = report["results"][-1]["cache_ctx"], report["ctx"]
    ring = f", caches that keep {tokens}" if tokens < ctx else ""
    console.print(
        f"{report['scored_tokens']} tokens scored, {report['chunks']} chunks of {ctx}{ring}; "
        f"{report['sinks']} sinks; "
        + ("activations as in decoding" if report["precise"] else "activations of ordinary prefill (--fast)")
    )


def _rows(entries: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    for i, entry in enumerate(entries):
        yield [
            entry["kv"] + (" (exact)" if i == 0 else ""),
            f"{entry['bpv']:g}",
            str(entry["window"]),
            f"{entry['perplexity']:.4f}",
            f"{entry['ratio']:.5f}",
            f"{entry['kl_mean']:.6f}" if i else "",
            f"{100 * entry['top1_agreement']:.2f} %" if i else "",
        ]
