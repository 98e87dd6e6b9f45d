import numpy as np
import numpy.typing as npt

class Sampler:
    temperature: float
    top_p: float
    min_p: float
    repeat_penalty: float
    top_k: int
    repeat_last_n: int
    seed: int
    def __init__(
        self,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int = 0,
    ) -> None: ...
    def reset(self) -> None: ...
    def accept(self, token: int) -> None: ...
    def sample(self, logits: npt.NDArray[np.float32]) -> int: ...
    def probabilities(
        self, logits: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]: ...
