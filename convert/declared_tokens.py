"""The tokens that the files of a Hugging Face folder declare beside those of the tokenizer itself.

tokenizer_config.json has `added_tokens_decoder`, `extra_special_tokens` (formerly `additional_special_tokens`) and
tokens with names (`eos_token` and so on). If it lacks the first, special_tokens_map.json and added_tokens.json count
too. Which of them are added, and in what order they are numbered, is as in transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvrun.convert.fields import Fields, read_json, shown
from kvrun.convert.token_ids import token_id

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class DeclaredToken:
    """A token's text, and how it is found in other text; one that is not special is shown as text."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    def for_library(self) -> AddedToken:
        """The same for the tokenizers library."""
        from tokenizers import AddedToken

        return AddedToken(self.content, **{flag: getattr(self, flag) for flag in _FLAGS})


@dataclass(frozen=True)
class NamedToken:
    """A token with a name, and the file that gives it to it."""

    token: DeclaredToken
    source: Fields


@dataclass(frozen=True)
class DeclaredTokens:
    """All tokens that a folder's files declare.

    `numbered`: those with an id, in the order of ids; `numbered_by` is the file that gives them, `complete` whether
    they should be all that the tokenizer has. `named`: those with a name ("eos_token", "image_token"), in the order in
    which they are added. `extra`: special tokens without a name.
    """

    numbered: dict[int, DeclaredToken]
    numbered_by: str
    complete: bool
    named: dict[str, NamedToken]
    extra: list[DeclaredToken]

    @property
    def unflagged(self) -> set[str]:
        """The tokens of which no file says whether they are special: added_tokens.json has texts and ids only."""
        return set() if self.complete else {token.content for token in self.numbered.values()}

    def add_to(self, library: Tokenizer) -> tuple[str, ...]:
        """Add them to a tokenizer, which numbers those that it does not have from its end on. A line about those that
        get another id than the files say, if there are any. Raises ConvertError if BOS or EOS is no token."""
        self._check_ends(library)
        own = library.get_added_tokens_decoder()
        known = {token.content for token in own.values()}
        named = [named.token for named in self.named.values()]
        numbered = dict(self.numbered)
        if not self.complete:  # then the tokenizer's own count as declared too
            numbered |= {number: _of_library(token) for number, token in own.items()}
        tokens = {token.content: token for _, token in sorted(numbered.items())}
        known |= tokens.keys()
        tokens |= {token.content: token for token in (*named, *self.extra) if token.content not in known}
        names = {token.content for token in named}
        added = [replace(token, special=token.special or token.content in names) for token in tokens.values()]
        library.add_tokens([token.for_library() for token in added])
        return renumbered(
            library, ((token.content, number) for number, token in self.numbered.items()), self.numbered_by
        )

    def _check_ends(self, library: Tokenizer) -> None:
        """BOS and EOS must be tokens for another reason than that they are called so: a model knows no others."""
        others = [named.token for name, named in self.named.items() if name not in ("bos_token", "eos_token")]
        declared = {token.content for token in (*self.numbered.values(), *others, *self.extra)}
        for name in ("bos_token", "eos_token"):
            if (named := self.named.get(name)) is None:
                continue
            text = named.token.content
            if text not in declared and library.token_to_id(text) is None:
                named.source.fail(
                    name,
                    f"{shown(text)} is no token of this tokenizer; correct it, or remove it to have config.json's id",
                )


def renumbered(library: Tokenizer, said: Iterable[tuple[str, int]], where: str) -> tuple[str, ...]:
    """A line about the tokens that have another id than the file `where` says, if there are any."""
    wrong = [(text, number) for text, number in said if text and library.token_to_id(text) != number]
    if not wrong:
        return ()
    text, number = wrong[0]
    more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
    said_so = f"and not {number} as {where} says{more}"
    return (f"token {shown(text)} has id {library.token_to_id(text)}, as transformers numbers added tokens, {said_so}",)


def read_declared_tokens(folder: str, settings: Fields) -> DeclaredTokens:
    """What the files of the folder declare; `settings` is its tokenizer_config.json. Raises ConvertError, which names
    file and field, for what is no token."""
    complete = "added_tokens_decoder" in settings
    numbered, numbered_by = _decoder(settings), settings.where
    others = None if complete else read_json(folder, "special_tokens_map.json")
    named: dict[str, NamedToken] = {}
    for source in (settings, others):
        named |= {name: NamedToken(token, source) for name, token in _named(source)} if source else {}
    extra = _extra(settings, others)
    if not complete and (added := read_json(folder, "added_tokens.json")) is not None:
        special = {named.token.content for named in named.values()} | {token.content for token in extra}
        numbered, numbered_by = _added(added, special), added.where
    by_text = {token.content: token for token in numbered.values()}
    order = [*(name for name in _NAMES if name in named), *(name for name in named if name not in _NAMES)]
    named = {
        name: NamedToken(by_text.get(named[name].token.content, named[name].token), named[name].source)
        for name in order
    }
    return DeclaredTokens(dict(sorted(numbered.items())), numbered_by, complete, named, extra)


def _decoder(settings: Fields) -> dict[int, DeclaredToken]:
    name = "added_tokens_decoder"
    entries = settings.get(name, {})
    if not isinstance(entries, dict):
        settings.fail(name, "not a JSON object")
    tokens: dict[int, DeclaredToken] = {}
    for key, entry in entries.items():
        if not (key.isdecimal() and len(key) < 10) or not isinstance(entry, dict):
            settings.fail(name, f"entry {shown(key)} is not a token")
        tokens[int(key)] = _token(settings, name, entry, special=False)
    return tokens


def _added(added: Fields, special: set[str]) -> dict[int, DeclaredToken]:
    tokens: dict[int, DeclaredToken] = {}
    for text in added.names():
        number = token_id(added, text)
        if number is not None:
            token = _token(added, text, text, special=text in special)
            tokens[number] = replace(token, normalized=not token.special)
    return tokens


def _named(source: Fields) -> Iterator[tuple[str, DeclaredToken]]:
    """The tokens with names: all fields that end in _token, and `extra_special_tokens` if it is an object."""
    for name in source.names():
        value = source.get(name)
        if not name.endswith("_token") or value == "":  # some say so that there is none
            continue
        if name in _NAMES or isinstance(value, str) or _is_token(value):
            yield name, _token(source, name, value)
    extra = source.get("extra_special_tokens")
    if isinstance(extra, dict):
        for name, value in extra.items():
            yield name, _token(source, "extra_special_tokens", value)


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _extra(settings: Fields, others: Fields | None) -> list[DeclaredToken]:
    """The special tokens without a name, of tokenizer_config.json and special_tokens_map.json. A list under the old
    name counts where there is none under the new one."""
    new, old = _list(settings, "extra_special_tokens"), _list(settings, "additional_special_tokens")
    if old is not None and not settings.get("extra_special_tokens"):
        new, old = old, None
    if others is not None:
        more, replaced = _list(others, "extra_special_tokens"), _list(others, "additional_special_tokens")
        new = new if more is None else [*(new or []), *more]
        old = old if replaced is None else replaced
    return new if new is not None else old or []


def _list(source: Fields, name: str) -> list[DeclaredToken] | None:
    values = source.get(name)
    if values is None or (isinstance(values, dict) and name == "extra_special_tokens"):
        return None  # an object has tokens with names, see `_named`
    if not isinstance(values, list):
        source.fail(name, "not a list of tokens")
    return [_token(source, name, value) for value in values]


def _token(source: Fields, name: str, value: Any, special: bool = True) -> DeclaredToken:
    """A token written as its text or as an object; `special` unless the object says otherwise."""
    entry = {"content": value} if isinstance(value, str) else value
    if not _is_token(entry) or not all(isinstance(entry.get(flag, False), (bool, type(None))) for flag in _FLAGS):
        source.fail(name, f"{shown(value)} is not a token")
    text = entry["content"]
    if any("\ud800" <= c <= "\udfff" for c in text):
        source.fail(name, "not valid Unicode")
    flags: dict[str, Any] = {flag: entry[flag] for flag in _FLAGS if entry.get(flag) is not None}
    flags.setdefault("special", special)
    flags.setdefault("normalized", not flags["special"])
    return DeclaredToken(text, **flags)


def _of_library(token: AddedToken) -> DeclaredToken:
    return DeclaredToken(token.content, **{flag: getattr(token, flag) for flag in _FLAGS})
