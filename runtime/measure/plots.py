"""Pictures of what `kvrun bench` and `kvrun perplexity` measured. matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvrun.errors import OptionError
from kvrun.files.safe_file import SafeFile, check_output

TYPES = (".png", ".svg", ".pdf")


def check(path: str) -> None:
    """OptionError or ModelFileError, before anything is measured, for what would fail in the end."""
    if Path(path).suffix.lower() not in TYPES:
        raise OptionError(f"plot: {path!r} must end in {', '.join(TYPES)}")
    if not Path(path).parent.is_dir():
        raise OptionError(f"plot: there is no folder {str(Path(path).parent)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("plot: matplotlib is missing; pip install matplotlib, or kvrun[plot]")
    check_output(path)


def speed(report: dict[str, Any], path: str) -> None:
    """Decode speed and memory by depth, a line for each format, from the report of `kvrun bench`. ModelFileError
    if the file cannot be written."""
    rows = [row for row in report["results"] if row["test"] == "decode"]
    depths = sorted({row["depth"] for row in rows})
    figure, (rate, memory) = _figure()
    for name in dict.fromkeys(row["kv"] for row in rows):
        own = sorted((row for row in rows if row["kv"] == name), key=lambda row: row["depth"])
        x = [row["depth"] for row in own]
        rate.plot(x, [row["tokens_per_second"] for row in own], marker="o", markersize=4, label=name)
        memory.plot(x, [row["kv_bytes"] / 1e6 for row in own], marker="o", markersize=4, label=name)
    for axes, title, unit in (
        (rate, "decode speed", "tokens a second"),
        (memory, "memory of the cache", "MB"),
    ):
        axes.set(title=title, ylabel=unit, xlabel="depth: tokens in the cache")
        axes.set_ylim(bottom=0)
        axes.set_xticks(depths if len(depths) < 3 else spread(depths, 10))
    memory.legend(title="cache", frameon=False)
    figure.suptitle(f"{report['model']}, {report['cpu']}, {report['isa']}, {report['threads']} threads")
    _save(figure, path)


def quality(report: dict[str, Any], path: str) -> None:
    """KL divergence and top-1 agreement by bits per value, from the report of `kvrun perplexity`; the exact cache,
    first in it, is what the others are compared with. ModelFileError if the file cannot be written."""
    rows = report["results"][1:]
    figure, (divergence, agreement) = _figure()
    for row in rows:
        for axes, y in ((divergence, max(row["kl_mean"], 1e-9)), (agreement, 100 * row["top1_agreement"])):
            axes.plot([row["bpv"]], [y], "o")
            axes.annotate(
                f"{row['kv']}, window {row['window']}", (row["bpv"], y), xytext=(7, 4), textcoords="offset points"
            )
    divergence.set(title="KL divergence from an exact cache, mean", ylabel="nats", yscale="log")
    agreement.set(title="same likeliest token", ylabel="%")
    for axes in (divergence, agreement):
        axes.set_xlabel("bits per cached value")
        axes.margins(x=0.4, y=0.15)
    figure.suptitle(f"{Path(report['model']).name}, {report['chunks']} chunks of {report['ctx']} tokens")
    _save(figure, path)


def _save(figure: Any, path: str) -> None:
    """Draw it, and only then write the file, whole."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format=Path(path).suffix[1:].lower())
    with SafeFile(path, drawn.tell()) as file:
        file.put(drawn.getbuffer())
        file.commit()


def _figure() -> tuple[Any, Any]:
    """Two panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def spread(depths: Sequence[int], parts: int) -> list[int]:
    """Of ascending depths those whose labels do not touch: a `parts`-th of the largest apart."""
    chosen: list[int] = []
    for depth in reversed(depths):
        if not chosen or chosen[-1] - depth >= depths[-1] / parts:
            chosen.append(depth)
    return chosen[::-1]
