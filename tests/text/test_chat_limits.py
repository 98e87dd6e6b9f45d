"""Chat templates that would compute for ever, fill the memory, or reach out: each is an error, in a line, at once."""

import json
import subprocess
import sys

import pytest

from kvrun.errors import KvrunError
from kvrun.text.templates import ChatTemplate

START = "{% set ns = namespace(x='aaaaaaaa', y=[1, 2, 3], d={'a': 1}) %}"
MANY = "{% for i in range(99999) %}"
END = "{% endfor %}"


def sixty(step, then="{{ ns.x }}"):
    return START + "{% for i in range(60) %}" + step + END + then


def nested(then):
    """A list in a list sixty times, twice in each: small, but not when written out."""
    return sixty("{% set ns.y = [ns.y, ns.y] %}", then)


BOMBS = [
    # Steps
    MANY * 3 + "x" + END * 3,
    MANY * 8 + END * 8,
    START + MANY * 2 + "{% set ns.x = i %}" + END * 2,
    MANY * 2 + "{% if i == 3 %}{% endif %}" + END * 2,
    "{% for i in range(9) %}" * 15 + END * 15,
    "{% for m in [[[]]] recursive %}{{ loop([[]]) }}{% endfor %}",
    "{% set l = range(9) %}{% for m in l recursive %}{{ loop(l) if loop.depth < 60 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for i in range(9999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "{% for i in range(9999) %}{{ range(99999) | unique | list | length }}{% endfor %}",
    START + "{% set ns.x = 'a' * 4000000 %}" + MANY + "{% if 'ab' in ns.x %}{% endif %}" + END,
    START + "{% set ns.x = 'a' * 4000000 %}" + MANY + "{% if ns.x.find('ab') %}{% endif %}" + END,
    START + "{% set ns.x = 'a' * 4000000 %}" + MANY + "{% if 'ab' is in ns.x %}{% endif %}" + END,
    START + "{% set ns.x = 'a' * 4000000 %}" + MANY + "{% set part = ns.x[1:] %}" + END,
    START + "{% set a = 'a' * 999999 %}{% set b = 'a' * 999998 ~ 'b' %}" + MANY + "{{ a == b }}" + END,
    MANY * 2 + "{{ '" + "x" * 40000 + "' == '" + "x" * 39999 + "y' }}" + END * 2,
    # Numbers
    "{{ (9**9)**(9**9) }}",
    START + "{% set ns.x = 9 %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    START + "{% set ns.x = 9 %}" + MANY + "{% set ns.x = ns.x + ns.x %}" + END,
    "{{ 1 | round(10**8, 'ceil') }}",
    "{{ ('9' * 4000000) | int }}",
    "{{ (1).to_bytes(10**9, 'little') }}",
    # Long texts and lists, also as constants that a compiler would fold
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{% if 'a' * 10**9 == 'b' %}{% endif %}",
    "{{ ([1] * 10**9) | length }}",
    "{{ ((1,) * 10**9) | length }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a' | center(width=10**9) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '1'.zfill(10**9) }}",
    "{{ '\\t'.expandtabs(tabsize=10**9) }}",
    "{{ 'a' | indent(10**9, true) }}",
    "{{ ('a\n' * 10000) | indent('x' * 100000) }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{:{w}}'.format(1, w='1000000000') }}",
    "{{ '{0[0]:{0[1]}}'.format([1, 1000000000]) }}",
    "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "{{ ['{:1000000000}'] | map('format', 1) | list }}",
    "{{ ['%1000000000d'] | map('format', 1) | list }}",
    sixty("{% set ns.x = ns.x ~ ns.x %}"),
    sixty("{% set ns.x = ns.x + ns.x %}"),
    sixty("{% set ns.x = ns.x | replace('a', 'aaaa') %}"),
    sixty("{% set ns.x = ns.x.replace('', ns.x) %}"),
    sixty("{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"),
    sixty("{% set ns.y = ns.y + ns.y %}", "{{ ns.y | length }}"),
    "{% autoescape true %}" + sixty("{% set ns.x = ns.x ~ ns.x %}") + "{% endautoescape %}",
    "{{ (['a' * 100000] * 10000) | join('b' * 100000) }}",
    "{{ ('b' * 100000).join(['a'] * 100000) }}",
    "{{ ('b' * 100000).join(range(99999) | map('string')) }}",
    "{{ range(99999) | join(d='b' * 100000) }}",
    "{{ 'a' | batch(10**9, 'b') | list | length }}",
    "{{ 'a' | slice(10**9) | list | length }}",
    "{{ ([[1] * 1000] * 10000) | sum(start=[]) | length }}",
    "{{ ('a' * 1000000) | wordwrap(1, true, 'b' * 1000) }}",
    "{{ ('<!--' * 100000) | striptags }}",
    "{{ ('http://a.b/' * 100000) | urlize }}",
    "{{ [[1]] | tojson(indent=10**9) }}",
    "{{ ([1] * 100000) | tojson(separators=('x' * 100000, ':')) }}",
    "{{ strftime_now('%c' * 1000000) }}",
    "{{ ('a b ' * 10000000).split() | length }}",
    START + "{% set ns.x = 'a' * 4000000 %}" + MANY + "{% set ns.y = [ns.x[1:], ns.y] %}" + END,
    START + MANY + "{% set ns.x = ns.x + 'aaaaaaaaaaaaaaaaaaaaaaaaa' %}" + END,
    START + MANY + "{% set ns.y = ns.y + [i] %}" + END,
    START + "{% for i in range(9999) %}{% set ns.y = [ns.y, range(99999) | list] %}{% endfor %}",
    START + "{% for i in range(9999) %}{% set ns.y = [ns.y, ('ab ' * 100000).split()] %}{% endfor %}",
    MANY + "x" * 90000 + END,
    "{% macro f() %}" + "x" * 90000 + "{% endmacro %}" + MANY + "{{ f() }}" + END,
    MANY + "{{ '" + "x" * 90000 + "' }}" + END,
    "{% filter center(10**9) %}a{% endfilter %}",
    "{% set x | center(10**9) %}a{% endset %}",
    # What is small until it is written, compared or hashed
    nested("{{ ns.y }}"),
    nested("{{ ns.y | string | length }}"),
    nested("{{ ns.y | tojson }}"),
    nested("{{ ns.y ~ '' }}"),
    nested("{{ ns.y | join(',') }}"),
    nested("{{ '%s' % [ns.y] }}"),
    nested("{{ '{}'.format(ns.y) }}"),
    nested("{{ [ns.y] | map('string') | list }}"),
    nested("{{ ns.y | pprint }}"),
    nested("{{ ns.y() }}"),
    nested("{{ ns.d[ns.y].x }}"),
    nested("{{ raise_exception(ns.y) }}"),
    nested("{% set a = ns.y %}{% set ns.y = [1, 2, 3] %}" + nested("{{ ns.y == a }}").removeprefix(START)),
    sixty("{% set ns.y = (ns.y, ns.y) %}", "{{ {ns.y: 1} }}"),
    sixty("{% set ns.y = {'a': ns.y, 'b': ns.y} %}", "{{ ns.y == {'a': ns.y.a, 'b': 1} }}{{ ns.y }}"),
    sixty("{% set ns.y = {'a': ns.y, 'b': ns.y}.items() %}", "{{ ns.y }}"),
    sixty("{% set ns.y = cycler(ns.y, ns.y).items %}", "{{ ns.y }}"),
    sixty("{% set ns.y = [ns.y] | batch(2, ns.y) | list %}", "{{ ns.y }}"),
    # Hashes and the stack
    "{{ dict.fromkeys(range(0, 90000 * (2**61 - 1), 2**61 - 1), 1) | length }}",
    START + "{% set ns.y = () %}" + MANY + "{% set ns.y = (ns.y,) %}{{ ns.y in [1] }}" + END + "{{ {ns.y: 1} }}",
    START + MANY + "{% set ns.y = ns.y | map('string') %}" + END,
    # What filters would do inside
    "{{ range(99999) | map('string') | select('in', range(99999)) | list | length }}",
    "{{ (['x'] * 99999) | map(attribute='0" + ".0" * 40000 + "') | list | length }}",
    "{{ [['x'] * 99999] | map('map', attribute='0" + ".0" * 40000 + "') | map('list') | list | length }}",
    "{{ ('%(' * 2000000) % {} }}",
    "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "{{ (['a' * 30000000] + ['\U0001f600']) | join }}",
    "{{ 'a' * 30000000 ~ '\U0001f600' }}",
    # The hooks of the sandbox are no filters
    "{{ [1] | map('a loop', -10**9, -10**9) | list }}",
    "{{ [1] | map('a beginning', 'nan' | float) | list }}",
    # Copies that no operator makes
    START + "{% set d = dict.fromkeys(range(99999), 1) %}" + MANY + "{% set ns.y = [ns.y, d.keys() - [1]] %}" + END,
    START + "{% set d = range(99999) | list %}" + MANY + "{% set ns.y = [ns.y, cycler(*d)] %}" + END,
    START + "{% set d = dict.fromkeys(range(99999), 1) %}" + MANY + "{% set ns.y = [ns.y, d.copy()] %}" + END,
    START + "{% set d = dict.fromkeys(range(99999), 1) %}" + MANY + "{% set ns.y = [ns.y, d.items() | list] %}" + END,
    START
    + "{% set d = dict.fromkeys(range(999) | map('string'), 1) %}"
    + MANY
    + "{% set ns.y = [ns.y, namespace(d)] %}"
    + END,
    START + "{% set d = range(99999) | list %}" + MANY + "{{ d.count(-1) }}" + END,
    # The source itself, and what it is compiled to
    "".join("{% set a" + str(i) + " = 1 %}" for i in range(2500)) + "{% include 'a' %}" * 2000,
    "{{ a }}" * 20000,
    "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "{{ " + "[" * 40000 + "]" * 40000 + " }}",
    "{{ " + "not " * 20000 + "1 }}",
    "{{ a" + ".b" * 40000 + " }}",
    "{{ 1" + "+1" * 40000 + " }}",
    "{{ a" + "|e" * 40000 + " }}",
    "{% if 1 %}" * 4000 + "{% endif %}" * 4000,
    "{% for i in x %}" * 3000 + END * 3000,
    "{#" * 40000,
    "{{" * 40000,
]
CHILD = """
import json, resource, sys
from kvrun.errors import KvrunError
from kvrun.text.templates import ChatTemplate

ChatTemplate("{{ messages | length }}").render([])
megabytes = 1 << 20
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 200 * megabytes,) * 2)
for source in json.load(sys.stdin):
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        ChatTemplate(source).render([{"role": "user", "content": "Hi"}])
        said = "rendered"
    except KvrunError as error:
        said = str(error)
    print(json.dumps([said, resource.getrusage(resource.RUSAGE_SELF).ru_utime - began]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the size of the process")
def test_work_and_memory_are_limited():
    """In 200 MB more than the process has. The bound on processor time is generous: each takes a few tenths of a
    second, and none would end otherwise."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(BOMBS), capture_output=True, text=True, timeout=600
    )
    results = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(results) == len(BOMBS), (BOMBS[len(results)][:200], child.stderr[-500:])
    for source, (said, seconds) in zip(BOMBS, results, strict=True):
        assert said.startswith("the model's chat template ") and "\n" not in said, (source[:200], said)
        assert seconds < 20, source[:200]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | map('string') | list | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        (
            "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.role + m.content %}"
            "{% endfor %}{{ ns.t }}"
        ),
        (
            "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ 'é' ~ m.role %}"
            "{% set ns.t = ns.t ~ m.content %}{% set ns.t = ns.t ~ '|' %}{% endfor %}{{ ns.t }}"
        ),
        (
            "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m] %}{% endfor %}"
            "{% for m in ns.l %}{{ m.content | trim | replace('x', 'y') | replace('y', 'x') }}{% endfor %}"
        ),
        (
            "{% for m in messages %}{% for n in messages[loop.index0:] %}{% if n.role == 'none' %}{{ n.role }}"
            "{% endif %}{% endfor %}{{ m.content.split('</think>')[-1].strip() }}{% endfor %}"
        ),
    ],
)
@pytest.mark.parametrize("turns, words", [(2, 200_000), (500, 200)])
def test_long_conversations_are_not_too_much(source, turns, words):
    messages = [{"role": "user", "content": "x word" * words}] * turns
    assert ChatTemplate(source).render(messages).count("word") == turns * words


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{{ '%05.1f|%-4s|%s' % (2.25, 'a', [1]) }}", "002.2|a   |[1]"),
        ("{{ '{:>4}|{a}|{0[0]}'.format([7], a='b') if false else '{:>4}|{a}'.format(7, a='b') }}", "   7|b"),
        ("{{ '%*d' % (4, 7) }}", "   7"),
        ("{{ '{a}'.format_map({'a': 1}) }}", "1"),
        ("{{ [1, 2, 3] | sum }}{{ [{'n': 2}, {'n': 3}] | sum(attribute='n') }}", "65"),
        ("{{ [{'n': 'a'}, {'n': 'b'}] | join(', ', attribute='n') }}{{ ', '.join(['a', 'b']) }}", "a, ba, b"),
        ("{{ 'ab' | list | join('-') }}{{ 'a b'.split() }}{{ 'a,b'.split(',', 1) }}", "a-b['a', 'b']['a', 'b']"),
        ("{{ 'a\nb' | indent(2) }}|{{ 'a' | center(3) }}|{{ 'a'.ljust(3) }}|", "a\n  b| a |a  |"),
        ("{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}", "[[1, 2], [3]][[1, 2], [3]]"),
        ("{{ ['b', 'a'] | sort | first }}{{ ['b', 'a'] | map('upper') | list }}", "a['B', 'A']"),
        ("{{ [1, 2] | select('equalto', 2) | list }}{{ 1 in [1] }}{{ 'a' in 'ba' }}{{ 1 < 2 < 3 }}", "[2]TrueTrueTrue"),
        ("{{ dict(a=1) }}{{ dict([('b', 2)]) }}{{ dict.fromkeys(['c'], 3) }}", "{'a': 1}{'b': 2}{'c': 3}"),
        (
            "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner(',') %}{{ j() }}{{ j() }}",
            "ab,",
        ),
        ("{% for i in [1, 2] %}{{ loop.cycle('a', 'b') }}{{ loop.length }}{% endfor %}", "a2b2"),
        ("{% macro f(x) %}<{{ caller(x) }}>{% endmacro %}{% call(y) f(1) %}{{ y }}{% endcall %}", "<1>"),
        ("{% for a in [[1, [2]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "12"),
        ("{% block a %}x{% endblock %}{{ self.a() }}", "xx"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}b{% endfilter %}", "a1B"),
        ("{% autoescape true %}{{ '<' ~ '>' }}{% endautoescape %}{{ '<' | e }}", "&lt;&gt;&lt;"),
        ("{{ 2**10 }}{{ 7 // 2 }}{{ -7 % 3 }}{{ 1 / 4 }}{{ 'a' * 3 }}{{ [1] + [2] }}", "1024320.25aaa[1, 2]"),
        ("{{ 'aXb'.swapcase() }}{{ 'a-b'.partition('-') }}{{ 'ab'.removeprefix('a') }}", "AxB('a', '-', 'b')b"),
        ("{{ {'a': 1}.items() | list }}{{ {'a': 1}.get('b', 2) }}{{ {'a': 1} | dictsort }}", "[('a', 1)]2[('a', 1)]"),
        ("{{ (1.5 | round(1, 'floor')) }}{{ '3' | int + 1 }}{{ 'long text' | truncate(4, true, '', 0) }}", "1.54long"),
    ],
)
def test_what_is_counted_gives_what_jinja_gives(source, expected):
    assert ChatTemplate(source).render([]) == expected


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "''['__class__']",
        "''|attr('__class__')",
        "[''] | map(attribute='__class__') | list",
        "[''] | map('attr', '__class__') | list",
        "'{0.__class__}'.format('')",
        "'{0.__class__}'.format_map({'0': ''})",
        "['{0.__class__}'] | map('format', '') | list",
        "''.format.__self__.__class__",
        "''.format._formatter",
        "raise_exception.__globals__",
        "namespace.__init__.__globals__",
        "cycler.__init__.__globals__",
        "cycler(1).next.__func__",
        "dict.__class__",
        "dict.fromkeys.__func__",
        "range.mro()",
        "self._TemplateReference__context",
        "f._func",
        "f._environment",
        "f.__call__",
        "([1] | map('string')).gi_frame",
        "messages.append(1)",
        "messages.extend([1])",
        "messages.sort()",
        "messages.__iter__()",
        "{}.update({})",
        "namespace(_x=1)",
        "namespace(x=1).__class__",
        "'a'.encode()",
        "'a'.translate({})",
        "lipsum()",
        "joiner.__init__",
        "loop_.__class__",
    ],
)
def test_nothing_of_python_is_reached(expression):
    source = (
        "{% macro f() %}{% endmacro %}{% for i in [1] %}{% set loop_ = loop %}{{ ("
        + expression
        + ").x.y }}{% endfor %}"
    )
    with pytest.raises(KvrunError) as error:
        ChatTemplate(source).render([])
    assert "\n" not in str(error.value)


def test_methods_of_what_a_program_passes_in_are_not_called():
    class Value:
        called = False

        def write(self):
            Value.called = True

    with pytest.raises(KvrunError, match="'write' cannot be called here"):
        ChatTemplate("{{ messages[0].x.write() }}").render([{"role": "user", "content": "", "x": Value()}])
    assert not Value.called
