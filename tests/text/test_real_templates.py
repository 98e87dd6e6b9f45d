"""Real chat templates against jinja2 alone, in the environment that transformers makes: for a folder of them at hand.

$KVRUN_TEST_TEMPLATES names the folder; llama.cpp has one, models/templates.
"""

import json
import os
from datetime import datetime
from pathlib import Path

import pytest
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvrun.errors import KvrunError
from kvrun.text.contents import first_lost
from kvrun.text.templates import ChatTemplate
from support import ROOT

FOLDER = os.environ.get("KVRUN_TEST_TEMPLATES", "")
PATHS = sorted(Path(FOLDER).glob("*.jinja")) if FOLDER else []
CHATS = json.loads((ROOT / "tests/fixtures/chats.json").read_text("utf-8"))
VARIABLES = [{}, {"enable_thinking": False}, {"enable_thinking": True}, {"thinking": True}]

pytestmark = pytest.mark.skipif(not PATHS, reason="needs KVRUN_TEST_TEMPLATES=FOLDER")


class Generation(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def fail(message):
    raise TemplateError(message)


def tojson(value, ensure_ascii=False, **options):
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def plain(source):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=fail, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(source)


def with_reasoning(message):
    """Thinking under the names that templates read, as transformers gives it to them."""
    names = ("reasoning_content", "thinking", "reasoning")
    thinking = next((message[name] for name in names if name in message), None)
    return message if thinking is None else {"thinking": thinking, **message, "reasoning_content": thinking}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_rendered_alike(path):
    source = path.read_text("utf-8")
    ours, theirs = ChatTemplate(source, CHATS["tokens"]), plain(source)
    for messages in CHATS["conversations"]:
        for variables in VARIABLES:
            values = {**CHATS["tokens"], "tools": None, "documents": None, "add_generation_prompt": True, **variables}
            try:
                expected = theirs.render(messages=[with_reasoning(message) for message in messages], **values)
            except Exception:  # whatever a template raises
                expected = None
            if expected is None or first_lost(messages, expected) is not None:
                with pytest.raises(KvrunError):
                    ours.render(messages, **variables)
            else:
                assert ours.render(messages, **variables) == expected, messages
