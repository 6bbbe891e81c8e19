"""Tools that a model may call: a calculator, which walks the syntax tree and never calls eval.

A tool is a function from text to text. It does not raise: it returns `error: ...` instead.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

Tools = Mapping[str, Callable[[str], str]]

MAX_LENGTH = 200  # characters of an expression
MAX_DEPTH = 30
MAX_DIGITS = 300  # of any intermediate result
MAX_EXPONENT = 1000
CHARACTERS = set("0123456789.eE+-*/%() ")

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """Result of an arithmetic expression as text, or `error: ...`. Numbers and + - * / // % ** ( ) only."""
    if len(expression) > MAX_LENGTH:
        return "error: too long"
    if not set(expression) <= CHARACTERS:  # keeps words from Python's parser
        return "error: not arithmetic"
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body, 0)
    except (ZeroDivisionError, OverflowError):
        return "error: no finite result"
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return "error: not arithmetic"
    if isinstance(value, float):
        return f"{value:.10g}" if abs(value) < float("inf") else "error: no finite result"
    return str(value)


TOOLS: Tools = {"calculator": calculate}


def run_tool(call: str, tools: Tools) -> str:
    """Run a call: `name: text` calls the tool of that name, any other text the first tool."""
    name, colon, text = call.partition(":")
    if colon and name.strip() in tools:
        return tools[name.strip()](text.strip())
    return next(iter(tools.values()))(call)


def _evaluate(node: ast.AST, depth: int) -> int | float:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_evaluate(node.operand, depth + 1))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _evaluate(node.left, depth + 1), _evaluate(node.right, depth + 1)
        if isinstance(node.op, ast.Pow) and (abs(right) > MAX_EXPONENT or abs(left) > 10**30):
            raise OverflowError
        value = _BINARY[type(node.op)](left, right)
        if isinstance(value, complex):
            raise ValueError("not real")
        return _bounded(value)
    raise ValueError("not arithmetic")


def _bounded(value: int | float) -> int | float:
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        raise OverflowError
    return value
