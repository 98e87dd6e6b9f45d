"""A cache whose kernels run on the host: one layer of attention, launched as the engine does."""

from __future__ import annotations

import ctypes
from functools import cache
from types import SimpleNamespace

import numpy as np

from kvrun import _core
from kvrun.cuda import abi
from kvrun.cuda import launch as launches
from support.cuda.host_device import compiled

JUNK = 0xFF  # NaN as a float
MODULES = ("cache", "attention", "attention_chunk")


@cache
def kernels(defines=()):
    """Launchers by name. defines: options of NVRTC ("-DNAME=1"), which only attention takes."""
    found: dict[str, object] = {}
    for module in MODULES:
        macros = defines if module != "cache" else ()
        text = "".join(f"#define {' '.join(macro[2:].split('='))}\n" for macro in macros) + abi.source(module)
        library = compiled(module, text)
        found |= {name: getattr(library, f"launch_{name}") for name in abi.kernel_names(text)}
    return found


def launch(name, grid, block, shared, *args, defines=()):
    """args: NumPy arrays are passed by their address, structures and numbers of NumPy by value."""
    by_address = [isinstance(a, np.ndarray) and a.dtype not in BY_VALUE for a in args]
    values = [np.uint64(a.ctypes.data) if p else a for a, p in zip(args, by_address, strict=True)]
    values = [np.ascontiguousarray(a).reshape(1) for a in values]
    grid = (*grid, 1, 1)[:3]
    pointers = (ctypes.c_void_p * len(values))(*(a.ctypes.data for a in values))
    kernels(defines)[name](*map(ctypes.c_uint, (*grid, block, 1, 1)), ctypes.c_size_t(shared), pointers)


BY_VALUE = (abi.LAYOUT, abi.ROPES)
NULL = np.uint64(0)


def aligned(n_bytes, fill=JUNK):
    raw = np.full(n_bytes + 256, fill, np.uint8)
    return raw[-raw.ctypes.data % 256 :][:n_bytes]


class KernelCache:
    """One layer: `kv` is the core's cache with the same layout, which counts tokens; `memory` is the device's.

    scale, softcap: of attention. spans: blocks that share a KV head in decoding. defines: macros of the attention
    kernels, none: they take any head size and formats.
    """

    def __init__(self, k, v, head_dim, n_kv_heads=1, sight=0, scale=0.17, softcap=0.0, spans=3, fill=JUNK, **options):
        description = SimpleNamespace(
            n_layers=1,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            attention_scale=scale,
            sliding_windows=(sight,),
            attention_softcap=softcap,
        )
        self.kv = _core.KVCache(SimpleNamespace(description=description), k, v, **options)
        self.memory = aligned(self.kv.nbytes, fill)
        self.geometry = self.kv.geometry()
        self.scale, self.softcap, self.spans = scale, softcap, spans
        layer = self.geometry["layers"][0]
        names = [name for name in abi.LAYOUT.names or () if name != "base"]
        self.layout = abi.struct(
            abi.LAYOUT, base=self.memory.ctypes.data, **{name: {**self.geometry, **layer}[name] for name in names}
        )
        self.packed_ever, self.defines = 0, ()

    def copy(self):
        d = self.kv.description
        options = dict(ctx=self.kv.ctx, sinks=self.kv.n_sinks, window=self.kv.window)
        other = KernelCache(
            self.kv.k,
            self.kv.v,
            d.head_dim,
            d.n_kv_heads,
            d.sliding_windows[0],
            self.scale,
            self.softcap,
            self.spans,
            **options,
        )
        other.memory[:], other.packed_ever = self.memory, self.packed_ever
        other.kv.count(self.kv.n_tokens, self.packed_ever)
        return other

    def reference(self):
        """An empty cache of the core with the same options."""
        kv, model = self.kv, SimpleNamespace(description=self.kv.description)
        return _core.KVCache(model, kv.k, kv.v, kv.ctx, kv.n_sinks, kv.window)

    def truncate(self, n):
        kv = self.host()
        kv.truncate(n)
        self.memory[:], self.packed_ever = kv.bytes, kv.packed_ever

    def host(self):
        """The core's cache with what this one holds."""
        self.kv.bytes[:] = self.memory
        self.kv.count(self.kv.n_tokens, self.packed_ever)
        return self.kv

    def feed(self, q, k, v, inv_freq, group):
        """A chunk: q [n, n_kv_heads * group * head_dim] or None, k and v [n, n_kv_heads * head_dim]; its attention."""
        g, n = self.geometry, len(k)
        half, heads, dim = g["head_dim"] // 2, g["n_kv_heads"], g["head_dim"]
        k, v = (np.ascontiguousarray(x, np.float32) for x in (k, v))
        inv_freq = np.ascontiguousarray(inv_freq, np.float64)
        step = np.zeros(1, abi.STEP)
        step["first"], step["packed_ever"], step["n"] = self.kv.n_tokens, self.packed_ever, n
        step = step.view(np.uint8)
        ropes = abi.struct(abi.ROPES, n=1, inv_freq=inv_freq.ctypes.data)
        rows = launches.cache.sink_rows(n)
        tables = [np.full(shape, np.nan, np.float32) for shape in [(n, half)] * 2 + [(rows, g["n_sinks"], half)] * 2]
        launch("step_angles", (3,), 32, 0, step, ropes, self.layout, np.int64(g["n_slots"]), np.int32(rows), *tables)
        staged, most = [NULL, NULL], 0
        if n > 1:
            staged, most = [aligned(size) for size in launches.cache.staged_bytes(g, n)], launches.cache.max_tiles(g, n)
        launch(
            "append",
            launches.cache.append_grid(g, n),
            launches.cache.THREADS,
            0,
            step,
            self.layout,
            k,
            v,
            np.int64(heads * dim),
            *tables[:2],
            *staged,
            np.int64(most),
        )
        out = None
        if q is not None:
            out = self._attend(step, np.ascontiguousarray(q, np.float32), n, group, tables, staged, most)
        if n > 1:
            launch(
                "commit",
                launches.cache.commit_grid(g, n),
                launches.cache.THREADS,
                0,
                step,
                self.layout,
                *staged,
                np.int64(most),
            )
        self.kv.count(self.kv.n_tokens + n, self.packed_ever)
        return out

    def _attend(self, step, q, n, group, tables, staged, most):
        g, width = self.geometry, self.geometry["n_kv_heads"] * group * self.geometry["head_dim"]
        assert q.shape == (n, width)
        out = np.full((n, width), np.nan, np.float32)
        scale, cap = (np.float32(x * np.log2(np.e)) for x in (self.scale, self.softcap))
        if n > 1:
            grid, shared = launches.attention_chunk.grid(g, group, n), launches.attention_chunk.shared_bytes(g)
            launch(
                "attend_chunk",
                grid,
                launches.attention.THREADS,
                shared,
                step,
                self.layout,
                q,
                np.int64(width),
                np.int32(group),
                scale,
                cap,
                *tables,
                *staged,
                np.int64(most),
                out,
                np.int64(width),
                defines=self.defines,
            )
            return out
        grid = self.spans, g["n_kv_heads"], -(-group // 8)
        partial = np.full(launches.attention.partial_floats(g, grid), np.nan, np.float32)
        counters = np.zeros(grid[1] * grid[2], np.int32)
        launch(
            "attend",
            grid,
            launches.attention.THREADS,
            launches.attention.attend_shared(g),
            step,
            self.layout,
            q,
            np.int32(group),
            scale,
            cap,
            *tables,
            partial,
            counters,
            out,
            defines=self.defines,
        )
        assert not counters.any()
        return out
