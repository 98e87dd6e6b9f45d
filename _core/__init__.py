"""The core: engine, KV ring, sampler and kernels. Knows no file, tokenizer or terminal."""

from .engine import HAS_OPENMP, MAX_CHUNK, Engine
from .kernels import isa, isa_available
from .kv import KV_FORMATS_BY_NAME as KV_FORMATS
from .kv import KVCache, kv_bytes
from .weights import WEIGHT_TYPES, pack, pack_raw, packed_size, raw_size, unpack

__all__ = ["Engine", "HAS_OPENMP", "KVCache", "KV_FORMATS", "MAX_CHUNK", "WEIGHT_TYPES", "isa", "isa_available",
           "kv_bytes", "pack", "pack_raw", "packed_size", "raw_size", "unpack"]
