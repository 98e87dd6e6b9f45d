"""What `kvrun bench` measures: speed by cache format and depth, beside what the machine's memory can do.

Caches are filled with random tokens instead of a long prefill. Formats take turns, run by run, and memory is
measured before and after each run: a machine that others use too may be half as fast a second later. Figures
are medians.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from kvrun import _core
from kvrun._core import bench as core
from kvrun.backend import Cache, CacheT, CacheT_contra, Engine
from kvrun.errors import OptionError
from kvrun.measure import neighbours
from kvrun.measure.caches import fitting
from kvrun.options import CacheOptions, integer
from kvrun.session import new_cache
from kvrun.version import __version__

if TYPE_CHECKING:
    from kvrun.cuda.cache import CudaKVCache
    from kvrun.cuda.device import CudaDevice
    from kvrun.model import Model

TESTS = ("prefill", "decode", "batch", "attention", "cache", "contention")
ROOM = 128  # tokens that a cache has room for beyond its depth
SAMPLE_SECONDS, MAX_DECODE, MAX_REPEAT = 0.25, 64, 50  # of one run
COLD_BYTES, MAX_BYTES = 1 << 27, 1 << 30  # layers are repeated until a cache outgrows the CPU's own, within limits
PROMPT = 8  # tokens before the text of the cache test


@dataclass(frozen=True)
class Shape:
    """Attention of one layer of some model."""

    n_heads: int
    n_kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ "32/8/128": query heads, KV heads, head_dim. OptionError if that is no shape."""
        try:
            shape = cls(*map(int, text.split("/")))
        except (TypeError, ValueError):
            raise OptionError(f"shape: {text!r} is not HEADS/KV_HEADS/HEAD_DIM, as in 32/8/128") from None
        integer("shape: KV heads", shape.n_kv_heads, low=1, high=1024)
        integer("shape: heads", shape.n_heads, low=1, high=1024)
        integer("shape: head_dim", shape.head_dim, low=2, high=512)
        if shape.n_heads % shape.n_kv_heads or shape.head_dim % 2:
            raise OptionError(f"shape: {text!r}: heads must be a multiple of KV heads, and head_dim even")
        return shape

    def __str__(self) -> str:
        return f"{self.n_heads}/{self.n_kv_heads}/{self.head_dim}"


@dataclass(frozen=True)
class Contention:
    """Decoding beside `neighbours` busy processes of a kind (`kvrun.measure.neighbours`), each number of them for so
    many seconds; 0, which is alone, comes first and again last."""

    neighbours: tuple[int, ...]
    kind: str
    seconds: float
    depths: tuple[int, ...]
    formats: tuple[str, ...]

    @property
    def round(self) -> tuple[int, ...]:
        return (0, *(n for n in self.neighbours if n))


@dataclass(frozen=True)
class Plan:
    """What to measure. `formats`: "q4" or, K before V, "q4/q2". `sizes`: sinks and window, where given.
    `patience`: seconds after which no further run of the same kind is begun. `contention`: of the test of that name.
    `parallel`: numbers of texts of the batch test; `shared`: tokens that they begin with in common."""

    tests: tuple[str, ...]
    depths: tuple[int, ...]
    prefills: tuple[int, ...]
    formats: tuple[str, ...]
    shapes: tuple[Shape, ...]
    runs: int
    patience: float
    max_tokens: int
    sizes: dict[str, int | None]
    contention: Contention
    parallel: tuple[int, ...] = (1,)
    shared: tuple[int, ...] = (0,)

    def cache(self, name: str, tokens: int, context_length: int) -> CacheOptions:
        """A cache that has room for so many tokens and a few more."""
        return fitting(name, context_length, tokens + ROOM, **self.sizes)[1]

    @property
    def lengths(self) -> list[int]:
        """Where the cache test looks at the clock."""
        return sorted({n for n in (16, 32, 64, 128, 256, 512) if n < self.max_tokens} | {self.max_tokens})

    @property
    def attention_depths(self) -> list[int]:
        return [depth for depth in self.depths if depth > 0]

    @property
    def batches(self) -> list[tuple[int, int]]:
        """(depth, tokens in common) of the batch test: no more in common than there are."""
        return [(depth, shared) for depth in self.depths for shared in self.shared if shared <= depth]

    @property
    def steps(self) -> int:
        """Measured runs in all, for a progress bar."""
        each = len(self.formats) * self.runs
        shapes = len(self.shapes) or 1
        counts = {
            "prefill": len(self.prefills) * each,
            "decode": len(self.depths) * each,
            "batch": len(self.batches) * each * len(self.parallel),
            "attention": shapes * len(self.attention_depths) * each,
            "cache": self.max_tokens,
            "contention": self._contention_steps,
        }
        return sum(counts[test] for test in self.tests)

    @property
    def _contention_steps(self) -> int:
        plan = self.contention
        return len(plan.depths) * len(plan.formats) * (self.runs * len(plan.round) + 1)


class Sample(NamedTuple):
    """One run: seconds a token, and GB/s that memory was read at meanwhile, None where that is of no interest."""

    seconds: float
    bandwidth: float | None


class Steps(NamedTuple):
    """One run of decode steps: how many, the seconds of all, and of the longest."""

    tokens: int
    seconds: float
    longest: float


class Bench:
    """Runs a plan with a model; `progress(text)` is called before every run."""

    def __init__(self, model: Model, plan: Plan, progress: Callable[[str], None]) -> None:
        self.model, self.plan, self._progress = model, plan, progress
        self.engine: Engine[Any] = model.engine
        self._rng = np.random.default_rng(0)
        self._machine = machine_of(model)
        self._bandwidths: list[float] = []
        self._weights = weight_bytes(model)

    def report(self) -> dict[str, Any]:
        """Everything that the command shows, as plain values."""
        tests = {
            "prefill": self._prefill,
            "decode": self._decode,
            "batch": self._batch,
            "attention": self._attention,
            "cache": self._with_and_without,
            "contention": self._contention,
        }
        rows = [row for test in self.plan.tests for row in tests[test]()]
        if not self._bandwidths:
            self._measure_bandwidth(0.3)
        return {
            "version": __version__,
            "model": self.model.description.name,
            "file": str(self.model.file.path),
            "device": self._machine.kind,
            "cpu": self._machine.name,
            "isa": self._machine.isa,
            "threads": self.model.threads,
            "weight_bytes_per_token": self._weights,
            "memory_bandwidth_gb_s": statistics.median(self._bandwidths),
            "results": rows,
        }

    # --- tests ------------------------------------------------------------------------------------

    def _prefill(self) -> Iterator[dict[str, Any]]:
        for n in self.plan.prefills:
            caches = self._caches(n, self.engine)
            tokens = self._tokens(n)
            for kv in caches.values():
                self._feed(kv, tokens[:64])  # wakes threads and touches memory
            run = partial(self._prefill_run, tokens=tokens)
            samples = self._alternate(f"prefill of {n}", caches, run, with_bandwidth=False)
            for name, kv in caches.items():
                yield self._row("prefill", name, kv, 0, samples[name], None, tokens=n)

    def _prefill_run(self, kv: Cache, tokens: np.ndarray) -> float:
        """Seconds a token."""
        kv.reset()
        start = time.perf_counter()
        self._feed(kv, tokens)
        return (time.perf_counter() - start) / len(tokens)

    def _decode(self) -> Iterator[dict[str, Any]]:
        for depth in self.plan.depths:
            caches = self._caches(depth, self.engine)
            slowest = max(self._decode_run(kv, depth, 4) for kv in caches.values())
            n = max(4, min(MAX_DECODE, int(SAMPLE_SECONDS / slowest)))
            run = partial(self._decode_run, depth=depth, n=n)
            samples = self._alternate(f"decode at depth {depth}", caches, run)
            for name, kv in caches.items():
                read = self._weights + self._machine.bytes_read(kv, depth + 1)
                yield self._row("decode", name, kv, depth, samples[name], read, tokens=n)

    def _decode_run(self, kv: Cache, depth: int, n: int) -> float:
        """Seconds a token, over n of them from a depth on."""
        tokens = self._tokens(n + 1)
        self._machine.fill(kv, depth)
        self.engine.forward(tokens[:1], kv)
        start = time.perf_counter()
        for i in range(1, n + 1):
            self.engine.forward(tokens[i : i + 1], kv)
        return (time.perf_counter() - start) / n

    def _batch(self) -> Iterator[dict[str, Any]]:
        """Several texts of the same depth, a token of each in every step; all numbers of them in turn."""
        for depth, shared in self.plan.batches:
            for name in self.plan.formats:
                caches = self._copies(name, depth, max(self.plan.parallel))
                samples: dict[int, list[Sample]] = {n: [] for n in self.plan.parallel}
                held: dict[int, int] = {}
                start = time.perf_counter()
                for turn in range(self.plan.runs):
                    if turn and time.perf_counter() - start > self.plan.patience:
                        break
                    for n in self.plan.parallel:
                        self._progress(f"{n} texts at depth {depth}, {name} cache")
                        seconds, held[n] = self._batch_run(caches[:n], depth, shared)
                        samples[n].append(Sample(seconds, None))
                for n in self.plan.parallel:
                    size = sum(kv.nbytes for kv in caches[:n])
                    row = self._row("batch", name, caches[0], depth, samples[n], None, parallel=n, shared=shared)
                    one = statistics.median(s.seconds for s in samples[1]) if 1 in samples else None
                    times = None if one is None else one * row["tokens_per_second"]
                    yield {**row, "kv_bytes": size, "kv_bytes_held": held[n], "times_one": times}

    def _batch_run(self, caches: list[Cache], depth: int, shared: int) -> tuple[float, int]:
        """Seconds a token of each of the texts, over some steps from a depth on, and the bytes that the caches hold."""
        tokens = self._tokens(ROOM * len(caches)).reshape(ROOM, len(caches))
        caches = self._begun(caches, depth, shared)
        steps, spent = 0, 0.0
        while steps < ROOM - 1 and (steps < 4 or spent < SAMPLE_SECONDS * 2):
            items = [(kv, tokens[steps, i : i + 1], True, "last") for i, kv in enumerate(caches)]
            start = time.perf_counter()
            self.engine.step(items)
            if steps:  # the first wakes threads
                spent += time.perf_counter() - start
            steps += 1
        return spent / (steps - 1) / len(caches), self.engine.bytes_held(caches)

    def _begun(self, caches: list[Cache], depth: int, shared: int) -> list[Cache]:
        """Caches of texts of this depth: those given, or copies of the first one, each with tokens of its own after the
        first `shared`."""
        if not shared:
            for kv in caches:
                self._machine.fill(kv, depth)
            return caches
        self._machine.fill(caches[0], shared)
        copies: list[Cache] = [caches[0].copy() for _ in caches]
        for kv in copies:
            rest = self._tokens(depth - shared)
            for start in range(0, len(rest), self.engine.max_chunk):
                self.engine.forward(rest[start : start + self.engine.max_chunk], kv, "none", decoding=False)
        return copies

    def _copies(self, name: str, depth: int, n: int) -> list[Cache]:
        """As many caches; OptionError when the machine has no memory for them."""
        first = self._caches(depth, self.engine, (name,))[name]
        needed, there = n * first.nbytes, self._machine.memory
        if there is not None and needed > there:
            raise OptionError(
                f"parallel: {n} caches of {depth} tokens take {needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f}"
            )
        return [first, *(self._cache(name, depth, self.engine) for _ in range(n - 1))]

    def _attention(self) -> Iterator[dict[str, Any]]:
        d = self.model.description
        own = Shape(d.n_heads, d.n_kv_heads, d.head_dim)
        for shape in self.plan.shapes or (own,):
            n_layers = 1 if self.plan.shapes else d.n_layers
            for depth in self.plan.attention_depths:
                yield from self._attention_at(shape, n_layers, depth)

    def _attention_at(self, shape: Shape, n_layers: int, depth: int) -> Iterator[dict[str, Any]]:
        """Measured with more layers than n_layers, reported for these."""
        small = {name: self._cache(name, depth, self._stand_in(shape, n_layers)) for name in self.plan.formats}
        times: int = min(
            math.ceil(COLD_BYTES / min(core.bytes_read(kv, depth + 1) for kv in small.values())),
            max(1, MAX_BYTES // max(kv.nbytes for kv in small.values())),
        )
        engine = self._stand_in(shape, n_layers * times)
        caches = self._caches(depth, engine)
        for kv in caches.values():
            core.fill(kv, depth + 1)
        slowest = max(core.attention(engine, kv)[0] for kv in caches.values())
        repeat = max(1, min(MAX_REPEAT, int(SAMPLE_SECONDS / slowest)))

        def run(kv: _core.KVCache) -> float:
            return core.attention(engine, kv, repeat)[0] / times

        samples = self._alternate(f"attention at depth {depth}", caches, run)
        for name, kv in small.items():
            read = core.bytes_read(kv, depth + 1)
            more = {"shape": str(shape), "layers": n_layers, "measured_layers": n_layers * times}
            yield self._row("attention", name, kv, depth, samples[name], read, **more)

    def _with_and_without(self) -> Iterator[dict[str, Any]]:
        """Without a cache every step runs the whole text as a prefill. The text is that of the cached run, so
        that both do the same steps; the tokens that both choose alike are counted."""
        name, lengths = self.plan.formats[0], self.plan.lengths
        prompt, n = self._tokens(PROMPT), self.plan.max_tokens
        with_cache, text = self._generate(self._cache(name, PROMPT + n, self.engine), prompt, n)
        kv = self._cache(name, PROMPT + n, self.engine)
        everything = np.concatenate([prompt, text])
        start, same = time.perf_counter(), 0
        for i in range(n):
            self._progress(f"token {i + 1} of {n} without a cache")
            kv.reset()
            same += int(self._feed(kv, everything[: PROMPT + i]).argmax()) == int(text[i])
            if i + 1 in lengths:
                without = time.perf_counter() - start
                yield self._row(
                    "cache",
                    name,
                    kv,
                    PROMPT,
                    [Sample(with_cache[i] / (i + 1), None)],
                    None,
                    tokens=i + 1,
                    seconds=with_cache[i],
                    seconds_without=without,
                    ratio=without / with_cache[i],
                    same_tokens=same,
                )

    def _generate(self, kv: Cache, prompt: np.ndarray, n: int) -> tuple[list[float], np.ndarray]:
        """n greedy tokens int32, and the seconds until each was there."""
        token, text, seconds = prompt, [], []
        self.engine.forward(prompt, kv)  # not measured
        kv.reset()
        start = time.perf_counter()
        for _ in range(n):
            text.append(int(self._feed(kv, token).argmax()))
            token = np.array(text[-1:], np.int32)
            seconds.append(time.perf_counter() - start)
        return seconds, np.array(text, np.int32)

    def _contention(self) -> Iterator[dict[str, Any]]:
        """All numbers of neighbours in turn, round by round, alone once more at the end: the machine may have become
        another meanwhile."""
        plan = self.plan.contention
        for depth in plan.depths:
            caches = self._caches(depth, self.engine, plan.formats)
            runs: dict[tuple[str, int], list[Steps]] = {(name, n): [] for name in caches for n in plan.round}
            start = time.perf_counter()
            for turn in range(self.plan.runs):
                if turn and time.perf_counter() - start > self.plan.patience:
                    break
                for n in plan.round:
                    self._beside(n, depth, caches, runs)
            self._beside(0, depth, caches, runs)
            for name, kv in caches.items():
                for n in plan.round:
                    yield self._contention_row(name, kv, depth, n, runs[name, n], runs[name, 0])

    def _beside(self, n: int, depth: int, caches: dict[str, Cache], runs: dict[tuple[str, int], list[Steps]]) -> None:
        """A run of each cache beside n neighbours."""
        plan = self.plan.contention
        with neighbours.Neighbours(n, plan.kind) as others:
            for name, kv in caches.items():
                self._progress(f"decode at depth {depth} beside {n}, {name} cache")
                runs[name, n].append(self._steps_for(plan.seconds, kv, depth))
                others.check()

    def _steps_for(self, seconds: float, kv: Cache, depth: int) -> Steps:
        """Decode steps until they have taken so long, from a depth on and back to it whenever the cache has no room;
        only steps are timed."""
        tokens = self._tokens(ROOM)
        n, total, longest = 0, 0.0, 0.0
        while total < seconds:
            self._machine.fill(kv, depth)
            self.engine.forward(tokens[:1], kv)  # wakes threads
            for i in range(1, ROOM):
                start = time.perf_counter()
                self.engine.forward(tokens[i : i + 1], kv)
                step = time.perf_counter() - start
                n, total, longest = n + 1, total + step, max(longest, step)
                if total >= seconds:
                    break
        return Steps(n, total, longest)

    def _contention_row(
        self, name: str, kv: Cache, depth: int, n: int, runs: list[Steps], alone: list[Steps]
    ) -> dict[str, Any]:
        row = self._row("contention", name, kv, depth, [Sample(run.seconds / run.tokens, None) for run in runs], None)
        cpus, threads = _core.max_threads(), self.model.threads
        speeds = [run.tokens / run.seconds for run in alone]
        fair = neighbours.fair_share(cpus, threads, n)
        share = row["tokens_per_second"] * statistics.median(run.seconds / run.tokens for run in alone)
        return {
            **row,
            "neighbours": n,
            "neighbour_kind": self.plan.contention.kind,
            "cpus": cpus,
            "tokens": sum(run.tokens for run in runs),
            "seconds": sum(run.seconds for run in runs),
            "of_alone": share,
            "fair_share": fair,
            "of_fair_share": share / fair,
            "longest_step_seconds": max(run.longest for run in runs),
            "alone_first_and_last": [speeds[0], speeds[-1]],
        }

    # --- parts ------------------------------------------------------------------------------------

    def _tokens(self, n: int) -> np.ndarray:
        return self._rng.integers(0, self.model.vocab_size, n).astype(np.int32)

    def _feed(self, kv: Cache, tokens: np.ndarray) -> np.ndarray:
        """Logits of the last of the tokens."""
        most = self.engine.max_chunk
        last = (len(tokens) - 1) // most * most
        for start in range(0, last, most):
            self.engine.forward(tokens[start : start + most], kv, "none")
        return self.engine.forward(tokens[last:], kv)

    def _stand_in(self, shape: Shape, n_layers: int) -> Any:
        """What the core takes for an engine where weights are not needed."""
        scale = shape.head_dim**-0.5
        description = SimpleNamespace(n_layers=n_layers, attention_scale=scale, **vars(shape))
        engine = SimpleNamespace(description=description, threads=self.model.threads)
        engine.new_cache = partial(_core.KVCache, engine)
        return engine

    def _cache(self, name: str, tokens: int, engine: Engine[CacheT]) -> CacheT:
        return new_cache(engine, self.plan.cache(name, tokens, self.model.description.context_length))

    def _caches(self, tokens: int, engine: Engine[CacheT], formats: tuple[str, ...] | None = None) -> dict[str, CacheT]:
        """One of each format; OptionError when the machine has no memory for all."""
        caches = {name: self._cache(name, tokens, engine) for name in formats or self.plan.formats}
        needed, there = sum(kv.nbytes for kv in caches.values()), self._machine.memory
        if there is not None and needed > there:
            raise OptionError(
                f"caches of {tokens} tokens take {needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f}; "
                "a smaller --depth, or fewer formats in --kv, need less"
            )
        return caches

    def _alternate(
        self,
        what: str,
        caches: dict[str, CacheT],
        run: Callable[[CacheT], float],
        with_bandwidth: bool = True,
    ) -> dict[str, list[Sample]]:
        """What `run` returns for each cache, all taking turns, beside the bandwidth just before and after."""
        samples: dict[str, list[Sample]] = {name: [] for name in caches}
        start = time.perf_counter()
        for turn in range(self.plan.runs):
            if turn and time.perf_counter() - start > self.plan.patience:
                break
            before = self._measure_bandwidth() if with_bandwidth else 0.0
            for name, kv in caches.items():
                self._progress(f"{what}, {name} cache")
                seconds = run(kv)
                after = self._measure_bandwidth() if with_bandwidth else 0.0
                samples[name].append(Sample(seconds, (before + after) / 2 if with_bandwidth else None))
                before = after
        return samples

    def _measure_bandwidth(self, seconds: float = 0.06) -> float:
        self._bandwidths.append(self._machine.read_bandwidth(seconds))
        return self._bandwidths[-1]

    def _row(
        self,
        test: str,
        name: str,
        kv: Cache,
        depth: int,
        samples: list[Sample],
        read: int | None,
        **more: Any,
    ) -> dict[str, Any]:
        """One result. `read`: bytes a token, None where they are not what limits it."""
        shares = [read / s.seconds / (1e9 * s.bandwidth) for s in samples if read is not None and s.bandwidth]
        return {
            "test": test,
            "kv": name,
            "depth": depth,
            "tokens_per_second": 1 / statistics.median(s.seconds for s in samples),
            "bytes_per_token": read,
            "bandwidth_fraction": statistics.median(shares) if shares else None,
            "kv_bytes": kv.nbytes,
            "ctx": kv.ctx,
            "window": kv.window,
            "runs": len(samples),
            **more,
        }


# --- the machine and the model --------------------------------------------------------------------


class Machine(Protocol[CacheT_contra]):
    """What runs a model, for `Bench`. `memory`: bytes for caches, where they are known."""

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def memory(self) -> int | None: ...

    def read_bandwidth(self, seconds: float) -> float:
        """GB/s that memory is read at, measured for so long."""

    def fill(self, kv: CacheT_contra, n_tokens: int) -> None:
        """Put random tokens into a cache."""

    def bytes_read(self, kv: CacheT_contra, n_tokens: int) -> int:
        """Bytes of the cache that a step reads when it holds so many tokens."""


class HostMachine:
    """What runs a model on the CPU. `memory`: bytes for caches, where the system tells."""

    kind = "cpu"

    def __init__(self, threads: int) -> None:
        self.name, self.isa, self.memory = cpu_name(), _core.isa(), physical_memory()
        self._threads, self._buffer = threads, core.stream_buffer(threads)

    def read_bandwidth(self, seconds: float) -> float:
        return core.read_bandwidth(self._threads, self._buffer, seconds)

    fill = staticmethod(core.fill)
    bytes_read = staticmethod(core.bytes_read)


class DeviceMachine:
    """The same of a GPU. A cache that its memory has no room for cannot be made in the first place."""

    kind, memory = "cuda", None

    def __init__(self, device: CudaDevice) -> None:
        self.name, self.isa, self.read_bandwidth = device.name, device.architecture, device.read_bandwidth

    def fill(self, kv: CudaKVCache, n_tokens: int) -> None:
        kv.fill(n_tokens)

    def bytes_read(self, kv: CudaKVCache, n_tokens: int) -> int:
        return core.bytes_read(kv.host, n_tokens)


def machine_of(model: Model) -> Machine[Any]:
    device = getattr(model.engine, "device", None)
    return HostMachine(model.threads) if device is None else DeviceMachine(device)


def weight_bytes(model: Model) -> int:
    """Bytes of weights that a decode step reads: every matrix, but of experts those that a token goes through, and of
    the embeddings one row, unless that of tokens is the head as well."""
    weights, d = model.file.weights, model.description
    total = 0
    for name, weight in weights.items():
        if name in ("embed.weight", "positions.weight"):
            total += weight.data.nbytes // weight.rows
        elif ".experts." in name:
            total += weight.data.nbytes * (d.experts_used or 0) // (d.n_experts or 1)
        else:
            total += weight.data.nbytes
    return total + d.tie_embeddings * weights["embed.weight"].data.nbytes


def physical_memory() -> int | None:
    """Bytes of memory, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
