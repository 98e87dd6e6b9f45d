"""Speculative decoding: guesses of the tokens that come next, and how many of them are worth a look.

A draft decides nothing. It is fed in one step with the token that is certain, which takes less time than a step for
each, and the session then samples from each row of logits as it would without. As long as it takes what the draft has,
the next row is there already. So drafts save time or cost some, and change no text.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from statistics import median
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from kvrun.backend import Cache
    from kvrun.model import Model

REMEMBERED = 1 << 16
"""Tokens of a text that drafts are made from, at least: so that an endless text does not fill the memory."""
PLACES = 16
"""Newest places with the same n-gram that are looked at for the one that has most in common with the text's end."""


class Drafter(Protocol):
    """Guesses what comes next in a text."""

    @property
    def chances(self) -> tuple[float, ...]:
        """For each kind of draft, how likely one of its tokens is right, before anything is known."""

    def begin(self, start: int, tokens: Sequence[int]) -> None:
        """The text, as far as it is known: its tokens from number `start` on."""

    def add(self, token: int) -> None:
        """One more token."""

    def read(self) -> None:
        """Get ready. May take long."""

    def kind(self) -> int | None:
        """Of the draft that there would be now, None if there would be none."""

    def draft(self, most: int) -> list[int]:
        """At most so many tokens, MemoryError if they cannot be had."""


def _agreement(ours: tuple[int, list[int]], theirs: tuple[int, list[int]]) -> int:
    """Up to which token of the text two parts of it, each (number of the first, tokens), are the same; 0 if they have
    none in common."""
    first = max(ours[0], theirs[0])
    a, b = ours[1][first - ours[0] :], theirs[1][first - theirs[0] :]
    n = min(len(a), len(b))
    if a[:n] != b[:n]:
        n = next(i for i in range(n) if a[i] != b[i])
    return first + n if n else 0


class NgramDrafter:
    """Goes on as the text did before: from where it has most in common with its end, the newest of such places.

    size: tokens that it must have in common at least. Kinds of drafts: fewer than twice as many, than four times, more.
    """

    chances = (0.5, 0.7, 0.9)

    def __init__(self, size: int) -> None:
        self._size = size
        self._set(0, [])

    def _set(self, start: int, tokens: Iterable[int]) -> None:
        self._start = start  # number of the first token that is known
        self._tokens: list[int] = []
        self._newest: dict[tuple[int, ...], int] = {}  # where the text went on after an n-gram
        self._earlier = [0]  # [n + 1] where it did before that, for each place; 0: nowhere
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        tokens, size = self._tokens, self._size
        tokens.append(token)
        earlier, here = 0, len(tokens)
        if here >= size:
            ngram = tuple(tokens[-size:])
            earlier = self._newest.get(ngram, 0)
            self._newest[ngram] = here
        self._earlier.append(earlier)

    def begin(self, start: int, tokens: Sequence[int]) -> None:
        new = list(tokens)
        same = _agreement((self._start, self._tokens), (start, new))
        if same and same == self._start + len(self._tokens):
            for token in new[same - start :]:
                self._append(token)
        elif same:
            self._set(self._start, self._tokens[: same - self._start] + new[same - start :])
        else:
            self._set(start, new)

    def add(self, token: int) -> None:
        self._append(token)
        if len(self._tokens) > 2 * REMEMBERED:
            self._set(self._start + len(self._tokens) - REMEMBERED, self._tokens[-REMEMBERED:])

    def read(self) -> None:
        pass

    def kind(self) -> int | None:
        self._place, common = self._find()
        return None if not self._place else (common >= 2 * self._size) + (common >= 4 * self._size)

    def draft(self, most: int) -> list[int]:
        """From the place that `kind` has found; what would lie beyond the end repeats what lies between."""
        known = self._tokens[self._place : self._place + most]
        return [known[i % len(known)] for i in range(most)]

    def _find(self) -> tuple[int, int]:
        """(where the text went on, tokens before that which are those of its end, counted up to 4 `size`); 0, 0 if
        there is no such place."""
        tokens, end, most = self._tokens, len(self._tokens), 4 * self._size
        place, best, longest, looked_at = self._earlier[end], 0, 0, 0
        while place and looked_at < PLACES and longest < most:
            common = self._size
            while common < min(most, place) and tokens[place - common - 1] == tokens[end - common - 1]:
                common += 1
            if common > longest:
                best, longest = place, common
            place, looked_at = self._earlier[place], looked_at + 1
        return best, longest


class ModelDrafter:
    """What a smaller model takes for likeliest, in a cache of its own that follows the text.

    vocab_size: of the model that it drafts for. What the cache holds says how many tokens are in it, so that Ctrl-C at
    any moment leaves it true.
    """

    chances = (0.7,)

    def __init__(self, model: Model, cache: Cache, vocab_size: int) -> None:
        self._model, self._cache, self._vocab_size = model, cache, vocab_size
        self._start, self._tokens = 0, list[int]()
        self._base = 0  # number of the token of the text that is the cache's first
        self._guess_at, self._guess = 0, list[int]()  # what is in the cache after those of the text
        self._able = True

    @property
    def _next(self) -> int:
        """Number of the first token that is not in the cache."""
        return self._base + self._cache.n_tokens

    def begin(self, start: int, tokens: Sequence[int]) -> None:
        self._settle()
        new, first = list(tokens), max(self._start, self._base)
        fed = self._tokens[first - self._start : max(0, self._next - self._start)]
        same = _agreement((first, fed), (start, new))
        self._go_back(same)
        if not self._cache.n_tokens:
            self._base = start
        self._start, self._tokens = start, new
        self._able = max(new, default=0) < self._model.vocab_size

    def add(self, token: int) -> None:
        self._able = self._able and token < self._model.vocab_size
        self._tokens.append(token)
        if len(self._tokens) > 2 * REMEMBERED:
            drop = max(0, min(REMEMBERED, self._next - self._start))
            self._start, self._tokens = self._start + drop, self._tokens[drop:]

    def read(self) -> None:
        """All but the last token, which comes with the first draft."""
        self._settle()
        self._go_back(self._start + len(self._tokens) - 1)
        while self._has_room() and (left := len(self._tokens) - 1 - (self._next - self._start)) > 0:
            n = min(left, self._model.engine.max_chunk)
            self._forward(self._tokens[self._next - self._start :][:n])

    def kind(self) -> int | None:
        return 0 if self._able and self._has_room() else None

    def draft(self, most: int) -> list[int]:
        self._model.file.check_unchanged()
        self.read()
        found: list[int] = []
        self._guess_at = self._start + len(self._tokens)
        fed = self._tokens[-1:]
        while self._has_room():
            token = int(np.argmax(self._forward(fed)))
            if token >= min(self._vocab_size, self._model.vocab_size):
                break
            found.append(token)
            if len(found) == most:
                break
            self._guess.append(token)
            fed = [token]
        return found

    def _forward(self, tokens: Sequence[int]) -> np.ndarray:
        return self._model.engine.forward(np.array(tokens, np.int32), self._cache)

    def _has_room(self) -> bool:
        d = self._model.description
        return not d.learned_positions or self._cache.n_tokens < d.context_length

    def _settle(self) -> None:
        """Of what was guessed, what has come is the text's; the rest leaves the cache."""
        came = self._tokens[self._guess_at - self._start :]
        right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._guess, came, strict=False)))
        if self._guess:
            self._go_back(self._guess_at + right)
            self._guess = []

    def _go_back(self, n: int) -> None:
        """Have no more than the first n tokens of the text in the cache; none, to read them again, where it cannot go
        back. (Where it can, but not exactly, guesses are a little worse.)"""
        left = max(0, n - self._base)
        if left >= self._cache.n_tokens or self._cache.rewind(left):
            return
        try:
            self._cache.truncate(left)
        except ValueError:
            self._cache.reset()
            self._base = self._start


# --- what a draft is worth ------------------------------------------------------------------------


class _Median:
    """Of the last values: a step that was held up, by whatever else the machine does, does not count."""

    def __init__(self, before: float = 0.0) -> None:
        self._values: deque[float] = deque(maxlen=15)
        self.value = before

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        self._values.append(value)
        self.value = median(self._values)


class Gain:
    """How many tokens to draft: as many as gain most, by what steps have taken and how often drafts were right.

    Times are in steps of one token. A kind of drafts that loses is still tried with one token now and then, since the
    text may change; each kind has an account of what it has lost, and waits while that is more than a small share of
    what was written.
    """

    KNOWN = 3
    """Steps of one token whose time is to be known first."""
    MORE, LEAST = 0.15, 0.03
    """What each further token of a step takes, before it is known, and at least."""
    SHARE, ALLOWED = 0.005, 1.0
    """Each kind of draft may lose so much of the steps of the text, and so many steps besides."""
    CREDIT = 4.0
    """Most steps that a kind has left to lose because it has gained them before."""
    RATE = 1 / 12
    """How much one drafted token changes what is expected of the next one."""

    def __init__(self, chances: Sequence[float]) -> None:
        self._chances, self._lost = list(chances), [0.0] * len(chances)
        self._one, self._more, self._draft = _Median(), _Median(self.MORE), _Median()
        self._written = 0

    def length(self, kind: int, most: int) -> int:
        """How many tokens of a kind to draft, up to `most`, which is at least 1; 0: none."""
        if len(self._one) < self.KNOWN or self._lost[kind] > self.ALLOWED + self.SHARE * self._written:
            return 0
        chance, cost = self._chances[kind], self._more.value + self._draft.value
        best, n, tokens, right = 1.0, 1, 1.0, 1.0
        for drafted in range(1, most + 1):
            right *= chance
            tokens += right
            gain = tokens / (1 + cost * drafted)
            if gain > best:
                best, n = gain, drafted
        return n

    def single(self, seconds: float) -> None:
        """A step of one token has taken so long."""
        self._one.add(seconds)
        self._written += 1

    def took(self, kind: int, drafted: int, right: int, seconds: float, drafting: float) -> None:
        """A step with `drafted` tokens, of which the first `right` were, has taken so long, and the draft so long."""
        one = self._one.value
        self._more.add(min(max((seconds / one - 1) / drafted, self.LEAST), 2.0))
        self._draft.add(drafting / one / drafted)
        lost = self._more.value * drafted + drafting / one - right
        self._lost[kind] = max(self._lost[kind] + lost, -self.CREDIT)
        self._chances[kind] += (1 - self._chances[kind]) * (1 - (1 - self.RATE) ** right)
        if right < drafted:
            self._chances[kind] *= 1 - self.RATE
        self._written += 1 + right


class Speculation:
    """Drafts for the answers of a session. `most`: most tokens of one."""

    def __init__(self, drafter: Drafter, most: int, gain: Gain | None = None) -> None:
        self.most = most
        self._drafter, self._gain = drafter, gain or Gain(drafter.chances)
        self._ready = False
        self._latest: tuple[int, int, float] | None = None  # kind, tokens, seconds of the latest draft

    def begin(self, start: int, tokens: Sequence[int]) -> None:
        """An answer begins after this text, as far as it is known: its tokens from number `start` on."""
        self._drafter.begin(start, tokens)
        self._ready = False

    def add(self, token: int) -> None:
        """The text has one more token."""
        self._drafter.add(token)

    def draft(self, most: int, stop_ids: Collection[int]) -> list[int]:
        """Tokens that may come next, at most so many and none of `stop_ids`; none if they are not worth it."""
        self._latest = None
        most = min(most, self.most)
        kind = self._drafter.kind() if most > 0 else None
        n = 0 if kind is None else self._gain.length(kind, most)
        if kind is None or not n:
            return []
        try:
            if not self._ready:  # what a whole prompt takes to read is nothing that a draft costs
                self._drafter.read()
                self._ready = True
            began = time.perf_counter()
            draft = [*takewhile(lambda token: token not in stop_ids, self._drafter.draft(n))]
        except MemoryError:  # that the model itself may still have
            return []
        if draft:
            self._latest = kind, len(draft), time.perf_counter() - began
        return draft

    def took(self, seconds: float, right: int) -> None:
        """The step with the latest draft has taken so long, and so many tokens of it were right."""
        if self._latest is None:
            self._gain.single(seconds)
        else:
            kind, drafted, drafting = self._latest
            self._gain.took(kind, drafted, right, seconds, drafting)
