"""The core: engine, KV ring, sampler and kernels. Knows no file, tokenizer or terminal."""

from .cache import KV_FORMATS, KVCache, kv_bytes
from .engine import HAS_OPENMP, MAX_CHUNK, MAX_THREADS, Engine, max_threads
from .kernels import TILE, isa, isa_available
from .memory import advise_huge, anonymous, touch, trim
from .sampler import Sampler
from .weights import WEIGHT_TYPES, column_multiple, pack, pack_raw, packed_size, raw_size, unpack

__all__ = [
    "HAS_OPENMP",
    "KV_FORMATS",
    "MAX_CHUNK",
    "MAX_THREADS",
    "TILE",
    "WEIGHT_TYPES",
    "Engine",
    "KVCache",
    "Sampler",
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
