"""Hugging Face folders with a small tokenizer and whatever their files declare beside it."""

from __future__ import annotations

from kvrun.convert.sentencepiece_model import BPE, BYTE_PIECES, Normalizer, model_bytes
from kvrun.text.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN
from support.files import rewrite
from support.make_checkpoint import CONFIG, write_json

WORDS = ("\u2581", *"aehnt", "th", "the", "\u2581the", "at", "hat", "\u2581that")


def added(token, content, special, **flags):
    """An entry of tokenizer.json's added_tokens."""
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, "special": special, **off, **flags}


def letters():
    """A tokenizer.json: byte-level BPE of all bytes and two words, with four added tokens."""
    from tokenizers import pre_tokenizers

    vocab = {text: i for i, text in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokens = [
        added(258, "<s>", True),
        added(259, "</s>", True),
        added(260, "<|im_start|>", True),
        added(261, "<tool>", False),
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": [["t", "h"], ["th", "e"]]}
    return {
        "version": "1.0",
        "added_tokens": tokens,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def pieces():
    """A tokenizer.model: 271 pieces of BPE with byte fallback."""
    entries = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    entries += [(byte, 0.0, BYTE) for byte in sorted(BYTE_PIECES)]
    entries += [(word, -float(i), NORMAL) for i, word in enumerate(WORDS)]
    return model_bytes(entries, BPE, {"unk": 0, "bos": 1, "eos": 2}, Normalizer(dummy_prefix=True))


def write_folder(folder, base, files):
    """A folder without weights. `base`: "letters", "pieces", or None to leave the tokenizer as it is; `files`: JSON by
    the name of the file, without .json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**CONFIG, "vocab_size": 300})
    if base == "letters":
        write_json(folder / "tokenizer.json", letters())
    elif base == "pieces":
        rewrite(folder / "tokenizer.model", pieces())
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder
