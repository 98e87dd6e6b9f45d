"""A cache on a device holds, keeps and gives away the same bytes as one of the core."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest

from kvrun import _core
from kvrun._core import bench as core
from kvrun.cuda.cache import CudaKVCache
from kvrun.errors import OptionError
from support.cuda.host_device import HostMemoryDevice

OPTIONS = [dict(ctx=132, sinks=4, window=64), dict(ctx=64, sinks=0, window=0), dict(ctx=200, sinks=70, window=1)]
FORMATS = [("f32", "f32"), ("f16", "q4"), ("q8", "q2"), ("q4", "f16")]
LENGTHS = (0, 1, 3, 64, 68, 70, 131, 132, 133, 197, 260, 1000)


def stand_in(windows=(None, 40, None), limit=None):
    description = SimpleNamespace(n_layers=3, n_kv_heads=2, head_dim=20, sliding_windows=windows)
    device = HostMemoryDevice(limit)
    return SimpleNamespace(description=description, device=device, new_buffers=lambda kv: None)


def pair(engine, k, v, options, n_tokens, seed=0):
    """A cache of the core with so many random tokens, and its equal on the device."""
    cpu, gpu = _core.KVCache(engine, k, v, **options), CudaKVCache(engine, k, v, **options)
    core.fill(cpu, n_tokens, seed)
    put(gpu, cpu)
    return cpu, gpu


def put(gpu, cpu):
    """What a cache holds, of which some may lie in other caches' memory."""
    whole = _core.KVCache(gpu.engine, cpu.k, cpu.v, cpu.ctx, cpu.n_sinks, cpu.window)
    whole.load_state(cpu.n_tokens, cpu.lost, cpu.state())
    gpu.device.write(gpu.memory.ptr, whole.bytes)
    gpu.host.count(cpu.n_tokens, cpu.packed_ever)


def same(gpu, cpu):
    numbers = ("n_tokens", "lost", "outgrown", "nbytes", "ctx", "window", "n_sinks")
    assert [getattr(gpu, name) for name in numbers] == [getattr(cpu, name) for name in numbers]
    assert np.array_equal(gpu.state(), cpu.state())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("formats", FORMATS, ids="/".join)
def test_state_truncation_and_copies(formats, options):
    engine = stand_in()
    for n in LENGTHS:
        cpu, gpu = pair(engine, *formats, options, n)
        same(gpu, cpu)
        other, kept = gpu.copy(), cpu.copy()
        for keep in sorted({n, n - 1, n - 2, n - 63, n - 64, n - 65, n - 130, n // 2, 5, 1, 0}, reverse=True):
            try:
                cpu.truncate(keep)
            except ValueError as error:
                with pytest.raises(ValueError, match=re.escape(str(error))):
                    gpu.truncate(keep)
            else:
                gpu.truncate(keep)
            same(gpu, cpu)
        same(other, kept)
        gpu.load_state(other.n_tokens, other.lost, other.state())
        same(gpu, kept)
        gpu.reset()
        assert gpu.n_tokens == 0 and other.n_tokens == n


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("formats", FORMATS, ids="/".join)
def test_rewinding(formats, options):
    """Snapshots are interchangeable, and lead back to the same."""
    engine = stand_in()
    for n in LENGTHS:
        cpu, gpu = pair(engine, *formats, options, n)
        snapshots = cpu.snapshot(), gpu.snapshot()
        assert np.array_equal(*(snapshot.data for snapshot in snapshots))
        assert gpu.snapshot(snapshots[0].nbytes - 1) is None
        more, _ = pair(engine, *formats, options, n + 150, seed=1)
        for keep in (n, max(0, n - 1), n + 149, n + 80):
            for given in (None, *snapshots):
                cpu = more.copy()
                put(gpu, cpu)
                assert cpu.exact_from(3) == gpu.exact_from(3) and cpu.verifiable(16) == gpu.verifiable(16)
                assert cpu.rewind(keep, given) == gpu.rewind(keep, given)
                same(gpu, cpu)


def test_a_state_that_does_not_fit_changes_nothing():
    cpu, gpu = pair(stand_in(), "q4", "q4", OPTIONS[0], 200)
    for wrong in ((200, 0, cpu.state()[:-1]), (-1, 0, cpu.state()), (200, 5, cpu.state())):
        with pytest.raises(ValueError):
            gpu.load_state(*wrong)
        same(gpu, cpu)


@pytest.mark.parametrize("n", [0, 5, 100, 1000])
def test_filled_for_measurements(n):
    """As the core's, but that layers of one kind are all alike."""
    gpu = CudaKVCache(stand_in(), "q4", "q8", **OPTIONS[0])
    gpu.fill(n)
    assert gpu.n_tokens == n
    layers = [layer["start"] for layer in gpu.host.geometry()["layers"]] + [gpu.nbytes]
    memory = np.empty(gpu.nbytes, np.uint8)
    gpu.device.read(memory, gpu.memory.ptr)
    parts = [memory[a:b] for a, b in itertools.pairwise(layers)]
    assert np.array_equal(parts[0], parts[2]) and len(parts[0]) != len(parts[1]) and bool(parts[0].any()) == (n > 0)


def test_memory_that_is_freed():
    engine = stand_in()
    gpu = CudaKVCache(engine)
    assert sum(engine.device.live.values()) == gpu.nbytes
    other = gpu.copy()
    del gpu, other
    assert not engine.device.live


def test_a_cache_that_does_not_fit():
    """The error says what was needed, what is free, and what would fit, which then does."""
    room = _core.kv_bytes(stand_in().description, "q4", "q4", 100_000) + 5000
    engine = stand_in(limit=room)
    with pytest.raises(OptionError) as caught:
        CudaKVCache(engine, ctx=100_000)
    match = re.fullmatch(
        r"ctx: a f16 cache of 100000 tokens does not fit: (.*) GB of the GPU's memory are needed, (.*) GB are free; "
        r"--ctx (\d+) or --kv (\w+) would fit",
        str(caught.value),
    )
    assert match and float(match[1]) > float(match[2]) and match[4] == "q4"
    assert 20_000 < int(match[3]) < 50_000
    CudaKVCache(engine, ctx=int(match[3]))
    CudaKVCache(engine, ctx=100_000, k=match[4], v=match[4])
    with pytest.raises(OptionError):
        CudaKVCache(engine, ctx=int(match[3]) + 200)
    with pytest.raises(OptionError, match="no cache would fit"):
        CudaKVCache(stand_in(limit=1000))
