"""`kvrun bench`: the command, and its table; `kvrun.measure.speed` measures, `kvrun.measure.plots` draws."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from kvrun.commands.arguments import (
    Parser,
    add_device_options,
    add_load_option,
    add_option,
    default_model,
    load_options,
    real,
    several,
    whole,
)
from kvrun.commands.progress import announced_steps
from kvrun.errors import OptionError
from kvrun.measure import plots
from kvrun.measure.caches import cache_options, default_formats
from kvrun.measure.neighbours import KINDS, MAX_NEIGHBOURS, STREAMED
from kvrun.measure.speed import ROOM, TESTS, Bench, Contention, Plan, Shape, physical_memory
from kvrun.model import load
from kvrun.options import DEFAULT_KV, MAX_CTX, MAX_PARALLEL, CacheKeywords, declared, integer, number

DEFAULT_TESTS = ("prefill", "decode")
ON_CPU = ("attention", "contention")  # not on other devices
DEPTHS, PREFILLS = (0, 512, 2048, 7680), (512, 4096)
RUNS, PATIENCE = 3, 8.0  # the latter in seconds
MAX_TOKENS = 256  # of the cache test
PARALLEL = (1, 2, 4, 8)
NEIGHBOURS, SECONDS = (0, 1, 2, 4, 6), 2.0  # of the contention test

_DESCRIPTION = """\
Measure speed by format of the key/value cache.

  prefill     many prompt tokens at once, into an empty cache
  decode      one token at a time, with --depth tokens in the cache
  batch       a token of each of --parallel texts in one step, with --depth tokens in each cache
  attention   the attention part of a decode step alone; its layers are repeated until they
              outgrow the CPU's own caches
  cache       the same text generated with the cache, and without it, where every step
              computes all tokens anew
  contention  decode beside --neighbours other processes that keep a CPU busy each, in tokens a
              second, as a share of what is fair, and by the longest step

Formats take turns and figures are medians. "of memory" is the bytes that a token reads (weights
and cache) times speed, as a share of the memory's read bandwidth measured in the same run."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("kvrun bench", _DESCRIPTION)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="model file; without it, the small default model")
    add(
        "--test",
        **several("test", choices=(*TESTS, "all"), nargs=None, metavar="TEST"),
        help=f"{', '.join(TESTS)} or all; repeatable (prefill and decode)",
    )
    add(
        "--depth",
        **several("depth", **whole("depth")),
        help=f"tokens in the cache ({_list(DEPTHS)}, as the model allows; contention: 0)",
    )
    add("--prefill", **several("prefill", **whole("prefill")), help=f"tokens of a prompt ({_list(PREFILLS)}, likewise)")
    add(
        "--kv",
        **several("kv", metavar="FORMAT"),
        help=f"cache formats, K/V for a pair ({_list(default_formats())}; contention: {DEFAULT_KV})",
    )
    add(
        "--shape",
        **several("shape", metavar="SHAPE"),
        help="attention of one layer of another model: HEADS/KV_HEADS/HEAD_DIM, such as 32/8/128",
    )
    add(
        "-n",
        "--max-tokens",
        **whole("max-tokens"),
        help=f"tokens that the cache test generates ({MAX_TOKENS})",
    )
    add(
        "--neighbours",
        **several("neighbours", **whole("neighbours")),
        help=f"busy processes beside the contention test, besides none ({_list(NEIGHBOURS)})",
    )
    add(
        "--neighbour-kind",
        choices=KINDS,
        help=f"what they do: arithmetic, or copying memory, {STREAMED >> 20} MiB each ({KINDS[0]})",
    )
    add(
        "--parallel",
        **several("parallel", **whole("parallel")),
        help=f"texts at once in the batch test ({_list(PARALLEL)})",
    )
    add(
        "--shared",
        **several("shared", **whole("shared")),
        help="tokens that those texts begin with in common, which are kept and read once for all (0)",
    )
    add("--seconds", **real("seconds"), help=f"that each run of the contention test takes ({SECONDS:g})")
    add("--runs", **whole("runs"), help="runs of each (3, or fewer where they take long)")
    add_option(parser, declared(CacheKeywords)["sinks"])
    add_option(parser, declared(CacheKeywords)["window"], usual="by format")
    add_load_option(parser, "threads")
    add_load_option(parser, "mmap")
    add_device_options(parser)
    add("--json", action="store_true", help="machine-readable output")
    add("--plot", metavar="FILE", help="draw decode speed and memory by depth; .png, .svg or .pdf")
    return parser


def _list(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status. Errors are raised, for `kvrun.commands.main.main` to state."""
    args = build_parser().parse_args(argv)
    report = run(args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    if args.plot is not None:
        plots.speed(report, args.plot)
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The report, as JSON has it."""
    tests = _tests(args)
    if args.plot is not None:
        if "decode" not in tests:
            raise OptionError("plot: it shows decode speed by depth; add --test decode")
        plots.check(args.plot)
    model = load(args.model or default_model(), **load_options(args))
    plan = _plan(args, tests, model.description.context_length)
    with announced_steps(plan.steps) as progress:
        return Bench(model, plan, progress).report()


# --- options --------------------------------------------------------------------------------------


def _tests(args: argparse.Namespace) -> tuple[str, ...]:
    """In the order of TESTS, each once. A shape alone asks for attention, neighbours alone for contention."""
    contending = _given(args, "neighbours", "neighbour_kind", "seconds")
    batching = _given(args, "parallel", "shared")
    asked = ["batch"] * bool(batching) + ["attention"] * bool(args.shape) + ["contention"] * bool(contending)
    named = set(args.test or asked or DEFAULT_TESTS)
    if contending and not named & {"contention", "all"}:
        raise OptionError(f"{contending[0]}: only the contention test has neighbours; add --test contention")
    if batching and not named & {"batch", "all"}:
        raise OptionError(f"{batching[0]}: only the batch test has several texts; add --test batch")
    if args.shape and not named & {"attention", "all"}:
        raise OptionError("shape: only the attention test takes another model's shape; add --test attention")
    if args.device not in (None, "cpu"):
        if args.shape or "attention" in named:
            raise OptionError("test: attention alone is measured on the CPU; leave --device out")
        if "contention" in named:
            raise OptionError("test: contention is about threads on busy CPUs; leave --device out")
        return tuple(test for test in TESTS if test not in ON_CPU and (test in named or "all" in named))
    return tuple(test for test in TESTS if test in named or "all" in named)


def _given(args: argparse.Namespace, *names: str) -> list[str]:
    """Those of the options that are given."""
    return [name for name in names if getattr(args, name) is not None]


def _plan(args: argparse.Namespace, tests: tuple[str, ...], context_length: int) -> Plan:
    sizes = {"sinks": args.sinks, "window": args.window}
    limit = MAX_CTX - ROOM
    names = args.kv or default_formats()
    formats = tuple(dict.fromkeys(cache_options(name, context_length, **sizes)[0] for name in names))
    plan = Plan(
        tests=tests,
        depths=_numbers("depth", args.depth, 0, limit) or _fitting(DEPTHS, context_length, 0),
        prefills=_numbers("prefill", args.prefill, 1, limit) or _fitting(PREFILLS, context_length, context_length),
        formats=formats,
        shapes=tuple(dict.fromkeys(map(Shape.parse, args.shape or ()))),
        runs=RUNS if args.runs is None else integer("runs", args.runs, low=1, high=1000),
        patience=PATIENCE if args.runs is None else math.inf,
        max_tokens=_max_tokens(args.max_tokens, context_length),
        sizes=sizes,
        contention=_contention(args, formats, limit),
        parallel=_numbers("parallel", args.parallel, 1, MAX_PARALLEL) or PARALLEL,
        shared=_numbers("shared", args.shared, 0, limit) or (0,),
    )
    if "batch" in tests and not plan.batches:
        raise OptionError(f"shared: no text has more tokens in common than its depth; add --depth {min(plan.shared)}")
    if "attention" in tests and not plan.attention_depths:
        raise OptionError("depth: the attention test needs tokens in the cache; add a depth above 0")
    return plan


def _contention(args: argparse.Namespace, formats: tuple[str, ...], limit: int) -> Contention:
    seconds = SECONDS if args.seconds is None else number("seconds", args.seconds, low=0, high=3600, above=True)
    plan = Contention(
        neighbours=_numbers("neighbours", args.neighbours, 0, MAX_NEIGHBOURS) or NEIGHBOURS,
        kind=args.neighbour_kind or KINDS[0],
        seconds=seconds,
        depths=_numbers("depth", args.depth, 0, limit) or (0,),
        formats=formats if args.kv else (DEFAULT_KV,),
    )
    needed, there = max(plan.round) * STREAMED * (plan.kind == "memory"), physical_memory()
    if there is not None and needed > there / 2:
        raise OptionError(
            f"neighbours: {max(plan.round)} that stream memory take {needed / 1e9:.1f} GB, more than half of the "
            f"{there / 1e9:.1f} that this machine has"
        )
    return plan


def _numbers(name: str, given: Sequence[int] | None, low: int, high: int) -> tuple[int, ...]:
    """Those given, each once, smallest first."""
    return tuple(sorted({integer(name, value, low=low, high=high) for value in given or ()}))


def _fitting(defaults: Sequence[int], context_length: int, otherwise: int) -> tuple[int, ...]:
    """Those that the model's context has room for."""
    return tuple(n for n in defaults if n + ROOM <= context_length) or (otherwise,)


def _max_tokens(given: int | None, context_length: int) -> int:
    if given is not None:
        return integer("max_tokens", given, low=1, high=1 << 16)
    return min(MAX_TOKENS, max(1, context_length - ROOM))


# --- for people -----------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> None:
    """The report as tables on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 100)
    threads = f", {report['threads']} thread{'s' * (report['threads'] > 1)}" if report["device"] == "cpu" else ""
    console.print(
        f"{report['model']}: {report['cpu']}, {report['isa']}{threads}; memory is read at "
        f"{report['memory_bandwidth_gb_s']:.1f} GB/s\n"
        f"a decode step reads {report['weight_bytes_per_token'] / 1e6:.1f} MB of weights; " + _runs(report["results"])
    )
    for test in TESTS:
        rows = [row for row in report["results"] if row["test"] == test]
        if not rows:
            continue
        headings, line = _HEADINGS[test], _LINES.get(test, _speed_line)
        table = Table(box=None, pad_edge=False, title=_title(test, rows[0]), title_justify="left", title_style="bold")
        for heading in headings:
            table.add_column(heading, justify="left" if heading in ("cache", "shape") else "right")
        previous = None
        for row in rows:
            group = (row.get("shape"), row["depth"], row.get("tokens") if test == "prefill" else None)
            if previous not in (None, group) and test != "cache":
                table.add_row()
            previous = group
            table.add_row(*line(row))
        console.print()
        console.print(table)
        for note in _notes(test, rows):
            console.print(note)


def _runs(rows: list[dict[str, Any]]) -> str:
    least, most = (limit(row["runs"] for row in rows) for limit in (min, max))
    if most == 1:
        return "one run each"
    return f"medians of {most} runs" if least == most else f"medians of {least} to {most} runs"


_READ = ["ms", "MB a token", "GB/s", "of memory", "cache MB"]
_HEADINGS = {
    "prefill": ["prompt", "cache", "tok/s", "ms a token", "cache MB"],
    "decode": ["depth", "cache", "tok/s", *_READ],
    "batch": ["texts", "depth", "in common", "cache", "tok/s", "times one", "cache MB", "held"],
    "attention": ["shape", "depth", "cache", "steps/s", *_READ],
    "cache": ["tokens", "with: s", "tok/s", "without: s", "tok/s", "times faster", "same tokens"],
    "contention": ["neighbours", "depth", "cache", "tok/s", "of alone", "fair", "of fair share", "longest step, ms"],
}


def _title(test: str, row: dict[str, Any]) -> str:
    if test == "attention":
        layers = row["layers"]
        return f"attention alone, {layers} layer{'s' * (layers > 1)} (heads/KV heads/head_dim)"
    if test == "cache":
        return f"the same text with the cache ({row['kv']}) and without"
    if test == "contention":
        does = {"compute": "compute", "memory": "stream memory"}[row["neighbour_kind"]]
        return f"decode beside processes that {does}, on {row['cpus']} CPU{'s' * (row['cpus'] > 1)}"
    return test


def _notes(test: str, rows: list[dict[str, Any]]) -> list[str]:
    """Below a table: whether the machine was the same at the end of a contention test."""
    if test != "contention":
        return []
    alone = [(row["depth"], row["kv"], *row["alone_first_and_last"]) for row in rows if not row["neighbours"]]
    return [f"alone, depth {d}, {kv}: {first:.1f} tok/s first, {last:.1f} last" for d, kv, first, last in alone]


def _speed_line(row: dict[str, Any]) -> list[str]:
    speed, read = row["tokens_per_second"], row["bytes_per_token"]
    cells = [row["kv"], f"{speed:.1f}", f"{1000 / speed:.3g}"]
    if row["test"] == "prefill":
        return [str(row["tokens"]), *cells, f"{row['kv_bytes'] / 1e6:.1f}"]
    cells += [
        f"{read / 1e6:.1f}",
        f"{read * speed / 1e9:.1f}",
        f"{100 * row['bandwidth_fraction']:.0f} %",
        f"{row['kv_bytes'] / 1e6:.1f}",
    ]
    where = [row["shape"]] if row["test"] == "attention" else []
    return [*where, str(row["depth"]), *cells]


def _batch_line(row: dict[str, Any]) -> list[str]:
    speed, times = row["tokens_per_second"], row["times_one"]
    cells = [f"{speed:.1f}", "-" if times is None else f"{times:.2f}"]
    cells += [f"{row[name] / 1e6:.1f}" for name in ("kv_bytes", "kv_bytes_held")]
    return [str(row["parallel"]), str(row["depth"]), str(row["shared"]), row["kv"], *cells]


def _cache_line(row: dict[str, Any]) -> list[str]:
    n, without = row["tokens"], row["seconds_without"]
    return [
        str(n),
        f"{row['seconds']:.2f}",
        f"{row['tokens_per_second']:.1f}",
        f"{without:.2f}",
        f"{n / without:.1f}",
        f"{row['ratio']:.1f}",
        f"{row['same_tokens']} of {n}",
    ]


def _contention_line(row: dict[str, Any]) -> list[str]:
    return [
        str(row["neighbours"]),
        str(row["depth"]),
        row["kv"],
        f"{row['tokens_per_second']:.1f}",
        f"{100 * row['of_alone']:.0f} %",
        f"{100 * row['fair_share']:.0f} %",
        f"{100 * row['of_fair_share']:.0f} %",
        f"{1000 * row['longest_step_seconds']:.1f}",
    ]


_LINES = {"batch": _batch_line, "cache": _cache_line, "contention": _contention_line}
