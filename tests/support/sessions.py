"""Sessions that have talked, for tests of what becomes of them."""

GO_ON = dict(max_tokens=30, seed=3, ignore_eos=True)


def text(stream):
    return "".join(stream)


def talked(model, **cache):
    session = model.session(**cache)
    text(session.stream("Hello there", **GO_ON))
    text(session.stream("And then?", **GO_ON))
    return session
