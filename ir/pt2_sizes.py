"""Size expressions of a .pt2, which torch hands to sympy: what they may say, and how much they may come to.

sympy runs its text as Python and computes with integers of any length, so a short text may be code, or a number that
fills the memory. A size is held to a grammar (calls of sympy's and torch's size functions on symbols and numbers), and
to bounds on the constants and on the expanded polynomial that follow from the text alone.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from typing import TypeGuard

_FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        """
        Symbol Integer Rational Float Add Mul Pow Max Min Mod Abs floor ceiling Piecewise ExprCondPair And Or Not
        Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan
        FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural
        FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt
        RoundDecimal ToFloat Identity OpaqueUnaryFn_sqrt OpaqueUnaryFn_log2
        """,
    )
)
#: What grows, or computes a number that grows, with the value of its second operand.
_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift", "RShift", "RoundDecimal"}
_POWER_SYNTAX = (ast.Pow, ast.LShift, ast.RShift)
#: What is no longer than its longest operand; anything else is taken to be as long as all of them together.
_LONGEST_OF = {"Max", "Min", "And", "Or", "Not", "Piecewise", "ExprCondPair", "Where"}
_SYNTAX = (
    ast.Expression, ast.Call, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.keyword, ast.Load,
    ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip
_LONGEST_TEXT, _MOST_EXPONENT = 20_000, 64
_MOST_BITS, _MOST_TERMS = 1 << 14, 1 << 12
_SYMBOL = re.compile(r"[a-z]+\d+|oo|int_oo|true|false|True|False", re.ASCII)
_NUMBER = re.compile(r"[-+]?[\d.]{1,64}(e[-+]?\d{1,3})?", re.ASCII)
#: Number tokens that sympy reads otherwise than Python, which takes 1e-9999 for 0.0.
_LONG_NUMBER = re.compile(r"\d_|\de[-+]?\d{4}|\d{65}", re.ASCII | re.IGNORECASE)


def is_size(text: str) -> bool:
    """Whether a text is a size as sympy writes it, that evaluates in no time to nothing but a size."""
    if len(text) > _LONGEST_TEXT or _LONG_NUMBER.search(text):
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    nodes = list(ast.walk(tree))
    quoted = {id(node.args[0]) for node in nodes if _quotes(node)}
    if not all(id(node) in quoted or _is_part(node) for node in nodes):
        return False
    try:
        _extent(tree.body)
    except (OverflowError, RecursionError):
        return False
    return True


def _quotes(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether a node is `Symbol('s0', ...)` or `Float('0.5', ...)`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
        return False
    text = getattr(node.args[0], "value", None)
    grammar = {"Symbol": _SYMBOL, "Float": _NUMBER}.get(node.func.id)
    return grammar is not None and isinstance(text, str) and grammar.fullmatch(text) is not None


def _is_part(node: ast.AST) -> bool:
    if not isinstance(node, _SYNTAX):
        return False
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and abs(node.value) <= 2**64
    if isinstance(node, ast.keyword):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, int) and node.value.value < 1000
    if isinstance(node, ast.BinOp) and isinstance(node.op, _POWER_SYNTAX):
        return _exponent(node.right) is not None
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
            return False
        if node.func.id in _POWERS:
            return len(node.args) == 2 and _exponent(node.args[1]) is not None
        return node.func.id != "Float" or len(node.args) == 1  # the second says how many digits to compute
    return True


def _exponent(node: ast.AST) -> int | None:
    """The largest number in an exponent that is a number of at most 64; None for any other."""
    parts = list(ast.walk(node))
    numbers = [part.value for part in parts if isinstance(part, ast.Constant)]
    named = {part.id for part in parts if isinstance(part, ast.Name)}
    computed = any(isinstance(part, (ast.BinOp, ast.Compare)) for part in parts)
    if computed or not named <= {"Integer", "Rational"}:
        return None
    small = [abs(n) for n in numbers if type(n) is int and abs(n) <= _MOST_EXPONENT]
    return max(small) if small and len(small) == len(numbers) else None


@dataclass(frozen=True)
class _Extent:
    """How many bits a number made of the constants may have, and how many terms the expanded polynomial."""

    bits: int = 1
    terms: int = 1

    def __post_init__(self) -> None:
        if self.bits > _MOST_BITS or self.terms > _MOST_TERMS:
            raise OverflowError


def _extent(node: ast.AST) -> _Extent:
    """Raises OverflowError for an expression that may come to more than the bounds, in any part of it."""
    if isinstance(node, ast.Constant):
        return _Extent(_bits(str(node.value)))
    if isinstance(node, ast.Name):
        return _Extent(64)
    if isinstance(node, ast.Call):
        kind, operands = getattr(node.func, "id", ""), node.args
    elif isinstance(node, ast.BinOp):
        kind, operands = _BINARY.get(type(node.op), ""), [node.left, node.right]
    else:
        kind, operands = "", [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    parts = [_extent(operand) for operand in operands]
    bits, terms = [p.bits for p in parts] or [1], [p.terms for p in parts]
    if kind == "Add":
        return _Extent(max(bits) + len(bits).bit_length(), sum(terms))
    if kind == "Mul":
        return _Extent(sum(bits), math.prod(terms))
    if kind in _POWERS:
        exponent = _exponent(operands[1]) or 0
        shifts = kind in ("LShift", "RShift")
        return _Extent(bits[0] + exponent if shifts else bits[0] * max(1, exponent), terms[0] ** max(1, exponent))
    if isinstance(node, ast.UnaryOp):
        return parts[0]
    return _Extent(max(bits) if kind in _LONGEST_OF else sum(bits))


_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "Add",
    ast.Sub: "Add",
    ast.Mult: "Mul",
    ast.Div: "Mul",
    ast.Pow: "Pow",
    ast.LShift: "LShift",
    ast.RShift: "RShift",
}


def _bits(number: str) -> int:
    """Enough bits for a number, or for its inverse: four for each decimal place."""
    digits, _, exponent = number.lower().partition("e")
    return 4 * (len(digits) + (abs(int(exponent)) if exponent.lstrip("+-").isdecimal() else 0))
