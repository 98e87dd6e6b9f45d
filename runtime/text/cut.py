"""A tokenizer without the tokens that have no row in a model's embedding: their text is made of other tokens."""

from __future__ import annotations

from typing import Any


def without_tokens_from(spec: dict[str, Any], size: int, added: dict[str, int]) -> dict[str, Any]:
    """A parsed tokenizer.json with the tokens 0 to `size` - 1 only; `added` has the ids of its added tokens."""
    model = dict(spec["model"])
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: texts with scores, in the order of ids
        model["vocab"] = vocab[:size]
        if (model.get("unk_id") or 0) >= size:
            model["unk_id"] = None
    else:
        model["vocab"] = kept = {text: token for text, token in vocab.items() if token < size}
        if len(kept) < len(vocab):
            model["merges"] = [merge for merge in model.get("merges") or [] if _within(merge, kept)]
        if model.get("unk_token") is not None and model["unk_token"] not in kept:
            model["unk_token"] = None
    tokens = [token for token in spec.get("added_tokens") or [] if added.get(token["content"], token["id"]) < size]
    return {**spec, "added_tokens": tokens, "model": model}


def _within(merge: str | list[str], vocab: dict[str, int]) -> bool:
    """Whether a merge joins two of these tokens to a third."""
    if isinstance(merge, str):
        cut = merge.find(" ", 1)  # the second part begins after the first space that is not the first character
        merge = [merge[:cut], merge[cut + 1 :]]
    return merge[0] in vocab and merge[1] in vocab and merge[0] + merge[1] in vocab
