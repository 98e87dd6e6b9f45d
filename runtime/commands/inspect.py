"""`kvrun inspect`: what a model file holds, and the memory that its weights and its cache take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from kvrun import _core
from kvrun.commands.arguments import Parser
from kvrun.errors import one_line
from kvrun.files.description import ModelDescription
from kvrun.files.model_file import ModelFile, read_model_file
from kvrun.measure.caches import fitting

CONTEXTS = (2048, 8192, 32768, 131072)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "kvrun inspect", "Show what is in a model file, and the memory of its weights and of each kind of cache."
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--verify", action="store_true", help="read all data and compare the checksums")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status. Errors are raised, for `kvrun.commands.main.main` to state."""
    args = build_parser().parse_args(argv)
    model = read_model_file(args.model)
    if args.verify:
        model.verify()
    report = inspect(model, verified=args.verify)
    print(json.dumps(report, indent=2, ensure_ascii=True) if args.json else "\n".join(lines(report)), flush=True)
    return 0


def inspect(model: ModelFile, verified: bool = False) -> dict[str, Any]:
    """Everything that the command shows, as plain values. Sizes are in bytes.

    `kv_memory` maps a cache format, for K and V alike, to the bytes allocated at each context length;
    `kv_memory_without_windows` is the same if layers with a sliding window kept all tokens, None where there are none.
    """
    d = model.description
    weights = model.weights
    n_weights = sum(weight.rows * weight.cols for weight in weights.values())
    weight_bytes = sum(weight.data.nbytes for weight in weights.values())
    types: dict[str, dict[str, int]] = {}
    for weight in weights.values():
        entry = types.setdefault(weight.type, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += weight.rows * weight.cols
        entry["bytes"] += weight.data.nbytes
    return {
        "path": model.path,
        "bytes": model.nbytes,
        "verified": verified,
        "fingerprint": model.fingerprint,
        "description": asdict(model.description),
        "parameters": n_weights + sum(vector.size for vector in model.vectors.values()),
        "bits_per_weight": 8 * weight_bytes / n_weights,
        "weight_types": types,
        "weights_memory": weight_bytes + sum(vector.nbytes for vector in model.vectors.values()),
        "tensors": _tensors(model),
        "tokenizer": model.tokenizer_info,
        "stop_ids": model.stop_ids,
        "chat_template": model.chat_template is not None,
        "sampling": model.sampling,
        "source": model.source,
        "kv_memory": kv_memory(d),
        "kv_memory_without_windows": kv_memory(replace(d, sliding_windows=None, rope_local=None))
        if d.sliding_windows
        else None,
    }


def kv_memory(description: ModelDescription) -> dict[str, dict[str, int]]:
    """{format: {context length: bytes}}, with the default sinks and window."""
    return {
        name: {
            str(ctx): _core.kv_bytes(description, **asdict(fitting(name, ctx, ctx)[1]))
            for ctx in _contexts(description)
        }
        for name in _core.KV_FORMATS
    }


def _contexts(description: ModelDescription) -> list[int]:
    """A text goes on for ever, unless its positions are learned."""
    if not description.learned_positions:
        return list(CONTEXTS)
    end = description.context_length
    return [ctx for ctx in CONTEXTS if ctx < end] + [end]


def _tensors(model: ModelFile) -> list[dict[str, Any]]:
    sizes = model.tensor_nbytes
    result: list[dict[str, Any]] = []
    for name, nbytes in sizes.items():
        if name in model.weights:
            weight = model.weights[name]
            entry = {"type": weight.type, "shape": [weight.rows, weight.cols]}
        elif name in model.vectors:
            entry = {"type": "f32", "shape": [model.vectors[name].size]}
        else:
            entry = {"type": "bytes", "shape": [nbytes]}
        result.append({"name": name, **entry, "bytes": nbytes})
    return result


def lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    model, info = report["description"], report["tokenizer"]
    source = report["source"]
    heads = f"{model['n_heads']} query heads, {model['n_kv_heads']} KV heads of {model['head_dim']}"
    rows = [
        ("model", f"{model['name']} ({model['architecture']}), {_millions(report['parameters'])} parameters"),
        (
            "file",
            f"{report['path']}, {_size(report['bytes'])}" + (", all checksums match" if report["verified"] else ""),
        ),
        ("source", f"{source.get('form', 'unknown')} {source.get('name', '')}".strip()),
        (
            "layers",
            f"{model['n_layers']}, hidden size {model['hidden_size']}, "
            f"feed-forward {model['intermediate_size']}, {model['activation']}" + _experts(model),
        ),
        ("attention", heads + (", biases" if model["attention_bias"] else "") + _sliding(model)),
        ("rope", _rope(model)),
        (
            "vocabulary",
            f"{model['vocab_size']} tokens, {'tied' if model['tie_embeddings'] else 'separate'} head",
        ),
        ("trained on", f"{model['context_length']} tokens"),
        ("tokenizer", _tokenizer(info)),
        ("stops at", ", ".join(map(str, report["stop_ids"])) or "no token"),
        ("chat template", "yes" if report["chat_template"] else "no"),
    ]
    if report["sampling"]:
        rows.append(("sampling", ", ".join(f"{key} {value:g}" for key, value in report["sampling"].items())))
    rows.append(("weights", f"{_size(report['weights_memory'])}, {report['bits_per_weight']:.2f} bits per weight"))
    shown = [f"{label + ':':<15}{one_line(value)}" for label, value in rows]
    for name, entry in report["weight_types"].items():
        shown.append(
            f"  {name:<6}{entry['tensors']:>5} matrices {_millions(entry['weights']):>10} weights "
            f"{_size(entry['bytes']):>10}"
        )
    shown += ["", *_kv_lines(report["kv_memory"])]
    if report["kv_memory_without_windows"]:
        shown += ["", "the same, if layers with a sliding window kept all tokens:"]
        shown += _kv_lines(report["kv_memory_without_windows"])
    return shown


def _kv_lines(memory: dict[str, dict[str, int]]) -> list[str]:
    contexts = map(int, next(iter(memory.values())))
    names = [f"{ctx // 1024}k" if ctx % 1024 == 0 else str(ctx) for ctx in contexts]
    lines = [f"{'cache':<8}" + "".join(f"{name:>12}" for name in names) + "   tokens"]
    for name, sizes in memory.items():
        lines.append(f"{name:<8}" + "".join(f"{_size(size):>12}" for size in sizes.values()))
    return lines


def _sliding(model: dict[str, Any]) -> str:
    windows = [window for window in model["sliding_windows"] or () if window]
    if not windows:
        return ""
    sizes = ", ".join(map(str, sorted(set(windows))))
    return f", sliding window of {sizes} tokens in {len(windows)} of {model['n_layers']} layers"


def _experts(model: dict[str, Any]) -> str:
    if model["n_experts"] is None:
        return ""
    layers = model["expert_layers"]
    where = "" if layers is None else f" in {sum(layers)} layers"
    return f"; {model['experts_used']} of {model['n_experts']} experts of {model['expert_size']}{where}"


def _rope(model: dict[str, Any]) -> str:
    if model["rope_theta"] is None:
        return "none, learned positions" if model["learned_positions"] else "none"
    parts = [f"base {model['rope_theta']:g}" + _scaling(model["rope_scaling"])]
    if model["rotary_dim"] is not None:
        parts.append(f"{model['rotary_dim']} of {model['head_dim']} channels")
    if model["rope_layers"] is not None:
        parts.append(f"in {sum(model['rope_layers'])} of {model['n_layers']} layers")
    if model["rope_local"] is not None:
        local = model["rope_local"]
        parts.append(f"base {local['theta']:g}{_scaling(local['scaling'])} where a window slides")
    return "; ".join(parts)


def _scaling(scaling: dict[str, Any] | None) -> str:
    if scaling is None:
        return ""
    return f", {scaling['type']} scaling" + (f" by {scaling['factor']:g}" if "factor" in scaling else "")


def _tokenizer(info: dict[str, Any]) -> str:
    if info["kind"] == "none":
        return "none"
    adds = [name.upper() for name in ("bos", "eos") if info[f"add_{name}"]]
    ids = [f"{name} {info[f'{name}_id']}" for name in ("bos", "eos") if info[f"{name}_id"] is not None]
    return ", ".join([info["kind"], *ids, *(f"adds {name}" for name in adds)])


def _size(n: int) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}" if n < 10 * scale else f"{n / scale:.1f} {unit}"
    return f"{n} B"


def _millions(n: int) -> str:
    return f"{n / 1e9:.2f} G" if n >= 1e9 else f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.1f} k"
