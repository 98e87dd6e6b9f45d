"""What a runtime's process does with several texts: kvrun's engine, and a stand-in for llama.cpp's functions."""

import ctypes
import itertools
import struct
import sys
from types import SimpleNamespace

import numpy as np
import peers_llama
import peers_worker
import pytest

from support import needs
from support.make_checkpoint import save_gguf

VOCAB, DEPTH, TEXTS, ROOM = 40, 20, 3, 6
TYPES = {"f16": (1, 1), "q8_0": (8, 8), "q8_KV/q8_0": (151, 8), "q8_0/f16": (8, 1)}  # GGML's, of K and V


# --- kvrun -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kvrun(tmp_path_factory):
    """A worker with a small random model."""
    needs.module("gguf", "gguf")
    folder = tmp_path_factory.mktemp("peers")
    save_gguf(folder / "a.gguf")
    worker = peers_worker.Worker()
    answer = worker.load(
        runtime="kvrun",
        caches=["f16", "q4"],
        several=True,
        gguf=str(folder / "a.gguf"),
        scratch=str(folder),
        threads=1,
        vocab=VOCAB,
        layers=2,
        kv_heads=2,
        head_dim=16,
    )
    assert (answer["caches"], answer["of_several"]) == ({"f16": "f16", "q4": "q4"}, [])
    return worker


@pytest.mark.parametrize("cache", ["f16", "q4"])
@pytest.mark.parametrize("depth, shared", [(0, 0), (20, 0), (20, 7), (20, 20)])
def test_texts_of_kvrun_get_the_same_together_as_alone(kvrun, cache, depth, shared):
    made = kvrun.prepare_together(cache, depth, TEXTS, shared, ROOM)
    assert made["same_as_alone"] and made["kl_from_alone"] == 0
    caches = kvrun.kept[cache, depth, TEXTS]
    assert made["kv_bytes"] == sum(kv.nbytes for kv in caches)
    found = kvrun.decode_together(cache, depth, TEXTS, 5, 1e9)
    assert found["tokens"] == 5 * TEXTS and len(found["step_seconds"]) == 5
    assert sum(found["step_seconds"]) == pytest.approx(found["seconds"], abs=1e-5)
    assert [kv.n_tokens for kv in caches] == [depth] * TEXTS
    kvrun.release()


def test_only_the_beginning_of_texts_is_shared(kvrun, monkeypatch):
    seen = {}
    monkeypatch.setattr(kvrun.runtime, "fill", lambda state, texts, shared: seen.update(texts=texts) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kvrun.prepare_together("f16", 30, TEXTS, 10, ROOM)
    kvrun.release()
    texts = seen["texts"]
    assert texts.shape == (TEXTS, 31) and texts.dtype == np.int32
    assert (texts[:, :10] == texts[0, :10]).all()
    assert all((a[10:] != b[10:]).any() for a, b in itertools.pairwise(texts))


def test_a_run_ends_after_its_time_but_has_four_steps(kvrun):
    kvrun.prepare_together("q4", DEPTH, TEXTS, 0, ROOM)
    assert kvrun.decode_together("q4", DEPTH, TEXTS, 5, 0)["tokens"] == 4 * TEXTS
    kvrun.prepare("q4", DEPTH, ROOM)
    assert kvrun.decode("q4", DEPTH, 5, 0)["tokens"] == 4
    kvrun.release()


# --- llama.cpp ---------------------------------------------------------------------------------------


class Params(ctypes.Structure):
    """What packages declare, as far as it is set."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        *((name, ctypes.c_int) for name in ("flash_attn_type", "type_k", "type_v")),
        ("kv_unified", ctypes.c_bool),
    ]


class ParamsOfFork(ctypes.Structure):
    _fields_ = [(name.replace("_type", ""), kind) for name, kind in Params._fields_[:-1]]


def undeclared():
    """Defaults as a package without declarations has them."""
    words = [0] * 40
    words[:4], words[8:12], words[20:22] = [512, 2048, 512, 1], [-1] * 4, [1, 1]
    words[26:28] = [0x01010100, 0x0001]
    params = peers_llama.Opaque()
    ctypes.memmove(params.data, struct.pack("<40i", *words), 160)
    return params


class Context:
    """{sequence: its tokens}, and the predictions after the last batch."""

    def __init__(self, params):
        if isinstance(params, peers_llama.Opaque):
            words = struct.unpack("<40i", bytes(params.data)[:160])
            self.n_ctx, self.n_seq_max, flash, types = words[0], words[3], words[11], words[20:22]
            unified = params.data[109]
        else:
            self.n_ctx, self.n_seq_max, types = params.n_ctx, params.n_seq_max, (params.type_k, params.type_v)
            flash = params.flash_attn if isinstance(params, ParamsOfFork) else params.flash_attn_type
            unified = getattr(params, "kv_unified", True)
        self.flash = bool(flash)
        self.types, self.unified = types, bool(unified) or self.n_seq_max == 1
        self.texts = {i: [] for i in range(self.n_seq_max)}
        self.batches, self.rows = [], []

    def full(self):
        sizes = [len(text) for text in self.texts.values()]
        return sum(sizes) > self.n_ctx if self.unified else max(sizes) > self.n_ctx // self.n_seq_max


class Library:
    """Functions of llama.cpp over lists of tokens: predictions depend on all tokens of a sequence and on nothing else.

    Batches in which a token does not follow those of its sequence fail, as do those that the cache has no cells for.
    """

    def __init__(self, params, blurred=False):
        self.fork, self.params, self.blurred = params is ParamsOfFork, params, blurred
        self.contexts, self.made, self.handed_over = {}, 0, 0
        for name in dir(self):
            if name.startswith("_do_"):
                # Functions, which take attributes; methods do not.
                body, shown = getattr(self, name), name[4:].replace("memory", "kv_cache") if self.fork else name[4:]
                setattr(self, shown, lambda *arguments, body=body: body(*arguments))

    def _do_llama_backend_init(self):
        pass

    def _do_llama_model_default_params(self):
        return type("ModelParams", (), {})()

    def _do_llama_context_default_params(self):
        return self.params()

    def _do_llama_model_load_from_file(self, path, params):
        self.model_params = params
        return 1

    def _do_llama_init_from_model(self, model, params):
        self.made += 1
        self.contexts[self.made] = Context(params)
        return self.made

    def _do_llama_set_n_threads(self, handle, n, n_batch):
        self.contexts[handle].threads = n, n_batch

    def _do_llama_n_ctx(self, handle):
        return self.contexts[handle].n_ctx

    def _do_llama_n_ctx_seq(self, handle):
        context = self.contexts[handle]
        return context.n_ctx // (1 if context.unified else context.n_seq_max)

    def _do_llama_free(self, handle):
        del self.contexts[handle]

    def _do_llama_batch_init(self, n, embd, n_seq_max):
        numbers = [(ctypes.c_int32 * n)() for _ in range(3)]
        ids, logits = [(ctypes.c_int32 * n_seq_max)() for _ in range(n)], (ctypes.c_int8 * n)()
        pointer = ctypes.POINTER(ctypes.c_int32)
        seq_id = (pointer * n)(*(ctypes.cast(each, pointer) for each in ids))
        self.keep = [numbers, ids, logits, seq_id]
        token, pos, n_seq_id = (ctypes.cast(each, pointer) for each in numbers)
        flags = ctypes.cast(logits, ctypes.POINTER(ctypes.c_int8))
        return peers_llama.Batch(0, token, None, pos, n_seq_id, ctypes.cast(seq_id, ctypes.POINTER(pointer)), flags)

    def _do_llama_decode(self, handle, batch):
        context = self.contexts[handle]
        context.batches.append(batch.n_tokens)
        context.rows = []
        for i in range(batch.n_tokens):
            text = context.texts[batch.seq_id[i][0]]
            if batch.n_seq_id[i] != 1 or batch.pos[i] != len(text):
                return 1
            text.append(batch.token[i])
            context.rows.append(self.predictions(context, text) if batch.logits[i] else None)
        return 2 if context.full() else 0

    def predictions(self, context, text):
        seed = [*text, len(context.texts)] if self.blurred else text  # blurred: by how many texts there are
        return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)

    def _do_llama_synchronize(self, handle):
        pass

    def _do_llama_print_system_info(self):
        return b"CPU : AVX2 = 1 | SSE3 = 1 | AVX512 = 0 | "

    def _do_llama_get_logits_ith(self, handle, i):
        return self.contexts[handle].rows[i].ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def _do_ggml_row_size(self, kind, n):
        return kind * n

    def _do_llama_get_memory(self, handle):
        return handle

    def _do_llama_memory_seq_rm(self, handle, sequence, start, end):
        del self.contexts[handle].texts[sequence][start:]
        return end == -1

    def _do_llama_memory_seq_cp(self, handle, source, target, start, end):
        assert (start, end) == (-1, -1)
        self.contexts[handle].texts[target] = list(self.contexts[handle].texts[source])

    def _do_llama_state_seq_get_size(self, handle, sequence, *flags):
        assert flags == (0,) * self.fork
        return 4 * len(self.contexts[handle].texts[sequence])

    def _do_llama_state_seq_get_data(self, handle, data, size, sequence, *flags):
        text = np.array(self.contexts[handle].texts[sequence], np.int32).tobytes()
        ctypes.memmove(data, text, len(text))
        return len(text)

    def _do_llama_state_seq_set_data(self, handle, data, size, sequence, *flags):
        self.handed_over += 1
        self.contexts[handle].texts[sequence] = np.frombuffer(data[:size], np.int32).tolist()
        return size


@pytest.fixture(params=["ik_llama.cpp", "llama.cpp (llama-cpp-python)", "llama.cpp (xllamacpp)"])
def runtime(request, monkeypatch):
    """(its name, what makes a worker with a stand-in for its library, and that library)."""
    declared = {"ik_llama.cpp": ParamsOfFork, "llama.cpp (llama-cpp-python)": Params}.get(request.param)

    def made(blurred=False):
        library = Library(declared or undeclared, blurred)
        api = SimpleNamespace(_lib=library, llama_context_params=declared, llama_model_params=object)
        monkeypatch.setitem(sys.modules, "ik_llama_cpp._ctypes_api", api)
        monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", api)
        monkeypatch.setitem(sys.modules, "xllamacpp.xllamacpp", SimpleNamespace(__file__="x.so"))
        monkeypatch.setattr(peers_llama.ctypes, "CDLL", lambda name: library)
        worker = peers_worker.Worker()
        shape = {"vocab": VOCAB, "layers": 2, "kv_heads": 2, "head_dim": 16}
        worker.answer = worker.load(
            runtime=request.param, caches=["f16", "q8"], several=True, gguf="x", scratch="y", threads=2, **shape
        )
        return worker, library

    return request.param, made


def test_caches_of_several_texts(runtime):
    name, made = runtime
    answer = made()[0].answer
    kinds = {"f16": "f16", "q8_0": "q8"}
    if name == "ik_llama.cpp":
        kinds, more = {**kinds, "q8_KV/q8_0": "q8"}, {"f16 no flash": "f16", "q8_0/f16 no flash": "q8"}
    else:
        more = {f"{cache} unified": kind for cache, kind in kinds.items()}
    assert answer["caches"] == {**kinds, **more} and answer["of_several"] == list(more)
    assert answer["built"] == "AVX2 SSE3"


@pytest.mark.parametrize("depth, shared", [(0, 0), (1, 0), (DEPTH, 0), (600, 0), (DEPTH, 7), (DEPTH, DEPTH)])
def test_texts_get_the_same_together_as_alone(runtime, depth, shared):
    name, made = runtime
    worker, library = made()
    for cache in worker.answer["caches"]:
        found = worker.prepare_together(cache, depth, TEXTS, shared, ROOM)
        assert found["same_as_alone"] and found["kl_from_alone"] == 0
        (context,) = library.contexts.values()  # those of texts alone are freed
        assert [len(text) for text in context.texts.values()] == [depth] * TEXTS
        assert context.flash == (not cache.endswith("no flash"))
        assert context.unified == (name == "ik_llama.cpp" or cache.endswith("unified"))
        handed_over = context.unified and depth and not shared and cache != "q8_KV/q8_0"
        assert library.handed_over == (TEXTS if handed_over else 0)
        assert context.types == TYPES[cache.removesuffix(" unified").removesuffix(" no flash")]
        assert context.threads == (2, 2)
        assert found["kv_bytes"] == 2 * 2 * 16 * sum(context.types) * context.n_ctx
        context.batches.clear()
        run = worker.decode_together(cache, depth, TEXTS, 5, 1e9)
        assert run["tokens"] == 5 * TEXTS and context.batches == [TEXTS] * 6  # the first is not timed
        assert [len(text) for text in context.texts.values()] == [depth] * TEXTS
        worker.release()
        assert not library.contexts
        library.handed_over = 0


def test_texts_that_get_something_else_together_are_noticed(runtime):
    worker, _ = runtime[1](blurred=True)
    found = worker.prepare_together("q8_0", DEPTH, TEXTS, 0, ROOM)
    assert not found["same_as_alone"] and found["kl_from_alone"] > 0.1


def test_a_cache_that_is_laid_out_otherwise_is_not_taken(runtime, monkeypatch):
    name, made = runtime
    worker, library = made()
    monkeypatch.setattr(library, "llama_n_ctx_seq", lambda handle: 1)
    if name == "ik_llama.cpp":  # has but one way
        assert worker.prepare_together("f16", DEPTH, TEXTS, 0, ROOM)["same_as_alone"]
        return
    for cache in ("f16", "f16 unified"):
        with pytest.raises(RuntimeError, match=f"3 texts do not stand in a {cache} cache as they should"):
            worker.prepare_together(cache, DEPTH, TEXTS, 0, ROOM)
    assert not library.contexts
    assert worker.prepare_together("f16", DEPTH, 1, 0, ROOM)["same_as_alone"]


def test_single_texts_are_measured_as_before(runtime):
    worker, library = runtime[1]()
    worker.prepare("f16", DEPTH, ROOM)
    (context,) = library.contexts.values()
    context.batches.clear()
    assert worker.decode("f16", DEPTH, 5, 1e9)["tokens"] == 5
    assert context.batches == [1] * 6 and len(context.texts[0]) == DEPTH
    assert worker.prefill("f16", 600)["tokens"] == 600


def test_more_than_there_is_room_for_fails(runtime):
    worker, _ = runtime[1]()
    worker.prepare_together("f16", 250, TEXTS, 0, ROOM)
    with pytest.raises(RuntimeError, match="llama_decode failed with 2"):
        worker.decode_together("f16", 250, TEXTS, ROOM + 1, 1e9)


def test_divergence_is_the_largest_of_the_rows():
    p = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    q = np.log(np.array([[0.5, 0.5], [0.5, 0.5]], np.float32)) + 3
    expected = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert peers_worker.divergence(p, q) == pytest.approx(expected, rel=1e-6)
    assert peers_worker.divergence(p, p) == 0
