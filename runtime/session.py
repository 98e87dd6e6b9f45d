"""A session: one conversation or text with its own key/value cache, and answers that stream from it."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvrun import _core
from kvrun.backend import StepItem
from kvrun.errors import KvrunError, OptionError, TokenizerError
from kvrun.exclusive import Pieces, exclusive, one_at_a_time
from kvrun.history import History
from kvrun.options import (
    CacheKeywords,
    CacheOptions,
    SamplingKeywords,
    SpeculationKeywords,
    StreamKeywords,
    declared,
    documented,
    integer,
    path_text,
    resolve,
)
from kvrun.prefix_store import Prefix, common
from kvrun.speculation import ModelDrafter, NgramDrafter, Speculation
from kvrun.text.streaming import StopStrings
from kvrun.text.thinking import mark_tokens, opened, opens_thinking
from kvrun.text.transcript import Transcript

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvrun.backend import Cache, CacheT, Engine
    from kvrun.files.session_file import SavedSession
    from kvrun.model import Model
    from kvrun.text.templates import ChatTemplate


@dataclass
class Stats:
    """Counts and seconds of one `stream`; time spent by the caller between two pieces is not in them.

    `prompt_tokens` counts what was fed before the answer: tokens of the prompt that the cache did not hold, and those
    of the text before it that had to be fed again. `cached_tokens`: all others of the text up to the answer, which were
    there already and were not fed.
    `prompt_overflow`, as soon as `stream` has returned: tokens of the prompt (of messages: of what is not in the
    session yet) that the cache has no room for, so that the answer is made without them. `evicted_tokens`: those of the
    whole text that are more than the cache keeps, at first those that it will be with the prompt. The oldest go, after
    the sinks, and in tiles: up to 63 may be there still. Layers with a sliding window do not count. `seed`: that of the
    answer's random numbers, None where there are none (`temperature` 0). `finish_reason`: why the answer has ended,
    "stop" at a stop token or string or "length" with `max_tokens`; None as long as it has not. `drafted_tokens`: those
    that were guessed and looked at (`spec`), and `accepted_tokens` those of them that are in the answer; what was not
    accepted counts nowhere else, but the time for it does.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    answer_tokens: int = 0
    prompt_overflow: int = 0
    evicted_tokens: int = 0
    seed: int | None = None
    finish_reason: str | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class _Conversation:
    """Messages, and what the chat template makes of them with some variables, special characters escaped."""

    messages: list[dict[str, Any]]
    rendered: str
    variables: Mapping[str, Any]


@dataclass(frozen=True)
class _Turn:
    """What a prompt puts into the session; `fresh`: in place of what is there. `chat` is None for a plain text."""

    ids: list[int]
    fresh: bool
    chat: _Conversation | None = None


@dataclass(frozen=True)
class _Rules:
    """What an answer is made by. `limit`: most tokens, below 0 any number. `speculation`: what drafts, if anything."""

    sampling: Mapping[str, Any]
    limit: int
    stops: StopStrings
    stop_ids: frozenset[int]
    speculation: Speculation | None


@dataclass(frozen=True)
class _Writing:
    """An answer that is being written."""

    answer: _Answer
    sampler: _core.Sampler
    rules: _Rules


@dataclass(frozen=True)
class _Ahead:
    """What a step has left: `rows` of logits, after the text and after it with each token of the `draft`, which are in
    the cache. `seconds`: what the step took, 0 where that says nothing."""

    rows: np.ndarray
    draft: Sequence[int] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class _Before:
    """What a prompt that cannot be fed leaves a session with. `fed`: tokens in the cache."""

    text: Transcript
    history: History
    fed: int
    logits: tuple[int, np.ndarray] | None
    messages: list[dict[str, Any]]


Work = Generator[str | StepItem, "np.ndarray | None", None]
"""What a session has to do: it yields pieces of text, and steps to be run, whose results are sent back."""


def driven(engine: Engine[Any], work: Work) -> Generator[str, None, None]:
    """The pieces of text, with each step run when it comes."""
    result: np.ndarray | None = None
    try:
        while True:
            item = work.send(result)
            while not isinstance(item, str):
                try:
                    result = engine.forward(item.tokens, item.cache, logits=item.wants, decoding=item.decoding)
                except BaseException as error:
                    item = work.throw(error)
                else:
                    item = work.send(result)
            yield item
            result = None
    except StopIteration:
        return
    finally:
        work.close()


def new_cache(engine: Engine[CacheT], options: CacheOptions, prefault: bool = False) -> CacheT:
    """A cache of an engine. OptionError for options that make no cache, or one too large for the memory."""
    try:
        return engine.new_cache(**asdict(options), prefault=prefault)
    except ValueError as error:
        raise OptionError(str(error)) from None
    except MemoryError:
        size = _core.kv_bytes(engine.description, **asdict(options)) / 1e9
        raise OptionError(
            f"not enough memory for a cache of {options.ctx} tokens, which takes {size:.1f} GB; a smaller ctx or a "
            "format of fewer bits needs less"
        ) from None


class Session:
    """One text with a cache of its own; `Model.session` makes one.

    Threads can share a session, but not at the same time: SessionBusyError, a KvrunError, from every method and from a
    stream's next piece while another thread is in one. Between two pieces of a stream another call may come, from any
    thread; it ends the stream (all but `evaluate` and what only reads do).

    An error leaves the session as it was before the call, or the piece, that raised it.

    `messages` is the conversation so far, as the chat template gets it; `stats` describes the latest answer,
    and `answer_begins_thinking` says whether the template has opened its <think> already.
    """

    def __init__(self, model: Model, **cache: Unpack[CacheKeywords]) -> None:
        self.model = model
        self.cache = CacheOptions.resolve(model.description.usual_context, **cache)
        self._kv: Cache = new_cache(model.engine, self.cache, model.prefault)
        # What a sliding window leaves behind it would not show in any case.
        self._can_outgrow = any(not 0 < window <= self.cache.ctx for window in model.engine.sliding_windows)
        self.messages: list[dict[str, Any]] = []
        self.stats = Stats()
        self.answer_begins_thinking = False
        self.chunk: int | None = None  # most tokens of a prompt in a step, fewer than the engine takes
        self.places: Collection[int] = ()  # lengths of the text at which a prompt is cut, to be come back to
        self.drafting = True  # whether `spec` is heeded
        self._speculation: tuple[tuple[Any, ...], Speculation] | None = None  # the latest, and the options it has
        self._turn = _Turn([], fresh=True)
        self._running: Generator[str, None, None] | None = None
        self._use = one_at_a_time()
        self._clear()

    @classmethod
    def from_saved(cls, model: Model, saved: SavedSession) -> Session:
        """The session that was saved. OptionError or ValueError if it does not fit its cache or the model."""
        cache = saved.cache
        session = cls(model, kv_k=cache.k, kv_v=cache.v, ctx=cache.ctx, sinks=cache.sinks, window=cache.window)
        session._kv.load_state(saved.n_tokens, saved.lost, saved.kv)
        if saved.tokens is not None:
            session._transcript = Transcript(saved.tokens.tolist(), rendered=saved.text)
        else:
            before = saved.recent[: max(0, len(saved.recent) - len(saved.pending))]
            if len(before) > saved.n_tokens:
                raise ValueError("more recent tokens than there are tokens")
            session._transcript = Transcript(before + saved.pending, saved.n_tokens - len(before), saved.text)
        if saved.history is not None:
            session._history = History.recalled(saved.history.written, saved.history.story, saved.history.answers)
        elif len(saved.pending) == 1:
            session._history.write(saved.n_tokens)
        if saved.text:
            session._history.tell(saved.text, session.n_tokens)
        session._logits = None if saved.logits is None else (saved.n_tokens, saved.logits)
        session.messages = saved.messages
        return session

    def _clear(self) -> None:
        self._kv.reset()
        self._transcript = Transcript()
        self._history = History()
        self._logits: tuple[int, np.ndarray] | None = None  # after so many tokens in the cache

    @property
    def _text(self) -> Transcript:
        """The text, in line with the cache."""
        self._transcript.agree(self._kv.n_tokens, self._kv.outgrown)
        return self._transcript

    @exclusive
    def reset(self) -> None:
        """Forget everything: messages and cache."""
        self._end_running()
        self._clear()
        self.messages = []

    @exclusive
    def truncate(self, n: int) -> None:
        """Keep the first `n` tokens of the text, and go on from there.

        What follows is, to the bit, what it would be had no others been fed: what the cache no longer has as it was
        then is fed again with the next prompt, or by `evaluate`. Only of a text that has outgrown its cache, whose
        tokens are not known any more, the newest that are kept come back as their format has rounded them.

        `messages` are forgotten if anything is cut off: go on with `raw` text, token ids or messages of your
        own. OptionError, with nothing changed, if the text is shorter, or has outgrown its cache and all after its
        beginning is gone, or what a sliding window of the model would show then. An answer that is under way ends
        first, as with `fork` and `save`.
        """
        n = integer("n", n, low=0)
        self._end_running()
        if n > self.n_tokens:
            raise OptionError(f"n: the text has {self.n_tokens} tokens, {n} cannot be kept")
        if n == self.n_tokens:
            return
        if n == 0:
            self._clear()
        elif self._text.tokens is None:
            self._cut_outgrown(n)
        else:
            self._cut(n, n - 1)  # the last is fed again when the logits after it are wanted
        self.messages = []

    @exclusive
    def fork(self) -> Session:
        """Another session with the same text and options; what happens to one does not affect the other.

        OptionError if there is no memory for another cache.
        """
        self._end_running()
        try:
            cache = self._kv.copy()
        except MemoryError:
            raise OptionError(f"not enough memory for another cache of {self.cache.ctx} tokens") from None
        other = copy.copy(self)
        other._kv, other._use = cache, one_at_a_time()
        other._transcript, other._history = self._text.copy(), self._history.copy()
        other._speculation = None
        for name in ("messages", "stats", "_logits"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        return other

    @exclusive
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write text, cache and conversation to a file that `Model.restore` goes on from, exactly.

        ModelFileError when it cannot be written, OptionError when `path` is no path, KvrunError when `messages` hold
        what JSON cannot; a file of that name is then as it was.
        """
        from kvrun.files.session_file import SavedHistory, SavedSession, write_session_file

        path = path_text("path", path)
        self._end_running()
        if self.n_tokens == self._kv.n_tokens + 1 and not self._history.run(self._kv.n_tokens)[0]:
            self._feed()  # a last token that waits in a file without a history is an answer's
        text, fed = self._text, self._kv.n_tokens
        story, answers = self._history.answers
        told = text.tokens is not None and (self._history.written or answers[:-1] or story != (text.rendered or ""))
        try:
            kv = self._kv.state()
        except MemoryError:
            raise KvrunError("there is not enough memory to save the session") from None
        saved = SavedSession(
            model=self.model.file.fingerprint,
            cache=self.cache,
            n_tokens=fed,
            lost=self._kv.lost,
            kv=kv,
            pending=text.pending(fed).tolist(),
            recent=text.recent().tolist(),
            tokens=None if text.tokens is None else np.array(text.tokens, np.int32),
            logits=self._valid_logits(),
            messages=self.messages,
            text=text.rendered,
            history=SavedHistory(self._history.written, story, answers) if told else None,
        )
        write_session_file(path, saved)

    @property
    def n_tokens(self) -> int:
        """Tokens of the text so far, also those that have left the cache."""
        return self._transcript.n_tokens

    @property
    def kv_bytes(self) -> int:
        """Size of the cache in bytes; it does not change.

        Memory is taken as the cache fills. Beside it are copies of its window as it was earlier, which take at most a
        quarter as much (or 8 MB), to go back to without feeding everything again: none for formats that do not round.
        """
        return self._kv.nbytes

    @property
    def logits(self) -> np.ndarray:
        """float32 [vocab]: what the model makes of the text so far, for the token that comes next.

        They are there when all of the text has been fed: after a stream with `max_tokens` 0, or one that ended with the
        model's stop token. The last token of any other answer is fed when the next one begins, or by `evaluate`:
        KvrunError until then, as before anything was fed and after an interruption in the middle of a step.
        """
        logits = self._valid_logits()
        if logits is not None:
            return logits
        pending = self.n_tokens - self._kv.n_tokens
        if pending > 0:
            raise KvrunError(f"there are no logits yet: evaluate() feeds the last {pending} tokens, and returns them")
        raise KvrunError("there are no logits: feed at least one token first")

    def _valid_logits(self) -> np.ndarray | None:
        at, logits = self._logits or (-1, None)
        return logits if at == self._kv.n_tokens == self.n_tokens else None

    @exclusive
    def evaluate(self) -> np.ndarray:
        """Feed what has not been fed of the text, which may be its last token, and return `logits`.

        Also while an answer is under way, between two of its pieces. KvrunError where there are none, see `logits`, and
        as from a stream.
        """
        self._feed()
        return self.logits

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text, as `Model.tokenize`."""
        return self.model.tokenize(text, add_special, parse_special)

    def detokenize(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids, as `Model.detokenize`."""
        return self.model.detokenize(ids, skip_special)

    @documented(StreamKeywords)
    @exclusive
    def stream(self, prompt: str | Sequence[Any], **options: Unpack[StreamKeywords]) -> Generator[str, None, None]:
        """Feed a prompt and yield the answer in pieces of whole characters.

        `prompt`: a str is the next turn of the conversation, put through the model's chat template, or with
        `raw` (and for a model without a template) plain text to go on from; a list of messages
        ({"role": .., "content": ..}) is a whole conversation, in place of the one so far (what both begin
        with is kept and not fed again); a list of token ids is fed as it is. `max_tokens` 0 only feeds. The
        answer ends at the model's stop tokens unless `ignore_eos`, and before any of the strings `stop`. Without
        `think` the template is told to leave the model's thinking out, which only some templates know
        (OptionError for others). Sampling options that are not given are the model file's defaults, if it has any.

        Values are checked at once, the work is done while iterating. Closing the iterator or interrupting it keeps in
        the session what was shown. A new stream ends the one before, which then has no more pieces.
        `stats` says at once whether the prompt fits into the cache.

        `spec` "ngram" guesses what comes next from what the text has said before, a `Model` or the path of one's file,
        with the same tokenizer, by that. As far as a guess is right, one step makes several tokens: the pieces are
        longer then, and the answer is the same to the bit. Where it does not pay it is left alone.

        OptionError for options, messages and token ids that cannot be used, TokenizerError for text that has no tokens
        of the model, ModelFileError for a file of `spec` that is none, KvrunError for a conversation that the template
        refuses. While iterating: KvrunError when there is no memory for a step, when a model with learned positions has
        no more of them, or when its logits are not numbers. A prompt that cannot be fed leaves the session as it was.
        """
        work = self.steps(prompt, **options)
        self._running = driven(self.model.engine, work)
        return Pieces(self._use, self._running)

    def steps(self, prompt: str | Sequence[Any], **options: Unpack[StreamKeywords]) -> Work:
        """What `stream` does, for somebody else to run it, together with what other sessions do: takes and raises the
        same. Nothing else may use the session meanwhile. `chunk` tokens of the prompt at most are in a step, and a step
        ends at each of `places`; a session that is empty may `begin_with` a prefix before the first. Without `drafting`
        a step has one token of the answer."""
        values = resolve(StreamKeywords, options, self.model.file.sampling)
        stops, limit = StopStrings(values["stop"]), values["max_tokens"]
        speculation = self._speculation_of(values)
        self._end_running()
        turn = self._turn_of(prompt, values["raw"], values["think"])
        turn = self._turn = replace(turn, fresh=turn.fresh or not self.n_tokens)
        if limit:
            _ = self.model.tokenizer  # a model without one should say so now
        self.answer_begins_thinking = turn.chat is not None and opens_thinking(turn.chat.rendered)
        total = len(turn.ids) + (0 if turn.fresh else self.n_tokens)
        self.stats = Stats(prompt_overflow=self._beyond(len(turn.ids)), evicted_tokens=self._beyond(total))
        stop_ids = frozenset() if values["ignore_eos"] else self.model.stop_ids
        return self._run(turn, _Rules(values, limit, stops, stop_ids, speculation))

    # --- for a scheduler --------------------------------------------------------------------------

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens of the prompt that `steps` was given: of an empty session, all before the answer."""
        return self._turn.ids

    def last_message(self) -> int:
        """How many of the `prompt_ids` are before what the last message says; 0 if the prompt is no conversation, or
        that cannot be told. A good guess of what other prompts have in common with it."""
        chat = self._turn.chat
        other = None if chat is None else self._template().with_another_end(chat.messages, **chat.variables)
        if other is None:
            return 0
        ids = self.model.tokenizer.encode_escaped(other)
        return common(np.array(ids, np.int32), np.array(self.prompt_ids, np.int32))

    def prefix(self) -> Prefix:
        """The beginning of the text that was read and is in the cache, which stays the session's; none of a text that
        has outgrown it."""
        tokens, read = self._text.tokens, self._history.read
        n = 0 if tokens is None or self._kv.outgrown else self._kv.n_tokens
        n = n if read is None else min(n, read)
        return Prefix(np.array((tokens or ())[:n], np.int32), self._kv, self._history)

    def begin_with(self, prefix: Prefix) -> None:
        """Have this, and its cache, in place of what there was. Nothing else may use them from now on."""
        self._kv, self._history = prefix.cache, prefix.history
        self._transcript, self._logits = Transcript(prefix.tokens.tolist(), rendered=None), None
        self.messages = []

    def renew(self) -> None:
        """Forget everything, and have another cache, so that the one that there was can be kept. OptionError, with
        nothing changed, if there is no memory for it."""
        self._kv = new_cache(self.model.engine, self.cache)
        self._clear()
        self.messages = []

    # --- prompts ----------------------------------------------------------------------------------

    def _turn_of(self, prompt: str | Sequence[Any], raw: bool, think: bool) -> _Turn:
        if isinstance(prompt, str):
            if raw or self.model.chat is None:
                return self._plain_turn(prompt)
            if not prompt.strip():
                raise OptionError("the prompt is empty")
            return self._chat_turn([*self.messages, {"role": "user", "content": prompt}], think)
        if not isinstance(prompt, (list, tuple, np.ndarray)):
            raise OptionError(f"a prompt must be text, messages or token ids, not {type(prompt).__name__}")
        if isinstance(prompt, np.ndarray) and prompt.ndim != 1:
            raise OptionError(f"a prompt of token ids must be one row of them, not an array of shape {prompt.shape}")
        if len(prompt) and isinstance(prompt[0], Mapping):
            from kvrun.text.templates import check_messages

            return self._chat_turn(check_messages(prompt), think)
        ids = [integer("token id", i, low=0, high=self.model.vocab_size - 1) for i in prompt]
        return self._feedable(_Turn(ids, fresh=False))

    def _plain_turn(self, prompt: str) -> _Turn:
        begun = self.n_tokens > 0
        ids = self.model.tokenizer.encode(prompt, add_special=not begun, continued=begun)
        return self._feedable(_Turn(ids, fresh=False))

    def _feedable(self, turn: _Turn) -> _Turn:
        """The turn, if all of it can be fed."""
        before = 0 if turn.fresh else self.n_tokens
        if not turn.ids and not before:
            raise OptionError("the prompt is empty, or the tokenizer has no tokens for what is in it")
        most, positions = self.model.vocab_size, self.model.description.context_length
        if turn.ids and not 0 <= min(turn.ids) <= max(turn.ids) < most:
            unknown = next(i for i in turn.ids if not 0 <= i < most)
            raise TokenizerError(
                f"the prompt has the token {unknown}, and the model has {most} of them: 0 to {most - 1}"
            )
        if self.model.description.learned_positions and before + len(turn.ids) > positions:
            raise OptionError(
                f"the model has learned {positions} positions, and a text cannot be longer: with the prompt it would "
                f"have {before + len(turn.ids)} tokens"
            )
        return turn

    def _chat_turn(self, messages: list[dict[str, Any]], think: bool) -> _Turn:
        template = self._template()
        if not think and not template.without_thinking:
            raise OptionError("think: the model's chat template has no switch for thinking (enable_thinking)")
        variables = {} if think else template.without_thinking
        text = template.render(messages, **variables)
        known = self._text.rendered
        # What the cache holds is kept if the conversation still begins with it, to the character.
        fresh = known is None or not text.startswith(known)
        n, chars = self._told(text) if fresh else (0, len(known or ""))
        kept = list((self._text.tokens or ())[:n])
        ids = kept + self.model.tokenizer.encode_escaped(text[chars:], continued=chars > 0)
        return self._feedable(_Turn(ids, fresh, _Conversation(messages, text, variables)))

    def _told(self, text: str) -> tuple[int, int]:
        """(tokens, characters) of the longest part of the conversation so far that a rendered one begins with, to the
        end of an answer, whose tokens may be others than its text has when it is read."""
        return self._history.told(text) if self._text.tokens else (0, 0)

    def _beyond(self, n_tokens: int) -> int:
        """Of so many tokens, those that the cache has no room for."""
        return max(0, n_tokens - self.cache.ctx) if self._can_outgrow else 0

    def _template(self) -> ChatTemplate:
        if self.model.chat is None:
            raise OptionError("the model has no chat template: give the prompt as text, not as messages")
        return self.model.chat

    # --- answers ----------------------------------------------------------------------------------

    def _run(self, turn: _Turn, rules: _Rules) -> Work:
        text, history, fed = self._text.copy(), self._history.copy(), self._kv.n_tokens
        before = _Before(text, history, fed, self._logits, self.messages)
        self._text.rendered = None  # not known again before the end, so that an interruption in between does no harm
        new = turn.ids[self._rewind(turn.ids) :] if turn.fresh else turn.ids
        self._text.append(new)
        self.stats.cached_tokens = self._kv.n_tokens
        chat, answer, begun = turn.chat, None, self._text.n_tokens
        if chat is not None:
            self.messages = chat.messages
        try:
            try:
                yield from self._feeding(prompt=True)
            except Exception:
                chat = None
                self._undo(before, turn.fresh)
                raise
            self._history.mark(self._kv.n_tokens)
            if not rules.limit:
                self.stats.finish_reason = "length"
            else:
                answer = _Answer(self.model.tokenizer, rules.stops, None if chat is None else self._template().escape)
                yield from self._decode(_Writing(answer, self._sampler(rules.sampling), rules))
        finally:
            self._drop_draft()
            if self._logits is not None:  # of an array that other texts' may be in
                self._logits = self._logits[0], self._logits[1].copy()
            if chat is not None:
                self._remember(chat, answer, rules.limit, begun)

    def _undo(self, before: _Before, fresh: bool) -> None:
        """Have the text again that there was before a prompt that could not be fed. What the cache no longer holds of
        it is fed again when it is needed. Of a text that had outgrown its cache nothing is left if the prompt was to
        take its place; and if it was to go on, and some of it cannot be taken back, that stays."""
        if before.text.tokens is not None:
            place = min(before.text.common(self._text.tokens or ()), before.fed)
            if place < self._kv.n_tokens:
                self._history.go_back(self._kv, place)
        elif fresh:
            self._clear()
            self.messages = []
            return
        elif not self._kv.rewind(before.fed):
            self._text.cut(self._kv.n_tokens)
            return
        self._transcript, self._history, self._logits = before.text, before.history, before.logits
        self.messages = before.messages

    def _remember(self, chat: _Conversation, answer: _Answer | None, limit: int, begun: int) -> None:
        """Add an answer, complete or not, to the conversation; it began after so many tokens."""
        shown, text = answer.texts() if answer else ("", "")
        if limit:
            self.messages = [*chat.messages, {"role": "assistant", "content": opened(chat.rendered, shown)}]
        # Ctrl-C between a token and its text leaves the two apart.
        if self._text.n_tokens == begun + (answer.n_tokens if answer else 0):
            self._text.rendered = chat.rendered + text
            self._history.tell(self._text.rendered, self._text.n_tokens)

    def _decode(self, writing: _Writing) -> Work:
        speculation = writing.rules.speculation
        if speculation is not None:
            speculation.begin(*self._text.known)
        ahead = _Ahead(self.logits[np.newaxis])
        while True:
            piece, right = self._write(writing, ahead)
            if speculation is not None and self.drafting and ahead.seconds:
                speculation.took(ahead.seconds, right)
            if piece:
                yield piece
            if self.stats.finish_reason is not None:
                break
            ahead = yield from self._go_on(writing)
        rest = writing.answer.finish()
        if rest:
            yield rest

    def _write(self, writing: _Writing, ahead: _Ahead) -> tuple[str, int]:
        """Add tokens to the text: one by the first row of logits, and more as long as they are those of the draft, for
        which the next row is. Returns their text, and how many of the draft were right; the rest leaves the cache."""
        rules, draft, shown, right = writing.rules, ahead.draft, "", 0
        fed = self._kv.n_tokens - len(draft)
        for i, logits in enumerate(ahead.rows):
            self._logits = (fed + i, logits)
            token = self._sample(writing.sampler, logits)
            expected = i < len(draft) and token == draft[i]
            if not expected:
                self._take_back(fed + i)
            if token in rules.stop_ids:
                self.stats.finish_reason = "stop"
                break
            shown += self._append(writing, token)
            right += expected
            if writing.answer.stopped or self.stats.answer_tokens == rules.limit:
                self.stats.finish_reason = "stop" if writing.answer.stopped else "length"
                break
            if not expected:
                break
        self._take_back(fed + i)
        self.stats.accepted_tokens += right
        self._count_kept(decoded=i)
        return shown, right

    def _append(self, writing: _Writing, token: int) -> str:
        """Add a token to the text; what there is to be shown of it."""
        writing.sampler.accept(token)
        self._history.write(self._text.n_tokens)
        self._text.append([token])
        self.stats.answer_tokens += 1
        if writing.rules.speculation is not None:
            writing.rules.speculation.add(token)
        return writing.answer.push(token)

    def _go_on(self, writing: _Writing) -> Generator[str | StepItem, np.ndarray | None, _Ahead]:
        """Feed the token that is pending, with a draft of what follows where there is one."""
        before, draft = self.stats.decode_seconds, self._draft(writing.rules)
        if draft:
            try:
                return (yield from self._feeding_draft(draft))
            except KvrunError:  # several tokens may need what one does not
                before = self.stats.decode_seconds
        yield from self._feeding()
        seconds = 0.0 if draft else self.stats.decode_seconds - before
        return _Ahead(self.logits[np.newaxis], seconds=seconds)

    # --- drafts -----------------------------------------------------------------------------------

    def _speculation_of(self, values: Mapping[str, Any]) -> Speculation | None:
        """Where drafts come from, by the options. It is kept for the next answer."""
        spec, most, size = (values[name] for name in declared(SpeculationKeywords))
        draft = self.model.draft_model(spec)
        if draft is None and spec != "ngram":
            return None
        if self.model.engine.max_written < 2:
            raise OptionError("spec: a GPU computes the tokens of an answer one by one, and drafts would save nothing")
        key = (draft, most, size if draft is None else None)
        if self._speculation is None or self._speculation[0] != key:
            if draft is None:
                speculation = Speculation(NgramDrafter(size), most)
            else:
                cache = new_cache(draft.engine, self.cache, draft.prefault)
                speculation = Speculation(ModelDrafter(draft, cache, self.model.vocab_size), most)
            self._speculation = key, speculation
        return self._speculation[1]

    def _draft(self, rules: _Rules) -> list[int]:
        """Tokens that may come next, as far as they can be looked at in one step and taken back."""
        speculation = rules.speculation
        if speculation is None or not self.drafting or self.n_tokens != self._kv.n_tokens + 1:
            return []
        most = self._kv.verifiable(speculation.most + 1) - 1
        if rules.limit >= 0:
            most = min(most, rules.limit - self.stats.answer_tokens - 1)
        began = time.perf_counter()
        draft = speculation.draft(most, rules.stop_ids)
        self.stats.decode_seconds += time.perf_counter() - began
        return draft

    def _feeding_draft(self, draft: list[int]) -> Generator[StepItem, np.ndarray | None, _Ahead]:
        """Feed the token that is pending and a draft, which the cache then holds before it is known to be right."""
        fed = self._kv.n_tokens
        self._history.before(self._kv, 1)
        rows, seconds = yield from self._stepping([*self._text.pending(fed), *draft], True, "all")
        assert rows is not None
        self.stats.drafted_tokens += len(draft)
        self.stats.decode_seconds += seconds
        self._count_kept(decoded=1)
        return _Ahead(rows, draft, seconds)

    def _take_back(self, n: int) -> None:
        """Have no more than n tokens in the cache: of a draft, those that were not right go."""
        if n < self._kv.n_tokens:
            self._history.go_back(self._kv, n)

    def _drop_draft(self) -> None:
        """After an interruption: what is in the cache and not in the text goes."""
        self._take_back(self._transcript.n_tokens)

    def _sampler(self, values: Mapping[str, Any]) -> _core.Sampler:
        options = {name: values[name] for name in declared(SamplingKeywords)}
        if options["seed"] is None or options["seed"] < 0:
            options["seed"] = int.from_bytes(os.urandom(4), "little")
        self.stats.seed = options["seed"] if options["temperature"] else None
        sampler = _core.Sampler(**options)
        if sampler.repeat_penalty != 1:
            for token in self._text.recent():
                sampler.accept(token)
        return sampler

    def _sample(self, sampler: _core.Sampler, logits: np.ndarray) -> int:
        try:
            return int(sampler.sample(logits))
        except ValueError as error:
            raise KvrunError(f"{self.model.file.path}: cannot go on: {error}") from None

    def _end_running(self) -> None:
        if self._running is not None:
            try:
                self._running.close()
            except ValueError:
                raise KvrunError("this session is in use by another thread; give each thread its own") from None
            self._running = None
        self._drop_draft()
        self._history.cut(self.n_tokens)  # Ctrl-C may have come before the token that was to be written

    # --- feeding ----------------------------------------------------------------------------------

    def _rewind(self, ids: list[int]) -> int:
        """Cut the text down to what `ids`, less its last, begins with too; the number of tokens left."""
        n = max(0, min(self._text.common(ids), len(ids) - 1))
        if n:
            self._cut(n, n)
        else:
            self._clear()
            self._text.rendered = None
        return n

    def _cut(self, n: int, place: int) -> None:
        """Keep the first n tokens, and in the cache at most `place`: as many as it can have as they were."""
        self._text.rendered = None
        if place < self._kv.n_tokens:
            self._logits = None
            self._history.go_back(self._kv, place)
        self._history.cut(n)
        self._text.cut(n)

    def _cut_outgrown(self, n: int) -> None:
        """Keep the first n tokens in the cache. OptionError, with nothing changed, if they have left it."""
        try:
            if n < self._kv.n_tokens and not self._kv.rewind(n):
                self._kv.truncate(n)
        except ValueError as error:
            raise OptionError(f"n: {error}") from None
        self._logits = None
        self._history.cut(n)
        self._text.cut(n)
        self._text.rendered = None

    def _feed(self) -> None:
        """Run what is pending through the model."""
        self._drop_draft()
        for _ in driven(self.model.engine, self._feeding()):
            pass

    def _feeding(self, prompt: bool = False) -> Work:
        """What is pending, in chunks, so that Ctrl-C and other texts come in between."""
        while (left := self.n_tokens - self._kv.n_tokens) > 0:
            fed = self._kv.n_tokens
            n, written = self._next_step(fed, left)
            if prompt:
                self._history.mark(fed, lasting=fed in self.places)
            self._history.before(self._kv, n)
            wants = "last" if n == left else "none"
            logits, seconds = yield from self._stepping(self._text.pending(fed, n), written, wants)
            if logits is not None:
                self._logits = (self._kv.n_tokens, logits)
            if prompt:
                self.stats.prompt_tokens += n
                self.stats.prompt_seconds += seconds
            else:
                self.stats.decode_seconds += seconds
            self._count_kept(decoded=0 if prompt else n)

    def _stepping(
        self, tokens: Sequence[int], written: bool, wants: str
    ) -> Generator[StepItem, np.ndarray | None, tuple[np.ndarray | None, float]]:
        """One step of the engine: what it returns, and seconds."""
        self.model.file.check_unchanged()
        began = time.perf_counter()
        try:
            result = yield StepItem(self._kv, np.array(tokens, np.int32), written, wants)
        except ValueError as error:  # learned positions are used up
            raise KvrunError(f"{self.model.file.path}: cannot go on: {error}") from None
        except MemoryError:
            raise KvrunError(f"there is not enough memory to feed {len(tokens)} tokens at once") from None
        return result, time.perf_counter() - began

    def _count_kept(self, decoded: int) -> None:
        """So many more tokens of the answer are in the cache."""
        self.stats.decode_tokens += decoded
        self.stats.evicted_tokens = max(self.stats.evicted_tokens, self._beyond(self._kv.n_tokens))

    def _next_step(self, fed: int, left: int) -> tuple[int, bool]:
        """How many tokens to feed next, and whether as text that is written."""
        written, end = self._history.run(fed)
        most = left if end is None else min(left, end - fed)
        most = min([most, *(place - fed for place in self.places if place > fed)])
        largest = self.model.engine.max_chunk
        return (1, True) if written else (min(most, largest, self.chunk or largest), False)


class _Gathered:
    """A text that grows piece by piece. (A StringIO may be closed before the answer that has been given up.)"""

    MOST = 4096  # pieces, before they are put together

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def add(self, piece: str) -> None:
        self._pieces.append(piece)
        if len(self._pieces) > self.MOST:
            self._pieces = [self.text]

    @property
    def text(self) -> str:
        return "".join(self._pieces)


class _Answer:
    """The text of one answer: what was shown, and what the cache holds, special tokens included.

    Special tokens are not shown but for those that mark thinking. `escape` marks what is ordinary text, for an answer
    of a conversation. `n_tokens`: tokens whose text is in it.
    """

    def __init__(self, tokenizer: Any, stops: StopStrings, escape: Callable[[str], str] | None) -> None:
        chat = escape is not None
        self._tokenizer, self._shown_tokens = tokenizer, mark_tokens(tokenizer.special)
        self._visible = tokenizer.stream(skip_special=True, start=chat, shown=self._shown_tokens)
        self._exact = tokenizer.stream(skip_special=False, start=False) if chat else None
        self._stops, self._escape = stops, escape
        # Only a conversation needs its text again; an endless plain text must not fill the memory.
        self._shown, self._text, self._run = _Gathered(), _Gathered(), _Gathered()
        self.n_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def push(self, token: int) -> str:
        special = self._tokenizer.is_special(token)
        name = self._tokenizer.token_bytes(token).decode("utf-8", "replace") if special else ""
        if self._exact:
            self._run.add(self._exact.push(token).removesuffix(name))
            if special:
                self._end_run(name)
        if special and token not in self._shown_tokens:
            piece = self._stops.push(name, shown=False)
        else:
            piece = self._stops.push(self._visible.push(token))
        self.n_tokens += 1
        return self._show(piece)

    def finish(self) -> str:
        """What was held back: half a character, the beginning of a stop string."""
        if self.stopped:
            return ""
        piece = self._stops.push(self._visible.finish())
        return self._show(piece if self.stopped else piece + self._stops.finish())

    def _show(self, piece: str) -> str:
        if self._exact:
            self._shown.add(piece)
        return piece

    def _end_run(self, special: str) -> None:
        """Ordinary text ends, and a special token follows, or nothing."""
        if self._escape:
            self._text.add(self._escape(self._run.text) + special)
        self._run = _Gathered()

    def texts(self) -> tuple[str, str]:
        """(shown, in the cache and escaped)"""
        if self._exact:
            self._run.add(self._exact.finish())
            self._end_run("")
        return self._shown.text, self._text.text
