"""The core: engine, KV ring, sampler and kernels. Knows no file, tokenizer or terminal."""

from .kernels import isa, isa_available
from .weights import WEIGHT_TYPES, pack, pack_raw, packed_size, raw_size, unpack

__all__ = ["WEIGHT_TYPES", "isa", "isa_available", "pack", "pack_raw", "packed_size", "raw_size", "unpack"]
