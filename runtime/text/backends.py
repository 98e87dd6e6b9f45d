"""The two tokenizer libraries behind one interface, for `kvrun.text.tokenizer`.

A backend has `size` (number of tokens), `special` (a SpecialTokens), `dummy_space` (whether a text gets a
space put before it), and these methods:

encode_parsed(text): ids with special tokens recognised, None if the library cannot do that itself
encode_run(text, where, literal): ids of ordinary text; `literal`: it contains the text of special tokens
decode(ids, skip_special), piece(token, first) (its bytes), stream(skip_special, start, check)
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from kvrun.errors import TokenizerError
from kvrun.text.cut import without_text, without_tokens_from
from kvrun.text.pruned import LONGEST, PrunedBpe, as_json, byte_characters, check_prefix, read_prunable
from kvrun.text.sentencepiece_file import first_pieces, with_dummy_prefix
from kvrun.text.special_tokens import CONTINUED, ESCAPE, INNER, START, SpecialTokens
from kvrun.text.streaming import PER_BYTE, StreamDecoder

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Backend:
    special: SpecialTokens
    size: int
    dummy_space: bool
    strip = 0
    errors = "replace"
    trim = False

    def piece(self, token: int, first: bool) -> bytes:
        raise NotImplementedError

    def stream(
        self, skip_special: bool, start: bool, check: Callable[[int], int], shown: frozenset[int] = frozenset()
    ) -> StreamDecoder:
        hidden = frozenset(self.special.ids.values()) - shown if skip_special else frozenset()

        def piece(token: int, first: bool) -> bytes | None:
            return None if check(token) in hidden else self.piece(token, first and start)

        return StreamDecoder(piece, self.strip if start else 0, self.errors, self.trim)


# --- tokenizer.json -------------------------------------------------------------------------------


class JsonBackend(_Backend):
    """`tokenizer.json`: byte-level BPE, or BPE and Unigram in SentencePiece's style."""

    def __init__(self, data: bytes, info: Mapping[str, Any], stop_ids: list[int], most: int) -> None:
        self._data = data
        self._stop_ids = stop_ids
        self._lock = threading.RLock()
        self._variants: dict[tuple[str, bool], Any] = {}
        try:
            spec = read_prunable(data)
        except ValueError as error:
            raise TokenizerError(f"the model's tokenizer.json cannot be used: {error}") from None
        self._pruned: PrunedBpe | None = None
        self._texts: list[str] | None = None
        if spec:
            self._from_spec(spec, most)
        else:
            self._from_library(most)

    def _from_spec(self, spec: dict[str, Any], most: int) -> None:
        """Set up without the library, which is asked to build the whole tokenizer when it is first needed."""
        added = {t["id"]: SimpleNamespace(**t) for t in spec.get("added_tokens") or []}
        vocab = spec["model"]["vocab"]
        texts = [*vocab, *(t.content for t in added.values() if t.content not in vocab)]
        if len(texts) > most:
            self._from_spec(self._cut(spec, most, {t.content: i for i, t in added.items()}), most)
            return
        self._texts = texts
        self._pruned = PrunedBpe(spec, self._build)
        self._describe(added, len(texts), spec)

    def _from_library(self, most: int) -> None:
        main = self._main
        added = main.get_added_tokens_decoder()
        if max([main.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)]) > most:
            self._cut(json.loads(self._data), most, {token.content: i for i, token in added.items()})
            self._variants.clear()
            main = self._main
            added = main.get_added_tokens_decoder()
        parts = {part: _state(getattr(main, part)) for part in ("normalizer", "pre_tokenizer", "decoder")}
        self._describe(added, main.get_vocab_size(with_added_tokens=True), parts)

    def _cut(self, spec: dict[str, Any], most: int, added: dict[str, int]) -> dict[str, Any]:
        """Go on with a tokenizer.json that has no tokens from number `most` on."""
        spec = without_tokens_from(spec, most, added)
        self._data = as_json(spec)
        return spec

    def _describe(self, added: Mapping[int, Any], size: int, parts: Mapping[str, Any]) -> None:
        self.size = max([size, *(i + 1 for i in added)])
        special = {i: t for i, t in added.items() if t.special or i in self._stop_ids}
        self.special = SpecialTokens(
            {t.content: i for i, t in special.items()},
            (i for i, t in special.items() if t.lstrip),
            (i for i, t in special.items() if t.rstrip),
            (i for i, t in special.items() if t.single_word),
        )
        front = [parts.get("normalizer"), parts.get("pre_tokenizer")]
        self.dummy_space = front != [_dummy_space(part, CONTINUED) for part in front]
        self._decoder = _Decoder(parts.get("decoder"))
        self.strip, self.errors = self._decoder.strip, self._decoder.errors

    @property
    def _main(self) -> Any:
        """The whole tokenizer, built when first needed."""
        with self._lock:
            if ("", False) not in self._variants:
                self._variants["", False] = self._build(self._data)
                self._pruned = self._texts = None
            return self._variants["", False]

    def _first_text(self, text: str) -> list[int] | None:
        """Ids of the first text if it is short: many programs have only one."""
        with self._lock:
            pruned, self._pruned = self._pruned, None
        if pruned is None or len(text) > LONGEST:
            return None
        try:
            return pruned.ids(text)
        except BaseException as error:
            raise TokenizerError(f"this text cannot be tokenised: {refusal(error)}") from None

    @staticmethod
    def _build(data: bytes) -> Any:
        import tokenizers

        try:
            check_prefix(data)
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except BaseException as error:
            raise TokenizerError(f"the model's tokenizer.json cannot be used: {refusal(error)}") from None
        # Checkpoints store what their training needed; nothing may be cut or filled up here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _variant(self, where: str, literal: bool) -> Any:
        """The tokenizer for a run of text at `where`; with `literal` it recognises no special tokens."""
        if (where == START or not self.dummy_space) and not literal:
            return self._main
        key = (where if self.dummy_space else START, literal)
        with self._lock:
            if key not in self._variants:
                self._variants[key] = self._build_variant(*key)
            return self._variants[key]

    def _build_variant(self, where: str, literal: bool) -> Any:
        spec = json.loads(self._data)
        for part in ("normalizer", "pre_tokenizer"):
            spec[part] = _dummy_space(spec.get(part), where)
        for token in spec.get("added_tokens") or []:
            token["special"] = token["special"] or token["id"] in self._stop_ids
        if literal:
            spec = without_text(spec, self.special.ids)
        tokenizer = self._build(as_json(spec))
        tokenizer.encode_special_tokens = literal
        return tokenizer

    def encode_parsed(self, text: str) -> list[int]:
        ids = self._first_text(text)
        return _encode(self._main, text) if ids is None else ids

    def encode_run(self, text: str, where: str, literal: bool) -> list[int]:
        return _encode(self._variant(where, literal), text)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        text: str = self._main.decode(ids, skip_special_tokens=skip_special)
        return text

    def piece(self, token: int, first: bool) -> bytes:
        text = self._text(token)
        return b"" if text is None else self._decoder.piece(text, first)

    def _text(self, token: int) -> str | None:
        texts = self._texts  # read once: it goes when the whole tokenizer is built
        if texts is not None:
            return texts[token] if token < len(texts) else None
        text: str | None = self._main.id_to_token(token)
        return text


def _encode(tokenizer: Any, text: str) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids
    except BaseException as error:
        raise TokenizerError(f"this text cannot be tokenised: {refusal(error)}") from None


def refusal(error: BaseException) -> str:
    """A library's error as one line. Anything that is not an error of the library (Ctrl-C, for one) is raised again."""
    # A panic in Rust becomes a BaseException of a type that cannot be imported.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _state(component: Any) -> Any:
    """The parsed JSON of one component of a tokenizer, None if it does not have that component."""
    return None if component is None else json.loads(component.__getstate__())


def _dummy_space(component: Any, where: str) -> Any:
    """The JSON of a normalizer or pre-tokenizer, changed so that it adds no space where none belongs."""
    if not isinstance(component, dict) or where == START:
        return component
    kind = component.get("type")
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in component else "pretokenizers"
        parts = [_dummy_space(part, where) for part in component.get(key) or []]
        return {**component, key: [part for part in parts if part is not None]}
    if kind == "Metaspace":
        scheme = component.get("prepend_scheme", "always")
        keep = scheme == "never" or (scheme == "always" and where == INNER)
        return component if keep else {**component, "prepend_scheme": "never"}
    if kind == "Prepend" and where == CONTINUED:
        return None
    if component.get("add_prefix_space") and where == CONTINUED:
        return {**component, "add_prefix_space": False}
    return component


class _Decoder:
    """The bytes of a token's text, as the library's decoder named in tokenizer.json makes them."""

    def __init__(self, spec: Any) -> None:
        steps = _flat(spec)
        kinds = {step.get("type") for step in steps}
        unknown = kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
        if unknown or not kinds:
            name = ", ".join(map(str, sorted(unknown, key=str))) or "none"
            raise TokenizerError(f"the model's tokenizer.json has a decoder that is not supported: {name}")
        self._bytes = byte_characters() if "ByteLevel" in kinds else None
        self._fallback = "ByteFallback" in kinds
        self._metaspace = [
            (s["replacement"], s.get("prepend_scheme", "always") != "never") for s in steps if s["type"] == "Metaspace"
        ]
        self._replace = [_replacement(step) for step in steps if step["type"] == "Replace"]
        self.strip = sum(step.get("start", 0) for step in steps if step["type"] == "Strip")
        self.errors = "replace" if self._bytes else PER_BYTE

    def piece(self, text: str, first: bool) -> bytes:
        if self._bytes is not None:
            try:
                return bytes([self._bytes[c] for c in text])
            except KeyError:  # an added token, whose text is not mapped
                return text.encode("utf-8")
        for old, new in self._replace:
            text = text.replace(old, new)
        for marker, dummy in self._metaspace:
            text = text.replace(marker, "" if first and dummy else " ")
        match = _BYTE.fullmatch(text) if self._fallback else None
        return bytes([int(match[1], 16)]) if match else text.encode("utf-8")


def _flat(spec: Any) -> list[dict[str, Any]]:
    if not isinstance(spec, dict):
        return []
    if spec.get("type") == "Sequence":
        return [step for part in spec.get("decoders") or [] for step in _flat(part)]
    return [spec]


def _replacement(step: Mapping[str, Any]) -> tuple[str, str]:
    pattern = step.get("pattern", {})
    if "String" not in pattern:
        raise TokenizerError(
            "the model's tokenizer.json has a decoder that replaces by regular expression, which is not supported"
        )
    return pattern["String"], step["content"]


# --- tokenizer.model ------------------------------------------------------------------------------


class SentencePieceBackend(_Backend):
    """`tokenizer.model`. Control, unknown and added tokens are special; the library gets the text between.

    Added tokens that are `visible` are not special: they are found in any text, also in ordinary text.
    """

    errors = PER_BYTE

    def __init__(self, data: bytes, info: Mapping[str, Any], stop_ids: list[int], most: int) -> None:
        self._model = self._load(data)
        if self._model.get_piece_size() > most:
            data = first_pieces(data, most)
            self._model = self._load(data)
        self._data = data
        self._rows = most
        size = min(self._model.get_piece_size(), most)
        added = {text: token for text, token in _added_tokens(info).items() if token < most}
        rules = [_token_ids(info, name) for name in ("lstrip", "rstrip", "single_word")]
        shown = _token_ids(info, "visible") - set(stop_ids)
        self.size = max([size, *(i + 1 for i in added.values())])
        special = {
            self._model.id_to_piece(i): i
            for i in range(size)
            if self._model.is_control(i) or self._model.is_unknown(i) or i in stop_ids
        }
        special |= {text: i for text, i in added.items() if i not in shown}
        self.special = SpecialTokens(special, *rules)
        self._visible = SpecialTokens({text: i for text, i in added.items() if i in shown}, *rules)
        self._texts: dict[int, bytes] = {i: text.encode("utf-8") for text, i in (special | added).items()}
        self.dummy_space = self._model.normalize("a") != "a"
        # At the start of a text SentencePiece drops one space, or all that are tokens of their own.
        pieces = map(self._model.id_to_piece, range(size))
        i, piece = next(((i, p) for i, p in enumerate(pieces) if p.startswith(_SPACE)), (0, ""))
        self._drops_dummy = bool(piece) and self._model.decode([i]) != piece.replace(_SPACE, " ")
        space = self._model.piece_to_id(_SPACE)
        self.trim = self._model.id_to_piece(space) == _SPACE and self._model.decode([space, space]) == ""
        self._prefix_inside = bool(info.get("legacy", True))
        self._space_is_dummy = bool(info.get("space_is_dummy", False))

    @cached_property
    def _unprefixed(self) -> Any:
        """The same model without the dummy space."""
        return self._load(with_dummy_prefix(self._data, False)) if self.dummy_space else self._model

    @staticmethod
    def _load(data: bytes) -> Any:
        import sentencepiece

        try:
            if not data:
                raise ValueError("it is empty")
            return sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:
            raise TokenizerError(f"the model's tokenizer.model cannot be used: {refusal(error)}") from None

    def encode_parsed(self, text: str) -> None:
        return None

    def encode_run(self, text: str, where: str, literal: bool) -> list[int]:
        if not self._visible.found_in(text):
            return self._encode(text, where)
        ids: list[int] = []
        for part in self._visible.split(text.replace(ESCAPE, ESCAPE + ESCAPE)):
            ids += [part] if isinstance(part, int) else self._encode(part, where)
            where = INNER
        return ids

    def _encode(self, text: str, where: str) -> list[int]:
        prefix = where == START or (where == INNER and self._prefix_inside)
        prefix = prefix and not (self._space_is_dummy and text.startswith((" ", _SPACE)))
        ids: list[int] = (self._model if prefix else self._unprefixed).encode(text)
        # Bytes that the library wants to have, but that are no tokens of the model, are unknown.
        return [token if token < self._rows else self._model.unk_id() for token in ids]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        stream = self.stream(skip_special, True, int)
        return "".join(map(stream.push, ids)) + stream.finish()

    def piece(self, token: int, first: bool) -> bytes:
        if token in self._texts:
            return self._texts[token]
        if token >= self._model.get_piece_size():
            return b""
        text: str = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(text[3:5], 16)])
        if first and self._drops_dummy:
            text = text.removeprefix(_SPACE)
        return text.replace(_SPACE, " ").encode("utf-8")


def _added_tokens(info: Mapping[str, Any]) -> dict[str, int]:
    added = info.get("added_tokens") or {}
    if not isinstance(added, dict) or not all(type(i) is int and i >= 0 for i in added.values()):
        raise TokenizerError("the model file's added_tokens are not a table of text and token ids")
    return added


def _token_ids(info: Mapping[str, Any], name: str) -> frozenset[int]:
    ids = info.get(name) or []
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise TokenizerError(f"the model file's {name} is not a list of token ids")
    return frozenset(ids)
