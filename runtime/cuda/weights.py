"""A model's weights on the device, in the file's own layout, and the structures that kernels find them by.

One allocation holds all tensors. What is checked about them has been checked by `_core.Engine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvrun import _core
from kvrun.cuda import abi
from kvrun.cuda.abi import PANEL, TYPE_IDS
from kvrun.cuda.launch.common import padded

if TYPE_CHECKING:
    from kvrun.files.description import ModelDescription
    from kvrun.files.model_file import WeightTensor

ALIGNMENT = 256


class Arena:
    """One allocation in named pieces of these sizes. abi.DeviceMemoryError if there is no room."""

    def __init__(self, device: Any, sizes: Mapping[str, int]) -> None:
        self._starts, self.n_bytes = {}, 0
        for name, size in sizes.items():
            self._starts[name] = self.n_bytes
            self.n_bytes += padded(max(size, 1), ALIGNMENT)
        self._memory = device.alloc(self.n_bytes)

    def __getitem__(self, name: str) -> int:
        """The address of a piece."""
        address: int = self._memory.ptr + self._starts[name]
        return address


@dataclass
class Layer:
    """One layer's structures; those that the model does not have are empty (no segments, no weight)."""

    attn_norm: np.ndarray
    qkv: np.ndarray
    q_norm: int
    k_norm: int
    o: np.ndarray
    attn_post_norm: np.ndarray
    mlp_norm: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    router: np.ndarray
    experts: dict[str, np.ndarray]  # gate, up and down of each: abi.MATRIX [n_experts], on the host
    expert_tables: dict[str, int]  # the same on the device
    mlp_post_norm: np.ndarray


class DeviceWeights:
    """All tensors of a model on `device`. abi.DeviceMemoryError if they do not fit."""

    def __init__(
        self,
        description: ModelDescription,
        weights: Mapping[str, WeightTensor],
        vectors: Mapping[str, np.ndarray],
        device: Any,
    ) -> None:
        self.description, self._weights, self._vectors = description, weights, vectors
        d = description
        mixtures = [i for i in range(d.n_layers) if d.has_experts(i)]
        sizes = {name: tensor.data.nbytes for name, tensor in weights.items()}
        sizes |= {name: vector.nbytes for name, vector in vectors.items()}
        tables = [f"layers.{i}.{part}" for i in mixtures for part in ("gate", "up", "down")]
        sizes |= dict.fromkeys(tables, (d.n_experts or 0) * abi.MATRIX.itemsize)
        arena = self._arena = Arena(device, sizes)
        self.n_bytes = arena.n_bytes
        for name, tensor in weights.items():
            device.write(arena[name], tensor.data)
        for name, vector in vectors.items():
            device.write(arena[name], vector)
        self.embed = self._matrix(["embed"], False)
        self.positions = self._matrix(["positions"] if d.learned_positions else [], False)
        self.head = self.embed if d.tie_embeddings else self._matrix(["head"], False)
        self.norm = self._norm("norm")
        self.layers = [self._layer(f"layers.{i}.", i in mixtures) for i in range(d.n_layers)]
        for i in mixtures:
            for part, table in self.layers[i].experts.items():
                device.write(arena[f"layers.{i}.{part}"], table)

    def _layer(self, name: str, mixture: bool) -> Layer:
        d = self.description
        bias = d.attention_bias
        gated = d.mlp_gated and not mixture
        q_norm, k_norm = (self._vector(f"{name}attn.{x}_norm.weight") if d.qk_norm else 0 for x in "qk")
        parts = ("gate", "up", "down") if mixture else ()
        experts = {
            part: np.concatenate(
                [self._matrix([f"{name}mlp.experts.{e}.{part}"], False) for e in range(d.n_experts or 0)]
            )
            for part in parts
        }
        return Layer(
            attn_norm=self._norm(f"{name}attn.norm"),
            qkv=self._matrix([f"{name}attn.{x}" for x in "qkv"], bias),
            q_norm=q_norm,
            k_norm=k_norm,
            o=self._matrix([f"{name}attn.o"], bias if d.attention_out_bias is None else d.attention_out_bias),
            attn_post_norm=self._norm(f"{name}attn.post_norm"),
            mlp_norm=self._norm(f"{name}mlp.norm"),
            gate=self._matrix([f"{name}mlp.gate"] if gated else [], d.mlp_bias),
            up=self._matrix([] if mixture else [f"{name}mlp.up"], d.mlp_bias),
            down=self._matrix([] if mixture else [f"{name}mlp.down"], d.mlp_bias),
            router=self._matrix([f"{name}mlp.router"] if mixture else [], False),
            experts=experts,
            expert_tables={part: self._arena[name + part] for part in parts},
            mlp_post_norm=self._norm(f"{name}mlp.post_norm"),
        )

    def _matrix(self, names: Sequence[str], bias: bool) -> np.ndarray:
        """abi.MATRIX of matrices that share an input, one segment each."""
        value, offset = abi.struct(abi.MATRIX, n_segments=len(names)), 0
        for i, name in enumerate(names):
            tensor = self._weights[f"{name}.weight"]
            panels = -(-tensor.rows // PANEL)
            segment = value["segments"][0, i : i + 1]
            segment["data"], segment["type"] = self._arena[f"{name}.weight"], TYPE_IDS[tensor.type]
            segment["bias"] = self._vector(f"{name}.bias") if bias else 0
            segment["rows"], segment["panels"], segment["offset"] = tensor.rows, panels, offset
            segment["panel_bytes"] = _core.packed_size(tensor.type, PANEL, tensor.cols)
            value["cols"], offset = tensor.cols, offset + PANEL * panels
        value["panels"], value["width"] = offset // PANEL, offset
        return value

    def _norm(self, name: str) -> np.ndarray:
        """abi.NORM, without a weight if the model has no such norm."""
        d = self.description
        if f"{name}.weight" not in self._vectors:
            return abi.struct(abi.NORM)
        layer_norm = d.norm == "layer"
        bias = self._vector(f"{name}.bias") if layer_norm else 0
        return abi.struct(
            abi.NORM, weight=self._vector(f"{name}.weight"), bias=bias, eps=d.norm_eps, layer_norm=layer_norm
        )

    def _vector(self, name: str) -> int:
        return self._arena[name]


def slices(matrix: np.ndarray, n_bytes: int) -> list[tuple[np.ndarray, int, int]]:
    """A matrix in parts of one segment whose float16 values take at most so many bytes, or one panel: for each its
    abi.MATRIX, the first output, and the outputs."""
    parts: list[tuple[np.ndarray, int, int]] = []
    if not matrix["n_segments"][0]:
        return parts
    most = max(1, n_bytes // (2 * PANEL * int(matrix["cols"][0])))  # panels
    for i in range(int(matrix["n_segments"][0])):
        segment = matrix["segments"][0, i]
        for start in range(0, int(segment["panels"]), most):
            panels = min(most, int(segment["panels"]) - start)
            part = abi.struct(abi.MATRIX, n_segments=1, cols=matrix["cols"], panels=panels, width=PANEL * panels)
            part["segments"][0, 0] = segment
            first = part["segments"][0, :1]
            first["data"] = int(segment["data"]) + start * int(segment["panel_bytes"])
            first["rows"] = min(int(segment["rows"]) - PANEL * start, PANEL * panels)
            first["panels"], first["offset"] = panels, 0
            first["bias"] = 0 if not segment["bias"] else int(segment["bias"]) + 4 * PANEL * start
            parts.append((part, int(segment["offset"]) + PANEL * start, PANEL * panels))
    return parts
