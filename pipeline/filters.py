"""Which samples are worth encoding: bounds on size, rate and length, and one expression over the metadata.

In:   a FilterConfig, and the Facts of one sample (no pixels).
Out:  None for a sample to keep, else a stable reason for the ledger.
Cost: microseconds a sample; the expression is parsed once, its work is bounded by its length and the metadata's.
Errors: UsageError from a config, when it is made; a sample is never an error, it is filtered with a reason.

The expression is a closed subset of Python's: what `_Compiler` does not list cannot be said. `eval` never sees it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from pipeline.decode.records import MediaInfo
from pipeline.errors import SampleError, UsageError

MAX_LENGTH = 1000
MAX_DEPTH = 60
MAX_NUMBER = 2**63

_INFO = ("kind", "container", "codec", "width", "height", "rotation_degrees", "fps", "num_frames", "duration_seconds")
NAMES = ("key", "caption", "meta", *_INFO)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a sample before it is decoded; `metadata` is the text of its JSON member, "" without one."""

    info: MediaInfo
    key: str
    caption: str = ""
    metadata: str = ""

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """The metadata as a dict, parsed when an expression first asks for it; {} without metadata.

        Raises:
            SampleError: it is not the text of a JSON object.
        """
        try:
            parsed = json.loads(self.metadata) if self.metadata else {}
        except (ValueError, RecursionError) as error:
            raise SampleError("keep_bad_metadata", f"{self.key}: {error}") from error
        if not isinstance(parsed, dict):
            raise SampleError("keep_bad_metadata", f"{self.key}: metadata is {type(parsed).__name__}, not an object")
        return parsed


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Samples outside any bound are filtered; bounds are inclusive, None is none.

    Rates and durations bind videos only: an image has neither.
    """

    min_width: int | None = None
    """Least width in pixels, upright."""
    min_height: int | None = None
    """Least height in pixels, upright."""
    min_fps: float | None = None
    """Least frames per second."""
    max_fps: float | None = None
    """Most frames per second."""
    min_duration_seconds: float | None = None
    """Shortest video."""
    max_duration_seconds: float | None = None
    """Longest video."""
    keep: str | None = None
    """Keep samples for which this holds, such as `width >= 720 and meta["aesthetic"] > 5 and "cat" in caption`. Names:
    key, caption, meta (the sample's json), kind ("video" or "image"), container, codec, width, height,
    rotation_degrees, fps, num_frames, duration_seconds. Also: and or not, == != < <= > >= in, + - * / // % on numbers,
    x if y else z, meta["a"][0], (tuples), [lists], len() min() max() abs() lower()."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "keep" and value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be positive, or unset for no bound: got {value}")
        for name in ("fps", "duration_seconds"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise UsageError(f"min_{name} {low} is above max_{name} {high}: no video would be left")
        if self.keep is not None:
            compile_keep(self.keep)

    @functools.cached_property
    def bounds(self) -> dict[str, float]:
        """Those that are set."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name != "keep" and value is not None}


def reject_reason(config: FilterConfig, facts: Facts) -> str | None:
    """Why a sample is filtered, or None to keep it.

    Reasons: the names of the bounds, first one first; "keep", the expression does not hold; "keep_missing_field", no
    such meta key or index; "keep_type_error", unfit operands, division by zero; "keep_bad_metadata", no JSON object.
    """
    values = _bounded(facts) if config.bounds else {}
    for reason, bound in config.bounds.items():
        value = values.get(reason, bound)  # an image has not all of them
        if not (value >= bound if reason.startswith("min_") else value <= bound):
            return reason
    return None if config.keep is None else _keep_reason(compile_keep(config.keep), facts)


def _bounded(facts: Facts) -> dict[str, float]:
    """What every bound is held against."""
    info = facts.info
    size: dict[str, float] = {"min_width": info.width, "min_height": info.height}
    if info.kind == "image":
        return size
    time = {"fps": info.fps, "duration_seconds": info.duration_seconds}
    return size | {f"{side}_{name}": value for name, value in time.items() for side in ("min", "max")}


def _keep_reason(expression: Expression, facts: Facts) -> str | None:
    try:
        return None if expression(facts) else "keep"
    except SampleError as error:
        return error.reason
    except LookupError:
        return "keep_missing_field"
    except (TypeError, ValueError, ArithmeticError, RecursionError):
        return "keep_type_error"


Expression = Callable[[Facts], Any]


@functools.lru_cache(maxsize=32)
def compile_keep(text: str) -> Expression:
    """The expression as a function of Facts; equal texts give the same function.

    Raises:
        UsageError: it is not of the language; the message names the text, the position and what there is.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise UsageError(f"keep has {len(text)} characters, at most {MAX_LENGTH} are read: {text[:60]!r}...")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a doubtful escape such as "\d" is an error here, not a line in a log
            tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        place = f"at character {error.offset or len(text) + 1} of line {error.lineno}"
        raise UsageError(f"keep {text!r}: {error.msg}, {place}; names are {', '.join(NAMES)}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"keep {text!r} cannot be parsed: {error}") from error
    return _Compiler(text).compile(tree.body, MAX_DEPTH)


class _Compiler:
    """From syntax trees to functions, node by node; a node without a method here is not of the language."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._compilers: dict[type[ast.AST], Callable[[Any, int], Expression]] = {
            ast.Constant: self._constant,
            ast.Name: self._name,
            ast.Tuple: self._sequence,
            ast.List: self._sequence,
            ast.BoolOp: self._bool,
            ast.UnaryOp: self._operation,
            ast.BinOp: self._operation,
            ast.Compare: self._compare,
            ast.IfExp: self._conditional,
            ast.Subscript: self._subscript,
            ast.Call: self._call,
        }

    def compile(self, node: ast.expr, depth: int) -> Expression:
        if not depth:
            self._refuse(node, f"nested more than {MAX_DEPTH} deep")
        compiler = self._compilers.get(type(node))
        if compiler is None:
            self._refuse(node, f"{type(node).__name__} is not of the language")
        return compiler(node, depth - 1)

    def _refuse(self, node: ast.expr, problem: str) -> NoReturn:
        line = re.split("\r\n|\r|\n", self._text)[node.lineno - 1]
        column = len(line.encode()[: node.col_offset].decode()) + 1
        raise UsageError(
            f"keep {self._text!r}: {problem}, at character {column} of line {node.lineno}; "
            f"names are {', '.join(NAMES)}; functions are {', '.join(_FUNCTIONS)}"
        )

    def _operator(self, node: ast.expr, op: ast.AST) -> Callable[..., Any]:
        function = _OPERATORS.get(type(op))
        if function is None:
            self._refuse(node, f"{type(op).__name__} is not of the language")
        return function

    def _constant(self, node: ast.Constant, _: int) -> Expression:
        value = node.value
        if not isinstance(value, str | int | float | None):
            self._refuse(node, f"{value!r} is not text, a number, True, False or None")
        return lambda _: value

    def _name(self, node: ast.Name, _: int) -> Expression:
        if node.id not in NAMES:
            self._refuse(node, f"there is no name {node.id!r}")
        return operator.attrgetter(f"info.{node.id}" if node.id in _INFO else node.id)

    def _sequence(self, node: ast.Tuple | ast.List, depth: int) -> Expression:
        items = [self.compile(item, depth) for item in node.elts]
        return lambda facts: [item(facts) for item in items]

    def _bool(self, node: ast.BoolOp, depth: int) -> Expression:
        terms = [self.compile(term, depth) for term in node.values]
        is_or = isinstance(node.op, ast.Or)

        def evaluate(facts: Facts) -> Any:
            value = None
            for term in terms:
                value = term(facts)
                if bool(value) is is_or:
                    break
            return value

        return evaluate

    def _operation(self, node: ast.UnaryOp | ast.BinOp, depth: int) -> Expression:
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        function, operands = self._operator(node, node.op), [self.compile(part, depth) for part in parts]
        return lambda facts: function(*(operand(facts) for operand in operands))

    def _compare(self, node: ast.Compare, depth: int) -> Expression:
        operands = [self.compile(operand, depth) for operand in (node.left, *node.comparators)]
        functions = [self._operator(node, op) for op in node.ops]

        def evaluate(facts: Facts) -> bool:
            left = operands[0](facts)
            for function, operand in zip(functions, operands[1:], strict=True):
                right = operand(facts)
                if not function(left, right):
                    return False
                left = right
            return True

        return evaluate

    def _conditional(self, node: ast.IfExp, depth: int) -> Expression:
        test, body, other = (self.compile(part, depth) for part in (node.test, node.body, node.orelse))
        return lambda facts: body(facts) if test(facts) else other(facts)

    def _subscript(self, node: ast.Subscript, depth: int) -> Expression:
        root = node.value
        while isinstance(root, ast.Subscript):
            root = root.value
        if not isinstance(root, ast.Name) or root.id != "meta":
            self._refuse(node, "only meta has fields, as in meta['aesthetic']")
        value, field = self.compile(node.value, depth), self.compile(node.slice, depth)
        return lambda facts: value(facts)[field(facts)]

    def _call(self, node: ast.Call, depth: int) -> Expression:
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
            self._refuse(node, "there is no such function")
        function, takes_many = _FUNCTIONS[node.func.id]
        if node.keywords or not node.args or (len(node.args) > 1 and not takes_many):
            self._refuse(node, f"{node.func.id}() takes {'values' if takes_many else 'one value'}, without names")
        arguments = [self.compile(argument, depth) for argument in node.args]
        return lambda facts: function(*(argument(facts) for argument in arguments))


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for numbers of at most 64 bits only: text is not multiplied, numbers cannot grow without end."""

    def apply(*operands: Any) -> Any:
        for value in operands:
            if not (isinstance(value, float) or (isinstance(value, int) and abs(value) <= MAX_NUMBER)):
                raise TypeError("arithmetic takes numbers of at most 64 bits")
        return function(*operands)

    return apply


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Not: operator.not_,
    ast.USub: _arithmetic(operator.neg),
    ast.Add: _arithmetic(operator.add),
    ast.Sub: _arithmetic(operator.sub),
    ast.Mult: _arithmetic(operator.mul),
    ast.Div: _arithmetic(operator.truediv),
    ast.FloorDiv: _arithmetic(operator.floordiv),
    ast.Mod: _arithmetic(operator.mod),
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
}

_FUNCTIONS: dict[str, tuple[Callable[..., Any], bool]] = {
    "len": (len, False),
    "min": (min, True),
    "max": (max, True),
    "abs": (_arithmetic(abs), False),
    "lower": (str.lower, False),
}
