"""A parsed tokenizer.json without some of its tokens: their text is made of other tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_NO_TEXT = "\ufdd0 "  # spaces are written otherwise in all vocabularies


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
            model["merges"] = _merges_within(model, kept)
        if model.get("unk_token") is not None and model["unk_token"] not in kept:
            model["unk_token"] = None
    tokens = [token for token in spec.get("added_tokens") or [] if added.get(token["content"], token["id"]) < size]
    return {**spec, "added_tokens": tokens, "model": model}


def without_text(spec: dict[str, Any], special: Collection[str]) -> dict[str, Any]:
    """A parsed tokenizer.json that makes none of these tokens from ordinary text; all keep their ids.

    A vocabulary may have its special tokens as words or pieces too. Then the model finds them where the library was
    told to leave them alone.
    """
    model = dict(spec["model"])
    vocab = model["vocab"]
    texts = (text for text, _ in vocab) if isinstance(vocab, list) else vocab
    names = {text: _NO_TEXT + text for text in texts if text in special}
    if not names:
        return spec
    if isinstance(vocab, list):
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    else:
        model["vocab"] = renamed = {names.get(text, text): token for text, token in vocab.items()}
        model["merges"] = _merges_within(model, renamed)
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [{**t, "content": names.get(t["content"], t["content"])} for t in spec.get("added_tokens") or []]
    return {**spec, "added_tokens": added, "model": model}


def _merges_within(model: dict[str, Any], vocab: dict[str, int]) -> list[str | list[str]]:
    """The merges of a BPE model that join two of these tokens to a third."""
    prefix = len(model.get("continuing_subword_prefix") or "")  # the library cuts it off the second token
    merges = []
    for merge in model.get("merges") or []:
        first, second = _pair(merge) if isinstance(merge, str) else merge
        if first in vocab and second in vocab and first + second[prefix:] in vocab:
            merges.append(merge)
    return merges


def _pair(merge: str) -> tuple[str, str]:
    """The second part begins after the first space that is not the first character."""
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]
