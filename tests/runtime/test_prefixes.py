"""What requests have in common is read once: answers are those of sessions alone, to the bit, whatever ran before."""

import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvrun
from kvrun import _core, history, prefix_store, scheduler
from kvrun.errors import OptionError
from kvrun.files.model_file import read_model_file
from kvrun.model import Model
from kvrun.prefix_store import common
from support.cases import examples
from support.recorder import Gate, Recorder

WAIT = 60
FORMATS = list(_core.KV_FORMATS)
WORDS = "once upon a time there was some cat in the hat who said that dogs are not all there is to it".split()


def windowed(file, *windows):
    file.description = replace(file.description, sliding_windows=windows)
    return file


@pytest.fixture(scope="module")
def model(converted, request):
    """Tiny, with a chat template: plain weights, weights whose prompts are read less precisely, sliding windows."""
    file = read_model_file(converted("grouped-tied", "q8_0" if request.param == "block" else "f32"))
    if request.param == "sliding":
        file = windowed(file, 40, None)
    if request.param == "sliding-all":
        file = windowed(file, 100, 200)
    return Model(file, 2)


@pytest.fixture(scope="module")
def block(converted):
    return kvrun.load(converted("grouped-tied", "q8_0"), threads=2)


@pytest.fixture
def recorder(block, monkeypatch):
    """The engine of `block` meanwhile."""
    found = Recorder(block.engine)
    monkeypatch.setattr(block, "engine", found)
    return found


def said(rng, words):
    return " ".join(rng.choice(WORDS, words))


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def options(number=0, tokens=12):
    return {"max_tokens": tokens, "ignore_eos": True, "seed": number, "temperature": 1}


def alone(model, cache, prompt, given):
    """(the text, the tokens of the prompt) of a session that did nothing else."""
    session = model.session(**cache)
    text = "".join(session.stream(prompt, **given))
    return text, session.stats.prompt_tokens


def ids_of(model, prompt, **given):
    """The tokens of a prompt."""
    session = model.session(ctx=4096)
    session.steps(prompt, max_tokens=0, **given).close()
    return np.array(session.prompt_ids, np.int32)


def answered(several, prompt, given):
    return several.submit(prompt, **given).result(WAIT)


# --- the same answers -------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["chat", "chat", "raw", "ids", "same"]),
        st.integers(0, 20),  # which of those before it goes on from, and how much of it is kept
        st.sampled_from([5, 5, 0, 1, 2, 4]),
        st.sampled_from([10, 40, 1, 130, 300]),  # words that come next
        st.sampled_from([20, 90, 0, 1]),  # tokens of the answer
        st.sampled_from(["wait", "wait", "go on", "cancel"]),
    ),
    min_size=5,
    max_size=9,
)


def prompt_of(model, rng, kind, which, kept, words, before):
    """(kind, prompt), which goes on from one before it and its answer, or from where some of it is cut off. before:
    of (kind, prompt, request)."""
    alike = [(prompt, request) for other, prompt, request in before if kind in (other, "same")]
    if kind == "same" and before:
        return before[which % len(before)][:2]
    kind = "chat" if kind == "same" else kind
    base, request = alike[which % len(alike)] if alike else ([], None)
    answer = request.result().text if request is not None and request.done and kept == 5 else ""
    if kind == "chat":
        told = list(base if kept == 5 else base[: 2 * (kept // 2) + 1]) or [system(said(rng, 60))]
        if told[-1]["role"] == "user":
            told.append({"role": "assistant", "content": answer or said(rng, 15)})
        return kind, [*told, user(said(rng, words))]
    if kind == "raw":
        return kind, f"{(base or '')[: len(base) * kept // 5]}{answer} {said(rng, words)}"
    written = model.tokenize(answer, add_special=False)
    return kind, [*base[: len(base) * kept // 5], *written, *rng.integers(5, 100, words).tolist()]


def run_random(model, recorder, cache, parallel, prefix_bytes, requests, seed):
    rng, before, done = np.random.default_rng(seed), [], []
    with model.scheduler(parallel, prefix_bytes=prefix_bytes, **cache) as several:
        for kind, which, kept, words, tokens, then in requests:
            kind, prompt = prompt_of(model, rng, kind, which, kept, words, before)
            given = {**options(len(before), tokens), "raw": kind == "raw"}
            request = several.submit(prompt, **given)
            before.append((kind, prompt, request))
            if then == "cancel":
                next(iter(request), None)
                request.cancel()
            elif then == "wait":
                request.result(WAIT)
            done.append((request, then, prompt, given))
        results = [request.result(WAIT) for request, *_ in done]
    found, recorder.logits = recorder.logits, set()
    for result, (_, then, prompt, given) in zip(results, done):
        text, fed = alone(model, cache, prompt, given)
        assert result.text == text if then != "cancel" else text.startswith(result.text)
        if then != "cancel":
            assert result.stats.prompt_tokens + result.stats.cached_tokens == fed
            assert recorder.logits <= found  # of each token of the answer, to the last
        recorder.logits = set()


@pytest.mark.crossed
@pytest.mark.parametrize("model", ["plain", "block", "sliding", "sliding-all"], indirect=True)
@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("ctx, window", [(2048, 64), (300, 32)])
@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("prefix_bytes", [1 << 30, 1_000_000])
def test_random_requests(model, kv, ctx, window, parallel, prefix_bytes, monkeypatch):
    """Conversations and texts that branch from each other, also such that outgrow the cache."""
    recorder = Recorder(model.engine)
    monkeypatch.setattr(model, "engine", recorder)
    cache = {"kv": kv, "ctx": ctx, "window": window}

    @settings(max_examples=examples(20), database=None)
    @given(requests=REQUESTS, seed=st.integers(0, 1000), piece=st.sampled_from([8, 40, 5000]))
    def check(requests, seed, piece):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduler._Piece, "tokens", piece)
            run_random(model, recorder, cache, parallel, prefix_bytes, requests, seed)

    check()


@pytest.mark.parametrize("kv", FORMATS)
def test_a_fork_is_a_cache_that_was_fed_anew(block, kv, rng):
    """To the last byte of its memory: nothing of the text that it was forked from is left in it."""
    told = [system(said(rng, 200)), user("the secret " * 40)]
    session = block.session(kv=kv, ctx=2048)
    session.places = [n := len(ids_of(block, [told[0], user("")])) - 20]
    for piece in session.stream(told, **options(1, 200)):
        assert piece is not None
    fork = session.prefix().fork(n)
    fresh = block.session(kv=kv, ctx=2048)
    for _ in fresh.stream(fork.tokens, max_tokens=0):
        pass
    assert len(fork) == n
    assert fork.cache.state().tobytes() == fresh.prefix().cache.state().tobytes()
    assert not fork.history.written and fork.history.places == (n,)


# --- what is fed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("words", [20, 350])
def test_a_second_chat_with_the_same_system_prompt(block, kv, words, rng):
    """Reads its own question alone, whatever the first has written."""
    begun = [system(said(rng, words))]
    prompts = [[*begun, user(question)] for question in ("one " * 30, "two " * 9, "and three")]
    shared = common(*(ids_of(block, prompt) for prompt in prompts[:2]))
    with block.scheduler(2, kv=kv, ctx=2048) as several:
        stats = [answered(several, prompt, options(tokens=150)).stats for prompt in prompts]
    assert [one.cached_tokens for one in stats] == [0, shared, shared]
    assert stats[1].prompt_tokens == len(ids_of(block, prompts[1])) - shared


@pytest.mark.parametrize("kv", FORMATS)
def test_the_next_turn_of_a_chat(block, kv, rng):
    """Reads the answer before it and its question."""
    told = [system(said(rng, 100)), user(said(rng, 40))]
    with block.scheduler(2, kv=kv, ctx=2048) as several:
        for _ in range(4):
            n = len(ids_of(block, told))
            result = answered(several, told, options(tokens=70))
            told = [*told, {"role": "assistant", "content": result.text}, user(said(rng, 10))]
            expected = common(ids_of(block, told), ids_of(block, told[:-2]))
            assert expected >= n - 1
            assert answered(several, told, options()).stats.cached_tokens == expected
        stats = several.stats()
    assert stats.prefixes == 1  # each turn has all that those before it had


@pytest.mark.parametrize("kv", FORMATS)
def test_what_texts_have_in_common_is_found_out(block, kv, rng):
    """The second goes back to where the first can; the third begins where they differ."""
    ids = rng.integers(5, 200, 700).tolist()
    prompts = [[*ids, 3, number, *ids[: 20 * number]] for number in (5, 6, 7)]
    with block.scheduler(1, kv=kv, ctx=2048) as several:
        cached = [answered(several, prompt, options()).stats.cached_tokens for prompt in prompts]
    assert cached[0] == 0 and cached[2] == 701
    assert cached[1] == 701 if kv in ("f32", "f16") else 500 <= cached[1] <= 701


@pytest.mark.parametrize("kv", FORMATS)
def test_requests_that_come_together_read_it_once(block, kv, rng):
    examples_text = said(rng, 300)
    prompts = [f"{examples_text} {word} {said(rng, 5 + 9 * i)}" for i, word in enumerate(WORDS[:6])]
    ids = [ids_of(block, prompt, raw=True) for prompt in prompts]
    results = block.generate_many(prompts, parallel=6, kv=kv, ctx=2048, raw=True, **options())
    shared = [max(common(ids[i], ids[k]) for k in range(i)) if i else 0 for i in range(6)]
    assert [result.stats.cached_tokens for result in results] == shared
    assert [result.text for result in results] == [
        alone(block, {"kv": kv, "ctx": 2048}, prompt, {**options(), "raw": True})[0] for prompt in prompts
    ]


def test_the_same_prompt_many_times(block, rng):
    prompt = said(rng, 150)
    n = len(ids_of(block, prompt))
    results = block.generate_many([prompt] * 5, parallel=3, kv="q4", ctx=2048, **options())
    assert [result.stats.cached_tokens for result in results] == [0] + 4 * [n - 1]
    assert len({result.text for result in results}) == 1


def test_a_request_that_is_running_shares_what_it_has_read(block, rng):
    begun = [system(said(rng, 200))]
    prompts = [[*begun, user(question)] for question in ("one", "two")]
    with block.scheduler(2, kv="q4", ctx=2048) as several:
        first = several.submit(prompts[0], ignore_eos=True, seed=1)
        next(iter(first))
        second = answered(several, prompts[1], options())
        assert not first.done and several.stats().prefixes == 1  # of the second
        first.cancel()
    assert second.stats.cached_tokens == common(*(ids_of(block, prompt) for prompt in prompts))
    assert second.text == alone(block, {"kv": "q4", "ctx": 2048}, prompts[1], options())[0]


def test_what_was_written_is_read_again(block, rng):
    """The tokens of an answer as text that goes on are not those that were written, though they are the same."""
    with block.scheduler(1, kv="q4", ctx=2048) as several:
        ids = rng.integers(5, 200, 40).tolist()
        text = answered(several, ids, options(tokens=60)).text
        longer = [*ids, *block.tokenize(text, add_special=False)]
        found = answered(several, longer, options(2))
    assert found.stats.cached_tokens == 40
    assert found.text == alone(block, {"kv": "q4", "ctx": 2048}, longer, options(2))[0]


def test_nothing_is_shared_without_a_store(block, rng):
    begun = said(rng, 100)
    prompts = [f"{begun} {i}" for i in range(3)]
    with block.scheduler(3, prefix_bytes=0, kv="q4", ctx=2048) as several:
        for prompt in [*prompts, *prompts]:
            assert answered(several, prompt, options()).stats.cached_tokens == 0
        stats = several.stats()
    assert (stats.prefixes, stats.prefix_bytes, stats.prefix_hits, stats.cached_tokens) == (0, 0, 0, 0)


def test_a_text_that_outgrows_its_cache_is_not_kept(block, rng):
    cache = {"kv": "q4", "ctx": 200, "window": 32}
    short, long = said(rng, 30), said(rng, 300)
    with block.scheduler(1, **cache) as several:
        assert answered(several, long, options()).stats.cached_tokens == 0
        assert answered(several, short, options(tokens=300)).stats.cached_tokens == 0
        assert several.stats().prefixes == 0
        kept = answered(several, short, options())
        again = answered(several, short, options(tokens=300))
        assert again.stats.cached_tokens > 0 and several.stats().prefixes == 1
    assert kept.text == alone(block, cache, short, options())[0]
    assert again.text == alone(block, cache, short, options(tokens=300))[0]


# --- what is kept -------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(block, rng):
    prompts, given = [rng.integers(5, 200, 300).tolist() for _ in range(4)], options()
    with block.scheduler(1, kv="q8", ctx=512) as several:
        answered(several, prompts[0], given)
        size = several.stats().prefix_bytes
    with block.scheduler(1, prefix_bytes=3 * size + size // 2, kv="q8", ctx=512) as several:

        def cached(number):
            before = several.stats()
            stats = answered(several, prompts[number], given).stats
            after = several.stats()
            assert after.prefix_bytes <= 3 * size + size // 2
            assert after.prefix_hits - before.prefix_hits == (stats.cached_tokens > 0)
            return stats.cached_tokens > 0

        assert [cached(i) for i in (0, 1, 2, 0, 3)] == [False, False, False, True, False]  # 1 has gone
        assert [cached(i) for i in (0, 2, 3)] == [True, True, True]
        assert not cached(1)  # and 0 has
        assert [cached(i) for i in (2, 3, 1)] == [True, True, True] and several.stats().prefixes == 3


def test_a_text_that_is_too_large_drives_out_no_other(block, rng):
    small, large = said(rng, 60), said(rng, 400)
    with block.scheduler(1, kv="q8", ctx=2048) as several:
        answered(several, small, options())
        size = several.stats().prefix_bytes
    with block.scheduler(1, prefix_bytes=2 * size, kv="q8", ctx=2048) as several:
        for prompt in (small, large):
            answered(several, prompt, options())
        assert (several.stats().prefixes, several.stats().prefix_bytes) == (1, size)
        assert answered(several, small, options()).stats.cached_tokens > 0


def test_bytes_are_those_of_caches_and_snapshots(block, rng):
    store = prefix_store.PrefixStore(block.engine, 1 << 30)
    session = block.session(kv="q4", ctx=2048)
    for _ in session.stream(said(rng, 500), max_tokens=100, seed=1, ignore_eos=True):
        pass
    prefix = session.prefix()
    session.renew()
    assert store.wants(prefix)
    store.add(prefix)
    snapshots = list(prefix.history.snapshots)
    assert snapshots and store.nbytes == len(prefix.cache.state()) + sum(one.nbytes for one in snapshots)
    fork = prefix.fork(len(prefix) - 3)
    assert not store.wants(fork)
    fork.tokens[-1] += 1
    store.add(fork)
    assert {id(one) for one in fork.history.snapshots} <= {id(one) for one in snapshots}
    held = block.engine.bytes_held([prefix.cache, fork.cache])
    assert store.nbytes == held + sum(one.nbytes for one in snapshots)
    assert store.clear() and store.nbytes == len(store) == 0 and not store.clear()


def test_places_that_others_come_back_to_outlive_the_others(block, rng, monkeypatch):
    ids = rng.integers(5, 200, 3000)
    session = block.session(kv="q4", ctx=8192)
    snapshot = None
    for places in ((), (70, 1000)):
        session.reset()
        session.places = places
        for _ in session.stream(ids, max_tokens=0):
            pass
        kept = session.prefix()
        snapshot = snapshot or next(kept.history.snapshots)
        assert kept.history.places == places
        monkeypatch.setattr(history, "SHARE", 1 << 30)
        monkeypatch.setattr(history, "LEAST", 3 * snapshot.nbytes + snapshot.nbytes // 2)
    assert len(list(kept.history.snapshots)) == 3
    assert [kept.place(n) for n in (70, 1000)] == [70, 1000] and kept.place(999) >= 900


def test_options(block):
    for bad in (-1, 1.5, "many"):
        with pytest.raises(OptionError, match="prefix_bytes"):
            block.scheduler(prefix_bytes=bad)
    with block.scheduler(2, ctx=512) as several:
        stats = several.stats()
    assert stats == kvrun.SchedulerStats(0, 0, 0, 0, 0, 0, 0, 0, 0, ())


def test_what_a_scheduler_says_of_itself(block, rng):
    with block.scheduler(2, kv="q4", ctx=512) as several:
        requests = [several.submit(said(rng, 30), ignore_eos=True, seed=i) for i in range(4)]
        for request in requests[:2]:
            next(iter(request))
        stats = several.stats()
        assert (stats.running, stats.waiting, stats.ended) == (2, 2, 0)
        assert stats.requests == tuple(request.stats for request in requests[:2])
        assert stats.answer_tokens >= 2 and stats.prompt_tokens > 0
        for request in requests:
            request.cancel()
    stats, ended = several.stats(), [request.stats for request in requests]
    assert (stats.running, stats.waiting, stats.ended, stats.requests) == (0, 0, 4, ())
    for name in ("prompt_tokens", "cached_tokens", "answer_tokens"):
        assert getattr(stats, name) == sum(getattr(one, name) for one in ended)


# --- what goes wrong ----------------------------------------------------------------------------------

LONG = "fox " * 400
CACHE = {"kv": "q4", "ctx": 2048}


def second_piece(items):
    """Of a prompt that is read, or a step of another one."""
    return any(not item.decoding and item.cache.n_tokens for item in items)


def test_one_that_is_cancelled_while_others_wait_for_it(block, recorder, monkeypatch):
    recorder.before = gate = Gate(second_piece)
    with block.scheduler(4, **CACHE) as several:
        requests = [several.submit(f"{LONG} {i}", **options(i)) for i in range(4)]
        assert gate.reached.wait(WAIT)
        requests[0].cancel()
        gate.open()
        results = [request.result(WAIT) for request in requests]
    assert (results[0].finish_reason, results[0].text) == ("cancelled", "")
    read = results[0].stats.prompt_tokens
    assert 500 < read < len(ids_of(block, f"{LONG} 0"))
    assert results[1].stats.cached_tokens > 500 and results[2].stats.cached_tokens > read
    for i in (1, 2, 3):
        assert results[i].text == alone(block, CACHE, f"{LONG} {i}", options(i))[0]


def test_one_that_fails_while_others_wait_for_it(block, recorder):
    def fail(items):
        if second_piece(items):
            recorder.before = None
            raise RuntimeError("a fault")

    recorder.before = fail
    with block.scheduler(4, **CACHE) as several:
        requests = [several.submit(f"{LONG} {i}", **options(i)) for i in range(4)]
        with pytest.raises(RuntimeError, match="a fault"):
            requests[0].result(WAIT)
        results = [request.result(WAIT) for request in requests[1:]]
    assert results[0].stats.cached_tokens == 0 and results[1].stats.cached_tokens > 500
    for i, result in enumerate(results, 1):
        assert result.text == alone(block, CACHE, f"{LONG} {i}", options(i))[0]


def closed(several):
    """Whether it takes no more requests; if it does, it gets one that is refused later."""
    try:
        several.submit("", raw=True)
    except OptionError:
        return True
    return False


@pytest.mark.parametrize("cancel", [False, True])
def test_closing_while_requests_wait_for_another(block, recorder, cancel):
    recorder.before = gate = Gate(second_piece)
    several = block.scheduler(4, **CACHE)
    requests = [several.submit(f"{LONG} {i}", **options(i)) for i in range(6)]
    assert gate.reached.wait(WAIT)
    closing = threading.Thread(target=several.close, args=(cancel,))
    closing.start()
    while not closed(several):
        pass
    gate.open()
    closing.join(WAIT)
    assert not closing.is_alive() and all(request.done for request in requests)
    reasons = {request.result().finish_reason for request in requests}
    assert reasons == ({"cancelled"} if cancel else {"length"})


def test_ctrl_c_while_requests_wait_for_another(block, recorder):
    gate = Gate(second_piece)

    def interrupt(items):
        if not gate.reached.is_set() and second_piece(items):
            gate.reached.set()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    recorder.before = interrupt
    with pytest.raises(KeyboardInterrupt), block.scheduler(4, **CACHE) as several:
        requests = [several.submit(f"{LONG} {i}", ignore_eos=True) for i in range(6)]
        requests[5].result(WAIT)
    assert all(request.done for request in requests)
    recorder.before = None
    with block.scheduler(4, **CACHE) as several:
        assert answered(several, LONG, options()).text == alone(block, CACHE, LONG, options())[0]


@pytest.mark.parametrize("error", [MemoryError(), OptionError("no room")])
@pytest.mark.parametrize("where", ["fork", "renew"])
def test_no_memory_for_another_cache(block, rng, monkeypatch, error, where):
    """Costs what is kept, and no request."""
    prompt = said(rng, 100)
    expected = alone(block, CACHE, prompt, options())[0]
    with block.scheduler(2, **CACHE) as several:
        assert answered(several, prompt, options()).text == expected
        assert several.stats().prefixes == 1

        def fail(*_):
            raise error

        monkeypatch.setattr(*((prefix_store.Prefix, "fork") if where == "fork" else (kvrun.Session, "renew")), fail)
        other = answered(several, f"{prompt} {prompt}", options())
        assert (other.stats.cached_tokens == 0) == (where == "fork")
        assert several.stats().prefixes == (1 if where == "fork" else 0)
        monkeypatch.undo()
        assert answered(several, prompt, options()).text == expected
        assert answered(several, prompt, options()).stats.cached_tokens > 0


def test_no_memory_for_a_step(block, recorder, rng):
    """What is kept goes first; then the step is tried again."""
    prompt = said(rng, 100)
    with block.scheduler(2, **CACHE) as several:
        answered(several, prompt, options())
        assert several.stats().prefixes == 1

        def fail(items):
            recorder.before = None
            raise MemoryError

        recorder.before = fail
        other = said(rng, 50)
        assert answered(several, other, options()).text == alone(block, CACHE, other, options())[0]
        assert several.stats().prefixes == 1  # the other
