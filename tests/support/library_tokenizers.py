"""Tokenizers of the tokenizers library, built from GGUF files."""

from __future__ import annotations

from functools import cache


@cache
def library_from_gguf(path):
    """SmolLM2's tokenizer as its makers define it, with vocabulary and merges of the GGUF file."""
    import gguf
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(path).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    library = tokenizers.Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges])
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == 3])
    return library
