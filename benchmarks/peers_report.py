"""What `peers.py` makes of its measurements: medians, ratios, tables and plots."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvrun.measure.plots import spread

OURS = "kvrun"
PLOTS = {
    "peers-decode.png": ("tokens_per_second", "tokens a second", 1.0, max),
    "peers-memory.png": ("kv_bytes", "cache, MB", 1e-6, min),
}
TITLES = {"f16": "16 bits (f16)", "q8": "8 bits", "q4": "4 bits", "q2": "2 bits"}
COLOURS = {
    "kvrun": "#d1495b",
    "ik_llama.cpp": "#00798c",
    "llama.cpp": "#edae49",
    "transformers": "#66717e",
}
DRAWN = ("transformers", "ik_llama.cpp", "llama.cpp", "kvrun")  # the last on top
DASHED = ("llama.cpp",)  # so that a line below shows


def machine() -> dict[str, Any]:
    """The processor, CPUs this process may use, memory, and how busy it is now."""
    from kvrun.measure.speed import cpu_name, physical_memory

    memory = physical_memory()
    return {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def summarize(raw: dict[str, Any]) -> dict[str, Any]:
    """The same with a median, a best and a share of the memory bandwidth in every row, and with ratios.

    Rows of several texts have the multiple of the speed of one, of the runtime's fastest cache of that kind.
    """
    bandwidth = raw["memory_bandwidth_gb_s"]
    rows = []
    for row in raw["results"]:
        speeds = [run["tokens"] / run["seconds"] for run in row["runs"]]
        row = {**row, "tokens_per_second": statistics.median(speeds), "best": max(speeds)}
        if row.get("bytes_per_token") and bandwidth:
            row["bandwidth_fraction"] = row["bytes_per_token"] * row["tokens_per_second"] / (1e9 * bandwidth)
        rows.append(row)
    for row in (row for row in rows if row["test"] == "batch"):
        own = [each for each in rows if (each["runtime"], each["kind"]) == (row["runtime"], row["kind"])]
        one = [each["tokens_per_second"] for each in own if _test(each) == _one_at_a_time(row)]
        row["times_one"] = row["tokens_per_second"] / max(one) if one else None
    return {**raw, "results": rows, "ratios": ratios(rows, raw["runtimes"])}


def ratios(rows: list[dict[str, Any]], runtimes: dict[str, Any]) -> list[dict[str, Any]]:
    """kvrun's speed with each of its caches over each family's, with its fastest variant and cache.

    "ratio" is that of the medians, "ratio_of_best" that of the best runs. Several texts in one step are compared with
    the family's texts in one step, and once more with one at a time ("peer_parallel" 1).
    """
    found = []
    families = {runtimes[row["runtime"]]["family"]: None for row in rows if row["runtime"] != OURS}
    for ours in (row for row in rows if row["runtime"] == OURS):
        for test in dict.fromkeys([_test(ours), _one_at_a_time(ours)]):
            for family in families:
                theirs = [row for row in rows if runtimes[row["runtime"]]["family"] == family and _test(row) == test]
                if theirs:
                    found.append(_ratio(ours, max(theirs, key=lambda row: row["tokens_per_second"]), family))
    return found


def _ratio(ours: dict[str, Any], row: dict[str, Any], family: str) -> dict[str, Any]:
    texts = ("parallel", "shared")
    return {
        **{name: ours[name] for name in ("test", "depth", "tokens", *(name for name in texts if name in ours))},
        "cache": ours["cache"],
        "peer": family,
        "peer_runtime": row["runtime"],
        "peer_cache": row["cache"],
        **({"peer_parallel": row["parallel"]} if "parallel" in row else {}),
        "ratio": ours["tokens_per_second"] / row["tokens_per_second"],
        "ratio_of_best": ours["best"] / row["best"],
    }


def _test(row: dict[str, Any]) -> tuple[Any, ...]:
    """What has to be equal for two rows to be comparable; also their order in tables."""
    return row["test"] != "prefill", row["tokens"] or 0, row["depth"], row.get("parallel", 1), row.get("shared", 0)


def _one_at_a_time(row: dict[str, Any]) -> tuple[Any, ...]:
    """The same of a single text."""
    return _test({**row, "parallel": 1, "shared": 0})


def _heading(row: dict[str, Any]) -> str:
    if row["test"] == "prefill":
        return f"prompt {row['tokens']:,}"
    texts = f"{row['parallel']} at " if row["test"] == "batch" else ""
    return f"{texts}depth {row['depth']:,}"


# --- tables ----------------------------------------------------------------------------------------


def show(report: dict[str, Any], console: Any = None) -> None:
    """For people: what ran where, speeds, kvrun's ratios to the peers, memory, and what was left out."""
    from rich.console import Console

    console = console or Console(
        highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140
    )
    machine, rows = report["machine"], report["results"]
    bandwidth = report["memory_bandwidth_gb_s"]
    read = f"memory read at {bandwidth:.1f} GB/s" if bandwidth else "memory bandwidth not measured"
    load = machine.get("load_average")
    console.print(
        f"{report['model']} ({report['weights']}), {_threads(report)}, {report['date']}\n"
        f"{machine['cpu']}, {machine['cpus']} CPUs, {read}"
        + (f", load average {load[0]:.1f} at the start" if load else "")
    )
    for name, info in report["runtimes"].items():
        kl = f"KL {info['kl']:.2g} from kvrun" if info.get("kl") else None
        details = [
            f"{info['package']} {info['version']}",
            info.get("with"),
            info.get("built"),
            kl,
            _together(rows, name),
        ]
        console.print(f"  {name}: {', '.join(filter(None, details))}")
    for title, test in (("prefill, tokens a second", "prefill"), ("decode, tokens a second", "decode")):
        own = [row for row in rows if row["test"] == test]
        if own:
            runs = max(len(row["runs"]) for row in own)
            console.print(_speeds(own, f"{title}: median (best) of up to {runs}"))
    several = [row for row in rows if row["test"] == "batch"]
    if several:
        console.print(_batches(several))
    if report["ratios"]:
        console.print(_ratios(report["ratios"]))
    if any("kv_bytes" in row for row in rows):
        console.print(_memory([row for row in rows if "kv_bytes" in row]))
    for line in report["left_out"]:
        console.print(line)


def _together(rows: list[dict[str, Any]], runtime: str) -> str | None:
    """How far what texts got in one step was from what each gets alone."""
    own = [row for row in rows if row["runtime"] == runtime and row.get("parallel", 1) > 1]
    if not own:
        return None
    if all(row["same_as_alone"] for row in own):
        return "texts get the same together as alone, to the bit"
    return f"KL up to {max(row['kl_from_alone'] for row in own):.2g} of texts together from each alone"


def _threads(report: dict[str, Any]) -> str:
    return f"{report['threads']} thread{'s' * (report['threads'] > 1)}"


def _table(title: str, headings: Iterable[str], left: int) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=f"\n{title}", title_justify="left", title_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", no_wrap=True)
    return table


def _grid(
    rows: list[dict[str, Any]], lead: tuple[str, ...]
) -> tuple[list[str], list[tuple[list[str], list[dict[str, Any] | None]]]]:
    """Headings of the tests, and a line for each combination of the leading columns: its row in each test."""
    tests = {_test(row): _heading(row) for row in sorted(rows, key=_test)}
    lines: dict[tuple[str, ...], dict[Any, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(tuple(row[name] for name in lead), {})[_test(row)] = row
    return list(tests.values()), [(list(names), [found.get(test) for test in tests]) for names, found in lines.items()]


def _speeds(rows: list[dict[str, Any]], title: str) -> Any:
    headings, lines = _grid(rows, ("runtime", "cache"))
    shares = any(row.get("bandwidth_fraction") for row in rows)
    table = _table(title, ["runtime", "cache", *headings, *(["of bandwidth"] if shares else [])], 2)
    for names, found in lines:
        cells = [f"{row['tokens_per_second']:.1f} ({row['best']:.1f})" if row else "" for row in found]
        parts = [f"{100 * row['bandwidth_fraction']:.0f}" for row in found if row and "bandwidth_fraction" in row]
        table.add_row(*names, *cells, *([" / ".join(parts) + " %" if parts else ""] if shares else []))
    return table


def _batches(rows: list[dict[str, Any]]) -> Any:
    headings, lines = _grid(rows, ("runtime", "cache"))
    shared = max(row["shared"] for row in rows)
    common = f", which begin with the same {shared:,} tokens" if shared else ""
    title = f"texts at a time{common}, a token of each in a step: tokens a second of all (times that of one text)"
    table = _table(title, ["runtime", "cache", *headings], 2)
    for names, found in lines:
        table.add_row(*names, *(_of_one(row) if row else "" for row in found))
    return table


def _of_one(row: dict[str, Any]) -> str:
    times = row["times_one"]
    return f"{row['tokens_per_second']:.1f}" + (f" ({times:.2f})" if row["parallel"] > 1 and times else "")


def _ratios(found: list[dict[str, Any]]) -> Any:
    found = [{**entry, "peer": entry["peer"] + ", one by one" * _one_by_one(entry)} for entry in found]
    headings, lines = _grid(found, ("cache", "peer"))
    table = _table(
        "kvrun over each peer's fastest cache: ratio of medians (of best runs)", ["kvrun", "peer", *headings], 2
    )
    for names, entries in lines:
        table.add_row(*names, *(f"{e['ratio']:.2f} ({e['ratio_of_best']:.2f})" if e else "" for e in entries))
    return table


def _one_by_one(entry: dict[str, Any]) -> bool:
    """Whether that is a ratio of texts in one step to one text at a time."""
    return bool(entry.get("parallel", 1) > 1 and entry["peer_parallel"] == 1)


def _memory(rows: list[dict[str, Any]]) -> Any:
    headings, lines = _grid(rows, ("runtime", "cache"))
    table = _table("cache, MB (growth of resident memory, buffers included)", ["runtime", "cache", *headings], 2)
    for names, found in lines:
        table.add_row(*names, *(_megabytes(row) if row else "" for row in found))
    return table


def _megabytes(row: dict[str, Any]) -> str:
    growth = row.get("resident_growth")
    return f"{row['kv_bytes'] / 1e6:.1f}" + (f" ({growth / 1e6:.0f})" if growth is not None else "")


# --- plots -----------------------------------------------------------------------------------------


def series(report: dict[str, Any], value: str, best: Any) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{kind of cache: {family: [(depth, value)]}}, of its variants and caches of that kind the `best`."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in report["results"]:
        if row["test"] == "decode" and row.get(value):
            family = report["runtimes"][row["runtime"]]["family"]
            points = found.setdefault(row["kind"], {}).setdefault(family, {})
            points[row["depth"]] = best(row[value], points.get(row["depth"], row[value]))
    return {kind: {family: sorted(points.items()) for family, points in lines.items()} for kind, lines in found.items()}


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes decode speed by depth and memory by depth, a panel for each kind of cache. The paths written."""
    written = []
    for name, (value, label, scale, best) in PLOTS.items():
        lines = series(report, value, best)
        if lines:
            _draw(report, lines, label, scale).savefig(folder / name, dpi=160)
            written.append(folder / name)
    return written


def _draw(report: dict[str, Any], panels: dict[str, Any], label: str, scale: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    families = [f for f in COLOURS if any(f in lines for lines in panels.values())]
    depths = sorted({depth for lines in panels.values() for points in lines.values() for depth, _ in points})
    ticks, handles = spread(depths, 5), {}
    for axes, (kind, lines) in zip(all_axes, panels.items()):
        for family in DRAWN:
            if family in lines:
                x, y = zip(*lines[family])
                handles[family] = axes.plot(
                    x,
                    [v * scale for v in y],
                    marker="o",
                    markersize=4,
                    linewidth=2,
                    linestyle="--" if family in DASHED else "-",
                    color=COLOURS[family],
                )[0]
        axes.set_title(f"cache of {TITLES.get(kind, kind)}", fontsize=10)
        axes.set_xlabel("depth, tokens", fontsize=9)
        axes.set_xticks(ticks, [f"{depth:,}" for depth in ticks])
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel(label, fontsize=9)
    all_axes[0].set_ylim(0, 1.05 * scale * max(v for ls in panels.values() for p in ls.values() for _, v in p))
    figure.legend(
        [handles[f] for f in families],
        families,
        loc="outside lower center",
        ncols=len(families),
        frameon=False,
    )
    figure.suptitle(
        f"{report['model'].replace('.gguf', '')}, {report['machine']['cpu']}, {_threads(report)}, {report['date']}",
        fontsize=10,
    )
    return figure
