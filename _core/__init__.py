"""The core: engine, KV ring, sampler and kernels. Knows no file, tokenizer or terminal."""

from .cache import KV_FORMATS, Exclusive, KVCache, Snapshot, kv_bytes
from .cpus import max_threads
from .engine import MAX_CHUNK, MAX_ROWS, MAX_THREADS, MAX_WRITTEN, Engine
from .kernels import TILE, isa, isa_available
from .memory import MappedFile, advise_huge, anonymous, touch, trim
from .pool import KVPool
from .sampler import Sampler
from .weights import WEIGHT_TYPES, WeightType, column_multiple, pack, pack_raw, packed_size, raw_size, unpack

__all__ = [
    "KV_FORMATS",
    "MAX_CHUNK",
    "MAX_ROWS",
    "MAX_THREADS",
    "MAX_WRITTEN",
    "TILE",
    "WEIGHT_TYPES",
    "Engine",
    "Exclusive",
    "KVCache",
    "KVPool",
    "MappedFile",
    "Sampler",
    "Snapshot",
    "WeightType",
    "advise_huge",
    "anonymous",
    "column_multiple",
    "isa",
    "isa_available",
    "kv_bytes",
    "max_threads",
    "pack",
    "pack_raw",
    "packed_size",
    "raw_size",
    "touch",
    "trim",
    "unpack",
]
