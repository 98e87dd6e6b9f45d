"""The tokenizer of a Hugging Face folder, with all tokens that its files declare, and what it adds to a text."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvrun.convert.checkpoint import Vocabulary
from kvrun.convert.declared_tokens import DeclaredTokens, read_declared_tokens, renumbered
from kvrun.convert.fields import Fields, read_json
from kvrun.convert.small_files import read_file
from kvrun.convert.token_ids import ENDS, STARTS, note_of_ends, note_of_starts, token_ids, undeclared_ends
from kvrun.errors import ConvertError
from kvrun.text.backends import refusal
from kvrun.text.pruned import check_prefix
from kvrun.text.sentencepiece_file import CONTROL, NORMAL, USER_DEFINED, as_control, piece_types, with_dummy_prefix

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

# Classes of transformers that take BOS and EOS from tokenizer_config.json, whatever tokenizer.json says.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_NAMES = ("bos", "eos", "pad", "unk")


def read_tokenizer(
    folder: str, config: Fields, generation: Fields | None, text_config: Fields | None = None
) -> Vocabulary:
    """tokenizer.json, or else tokenizer.model, with all tokens that the folder's files declare. BOS and others without
    a name there have the ids of the configs, in this order: `generation`, `config`, `text_config`. Raises ConvertError
    if there is neither, or they cannot be read."""
    settings = read_json(folder, "tokenizer_config.json") or Fields({}, os.path.join(folder, "tokenizer_config.json"))
    for kind, read in (("tokenizer.json", _read_json), ("tokenizer.model", _read_sentencepiece)):
        path = os.path.join(folder, kind)
        data = read_file(folder, kind)
        if data is None:
            continue
        if not data:  # SentencePiece would be content with it
            raise ConvertError(f"{path}: the tokenizer cannot be loaded: an empty file")
        declared = read_declared_tokens(folder, settings)
        try:
            found = read(data, declared)
        except ConvertError:
            raise
        except BaseException as error:
            raise ConvertError(f"{path}: the tokenizer cannot be loaded: {refusal(error)}") from None
        for name in _NAMES:
            token = _token_id(name, found, declared, (generation, config, text_config))
            found.info[f"{name}_id"] = token if token is not None else found.info.get(f"{name}_id")
        found.info["kind"] = kind
        if kind == "tokenizer.model":
            _settle_dummy_space(found, _is_llama(config, settings), settings)
        _resolve_added(found.info, settings)
        size = found.library.get_vocab_size(with_added_tokens=True)
        return Vocabulary(kind, found.data, found.info, found.special, found.notes, size=size)
    raise ConvertError(
        f"{folder}: neither tokenizer.json nor tokenizer.model; save the tokenizer with transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


@dataclass
class _Found:
    """A tokenizer that has been read: its file as it will be stored, and what the runtime must know about it."""

    library: Tokenizer
    data: bytes
    info: dict[str, Any]
    notes: tuple[str, ...]
    special: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        added = self.library.get_added_tokens_decoder()
        self.special = {token.content: number for number, token in added.items() if token.special}


def _add_declared(library: Tokenizer, declared: DeclaredTokens, control: Collection[str] = ()) -> tuple[str, ...]:
    """Add the tokens that the folder's files declare, and make those special that begin or end a turn. `control`:
    others that are special. Returns the notes."""
    from tokenizers import AddedToken

    notes = declared.add_to(library)
    added = {token.content: token for token in library.get_added_tokens_decoder().values()}
    special = {text for text, token in added.items() if token.special}.union(control)
    ends = undeclared_ends({text for text in ENDS if library.token_to_id(text) is not None}, special)
    starts = [text for text in STARTS if text in declared.unflagged and text in added and text not in special]
    tokens = [added.get(text) or AddedToken(text, normalized=False) for text in (*ends, *starts)]
    for token in tokens:
        token.special = True
    if tokens:
        library.add_tokens(tokens)
    return (*notes, *([note_of_ends(ends)] if ends else ()), *([note_of_starts(starts)] if starts else ()))


# --- tokenizer.json


def _read_json(data: bytes, declared: DeclaredTokens) -> _Found:
    from tokenizers import Tokenizer

    check_prefix(data)
    library = Tokenizer.from_buffer(data)
    library.no_padding()
    library.no_truncation()
    spec = json.loads(data)
    said = [(token["content"], token["id"]) for token in spec.get("added_tokens") or []]
    notes = renumbered(library, said, "tokenizer.json")
    old = {number: repr(token) for number, token in library.get_added_tokens_decoder().items()}
    notes += _add_declared(library, declared)
    added = library.get_added_tokens_decoder()
    if {number: repr(token) for number, token in added.items()} != old:
        data = _with_added_tokens(spec, added)
    before, after = _around_a_text(library)
    # Which tokens they are is settled later, when the ids of BOS and EOS are known.
    return _Found(library, data, {"before": before, "after": after}, notes)


def _with_added_tokens(spec: dict[str, Any], added: Mapping[int, AddedToken]) -> bytes:
    """The parsed tokenizer.json with these added tokens; all else is as it was."""
    tokens = [
        {
            "id": number,
            "content": token.content,
            "single_word": token.single_word,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": token.normalized,
            "special": token.special,
        }
        for number, token in sorted(added.items())
    ]
    return json.dumps({**spec, "added_tokens": tokens}, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _around_a_text(library: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before a text, and those that it puts after it."""
    # A character that the vocabulary has; a small vocabulary may have few.
    text = next((c for c in string.printable if library.encode(c, add_special_tokens=False).ids), "a")
    plain = library.encode(text, add_special_tokens=False).ids
    whole = library.encode(text, add_special_tokens=True).ids
    extra = len(whole) - len(plain)
    split = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), 0)
    return whole[:split], whole[split + len(plain) :]


# --- tokenizer.model


def _read_sentencepiece(data: bytes, declared: DeclaredTokens) -> _Found:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    own = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    pieces, types = _renamed(own, declared), piece_types(data)
    library = _numbering(pieces)
    control = {piece: i for i, piece in enumerate(pieces) if types[i] == CONTROL}
    notes = _add_declared(library, declared, control)
    ids = {
        "bos": processor.bos_id(),
        "eos": processor.eos_id(),
        "pad": processor.pad_id(),
        "unk": processor.unk_id(),
    }
    info: dict[str, Any] = {f"{name}_id": number if number >= 0 else None for name, number in ids.items()}
    # SentencePiece finds its user-defined pieces itself.
    user_defined = {piece for piece, type in zip(own, types, strict=True) if type == USER_DEFINED}
    added = library.get_added_tokens_decoder()
    new = {number: token for number, token in added.items() if token.special or token.content not in user_defined}
    info["added_tokens"] = {token.content: number for number, token in new.items()}
    info["visible"] = [number for number, token in new.items() if not token.special]
    for name in ("lstrip", "rstrip"):
        info[name] = [number for number, token in new.items() if getattr(token, name)]
    if single := [number for number, token in new.items() if token.single_word]:
        info["single_word"] = single  # files without it can be read by older versions
    # SentencePiece would find these in what users type.
    typed = {i for i, token in new.items() if token.special and i < len(own) and types[i] in (NORMAL, USER_DEFINED)}
    found = _Found(library, as_control(data, typed) if typed else data, info, notes)
    found.special = control | found.special
    return found


def _renamed(pieces: list[str], declared: DeclaredTokens) -> list[str]:
    """The pieces, some with the text that the folder's files give their ids, unless another piece has that text."""
    kept = {piece for i, piece in enumerate(pieces) if i not in declared.numbered}
    texts = {i: token.content for i, token in declared.numbered.items() if token.content not in kept}
    return [texts.get(i, piece) for i, piece in enumerate(pieces)]


def _numbering(pieces: list[str]) -> Tokenizer:
    """A tokenizer that only numbers tokens: those that are added follow the pieces."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))


def _token_id(name: str, found: _Found, declared: DeclaredTokens, numbered: tuple[Fields | None, ...]) -> int | None:
    """The id of a named special token, by its text or else by the id in the configs."""
    if (named := declared.named.get(f"{name}_token")) is not None:
        number: int | None = found.library.token_to_id(named.token.content)
        if number is not None:
            return number
    for source in numbered:
        ids = token_ids(source, f"{name}_token_id") if source else []
        if ids:
            return ids[0]
    return None


def _is_llama(config: Fields, settings: Fields) -> bool:
    """Whether transformers loads the tokenizer with its class for Llama, which puts a dummy space before the text only,
    and not after each special token, unless told otherwise. Other families may name that class, but do not get it."""
    return config.get("model_type") == "llama" and settings.text("tokenizer_class", "") in _LLAMA_CLASSES


def _settle_dummy_space(found: _Found, llama: bool, settings: Fields) -> None:
    """Where a dummy space is put before text, as transformers does for the tokenizer's class, `llama` or another: its
    pre-tokenizer Metaspace takes a space that is there for it, SentencePiece adds one all the same."""
    legacy = settings.flag("legacy", not llama)
    found.info["legacy"] = legacy
    if llama or not legacy:
        found.info["space_is_dummy"] = True  # files without it can be read by older versions
    if "add_prefix_space" in settings:
        found.data = with_dummy_prefix(found.data, settings.flag("add_prefix_space"))


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
