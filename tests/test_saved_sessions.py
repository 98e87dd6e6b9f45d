"""Sessions that an older version has saved (fixtures/make_sessions.py) are restored, and saved again as they were."""

import numpy as np
import pytest

import kvrun


@pytest.mark.parametrize(
    ("model_name", "n_tokens", "messages", "k", "v"),
    [("checkpoints/grouped-tied", 436, 2, "f16", "f16"), ("families/gemma3", 355, 0, "q4", "q2")],
)
def test_restored_and_saved_again(model_name, n_tokens, messages, k, v, fixtures, tmp_path):
    from kvrun.convert import convert

    convert(fixtures / model_name, tmp_path / "model.bin", "f32")
    model = kvrun.load(tmp_path / "model.bin")
    saved = fixtures / "sessions" / f"{model_name.split('/')[1]}.kv"
    session = model.restore(saved)
    assert (session.n_tokens, len(session.messages)) == (n_tokens, messages)
    assert (session.cache.k, session.cache.v) == (k, v)
    session.save(tmp_path / "again.kv")
    assert (tmp_path / "again.kv").read_bytes() == saved.read_bytes()

    for _ in session.stream([5, 6, 7], max_tokens=0):
        pass
    assert session.n_tokens == n_tokens + 3 and np.isfinite(session.logits).all()
