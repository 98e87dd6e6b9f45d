"""kvrun and its peers on a busy machine: decoding beside other processes, and with less CPU time than CPUs.

    python benchmarks/contention.py MODEL.gguf --peer-python build/peers/bin/python

Every runtime works in a process of its own, with the same weights, as in `peers.py`, and they take turns: beside no
other process, beside such that compute or stream memory (`kvrun.measure.neighbours`), and alone again, since machines
drift; then, where control groups can be written, with a quota of one CPU, as a container may have it. Prints a Markdown
table: tokens a second, what part that is of a fair share, and the longest step. Fair is the same time for everybody:
CPUs / (CPUs + neighbours) of the speed alone with a thread for each CPU; of a quota, what it grants of the CPUs used
alone.

Nothing else should run meanwhile. Needs kvrun and, for the peers, the interpreters that have them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contention_quota
import peers
import peers_report
from peers_gguf import BenchmarkError, gguf_facts, requantize

from kvrun import _core
from kvrun.errors import KvrunError
from kvrun.measure.neighbours import KINDS, MAX_NEIGHBOURS, Neighbours, fair_share

FAMILIES = ("ik_llama.cpp", "llama.cpp")
TOKENS = 96  # decoded behind the depth, after which they are taken back
TURNS = 2  # that each runtime has in a condition
ONE = {"compute": "computes", "memory": "streams memory"}
MANY = {"compute": "compute", "memory": "stream memory"}


@dataclass
class Condition:
    """What a runtime decodes beside, or with. `fair`: the part of its speed alone that it should keep. `runs`: by
    runtime, its steps in seconds."""

    name: str
    threads: int
    fair: float
    neighbours: int = 0
    kind: str = "compute"
    granted: float | None = None
    runs: dict[str, list[float]] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        return not self.neighbours and self.granted is None

    def speed(self, runtime: str) -> float | None:
        steps = self.runs.get(runtime)
        return len(steps) / sum(steps) if steps else None


def conditions(neighbours: list[int], kinds: list[str], threads: int, cpus: int) -> list[Condition]:
    """In the order in which they are measured, without quotas."""
    busy = [
        Condition(f"beside {n} that {(ONE if n == 1 else MANY)[kind]}", threads, fair_share(cpus, threads, n), n, kind)
        for kind in kinds
        for n in neighbours
    ]
    return [Condition("alone, first", threads, 1.0), *busy, Condition("alone, last", threads, 1.0)]


def one_cpu(threads: int, cpus: int) -> Condition:
    return Condition("a quota of one CPU", threads, 1 / min(threads, cpus), granted=1.0)


# --- measuring ---------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """Runs conditions with the workers of a comparison, each with the first of its caches."""

    comparison: peers.Comparison
    depth: int
    seconds: float

    def prepare(self) -> None:
        for worker, cache in self._turns():
            self.comparison.ask(worker, "prepare", cache, depth=self.depth, room=TOKENS + 1)

    def measure(self, condition: Condition) -> None:
        """NoQuota if the condition has one that cannot be had."""
        self.comparison.say(f"{condition.name}, threads: {condition.threads}")
        with _beside(condition, [worker.pid for worker, _ in self._turns()]) as check:
            for _ in range(TURNS):
                for worker, cache in self._turns():
                    time.sleep(peers.REST)
                    steps = self._steps(worker, cache, self.seconds / TURNS)
                    condition.runs.setdefault(worker.name, []).extend(steps)
                    check()

    def _turns(self) -> list[tuple[peers.Worker, str]]:
        return [(worker, next(iter(worker.caches))) for worker in self.comparison.workers if worker.caches]

    def _steps(self, worker: peers.Worker, cache: str, seconds: float) -> list[float]:
        """Seconds of decode steps, which take so long together; fewer where the runtime fails."""
        steps: list[float] = []
        while (left := seconds - sum(steps)) > 0:
            answer = self.comparison.ask(worker, "decode", cache, depth=self.depth, n=TOKENS, seconds=left)
            if not answer:
                break
            steps += answer["step_seconds"]
        return steps


@contextmanager
def _beside(condition: Condition, pids: list[int]) -> Iterator[Callable[[], None]]:
    if condition.granted is None:
        with Neighbours(condition.neighbours, condition.kind) as others:
            yield others.check
    else:
        with contention_quota.granted(condition.granted, pids):
            yield lambda: None


@contextmanager
def measuring(
    args: argparse.Namespace, found: list[Any], gguf: Path, facts: dict[str, Any], threads: int, say: Any
) -> Iterator[Measurement]:
    """With the workers loaded, and their caches filled."""
    plan = peers.Plan([args.kv], [args.depth], [], 1, TOKENS, 0, 0)
    with tempfile.TemporaryDirectory(prefix="kvrun-contention-") as scratch:
        workers = peers.start(found, Path(scratch), args.timeout)
        comparison = peers.Comparison(workers, plan, say)
        try:
            comparison.load(gguf=str(gguf), scratch=scratch, threads=threads, **peers.wanted(facts))
            measurement = Measurement(comparison, args.depth, args.seconds)
            measurement.prepare()
            if not any(worker.name == "kvrun" for worker in comparison.workers):
                raise BenchmarkError("kvrun itself could not be measured")
            yield measurement
        finally:
            for worker in list(comparison.workers):
                worker.close()


def check(args: argparse.Namespace) -> None:
    """BenchmarkError, before anything is measured, for what would fail in the end."""
    if not Path(args.model).is_file():
        raise BenchmarkError(f"{args.model}: there is no such file")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise BenchmarkError(f"{args.json}: there is no such folder")
    if not 0 < args.seconds <= 3600:
        raise BenchmarkError(f"seconds: must be more than 0 and at most 3600, not {args.seconds}")
    if max(args.neighbours) > MAX_NEIGHBOURS:
        raise BenchmarkError(f"neighbours: must be at most {MAX_NEIGHBOURS}, not {max(args.neighbours)}")


def compare(args: argparse.Namespace, scratch: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The report, as JSON has it: a list of rows for each number of threads."""
    check(args)
    found, lines = peers.locate([args.kvrun_python, *args.peer_python], ["kvrun", *args.peers])
    for line in lines:
        say(line)
    path = Path(args.model).absolute()
    if args.requantize:
        path = scratch / f"{path.stem}-{args.requantize}.gguf"
        requantize(args.model, path, args.requantize)
    facts, cpus = gguf_facts(str(path)), _core.max_threads()
    if args.depth + TOKENS + 1 > facts["context"]:
        raise BenchmarkError(f"depth: {args.depth} and {TOKENS + 1} tokens are more than the model's context")
    threads = args.threads or cpus
    names = {package.runtime: f"{package.runtime} {version}" for package, _, version in found}
    busy = conditions(sorted({n for n in args.neighbours if n}), args.neighbour_kinds, threads, cpus)
    with measuring(args, found, path, facts, threads, say) as measurement:
        groups = [_measured(measurement, busy, one_cpu(threads, cpus) if args.quota else None)]
    if threads > 1 and len(groups[0]) > len(busy):
        with measuring(args, found, path, facts, 1, say) as measurement:
            groups.append(_measured(measurement, conditions([], [], 1, cpus), one_cpu(1, cpus)))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(args.model).name + (f" as {args.requantize}" if args.requantize else ""),
        "weights": facts["weights"],
        "machine": peers_report.machine(),
        "cpus": cpus,
        "kv": args.kv,
        "depth": args.depth,
        "seconds": args.seconds,
        "runtimes": names,
        "rows": [row for group in groups for row in rows(group, list(names))],
    }


def _measured(measurement: Measurement, first: list[Condition], limited: Condition | None) -> list[Condition]:
    """All conditions that were measured, that with a quota last; if there can be none, a line is said."""
    for condition in first:
        measurement.measure(condition)
    if limited is None:
        return first
    try:
        measurement.measure(limited)
    except contention_quota.NoQuota as error:
        measurement.comparison.say(f"a quota of one CPU: left out, no control group can be made: {error}")
        return first
    return [*first, limited]


# --- what is made of it ------------------------------------------------------------------------------


def rows(group: list[Condition], runtimes: list[str]) -> list[dict[str, Any]]:
    """A row for each condition, with its shares of the speeds alone in the same group."""
    alone: dict[str, list[float]] = {
        name: [step for condition in group if condition.alone for step in condition.runs.get(name, [])]
        for name in runtimes
    }
    found = []
    for condition in group:
        row: dict[str, Any] = {
            "condition": condition.name,
            "threads": condition.threads,
            "neighbours": condition.neighbours,
            "neighbour_kind": condition.kind if condition.neighbours else None,
            "quota": condition.granted,
            "fair_share": condition.fair,
            "runtimes": {},
        }
        for name in runtimes:
            speed, steps = condition.speed(name), alone[name]
            if speed is not None and steps:
                row["runtimes"][name] = {
                    "tokens_per_second": speed,
                    "of_fair_share": speed * sum(steps) / len(steps) / condition.fair,
                    "longest_step_seconds": max(condition.runs[name]),
                }
        found.append(row)
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as a table, with what it is of above."""
    names = list(report["runtimes"])
    others = [name for name in names if name != "kvrun"]
    head = ["condition", "threads", "fair share"]
    for name in names:
        head += [f"{name}: tok/s", "of fair share", "longest step, ms"]
    head += [f"kvrun : {name}" for name in others]
    machine, versions = report["machine"]["cpu"], ", ".join(report["runtimes"].values())
    lines = [
        f"{report['model']} ({report['weights']}), {report['kv']} cache, depth {report['depth']}",
        f"{machine}, {report['cpus']} CPUs; {versions}; {report['date']}",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in report["rows"]:
        ran = row["runtimes"]
        cells = [row["condition"], str(row["threads"]), f"{100 * row['fair_share']:.0f} %"]
        for name in names:
            cells += _cells(ran[name]) if name in ran else ["-"] * 3
        for name in others:
            both = "kvrun" in ran and name in ran
            speeds = [ran[each]["tokens_per_second"] for each in ("kvrun", name)] if both else []
            cells.append(f"{speeds[0] / speeds[1]:.2f}" if speeds else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(run: dict[str, float]) -> list[str]:
    speed, share, longest = run["tokens_per_second"], run["of_fair_share"], run["longest_step_seconds"]
    return [f"{speed:.1f}", f"{100 * share:.0f} %", f"{1000 * longest:.0f}"]


# --- the command -------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = peers.runtimes_parser(__doc__)
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+"}
    add("--peers", metavar="NAME", choices=FAMILIES, default=FAMILIES, **several, help=f"({' '.join(FAMILIES)})")
    add("--threads", type=peers.positive, help="threads of each runtime (the CPUs that this process may use)")
    add("--kv", metavar="FORMAT", choices=("f16", "q8", "q4"), default="q8", help="kind of the cache of all (q8)")
    add("--depth", metavar="N", type=peers.whole, default=0, help="tokens in the cache (0)")
    add("--neighbours", metavar="N", type=peers.whole, default=[1, 2, 4, 6], **several, help="(1 2 4 6)")
    add("--neighbour-kinds", choices=KINDS, default=KINDS, **several, help=f"what they do ({' '.join(KINDS)})")
    add("--no-quota", dest="quota", action="store_false", help="leave the quota of one CPU out")
    add("--seconds", type=float, default=2, help="of decoding by each runtime in each condition (2)")
    add("--timeout", metavar="SECONDS", type=float, default=900, help="for one answer of a runtime (900)")
    add("--json", metavar="FILE", help="write the figures there")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="kvrun-contention-") as scratch:
            report = compare(args, Path(scratch), lambda line: print(line, file=sys.stderr, flush=True))
        print(markdown(report))
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    except (BenchmarkError, KvrunError, OSError) as error:
        print(f"contention: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
