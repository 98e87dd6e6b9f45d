"""The core: engine, KV ring, sampler and kernels. Knows no file, tokenizer or terminal."""

from .engine import HAS_OPENMP, MAX_CHUNK, Engine, max_threads
from .kernels import isa, isa_available
from .kv import KV_FORMATS, KVCache, advise_huge, anonymous, kv_bytes, touch, trim
from .sampler import Sampler
from .weights import WEIGHT_TYPES, column_multiple, pack, pack_raw, packed_size, raw_size, unpack

__all__ = ["Engine", "HAS_OPENMP", "KVCache", "KV_FORMATS", "MAX_CHUNK", "Sampler", "WEIGHT_TYPES",
           "advise_huge", "anonymous", "column_multiple", "isa", "isa_available", "kv_bytes", "max_threads", "pack",
           "pack_raw", "packed_size", "raw_size", "touch", "trim", "unpack"]
