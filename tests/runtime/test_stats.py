"""What `Session.stats` counts: the tokens of an answer, those the cache has no room for, and the seed."""

import pytest

import kvrun

CTX = 132


@pytest.fixture(scope="module")
def model(converted):
    return kvrun.load(converted("grouped-tied"))


def fed(session, prompt, n=0, **options):
    """The answer; `stats` are then those of the prompt alone, before anything was fed."""
    stream = session.stream(prompt, max_tokens=n, ignore_eos=True, **options)
    return (session.stats.prompt_overflow, session.stats.evicted_tokens), "".join(stream)


@pytest.mark.parametrize("n", [1, CTX - 1, CTX, CTX + 1, CTX + 100, 5 * CTX])
def test_a_prompt_that_does_not_fit_is_known_before_it_is_fed(model, n):
    session = model.session(ctx=CTX)
    stream = session.stream([5] * n, max_tokens=0)
    beyond = max(0, n - CTX)
    assert (session.stats.prompt_overflow, session.stats.evicted_tokens) == (beyond, beyond)
    assert session.stats.prompt_tokens == 0 and session.n_tokens == 0
    assert "".join(stream) == ""
    assert (session.stats.prompt_overflow, session.stats.evicted_tokens) == (beyond, beyond)
    assert session.stats.prompt_tokens == n


def test_a_text_that_outgrows_the_cache(model):
    """By a prompt that fits itself, and by an answer."""
    session = model.session(ctx=CTX)
    assert fed(session, [5] * 100)[0] == (0, 0)
    assert fed(session, [5] * 100)[0] == (0, 200 - CTX)
    fed(session, [5], 51)
    assert session.stats.prompt_overflow == 0
    assert session.stats.evicted_tokens == session.n_tokens - 1 - CTX  # the answer's last token is not fed yet
    session.evaluate()
    assert session.stats.evicted_tokens == session.n_tokens - CTX == 252 - CTX
    session.reset()
    assert fed(session, [5] * 100)[0] == (0, 0)


def test_a_conversation_in_place_of_another_counts_from_its_beginning(model):
    session = model.session(ctx=400)
    fed(session, [5] * 390)
    before, _answer = fed(session, [{"role": "user", "content": "a"}])
    assert before == (0, 0) and session.n_tokens < 100


def test_layers_with_a_sliding_window_have_no_other_room(family):
    """What has left the window would not be seen with a larger cache either."""
    description = kvrun.load(family("gemma3")).description
    assert None in description.sliding_windows  # that layer sees all of the text
    session = kvrun.load(family("gemma3")).session(ctx=CTX)
    assert fed(session, [5] * 200)[0] == (200 - CTX, 200 - CTX)
    mistral = kvrun.load(family("mistral"))
    (window,) = set(mistral.description.sliding_windows)
    session = mistral.session(ctx=max(CTX, window))
    assert fed(session, [5] * 500)[0] == (0, 0)


def test_seeds(model):
    options = dict(raw=True, max_tokens=30, ignore_eos=True)
    session = model.session()
    text = "".join(session.stream("a", seed=7, **options))
    assert session.stats.seed == 7
    seen = set()
    for seed in (None, -1, -(2**63)):
        session.reset()
        drawn = "".join(session.stream("a", seed=seed, **options))
        seen.add(session.stats.seed)
        assert drawn == model.generate("a", seed=session.stats.seed, **options)
    assert len(seen) == 3 and min(seen) >= 0
    session.reset()
    assert "".join(session.stream("a", seed=7, **options)) == text
    list(session.stream("a", temperature=0, **options))
    assert session.stats.seed is None
