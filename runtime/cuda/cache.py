"""A key/value cache on the device: the same bytes in the same places as `_core.KVCache` has.

What moves tiles or takes them apart is done by a `_core.KVCache` with the same layout, on what it needs of the memory;
so is the counting. Its own memory is only address space.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from kvrun import _core
from kvrun._core import bench as core
from kvrun.cuda import abi
from kvrun.errors import OptionError

if TYPE_CHECKING:
    from kvrun.cuda.engine import CudaEngine


class CudaKVCache:
    """As `_core.KVCache`, in the memory of the engine's device. OptionError if it does not fit."""

    def __init__(
        self,
        engine: CudaEngine,
        k: str = "f16",
        v: str = "f16",
        ctx: int = 2048,
        sinks: int = 4,
        window: int = 64,
        prefault: bool = False,  # the memory is there in any case
    ) -> None:
        self.host = _core.KVCache(engine, k, v, ctx, sinks, window)
        self.engine, self.device, self.lock = engine, engine.device, threading.Lock()
        try:
            self.memory = self.device.alloc(self.nbytes)
            self.device.zero(self.memory.ptr, self.nbytes)
            self.buffers = engine.new_buffers(self)
        except abi.DeviceMemoryError as error:
            raise OptionError(no_room(self, error)) from None

    description = property(lambda self: self.host.description)
    sliding_windows = property(lambda self: self.host.sliding_windows)
    n_tokens = property(lambda self: self.host.n_tokens)
    n_sinks = property(lambda self: self.host.n_sinks)
    window = property(lambda self: self.host.window)
    nbytes = property(lambda self: self.host.nbytes)
    ctx = property(lambda self: self.host.ctx)
    k = property(lambda self: self.host.k)
    v = property(lambda self: self.host.v)
    lost = property(lambda self: self.host.lost)
    outgrown = property(lambda self: self.host.outgrown)

    def layouts(self) -> list[np.ndarray]:
        """For each layer its abi.LAYOUT."""
        geometry = self.host.geometry()
        layers = geometry.pop("layers")
        shared = {name: value for name, value in geometry.items() if name in (abi.LAYOUT.names or ())}
        return [abi.struct(abi.LAYOUT, base=self.memory.ptr, **{**shared, **layer}) for layer in layers]

    def reset(self) -> None:
        with self.lock:
            self.host.reset()

    def truncate(self, n: int) -> None:
        """As `_core.KVCache.truncate`."""
        with self.lock:
            if n == self.n_tokens:
                return
            parts, mirror = self.host.parts(n), self._mirror()
            self._read(mirror, parts)
            mirror.truncate(n)
            self._write(mirror, parts)

    def exact_from(self, more: int = 0) -> int:
        """As `_core.KVCache.exact_from`."""
        return self.host.exact_from(more)

    def verifiable(self, most: int) -> int:
        """As `_core.KVCache.verifiable`."""
        return self.host.verifiable(most)

    def snapshot(self, most: int = 1 << 60) -> _core.Snapshot | None:
        """As `_core.KVCache.snapshot`, in the host's memory."""
        with self.lock:
            mirror = self._mirror()
            self._read(mirror, mirror.parts(changing=True))
            return mirror.snapshot(most)

    def rewind(self, n: int, snapshot: _core.Snapshot | None = None) -> bool:
        """As `_core.KVCache.rewind`."""
        with self.lock:
            if n == self.n_tokens:
                return True
            mirror = self._mirror()
            self._read(mirror, np.concatenate([mirror.parts(n), mirror.parts(changing=True)]))
            done = mirror.rewind(n, snapshot)
            if done:
                self._write(mirror, mirror.parts(changing=True))
            return done

    def copy(self) -> CudaKVCache:
        """As `_core.KVCache.copy`; OptionError if it does not fit."""
        other = CudaKVCache(self.engine, self.k, self.v, self.ctx, self.n_sinks, self.window)
        with self.lock:
            self.device.copy(other.memory.ptr, self.memory.ptr, self.nbytes)
            other.host.count(self.host.n_tokens, self.host.packed_ever)
        return other

    def state(self) -> np.ndarray:
        """As `_core.KVCache.state`."""
        with self.lock:
            mirror = self._mirror()
            self._read(mirror, mirror.parts())
            return mirror.state()

    def load_state(self, n_tokens: int, lost: int, state: np.ndarray) -> None:
        """As `_core.KVCache.load_state`."""
        with self.lock:
            mirror = self._mirror()
            mirror.load_state(n_tokens, lost, state)
            self._write(mirror, mirror.parts())

    def fill(self, n_tokens: int) -> None:
        """As `_core.bench.fill`: random tokens at the speed of memory. Layers that are laid out alike are alike."""
        d = self.description
        made: dict[int, int] = {}
        with self.lock:
            for layer, window in zip(self.host.geometry()["layers"], self.sliding_windows, strict=True):
                at, n_bytes = self.memory.ptr + layer["start"], d.n_kv_heads * layer["head_bytes"]
                if window in made:
                    self.device.copy(at, made[window], n_bytes)
                    continue
                one = SimpleNamespace(
                    n_layers=1, n_kv_heads=d.n_kv_heads, head_dim=d.head_dim, sliding_windows=(window,)
                )
                options = (self.k, self.v, self.ctx, self.n_sinks, self.window)
                mirror = _core.KVCache(SimpleNamespace(description=one), *options)
                core.fill(mirror, n_tokens)
                self.device.write(at, mirror.bytes)
                made[window] = at
            self.host.count(n_tokens, 0)

    def _mirror(self) -> _core.KVCache:
        """A cache of the host that holds as much; its memory is empty."""
        mirror = _core.KVCache(self.engine, self.k, self.v, self.ctx, self.n_sinks, self.window)
        mirror.count(self.host.n_tokens, self.host.packed_ever)
        return mirror

    def _read(self, mirror: _core.KVCache, parts: np.ndarray) -> None:
        memory = mirror.bytes
        for start, size in parts.tolist():
            self.device.read(memory[start : start + size], self.memory.ptr + start)

    def _write(self, mirror: _core.KVCache, parts: np.ndarray) -> None:
        memory = mirror.bytes
        for start, size in parts.tolist():
            self.device.write(self.memory.ptr + start, memory[start : start + size])
        self.host.count(mirror.n_tokens, mirror.packed_ever)


def no_room(cache: CudaKVCache, error: abi.DeviceMemoryError) -> str:
    """What was needed, what is free, and what would fit in it: a smaller ctx, or formats of fewer bits."""
    room: int = error.free - max(0, error.needed - cache.nbytes)  # less what a cache needs besides

    def fits(k: str, v: str, ctx: int) -> bool:
        return _core.kv_bytes(cache.description, k, v, ctx, cache.n_sinks, cache.window) <= room

    low, high = cache.n_sinks + cache.window + 64, cache.ctx
    advice = []
    if fits(cache.k, cache.v, low):
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(cache.k, cache.v, middle) else (low, middle)
        advice.append(f"--ctx {low // 64 * 64 if low >= cache.n_sinks + cache.window + 128 else low}")
    formats = sorted(_core.KV_FORMATS, key=_core.KV_FORMATS.__getitem__, reverse=True)
    smaller = [name for name in formats if fits(name, name, cache.ctx)]
    if smaller:
        advice.append(f"--kv {smaller[0]}")
    would = f"; {' or '.join(advice)} would fit" if advice else "; no cache would fit"
    kind = cache.k if cache.k == cache.v else f"{cache.k}/{cache.v}"
    return f"ctx: a {kind} cache of {cache.ctx} tokens does not fit: {error}{would}"
