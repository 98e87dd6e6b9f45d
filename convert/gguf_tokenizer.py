"""Tokenizers rebuilt from GGUF metadata.

"gpt2" is byte-level BPE and "gemma4" BPE over text: a tokenizer.json, from vocabulary and merges. "llama" (BPE by
scores) and "t5" (Unigram) are SentencePiece's: a tokenizer.model, from the pieces.
"""

from __future__ import annotations

from kvrun.convert.checkpoint import Vocabulary
from kvrun.convert.fields import Fields, shown
from kvrun.convert.gguf_bpe import byte_level, gemma4
from kvrun.convert.gguf_sentencepiece import KINDS, sentencepiece

_NOT_SUPPORTED = {
    "bert": "WordPiece, of encoders",
    "rwkv": "RWKV's own",
    "plamo2": "PLaMo 2's own",
    "hybriddna": "BPE with DNA in words of six",
    "whitespace": "BPE without white space, of encoders",
}


def read_tokenizer(meta: Fields) -> Vocabulary:
    """The tokenizer of a GGUF file. Raises ConvertError if its kind or pre-tokenizer is not supported."""
    ggml = meta.under("tokenizer.ggml.")
    kind = ggml.text("model", "none")
    if kind in ("none", "no_vocab"):
        ggml.fail("model", "missing: the file has no tokenizer")
    if kind == "gpt2":
        return byte_level(ggml)
    if kind == "gemma4":
        return gemma4(ggml)
    if kind in KINDS:
        return sentencepiece(ggml, kind, _is_phi3(meta))
    known = ", ".join(("gpt2", "gemma4", *KINDS))
    what = f" ({_NOT_SUPPORTED[kind]})" if kind in _NOT_SUPPORTED else ""
    return ggml.fail("model", f"not supported yet: tokenizer {shown(kind)}{what} (supported: {known})")


def _is_phi3(meta: Fields) -> bool:
    name: str = meta.text("general.name", "").lower()
    return meta.text("general.architecture", "") == "phi3" or "phi-3" in name or "phi3" in name
