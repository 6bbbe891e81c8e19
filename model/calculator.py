"""A calculator, which walks the syntax tree of an expression and never calls eval."""

from __future__ import annotations

import ast
import math
import operator
from decimal import Context, Decimal, Overflow
from fractions import Fraction

MAX_LENGTH = 200  # characters of an expression
MAX_DEPTH = 30
MAX_DIGITS = 300  # before the decimal point, of any intermediate result
MAX_PLACES = 600  # after it; what is smaller is 0
MAX_BITS = 100_000  # of an exact power
EXACT_DIGITS = 100  # a result with more is rounded
ROUNDED_DIGITS, PLACES = 10, 2  # to this many digits, or decimal places if they are more
CHARACTERS = set("0123456789.eE+-*/%() ")
# for powers that are not rational, or too long
APPROXIMATE = Context(prec=MAX_DIGITS + 20, Emax=MAX_DIGITS + 1, Emin=-MAX_PLACES - 1)

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """Result of an arithmetic expression as text, or `error: ...`. Numbers and + - * / // % ** ( ) only.

    Calculates with fractions, so only powers such as 2**0.5 are approximate. All digits are shown if they
    end: 0.1+0.2 is 0.3, and 1/3 is 0.3333333333.
    """
    if len(expression) > MAX_LENGTH:
        return "error: too long"
    if not set(expression) <= CHARACTERS:  # keeps words from Python's parser
        return "error: not arithmetic"
    expression = expression.strip()
    try:
        return shown(_evaluate(ast.parse(expression, mode="eval").body, expression, 0))
    except (ZeroDivisionError, OverflowError, Overflow):
        return "error: no finite result"
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return "error: not arithmetic"


def shown(value: Fraction) -> str:
    """A number in decimal; in scientific notation below 0.0001."""
    if value.denominator == 1:
        return str(value.numerator)
    numerator, denominator = Decimal(value.numerator), Decimal(value.denominator)
    context = Context(prec=EXACT_DIGITS)
    number = context.divide(numerator, denominator)
    if Fraction(number) != value:
        context = Context(prec=max(ROUNDED_DIGITS, number.adjusted() + 1 + PLACES))
        number = context.divide(numerator, denominator)
    number = number.normalize(context)  # no zeros at the end
    exponent = number.adjusted()
    if exponent < -4:
        return f"{number.scaleb(-exponent, context):f}e{exponent:+03}"
    return f"{number:f}"


def _evaluate(node: ast.AST, expression: str, depth: int) -> Fraction:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(_number(node, expression))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_evaluate(node.operand, expression, depth + 1))
    if isinstance(node, ast.BinOp):
        left, right = (_evaluate(side, expression, depth + 1) for side in (node.left, node.right))
        if isinstance(node.op, ast.Pow):
            return _bounded(_power(left, right))
        if type(node.op) in _BINARY:
            return _bounded(Fraction(_BINARY[type(node.op)](left, right)))
    raise ValueError("not arithmetic")


def _number(node: ast.Constant, expression: str) -> Fraction:
    """A number as it is written: its float may have fewer digits."""
    if isinstance(node.value, int) or node.value == 0 or math.isinf(node.value):
        return Fraction(node.value)  # OverflowError if infinite
    return Fraction(Decimal(expression[node.col_offset : node.end_col_offset]))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    whole = exponent.denominator == 1
    if base == 0:
        if exponent < 0:
            raise ZeroDivisionError
        return Fraction(exponent == 0)
    if base < 0 and not whole:
        raise ValueError("not real")
    digits = float(exponent) * (math.log10(abs(base.numerator)) - math.log10(base.denominator))
    if digits > MAX_DIGITS + 1:
        raise OverflowError
    if digits < -MAX_PLACES - 1:
        return Fraction(0)
    if whole and abs(exponent) * max(abs(base.numerator), base.denominator).bit_length() <= MAX_BITS:
        return base**exponent.numerator
    base, exponent = (
        APPROXIMATE.divide(Decimal(n.numerator), Decimal(n.denominator)) for n in (base, exponent)
    )
    return Fraction(APPROXIMATE.power(base, exponent))


def _bounded(value: Fraction) -> Fraction:
    if abs(value) >= 10**MAX_DIGITS:
        raise OverflowError
    return value if value.denominator <= 10**MAX_PLACES else round(value, MAX_PLACES)
