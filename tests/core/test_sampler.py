"""The sampler against a plain NumPy version of the same rules, and its own random generator."""

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrun._core import Sampler
from support import cases

MASK = 2**64 - 1


def ordered(logits):
    """Ids by falling logit, equal ones by rising id."""
    return np.lexsort((np.arange(len(logits)), -logits.astype(np.float64)))


def penalised(logits, recent, penalty):
    out = logits.copy()
    for token in set(recent):
        value = out[token]
        out[token] = value / np.float32(penalty) if value > 0 else value * np.float32(penalty)
    return out


def check_candidates(logits, ids, p, temperature, top_k, top_p, min_p):
    """The candidate distribution must be what the rules say; sums may differ in their last digits."""
    order = ordered(logits)
    values = logits.astype(np.float64)
    if top_k > 0:
        order = order[:top_k]
    weights = np.exp(values[order] - values[order[0]])
    n_min_p = len(order)
    if min_p > 0:
        n_min_p = int((values[order] >= values[order[0]] + math.log(min_p)).sum())
    n = len(ids)
    np.testing.assert_array_equal(ids, order[:n])
    assert 1 <= n <= n_min_p
    if top_p < 1:
        mass = np.cumsum(weights)
        goal = top_p * mass[-1]
        assert n == 1 or mass[n - 2] < goal * (1 + 1e-12)
        assert n == n_min_p or mass[n - 1] > goal * (1 - 1e-12)
    else:
        assert n == n_min_p
    with np.errstate(over="ignore"):
        expected = np.exp((values[ids] - values[ids[0]]) / temperature)
    np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-12, atol=1e-300)


def random_logits(seed, n, scale=4.0, ties=False):
    logits = np.random.default_rng(seed).normal(0, scale, n).astype(np.float32)
    return np.round(logits) if ties else logits


@settings(max_examples=cases.examples(300), deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 300),
    scale=st.sampled_from([0.01, 1.0, 5.0, 40.0]),
    ties=st.booleans(),
    temperature=st.floats(0.01, 10),
    top_k=st.integers(0, 320),
    top_p=st.floats(0, 1),
    min_p=st.one_of(st.just(0.0), st.floats(1e-6, 1)),
    penalty=st.floats(0.5, 3),
    accepted=st.integers(0, 12),
)
def test_filters_agree_with_numpy(seed, n, scale, ties, temperature, top_k, top_p, min_p, penalty, accepted):
    logits = random_logits(seed, n, scale, ties)
    tokens = np.random.default_rng(seed + 1).integers(0, n, accepted)
    sampler = Sampler(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=penalty,
        repeat_last_n=8,
    )
    for token in tokens:
        sampler.accept(token)
    ids, p = sampler.probabilities(logits)
    expected = penalised(logits, tokens[-8:].tolist(), penalty)
    check_candidates(expected, ids, p, temperature, top_k, top_p, min_p)
    assert sampler.sample(logits) in ids


@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=40, top_p=0.95, min_p=0.05),
        dict(top_k=0, top_p=0.9, min_p=0),
        dict(top_k=0, top_p=1, min_p=0.1),
        dict(top_k=0, top_p=1, min_p=0),
        dict(top_k=20000, top_p=0.99, min_p=0),
        dict(top_k=49152, top_p=0.5, min_p=0.5),
    ],
)
def test_a_whole_vocabulary(options):
    logits = random_logits(3, 49152, 2.0)
    ids, p = Sampler(temperature=0.7, **options).probabilities(logits)
    check_candidates(logits, ids, p, 0.7, **options)


def test_greedy_takes_the_lower_of_equal_ids():
    logits = np.array([1, 5, 3, 5, 5], np.float32)
    sampler = Sampler(temperature=0)
    assert sampler.sample(logits) == 1
    ids, p = sampler.probabilities(logits)
    assert ids.tolist() == [1] and p.tolist() == [1.0]


def test_greedy_after_penalty():
    logits = np.array([2.0, 1.5, -1.0], np.float32)
    sampler = Sampler(temperature=0, repeat_penalty=2.0)
    assert sampler.sample(logits) == 0
    sampler.accept(0)
    assert sampler.sample(logits) == 1  # 2 / 2 < 1.5


def test_penalty_divides_positive_and_multiplies_negative():
    logits = np.array([2.0, -1.0, 0.5, 0.0], np.float32)
    sampler = Sampler(temperature=1, top_k=0, top_p=1, min_p=0, repeat_penalty=4.0)
    for token in (0, 1, 1, 3):  # a repeated token is penalised once
        sampler.accept(token)
    ids, p = sampler.probabilities(logits)
    got = dict(zip(ids.tolist(), np.log(p / p[0])))
    assert ids.tolist() == [0, 2, 3, 1]
    np.testing.assert_allclose([got[i] - got[0] for i in (2, 3, 1)], [0.0, -0.5, -4.5], atol=1e-12)


def test_penalty_forgets_after_repeat_last_n():
    logits = np.array([2.0, 1.9, 0.0, 0.0], np.float32)
    sampler = Sampler(temperature=0, repeat_penalty=1.5, repeat_last_n=2)
    sampler.accept(0)
    sampler.accept(2)
    assert sampler.sample(logits) == 1
    sampler.accept(3)
    assert sampler.sample(logits) == 0
    off = Sampler(temperature=0, repeat_penalty=1.5, repeat_last_n=0)
    off.accept(0)
    assert off.sample(logits) == 0


def test_penalised_logits_do_not_overflow():
    logits = np.array([-3e38, -3e38, 3e38], np.float32)
    sampler = Sampler(temperature=1, top_k=0, top_p=1, min_p=0, repeat_penalty=1000)
    sampler.accept(0)
    ids, p = sampler.probabilities(logits)
    assert ids.tolist() == [2, 1, 0] and p[0] == 1


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 6, 1000])
def test_top_k_around_the_vocabulary(top_k):
    logits = np.array([0, 1, 1, 2, 0.5], np.float32)
    ids, _ = Sampler(top_k=top_k, top_p=1, min_p=0).probabilities(logits)
    assert ids.tolist() == [3, 1, 2, 4, 0][: top_k or 5]


def test_vocabulary_of_one():
    for options in ({}, {"temperature": 0}, {"top_k": 0}, {"top_p": 0, "min_p": 1}):
        sampler = Sampler(**options)
        assert [sampler.sample(np.array([-7.5], np.float32)) for _ in range(3)] == [0, 0, 0]


def test_top_p_zero_and_min_p_one_keep_the_best():
    logits = np.array([1, 3, 3, 2], np.float32)
    assert Sampler(top_p=0, top_k=0).probabilities(logits)[0].tolist() == [1]
    assert Sampler(min_p=1, top_p=1, top_k=0).probabilities(logits)[0].tolist() == [1, 2]
    assert Sampler(min_p=1, top_p=1, top_k=3).probabilities(logits)[0].tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_tiny_temperature_is_greedy(temperature):
    logits = random_logits(5, 1000)
    sampler = Sampler(temperature=temperature, top_k=0, top_p=1, min_p=0)
    best = int(np.argmax(logits))
    assert {sampler.sample(logits) for _ in range(20)} == {best}


def test_huge_temperature_is_uniform():
    _, p = Sampler(temperature=1e30, top_k=0, top_p=1, min_p=0).probabilities(random_logits(6, 100))
    np.testing.assert_allclose(p, 0.01, rtol=1e-12)


# --- the generator --------------------------------------------------------------------------------------


def uniforms(seed, n):
    """xoshiro256++ seeded by splitmix64, as published."""
    state = []
    for _ in range(4):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        state.append(z ^ (z >> 31))
    rotl = lambda x, k: ((x << k) | (x >> (64 - k))) & MASK  # noqa: E731
    for _ in range(n):
        s0, s1, s2, s3 = state
        yield (((rotl((s0 + s3) & MASK, 23) + s0) & MASK) >> 11) / 2**53
        s2, s3 = s2 ^ s0, s3 ^ s1
        state = [s0 ^ s3, s1 ^ s2, s2 ^ ((s1 << 17) & MASK), rotl(s3, 45)]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**64 - 1])
def test_draws_follow_the_published_generator(seed):
    logits = np.zeros(1000, np.float32)
    sampler = Sampler(temperature=1, top_k=0, top_p=1, min_p=0, seed=seed)
    assert [sampler.sample(logits) for _ in range(200)] == [int(u * 1000) for u in uniforms(seed, 200)]


def test_draws_with_top_k_follow_the_order_of_likelihood():
    logits = random_logits(8, 5000, 1.0)
    sampler = Sampler(temperature=0.9, top_k=50, top_p=1, min_p=0, seed=7)
    ids, p = sampler.probabilities(logits)
    cumulative = np.cumsum(p)
    expected = [int(ids[np.searchsorted(cumulative, u, side="right")]) for u in uniforms(7, 500)]
    assert [sampler.sample(logits) for _ in range(500)] == expected


def test_same_seed_same_tokens():
    logits = [random_logits(i, 3000, 3.0) for i in range(50)]

    def run(seed):
        sampler = Sampler(seed=seed, repeat_penalty=1.1)
        out = []
        for step in logits:
            out.append(sampler.sample(step))
            sampler.accept(out[-1])
        return out

    first = run(5)
    assert run(5) == first
    assert run(6) != first


def test_reset_starts_again():
    logits = np.zeros(100, np.float32)
    sampler = Sampler(seed=3, temperature=1, top_k=0, min_p=0, top_p=1, repeat_penalty=2)
    first = [sampler.sample(logits) for _ in range(10)]
    sampler.accept(4)
    sampler.reset()
    assert [sampler.sample(logits) for _ in range(10)] == first


@pytest.mark.parametrize("options", [dict(top_k=8), dict(top_k=0), dict(top_k=0, top_p=0.98), dict(top_k=6, top_p=0.9)])
def test_draws_have_the_stated_distribution(options):
    logits = random_logits(11, 60, 2.0)
    sampler = Sampler(**{"temperature": 1.3, "top_p": 1.0, "min_p": 0.02, "seed": 12345} | options)
    ids, p = sampler.probabilities(logits)
    n = 20000
    counts = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=60)
    assert counts.sum() == counts[ids].sum()
    chi_square = float(((counts[ids] - n * p) ** 2 / (n * p)).sum())
    degrees = len(ids) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 8


def test_probabilities_draw_nothing():
    logits = random_logits(2, 500)
    plain, asked = Sampler(seed=9), Sampler(seed=9)
    for _ in range(20):
        asked.probabilities(logits)
        assert asked.sample(logits) == plain.sample(logits)


def test_vocabulary_may_change():
    sampler = Sampler(seed=1, repeat_penalty=1.2)
    for n in (10, 1000, 3, 1, 400):
        assert 0 <= sampler.sample(random_logits(n, n)) < n


def test_threads_with_their_own_samplers():
    logits = random_logits(4, 49152, 3.0)
    results = [None] * 4

    def run(i):
        sampler = Sampler(seed=77)
        results[i] = [sampler.sample(logits) for _ in range(100)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results[0] is not None and all(r == results[0] for r in results)


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 0}, {"repeat_penalty": 1.5}])
def test_logits_that_are_not_finite(value, options):
    logits = random_logits(1, 200)
    logits[137] = value
    sampler = Sampler(**options)
    sampler.accept(3)
    with pytest.raises(ValueError, match="not finite"):
        sampler.sample(logits)
    with pytest.raises(ValueError, match="not finite"):
        sampler.probabilities(logits)
    logits[137] = 0
    sampler.sample(logits)  # still usable


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.01},
        {"top_p": -0.1},
        {"min_p": 2},
        {"min_p": None},
        {"repeat_penalty": 0},
        {"repeat_penalty": -1},
        {"repeat_last_n": -1},
        {"repeat_last_n": 1 << 40},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampler(**options)


def test_wrong_arrays():
    sampler = Sampler()
    with pytest.raises(ValueError):
        sampler.sample(np.empty(0, np.float32))
    with pytest.raises(ValueError):
        sampler.sample(np.zeros(5, np.float64))
    with pytest.raises((ValueError, TypeError)):
        sampler.sample(np.zeros((2, 5), np.float32))
    with pytest.raises(TypeError):
        sampler.sample(None)


def test_accepted_token_out_of_range():
    sampler = Sampler(repeat_penalty=1.5)
    with pytest.raises(ValueError, match="token"):
        sampler.accept(-1)
    sampler.accept(10)
    with pytest.raises(ValueError, match="vocabulary of 10"):
        sampler.sample(np.zeros(10, np.float32))
    assert sampler.sample(np.zeros(11, np.float32)) >= 0
