"""Sessions that are cut, forked, saved and restored; and the reuse of what two prompts begin with."""

import itertools
import json
import os
import random
import re

import numpy as np
import pytest
from safetensors import safe_open

import kvrun
from kvrun import _core
from kvrun.commands import main as cli
from kvrun.errors import KvrunError, ModelFileError, OptionError
from support.fakes import END, FakeModel
from support.files import rewrite
from support.sessions import GO_ON, saved_tokens, talked, text


@pytest.fixture(scope="module")
def model(converted):
    """Tiny, with a chat template; its answers are nonsense."""
    return kvrun.load(converted("grouped-tied"))


def twins(make):
    """Two sessions with the same past: one to be saved, forked or cut, one to compare with."""
    return make(), make()


# --- save and restore -----------------------------------------------------------------------------


@pytest.mark.parametrize("kv", list(_core.KV_FORMATS))
@pytest.mark.parametrize("ctx", [200, 2048])
def test_a_restored_session_goes_on_as_if_nothing_had_been(model, kv, ctx, tmp_path):
    """Text, messages, logits and counts; also for one that has evicted tokens."""
    kept, saved = twins(lambda: talked(model, kv=kv, ctx=ctx))
    for _n in range(3):
        saved.save(tmp_path / "s.kv")
        restored = model.restore(tmp_path / "s.kv")
        assert (restored.n_tokens, restored.messages, restored.cache, restored.kv_bytes) == (
            kept.n_tokens,
            kept.messages,
            kept.cache,
            kept.kv_bytes,
        )
        expected = text(kept.stream("More", repeat_penalty=1.2, **GO_ON))
        assert text(restored.stream("More", repeat_penalty=1.2, **GO_ON)) == expected
        assert restored.stats.prompt_tokens == kept.stats.prompt_tokens  # nothing was fed again
        assert np.array_equal(restored.evaluate(), kept.evaluate())
        saved = restored
    assert kept.n_tokens > 200


def test_plain_text_and_logits(model, tmp_path):
    kept, saved = twins(model.session)
    for session in (kept, saved):
        text(session.stream("Once upon a time", raw=True, **GO_ON))
        assert session.evaluate() is not None
    saved.save(tmp_path / "s.kv")
    restored = model.restore(tmp_path / "s.kv")
    assert np.array_equal(restored.evaluate(), kept.evaluate()) and restored.messages == []
    assert text(restored.stream([], **GO_ON)) == text(kept.stream([], **GO_ON))


def test_an_empty_session(model, tmp_path):
    model.session(ctx=300, sinks=0).save(tmp_path / "s.kv")
    restored = model.restore(tmp_path / "s.kv")
    assert restored.n_tokens == 0 and restored.cache.ctx == 300
    assert text(restored.stream("a", **GO_ON)) == model.generate("a", ctx=300, sinks=0, **GO_ON)


def test_saving_ends_an_answer_that_is_under_way(model, tmp_path):
    session = model.session()
    stream = session.stream("a", **GO_ON)
    shown = "".join(itertools.islice(stream, 5))
    session.save(tmp_path / "s.kv")
    assert list(stream) == []
    assert model.restore(tmp_path / "s.kv").messages[-1] == {"role": "assistant", "content": shown}


def test_any_conversation_can_be_saved(model, tmp_path):
    session = model.session()
    told = [{"role": "user", "content": 'ü🚀\ufdd0 "\\ \u2028<|im_end|>', "name": "x\ud800"[:1]}]
    text(session.stream(told, **GO_ON))
    session.save(tmp_path / "s.kv")
    assert model.restore(tmp_path / "s.kv").messages == session.messages


def test_the_file_is_safetensors(model, tmp_path):
    session = talked(model, kv="f16")
    list(session.stream([], max_tokens=0))
    assert session.logits.shape == (model.vocab_size,)
    session.save(tmp_path / "s.kv")
    with safe_open(tmp_path / "s.kv", "numpy") as file:
        assert list(file.keys()) == ["kv", "logits", "tokens"]
        meta = file.metadata()
        assert file.get_tensor("tokens").shape == (session.n_tokens,)
        assert np.array_equal(file.get_tensor("logits"), session.logits)
    assert meta["format"] == "kvrun-session" and meta["model"] == model.file.fingerprint
    assert json.loads(meta["cache"]) == {
        "k": "f16",
        "v": "f16",
        "ctx": session.cache.ctx,
        "sinks": 4,
        "window": session.cache.window,
        "n_tokens": session.n_tokens,
        "lost": 0,
    }


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_saving_replaces_a_file_or_leaves_it(model, tmp_path, monkeypatch):
    path = tmp_path / "s.kv"
    session = talked(model)
    session.save(path)
    before = path.read_bytes()
    session.messages = [{"role": "user", "content": object()}]
    with pytest.raises(KvrunError, match="not JSON"):
        session.save(path)
    session.reset()
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full_disk)
        with pytest.raises(ModelFileError, match="No space left"):
            session.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["s.kv"]
    session.save(path)
    assert model.restore(path).n_tokens == 0


@pytest.mark.parametrize("name", ["", "no/such/folder/s.kv", "\0"])
def test_paths_that_cannot_be(model, tmp_path, name):
    path = f"{tmp_path}/{name}"
    for refused in (model.session().save, model.restore):
        with pytest.raises(ModelFileError) as error:
            refused(path)
        assert "\n" not in str(error.value)


# --- files that are refused -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The bytes of a session file, and where its data begins."""
    session = model.session(ctx=200, kv="f32")
    text(session.stream("Hello there", **GO_ON))
    assert len(session.evaluate())
    path = tmp_path_factory.mktemp("saved") / "s.kv"
    session.save(path)
    data = path.read_bytes()
    return data, 8 + int.from_bytes(data[:8], "little")


def refused(model, path, data, *words):
    rewrite(path, data)
    with pytest.raises(ModelFileError) as error:
        model.restore(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message, message
    for word in words:
        assert word in message, message


def test_every_byte_counts(model, saved, tmp_path):
    """Any byte changed to any other, in the length, the header, its padding or any tensor."""
    data, start = saved
    rng = random.Random(1)
    places = [*range(8), *rng.sample(range(8, start), 250), *range(start - 64, start), start, len(data) - 1]
    for place in places + rng.sample(range(start, len(data)), 100):
        changed = bytearray(data)
        changed[place] ^= rng.choice([1, 0x20, 0x2A, 0x29, 0x2D, 0x80, 0xFF])
        refused(model, tmp_path / "s.kv", changed)


def test_every_length_counts(model, saved, tmp_path):
    data, start = saved
    rng = random.Random(2)
    lengths = [0, 1, 7, 8, 9, 10, start - 1, start, start + 1, len(data) - 1]
    for length in lengths + rng.sample(range(len(data)), 60):
        refused(model, tmp_path / "s.kv", data[:length])
    refused(model, tmp_path / "s.kv", data[: start + 100], "truncated")
    refused(model, tmp_path / "s.kv", data + b"\0", "not")
    refused(model, tmp_path / "s.kv", data + data)


def with_meta(data, start, **changes):
    """The file with other metadata and a header that agrees with it."""
    from kvrun.files.model_file import header_checksum
    from kvrun.files.model_writer import header_bytes

    header = json.loads(data[8:start])
    meta = {**header["__metadata__"], **changes}
    meta["header_checksum"] = header_checksum(meta)
    return header_bytes("", {**header, "__metadata__": meta}) + data[start:]


def changed_json(data, start, field, **changes):
    value = json.loads(json.loads(data[8:start])["__metadata__"][field])
    return with_meta(data, start, **{field: json.dumps({**value, **changes})})


def test_another_model(model, saved, converted, tmp_path):
    (tmp_path / "s.kv").write_bytes(saved[0])
    for other in (converted("wide"), converted("grouped-tied", "q8_0")):
        with pytest.raises(ModelFileError, match="saved with another model"):
            kvrun.load(other).restore(tmp_path / "s.kv")


def test_another_format_or_version(model, saved, converted, tmp_path):
    data, start = saved
    refused(model, tmp_path / "s.kv", with_meta(data, start, version="3"), "version '3'", "reads versions 1 and 2")
    refused(model, tmp_path / "s.kv", with_meta(data, start, version="1"), "its metadata fields are not those")
    refused(model, tmp_path / "s.kv", with_meta(data, start, format="kvrun"), "not a kvrun session file")
    refused(model, tmp_path / "s.kv", b"GGUF" + bytes(100), "not a kvrun session file")
    with pytest.raises(ModelFileError, match="not a kvrun session file"):
        model.restore(converted("grouped-tied"))
    (tmp_path / "s.kv").write_bytes(data)
    with pytest.raises(ModelFileError):
        kvrun.load(tmp_path / "s.kv")


@pytest.mark.parametrize(
    "field, changes",
    [
        ("cache", {"k": "q9"}),
        ("cache", {"k": 3}),
        ("cache", {"v": "f16"}),
        ("cache", {"ctx": 100}),
        ("cache", {"ctx": 1 << 40}),
        ("cache", {"ctx": "200"}),
        ("cache", {"sinks": -1}),
        ("cache", {"window": 64.0}),
        ("cache", {"window": None}),
        ("cache", {"n_tokens": 3}),
        ("cache", {"n_tokens": -3}),
        ("cache", {"n_tokens": 1 << 70}),
        ("cache", {"n_tokens": True}),
        ("cache", {"lost": 1}),
        ("cache", {"lost": -1}),
        ("cache", {"more": 1}),
        ("conversation", {"pending": [1, 2]}),
        ("conversation", {"pending": [-1]}),
        ("conversation", {"recent": [10**6]}),
        ("conversation", {"recent": 3}),
        ("conversation", {"text": 3}),
        ("conversation", {"messages": 3}),
        ("conversation", {"messages": [3]}),
        ("conversation", {"messages": [{"role": "user"}]}),
        ("checksums", {"kv": None}),
        ("checksums", {"kv": "0" * 64}),
        ("checksums", {"x": ""}),
    ],
    ids=str,
)
def test_contents_that_make_no_sense(model, saved, tmp_path, field, changes):
    """Headers that agree with themselves, but with no session."""
    refused(model, tmp_path / "s.kv", changed_json(*saved, field, **changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("kv"),
        lambda h: h.pop("logits"),
        lambda h: h["kv"].update(dtype="I8"),
        lambda h: h["kv"].update(shape=[3]),
        lambda h: h["kv"].update(data_offsets=[0, -1]),
        lambda h: h["kv"].update(data_offsets=[0, 1 << 62], shape=[1 << 62]),
        lambda h: h["kv"].update(data_offsets=None),
        lambda h: h["tokens"].update(data_offsets=[0, 4]),
        lambda h: h.update(more=h["kv"]),
        lambda h: h.update(tokens=3),
        lambda h: h["__metadata__"].pop("model"),
        lambda h: h["__metadata__"].update(model=3),
        lambda h: h.update(__metadata__=[]),
    ],
)
def test_tensors_that_make_no_sense(model, saved, tmp_path, change):
    from kvrun.files.model_writer import header_bytes

    data, start = saved
    header = json.loads(data[8:start])
    change(header)
    refused(model, tmp_path / "s.kv", header_bytes("", header) + data[start:])


# --- truncate and fork ----------------------------------------------------------------------------


def test_truncate_and_go_on(model):
    """What follows is what would have followed; the logits are there again."""
    ids = model.tokenize("The quick brown fox jumps over the lazy dog" + ", and so on" * 5)
    for n in (1, 5, len(ids) - 1):
        cut, short = model.session(kv="f32"), model.session(kv="f32")
        text(cut.stream(ids, **GO_ON))
        cut.truncate(n)
        text(short.stream(ids[:n], max_tokens=0))
        assert cut.n_tokens == n == short.n_tokens
        assert np.allclose(cut.evaluate(), short.logits, rtol=1e-4, atol=1e-4)
        assert text(cut.stream(ids[n:], **GO_ON)) == text(short.stream(ids[n:], **GO_ON))
    cut.truncate(0)
    with pytest.raises(KvrunError, match="no logits"):
        cut.evaluate()
    assert text(cut.stream("a", **GO_ON)) == model.generate("a", kv="f32", **GO_ON)


def test_truncate_what_was_not_fed_yet(model):
    session = model.session()
    text(session.stream("a", max_tokens=5, ignore_eos=True))
    n = session.n_tokens
    session.truncate(n)
    assert session.messages
    session.truncate(n - 1)
    assert session.n_tokens == n - 1 and session.messages == [] and len(session.evaluate())


def test_truncate_after_evictions(model, tmp_path):
    session = model.session(ctx=132)
    text(session.stream("a", max_tokens=400, seed=1, ignore_eos=True))
    n, messages = session.n_tokens, session.messages
    for gone in (n - 250, 5):
        with pytest.raises(OptionError, match="have left the cache"):
            session.truncate(gone)
    assert session.n_tokens == n and session.messages == messages
    session.truncate(n - 20)
    assert session.n_tokens == n - 20
    session.save(tmp_path / "s.kv")
    for cut in (session, session.fork(), model.restore(tmp_path / "s.kv")):
        with pytest.raises(KvrunError, match="no logits"):  # their token is not known any more
            cut.evaluate()
    text(session.stream([3], **GO_ON))
    assert session.n_tokens == n + 11 and np.isfinite(session.evaluate()).all()


@pytest.mark.parametrize("n", [-1, 1.5, "x", None, True, 10**9])
def test_lengths_that_cannot_be(model, n):
    session = model.session()
    text(session.stream("a", max_tokens=3))
    before = session.n_tokens
    with pytest.raises(OptionError, match="^n: "):
        session.truncate(n)
    assert session.n_tokens == before and session.messages


def test_forks_go_their_own_ways(model):
    origin, other = twins(lambda: talked(model, ctx=200))
    fork = origin.fork()
    a = text(origin.stream("One way", **GO_ON))
    b = text(fork.stream("Another", **GO_ON))
    second = other.fork()
    assert text(second.stream("One way", **GO_ON)) == a
    assert text(other.stream("Another", **GO_ON)) == b
    assert fork.messages == other.messages and np.array_equal(fork.evaluate(), other.evaluate())
    fork.messages[0]["content"] = fork.logits[:] = 0
    assert origin.messages == second.messages and np.array_equal(origin.evaluate(), second.evaluate())
    assert fork.kv_bytes == origin.kv_bytes


# --- reuse of what two prompts begin with ---------------------------------------------------------


@pytest.fixture
def fake():
    return FakeModel()


USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_messages_that_begin_alike_feed_only_the_rest(fake):
    fake.says("one", "two")
    session = fake.session()
    text(session.stream("What is a cat?"))
    assert text(session.stream([{"role": "user", "content": "What is a dog?"}])) == "two"
    assert fake.fed == USER.format("What is a dog?") + "two"
    assert session.stats.prompt_tokens == len(fake.tokenize("dog?<|im_end|>\n<|im_start|>assistant\n"))
    assert session.n_tokens == len(fake.engine.fed)


def test_the_same_again_feeds_one_token(fake):
    fake.says("one", "two")
    session = fake.session()
    told = [{"role": "user", "content": "a"}]
    assert text(session.stream(told)) == "one" and text(session.stream(told)) == "two"
    assert fake.fed == USER.format("a") + "two" and session.stats.prompt_tokens == 1


def test_an_edited_turn_keeps_the_turns_before(fake):
    fake.says("one", "two", "three")
    session = fake.session()
    text(session.stream("a"))
    text(session.stream("b"))
    edited = [*session.messages[:2], {"role": "user", "content": "c"}]
    assert text(session.stream(edited)) == "three"
    assert session.stats.prompt_tokens == len(fake.tokenize("c<|im_end|>\n<|im_start|>assistant\n"))
    assert fake.fed == USER.format("a") + "one<|im_end|>\n" + USER.format("c") + "three"


def test_a_fresh_turn_after_plain_text(fake):
    """Text that was not a conversation is kept as far as the conversation begins with it."""
    fake.says("x", "two")
    session = fake.session()
    text(session.stream("<|im_start|>user\nHi", raw=True))
    assert text(session.stream("Ho")) == "two" and fake.fed == USER.format("Ho") + "two"
    assert session.stats.prompt_tokens == len(fake.tokenize("o<|im_end|>\n<|im_start|>assistant\n"))


def test_logits_of_a_lost_step_are_not_saved(model, tmp_path, monkeypatch):
    session = model.session()
    text(session.stream([5, 6], max_tokens=0))
    forward = model.engine.forward

    class Interrupted:
        max_chunk = 512

        def forward(self, *args, **options):
            forward(*args, **options)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "engine", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            text(session.stream([7], max_tokens=0))
    session.save(tmp_path / "s.kv")
    restored = model.restore(tmp_path / "s.kv")
    assert restored.n_tokens == 3
    with pytest.raises(KvrunError, match="no logits"):
        restored.evaluate()


def test_nothing_is_reused_once_tokens_were_lost(fake):
    fake.says("one", "two")
    session, asked = fake.session(), "a" * 80  # more than the last 64 tokens, which are known in any case
    text(session.stream(asked))
    fake.engine.cache.outgrown = True
    told = [{"role": "user", "content": asked + "b"}]
    assert text(session.stream(told)) == "two"
    assert fake.fed == USER.format(asked + "b") + "two"
    assert session.stats.prompt_tokens == len(fake.tokenize(USER.format(asked + "b")))


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_while_the_rest_is_fed(fake, when):
    fake.says("one")
    session = fake.session()
    text(session.stream("What is a cat?"))
    fake.engine.fault[when] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        text(session.stream([{"role": "user", "content": "What is a dog?"}]))
    fake.engine.script = []
    fake.says("two")
    assert text(session.stream([{"role": "user", "content": "What is a pig?"}])) == "two"
    assert fake.fed == USER.format("What is a pig?") + "two" and fake.engine.fed.count(END) == 1


def test_reuse_gives_what_feeding_all_gives(model):
    first = model.session(kv="f32")
    text(first.stream("What is a cat, and what is it for?", **GO_ON))
    told = [{"role": "user", "content": "What is a cat, and what is a dog?"}]
    again = text(first.stream(told, temperature=0, max_tokens=12, ignore_eos=True))
    assert again == model.generate(told, kv="f32", temperature=0, max_tokens=12, ignore_eos=True)
    assert first.stats.prompt_tokens < first.n_tokens - 12 - 5


def test_an_endless_text_keeps_no_list_of_its_tokens(model, tmp_path):
    session = model.session(ctx=132)
    text(session.stream("a", max_tokens=20, ignore_eos=True))
    assert len(saved_tokens(session, tmp_path)) == session.n_tokens
    text(session.stream("b", max_tokens=300, ignore_eos=True))
    assert saved_tokens(session, tmp_path) is None
    session.reset()
    text(session.stream("b", max_tokens=3, ignore_eos=True))
    assert len(saved_tokens(session, tmp_path)) == session.n_tokens


# --- kvrun --session FILE -------------------------------------------------------------------------


def called(capsys, model, *arguments):
    status = cli.main([model.file.path, *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


STEADY = ["-n", 12, "--seed", 3, "--ignore-eos"]


def test_the_command_goes_on_where_it_ended(model, tmp_path, capsys):
    path = tmp_path / "-s.kv"
    kept = model.session(kv="f32", ctx=500)
    turns = ("Hello", ["--kv", "f32", "--ctx", 500]), ("And then?", []), ("More", ["--ctx", 500])
    for prompt, options in turns:
        expected = text(kept.stream(prompt, max_tokens=12, seed=3, ignore_eos=True))
        status, out, err = called(capsys, model, "-p", prompt, "--session", path, *STEADY, *options)
        assert (status, out.removesuffix("\n")) == (0, expected.removesuffix("\n"))
        assert (f"[session {path}: " in err) == (prompt != "Hello")
    assert model.restore(path).messages == kept.messages
    assert called(capsys, model, "-q", "-p", "x", "--session", path, *STEADY)[2] == ""


@pytest.mark.parametrize(
    "options, message",
    [
        (["--kv", "f32"], "--kv: the session in .* has q8, not f32; leave the option out"),
        (["--kv-v", "f32"], "--kv-v: .* has q8"),
        (["--ctx", 900], "--ctx: .* has 2048, not 900"),
        (["--sinks", 5], "--sinks: .* has 4"),
        (["--window", 65], "--window: .* has 64"),
    ],
)
def test_other_cache_options_than_the_file_has(model, tmp_path, capsys, options, message):
    path = tmp_path / "s.kv"
    session = model.session(ctx=2048)
    text(session.stream("a", **GO_ON))
    session.save(path)
    before = path.read_bytes()
    status, out, err = called(capsys, model, "-p", "a", "--session", path, *options)
    assert (status, out, err.count("\n")) == (1, "", 1) and path.read_bytes() == before
    assert re.search(message, err)


def test_a_default_that_is_given_must_be_what_the_file_has_too(model, tmp_path, capsys):
    path = tmp_path / "s.kv"
    session = model.session(kv="f16", sinks=5)
    text(session.stream("a", **GO_ON))
    session.save(path)
    for options, message in (
        (["--kv", "q8"], "--kv: .* has f16, not q8"),
        (["--sinks", 4], "--sinks: .* has 5, not 4"),
    ):
        status, out, err = called(capsys, model, "-p", "a", "--session", path, *options)
        assert (status, out) == (1, "") and re.search(message, err)
    for options in ([], ["--kv", "f16", "--sinks", 5]):
        assert called(capsys, model, "-q", "-n", 1, "-p", "a", "--session", path, *options)[0] == 0


def test_a_session_that_cannot_be_used_or_kept(model, tmp_path, capsys):
    """Said before anything is answered, and the file is left alone."""
    path = tmp_path / "s.kv"
    path.write_bytes(b"something else")
    for target in (path, tmp_path, tmp_path / "no" / "s.kv", model.file.path):
        status, out, err = called(capsys, model, "-p", "a", "--session", target)
        assert (status, out, err.count("\n")) == (1, "", 1) and str(target) in err
    assert path.read_bytes() == b"something else" and os.listdir(tmp_path) == ["s.kv"]
    status, out, err = called(capsys, model, "-p", "a", "--temperature", -1, "--session", tmp_path / "new.kv")
    assert status == 1 and os.listdir(tmp_path) == ["s.kv"]
