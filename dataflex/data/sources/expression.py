"""`sample_weight` as arithmetic over a row's numeric columns: parsed, never run as code."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping

from dataflex.utils.errors import UserError, cut, nearest

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: math.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_CALLS: dict[str, Callable[..., float]] = {
    "abs": abs,
    "exp": math.exp,
    "log": math.log,
    "max": max,
    "min": min,
    "sqrt": math.sqrt,
}
_ARGUMENTS = {"max": (2, 255), "min": (2, 255), "log": (1, 2)}
_VALID = f"numbers, columns, + - * / % **, comparisons (1 or 0), {', '.join(_CALLS)}"
Node = Callable[[Mapping[str, float]], float]


def is_expression(text: str) -> bool:
    """Whether ``text`` computes something; a plain name, also one with hyphens or spaces, is a column."""
    return re.search(r"[+*/%()<>=]|\s-\s|^\s*-", text) is not None


class Expression:
    """``columns``: the names that it reads. Calling it with {column: number} gives a number.

    UserError for anything but arithmetic.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: dict[str, None] = {}
        try:
            tree = ast.parse(text.strip(), mode="eval")
            self._run = self._node(tree.body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
            if isinstance(exc, UserError):
                raise
            why = getattr(exc, "msg", None) or str(exc) or type(exc).__name__
            raise UserError(f"sample_weight: '{cut(text)}' is not an expression: {cut(why, 200)}") from None
        if not self.columns:
            raise UserError(f"sample_weight: '{cut(text)}' names no column")

    def __call__(self, values: Mapping[str, float]) -> float:
        """NaN where it has no value: a division by 0, the root of a negative number."""
        try:
            return float(self._run(values))
        except (ArithmeticError, ValueError, TypeError):  # TypeError: a negative number to a broken power is complex
            return math.nan

    def _node(self, node: ast.AST) -> Node:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            try:
                value = float(node.value)  # type: ignore[arg-type]
            except OverflowError:
                raise UserError(f"sample_weight: '{cut(self.text)}': a number is too large") from None
            return lambda row: value
        if isinstance(node, ast.Name):
            name = node.id
            self.columns[name] = None
            return lambda row: row[name]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner, sign = self._node(node.operand), -1.0 if isinstance(node.op, ast.USub) else 1.0
            return lambda row: sign * inner(row)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left, right, binary = self._node(node.left), self._node(node.right), _BINARY[type(node.op)]
            return lambda row: binary(left(row), right(row))
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
            low, high, compare = self._node(node.left), self._node(node.comparators[0]), _COMPARE[type(node.ops[0])]
            return lambda row: float(compare(low(row), high(row)))
        if isinstance(node, ast.Call):
            return self._call(node)
        raise UserError(
            f"sample_weight: '{cut(self.text)}': '{cut(ast.unparse(node))}' is not arithmetic; valid: {_VALID}"
        )

    def _call(self, node: ast.Call) -> Node:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in _CALLS or node.keywords or not node.args:
            hint = nearest(name, _CALLS)
            raise UserError(
                f"sample_weight: '{cut(self.text)}': unknown call '{cut(ast.unparse(node))}'{hint}; valid: {_VALID}"
            )
        call, arguments = _CALLS[name], [self._node(argument) for argument in node.args]
        low, high = _ARGUMENTS.get(name, (1, 1))
        if not low <= len(arguments) <= high:
            raise UserError(
                f"sample_weight: '{cut(self.text)}': wrong number of arguments in '{cut(ast.unparse(node))}'"
            )
        return lambda row: call(*(argument(row) for argument in arguments))
