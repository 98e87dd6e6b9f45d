"""The engine: runs tokens of one or several sequences through the layers. ``forward`` reads from top to bottom like the
paper.

Threads take work by number, step by step, so that every result is the same whatever their count.
"""

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

cimport cython
from contextlib import ExitStack

import numpy as np

from .plan cimport (MAX_ITEMS, SPLIT_TOKENS, Item, Ropes, items_buffers, most_members, plan_buffers, plan_chunk, plan_groups,
                    plan_queries)
from .cache cimport KVCache
from .call cimport ONE, OWN_FLOATS, TWO, Call, Codes, Inputs, RunState, Worker
from .experts cimport mixture
from .kernels cimport KV_BLOCK, KV_GELU, KV_GELU_TANH, KV_PANEL, KV_SILU, kernels, kv_packed_bytes, kv_weight_of
from .model cimport Config, Expert, Layer, Matrix, Norm, Segment, first_of_mlp, whole_panels
from .steps cimport (activate_mlp, add, attend, embed, hidden_states, logits, matmul, norm_heads, prepare_attended, prepare_gated,
                     prepare_head, prepare_normed)
from .team cimport (KV_MAX_THREADS, kv_member, kv_team, kv_team_busy, kv_team_free, kv_team_keep, kv_team_new,
                    kv_team_release, kv_team_run, kv_team_settle, kv_team_use)
from . import cpus
from .cache import bytes_held, sliding_windows
from .kernels import require_level
from .weights import packed_size, type_id

MAX_CHUNK = 512
"""Most tokens of one sequence in a step."""

MAX_ROWS = 1024
"""Most tokens in a step."""

MAX_WRITTEN = SPLIT_TOKENS
"""Most tokens of a text that is being written in one step of which each gets what it would alone: of more, attention does
not split the tiles as it does for one."""

cdef enum:
    MOST_ARENAS = 8     # that are kept
    FEW_TOKENS = 16     # in calls of more the buffers are large, and late threads are waited for, not to need others

cdef dict _ACTIVATIONS = {"silu": KV_SILU, "gelu": KV_GELU, "gelu_tanh": KV_GELU_TANH}

MAX_THREADS = KV_MAX_THREADS
"""Most threads of one call."""


cdef void forward(void* arg, kv_member* me) noexcept nogil:
    """One thread's part of a step: embedding, layers, logits."""
    cdef const Call* call = <const Call*>arg
    cdef const Config* c = call.config
    cdef const RunState* run = &call.run
    cdef const Layer* layer
    cdef int64_t i
    cdef Inputs x
    cdef Worker w
    w.call, w.me, w.next = call, me, NULL
    embed(&w)                                                                           # x [n][hidden]
    for i in range(c.n_layers):
        layer = &call.layers[i]
        x = prepare_normed(&w, &layer.qkv, &layer.attn_norm, False)
        matmul(&w, &layer.qkv, &x, run.qkv, layer.qkv.width, False, NULL)               # [n][q, k, v]
        if layer.q_norm != NULL:
            norm_heads(&w, layer)
        attend(&w, layer, i)
        x = prepare_attended(&w, &layer.o, i)                                           # [n][n_heads * head_dim]
        add(&w, &layer.o, &x, &layer.attn_post_norm, first_of_mlp(layer))
        if layer.router.n_segments:
            mixture(&w, layer)
            continue
        x = prepare_normed(&w, first_of_mlp(layer), &layer.mlp_norm, False)
        activate_mlp(&w, layer, &x)                                                     # [n][intermediate]
        x = prepare_gated(&w, &layer.down)
        add(&w, &layer.down, &x, &layer.mlp_post_norm, &layer[1].qkv if i + 1 < c.n_layers else call.head)
    if call.hidden != NULL:
        hidden_states(&w)
    if call.logits != NULL:
        x = prepare_head(&w)
        logits(&w, &x)


# Memory -------------------------------------------------------------------------------------------------------------

@cython.no_gc_clear
cdef class _Arena:
    """A call with all that its threads read and write, which is kept for the next one when no late thread is in it.

    Buffers are 64-byte aligned pieces of one block; sizes are counted in a first pass over the same code."""
    cdef Call call
    cdef kv_team* team
    cdef void* memory
    cdef char* base
    cdef size_t used, size
    cdef bint counting

    def __cinit__(self):
        self.team = kv_team_new()
        if self.team == NULL:
            raise MemoryError("no memory for a team of threads")

    def __dealloc__(self):
        kv_team_free(self.team)
        free(self.memory)

    cdef void count(self) noexcept:
        self.used, self.counting = 0, True

    def busy(self):
        """Whether late threads are in the last call."""
        return kv_team_busy(self.team)

    def settle(self):
        """Waits for them."""
        with nogil:
            kv_team_settle(self.team)

    cdef int allocate(self) except -1:
        if self.used > self.size:
            free(self.memory)
            self.size, self.memory = 0, malloc(self.used + 64)
            if self.memory == NULL:
                raise MemoryError(f"no memory for {self.used} bytes of buffers")
            self.size = self.used
            self.base = <char*>((<size_t>self.memory + 63) // 64 * 64)
        self.used, self.counting = 0, False
        return 0

    cdef void* take(self, int64_t bytes) noexcept:
        cdef size_t at = self.used
        self.used += (bytes + 63) // 64 * 64
        return NULL if self.counting else self.base + at


def _is_fine(_Part part):
    return part.fine


cdef class _Part:
    """A checked item of a step."""
    cdef KVCache kv
    cdef object ids             # int32 [n]
    cdef bint fine, written     # whether inputs of matrices have two planes, whether the text is being written
    cdef str wants

    def __cinit__(self, KVCache kv, ids, fine, written, wants):
        self.kv, self.ids, self.fine, self.written, self.wants = kv, ids, fine, written, wants


@cython.no_gc_clear
cdef class Engine:
    """A model's weights, ready to run; read-only, so any number of threads and caches may use it at once.

    description: the sizes of the model and the choices in its arithmetic, as the fields of a model description.
    weights: name -> object with type, rows, cols and data (uint8, packed). vectors: name -> float32 array.
    rope_tables: function of the tokens that a cache has room for -> object with float64 [tables, head_dim / 2] inv_freq
    and amplitude, and int64 [n_layers] of_layer, the table of each. threads: at least 1; a call has no more than the CPUs that
    the process may use at the time. precise: block-quantised
    weights take activations of 16 bits always, not only when decoding; chunks are about half as fast then.
    Raises ValueError when a tensor is missing or has the wrong shape or size, or KVRUN_ISA names no level.
    """
    cdef Config c
    cdef Layer* layers
    cdef Matrix embed, positions, head
    cdef Norm norm
    cdef list kept
    cdef list arenas            # that no call uses, but for late threads in them
    cdef dict ropes             # of each size of a cache that was used
    cdef object rope_tables
    cdef readonly object description
    cdef readonly tuple sliding_windows
    cdef readonly int threads
    cdef readonly bint precise

    max_chunk, max_written = MAX_CHUNK, MAX_WRITTEN

    def __cinit__(self, description, weights, vectors, rope_tables, threads=1, precise=False):
        cdef int64_t i
        kv_team_keep()
        self.arenas = []
        d = self.description = description
        require_level()
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        for name, choices in (("activation", _ACTIVATIONS), ("norm", ("rms", "layer")),
                              ("qk_norm", (None, "head", "all"))):
            if getattr(d, name) not in choices:
                raise ValueError(f"{name} {getattr(d, name)!r} is not supported")
        if d.n_heads % d.n_kv_heads or d.head_dim % 2:
            raise ValueError("n_heads must be a multiple of n_kv_heads, and head_dim even")
        self.threads, self.kept = min(threads, KV_MAX_THREADS), []
        self.ropes, self.rope_tables = {}, rope_tables
        self.precise = precise
        self.sliding_windows = sliding_windows(d)
        self._sizes()
        self.layers = <Layer*>calloc(d.n_layers, sizeof(Layer))
        if self.layers == NULL:
            raise MemoryError
        self._matrix(&self.embed, weights, vectors, ["embed"], d.hidden_size, [d.vocab_size], False)
        for i in range(d.n_layers):
            self._layer(&self.layers[i], f"layers.{i}.", weights, vectors, d.has_experts(i))
        if d.learned_positions:
            self._matrix(&self.positions, weights, vectors, ["positions"], d.hidden_size, [d.context_length], False)
        self._norm(&self.norm, vectors, "norm", True)
        head = "embed" if d.tie_embeddings else "head"
        self._matrix(&self.head, weights, vectors, [head], d.hidden_size, [d.vocab_size], False)

    def __dealloc__(self):
        cdef int64_t i
        for arena in self.arenas or ():     # before the layers: threads that are late read them
            arena.settle()
        if self.layers != NULL:
            for i in range(self.c.n_layers):
                free(self.layers[i].experts)
        free(self.layers)
        kv_team_release()

    cdef int _sizes(self) except -1:
        d, c = self.description, &self.c
        c.n_layers, c.hidden_size, c.intermediate_size = d.n_layers, d.hidden_size, d.intermediate_size
        c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size = d.n_heads, d.n_kv_heads, d.head_dim, d.vocab_size
        c.hidden_pad = whole_panels(c.hidden_size)
        c.norm_eps, c.attention_scale, c.attention_softcap = d.norm_eps, d.attention_scale, d.attention_softcap or 0
        c.embedding_scale, c.residual_scale, c.logit_scale = d.embedding_scale, d.residual_scale, d.logit_scale
        c.logit_softcap, c.layer_norm, c.norm_all_heads = d.logit_softcap or 0, d.norm == "layer", d.qk_norm == "all"
        c.n_experts, c.experts_used, c.expert_size = d.n_experts or 0, d.experts_used or 0, d.expert_size or 0
        c.normalize_experts = d.normalize_experts
        if c.n_experts and not 0 < c.experts_used <= c.n_experts:
            raise ValueError(f"{c.experts_used} of {c.n_experts} experts cannot be used")
        c.branch, c.activation = d.post_norms or d.residual_scale != 1, _ACTIVATIONS[d.activation]
        return 0

    cdef int _norm(self, Norm* norm, vectors, str name, bint there) except -1:
        norm.weight = self._vector(vectors, name + ".weight", self.c.hidden_size) if there else NULL
        norm.bias = self._vector(vectors, name + ".bias", self.c.hidden_size) if there and self.c.layer_norm else NULL
        return 0

    cdef int _experts(self, Layer* layer, str name, weights, vectors) except -1:
        cdef Expert* expert
        cdef int64_t e
        hidden, inner = self.description.hidden_size, self.description.expert_size
        self._matrix(&layer.router, weights, vectors, [name + "mlp.router"], hidden, [self.c.n_experts], False)
        layer.experts = <Expert*>calloc(self.c.n_experts, sizeof(Expert))
        if layer.experts == NULL:
            raise MemoryError
        for e in range(self.c.n_experts):
            expert, stem = &layer.experts[e], f"{name}mlp.experts.{e}."
            self._matrix(&expert.gate, weights, vectors, [stem + "gate"], hidden, [inner], False)
            self._matrix(&expert.up, weights, vectors, [stem + "up"], hidden, [inner], False)
            self._matrix(&expert.down, weights, vectors, [stem + "down"], inner, [hidden], False)
            layer.experts_quantized |= expert.gate.quantized or expert.up.quantized or expert.down.quantized
        return 0

    cdef int _layer(self, Layer* layer, str name, weights, vectors, bint has_experts) except -1:
        d = self.description
        q, kv = d.n_heads * d.head_dim, d.n_kv_heads * d.head_dim
        hidden, inner = d.hidden_size, d.intermediate_size
        self._norm(&layer.attn_norm, vectors, name + "attn.norm", d.pre_norms)
        self._norm(&layer.attn_post_norm, vectors, name + "attn.post_norm", d.post_norms)
        self._norm(&layer.mlp_norm, vectors, name + "mlp.norm", d.pre_norms)
        self._norm(&layer.mlp_post_norm, vectors, name + "mlp.post_norm", d.post_norms)
        if d.qk_norm is not None:
            layer.q_norm = self._vector(vectors, name + "attn.q_norm.weight", q if d.qk_norm == "all" else d.head_dim)
            layer.k_norm = self._vector(vectors, name + "attn.k_norm.weight", kv if d.qk_norm == "all" else d.head_dim)
        self._matrix(&layer.qkv, weights, vectors, [name + "attn.q", name + "attn.k", name + "attn.v"], hidden,
                     [q, kv, kv], d.attention_bias)
        self._matrix(&layer.o, weights, vectors, [name + "attn.o"], q, [hidden],
                     d.attention_bias if d.attention_out_bias is None else d.attention_out_bias)
        if has_experts:
            return self._experts(layer, name, weights, vectors)
        self._matrix(&layer.up, weights, vectors, [name + "mlp.up"], hidden, [inner], d.mlp_bias)
        if d.mlp_gated:
            self._matrix(&layer.gate, weights, vectors, [name + "mlp.gate"], hidden, [inner], d.mlp_bias)
            layer.gate.quantized |= layer.up.quantized   # the two share an input
        self._matrix(&layer.down, weights, vectors, [name + "mlp.down"], inner, [hidden], d.mlp_bias)
        return 0

    cdef int _matrix(self, Matrix* m, weights, vectors, names, cols, rows, bias) except -1:
        cdef Segment* s
        cdef const uint8_t[::1] data
        m.cols, m.n_segments, m.panels, m.quantized = cols, len(names), 0, False
        for i, (name, n) in enumerate(zip(names, rows)):
            w = weights.get(name + ".weight")
            if w is None:
                raise ValueError(f"{name}.weight is missing")
            if (w.rows, w.cols) != (n, cols):
                raise ValueError(f"{name}.weight is [{w.rows}, {w.cols}], not [{n}, {cols}]")
            data = w.data
            if data.shape[0] != packed_size(w.type, n, cols):
                raise ValueError(f"{name}.weight has {data.shape[0]} bytes, not {packed_size(w.type, n, cols)}")
            self.kept.append(w.data)
            s = &m.segments[i]
            s.data, s.type, s.rows, s.offset = &data[0], type_id(w.type), n, KV_PANEL * m.panels
            s.panels, s.panel_bytes = (n + KV_PANEL - 1) // KV_PANEL, kv_packed_bytes(s.type, KV_PANEL, cols)
            s.bias = self._vector(vectors, name + ".bias", n) if bias else NULL
            m.panels += s.panels
            m.quantized |= kv_weight_of(s.type).takes_int8
        m.width = KV_PANEL * m.panels
        return 0

    cdef const float* _vector(self, vectors, str name, n) except NULL:
        cdef const float[::1] v
        if name not in vectors:
            raise ValueError(f"{name} is missing")
        v = vectors[name]
        if v.shape[0] != n:
            raise ValueError(f"{name} has {v.shape[0]} values, not {n}")
        self.kept.append(vectors[name])
        return &v[0]

    def new_cache(self, **options):
        """A cache for this engine; takes and raises what ``KVCache`` does."""
        return KVCache(self, **options)

    def bytes_held(self, caches):
        """Bytes of sinks, windows and tiles that these caches hold; a tile that several hold counts once."""
        return bytes_held(caches)

    def forward(self, tokens, KVCache kv not None, logits="last", decoding=None):
        """A step of one sequence: returns float32 [vocab_size], [n, vocab_size], [n, hidden_size] or None. Takes and
        raises what ``step`` does."""
        return self.step([(kv, tokens, decoding, logits)])[0]

    def step(self, items):
        """Runs tokens of one or several sequences, and puts them into their caches.

        items: of (cache, tokens, decoding, wants), at least one and at most ``MAX_ITEMS``, each with a cache of its own
        and 1 to ``MAX_CHUNK`` tokens, int32 [n], that follow those in it; ``MAX_ROWS`` in all. decoding: block-quantised
        weights take activations of 16 bits, as for text that is being written, instead of the 8 that do for reading;
        None: when there is one token. wants: the logits of the "last" token, of "all" or "none", or the "hidden" states
        of all, normed as for the head. Returns for each item, in order, what it wants: float32 [vocab_size],
        [n, vocab_size], None, or [n, hidden_size]; those of several items are parts of one array, which lives as long
        as any of them.

        What a sequence gets is the same to the bit whatever runs beside it. Every token sees the cache as it would if
        they were fed one by one; of tokens that are read (`decoding` False), results are the same however they are cut, and
        so they are of those that are written, in pieces of up to ``max_written`` that ``KVCache.verifiable`` allows.
        (A precise engine always uses 16 bits, and so does the head when the last token's logits alone are wanted.) The
        GIL is released. Raises ValueError for tokens outside the vocabulary, too many or none, more than the model has
        learned positions, the same cache twice, RuntimeError when another thread is using one; then nothing has
        changed.
        """
        cdef list parts = []
        cdef _Part part
        for item in items:
            cache, tokens, decoding, wants = item
            ids = self.checked(tokens, cache, wants)
            written = len(ids) == 1 if decoding is None else decoding
            parts.append(_Part(cache, ids, self.precise or written, written, wants))
        if not 1 <= len(parts) <= MAX_ITEMS or sum([len((<_Part>p).ids) for p in parts]) > MAX_ROWS:
            raise ValueError(f"a step has 1 to {MAX_ITEMS} items with at most {MAX_ROWS} tokens")
        part = parts[0]
        if len(parts) == 1:
            with part.kv.lock:
                return self._step(parts)
        if len({id((<_Part>p).kv) for p in parts}) < len(parts):
            raise ValueError("a cache can be in a step only once")
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.kv.lock)
            return self._step(parts)

    def checked(self, tokens, KVCache kv not None, logits, most=MAX_CHUNK):
        """The tokens as int32 [n], if ``forward`` can take them, or another engine that takes `most` at a time;
        ValueError as there."""
        cdef const int32_t[::1] ids = np.ascontiguousarray(tokens, np.int32)
        cdef int64_t n = ids.shape[0], i
        if not 1 <= n <= most:
            raise ValueError(f"a chunk has 1 to {most} tokens, not {n}")
        if (kv.c.n_layers != self.c.n_layers or kv.c.n_kv_heads != self.c.n_kv_heads or kv.c.head_dim != self.c.head_dim
                or kv.sliding_windows != self.sliding_windows):
            raise ValueError("this cache was made for another model")
        for i in range(n):
            if not 0 <= ids[i] < self.c.vocab_size:
                raise ValueError(f"token {ids[i]} is outside the vocabulary of {self.c.vocab_size}")
        if self.positions.n_segments and kv.c.n_tokens + n > self.description.context_length:
            raise ValueError(f"the model has learned {self.description.context_length} positions, and a text cannot be "
                             f"longer: {kv.c.n_tokens + n} tokens")
        if logits not in ("last", "all", "none", "hidden"):
            raise ValueError(f'logits must be "last", "all", "none" or "hidden", not {logits!r}')
        return np.asarray(ids)

    def ropes_of(self, ctx):
        """Rotary tables for caches of `ctx` tokens, which are kept: float64 [tables, head_dim / 2] inv_freq and
        amplitude, int64 [n_layers] of_layer."""
        if ctx not in self.ropes:
            tables, d = self.rope_tables(ctx), self.description
            kept = (np.array(tables.inv_freq, np.float64), np.array(tables.amplitude, np.float64),
                    np.array(tables.of_layer, np.int64))
            if (kept[0].ndim != 2 or kept[0].shape[1] != d.head_dim // 2 or kept[1].shape != kept[0].shape
                    or kept[2].shape != (d.n_layers,) or not 0 <= kept[2].min() <= kept[2].max() < len(kept[0])):
                raise ValueError("rope_tables are not of the shapes that the description says")
            self.ropes.setdefault(ctx, kept)  # the first stays: another thread may be reading it
        return self.ropes[ctx]

    cdef _rope(self, int64_t ctx, Ropes* ropes):
        cdef const double[:, ::1] inv_freq, amplitude
        cdef const int64_t[::1] of_layer
        inv_freq, amplitude, of_layer = self.ropes_of(ctx)
        ropes.n, ropes.inv_freq, ropes.amplitude = inv_freq.shape[0], &inv_freq[0, 0], &amplitude[0, 0]
        ropes.of_layer = &of_layer[0]

    cdef _Arena _take_arena(self):
        """One that no call uses and no late thread is in, or the first that is left."""
        cdef _Arena arena
        for i in range(len(self.arenas) - 1, -1, -1):
            arena = self.arenas[i]
            if not kv_team_busy(arena.team):
                return self.arenas.pop(i)
        if len(self.arenas) < MOST_ARENAS:
            return _Arena()
        arena = self.arenas.pop(0)
        arena.settle()
        return arena

    cdef _step(self, list parts):
        cdef _Arena arena = self._take_arena()
        cdef Call* call = &arena.call
        cdef list order = sorted(parts, key=_is_fine)   # rows of one plane come first
        cdef int most = min(self.threads, <int>cpus.usable()), threads
        cdef bint settle
        cdef kv_team_use use
        cdef float[:, ::1] rows
        cdef _Part part = parts[0]
        try:
            memset(call, 0, sizeof(Call))
            call.kern, call.config, call.layers = kernels(), &self.c, self.layers
            call.embed, call.head, call.norm, call.positions = &self.embed, &self.head, &self.norm, &self.positions
            self._count_rows(call, parts)
            pace = part.kv.pace if call.rows == 1 and most > 1 else None
            threads = most if pace is None else pace.threads(most)
            for part in parts:
                part.kv.reserve(len(part.ids))
            arena.count()
            self._buffers(arena, call, order, threads)
            arena.allocate()
            self._buffers(arena, call, order, threads)
            self._plan(call, order)
            logits = hidden = None
            if call.n_wanted[ONE] + call.n_wanted[TWO]:
                rows = logits = np.empty((call.n_wanted[ONE] + call.n_wanted[TWO], self.head.width), np.float32)
                call.logits = &rows[0, 0]
            if "hidden" in [(<_Part>p).wants for p in parts]:
                rows = hidden = np.empty((call.rows, self.c.hidden_size), np.float32)
                call.hidden = &rows[0, 0]
            settle = call.rows > FEW_TOKENS
            with nogil:
                use = kv_team_run(arena.team, threads, forward, call)
                if settle:
                    kv_team_settle(arena.team)
            for part in parts:
                part.kv.read_by(arena)
                part.kv.append(len(part.ids))
            if pace is not None:
                pace.took(use.threads, most, use.seconds, use.waiting)
            results = self._results(parts, order, logits, hidden)
        finally:
            for part in parts:
                part.kv.unreserve()
            self.arenas.append(arena)
        for part in parts:
            part.kv.grown()
        return results

    cdef int _count_rows(self, Call* call, list parts) except -1:
        cdef _Part part
        for part in parts:
            call.n[TWO if part.fine else ONE] += len(part.ids)
            if part.wants == "last":
                call.n_wanted[TWO] += 1
            elif part.wants == "all":
                call.n_wanted[TWO if part.fine else ONE] += len(part.ids)
        call.rows = call.n[ONE] + call.n[TWO]
        call.items.n = len(parts)
        return 0

    cdef int _plan(self, Call* call, list order) except -1:
        """Plans every item's attention, and says which rows are whose and whose logits are wanted."""
        cdef int64_t row = 0, t, n, at
        cdef int64_t next_wanted[2]
        cdef const int32_t[::1] ids
        cdef int32_t i = 0
        cdef _Part part
        next_wanted[ONE], next_wanted[TWO] = 0, call.n_wanted[ONE]
        for part in order:
            ids = part.ids
            n, all_wanted, last_wanted = ids.shape[0], part.wants == "all", part.wants == "last"
            plan_queries(&call.items.item[i].plan)
            for t in range(n):
                call.tokens[row + t], call.item_of[row + t] = ids[t], i
                if all_wanted or (last_wanted and t == n - 1):
                    at = TWO if part.fine or last_wanted else ONE
                    call.wanted[next_wanted[at]] = <int32_t>(row + t)
                    next_wanted[at] += 1
            row, i = row + n, i + 1
        plan_groups(&call.items)
        return 0

    cdef list _results(self, list parts, list order, logits, hidden):
        """What each item wants, from the rows of all, which are in the order that `_plan` gives them."""
        cdef _Part part
        cdef dict results = {}
        cdef int64_t row = 0, coarse = 0, fine = 0, n, n_wanted, vocab = self.c.vocab_size
        for part in parts:
            if part.wants == "all" and not part.fine:
                fine += len(part.ids)
        for part in order:
            n = len(part.ids)
            if part.wants == "hidden":
                results[part] = hidden[row:row + n]
            elif part.wants == "all" and not part.fine:
                results[part] = logits[coarse : coarse + n, :vocab]
                coarse += n
            elif part.wants != "none":
                n_wanted = 1 if part.wants == "last" else n
                result = logits[fine : fine + n_wanted, :vocab]
                results[part] = result[0] if part.wants == "last" else result
                fine += n_wanted
            row += n
        return [results.get(part) for part in parts]

    cdef int _buffers(self, _Arena arena, Call* call, list order, int threads) except -1:
        cdef RunState* run = &call.run
        cdef int64_t n = call.rows, rows = max(n, <int64_t>threads)
        cdef int64_t gates = whole_panels(self.c.intermediate_size)
        cdef int64_t widest = max(self.c.hidden_size, self.c.n_heads * self.c.head_dim, self.c.intermediate_size)
        run.input_width = whole_panels(widest)
        run.x = <float*>arena.take(4 * n * self.c.hidden_pad)
        run.input = <float*>arena.take(4 * rows * run.input_width)
        run.codes, run.own_blocks = self._codes(arena, rows, widest), 2 * ((widest + KV_BLOCK - 1) // KV_BLOCK)
        run.qkv = <float*>arena.take(4 * n * self.layers[0].qkv.width)
        run.gate = <float*>arena.take(4 * n * gates)
        run.branch = <float*>arena.take(4 * n * self.c.hidden_pad if self.c.branch else 0)
        run.own = <float*>arena.take(2 * 4 * threads * OWN_FLOATS)
        call.tokens = <int32_t*>arena.take(4 * n)
        call.item_of = <int32_t*>arena.take(4 * n)
        call.wanted = <int32_t*>arena.take(4 * n)
        if self.c.n_experts:
            self._expert_buffers(arena, run, n)
        return self._item_buffers(arena, call, order, threads)

    cdef int _item_buffers(self, _Arena arena, Call* call, list order, int threads) except -1:
        """Of the attention of each item; scratch is a thread's, whatever the item."""
        cdef Item* item
        cdef Item counted
        cdef Ropes ropes
        cdef _Part part
        cdef int64_t i = 0, row = 0, members = 0, kinds = (<_Part>order[0]).kv.c.n_kinds, n
        call.items.item = <Item*>arena.take(len(order) * sizeof(Item))
        for part in order:
            n = len(part.ids)
            item = &counted if arena.counting else &call.items.item[i]
            memset(item, 0, sizeof(Item))
            self._rope(part.kv.ctx, &ropes)
            plan_chunk(&item.plan, call.kern, &part.kv.c, &ropes, part.kv.c.n_tokens, n, self.c.n_heads,
                       self.c.attention_scale, self.c.attention_softcap, part.written)
            item.row, item.plan.shares = row, part.kv.pool.n_caches > 1
            members += most_members(&item.plan)
            plan_buffers(&item.plan, <uint8_t*>arena.take(plan_buffers(&item.plan, NULL)))
            call.items.scratch_floats = max(call.items.scratch_floats, item.plan.scratch_floats)
            row, i = row + n, i + 1
        items_buffers(&call.items, kinds, members,
                      <uint8_t*>arena.take(items_buffers(&call.items, kinds, members, NULL)))
        call.items.scratch = <float*>arena.take(4 * threads * call.items.scratch_floats)
        return 0

    cdef Codes _codes(self, _Arena arena, int64_t rows, int64_t cols) noexcept:
        cdef Codes codes
        cdef int64_t blocks = 2 * rows * ((cols + KV_BLOCK - 1) // KV_BLOCK)
        codes.q = <int8_t*>arena.take(blocks * KV_BLOCK)
        codes.scale = <float*>arena.take(4 * blocks)
        codes.sum = <int32_t*>arena.take(4 * blocks)
        codes.offset = <int32_t*>arena.take(8 * blocks)
        return codes

    cdef void _expert_buffers(self, _Arena arena, RunState* run, int64_t n) noexcept:
        cdef int64_t slots = n * self.c.experts_used, width = whole_panels(self.c.expert_size)
        run.router = <float*>arena.take(4 * n * whole_panels(self.c.n_experts))
        run.chosen = <int32_t*>arena.take(4 * slots)
        run.share = <float*>arena.take(4 * slots)
        run.slot_of = <int32_t*>arena.take(4 * slots)
        run.slot_choice = <int32_t*>arena.take(4 * slots)
        run.first = <int32_t*>arena.take(4 * (self.c.n_experts + 1))
        run.middle = <int32_t*>arena.take(4 * self.c.n_experts)
        run.next = <int32_t*>arena.take(4 * self.c.n_experts)
        run.active = <int32_t*>arena.take(4 * self.c.n_experts)
        run.n_active = <int64_t*>arena.take(8)
        run.slot_input = <float*>arena.take(4 * slots * run.input_width)
        run.slot_codes = self._codes(arena, slots, max(self.c.hidden_size, self.c.expert_size))
        run.slot_gate = <float*>arena.take(4 * slots * width)
        run.slot_out = <float*>arena.take(4 * slots * self.c.hidden_pad)
