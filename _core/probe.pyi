import numpy as np
import numpy.typing as npt

from .cache import KVCache

_Floats = npt.NDArray[np.float32]

def rms_norm(x: npt.ArrayLike, weight: npt.ArrayLike, eps: float, level: str | None = None) -> _Floats: ...
def layer_norm(
    x: npt.ArrayLike, weight: npt.ArrayLike, bias: npt.ArrayLike, eps: float, level: str | None = None
) -> _Floats: ...
def activate(name: str, x: npt.ArrayLike, up: npt.ArrayLike | None = None, level: str | None = None) -> _Floats: ...
def soft_cap(x: npt.ArrayLike, cap: float, level: str | None = None) -> _Floats: ...
def rope(
    x: npt.ArrayLike, cos: npt.ArrayLike, sin: npt.ArrayLike, scale: float = 1.0, level: str | None = None
) -> _Floats: ...
def hadamard(x: npt.ArrayLike, level: str | None = None) -> _Floats: ...
def quantize(
    x: npt.ArrayLike, planes: int = 1, level: str | None = None
) -> tuple[npt.NDArray[np.int8], _Floats, npt.NDArray[np.int32]]: ...
def matmul(
    type: str,
    packed: npt.NDArray[np.uint8],
    rows: int,
    x: npt.ArrayLike,
    out: npt.ArrayLike | None = None,
    planes: int = 1,
    repeat: int = 1,
    level: str | None = None,
) -> _Floats: ...
def softmax_step(
    scores: npt.ArrayLike,
    visible: npt.ArrayLike,
    m: npt.ArrayLike,
    l: npt.ArrayLike,
    acc: npt.ArrayLike,
    level: str | None = None,
) -> tuple[_Floats, _Floats, _Floats, _Floats]: ...

class Tile:
    def __init__(self, format: str, k: npt.ArrayLike, v: npt.ArrayLike, level: str | None = None) -> None: ...
    def put(self, lane: int, k: npt.ArrayLike, v: npt.ArrayLike) -> None: ...
    def unpack(self) -> tuple[_Floats, _Floats]: ...
    def k_dot(self, q: npt.ArrayLike) -> _Floats: ...
    def v_accumulate(self, p: npt.ArrayLike, acc: npt.ArrayLike) -> _Floats: ...

def attention(
    kv: KVCache,
    q: npt.ArrayLike | None,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    inv_freq: npt.ArrayLike,
    threads: int = 1,
    level: str | None = None,
) -> _Floats | None: ...
