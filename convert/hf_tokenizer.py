"""The tokenizer of a Hugging Face folder: copied as it is, and tried to see what it adds to a text."""

from __future__ import annotations

import os
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvrun.convert.checkpoint import Vocabulary
from kvrun.convert.fields import Fields, read_json
from kvrun.convert.small_files import read_file
from kvrun.convert.token_ids import token_ids
from kvrun.errors import ConvertError
from kvrun.text.backends import refusal

# Classes of transformers that take BOS and EOS from tokenizer_config.json, whatever tokenizer.json says.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_NAMES = ("bos", "eos", "pad", "unk")


def read_tokenizer(folder: str, config: Fields, generation: Fields | None) -> Vocabulary:
    """tokenizer.json, or else tokenizer.model. Raises ConvertError if there is neither, or it cannot be read."""
    settings = read_json(folder, "tokenizer_config.json") or Fields({}, os.path.join(folder, "tokenizer_config.json"))
    for kind, probe in (("tokenizer.json", _probe_json), ("tokenizer.model", _probe_sentencepiece)):
        path = os.path.join(folder, kind)
        data = read_file(folder, kind)
        if data is None:
            continue
        if not data:  # SentencePiece would be content with it
            raise ConvertError(f"{path}: the tokenizer cannot be loaded: an empty file")
        try:
            lookup, special, info = probe(data, settings)
        except ConvertError:
            raise
        except BaseException as error:
            raise ConvertError(f"{path}: the tokenizer cannot be loaded: {refusal(error)}") from None
        named, numbered = (settings, read_json(folder, "special_tokens_map.json")), (generation, config)
        for name in _NAMES:
            token = _token_id(name, lookup, named, numbered)
            info[f"{name}_id"] = token if token is not None else info.get(f"{name}_id")
        info["kind"] = kind
        _resolve_added(info, settings)
        return Vocabulary(kind, data, info, special)
    raise ConvertError(
        f"{folder}: neither tokenizer.json nor tokenizer.model; save the tokenizer with transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


_Probe = tuple[Callable[[str], "int | None"], dict[str, int], dict[str, Any]]


def _probe_json(data: bytes, settings: Fields) -> _Probe:
    """(text -> id, special tokens, {"before": ids put before a text, "after": ids put after it})."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(data)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special}
    # A character that the vocabulary has; a small vocabulary may have few.
    text = next((c for c in string.printable if tokenizer.encode(c, add_special_tokens=False).ids), "a")
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.encode(text, add_special_tokens=True).ids
    extra = len(whole) - len(plain)
    # Which tokens they are is settled below, when the ids of BOS and EOS are known.
    split = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), 0)
    return tokenizer.token_to_id, special, {"before": whole[:split], "after": whole[split + len(plain) :]}


def _probe_sentencepiece(data: bytes, settings: Fields) -> _Probe:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    size = processor.get_piece_size()
    added = _added_tokens(settings)
    special = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)}
    special |= {text: token.id for text, token in added.items() if token.special}
    # SentencePiece itself finds those that are pieces of the model.
    own = {t for t, token in added.items() if token.id < size and processor.id_to_piece(token.id) == t}
    new = {text: token for text, token in added.items() if token.special or text not in own}

    def lookup(text: str) -> int | None:
        if text in added:
            return added[text].id
        number = processor.piece_to_id(text)
        return number if number != processor.unk_id() or text == processor.id_to_piece(number) else None

    ids = {
        "bos": processor.bos_id(),
        "eos": processor.eos_id(),
        "pad": processor.pad_id(),
        "unk": processor.unk_id(),
    }
    info: dict[str, Any] = {f"{name}_id": number if number >= 0 else None for name, number in ids.items()}
    info["added_tokens"] = {text: token.id for text, token in new.items()}
    for name in ("visible", "lstrip", "rstrip"):
        info[name] = [token.id for token in new.values() if getattr(token, name)]
    info["legacy"] = settings.flag("legacy", True)
    return lookup, special, info


@dataclass(frozen=True)
class _Added:
    """A token of tokenizer_config.json; one that is not special is shown as text."""

    id: int
    special: bool
    lstrip: bool
    rstrip: bool

    @property
    def visible(self) -> bool:
        return not self.special


def _added_tokens(settings: Fields) -> dict[str, _Added]:
    """The tokens, by text, that tokenizer_config.json adds to a SentencePiece model."""
    entries = settings.get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        settings.fail("added_tokens_decoder", "not a JSON object")
    result: dict[str, _Added] = {}
    for key, entry in entries.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not key.isdecimal() or not isinstance(content, str):
            settings.fail("added_tokens_decoder", f"entry {key[:40]!r} is not a token")
        flags = (entry.get(name) is True for name in ("special", "lstrip", "rstrip"))
        result[content] = _Added(int(key), *flags)
    return result


def _token_id(
    name: str,
    lookup: Callable[[str], int | None],
    named: tuple[Fields | None, ...],
    numbered: tuple[Fields | None, ...],
) -> int | None:
    """The id of a named special token, by its text or else by the id in the configs."""
    for source in named:
        if source is None:
            continue
        value = source.get(f"{name}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            continue
        if any("\ud800" <= c <= "\udfff" for c in text):
            source.fail(f"{name}_token", "not valid Unicode")
        if (number := lookup(text)) is not None:
            return number
    for source in numbered:
        ids = token_ids(source, f"{name}_token_id") if source else []
        if ids:
            return ids[0]
    return None


def _resolve_added(info: dict[str, Any], settings: Fields) -> None:
    """Settle add_bos and add_eos, as transformers does for the tokenizer's class."""
    # SentencePiece files say nothing about it; transformers' slow tokenizers add BOS unless told otherwise.
    before, after = info.pop("before", [info["bos_id"]]), info.pop("after", [])
    if info["kind"] == "tokenizer.model" or settings.text("tokenizer_class", "") in _LLAMA_CLASSES:
        info["add_bos"] = settings.flag("add_bos_token", bool(before)) and info["bos_id"] is not None
        info["add_eos"] = settings.flag("add_eos_token", bool(after)) and info["eos_id"] is not None
        return
    for what, tokens, name in (("before", before, "bos"), ("after", after, "eos")):
        if len(tokens) > 1:
            settings.fail(
                "tokenizer_class",
                f"tokenizer.json puts {len(tokens)} tokens {what} a text; one at most is supported",
            )
        # The token before a text is BOS, whatever token the configs give that name.
        info[f"add_{name}"] = bool(tokens)
        if tokens:
            info[f"{name}_id"] = tokens[0]
