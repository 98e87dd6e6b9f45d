"""The environment of chat templates: jinja2's sandbox, stricter, with everything counted against a budget.

Templates are written for the environment of the transformers library; this one has what that has. Beyond jinja2's own
rules only functions and methods that are listed can be called. The syntax tree of a template is changed before it is
compiled: loops and macros count their steps, and what would make or search text without a call gets one.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache, wraps
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import TemplateError, nodes, pass_environment, pass_eval_context
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_join, make_attrgetter
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined, markup_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from kvrun.text import costs
from kvrun.text.budget import LimitError, current, text_bytes

LONGEST_SOURCE = 100_000
"""Characters of a template."""
LONGEST_CODE = 1_000_000
"""Characters of a template compiled to Python; real ones have 60,000."""
_LAZY = frozenset("batch first items map random reject rejectattr reverse select selectattr slice unique".split())
_CHEAP_TESTS = frozenset(
    "boolean callable defined divisibleby escaped even false filter float integer iterable mapping none number odd "
    "sameas sequence string test true undefined".split()
)
_OPERATORS = {"+": costs.added, "-": costs.subtracted, "*": costs.multiplied, "**": costs.raised, "%": costs.remainder}


class _Generation(Extension):
    """{% generation %}: marks answers for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it of instances)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """jinja2's, without names that begin with an underscore. As text it is only its name: it may contain itself."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        current().spend(100 * len(attributes))
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have an attribute {name!r:.40}")

    def __repr__(self) -> str:
        return "<Namespace>"


class _Dict:
    """`dict` as a function, with `dict.fromkeys`."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Format:
    """`text.format` and `text.format_map`, which jinja2's formatters keep from what a template must not reach."""

    def __init__(self, environment: Any, text: str, is_map: bool) -> None:
        self._text, self._is_map = text, is_map
        self._formatter = (
            SandboxedEscapeFormatter(environment, escape=Markup.escape)
            if isinstance(text, Markup)
            else SandboxedFormatter(environment)
        )

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        values, names = ((), dict(args[0])) if self._is_map else (args, kwargs)
        current().need(costs.braces(self._text, [*values, *names.values()]))
        return type(self._text)(self._formatter.vformat(self._text, values, names))


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    current().need(costs.date(form))
    return datetime.now().strftime(form)


def _range(*bounds: int) -> range:
    # Integers from 2 ** 61 - 1 on may all have the same hash.
    if any(isinstance(bound, int) and abs(bound) > 1 << 53 for bound in bounds):
        raise LimitError("a range goes beyond 2 ** 53")
    return safe_range(*bounds)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# --- what the changed tree calls ------------------------------------------------------------------


def _loop(values: Any, steps: int, size: int) -> Any:
    return current().turns(values, steps, size)


def _begin(steps: int, size: int) -> None:
    current().step(steps)
    current().spend(size)


@pass_eval_context
def _concat(context: Any, parts: tuple[Any, ...]) -> str:
    budget = current()
    budget.need(costs.concatenated(parts))
    text: str = budget.made(markup_join(parts) if context.autoescape else "".join(map(str, parts)))
    return text


_HOOKS: dict[str, Callable[..., Any]] = {
    # No name that a template can write has a space in it.
    "a loop": _loop,
    "a beginning": _begin,
    "a concatenation": _concat,
    "a look": lambda value: current().look(value),
    "a slice": lambda value: current().made(value),
}


def _hook(name: str, node: Any, *constants: int) -> nodes.Filter:
    arguments = [nodes.Const(value) for value in constants]
    return nodes.Filter(node, name, arguments, [], None, None, lineno=node.lineno)


# --- the tree -------------------------------------------------------------------------------------

_STEPS: tuple[tuple[type[nodes.Node], int], ...] = (
    (nodes.Call, 8),
    (nodes.Filter, 8),
    (nodes.Concat, 16),
    (nodes.BinExpr, 10),
    (nodes.Test, 8),
    (nodes.Getattr, 8),
    (nodes.Getitem, 8),
    (nodes.Compare, 6),
    (nodes.Output, 6),
)
"""What takes longer than a step, about 0.1 microseconds."""
_BODIES = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)


def _cost(node: nodes.Node) -> tuple[int, int]:
    """(steps, bytes of text) of a node, without the bodies that count themselves."""
    steps, size = next((steps for kind, steps in _STEPS if isinstance(node, kind)), 1), 0
    if isinstance(node, nodes.TemplateData):
        size += 16 + text_bytes(node.data)
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        steps += len(node.value) // 64
    for child in node.iter_child_nodes(exclude=("body", "test") if isinstance(node, _BODIES) else ()):
        inner = _cost(child)
        steps, size = steps + inner[0], size + inner[1]
    return steps, size


def _cost_of(body: list[nodes.Node]) -> tuple[int, int]:
    each = [_cost(node) for node in body]
    return 10 + sum(steps for steps, _ in each), sum(size for _, size in each)


class _Counting(NodeTransformer):
    """Puts the hooks into the tree of a template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        steps, size = _cost_of(node.body + ([node.test] if node.test else []))
        self.generic_visit(node)
        node.iter = _hook("a loop", node.iter, steps, size)
        if node.recursive:
            node.body.insert(0, self._beginning(node, steps, size))
        return node

    def _begun(self, node: Any) -> Any:
        steps, size = _cost_of(node.body)
        self.generic_visit(node)
        node.body.insert(0, self._beginning(node, steps, size))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _begun

    @staticmethod
    def _beginning(node: Any, steps: int, size: int) -> nodes.ExprStmt:
        first = nodes.Const(steps, lineno=node.lineno)
        return nodes.ExprStmt(_hook("a beginning", first, size), lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _hook("a concatenation", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _hook("a slice", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        searches = any(operand.op in ("in", "notin") for operand in node.ops)
        if searches or not any(map(_is_constant, [node.expr, *(operand.expr for operand in node.ops)])):
            node.expr = _looked_at(node.expr)
            for operand in node.ops:
                operand.expr = _looked_at(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _looked_at(node.key)
        return node


def _is_constant(node: nodes.Expr) -> bool:
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return all(map(_is_constant, node.items))
    return isinstance(node, nodes.Const)


def _looked_at(node: nodes.Expr) -> nodes.Expr:
    return node if _is_constant(node) else _hook("a look", node)


# --- filters and tests ----------------------------------------------------------------------------


def _counted_filter(name: str, function: Any) -> Any:
    """A filter that says how large its result will be, and counts it."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0
    sizer = costs.FILTERS.get(name)

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = current()
        given = list(args[skip:])
        options = (*given[1:], *kwargs.values())
        for value in (*given, *options):
            budget.look(value)
        source = given[0] if given else None
        if given and not isinstance(source, str):
            # An attribute may be a path of many parts, which is gone for each value.
            each = 8 + sum(len(option) for option in options if isinstance(option, str)) // 2
            given[0] = budget.turns(source, each)
            if isinstance(source, Iterator) and name not in _LAZY:
                given[0] = list(budget.turns(given[0], 1, 16))
        budget.step(16)
        if sizer is not None:
            budget.need(sizer(*(_in_order(function, skip, given, kwargs) if kwargs else given)))
        result = function(*args[:skip], *given, **kwargs)
        if isinstance(result, list):  # of pairs or characters, perhaps, made for it
            budget.spend(64 * len(result))
        return budget.lazy(result, source)

    return counted


_signature = cache(inspect.signature)


def _in_order(function: Any, skip: int, given: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments by position."""
    bound = _signature(function).bind(*[None] * skip, *given, **kwargs)
    bound.apply_defaults()
    return (*bound.args[skip:], *bound.kwargs.values())


def _counted_test(function: Any) -> Any:
    @wraps(function)
    def counted(*args: Any) -> Any:
        for value in args:
            current().look(value)
        return function(*args)

    return counted


@pass_environment
def _sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    part: Callable[[Any], Any]
    part = (lambda value: value) if attribute is None else make_attrgetter(environment, attribute)
    total = start
    for value in iterable:
        total = environment.call_binop(None, "+", total, part(value))
    return total


@pass_eval_context
def _join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
    return do_join(context, costs.joined(value, d if isinstance(d, str) else ""), d, attribute)


# --- the environment ------------------------------------------------------------------------------

_FUNCTIONS = (_raise_exception, _strftime_now, _range, _Namespace, Cycler, Joiner)
_CALLABLE = (Macro, BlockReference, LoopContext, Joiner, Undefined, _Dict, _Format)
_OWN_METHODS = ((LoopContext, ("cycle", "changed")), (Cycler, ("next", "reset")), (_Dict, ("fromkeys",)))


class _Generator(CodeGenerator):
    """Stops when the code becomes long: for some statements jinja2 writes the names of all variables each time."""

    _written = 0

    def write(self, x: str) -> None:
        self._written += len(x)
        if self._written > LONGEST_CODE:
            raise LimitError("it is too long when compiled")
        super().write(x)


class Sandbox(ImmutableSandboxedEnvironment):
    """Templates for chats. What is rendered uses up the budget of `kvrun.text.budget.limited`; nothing is computed when
    a template is compiled."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(_OPERATORS)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            finalize=_finalize,
        )
        filters = self.filters | {"tojson": _tojson, "sum": _sum, "join": _join}  # jinja2's tojson escapes HTML
        self.filters = {name: _counted_filter(name, function) for name, function in filters.items()} | _HOOKS
        for name in self.tests.keys() - _CHEAP_TESTS:
            self.tests[name] = _counted_test(self.tests[name])
        self.globals = {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "range": _range,
            "dict": _Dict(),
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
        }

    def compiled(self, source: str) -> Any:
        """A template. jinja2's errors, or LimitError if it is too long."""
        if len(source) > LONGEST_SOURCE:
            raise LimitError(f"it has {len(source)} characters, more than {LONGEST_SOURCE}")
        return self.from_string(source)

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name in _HOOKS:  # they are for the changed tree only
            raise TemplateRuntimeError(f"No filter named {name!r}.")
        return super().call_filter(name, *args, **kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counting().visit(source), *args, **kwargs)

    def _compile(self, source: str, filename: str) -> Any:
        with warnings.catch_warnings():
            # What the compiler finds odd in a template is not for those who use it.
            warnings.simplefilter("ignore")
            return super()._compile(source, filename)

    @staticmethod
    def concat(parts: Any) -> str:
        parts = list(parts)
        current().need(4 * sum(map(len, parts)))
        return "".join(parts)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, (str, int)):
            current().look(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Any:
        if not isinstance(value, (MethodType, BuiltinMethodType)) or value.__name__ not in ("format", "format_map"):
            return None
        text = value.__self__
        return _Format(self, text, value.__name__ == "format_map") if isinstance(text, str) else None

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = current()
        size = _OPERATORS[operator](left, right)
        if size:
            budget.need(size)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.step(16)
        budget.spend(16 * len(args) + 100 * len(kwargs))
        for value in (*args, *kwargs.values()):
            budget.look(value)
        if not __self.is_safe_callable(__obj):
            raise SecurityError(f"{getattr(__obj, '__name__', type(__obj).__name__)!r:.40} cannot be called here")
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (list, tuple)):
            budget.look(owner)
        elif isinstance(owner, str):
            args = __self._measured(owner, __obj.__name__, args, kwargs)
        result = __context.call(__obj, *args, **kwargs)
        if isinstance(owner, str) and isinstance(result, list):  # parts of a text are texts of their own
            budget.spend(64 * len(result))
        return budget.lazy(result)

    @staticmethod
    def _measured(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments for a method of a text, of which the result has room."""
        budget = current()
        budget.look(text)
        if name == "join" and args:
            return (costs.joined(args[0], text), *args[1:])
        sizer = costs.METHODS[str][name]
        if sizer is not None:
            budget.need(sizer(text, *args, *kwargs.values()))
        return args

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, _CALLABLE) or any(obj is function for function in _FUNCTIONS):
            return True
        if not isinstance(obj, (BuiltinMethodType, MethodType)):
            return False
        owner, name = obj.__self__, obj.__name__
        methods = next((names for kind, names in costs.METHODS.items() if isinstance(owner, kind)), {})
        return name in methods or any(isinstance(owner, kind) and name in names for kind, names in _OWN_METHODS)


def _finalize(value: Any) -> Any:
    """A value that is about to be written. Text that the template itself has is so already when that is compiled."""
    return current().shown(value)
