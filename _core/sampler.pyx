# distutils: extra_compile_args = -ffp-contract=off
"""The sampler: from logits to the next token, the same for one seed on every platform and thread count."""

import math
import operator

import numpy as np

from libc.float cimport FLT_MAX
from libc.stdint cimport int32_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cdef extern from "sampler_math.h":
    double sampler_exp(double x) noexcept nogil
    uint64_t sampler_splitmix(uint64_t *state) noexcept nogil
    double sampler_uniform(uint64_t *state) noexcept nogil
    int sampler_all_finite(const float *x, Py_ssize_t n) noexcept nogil

cdef struct Candidate:
    float logit
    int32_t id

cdef Py_ssize_t MAX_REPEAT_LAST_N = 1 << 20


# --- selection: "before" is the order of falling logits, equal ones by rising id ------------------------

cdef inline bint before(Candidate a, Candidate b) noexcept nogil:
    return a.logit > b.logit or (a.logit == b.logit and a.id < b.id)


cdef void sink_first(Candidate *heap, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """Restore the heap whose root comes before all others."""
    cdef Candidate item = heap[i]
    cdef Py_ssize_t child = 2 * i + 1
    while child < n:
        if child + 1 < n and before(heap[child + 1], heap[child]):
            child += 1
        if not before(heap[child], item):
            break
        heap[i] = heap[child]
        i = child
        child = 2 * i + 1
    heap[i] = item


cdef void sink_last(Candidate *heap, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """Restore the heap whose root comes after all others."""
    cdef Candidate item = heap[i]
    cdef Py_ssize_t child = 2 * i + 1
    while child < n:
        if child + 1 < n and before(heap[child], heap[child + 1]):
            child += 1
        if not before(item, heap[child]):
            break
        heap[i] = heap[child]
        i = child
        child = 2 * i + 1
    heap[i] = item


cdef void best_k(const float *logits, Py_ssize_t n, Py_ssize_t k, Candidate *out) noexcept nogil:
    """The k first of n logits, in order: one pass with a heap of k, then a heap sort of these."""
    cdef Py_ssize_t i
    cdef Candidate last
    for i in range(k):
        out[i].logit = logits[i]
        out[i].id = <int32_t>i
    for i in range(k // 2 - 1, -1, -1):
        sink_last(out, i, k)
    for i in range(k, n):
        if logits[i] > out[0].logit:        # an equal one has the higher id: it comes after
            out[0].logit = logits[i]
            out[0].id = <int32_t>i
            sink_last(out, 0, k)
    for i in range(k - 1, 0, -1):
        last = out[0]
        out[0] = out[i]
        out[i] = last
        sink_last(out, 0, i)


cdef Py_ssize_t above(const float *logits, Py_ssize_t n, double floor, Candidate *out) noexcept nogil:
    """Those of n logits that are at least `floor`, in order of ids; returns how many."""
    cdef Py_ssize_t i, m = 0
    for i in range(n):
        if logits[i] >= floor:
            out[m].logit = logits[i]
            out[m].id = <int32_t>i
            m += 1
    return m


cdef Py_ssize_t first_until(Candidate *heap, Py_ssize_t n, double top, double mass) noexcept nogil:
    """Order the n candidates only as far as needed for their weights exp(logit - top) to reach `mass`."""
    cdef Py_ssize_t i, m = 0
    cdef double total = 0
    cdef Candidate first
    for i in range(n // 2 - 1, -1, -1):
        sink_first(heap, i, n)
    while m < n and (m == 0 or total < mass):
        first = heap[0]
        m += 1
        heap[0] = heap[n - m]
        heap[n - m] = first
        sink_first(heap, 0, n - m)
        total += sampler_exp(<double>first.logit - top)
    for i in range(min(m, n // 2)):         # they stand at the end, the first one last
        first = heap[n - 1 - i]
        heap[n - 1 - i] = heap[i]
        heap[i] = first
    return m


# --- options --------------------------------------------------------------------------------------------

def _number(name, value, low, high):
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, not {value!r}") from None
    if not low <= number <= high:
        limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limit}, not {value!r}")
    if math.isinf(number):
        raise ValueError(f"{name} must be finite, not {value!r}")
    return number


def _integer(name, value, high):
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None
    if not 0 <= number <= high:
        raise ValueError(f"{name} must be between 0 and {high}, not {value!r}")
    return number


cdef class Sampler:
    """Sampler(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.0, repeat_last_n=64,
    seed=0)

    Chooses the next token from the logits. Steps, in this order:

    1. repeat penalty (Keskar et al. 2019, CTRL): logits of the tokens among the last `repeat_last_n` given to
       `accept` are divided by `repeat_penalty` when positive, multiplied when negative; 1 turns it off;
    2. temperature 0: the highest logit, the lower id among equal ones. Otherwise:
    3. `top_k` highest logits; 0 turns it off;
    4. `top_p` (Holtzman et al. 2019): the fewest with this share of their probability; 1 turns it off;
    5. `min_p` (Nguyen et al. 2024): those at least this fraction as likely as the likeliest; 0 turns it off;
    6. softmax of what remains at `temperature`, and a draw from it.

    All sums are float64 in a fixed order, and the generator (xoshiro256++) is its own: the same seed, options
    and logits give the same tokens everywhere. One sampler serves one sequence; it must not be used by two
    threads at once (RuntimeError).

    Raises ValueError, naming the option, for one that is out of range.
    """

    cdef readonly double temperature, top_p, min_p, repeat_penalty
    cdef readonly Py_ssize_t top_k, repeat_last_n
    cdef readonly object seed
    cdef double log_min_p
    cdef uint64_t state[4]
    cdef int32_t *recent            # ring of the last repeat_last_n tokens
    cdef Py_ssize_t n_accepted
    cdef Py_ssize_t capacity        # vocabulary size that the buffers below are made for
    cdef float *penalised           # logits after the penalty
    cdef uint8_t *seen              # 1 while a token of `recent` has been dealt with
    cdef Candidate *candidates
    cdef double *weights
    cdef bint busy

    def __init__(self, temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.0,
                 repeat_last_n=64, seed=0):
        self.temperature = _number("temperature", temperature, 0, math.inf)
        self.top_k = _integer("top_k", top_k, 2**31 - 1)
        self.top_p = _number("top_p", top_p, 0, 1)
        self.min_p = _number("min_p", min_p, 0, 1)
        self.log_min_p = math.log(self.min_p) if self.min_p > 0 else -math.inf
        self.repeat_penalty = _number("repeat_penalty", repeat_penalty, 0, math.inf)
        if self.repeat_penalty == 0:
            raise ValueError(f"repeat_penalty must be above 0, not {repeat_penalty!r}")
        self.repeat_last_n = _integer("repeat_last_n", repeat_last_n, MAX_REPEAT_LAST_N)
        self.seed = _integer("seed", seed, 2**64 - 1)
        free(self.recent)
        self.recent = <int32_t *>malloc(max(self.repeat_last_n, 1) * sizeof(int32_t))
        if self.recent == NULL:
            raise MemoryError
        self.reset()

    def __dealloc__(self):
        free(self.recent)
        self._free_buffers()

    cdef void _free_buffers(self) noexcept:
        free(self.penalised)
        free(self.seen)
        free(self.candidates)
        free(self.weights)
        self.penalised = NULL
        self.seen = NULL
        self.candidates = NULL
        self.weights = NULL
        self.capacity = 0

    cdef int _reserve(self, Py_ssize_t n) except -1:
        """Buffers for a vocabulary of n, made once."""
        if n == self.capacity:
            return 0
        self._free_buffers()
        self.penalised = <float *>malloc(n * sizeof(float))
        self.seen = <uint8_t *>malloc(n)
        self.candidates = <Candidate *>malloc(n * sizeof(Candidate))
        self.weights = <double *>malloc(n * sizeof(double))
        if self.penalised == NULL or self.seen == NULL or self.candidates == NULL or self.weights == NULL:
            self._free_buffers()
            raise MemoryError
        memset(self.seen, 0, n)
        self.capacity = n
        return 0

    def reset(self):
        """Forget the accepted tokens and start the generator again from the seed."""
        cdef uint64_t seed = self.seed
        cdef int i
        for i in range(4):
            self.state[i] = sampler_splitmix(&seed)
        self.n_accepted = 0

    def accept(self, token):
        """Note that `token` (an id >= 0) is now part of the text, for the repeat penalty."""
        cdef Py_ssize_t value = _integer("token", token, 2**31 - 1)
        if self.repeat_last_n > 0:
            self.recent[self.n_accepted % self.repeat_last_n] = <int32_t>value
        self.n_accepted += 1

    def sample(self, const float[::1] logits not None):
        """The next token's id, for float32 logits [vocab]. The GIL is released meanwhile.

        Does not note the token: see `accept`. Raises ValueError for logits that are empty, NaN or infinite,
        and when a token that was accepted is not in this vocabulary.
        """
        cdef Py_ssize_t m, i = 0
        self._begin(logits)
        try:
            with nogil:
                m = self._select(&logits[0], logits.shape[0])
                if m > 0 and self.temperature > 0:
                    i = self._draw(m)
        finally:
            self.busy = False
        self._check(m, logits.shape[0])
        return self.candidates[i].id

    def probabilities(self, const float[::1] logits not None):
        """What `sample` would draw from: (ids int32 [m], p float64 [m], summing to 1), the likeliest first
        and equal ones by id. Draws nothing. Raises ValueError as `sample` does."""
        cdef Py_ssize_t m, i
        self._begin(logits)
        try:
            with nogil:
                m = self._select(&logits[0], logits.shape[0])
            self._check(m, logits.shape[0])
            ids, values, p = np.empty(m, np.int32), np.empty(m, np.float32), np.ones(m, np.float64)
            self._copy_out(m, ids, values, p)
        finally:
            self.busy = False
        order = np.lexsort((ids, -values))
        return ids[order], p[order] / p.sum()

    cdef void _copy_out(self, Py_ssize_t m, int32_t[::1] ids, float[::1] values, double[::1] p):
        cdef Py_ssize_t i
        for i in range(m):
            ids[i] = self.candidates[i].id
            values[i] = self.candidates[i].logit
            if self.temperature > 0:
                p[i] = self.weights[i]

    cdef int _begin(self, const float[::1] logits) except -1:
        """Check the vocabulary's size, mark the sampler as busy, make its buffers."""
        if not 0 < logits.shape[0] < 2**31:
            raise ValueError(f"logits must be those of 1 to 2147483647 ids, not of {logits.shape[0]}")
        if self.busy:
            raise RuntimeError("this sampler is in use by another thread")
        self._reserve(logits.shape[0])
        self.busy = True
        return 0

    cdef int _check(self, Py_ssize_t result, Py_ssize_t n) except -1:
        if result == -1:
            raise ValueError("logits are not finite (NaN or infinity): the model's weights are damaged")
        if result == -2:
            raise ValueError(f"an accepted token is not in this vocabulary of {n}")
        return 0

    cdef Py_ssize_t _select(self, const float *logits, Py_ssize_t n) noexcept nogil:
        """Steps 1 to 6 up to the draw: fill `candidates` and, unless greedy, `weights`; returns how many.

        -1: logits not finite. -2: an accepted token is out of range.
        """
        cdef Py_ssize_t m
        if not sampler_all_finite(logits, n):
            return -1
        if self.repeat_penalty != 1 and self.repeat_last_n > 0 and self.n_accepted > 0:
            if not self._penalise(logits, n):
                return -2
            logits = self.penalised
        if self.temperature == 0:
            best_k(logits, n, 1, self.candidates)
            return 1
        if 0 < self.top_k < n:
            best_k(logits, n, self.top_k, self.candidates)
            m = self._cut_ordered(self.top_k)
        else:
            m = self._cut_all(logits, n)
        self._weigh(m)
        return m

    cdef Py_ssize_t _draw(self, Py_ssize_t m) noexcept nogil:
        """The index of a candidate, drawn with its weight; one of weight 0 is never drawn."""
        cdef double total = 0, target
        cdef Py_ssize_t i
        for i in range(m):
            total += self.weights[i]
        target = sampler_uniform(self.state) * total
        total = 0
        for i in range(m):
            total += self.weights[i]
            if total > target:
                return i
        return 0

    cdef bint _penalise(self, const float *logits, Py_ssize_t n) noexcept nogil:
        """Copy the logits, penalising each recent token once; False when one is out of range."""
        cdef Py_ssize_t count = min(self.n_accepted, self.repeat_last_n), i
        cdef float penalty = <float>self.repeat_penalty, value
        cdef int32_t token
        for i in range(count):
            if self.recent[i] >= n:
                return False
        memcpy(self.penalised, logits, n * sizeof(float))
        for i in range(count):
            token = self.recent[i]
            if self.seen[token]:
                continue
            self.seen[token] = 1
            value = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            self.penalised[token] = max(-FLT_MAX, min(FLT_MAX, value))
        for i in range(count):
            self.seen[self.recent[i]] = 0
        return True

    cdef Py_ssize_t _cut_ordered(self, Py_ssize_t n) noexcept nogil:
        """top_p, then min_p, of n candidates in order."""
        cdef double top = self.candidates[0].logit, total = 0, mass = 0
        cdef Py_ssize_t m = n, i
        if self.top_p < 1:
            for i in range(n):
                self.weights[i] = sampler_exp(<double>self.candidates[i].logit - top)
                total += self.weights[i]
            m = 0
            while m < n and (m == 0 or mass < self.top_p * total):
                mass += self.weights[m]
                m += 1
        while m > 1 and <double>self.candidates[m - 1].logit < top + self.log_min_p:
            m -= 1
        return m

    cdef Py_ssize_t _cut_all(self, const float *logits, Py_ssize_t n) noexcept nogil:
        """top_p and min_p of the whole vocabulary. Both keep a first part of the order, so the two are
        exchanged: min_p needs no order and leaves few candidates to put in order."""
        cdef double top = logits[0], total = 0
        cdef Py_ssize_t m, i
        for i in range(n):
            top = max(top, <double>logits[i])
        m = above(logits, n, top + self.log_min_p, self.candidates)
        if self.top_p < 1:
            for i in range(n):
                total += sampler_exp(<double>logits[i] - top)
            m = first_until(self.candidates, m, top, self.top_p * total)
        return m

    cdef void _weigh(self, Py_ssize_t n) noexcept nogil:
        """weights[i] = exp((logit[i] - top) / temperature)"""
        cdef double top = self.candidates[0].logit
        cdef Py_ssize_t i
        for i in range(n):
            top = max(top, <double>self.candidates[i].logit)
        for i in range(n):
            self.weights[i] = sampler_exp((<double>self.candidates[i].logit - top) / self.temperature)
