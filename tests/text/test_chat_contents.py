"""Contents of messages: text or a list of parts, whichever a template takes, and none of it lost."""

import pytest

from kvrun.errors import KvrunError, OptionError
from kvrun.text.contents import first_lost
from kvrun.text.special_tokens import SpecialTokens
from kvrun.text.templates import ChatTemplate, check_messages

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[answer]"
WALKS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TESTS_TYPE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content[0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for line in m.content %}{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}"
    "<image>{% endif %}{% endfor %}\n{% endfor %}<assistant>:"
)
FIRST_PART = "{% for m in messages %}({{ m.role }}){{ m.content[0].text }}{% endfor %}"
BOTH = (
    "{% for m in messages %}|{{ m.role }}|{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)
SYSTEM_IS_TEXT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '#' + m.content }}{% elif m.role == 'user' %}"
    "{{ '?' }}{% for part in m.content %}{{ part.text }}{% endfor %}{% else %}{{ '!' + m.content }}{% endif %}"
    "{% endfor %}"
)
SYSTEM_IS_PARTS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '#' + m.content[0]['text'] }}{% else %}"
    "{{ '?' + m.content }}{% endif %}{% endfor %}"
)
STRICT = (  # fails unless system messages are text and all others are parts
    "{% for m in messages %}{% if m.role == 'system' %}{{ '#' + m.content }}{% else %}{% if m.content is string %}"
    "{{ raise_exception('no parts') }}{% endif %}{{ '?' + m.content[0].text }}{% endif %}{% endfor %}"
)


def user(content):
    return {"role": "user", "content": content}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


TALK = [
    {"role": "system", "content": "Be brief."},
    user("Hi"),
    {"role": "assistant", "content": "Hello"},
    user("What is the capital of France?"),
]


@pytest.mark.parametrize(
    "source, expected",
    [
        (PLAIN, "[system] Be brief.\n[user] Hi\n[assistant] Hello\n[user] What is the capital of France?\n[answer]"),
        (WALKS, "SYSTEM: Be brief. USER: Hi ASSISTANT: Hello USER: What is the capital of France? ASSISTANT:"),
        (
            TESTS_TYPE,
            "<system>: Be brief.<user>: Hi<assistant>: Hello<user>: What is the capital of France?<assistant>:",
        ),
        (FIRST_PART, "(system)Be brief.(user)Hi(assistant)Hello(user)What is the capital of France?"),
        (BOTH, "|system|Be brief.|user|Hi|assistant|Hello|user|What is the capital of France?"),
        (SYSTEM_IS_TEXT, "#Be brief.?Hi!Hello?What is the capital of France?"),
        (SYSTEM_IS_PARTS, "#Be brief.?Hi?Hello?What is the capital of France?"),
        (STRICT, "#Be brief.?Hi?Hello?What is the capital of France?"),
    ],
)
def test_a_template_gets_the_kind_of_content_that_it_takes(source, expected):
    assert ChatTemplate(source).render(TALK) == expected
    as_parts = [{**m, "content": parts(m["content"])} for m in TALK]
    assert ChatTemplate(source).render(as_parts) == expected
    one_of_each = [m if number % 2 else as_parts[number] for number, m in enumerate(TALK)]
    assert ChatTemplate(source).render(one_of_each) == expected


def test_the_kind_does_not_depend_on_what_is_said():
    """Words that stand in the template anyway, in a conversation that begins with them."""
    assert ChatTemplate(WALKS).render([user("USER")]) == "USER: USER ASSISTANT:"
    assert ChatTemplate(PLAIN).render([user("user")]) == "[user] user\n[answer]"


def test_parts_for_a_template_that_takes_text_are_lines():
    assert ChatTemplate(PLAIN).render([user(parts("a", "b")), user(["c", "d"])]) == (
        "[user] a\nb\n[user] c\nd\n[answer]"
    )


def test_parts_stay_parts_where_a_template_takes_both():
    source = BOTH.replace("part.text | trim", "'<' + part.text + '>'")
    assert ChatTemplate(source).render([user([*parts("a"), "b"])]) == "|user|<a><b>"


def test_text_given_as_parts_is_escaped():
    special = SpecialTokens({"<|end|>": 5})
    text = ChatTemplate(WALKS, {}, special).render([user("a<|end|>")])
    assert special.split(text) == ["USER: a<|end|> ASSISTANT:"]


def test_a_template_that_needs_a_system_message_or_refuses_one():
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + WALKS
    assert ChatTemplate(needs).render(TALK[:2]) == "SYSTEM: Be brief. USER: Hi ASSISTANT:"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + WALKS
    assert ChatTemplate(refuses).render(TALK[1:2]) == "USER: Hi ASSISTANT:"
    with pytest.raises(KvrunError, match="no system"):
        ChatTemplate(refuses).render(TALK)


@pytest.mark.parametrize(
    "source, messages, lost",
    [
        ("{% for m in messages %}{{ m.role }}:{% endfor %}", [user("Hi")], "message 1 .*'user'"),
        ("{{ messages[-1].content }}", TALK, "message 1 .*'system'"),
        ("{{ messages[0].content }}{{ messages[-1].content }}", TALK, "message 2 .*'user'"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", TALK, "'system'"),
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", [user("What is the capital?")], "message 1"),
        (PLAIN.replace("m.content", "m.text"), [user("Hi")], "message 1"),
        (BOTH.replace("part.text | trim", "part.txt"), [user(parts("Hi"))], None),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
            [*TALK, {"role": "tool", "content": "42"}],
            "message 5",
        ),
    ],
)
def test_what_is_said_and_not_rendered_is_refused(source, messages, lost):
    if lost is None:
        assert ChatTemplate(source).render(messages) == "|user|Hi"
        return
    with pytest.raises(KvrunError, match=f"leaves out what {lost}|leaves out .*{lost}") as error:
        ChatTemplate(source).render(messages)
    assert "\n" not in str(error.value)


NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
FIRST_USER = "{{ (messages | selectattr('role', 'equalto', 'user') | first).content }}"


@pytest.mark.parametrize(
    "source, messages, lost",
    [
        ("{{ messages[-1].content }}", [user("yes"), user("yes or no?")], 1),
        (FIRST_USER, [user("Name a river in France."), user("Name a river")], 2),
        (FIRST_USER, [user("Hi"), user("Hi")], 2),
        (NO_SYSTEM, [{"role": "system", "content": "hi"}, user("What is this?")], 1),
        (NO_SYSTEM, [{"role": "system", "content": "user"}, user("Why?")], 1),
        (NO_SYSTEM, [{"role": "system", "content": "/nothing"}, user("Why?")], 1),
        (FIRST_PART, [user(parts("a b", "a"))], 1),
    ],
)
def test_a_text_that_is_lost_may_stand_elsewhere(source, messages, lost):
    with pytest.raises(KvrunError, match=f"leaves out what message {lost} says"):
        ChatTemplate(source).render(messages)


@pytest.mark.parametrize(
    "filters",
    [
        *("trim", "upper", "title", "capitalize", "escape", "urlencode", "pprint", "list | join", "wordwrap(12)"),
        *("tojson", "tojson(ensure_ascii=True)", "tojson | tojson"),
        *("replace('\n', ' ')", "replace(' ', '_')", "replace('\"', '\\\\\"')"),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        'Grüße "ä"\n\U0001f389 \t x',
        "  ",
        "{{ x }} {% if %} {# c #}",
        "'a' & <b>",
        "straße İı",
        "C:\\temp\\new",
        "\ufeffé\x00",
        "/no_think",
        "\u201cx\u201d",
    ],
)
def test_however_a_template_writes_a_text_it_is_not_lost(filters, text):
    source = "{% for m in messages %}{{ m.content | " + filters + " }}\n{% endfor %}"
    assert ChatTemplate(source).render([user(text), user("Hi")])


@pytest.mark.parametrize(
    "message, rendered",
    [
        (user("  Hi \n"), "<Hi>"),
        (user("a\n\n b"), "a b"),
        ({"role": "system", "content": "/no_think Be brief."}, "Be brief."),
        ({"role": "tool", "content": 'say "a"\nb'}, r'{"output": "say \"a\"\nb"}'),
        ({"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, "yes"),
        ({"role": "assistant", "content": "[THINK]hm[/THINK]yes"}, "yes"),
        ({"role": "assistant", "content": "<answer>\nyes\n</answer>"}, "yes"),
        ({"role": "assistant", "content": "I look", "tool_calls": [{}]}, "{}"),
        (user("a < b"), "a &lt; b"),
        (user("Hello there"), "HELLO THERE"),
        (user(""), ""),
        (user("\ufdd0x"), "x"),
    ],
)
def test_what_templates_may_leave_out(message, rendered):
    assert first_lost([message], rendered) is None
    assert first_lost([{**message, "tool_calls": None, "content": "Why?"}], rendered) == 0


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}, {}, 3, None])
def test_parts_that_are_no_text(part):
    with pytest.raises(OptionError, match="message 2: a part .* only text"):
        check_messages([user("a"), user([{"type": "text", "text": "b"}, part])])
    assert check_messages([user([*parts("b"), "c"])])
