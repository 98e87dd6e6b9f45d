"""Caches that have tiles in common: each is what it would be alone, and their memory is what the pool says."""

import threading
from pathlib import Path

import numpy as np
import pytest

from kvrun import _core
from kvrun._core import cpus
from kvrun.convert import convert
from kvrun.files.model_file import read_model_file
from support.cases import run_all, some

GEMMA3 = Path(__file__).parents[1] / "fixtures" / "families" / "gemma3"
CACHES = {
    "f32": {"k": "f32", "v": "f32", "ctx": 300},
    "q8": {"k": "q8", "v": "q8", "ctx": 400, "window": 16},
    "q4, small": {"k": "q4", "v": "q4", "ctx": 132, "sinks": 4},
    "q4/q2, no sinks": {"k": "q4", "v": "q2", "ctx": 210, "sinks": 0, "window": 16},
}


def load(path):
    file = read_model_file(path)
    d = file.description
    return _core.Engine(d, file.weights, file.vectors, d.rope_tables, 2)


@pytest.fixture(scope="module")
def wide(converted):
    return load(converted("wide", "q8_0"))


@pytest.fixture(scope="module", params=["wide", "sliding windows"])
def engine(request, wide, tmp_path_factory):
    if request.param == "wide":
        return wide
    path = tmp_path_factory.mktemp("model") / "model.bin"
    convert(GEMMA3, path, "q4_1", tokenizer=False)
    return load(path)


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch):
    monkeypatch.setattr(cpus, "usable", lambda: 2)


class Twins:
    """A cache that shares tiles, and one with the same contents that shares none."""

    def __init__(self, engine, options, shared, alone=None):
        self.engine, self.options, self.shared = engine, options, shared
        self.alone = _core.KVCache(engine, **options) if alone is None else alone
        self.snapshots = []

    def equal(self):
        assert (self.shared.n_tokens, self.shared.lost) == (self.alone.n_tokens, self.alone.lost)
        assert np.array_equal(self.shared.state(), self.alone.state())

    def fork(self):
        alone = _core.KVCache(self.engine, **self.options)
        alone.load_state(self.alone.n_tokens, self.alone.lost, self.alone.state())
        other = Twins(self.engine, self.options, self.shared.copy(), alone)
        other.snapshots = list(self.snapshots)
        return other


OPERATIONS = {"step": 12, "fork": 3, "close": 2, "truncate": 2, "snapshot": 2, "rewind": 2}
OPERATIONS |= {"reset": 0.3, "load": 0.5, "new": 0.5}


class World:
    """Caches in one pool, and what is done with them at random."""

    MOST = 6

    def __init__(self, engine, options, seed):
        self.engine, self.options, self.rng = engine, options, np.random.default_rng(seed)
        self.pool = _core.KVPool()
        self.caches = []

    def new(self):
        if len(self.caches) < self.MOST:
            cache = _core.KVCache(self.engine, **self.options, pool=self.pool)
            self.caches.append(Twins(self.engine, self.options, cache))

    def one(self):
        return self.caches[self.rng.integers(len(self.caches))]

    def fork(self):
        if len(self.caches) < self.MOST:
            self.caches.append(self.one().fork())

    def close(self):
        self.caches.remove(self.one())

    def step(self):
        chosen = self.rng.permutation(len(self.caches))[: self.rng.integers(1, 4)]
        vocab, items = self.engine.description.vocab_size, []
        for i in chosen:
            n = int(self.rng.choice([1, 1, 2, 5, 60, 64, 70, 200]))
            written = bool(n <= 5 and self.rng.integers(2))
            items.append((self.caches[i], self.rng.integers(0, vocab, n).astype(np.int32), written))
        results = self.engine.step([(twins.shared, ids, written, "all") for twins, ids, written in items])
        for (twins, ids, written), logits in zip(items, results, strict=True):
            assert np.array_equal(logits, self.engine.forward(ids, twins.alone, "all", written))

    def truncate(self):
        twins = self.one()
        n = int(self.rng.integers(twins.shared.n_tokens + 1))
        outcome = []
        for cache in (twins.shared, twins.alone):
            try:
                cache.truncate(n)
                outcome.append(None)
            except ValueError as error:
                outcome.append(str(error))
        assert outcome[0] == outcome[1]

    def snapshot(self):
        twins = self.one()
        twins.snapshots = [*twins.snapshots[-3:], twins.shared.snapshot()]

    def rewind(self):
        twins = self.one()
        n = max(0, twins.shared.n_tokens - int(self.rng.integers(100)))
        snapshot = twins.snapshots[self.rng.integers(len(twins.snapshots))] if twins.snapshots else None
        if snapshot is not None and snapshot.n_tokens > twins.shared.n_tokens:
            snapshot = None
        assert twins.shared.rewind(n, snapshot) == twins.alone.rewind(n, snapshot)
        twins.snapshots = [one for one in twins.snapshots if one.n_tokens <= n]

    def reset(self):
        twins = self.one()
        for cache in (twins.shared, twins.alone):
            cache.reset()
        twins.snapshots = []

    def load(self):
        """What one has goes into another, as from a file."""
        twins, other = self.one(), self.one()
        for cache in (twins.shared, twins.alone):
            cache.load_state(other.shared.n_tokens, other.shared.lost, other.alone.state())
        twins.snapshots = []

    def run(self, n):
        weights = np.array([*OPERATIONS.values()])
        for name in self.rng.choice(list(OPERATIONS), n, p=weights / weights.sum()):
            if not self.caches:
                self.new()
            getattr(self, name)()
            assert self.pool.n_caches == len(self.caches)
            # A step of three caches that replace the same tile in full rings has room for one of them.
            assert self.pool.nbytes <= (self.MOST + 2) * _core.kv_bytes(self.engine.description, **self.options)
            if self.caches:
                self.one().equal()
        for twins in self.caches:
            twins.equal()


@pytest.mark.parametrize("options", some(CACHES.values(), [CACHES["q4, small"], CACHES["q8"]]), ids=str)
def test_random_operations(engine, options):
    """Nobody notices what others do to tiles that they have, too, and memory stays bounded."""
    world = World(engine, options, 1)
    world.run(1250 if run_all() else 120)
    in_use = world.pool.bytes_in_use
    assert 0 < in_use <= world.pool.nbytes
    world.caches.clear()
    assert (world.pool.n_caches, world.pool.bytes_in_use, world.pool.nbytes) == (0, 0, 0)


def tokens(n, seed=0):
    return np.random.default_rng(seed).integers(0, 60, n).astype(np.int32)


def test_a_fork_costs_a_window(wide):
    """To the byte: what is in common is there once."""
    options = {"k": "q4", "v": "q4", "ctx": 2000, "sinks": 4, "window": 64}
    kv = _core.KVCache(wide, **options)
    own = kv.pool.bytes_in_use  # sinks and window
    for _ in range(2):
        wide.forward(tokens(500), kv, "none")
    packed = (1000 - 4 - 64) // 64
    tile, rest = divmod(kv.pool.bytes_in_use - own, packed)
    assert rest == 0 and own + tile * -(-(2000 - 4 - 64) // 64) == kv.nbytes
    forks = [kv.copy() for _ in range(16)]
    assert kv.pool.bytes_in_use == 17 * own + packed * tile
    assert wide.bytes_held([kv, *forks]) == kv.pool.bytes_in_use
    assert wide.bytes_held(forks[:2]) == 2 * own + packed * tile
    for i, fork in enumerate(forks):
        wide.forward(tokens(64, i), fork, "none")
    assert kv.pool.bytes_in_use == 17 * own + (packed + 16) * tile
    pool = kv.pool
    del kv
    assert pool.bytes_in_use == 16 * own + (packed + 16) * tile
    assert pool.nbytes == 17 * forks[0].nbytes  # where the common tiles are
    again = forks[0].copy()
    assert pool.nbytes == 17 * forks[0].nbytes  # has taken the room of the first
    del forks[:], fork, again
    assert (pool.bytes_in_use, pool.nbytes, pool.n_caches) == (0, 0, 0)


def test_a_pool_that_is_full_says_so_at_once(wide):
    pool = _core.KVPool(most=2)
    kv = _core.KVCache(wide, pool=pool)
    other = kv.copy()
    for make in (kv.copy, lambda: _core.KVCache(wide, pool=pool)):
        with pytest.raises(MemoryError, match="room for 2 caches"):
            make()
    del other
    assert kv.copy().n_tokens == 0


def test_pools_that_cannot_be(wide):
    with pytest.raises(ValueError, match="one cache at least"):
        _core.KVPool(0)
    pool = _core.KVPool()
    kv = _core.KVCache(wide, "q4", "q4", pool=pool)
    for k, options in (("q8", {}), ("q4", {"ctx": 500}), ("q4", {"window": 128})):
        with pytest.raises(ValueError, match="other options"):
            _core.KVCache(wide, k, "q4", **options, pool=pool)
    assert pool.n_caches == 1 and kv.n_tokens == 0


def test_a_refused_step_takes_nothing(wide):
    kv = _core.KVCache(wide, "q4", "q4", 132)
    wide.forward(tokens(300), kv, "none")
    fork, before = kv.copy(), kv.pool.bytes_in_use
    with pytest.raises(ValueError):
        wide.step([(kv, tokens(64), False, "none"), (fork, [10**6], False, "none")])
    with pytest.raises(ValueError):
        wide.step([(kv, tokens(64), False, "none")] * 2)
    assert kv.pool.bytes_in_use == before


def test_forks_in_threads(wide):
    """Each thread goes on from a text of all, in a ring that turns: tiles that others still read are not written to."""
    options = {"k": "q4", "v": "q4", "ctx": 260, "sinks": 4}
    first = _core.KVCache(wide, **options)
    wide.forward(tokens(250), first, "none")
    expected, got = {}, {}

    def go_on(kv, seed):
        results = []
        for i in range(12):
            results.append(wide.forward(tokens(40, 100 * seed + i), kv, "last"))
            if i % 4 == 3:
                kv = kv.copy()
        return results

    for seed in range(4):
        alone = _core.KVCache(wide, **options)
        alone.load_state(first.n_tokens, first.lost, first.state())
        expected[seed] = go_on(alone, seed)
    for _ in range(3):
        forks = [first.copy() for _ in range(4)]
        threads = [
            threading.Thread(target=lambda seed, kv: got.update({seed: go_on(kv, seed)}), args=(seed, forks[seed]))
            for seed in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed in range(4):
            assert np.array_equal(got[seed], expected[seed])
