"""A session: one conversation or text with its own key/value cache, and answers that stream from it."""

from __future__ import annotations

import copy
import io
import os
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvrun import _core
from kvrun.errors import KvrunError, OptionError
from kvrun.options import (
    REPEAT_LAST_N,
    CacheKeywords,
    CacheOptions,
    SamplingKeywords,
    StreamKeywords,
    declared,
    documented,
    integer,
    resolve,
)
from kvrun.text.streaming import StopStrings, opens_thinking

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvrun.files.session_file import SavedSession
    from kvrun.model import Model


@dataclass
class Stats:
    """Counts and seconds of one `stream`; time spent by the caller between two pieces is not in them."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    answer_tokens: int = 0

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class _Turn:
    """What a prompt puts into the session. `messages` and `text` (escaped) are None for a plain text."""

    ids: list[int]
    fresh: bool
    messages: list[dict[str, Any]] | None = None
    text: str | None = None


def new_cache(engine: Any, options: CacheOptions, prefault: bool = False) -> Any:
    """A cache of an engine. OptionError for options that make no cache, or one too large for the memory."""
    try:
        return engine.new_cache(**asdict(options), prefault=prefault)
    except ValueError as error:
        raise OptionError(str(error)) from None
    except MemoryError:
        raise OptionError(f"not enough memory for a cache of {options.ctx} tokens; a smaller ctx needs less") from None


class Session:
    """One text with a cache of its own; `Model.session` makes one. Not for several threads at a time.

    `messages` is the conversation so far, as the chat template gets it; `stats` describes the latest answer,
    and `answer_begins_thinking` says whether the template has opened its <think> already.
    """

    def __init__(self, model: Model, **cache: Unpack[CacheKeywords]) -> None:
        self.model = model
        self.cache = CacheOptions.resolve(model.description.usual_context, **cache)
        self._kv = new_cache(model.engine, self.cache, model.prefault)
        self.messages: list[dict[str, Any]] = []
        self.stats = Stats()
        self.answer_begins_thinking = False
        self._running: Iterator[str] | None = None
        self._clear()

    def _clear(self) -> None:
        self._kv.reset()
        # (number of tokens in the cache, tokens that follow them and are not in it yet). Replaced as one, and
        # brought up to date from the cache's own count, so that Ctrl-C at any point leaves it true.
        self._state: tuple[int, list[int]] = (0, [])
        self._recent: deque[int] = deque(maxlen=REPEAT_LAST_N)
        self._logits: np.ndarray | None = None
        self._logits_at = 0
        # The tokens of the text, and perhaps more after them; None once they have outgrown the cache, so that an
        # endless text does not fill the memory.
        self._ids: array[int] | None = array("i")
        self._text: str | None = ""  # escaped; None when it is not known as the text of a conversation

    def reset(self) -> None:
        """Forget everything: messages and cache."""
        self._end_running()
        self._clear()
        self.messages = []

    def truncate(self, n: int) -> None:
        """Keep the first `n` tokens of the text, and go on from there.

        `messages` are forgotten if anything is cut off: go on with `raw` text, token ids or messages of your
        own. OptionError, with nothing changed, if the text is shorter, or if all after its beginning has left the
        cache, or what a sliding window of the model would show then. An answer that is under way ends first, as
        with `fork` and `save`.
        """
        n = integer("n", n, low=0)
        self._end_running()
        if n > self.n_tokens:
            raise OptionError(f"n: the text has {self.n_tokens} tokens, {n} cannot be kept")
        if n == self.n_tokens:
            return
        ids = self._known_ids()
        # The last token is fed again when the logits after it are wanted.
        again = [ids[n - 1]] if ids and 0 < n <= self._kv.n_tokens else []
        try:
            self._cut(n - len(again))
        except OptionError:
            if not again:
                raise
            again = []
            self._cut(n)
        self._append(again)
        self.messages = []
        self._text = None if n else ""

    def fork(self) -> Session:
        """Another session with the same text and options; what happens to one does not affect the other."""
        self._end_running()
        self._pending()
        other = copy.copy(self)
        try:
            other._kv = self._kv.copy()
        except MemoryError:
            raise OptionError(f"not enough memory for another cache of {self.cache.ctx} tokens") from None
        for name in ("messages", "stats", "_state", "_recent", "_ids", "_logits"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write text, cache and conversation to a file that `Model.restore` goes on from, exactly.

        ModelFileError when it cannot be written, KvrunError when `messages` hold what JSON cannot; a file of
        that name is then as it was.
        """
        from kvrun.files.session_file import SavedSession, write_session_file

        self._end_running()
        pending, ids = self._pending(), self._known_ids()
        valid = not pending and self._logits_at == self._kv.n_tokens
        saved = SavedSession(
            model=self.model.file.fingerprint,
            cache=self.cache,
            n_tokens=self._kv.n_tokens,
            lost=self._kv.lost,
            kv=self._kv.state(),
            pending=pending,
            recent=list(self._recent),
            tokens=None if ids is None else np.array(ids, np.int32),
            logits=self._logits if valid else None,
            messages=self.messages,
            text=self._text,
        )
        write_session_file(path, saved)

    def _load(self, saved: SavedSession) -> None:
        """Take over what was saved, in a new session. ValueError if it does not fit the cache."""
        self._kv.load_state(saved.n_tokens, saved.lost, saved.kv)
        self._state = (saved.n_tokens, saved.pending)
        self._recent.extend(saved.recent)
        self._ids = None if saved.tokens is None else array("i", saved.tokens.tolist())
        self._logits, self._logits_at = saved.logits, saved.n_tokens
        self.messages, self._text = saved.messages, saved.text

    @property
    def n_tokens(self) -> int:
        """Tokens of the text so far, also those that have left the cache."""
        self._pending()
        return self._state[0] + len(self._state[1])

    @property
    def kv_bytes(self) -> int:
        """Size of the cache in bytes; it does not change."""
        return self._kv.nbytes

    @property
    def logits(self) -> np.ndarray:
        """float32 [vocab]: what the model makes of the text so far, for the token that comes next.

        KvrunError before anything was fed, and after an interruption in the middle of a step.
        """
        self._flush()
        if self._logits is None or self._logits_at != self._kv.n_tokens:
            raise KvrunError("there are no logits: feed at least one token first")
        return self._logits

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text (see `Tokenizer.encode`)."""
        return self.model.tokenize(text, add_special, parse_special)

    def detokenize(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids (see `Tokenizer.decode`)."""
        return self.model.detokenize(ids, skip_special)

    @documented(StreamKeywords)
    def stream(self, prompt: str | Sequence[Any], **options: Unpack[StreamKeywords]) -> Iterator[str]:
        """Feed a prompt and yield the answer in pieces of whole characters.

        `prompt`: a str is the next turn of the conversation, put through the model's chat template, or with
        `raw` (and for a model without a template) plain text to go on from; a list of messages
        ({"role": .., "content": ..}) is a whole conversation, in place of the one so far (what both begin
        with is kept and not fed again); a list of token ids is fed as it is. `max_tokens` 0 only feeds. The
        answer ends at the model's stop tokens unless `ignore_eos`, and before any of the strings `stop`. Without
        `think` the template is told to leave the model's thinking out, which only some templates know
        (OptionError for others). Sampling options that are not given are the model file's defaults, if it has any.

        Values are checked at once (OptionError), the work is done while iterating. Closing the iterator or
        interrupting it keeps in the session what was shown. A new stream ends the one before.
        """
        values = resolve(StreamKeywords, options, self.model.file.sampling)
        stops, limit = StopStrings(values["stop"]), values["max_tokens"]
        self._end_running()
        turn = self._turn(prompt, values["raw"], values["think"])
        self.answer_begins_thinking = turn.text is not None and opens_thinking(turn.text)
        if limit:
            _ = self.model.tokenizer  # a model without one should say so now
        stop_ids = frozenset() if values["ignore_eos"] else self.model.stop_ids
        self._running = self._run(turn, values, limit, stops, stop_ids)
        return self._running

    # --- prompts ----------------------------------------------------------------------------------

    def _turn(self, prompt: str | Sequence[Any], raw: bool, think: bool) -> _Turn:
        if isinstance(prompt, str):
            if raw or self.model.chat is None:
                return self._plain_turn(prompt)
            if not prompt.strip():
                raise OptionError("the prompt is empty")
            return self._chat_turn([*self.messages, {"role": "user", "content": prompt}], think)
        if not isinstance(prompt, (list, tuple, np.ndarray)):
            raise OptionError(f"a prompt must be text, messages or token ids, not {type(prompt).__name__}")
        if len(prompt) and isinstance(prompt[0], Mapping):
            from kvrun.text.templates import check_messages

            if self.model.chat is None:
                raise OptionError("the model has no chat template: give the prompt as text, not as messages")
            return self._chat_turn(check_messages(prompt), think)
        ids = [integer("token id", i, low=0, high=self.model.vocab_size - 1) for i in prompt]
        return self._something(_Turn(ids, fresh=False))

    def _plain_turn(self, prompt: str) -> _Turn:
        begun = self.n_tokens > 0
        ids = self.model.tokenizer.encode(prompt, add_special=not begun, continued=begun)
        return self._something(_Turn(ids, fresh=False))

    def _something(self, turn: _Turn) -> _Turn:
        if not turn.ids and not self.n_tokens:
            raise OptionError("the prompt is empty")
        return turn

    def _chat_turn(self, messages: list[dict[str, Any]], think: bool) -> _Turn:
        if not think and not self.model.chat.can_think_or_not:
            raise OptionError("think: the model's chat template has no switch for thinking (enable_thinking)")
        text = self.model.chat.render(messages, **({} if think else {"enable_thinking": False}))
        known = self._text
        # What the cache holds is kept if the conversation still begins with it, to the character.
        fresh = known is None or not text.startswith(known)
        rest = text if fresh else text[len(known) :]
        ids = self.model.tokenizer.encode_escaped(rest, continued=not fresh and bool(known))
        return self._something(_Turn(ids, fresh, messages, text))

    # --- answers ----------------------------------------------------------------------------------

    def _run(
        self, turn: _Turn, values: Mapping[str, Any], limit: int, stops: StopStrings, stop_ids: frozenset[int]
    ) -> Iterator[str]:
        self._text = None  # not known again before the end, so that an interruption in between does no harm
        self.stats = Stats()
        self._append(turn.ids[self._rewind(turn.ids) :] if turn.fresh else turn.ids)
        if turn.messages is not None:
            self.messages = turn.messages
        answer = None
        try:
            self._flush(prompt=True)
            if limit:
                answer = _Answer(self.model.tokenizer, stops, chat=turn.messages is not None)
                yield from self._decode(answer, values, limit, stop_ids)
        finally:
            if turn.messages is not None:
                self._remember(turn, answer, limit)

    def _remember(self, turn: _Turn, answer: _Answer | None, limit: int) -> None:
        """Add an answer, complete or not, to the conversation."""
        shown, text = answer.texts() if answer else ("", "")
        if limit:
            self.messages = [*turn.messages, {"role": "assistant", "content": shown}]
        self._text = turn.text + self.model.chat.escape(text)

    def _decode(
        self, answer: _Answer, values: Mapping[str, Any], limit: int, stop_ids: frozenset[int]
    ) -> Iterator[str]:
        sampler = self._sampler(values)
        while True:
            token = self._sample(sampler)
            if token in stop_ids:
                break
            sampler.accept(token)
            self._append([token])
            self.stats.answer_tokens += 1
            piece = answer.push(token)
            if piece:
                yield piece
            if answer.stopped or self.stats.answer_tokens == limit:
                break
            self._flush()
        rest = answer.finish()
        if rest:
            yield rest

    def _sampler(self, values: Mapping[str, Any]) -> _core.Sampler:
        options = {name: values[name] for name in declared(SamplingKeywords)}
        if options["seed"] is None:
            options["seed"] = int.from_bytes(os.urandom(8), "little")
        sampler = _core.Sampler(**options)
        if sampler.repeat_penalty != 1:
            for token in self._recent:
                sampler.accept(token)
        return sampler

    def _sample(self, sampler: Any) -> int:
        try:
            return int(sampler.sample(self.logits))
        except ValueError as error:
            raise KvrunError(f"{self.model.file.path}: cannot go on: {error}") from None

    def _end_running(self) -> None:
        if self._running is not None:
            try:
                self._running.close()
            except ValueError:
                raise KvrunError("this session is in use by another thread; give each thread its own") from None
            self._running = None

    # --- feeding ----------------------------------------------------------------------------------

    def _append(self, ids: list[int]) -> None:
        known = self._known_ids()
        if known is not None:
            known.extend(ids)
        self._recent.extend(ids[-REPEAT_LAST_N:])
        self._state = (self._state[0], self._state[1] + ids)

    def _pending(self) -> list[int]:
        """Tokens of the text that are not in the cache yet."""
        count, waiting = self._state
        fed = self._kv.n_tokens
        if fed != count:  # fewer: the text was cut, and what waited was to follow what is gone
            self._state = (fed, waiting[fed - count :] if fed > count else [])
        return self._state[1]

    def _known_ids(self) -> array[int] | None:
        """The tokens of the text, None if they are no longer known."""
        if self._kv.outgrown:
            self._ids = None
        if self._ids is not None:
            del self._ids[self.n_tokens :]
        return self._ids

    def _rewind(self, ids: list[int]) -> int:
        """Cut the text down to what `ids`, less its last, begins with too; the number of tokens left: none if a
        sliding window no longer has what it needs to go on from there."""
        known = self._known_ids() or ()
        n = next((n for n, (a, b) in enumerate(zip(known, ids[:-1], strict=False)) if a != b), None)
        if n is None:
            n = max(0, min(len(known), len(ids) - 1))
        if n:
            try:
                self._cut(n)
            except OptionError:
                n = 0
        if not n:
            self._clear()
        return n

    def _cut(self, n: int) -> None:
        """Keep the first n tokens. OptionError, with nothing changed, if they have left the cache."""
        waiting, ids, cut = self._pending(), self._known_ids(), self.n_tokens - n
        text, self._text, fed = self._text, None, self._kv.n_tokens
        if n < fed:
            try:
                self._kv.truncate(n)
            except ValueError as error:
                self._text = text
                raise OptionError(f"n: {error}") from None
            self._logits = None
        self._state = (min(n, fed), waiting[: max(0, n - fed)])
        recent = list(self._recent)[: max(0, len(self._recent) - cut)] if ids is None else ids[:n]
        self._recent = deque(recent, maxlen=REPEAT_LAST_N)

    def _flush(self, prompt: bool = False) -> None:
        """Run what is pending through the model, in chunks, so that Ctrl-C works between them."""
        most = self.model.engine.max_chunk
        while waiting := self._pending():
            chunk = np.array(waiting[:most], dtype=np.int32)
            last = len(chunk) == len(waiting)
            began = time.perf_counter()
            try:
                logits = self.model.engine.forward(chunk, self._kv, logits="last" if last else "none")
            except ValueError as error:  # learned positions are used up
                raise KvrunError(f"{self.model.file.path}: cannot go on: {error}") from None
            seconds = time.perf_counter() - began
            if last:
                self._logits, self._logits_at = logits, self._kv.n_tokens
            if prompt:
                self.stats.prompt_tokens += len(chunk)
                self.stats.prompt_seconds += seconds
            else:
                self.stats.decode_tokens += len(chunk)
                self.stats.decode_seconds += seconds


class _Answer:
    """The text of one answer: what was shown, and what the cache holds, special tokens included."""

    def __init__(self, tokenizer: Any, stops: StopStrings, chat: bool) -> None:
        self._visible = tokenizer.stream(skip_special=True, start=chat)
        self._exact = tokenizer.stream(skip_special=False, start=False) if chat else None
        self._stops = stops
        # Only a conversation needs its text again; an endless plain text must not fill the memory.
        self._shown, self._text = io.StringIO(), io.StringIO()

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def push(self, token: int) -> str:
        if self._exact:
            self._text.write(self._exact.push(token))
        return self._show(self._stops.push(self._visible.push(token)))

    def finish(self) -> str:
        """What was held back: half a character, the beginning of a stop string."""
        if self.stopped:
            return ""
        piece = self._stops.push(self._visible.finish())
        return self._show(piece if self.stopped else piece + self._stops.finish())

    def _show(self, piece: str) -> str:
        if self._exact:
            self._shown.write(piece)
        return piece

    def texts(self) -> tuple[str, str]:
        """(shown, in the cache)"""
        if self._exact:
            self._text.write(self._exact.finish())
        return self._shown.getvalue(), self._text.getvalue()
