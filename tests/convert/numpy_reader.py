"""A reader of model files written from docs/format.md alone: NumPy and the standard library, nothing of kvrun."""

import hashlib
import json
import struct

import numpy as np


def read(path):
    """(metadata, {matrix name: float32 [rows, cols]}, {vector name: float32 [n]}, tokenizer bytes or None)."""
    with open(path, "rb") as file:
        content = file.read()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "kvrun" and metadata["version"] == "1"
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"header_checksum"}):
        digest.update(key.encode() + b"\0" + metadata[key].encode() + b"\0")
    assert digest.hexdigest() == metadata["header_checksum"]
    weights, checksums = json.loads(metadata["weights"]), json.loads(metadata["checksums"])
    matrices, vectors, tokenizer = {}, {}, None
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        data = content[start:end]
        assert hashlib.sha256(data).hexdigest() == checksums[name]
        if name in weights:
            assert start % 64 == 0
            matrices[name] = unpack(weights[name]["type"], data, *weights[name]["shape"])
        elif entry["dtype"] == "F32":
            vectors[name] = np.frombuffer(data, "<f4")
        else:
            tokenizer = data
    return metadata, matrices, vectors, tokenizer


def unpack(kind, data, rows, cols):
    """Packed bytes to float32 [rows, cols]."""
    panels = -(-rows // 16)
    if kind == "f32":
        lines = np.frombuffer(data, "<f4").reshape(panels, cols, 16)
    elif kind == "f16":
        lines = np.frombuffer(data, "<f2").reshape(panels, -(-cols // 2) * 2, 16).astype(np.float32)
    elif kind == "bf16":
        pairs = np.frombuffer(data, "<u2").reshape(panels, -(-cols // 2), 16, 2).astype(np.uint32) << 16
        lines = pairs.view(np.float32).transpose(0, 1, 3, 2).reshape(panels, -1, 16)
    else:
        lines = _unpack_blocks(kind, np.frombuffer(data, np.uint8).reshape(panels, -1), -(-cols // 32))
    return lines.transpose(0, 2, 1).reshape(panels * 16, -1)[:rows, :cols]


def _unpack_blocks(kind, data, n_blocks):
    """uint8 [panels, bytes] to float32 [panels, channels, 16]."""
    code_bytes = 512 if kind == "q8_0" else 256
    blocks, position = [], 0
    for pair in range(0, n_blocks, 2):
        scale = data[:, position : position + 64].view("<f2").reshape(-1, 2, 16).astype(np.float32)
        position += 64
        if kind == "q4_1":
            minimum = data[:, position : position + 64].view("<f2").reshape(-1, 2, 16).astype(np.float32)
            position += 64
        for half in range(min(2, n_blocks - pair)):
            codes = _codes(kind, data[:, position : position + code_bytes])
            position += code_bytes
            values = codes * scale[:, half, None, :]
            blocks.append(values + minimum[:, half, None, :] if kind == "q4_1" else values)
    assert position == data.shape[1]
    return np.concatenate(blocks, axis=1)


def _codes(kind, data):
    """Codes of a block: uint8 [panels, bytes] to float32 [panels, 32 channels, 16 rows]."""
    lines = data.reshape(len(data), -1, 16, 4)
    if kind == "q8_0":
        channels = lines.astype(np.float32) - 128
    else:
        channels = np.concatenate([lines & 15, lines >> 4], axis=1).astype(np.float32)
        channels -= 8 if kind == "q4_0" else 0
    return channels.transpose(0, 1, 3, 2).reshape(len(data), 32, 16)
