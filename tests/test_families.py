"""Every model family against transformers' logits in float32, however the tokens are fed, in caches of every kind.

fixtures/make_families.py made the checkpoints, with transformers, and says what is in them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvrun import _core
from kvrun.commands.inspect import inspect, lines
from kvrun.convert import convert
from kvrun.convert.source import open_checkpoint
from kvrun.errors import ConvertError, KvrunError
from kvrun.files.model_file import read_model_file
from kvrun.model import load
from support.families import CHUNKS, FAMILIES, LOGITS_OF_LENGTH, NAMES, TOLERANCE, cache_of, engine_of, expected_of, run
from support.kernel_level import errors_at_level
from support.numpy_llama import NumpyLlama
from support.sliding import SlidingLlama

pytestmark = pytest.mark.crossed


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_logits(name, chunks, family):
    """Past every sliding window, with sinks kept apart and without."""
    expected, engine = expected_of(name), engine_of(family(name))
    for options in ({}, {"sinks": 0, "window": 1}, {"sinks": 17, "window": 100}):
        logits = run(engine, expected.tokens, chunks, **options | cache_of(name))
        assert expected.error(logits) <= TOLERANCE, options


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_weights_as_in_the_checkpoint(name, family):
    expected = expected_of(name)
    logits = run(engine_of(family(name, "same")), expected.tokens, CHUNKS["ragged"], **cache_of(name))
    assert expected.error(logits) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in NAMES if "ring" in np.load(FAMILIES / name / "logits.npz")])
def test_after_two_turns_of_the_ring(name, family):
    """What transformers computes when queries see what the cache has left: a tile and the window."""
    expected, engine = expected_of(name), engine_of(family(name))
    with np.load(FAMILIES / name / "logits.npz") as data:
        ring = data["ring"]
    assert np.abs(ring - expected.column_logits).max() > 0.01 or engine.description.sliding_windows
    for chunks in CHUNKS.values():
        logits = run(engine, expected.tokens, chunks, sinks=0, window=1, ctx=65)[:, expected.columns]
        assert np.abs(logits - ring).max() <= TOLERANCE * np.abs(expected.logits).max()


@pytest.mark.parametrize("name", NAMES)
def test_float64_numpy_agrees_with_transformers(name, family):
    """Checks the model that the next test builds on."""
    expected, file = expected_of(name), read_model_file(family(name))
    logits = NumpyLlama(file, ctx=LOGITS_OF_LENGTH.get(name, 256)).logits(expected.tokens)
    assert expected.error(logits) <= 1e-5


@pytest.mark.parametrize("options", [dict(ctx=150, sinks=4, window=64), dict(ctx=90, sinks=20, window=1)], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("gpt2")])
def test_sinks_of_every_kind_of_layer(name, options, family):
    """Past several turns: sinks move up in layers that see everything, and turn as the layer does: with the table that
    is its own, in part, or not at all."""
    file = read_model_file(family(name))
    tokens = np.random.default_rng(3).integers(0, 64, 460).astype(np.int32)
    expected = SlidingLlama(file, **options).logits(tokens)
    engine = engine_of(family(name), 2)
    for chunks in ([460], [1, 60, 64, 63, 200, 17, 1, 1, 53]):
        logits = run(engine, tokens, chunks, **options)
        assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_a_bit(name, family):
    tokens = expected_of(name).tokens
    for chunks in (CHUNKS["ragged"], CHUNKS["one by one"]):
        one, three = (run(engine_of(family(name), threads), tokens, chunks, "f16") for threads in (1, 3))
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
@pytest.mark.parametrize("type", ["q8_0", "q4_1"])
def test_quantised_experts(name, type, family):
    """Block types with activations of 16 bits: the float64 model with the same weights, by tokens and in chunks."""
    file = read_model_file(family(name, type))
    d, tokens = file.description, expected_of(name).tokens
    assert file.weights["layers.0.mlp.experts.1.down.weight"].type == type
    assert file.weights["layers.0.mlp.router.weight"].type == "bf16"
    expected = NumpyLlama(file).logits(tokens)
    engine = _core.Engine(d, file.weights, file.vectors, d.rope_tables, 2, precise=True)
    for chunks in CHUNKS.values():
        assert np.abs(run(engine, tokens, chunks) - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("kv, limit", [("f16", 0.01), ("q8", 0.03), ("q4", 0.6)])
@pytest.mark.parametrize("name", ["gemma3", "phi3", "smollm3", "olmo2"])
def test_cache_formats(name, kv, limit, family):
    """Rounding moves the sharp logits of such models, and no more than that."""
    expected, engine = expected_of(name), engine_of(family(name))
    rows = run(engine, expected.tokens, CHUNKS["one by one"], kv, ctx=200, window=0, sinks=0)
    error = np.sqrt(((rows - run(engine, expected.tokens, [200])) ** 2).mean()) / rows.std()
    assert error <= limit
    np.testing.assert_array_equal(rows[-1], run(engine, expected.tokens, [199, 1], kv, ctx=200, window=0, sinks=0)[-1])


@pytest.mark.parametrize("level", _core.isa_available())
def test_every_kernel_level(level, family):
    paths = {name: str(family(name)) for name in ("gpt2", "gpt2-gelu", "gemma2", "phi3", "granite")}
    errors = errors_at_level(level, "support.families", paths)
    assert max(errors.values()) <= TOLERANCE, errors


# --- what the descriptions say --------------------------------------------------------------------


def description(name, family):
    return read_model_file(family(name)).description


def test_descriptions(family):
    """What a wrong reading of a config would hardly change in such small models."""
    assert description("gpt2", family).activation == "gelu_tanh"
    assert description("gpt2-gelu", family).activation == "gelu"
    assert description("partial-rope", family).activation == "gelu"
    assert description("gemma3", family).activation == "gelu_tanh"
    assert description("gemma3", family).sliding_windows == (70, None, 70)
    assert description("gemma3", family).rope_local == {"theta": 100.0, "scaling": None}
    assert description("mistral", family).sliding_windows == (50, 50)
    assert description("qwen2", family).sliding_windows == (None, 40, 40)
    assert description("olmo3", family).sliding_windows == (40, 40, 40, None)
    assert description("olmo3", family).rope_scaling["type"] == "yarn"
    assert description("olmo3", family).rope_local == {"theta": 500.0, "scaling": None}
    assert description("smollm3", family).rope_layers == (True, True, True, False)
    assert description("phi3", family).rotary_dim == 12
    assert description("phi3", family).rope_scaling["original_context_length"] == 128
    assert description("qwen2", family).rope_scaling["type"] == "yarn"
    assert description("qwen3moe", family).expert_layers == (True, False, True)
    assert description("qwen3moe-shares", family).expert_layers == (False, True)
    assert not description("qwen3moe-shares", family).normalize_experts
    architectures = {description(name, family).architecture for name in NAMES}
    assert architectures == {
        *(
            "llama",
            "gpt2",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma2",
            "gemma3",
            "phi3",
            "smollm3",
            "olmo2",
            "olmo3",
            "granite",
        ),
        *("mixtral", "qwen3moe"),
    }


def with_config(tmp_path, name, **changes):
    """A copy of the checkpoint whose config says something else; None takes a field out."""
    folder = tmp_path / name
    shutil.copytree(FAMILIES / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def describe(tmp_path, name, **changes):
    return open_checkpoint(with_config(tmp_path, name, **changes), tokenizer=False).description


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("mistral", {"sliding_window": 0}, "sliding_window: 0 is not an integer from 1 up"),
        ("gpt2", {"n_head": 5}, "n_head: 5 does not divide the hidden size 36"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx: True: not supported",
        ),
        ("gpt2", {"n_positions": 201}, r"wpe.weight has shape \[200, 36\], but the config says \[201, 36\]"),
        ("gpt2", {"n_embd": 30}, r"has shape \[67, 36\], but the config says \[67, 30\]"),
        (
            "gemma3",
            {"layer_types": ["full_attention"] * 2},
            "layer_types: not full_attention or sliding_attention for",
        ),
        (
            "gemma3",
            {"layer_types": ["chunked_attention"] * 3},
            "layer_types: not full_attention or sliding_attention",
        ),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        *((name, {"is_causal": False}, "is_causal: False: attention to later tokens") for name in ("mistral", "gpt2")),
        ("mistral", {"per_layer_config": {"1": {"num_key_value_heads": 3}}}, "per_layer_config: .* are not supported"),
        (
            "qwen2",
            {"use_sliding_window": False},
            "use_sliding_window: not true, but layer_types has sliding_attention",
        ),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "sliding_window: missing or null, but layers have"),
        (
            "gemma3",
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_scaling: field type: newer versions of transformers ignore it",
        ),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation: 'relu' is not supported yet"),
        ("gemma2", {"attn_logit_softcapping": -2.0}, "attn_logit_softcapping: -2.0 is not a positive number"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: not 0 or 1 for each of 4 layers"),
        ("phi3", {"partial_rotary_factor": 0.55, "rope_parameters": None}, "0.55 of a head_dim of 24 is not an even"),
        *(
            (name, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5: transformers ignores it")
            for name in ("gemma2", "granite", "mistral", "mixtral", "olmo2", "qwen2", "qwen3", "qwen3moe", "smollm3")
        ),
        *(
            (
                name,
                {"rope_parameters": {"full_attention": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}},
                "full_attention: field partial_rotary_factor: 0.5: transformers ignores it",
            )
            for name in ("gemma3", "olmo3")
        ),
        ("olmo3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters: not an object for each kind of layer"),
        ("gemma3", {"rope_parameters": {"full_attention": "default"}}, "full_attention: not a JSON object"),
        ("gemma3", {"rope_scaling": [1]}, "rope_scaling: not a JSON object"),
        (
            "phi3",
            {"num_key_value_heads": 2},
            r"qkv_proj.weight has shape \[96, 48\], but the config says \[144, 48\]",
        ),
        ("phi3", {"intermediate_size": 45}, r"shape \[88, 48\], but the config says \[90, 48\]"),
        ("phi3", {"rope_parameters": {"type": "yarn", "factor": 4.0}}, "rope_parameters: field short_factor: missing"),
        ("granite", {"logits_scaling": 0}, "logits_scaling: 0 is not a positive number"),
        ("qwen3", {"head_dim": 24}, r"q_proj.weight has shape \[80, 36\], but the config says \[96, 36\]"),
        ("olmo2", {"architectures": ["LlamaForCausalLM"]}, "input_layernorm.weight is missing"),
        ("mixtral", {"num_experts_per_tok": 6}, "experts_used: 6 is not between 1 and 5"),
        (
            "mixtral",
            {"num_local_experts": 4},
            r"gate.weight has shape \[5, 36\], but the config says \[4, 36\]",
        ),
        ("mixtral", {"num_local_experts": 6}, "experts.5.w1.weight is missing"),
        ("qwen3moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers: not a list of layer numbers"),
        (
            "gemma3-images",
            {"text_config": None},
            "text_config: missing; Gemma3ForConditionalGeneration has one",
        ),
        (
            "gemma3-images",
            {"text_config": {"model_type": "mamba"}},
            "Gemma3ForConditionalGeneration of mamba",
        ),
    ],
)
def test_contradictions_are_named(name, changes, says, tmp_path):
    with pytest.raises(ConvertError, match=says) as caught:
        open_checkpoint(with_config(tmp_path, name, **changes), tokenizer=False)
    assert "\n" not in str(caught.value)


def test_older_ways_to_say_the_same(tmp_path, family):
    """Configs from before rope_parameters and layer_types."""
    old = describe(
        tmp_path,
        "gemma3",
        rope_parameters=None,
        rope_theta=1e5,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types=None,
        sliding_window_pattern=2,
    )
    assert old == description("gemma3", family)
    rope = {
        "type": "su",
        "short_factor": [1.0, 1.05, 1.1, 1.3, 1.5, 1.9],
        "long_factor": [1.1, 1.4, 2.0, 3.5, 6.0, 7.5],
    }
    old = describe(tmp_path, "phi3", rope_parameters=None, rope_scaling=rope, partial_rotary_factor=0.5)
    assert old == description("phi3", family)
    early = rope | {"type": "yarn"}
    old = describe(tmp_path, "phi3", rope_parameters=None, rope_scaling=early, partial_rotary_factor=0.5)
    assert old == description("phi3", family)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 8.0}
    old = describe(tmp_path, "olmo3", rope_parameters=None, rope_scaling=rope, rope_theta=20000.0, layer_types=None)
    new = description("olmo3", family)  # as in transformers, rope_theta is not for layers with a window
    assert old == replace(new, rope_local={"theta": 500000.0, "scaling": None})
    both = describe(tmp_path, "olmo3", rope_scaling={"factor": 3.0})
    assert both.rope_scaling["factor"] == 3 and both.rope_scaling["high"] == new.rope_scaling["high"]
    old = describe(tmp_path, "smollm3", no_rope_layers=None, rope_parameters=None, rope_theta=None)
    assert old == description("smollm3", family)


def with_null(tmp_path, name, field):
    folder = with_config(tmp_path, name)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: None}))
    return folder


def test_null_is_not_the_default(tmp_path):
    assert describe(tmp_path, "mistral", sliding_window=None).sliding_windows == (4096, 4096)  # taken out
    folder = with_null(tmp_path, "mistral", "sliding_window")
    assert open_checkpoint(folder, tokenizer=False).description.sliding_windows is None
    assert (
        open_checkpoint(with_null(tmp_path, "olmo2", "num_key_value_heads"), tokenizer=False).description.n_kv_heads
        == 3
    )
    for name in ("gemma2", "gemma3", "olmo3"):
        with pytest.raises(ConvertError, match="sliding_window: missing or null, but layers have sliding_attention"):
            open_checkpoint(with_null(tmp_path, name, "sliding_window"), tokenizer=False)


def test_fields_that_a_class_does_not_use(tmp_path, family):
    """Seen in transformers: the logits of such a checkpoint are the same with and without them."""
    for name, changes in [
        ("gemma3", {"attn_logit_softcapping": 2.0}),
        ("gemma3-images", {"text_config": with_text(final_logit_softcapping=5.0)}),
        ("mistral", {"attention_bias": True, "mlp_bias": True, "layer_types": ["full_attention"] * 2}),
        ("phi3", {"attention_bias": True}),
        ("qwen2", {"attention_bias": False, "mlp_bias": True, "final_logit_softcapping": 3.0}),
        ("gemma2", {"hidden_act": "silu", "use_sliding_window": False, "rope_local_base_freq": 5.0}),
        ("granite", {"logit_scale": 3.0, "sliding_window": 5, "position_embedding_type": "nope"}),
        ("olmo2", {"clip_qkv": 0.1, "sliding_window": 5, "use_qk_norm": False}),
        ("qwen3", {"max_window_layers": 1, "sliding_window": 5, "qk_norm": False}),
        ("qwen3moe", {"max_window_layers": 1, "sliding_window": 5}),
        ("gpt2", {"hidden_act": "silu", "rope_theta": 5.0, "reorder_and_upcast_attn": True}),
    ]:
        assert describe(tmp_path, name, **changes) == description(name, family), name


def with_text(**changes):
    config = json.loads((FAMILIES / "gemma3-images" / "config.json").read_text())
    return config["text_config"] | changes


def test_layers_of_smollm3_with_a_window(tmp_path):
    """use_sliding_window decides only where there are no layer_types."""
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    found = describe(tmp_path, "smollm3", layer_types=kinds, sliding_window=10, use_sliding_window=False)
    assert found.sliding_windows == (10, None, None, 10)
    found = describe(tmp_path, "smollm3", layer_types=None, sliding_window=10, use_sliding_window=True)
    assert found.sliding_windows == (None, None, None, 10)
    assert describe(tmp_path, "smollm3", layer_types=None, sliding_window=10).sliding_windows is None


def test_zeros_of_yarn_that_mean_the_default(tmp_path, family):
    plain = json.loads((FAMILIES / "qwen2" / "config.json").read_text())["rope_parameters"]
    zeros = {"mscale": 0, "mscale_all_dim": 0.0, "beta_slow": 0, "beta_fast": plain["beta_fast"]}
    assert describe(tmp_path, "qwen2", rope_parameters=plain | zeros) == description("qwen2", family)


def test_defaults_of_a_config_that_says_little(tmp_path):
    """As those of Gemma 3 with images do: transformers' defaults, and those of their tensors do not fit here."""
    text = {"model_type": "gemma3_text", "num_hidden_layers": 2}
    folder = with_config(tmp_path, "gemma3-images", text_config=text)
    says = r"embed_tokens.weight has shape \[67, 36\], but the config says \[262208, 2304\]"
    with pytest.raises(ConvertError, match=says):
        open_checkpoint(folder, tokenizer=False)


def test_inspect_shows_what_is_particular(family):
    def line(name, label):
        report = inspect(read_model_file(family(name)))
        return next(text for text in lines(report) if text.startswith(label)).split(":", 1)[1].strip()

    assert line("gpt2", "rope") == "none, learned positions"
    assert line("gemma3", "rope") == "base 100000, linear scaling by 8; base 100 where a window slides"
    assert line("phi3", "rope") == "base 10000, longrope scaling; 12 of 24 channels"
    assert line("smollm3", "rope") == "base 2e+06; in 3 of 4 layers"
    assert line("qwen3moe", "layers").endswith("silu; 3 of 7 experts of 18 in 2 layers")
    assert "sliding window of 70 tokens in 2 of 3 layers" in line("gemma3", "attention")


def test_the_text_part_of_a_model_of_text_and_images(tmp_path):
    """A line says what was left out."""
    result = convert(FAMILIES / "gemma3-images", tmp_path / "model.bin")
    assert len(result.notes) == 1 and result.notes[0].startswith("left out: ")
    assert result.notes[0].endswith("tensors that are not part of the text model (multi_modal_projector, vision_tower)")
    assert result.model.description.architecture == "gemma3" and result.model.description.tie_embeddings


def test_whether_text_and_images_have_a_head_says_the_outer_config(tmp_path, family):
    untied = with_text(tie_word_embeddings=False)
    for changes in ({"text_config": untied}, {"text_config": untied, "tie_word_embeddings": None}):
        assert describe(tmp_path, "gemma3-images", **changes) == description("gemma3-images", family)
    with pytest.raises(ConvertError, match="lm_head.weight is missing, and tie_word_embeddings is not true"):
        describe(tmp_path, "gemma3-images", tie_word_embeddings=False)


@pytest.mark.parametrize("name, trained", [("phi3", 128), ("dynamic-rope", 100)])
def test_a_rope_that_goes_by_length(name, trained, family):
    """In a cache that shows no more than the model was trained on, it is that of short texts, however long the text."""
    expected, engine = expected_of(name), engine_of(family(name))
    with np.load(FAMILIES / name / "logits.npz") as data:
        short = data["short"]
    largest = np.abs(expected.logits).max()
    assert np.abs(short - expected.column_logits[:100]).max() > 0.01 * largest
    logits = run(engine, expected.tokens, [100, 100], ctx=trained, sinks=0, window=30)
    assert np.abs(logits[:100, expected.columns] - short).max() <= TOLERANCE * largest
    tables = engine.description.rope_tables
    assert not np.array_equal(tables(trained).inv_freq, tables(trained + 1).inv_freq)
    assert np.array_equal(tables(trained).inv_freq, tables(64).inv_freq)


def test_learned_positions_end(family):
    """At the trained length there is one clear line, and a session can start again."""
    engine = engine_of(family("gpt2"))
    cache = _core.KVCache(engine, ctx=256)
    engine.forward(np.zeros(199, np.int32), cache)
    with pytest.raises(ValueError, match="learned 200 positions, and a text cannot be longer: 201 tokens"):
        engine.forward([1, 2], cache)
    engine.forward([1], cache)
    with pytest.raises(ValueError, match="learned 200 positions"):
        engine.forward([1], cache)
    session = load(family("gpt2")).session()
    with pytest.raises(KvrunError, match="cannot go on: the model has learned 200 positions"):
        list(session.stream([1] * 150, max_tokens=-1, ignore_eos=True))
    session.reset()
    assert len(list(session.stream([1], max_tokens=3, ignore_eos=True))) <= 3
