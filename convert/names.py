"""A model's tensors among those of a checkpoint: what programs add to their names, and which are left over."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from kvrun.errors import ConvertError, one_line

# What torch.compile and FSDP put into names, and what DDP and PEFT put before them.
_INSIDE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_BEFORE = re.compile(r"(module\.|base_model\.model\.)*")
_ADAPTER = re.compile(r".*\.(lora_[A-Za-z_]+|base_layer|modules_to_save|ia3_l)(\.|$)")
# What quantised checkpoints have beside a weight.
_OF_WEIGHT = re.compile(r"(.*)\.(scales|qzeros|g_idx|weight_(scale|scale_inv|scale_2|zero_point))")
# Buffers that old versions of transformers saved. They follow from the config.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_)?bias)")


def unwrapped(name: str) -> str:
    """The name without what torch.compile, FSDP, DDP and PEFT add to it."""
    return _BEFORE.sub("", _INSIDE.sub("", name), count=1)


def outer_prefix(names: Iterable[str], first: str, prefix: str) -> str:
    """What a program has put before all names, as before those of a module that holds the model ("llm."), to judge by
    the model's tensor `first`, which there is once; `prefix` may be before its name. Empty if there is nothing."""
    befores = {name.removesuffix(first) for name in map(unwrapped, names) if f".{name}".endswith(f".{first}")}
    before = befores.pop() if len(befores) == 1 else ""
    return before.removesuffix(prefix) if f".{before}".endswith(f".{prefix}") else before


def stored_names(stored: Iterable[str], wanted: Iterable[str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """For each wanted name under which there is a tensor, that tensor's name in the checkpoint. It may have one of the
    prefixes, the first of which goes before the others, and what wrappers add, unless it is there without that."""
    plain: dict[str, str] = {}
    for name in sorted(stored, key=lambda name: unwrapped(name) != name):
        plain.setdefault(unwrapped(name), name)
    found = {}
    for theirs in wanted:
        for prefix in prefixes:
            if prefix + theirs in plain:
                found[theirs] = plain[prefix + theirs]
                break
    return found


def refuse_adapter(where: str, names: Iterable[str]) -> None:
    """Raise ConvertError if a tensor is part of an adapter that has been saved together with the model."""
    for name in names:
        if _ADAPTER.match(name):
            raise ConvertError(
                f"{where}: tensor {one_line(name)[:80]}: the model was saved with an adapter that is not merged "
                "into it; merge it (merge_and_unload in PEFT) and save the model again"
            )


def refuse_quantised_weights(
    where: str, names: Iterable[str], needed: Iterable[str], prefixes: tuple[str, ...]
) -> None:
    """Raise ConvertError if a tensor belongs to a weight that the model needs and that is quantised."""
    stems = {prefix + theirs.removesuffix(".weight") for theirs in needed for prefix in prefixes}
    for name in names:
        match = _OF_WEIGHT.fullmatch(unwrapped(name))
        if match and match[1] in stems:
            raise ConvertError(
                f"{where}: tensor {one_line(name)[:80]}: a weight is quantised, and not in a way that config.json says "
                "and that is supported; convert the checkpoint that it was made from, or a GGUF file of the model"
            )


def surplus_of(names: Iterable[str], used: Collection[str]) -> list[str]:
    """The names that are not used, without those of buffers that nobody needs."""
    return [name for name in names if name not in used and not _BUFFERS.fullmatch(unwrapped(name))]


def surplus_line(names: Collection[str]) -> str:
    """How many tensors the model does not need, and the names of the first."""
    first = ", ".join(one_line(name)[:80] for name in sorted(names)[:3])
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} that the model does not need ({first}{more})"
