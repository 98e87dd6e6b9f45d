"""Sessions that have talked, for tests of what becomes of them."""

from safetensors import safe_open

GO_ON = dict(max_tokens=30, seed=3, ignore_eos=True)


def text(stream):
    return "".join(stream)


def talked(model, **cache):
    session = model.session(**cache)
    text(session.stream("Hello there", **GO_ON))
    text(session.stream("And then?", **GO_ON))
    return session


def saved_tokens(session, folder):
    """The tokens that a saved session has of its text; None if some are no longer known."""
    session.save(folder / "tokens.kv")
    with safe_open(folder / "tokens.kv", "numpy") as file:
        return file.get_tensor("tokens").tolist() if "tokens" in file.keys() else None  # noqa: SIM118
