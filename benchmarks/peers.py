"""kvrun beside the other runtimes that are installed: the same weights, the same machine, taking turns.

    python benchmarks/peers.py MODEL.gguf --threads 2 --json peers.json --plots docs/images/

Every runtime works in a process of its own (`peers_worker.py`), started by whichever of the interpreters given has
it: packages that cannot share an environment still take part. A runtime that is missing, cannot load the model or
crashes is named in one line and left out. All read one GGUF file: kvrun converts it without changing a value,
transformers dequantises it. That they compute the same model is checked: the KL divergence of their predictions
after one prompt from kvrun's is shown. They take turns run by run, none computes while another is measured, and
sampling is part of nobody's time.

    prefill   a prompt into an empty cache
    decode    single tokens behind a real prompt of `depth` tokens, which are then taken back
    batch     with --parallel, instead of both: so many texts, each `depth` tokens deep, a token of each in every step

In a batch every runtime does what it has for that: kvrun a step of its engine, as `kvrun bench --test batch` does,
llama.cpp and its fork a batch with a token of each sequence. Texts have nothing in common but what --shared says. What
a batch predicts is compared with what each text alone does.

Let nothing else run meanwhile: threads of the peers wait for one another actively, and on busy CPUs some take seconds
for a token. Needs kvrun, with its `plot` extra for --plots.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers_report
from peers_gguf import BenchmarkError, gguf_facts, requantize

WORKER = Path(__file__).with_name("peers_worker.py")
REST = 0.2  # seconds between two runs, in which threads that wait actively for more go to sleep
PROMPT, DISAGREEMENT = 64, 0.2  # tokens of the check, and the KL divergence that rounding does not explain
RUN_SECONDS = 1.0  # after which a decode run is long enough


@dataclass(frozen=True)
class Package:
    """A runtime as the worker names it, and how to see that it is there. `family`: what it is a variant of."""

    runtime: str
    family: str
    modules: tuple[str, ...]
    name: str


PACKAGES = (
    Package("kvrun", "kvrun", ("kvrun",), "kvrun"),
    Package("ik_llama.cpp", "ik_llama.cpp", ("ik_llama_cpp",), "ik-llama-cpp-python"),
    Package("llama.cpp (xllamacpp)", "llama.cpp", ("xllamacpp",), "xllamacpp"),
    Package("llama.cpp (llama-cpp-python)", "llama.cpp", ("llama_cpp",), "llama-cpp-python"),
    Package("transformers bf16", "transformers", ("transformers", "torch"), "transformers"),
    Package("transformers f32", "transformers", ("transformers", "torch"), "transformers"),
)
FAMILIES = tuple(dict.fromkeys(package.family for package in PACKAGES))
WITH_BATCHES = ("ik_llama.cpp", "llama.cpp")  # peers that can run several texts in one step here
DEPTHS, PREFILLS, BATCH_DEPTHS = [0, 512, 2048, 7680], [512, 4096], [128, 512, 2048]

_PROBE = """
import importlib.metadata as metadata, importlib.util, json, sys
found = {}
for name, modules in json.loads(sys.argv[1]).items():
    if all(importlib.util.find_spec(module) for module in modules):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown version"
print(json.dumps(found))
"""


class RequestError(Exception):
    """A worker said no; it goes on."""


class Crash(Exception):
    """A worker is gone."""


# --- interpreters -------------------------------------------------------------------


def installed(python: str) -> dict[str, str]:
    """{package: version} of those in PACKAGES that an interpreter has. BenchmarkError if it is none."""
    asked = json.dumps({package.name: package.modules for package in PACKAGES})
    try:
        done = subprocess.run([python, "-c", _PROBE, asked], check=False, capture_output=True, text=True, timeout=60)
        versions: dict[str, str] = json.loads(done.stdout)
        return versions
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(f"{python}: cannot be used as a Python interpreter ({type(error).__name__})") from None


def locate(pythons: list[str], families: list[str]) -> tuple[list[tuple[Package, str, str]], list[str]]:
    """([(package, interpreter, version)], lines about families of which there is nothing)."""
    there = {python: installed(python) for python in dict.fromkeys(pythons)}
    found, lines = [], []
    for family in families:
        packages = [package for package in PACKAGES if package.family == family]
        hits = [
            next((package, python, has[package.name]) for python, has in there.items() if package.name in has)
            for package in packages
            if any(package.name in has for has in there.values())
        ]
        if not hits:
            names = " or ".join(dict.fromkeys(package.name for package in packages))
            lines.append(f"{family}: {names} is in none of the interpreters; left out")
        found += hits
    return found, lines


# --- workers ---------------------------------------------------------------------------------------


class Worker:
    """The process of one runtime, `pid`. `caches`: {own name of a cache: its kind}; those in `of_several` differ from
    others only when several texts are in them."""

    def __init__(self, name: str, command: list[str], log: Path, timeout: float) -> None:
        self.name, self.log, self.timeout = name, log, timeout
        self.caches: dict[str, str] = {}
        self.of_several: set[str] = set()
        self.info: dict[str, Any] = {}
        # Crashes of ggml would otherwise start a debugger, which takes minutes.
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self.pid = self._process.pid
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """The answer. RequestError if it is an error, Crash if the process has ended or does not answer in time."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._stdin.flush()
            line = self._stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise Crash(f"no answer within {self.timeout:.0f} s" if late.is_set() else self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise RequestError(answer["error"])
        result: dict[str, Any] = answer["ok"]
        return result

    def _last_words(self) -> str:
        status = self._process.wait()
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"crashed with status {status}" + (f": {lines[-1][:200]}" if lines else "")

    def close(self) -> None:
        self._stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()


def start(found: list[tuple[Package, str, str]], scratch: Path, timeout: float) -> list[Worker]:
    """A process for each runtime of `locate`."""
    workers = []
    for i, (package, python, version) in enumerate(found):
        worker = Worker(package.runtime, [python, str(WORKER)], scratch / f"{i}.log", timeout)
        worker.info = {"package": package.name, "family": package.family, "version": version}
        workers.append(worker)
    return workers


def wanted(facts: dict[str, Any]) -> dict[str, Any]:
    """Of `gguf_facts`, what workers are told when they load a model."""
    return {key: facts[key] for key in ("vocab", "layers", "kv_heads", "head_dim")}


@dataclass
class Plan:
    """What to measure. A run that took longer than `patience` seconds is not repeated; a prompt expected to take
    longer than `limit`, by the speed of a shorter one, is left out. `parallel`: numbers of texts at once, to measure
    which and nothing else; `shared`: tokens that all of them begin with."""

    kinds: list[str]
    depths: list[int]
    prefills: list[int]
    runs: int
    tokens: int
    patience: float
    limit: float
    parallel: list[int] = field(default_factory=list)
    shared: int = 0


@dataclass
class Comparison:
    """Runs a plan with workers; `say(line)` is told what goes on, `left_out` keeps what went wrong."""

    workers: list[Worker]
    plan: Plan
    say: Callable[[str], None]
    left_out: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    speeds: dict[tuple[str, str], float] = field(default_factory=dict)  # tokens a second of the last prompt

    def load(self, **request: Any) -> None:
        """Every worker opens the model, one after the other."""
        for worker in list(self.workers):
            self.say(f"loading: {worker.name}")
            several = bool(self.plan.parallel)
            answer = self.ask(worker, "load", runtime=worker.name, caches=self.plan.kinds, several=several, **request)
            if answer is None:
                self._drop(worker)
            else:
                worker.caches, worker.of_several = answer.pop("caches"), set(answer.pop("of_several"))
                worker.info.update(answer)

    def agree(self, folder: Path) -> None:
        """Puts "kl", of its predictions after a prompt from kvrun's, in the info of every other runtime."""
        from kvrun.measure.quality import log_softmax

        ours = None
        for worker in list(self.workers):
            path = folder / "logits.npy"
            cache = next(iter(worker.caches))
            if self.ask(worker, "logits", cache, n=PROMPT, path=str(path)) is None:
                continue
            p = log_softmax(np.load(path).astype(np.float64)[None])[0]
            ours = p if worker.name == "kvrun" else ours
            if ours is None or len(p) != len(ours):
                continue
            worker.info["kl"] = float((np.exp(ours) * (ours - p)).sum())
            if worker.info["kl"] > DISAGREEMENT:
                self._note(
                    f"{worker.name}: does not compute the same: KL {worker.info['kl']:.2g} from kvrun's predictions"
                )

    def run(self) -> None:
        for n in self.plan.prefills:
            self._test(f"prefill of {n}", {"test": "prefill", "depth": 0, "tokens": n}, "prefill", n=n)
        length: dict[str, Any] = {"n": self.plan.tokens, "seconds": RUN_SECONDS}
        for depth in self.plan.depths:
            if not self.plan.parallel:
                row = {"test": "decode", "depth": depth, "tokens": None}
                self._test(f"decode at depth {depth}", row, "decode", prepare="prepare", **length)
            for n in self.plan.parallel:
                shared = self.plan.shared if n > 1 else 0
                row = {"test": "batch", "depth": depth, "tokens": None, "parallel": n, "shared": shared}
                self._test(f"texts: {n} at depth {depth}", row, "decode_together", "prepare_together", **length)

    def _turns(self, texts: int = 1) -> list[tuple[Worker, str]]:
        """Caches of one kind, of all runtimes, stand together."""
        return [
            (worker, cache)
            for kind in self.plan.kinds
            for worker in self.workers
            for cache, own in worker.caches.items()
            if own == kind and (texts > 1 or cache not in worker.of_several)
        ]

    def _test(self, what: str, row: dict[str, Any], op: str, prepare: str | None = None, **more: Any) -> None:
        """One row of results for each cache, with every run in it."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        texts = row.get("parallel", 1)
        turns = self._turns(texts)
        where = {key: row[key] for key in ("depth", "parallel") if key in row} if prepare else {}
        self.say(f"{what}: {len(turns)} caches, {self.plan.runs} runs in turn")
        for worker, cache in turns:
            head = {
                **row,
                "runtime": worker.name,
                "cache": cache,
                "kind": worker.caches.get(cache),
                "runs": [],
            }
            if self._too_long(worker, cache, texts * row["depth"] or row["tokens"] or 0):
                continue
            made = self._fill(worker, cache, row, prepare) if prepare else {}
            if made is not None:
                rows[worker.name, cache] = {**head, **made}
        for turn in range(self.plan.runs):
            self._measure_bandwidth()
            for worker, cache in self._turns(texts):
                found = rows.get((worker.name, cache))
                if found is None or (turn and found["runs"][-1]["seconds"] > self.plan.patience):
                    continue
                time.sleep(REST)
                answer = self.ask(worker, op, cache, **where, **more)
                if answer is None:
                    del rows[worker.name, cache]
                else:
                    found["runs"].append(answer)
                    if op == "prefill":
                        self.speeds[worker.name, cache] = answer["tokens"] / answer["seconds"]
        self.results += [found for found in rows.values() if found["runs"]]
        for worker in list(self.workers):
            self.ask(worker, "release")

    def _too_long(self, worker: Worker, cache: str, tokens: int) -> bool:
        speed = self.speeds.get((worker.name, cache))
        if speed is None or tokens / speed <= self.plan.limit:
            return False
        self._note(f"{worker.name}, {cache} cache: {tokens} tokens would take {tokens / speed:.0f} s or more; left out")
        return True

    def _fill(self, worker: Worker, cache: str, row: dict[str, Any], op: str) -> dict[str, Any] | None:
        """What is known of a cache with the prompts of a row in it, and room for the tokens of a run."""
        places = {key: row[key] for key in ("depth", "parallel", "shared") if key in row}
        if row["depth"]:
            self.say(f"  filling: {worker.name}, {cache}")
        made = self.ask(worker, op, cache, **places, room=self.plan.tokens + 1)
        if made is not None:
            made["fill_seconds"] = made.pop("seconds")
            if row["depth"]:
                self.speeds[worker.name, cache] = row["depth"] * row.get("parallel", 1) / made["fill_seconds"]
            if made.get("kl_from_alone", 0) > DISAGREEMENT:
                self._note(
                    f"{worker.name}, {cache} cache: {row['parallel']} texts at depth {row['depth']} do not get what "
                    f"each gets alone: KL {made['kl_from_alone']:.2g}"
                )
        return made

    def _measure_bandwidth(self) -> None:
        for worker in self.workers:
            if worker.name == "kvrun":
                answer = self.ask(worker, "bandwidth")
                self.bandwidths += [answer["gb_s"]] if answer else []
                return

    def ask(self, worker: Worker, op: str, cache: str | None = None, **arguments: Any) -> dict[str, Any] | None:
        """The answer; None, with a line in `left_out`, where there is none. A cache that fails is not used again,
        and neither is a worker that crashed."""
        if worker not in self.workers:
            return None
        which = {} if cache is None else {"cache": cache}
        try:
            return worker.ask(op, **which, **arguments)
        except RequestError as error:
            self._note(f"{worker.name}{f', {cache} cache' if cache else ''}: {op} failed: {error}; left out")
            if cache is not None:
                worker.caches.pop(cache, None)
        except Crash as error:
            doing = f"{op}{f' with a {cache} cache' if cache else ''}"
            self._note(f"{worker.name}: {error} in {doing}; left out from there on")
            self._drop(worker)
        return None

    def _note(self, line: str) -> None:
        self.left_out.append(line)
        self.say(line)

    def _drop(self, worker: Worker) -> None:
        if worker in self.workers:
            self.workers.remove(worker)
            worker.close()


# --- the command -----------------------------------------------------------------------------------


def runtimes_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that say which model, and where to look for the runtimes."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL.gguf")
    add("--requantize", choices=("q4_0", "q4_1", "q8_0"), help="matrices in this type for all, embedding kept")
    add("--kvrun-python", metavar="PYTHON", default=sys.executable, help="interpreter with kvrun (this one)")
    add(
        "--peer-python",
        metavar="PYTHON",
        default=[],
        action="extend",
        nargs="+",
        help="more, to look for peers in",
    )
    return parser


def build_parser() -> argparse.ArgumentParser:
    parser = runtimes_parser(__doc__)
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+"}
    add("--peers", metavar="NAME", choices=FAMILIES[1:], **several, help=f"of {', '.join(FAMILIES[1:])} (all)")
    add("--threads", type=positive, default=2, help="threads of each runtime (2)")
    add("--kv", metavar="FORMAT", default=["f16", "q8", "q4", "q2"], **several, help="caches (f16 q8 q4 q2)")
    add(
        "--depths",
        metavar="N",
        type=whole,
        **several,
        help=f"({' '.join(map(str, DEPTHS))}; with --parallel {' '.join(map(str, BATCH_DEPTHS))})",
    )
    add(
        "--prefill",
        metavar="N",
        type=whole,
        **several,
        help=f"prompts ({' '.join(map(str, PREFILLS))}); 0: none",
    )
    add("--parallel", metavar="N", type=positive, **several, help="measure so many texts in one step instead, and one")
    add("--shared", metavar="N", type=whole, help="tokens that texts of --parallel begin with in common (0)")
    add("--runs", type=positive, default=3, help="runs of each, of which median and best are shown (3)")
    add("--tokens", type=positive, default=32, help="decoded of a text in a run, or as many as take a second (32)")
    add("--patience", metavar="SECONDS", type=float, default=20, help="a longer run is not repeated (20)")
    add(
        "--limit",
        metavar="SECONDS",
        type=float,
        default=120,
        help="a prompt expected to take longer is left out (120)",
    )
    add("--timeout", metavar="SECONDS", type=float, default=900, help="for one answer of a runtime (900)")
    add("--json", metavar="FILE", help="write every single time there")
    add("--plots", metavar="FOLDER", help="write decode speed and memory by depth there, as peers-*.png")
    return parser


def whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def positive(text: str) -> int:
    if whole(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def check(args: argparse.Namespace) -> None:
    """BenchmarkError, before anything is measured, for what would fail in the end."""
    if not Path(args.model).is_file():
        raise BenchmarkError(f"{args.model}: there is no such file")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise BenchmarkError(f"{args.json}: there is no such folder")
    if args.plots and not Path(args.plots).is_dir():
        raise BenchmarkError(f"{args.plots}: there is no such folder")
    if args.plots and importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError("matplotlib is missing; --plots needs kvrun[plot]")


def plan_of(args: argparse.Namespace) -> Plan:
    """BenchmarkError for arguments that do not go together."""
    if not args.parallel and args.shared is not None:
        raise BenchmarkError("shared: only texts of --parallel can begin with the same")
    if args.parallel:
        given = [name for name in ("prefill", "plots") if getattr(args, name)]
        others = [name for name in args.peers or () if name not in WITH_BATCHES]
        if given:
            raise BenchmarkError(f"{given[0]}: not together with --parallel, which measures several texts alone")
        if others:
            raise BenchmarkError(f"peers: {others[0]} cannot run several texts here; {', '.join(WITH_BATCHES)} can")
    depths = args.depths or (BATCH_DEPTHS if args.parallel else DEPTHS)
    prefills = [] if args.parallel else PREFILLS if args.prefill is None else args.prefill
    if (args.shared or 0) > min(depths):
        raise BenchmarkError(f"shared: {args.shared} tokens are more than the least of the depths, {min(depths)}")
    return Plan(
        args.kv,
        sorted(set(depths)),
        sorted({n for n in prefills if n}),
        args.runs,
        args.tokens,
        args.patience,
        args.limit,
        sorted({1, *args.parallel}) if args.parallel else [],
        args.shared or 0,
    )


def compare(args: argparse.Namespace, scratch: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The report, as JSON has it. BenchmarkError if kvrun itself cannot be measured."""
    check(args)
    plan = plan_of(args)
    families = args.peers or (WITH_BATCHES if plan.parallel else FAMILIES[1:])
    found, lines = locate([args.kvrun_python, *args.peer_python], ["kvrun", *families])
    for line in lines:
        say(line)
    if not any(package.runtime == "kvrun" for package, _, _ in found):
        raise BenchmarkError(f"kvrun is not installed for {args.kvrun_python}")
    path = os.path.abspath(args.model)
    if args.requantize:
        path = str(scratch / f"{Path(path).stem}-{args.requantize}.gguf")
        requantize(args.model, Path(path), args.requantize)
    facts = gguf_facts(path)
    longest = max([depth + args.tokens + 1 for depth in plan.depths] + plan.prefills)
    if longest > facts["context"]:
        raise BenchmarkError(f"{longest} tokens are more than the model's context of {facts['context']}")
    before = peers_report.machine()
    workers = start(found, scratch, args.timeout)
    everyone = {worker.name: worker.info for worker in workers}
    comparison = Comparison(workers, plan, say, lines)
    try:
        comparison.load(gguf=path, scratch=str(scratch), threads=args.threads, **wanted(facts))
        comparison.agree(scratch)
        comparison.run()
    finally:
        for worker in list(comparison.workers):
            worker.close()
    rates = comparison.bandwidths
    return peers_report.summarize(
        {
            "date": time.strftime("%Y-%m-%d"),
            "model": Path(args.model).name + (f" as {args.requantize}" if args.requantize else ""),
            "weights": facts["weights"],
            "threads": args.threads,
            "machine": before,
            "memory_bandwidth_gb_s": statistics.median(rates) if rates else None,
            "memory_bandwidth_samples_gb_s": rates,
            "runtimes": everyone,
            "left_out": comparison.left_out,
            "results": comparison.results,
        }
    )


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="kvrun-peers-") as scratch:
            report = compare(args, Path(scratch), lambda line: print(line, file=sys.stderr, flush=True))
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
        peers_report.show(report)
        if args.plots:
            peers_report.plot(report, Path(args.plots))
    except (BenchmarkError, OSError) as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
