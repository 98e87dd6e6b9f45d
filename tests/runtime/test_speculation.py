"""Speculative decoding: answers and sessions are, to the bit, what they are without, whatever is drafted."""

import functools
import itertools
import sys

import numpy as np
import pytest

import kvrun
from kvrun import history as history_module
from kvrun import session as session_module
from kvrun import speculation as speculation_module
from kvrun.errors import KvrunError, ModelFileError, OptionError, TokenizerError
from kvrun.history import History
from kvrun.speculation import Gain, ModelDrafter, NgramDrafter
from kvrun.text import transcript as transcript_module
from support.cases import some

HOT = {"temperature": 4.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Tiny models write various tokens then."""
PROMPT = "Once upon a time there was a fox, and the fox was a fox. "
SIZES = {
    "whole": {"ctx": 1000},
    "turned": {"ctx": 132, "window": 0, "sinks": 4},
    "no multiple": {"ctx": 180, "window": 37, "sinks": 7},
}
OPTIONS = {
    "greedy": {"temperature": 0},
    "usual": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "hot": {},
    "penalties": {"repeat_penalty": 1.7, "repeat_last_n": 30},
    "greedy penalties": {"temperature": 0, "repeat_penalty": 1.2},
}


class Always(Gain):
    """As many tokens as there may be."""

    def length(self, kind, most):
        return most

    def took(self, *counts):
        pass


class Oracle:
    """Drafts from the answer as it will be: each token is another with the chance `wrong`, and there may be fewer."""

    chances = (1.0,)

    def __init__(self, text, wrong, seed, vocab_size):
        self.text, self.wrong, self.vocab_size = text, wrong, vocab_size
        self.rng, self.n = np.random.default_rng(seed), 0

    def begin(self, start, tokens):
        self.n = start + len(tokens)

    def add(self, token):
        self.n += 1

    def read(self):
        pass

    def kind(self):
        return 0

    def draft(self, most):
        n = most if self.rng.random() < 0.6 else int(self.rng.integers(0, most + 1))
        known = [*self.text[self.n : self.n + n]]
        return [int(self.rng.integers(self.vocab_size)) if self.rng.random() < self.wrong else t for t in known]


class Recorder(Oracle):
    """Drafts nothing, and keeps the text."""

    def __init__(self):
        super().__init__([], 0, 0, 1)
        self.tokens = []

    def begin(self, start, tokens):
        self.tokens = self.tokens[:start] + list(tokens)

    def add(self, token):
        self.tokens.append(token)

    def kind(self):
        return None


@pytest.fixture
def drafts_by(monkeypatch):
    """drafts_by(drafter): what `spec` "ngram" means from then on, for new sessions, with no thought of what pays."""

    def use(drafter):
        monkeypatch.setattr(session_module, "NgramDrafter", lambda size: drafter)
        monkeypatch.setattr(speculation_module, "Gain", Always)

    return use


@pytest.fixture(scope="module")
def model(family):
    return kvrun.load(family("qwen3", "q4_0"), threads=2)


def run(session, prompt, **options):
    """The text of an answer, and all of a session's counts that are no times."""
    given = {"max_tokens": 120, "ignore_eos": True, "raw": True, "seed": 1, **HOT, **options}
    text = "".join(session.stream(prompt, **given))
    stats = session.stats
    return text, stats.answer_tokens, stats.finish_reason, stats.decode_tokens, stats.evicted_tokens, session.n_tokens


def saved(session, folder):
    """All that a session is, logits and cache included."""
    session.save(folder / "session.kv")
    return (folder / "session.kv").read_bytes()


def recorded(model, drafts_by, prompt, cache=None, **options):
    """The tokens of a text with its answer, and its results."""
    recorder = Recorder()
    drafts_by(recorder)
    session = model.session(**(cache or {}))
    results = run(session, prompt, spec="ngram", **options)
    return recorder.tokens, results, session


# --- the same, whatever is drafted ------------------------------------------------------------------


@pytest.mark.crossed
@pytest.mark.parametrize(
    "fixture", ["multi-head q4_0", "multi-head f32", "gemma3 q8_0", "mistral f32", "mixtral q8_0", "olmo3 q4_0"]
)
@pytest.mark.parametrize("kv", ["f32", "f16", "q8", "q4", "q2"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_any_draft(fixture, kv, size, options, wrong, converted, family, drafts_by, seed, tmp_path):
    """Also at the ends of tiles, in rings that have turned, and with sliding windows."""
    name, type = fixture.split()
    model = kvrun.load(converted(name, type) if name == "multi-head" else family(name, type), threads=2)
    cache, given = {"kv": kv, **SIZES[size]}, OPTIONS[options]
    plain = model.session(**cache)
    expected = run(plain, PROMPT, **given)
    tokens, found, _ = recorded(model, drafts_by, PROMPT, cache, **given)
    assert found == expected
    drafts_by(Oracle(tokens, wrong, seed, model.vocab_size))
    session = model.session(**cache)
    assert run(session, PROMPT, spec="ngram", spec_draft_n_max=15, **given) == expected
    stats = session.stats
    assert stats.drafted_tokens > 50 and 0 <= stats.accepted_tokens <= stats.drafted_tokens
    if wrong == 0:
        assert stats.accepted_tokens == stats.drafted_tokens > 60
    assert saved(session, tmp_path) == saved(plain, tmp_path)
    assert np.array_equal(session.evaluate(), plain.evaluate())
    assert saved(session, tmp_path) == saved(plain, tmp_path)
    assert run(session, "And", max_tokens=20) == run(plain, "And", max_tokens=20)


@pytest.mark.parametrize("kv", some(["f32", "q8", "q4"], ["q4"]))
@pytest.mark.parametrize("size", SIZES)
def test_ngrams(converted, kv, size, tmp_path):
    """Of texts that repeat themselves, and of texts that do not."""
    model, accepted = kvrun.load(converted("grouped-tied", "q4_0"), threads=2), 0
    for number, (options, first) in enumerate(itertools.product(OPTIONS.values(), [PROMPT, "a", "fox " * 40])):
        plain, session = (model.session(kv=kv, **SIZES[size]) for _ in range(2))
        for prompt in (first, " And then", "fox "):
            expected = run(plain, prompt, **{**options, "seed": number})
            assert run(
                session, prompt, spec="ngram", spec_ngram_size_n=1 + number % 3, **{**options, "seed": number}
            ) == (expected)
            accepted += session.stats.accepted_tokens
        assert saved(session, tmp_path) == saved(plain, tmp_path)
    assert accepted > 100


@pytest.mark.parametrize("n_max", [1, 4, 15])
def test_no_draft_is_longer_than_it_may_be(model, drafts_by, n_max, monkeypatch):
    tokens, expected, _ = recorded(model, drafts_by, PROMPT)
    drafts_by(Oracle(tokens, 0, 0, model.vocab_size))
    sizes, session = steps_of(model, monkeypatch), model.session()
    assert run(session, PROMPT, spec="ngram", spec_draft_n_max=n_max) == expected
    assert max(sizes) == n_max + 1


def steps_of(model, monkeypatch):
    """The numbers of tokens of all steps of an answer from now on, as they come."""
    engine, sizes = model.engine, []

    class Watched:
        def __getattr__(self, name):
            return getattr(engine, name)

        def forward(self, tokens, kv, logits="last", decoding=None):
            if decoding:
                sizes.append(len(tokens))
            return engine.forward(tokens, kv, logits, decoding)

    monkeypatch.setattr(model, "engine", Watched())
    return sizes


# --- where answers end ------------------------------------------------------------------------------


def test_a_limit_anywhere(model, drafts_by, tmp_path):
    tokens, _, _ = recorded(model, drafts_by, PROMPT)
    drafts_by(Oracle(tokens, 0, 0, model.vocab_size))
    for limit in range(1, 40):
        plain, session = model.session(kv="q4"), model.session(kv="q4")
        assert run(session, PROMPT, spec="ngram", max_tokens=limit) == run(plain, PROMPT, max_tokens=limit)
        assert saved(session, tmp_path) == saved(plain, tmp_path)


def test_stop_strings_anywhere(model, drafts_by, tmp_path):
    tokens, results, _ = recorded(model, drafts_by, PROMPT)
    drafts_by(Oracle(tokens, 0, 0, model.vocab_size))
    text = results[0]
    for start in range(0, 60, 3):
        stop = text[start : start + 4]
        plain, session = model.session(kv="q4"), model.session(kv="q4")
        expected = run(plain, PROMPT, stop=stop)
        assert expected[2] == "stop"
        assert run(session, PROMPT, stop=stop, spec="ngram") == expected
        assert saved(session, tmp_path) == saved(plain, tmp_path)


@pytest.mark.parametrize("stopped_at", [0, 1, 5, 9, 30])
def test_the_models_stop_token_anywhere(model, drafts_by, stopped_at, tmp_path, monkeypatch):
    """The draft goes on behind it."""
    tokens, _, session = recorded(model, drafts_by, PROMPT)
    answer = tokens[session.n_tokens - 120 :]
    new = next(i for i in range(stopped_at, 120) if answer[i] not in answer[:i])
    monkeypatch.setattr(model, "stop_ids", frozenset({answer[new]}))
    plain, session = model.session(kv="q4"), model.session(kv="q4")
    drafts_by(Oracle(tokens, 0, 0, model.vocab_size))
    expected = run(plain, PROMPT, ignore_eos=False)
    assert expected[1:3] == (new, "stop")
    assert run(session, PROMPT, ignore_eos=False, spec="ngram") == expected
    assert np.array_equal(session.logits, plain.logits)
    assert saved(session, tmp_path) == saved(plain, tmp_path)


def test_learned_positions_are_used_to_the_last(family, drafts_by, tmp_path):
    model = kvrun.load(family("gpt2"))
    plain, recorder = model.session(), Recorder()
    with pytest.raises(KvrunError) as expected:
        run(plain, [5] * 100, max_tokens=-1)
    drafts_by(recorder)
    with pytest.raises(KvrunError):
        run(model.session(), [5] * 100, max_tokens=-1, spec="ngram")
    drafts_by(Oracle([*recorder.tokens, *[7] * 20], 0, 0, model.vocab_size))
    session = model.session()
    with pytest.raises(KvrunError) as error:
        run(session, [5] * 100, max_tokens=-1, spec="ngram")
    assert str(error.value) == str(expected.value) and session.stats.accepted_tokens > 50
    assert saved(session, tmp_path) == saved(plain, tmp_path)


# --- interruptions and errors -----------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [3, 5, 8])
def test_a_stream_that_is_closed(model, drafts_by, pieces, tmp_path):
    """What was shown stays, as without."""
    tokens, _, _ = recorded(model, drafts_by, PROMPT)
    drafts_by(Oracle(tokens, 0.1, 0, model.vocab_size))
    plain, session = model.session(kv="q4"), model.session(kv="q4")
    stream = session.stream(PROMPT, max_tokens=120, ignore_eos=True, raw=True, seed=1, **HOT, spec="ngram")
    text = "".join(itertools.islice(stream, pieces))
    stream.close()
    assert run(plain, PROMPT, max_tokens=session.stats.answer_tokens)[0].startswith(text)
    assert session.stats.accepted_tokens and session.stats.answer_tokens > pieces
    assert saved(session, tmp_path) == saved(plain, tmp_path)


def test_evaluate_between_two_pieces(model, drafts_by):
    tokens, expected, _ = recorded(model, drafts_by, PROMPT)
    drafts_by(Oracle(tokens, 0.1, 0, model.vocab_size))
    session, text = model.session(), ""
    for piece in session.stream(PROMPT, max_tokens=120, ignore_eos=True, raw=True, seed=1, **HOT, spec="ngram"):
        text += piece
        if len(text) % 3:
            assert session.evaluate().shape == (model.vocab_size,)
    assert text == expected[0] and session.stats.accepted_tokens


class Traced:
    """Runs something, with Ctrl-C after so many steps of the interpreter in the session's own code."""

    FILES = tuple(m.__file__ for m in (session_module, transcript_module, history_module, speculation_module))

    def __init__(self, step):
        self.left = step

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in self.FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def run(self, function):
        """Whether it came to that."""
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False


def exact_logits(session, tokens, written):
    """Logits after tokens of which those in [start, end) are written, and all others read."""
    engine, options, (start, end) = session.model.engine, session.cache, written
    kv = engine.new_cache(k=options.k, v=options.v, ctx=options.ctx, sinks=options.sinks, window=options.window)
    logits = engine.forward(tokens[:start], kv, decoding=False)
    for n, token in enumerate(tokens[start:], start):
        logits = engine.forward([token], kv, decoding=n < end)
    return logits


@pytest.mark.parametrize("drafter", ["oracle", "model"])
def test_ctrl_c_anywhere(model, drafter, drafts_by, monkeypatch):
    """Leaves a part of the answer, and a cache that holds it and nothing else."""
    tokens, expected, _ = recorded(model, drafts_by, PROMPT, max_tokens=12)
    begun, steps, lengths, came = expected[-1] - 12, 0, set(), True
    kept = model.session(kv="q4")
    while came:
        steps += 29
        drafts_by(Oracle(tokens, 0.2, steps, model.vocab_size))
        # One for all with a draft model, whose cache goes on with what is left in it.
        session, spec = (model.session(kv="q4"), "ngram") if drafter == "oracle" else (kept, model)
        session.reset()
        answer = functools.partial(run, session, PROMPT, max_tokens=12, spec=spec, spec_draft_n_max=4)
        came = Traced(steps).run(answer)
        n = session.n_tokens
        if n >= begun:
            lengths.add(n - begun)
            run(session, [5], max_tokens=0)
            assert session.n_tokens == n + 1
            assert np.array_equal(session.logits, exact_logits(session, [*tokens[:n], 5], (begun, n)))
    assert len(lengths) > 4 and max(lengths) == 12 and steps > 1000


def test_ctrl_c_twice(model, drafts_by, monkeypatch):
    """After a step with a draft, and again while the draft is taken back: the next call does it."""
    tokens, expected, _ = recorded(model, drafts_by, PROMPT)
    drafts_by(Oracle(tokens, 1.0, 0, model.vocab_size))
    engine, begun, interrupted = model.engine, expected[-1] - 120, []

    class Interrupted:
        def __getattr__(self, name):
            return getattr(engine, name)

        def forward(self, tokens, kv, logits="last", decoding=None):
            out = engine.forward(tokens, kv, logits, decoding)
            if logits == "all" and not interrupted:
                interrupted.append(kv)
                raise KeyboardInterrupt
            return out

    def again(*_):
        raise KeyboardInterrupt

    session = model.session()
    with monkeypatch.context() as patched:
        patched.setattr(model, "engine", Interrupted())
        patched.setattr(History, "go_back", again)
        with pytest.raises(KeyboardInterrupt):
            run(session, PROMPT, spec="ngram")
    n = session.n_tokens
    assert begun < n < interrupted[0].n_tokens
    with pytest.raises(KvrunError, match="no logits"):
        _ = session.logits
    run(session, [5], max_tokens=0)
    assert np.array_equal(session.logits, exact_logits(session, [*tokens[:n], 5], (begun, n)))


@pytest.fixture
def failing(model, monkeypatch):
    """failing(fault): before each step of an answer fault(number of tokens) may raise."""
    engine = model.engine

    class Failing:
        def __init__(self, fault):
            self.fault = fault

        def __getattr__(self, name):
            return getattr(engine, name)

        def forward(self, tokens, kv, logits="last", decoding=None):
            if decoding:
                self.fault(len(tokens))
            return engine.forward(tokens, kv, logits, decoding)

    return lambda fault: monkeypatch.setattr(model, "engine", Failing(fault))


def test_memory_for_one_token_alone(model, drafts_by, failing, tmp_path):
    """Then the answer is made without drafts."""

    def fault(n):
        if n > 1:
            raise MemoryError

    tokens, expected, plain = recorded(model, drafts_by, PROMPT)
    drafts_by(Oracle(tokens, 0, 0, model.vocab_size))
    session = model.session()
    failing(fault)
    assert run(session, PROMPT, spec="ngram") == expected
    assert session.stats.drafted_tokens == 0
    assert saved(session, tmp_path) == saved(plain, tmp_path)


@pytest.mark.parametrize("kind", [MemoryError, ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_a_step(model, drafts_by, failing, kind, tmp_path):
    tokens, expected, _ = recorded(model, drafts_by, PROMPT)
    left = [5]

    def fault(n):
        left[0] -= 1
        if left[0] <= 0:
            raise kind

    drafts_by(Oracle(tokens, 0, 0, model.vocab_size))
    session, shown = model.session(kv="q4"), ""
    failing(fault)
    with pytest.raises(KvrunError if kind is MemoryError else kind):
        for piece in session.stream(PROMPT, max_tokens=120, ignore_eos=True, raw=True, seed=1, **HOT, spec="ngram"):
            shown += piece
    left[0] = 10**6
    assert expected[0].startswith(shown) and session.stats.accepted_tokens
    n, begun = session.n_tokens, expected[-1] - 120
    assert n == begun + session.stats.answer_tokens
    assert np.array_equal(session.evaluate(), exact_logits(session, tokens[:n], (begun, n)))


@pytest.mark.parametrize("place", [17, 19, 21, 23])
def test_logits_that_are_no_numbers(model, drafts_by, place, monkeypatch, tmp_path):
    """In the middle of a draft: the same error after the same text."""
    tokens, _, _ = recorded(model, drafts_by, PROMPT)
    engine, bad = model.engine, len(model.tokenize(PROMPT)) + place

    class Damaged:
        def __getattr__(self, name):
            return getattr(engine, name)

        def forward(self, tokens, kv, logits="last", decoding=None):
            first = kv.n_tokens
            out = engine.forward(tokens, kv, logits, decoding)
            if first < bad <= first + len(tokens):
                out[(bad - first - 1,) if logits == "all" else ...] = np.nan
            return out

    monkeypatch.setattr(model, "engine", Damaged())
    results = []
    for spec in (None, "ngram"):
        drafts_by(Oracle(tokens, 0, 0, model.vocab_size))
        session = model.session()
        with pytest.raises(KvrunError, match="not finite") as error:
            run(session, PROMPT, spec=spec)
        assert np.isnan(session.logits).all()
        results.append((str(error.value), session.n_tokens, saved(session, tmp_path)))
    assert results[0] == results[1] and session.stats.drafted_tokens


# --- a model that drafts ----------------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(speculation_module, "Gain", Always)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_draft_model(converted, eager, size, options, tmp_path):
    """Conversations that go on, are edited and cut: its cache follows."""
    model, draft = (kvrun.load(converted("grouped-tied", type)) for type in ("f32", "q8_0"))
    plain, session = (model.session(kv="q8", **SIZES[size]) for _ in range(2))
    given = {"raw": False, "max_tokens": 50, **OPTIONS[options]}
    told = [{"role": "user", "content": "The cat"}]
    for step, prompt in enumerate(["Hello", told, "And then?", [*told, {"role": "assistant", "content": "a"}, *told]]):
        assert run(session, prompt, spec=draft, **given) == run(plain, prompt, **given)
        assert session.stats.drafted_tokens > 20
        if step == 2 and size == "whole":
            session.truncate(session.n_tokens - 30)
            plain.truncate(plain.n_tokens - 30)
    assert saved(session, tmp_path) == saved(plain, tmp_path)


def test_the_same_model_drafts_what_is_likeliest(converted, eager):
    """So all of it is right where the likeliest is taken, also after a turn that takes another one's place."""
    model = kvrun.load(converted("grouped-tied"))
    session = model.session(kv="f32")
    for prompt in ("Hello", "And then?", [{"role": "user", "content": "Hello you"}], "More"):
        run(session, prompt, raw=False, temperature=0, max_tokens=90, spec=model)
        assert session.stats.accepted_tokens == session.stats.drafted_tokens > 60


def test_a_draft_model_by_its_path(converted, eager, monkeypatch):
    model, path = kvrun.load(converted("grouped-tied")), converted("grouped-tied", "q8_0")
    loaded = []
    monkeypatch.setattr(kvrun.model, "load", lambda *a, **b: loaded.append(kvrun.load(*a, **b)) or loaded[-1])
    expected = model.generate("Hello", seed=1, max_tokens=30, ignore_eos=True)
    for spec in (path, str(path), path, loaded):
        text = model.generate(
            "Hello", seed=1, max_tokens=30, ignore_eos=True, spec=spec if spec is not loaded else loaded[0]
        )
        assert text == expected
    assert len(loaded) == 1


def test_models_that_cannot_draft(converted, family, tmp_path):
    model = kvrun.load(converted("grouped-tied"))
    session = model.session()
    other = converted("wide")
    with pytest.raises(OptionError, match=f"^spec: {other} has other tokens than .*, number [0-9]+ is the first"):
        session.stream("a", spec=other)
    with pytest.raises(OptionError, match="other tokens"):
        session.stream("a", spec=kvrun.load(family("qwen3")))
    (tmp_path / "x.bin").write_bytes(b"no model")
    for path in (tmp_path / "x.bin", tmp_path / "nowhere", tmp_path):
        with pytest.raises((ModelFileError, OptionError), match=str(path)):
            session.stream("a", spec=path)
    with pytest.raises(OptionError, match='^spec: must be "ngram", a model, or the path of one, not 5'):
        session.stream("a", spec=5)
    assert session.n_tokens == 0 and run(session, "a", max_tokens=3)[1] == 3


def test_a_model_without_a_tokenizer(converted, source, tmp_path):
    kvrun.convert.convert(source("grouped-tied"), tmp_path / "draft.bin", "f32", tokenizer=False)
    with pytest.raises(TokenizerError, match="without a tokenizer"):
        kvrun.load(converted("grouped-tied")).session().stream("a", spec=tmp_path / "draft.bin")


@pytest.mark.parametrize("kv", ["f32", "q4"])
def test_a_draft_models_cache_follows_its_text(converted, kv, rng):
    """Whatever of the text is taken back or replaced, it drafts what a new one would."""
    model = kvrun.load(converted("grouped-tied"))

    def drafter():
        return ModelDrafter(model, model.engine.new_cache(k=kv, v=kv, ctx=4000), model.vocab_size)

    ours, text, same, tried = drafter(), [1], 0, 0
    ours.begin(0, text)
    for _ in range(60):
        what = rng.random()
        if what < 0.6:
            drafted = ours.draft(int(rng.integers(1, 9)))
            right = int(rng.integers(0, len(drafted) + 1))
            for token in [*drafted[:right], int(rng.integers(300))]:
                ours.add(token)
                text.append(token)
        elif what < 0.8:
            for token in rng.integers(0, 300, 5).tolist():
                ours.add(token)
                text.append(token)
        else:
            cut = int(rng.integers(1, len(text) + 1))
            text = text[:cut] + rng.integers(0, 300, int(rng.integers(1, 30))).tolist()
            ours.begin(0, text)
        new = drafter()
        new.begin(0, text)
        tried, same = tried + 1, same + (ours.draft(4) == new.draft(4))
    assert same == tried if kv == "f32" else same > 0.7 * tried  # q4: what is taken back may be rounded twice


def test_tokens_that_a_draft_model_does_not_have(converted):
    model = kvrun.load(converted("grouped-tied"))
    drafter = ModelDrafter(model, model.engine.new_cache(ctx=400), 20)
    drafter.begin(0, [1, 2, 3])
    assert all(token < 20 for _ in range(3) for token in drafter.draft(8))
    drafter.add(model.vocab_size + 3)
    assert drafter.kind() is None
    drafter.begin(0, [1, 2, 3])
    assert drafter.kind() == 0


# --- n-grams ----------------------------------------------------------------------------------------


def brute(tokens, size):
    """Where a text went on before: of the places with most in common with its end, up to 4 sizes, the newest."""
    best = (0, 0)
    for place in range(len(tokens) - 1, 0, -1):
        common = 0
        while common < min(place, 4 * size) and tokens[place - 1 - common] == tokens[-1 - common]:
            common += 1
        if common >= size and common > best[1]:
            best = place, common
    return best


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ngrams_are_found(size, rng, monkeypatch):
    monkeypatch.setattr(speculation_module, "PLACES", 10**6)
    for letters in (2, 5):
        drafter, text = NgramDrafter(size), []
        drafter.begin(0, text)
        for token in rng.integers(0, letters, 300).tolist():
            drafter.add(token)
            text.append(token)
            place, common = brute(text, size)
            kind = drafter.kind()
            assert kind == (None if not place else (common >= 2 * size) + (common >= 4 * size))
            if place:
                expected = list(text)
                for i in range(9):  # beyond the end it repeats itself
                    expected.append(expected[place + i])
                assert drafter.draft(9) == expected[len(text) :]


def test_an_ngram_drafter_follows_its_text(rng):
    drafter, text = NgramDrafter(2), []
    for _ in range(100):
        cut = int(rng.integers(0, len(text) + 1))
        text = text[:cut] + rng.integers(0, 3, int(rng.integers(1, 20))).tolist()
        drafter.begin(0, text)
        new = NgramDrafter(2)
        new.begin(0, text)
        assert drafter.kind() == new.kind() and (new.kind() is None or drafter.draft(5) == new.draft(5))


def test_of_a_text_whose_beginning_is_not_known_any_more_more_is_remembered():
    drafter = NgramDrafter(2)
    drafter.begin(0, [1, 2, 3, 4, 5, 6, 7, 8])
    drafter.begin(5, [6, 7, 8, 9, 1, 2])
    assert drafter.kind() == 0 and drafter.draft(3) == [3, 4, 5]
    drafter.begin(5, [6, 7, 0, 2, 3])
    assert drafter.kind() == 0 and drafter.draft(2) == [4, 5]
    drafter.begin(50, [2, 3])
    assert drafter.kind() is None


def test_an_endless_text_does_not_fill_the_memory(monkeypatch, rng):
    monkeypatch.setattr(speculation_module, "REMEMBERED", 50)
    drafter = NgramDrafter(1)
    drafter.begin(0, [])
    for token in range(100_000, 100_400):
        drafter.add(token)
        assert drafter.kind() is None
    drafter.add(100_395)
    assert drafter.kind() == 0 and drafter.draft(2) == [100_396, 100_397]
    drafter.add(100_005)
    assert drafter.kind() is None


# --- what pays --------------------------------------------------------------------------------------


def played(gain, right, cost, n=2000, most=8, noise=None, drafting=0.0):
    """Steps of one token that a text of n tokens takes, when drafted tokens are right with a chance and each further
    token of a step takes `cost`; and drafted tokens."""
    rng, seconds, written, drafted = np.random.default_rng(0), 0.0, 0, 0
    while written < n:
        length = gain.length(0, most)
        came = 0
        while came < length and rng.random() < right(written):
            came += 1
        step = 1 + cost * length
        seconds, written, drafted = seconds + step + drafting * length, written + 1 + came, drafted + length
        measured = step * (noise(rng) if noise else 1)
        if length:
            gain.took(0, length, came, measured, drafting * length)
        else:
            gain.single(measured)
    return seconds, drafted


def noisy(rng):
    """How many times as long as it should a step takes on a busy machine."""
    return rng.lognormal(0, 0.2) * (8 if rng.random() < 0.05 else 1)


@pytest.mark.parametrize("cost", [0.02, 0.15, 0.6, 1.2])
@pytest.mark.parametrize("right", [0.0, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("drafting", [0.0, 0.3])
@pytest.mark.parametrize("noise", [None, noisy])
def test_drafts_cost_little_where_they_do_not_pay(cost, right, drafting, noise):
    seconds, _ = played(Gain((0.7,)), lambda _: right, cost, drafting=drafting, noise=noise)
    assert seconds < 2000 * 1.03 + 5


@pytest.mark.parametrize("noise", [None, noisy])
def test_drafts_are_long_where_they_pay(noise):
    seconds, drafted = played(Gain((0.5,)), lambda _: 0.97, 0.15, noise=noise)
    assert seconds < 2000 / 2.5 and drafted > 1000


def test_a_text_that_changes():
    """After a thousand tokens of nothing, drafts are right; they are found to be."""
    gain = Gain((0.5,))
    before, _ = played(gain, lambda _: 0.0, 0.15, n=1000)
    after, drafted = played(gain, lambda _: 1.0, 0.15, n=1000)
    assert before < 1020 and after < 600 and drafted > 400
    again, _ = played(gain, lambda _: 0.0, 0.15, n=1000)
    assert again < 1040


def test_nothing_is_drafted_before_it_is_known_how_long_a_step_takes():
    gain = Gain((0.9,))
    assert [gain.length(0, 8), gain.single(1), gain.single(1), gain.single(1)][0] == 0 and gain.length(0, 8) == 8


# --- elsewhere --------------------------------------------------------------------------------------


def test_a_fork_drafts_for_itself(model, drafts_by):
    tokens, _, _ = recorded(model, drafts_by, PROMPT)
    drafts_by(Oracle(tokens, 0.1, 0, model.vocab_size))
    session = model.session()
    run(session, PROMPT, spec="ngram", max_tokens=40)
    fork = session.fork()
    a, b = (one.stream([], max_tokens=30, ignore_eos=True, seed=4, spec="ngram") for one in (session, fork))
    both = ["".join(part) for part in zip(*zip(a, b, strict=True), strict=True)]
    assert both[0] == both[1]


def test_one_request_drafts_and_several_do_not(model, drafts_by, monkeypatch):
    options = dict(max_tokens=60, ignore_eos=True, seed=1, raw=True, **HOT)
    tokens, expected, _ = recorded(model, drafts_by, PROMPT, max_tokens=60)
    drafts_by(Oracle(tokens, 0, 0, model.vocab_size))
    engine, steps = model.engine, []

    class Watched:
        def __getattr__(self, name):
            return getattr(engine, name)

        def step(self, items):
            steps.append([len(item.tokens) if item.decoding else 0 for item in items])
            return engine.step(items)

    monkeypatch.setattr(model, "engine", Watched())
    with model.scheduler(2) as several:
        alone = several.submit(PROMPT, spec="ngram", **options).result(60)
        assert alone.text == expected[0] and alone.stats.accepted_tokens == alone.stats.drafted_tokens > 30
        assert any(step == [9] for step in steps)
        steps.clear()
        both = [several.submit(prompt, spec="ngram", **options) for prompt in (PROMPT, PROMPT)]
        assert [request.result(60).text for request in both] == [expected[0]] * 2
    together = [step for step in steps if len(step) == 2 and min(step)]
    assert together and all(step == [1, 1] for step in together)


def test_engines_without_such_steps(model, monkeypatch):
    class Single:
        max_written = 1

    session = model.session()
    monkeypatch.setattr(model, "engine", Single())
    with pytest.raises(OptionError, match="^spec: a GPU computes"):
        session.stream("a", spec="ngram")
