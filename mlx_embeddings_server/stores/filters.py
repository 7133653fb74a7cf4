"""Metadata filters: Chroma's `where`, parsed once and translated for each database.

`{"year": 2024}`, `{"year": {"$gte": 2020}}`, `{"$and": [...]}`. Several keys in one object, and several operators of
one key, must all hold. Numbers compare by value (3 equals 3.0), and never equal true or false. A document without the
key passes $ne and $nin, and nothing else.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_embeddings_server.errors import quoted

Operator = Literal["$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin"]
Value = str | int | float | bool

_EQUALITY = ("$eq", "$ne")
_ORDER = ("$gt", "$gte", "$lt", "$lte")
_MEMBERSHIP = ("$in", "$nin")
_LOGIC = ("$and", "$or")
OPERATORS = (*_EQUALITY, *_ORDER, *_MEMBERSHIP, *_LOGIC)

# What keys of metadata do not begin with: operators, what Chroma keeps for itself, and what is kept with it here.
OWN = "mlx-embeddings:"
RESERVED = ("$", "#", "chroma:", OWN)

MAX_DEPTH = 8
MAX_CONDITIONS = 100
MAX_VALUES = 1000  # of all $in and $nin together


@dataclass(frozen=True, slots=True)
class Comparison:
    key: str
    operator: Operator
    values: tuple[Value, ...]  # one, but for $in and $nin

    @property
    def value(self) -> Value:
        return self.values[0]


@dataclass(frozen=True, slots=True)
class Group:
    logic: Literal["$and", "$or"]
    parts: tuple["Where", ...]  # two or more


Where = Comparison | Group


class FilterProblem(ValueError):
    """What is wrong with a filter, and where in it."""


def parse_where(where: object) -> Where | None:
    """None for an absent or an empty filter. Raises `FilterProblem`."""
    if where is None or where == {}:
        return None
    budget = _Budget()
    return _parse(where, "where", 1, budget)


@dataclass(slots=True)
class _Budget:
    conditions: int = 0
    values: int = 0

    def take(self, values: int) -> None:
        self.conditions += 1
        self.values += values
        if self.conditions > MAX_CONDITIONS:
            raise FilterProblem(f"where has more than {MAX_CONDITIONS} conditions")
        if self.values > MAX_VALUES:
            raise FilterProblem(f"where compares with more than {MAX_VALUES} values")


def _parse(where: object, place: str, depth: int, budget: _Budget) -> Where:
    if not isinstance(where, Mapping):
        raise FilterProblem(f'{place} must be an object such as {{"year": {{"$gte": 2020}}}}')
    if depth > MAX_DEPTH:
        raise FilterProblem(f"where is nested deeper than {MAX_DEPTH} levels")
    if not where:
        raise FilterProblem(f"{place} is empty")
    parts: list[Where] = []
    for key, condition in where.items():
        if not isinstance(key, str):
            raise FilterProblem(f"{place}: keys must be text")
        if key in ("$and", "$or"):
            parts.append(_group("$and" if key == "$and" else "$or", condition, f"{place}.{key}", depth, budget))
        elif key.startswith("$"):
            raise _unknown(key, place)
        elif key.startswith(RESERVED):
            raise FilterProblem(f"{place}: no metadata's key begins with '#', 'chroma:' or '{OWN}'")
        else:
            parts += _conditions(key, condition, f"{place}.{key[:100]}", budget)
    return _joined("$and", parts)


def _group(logic: Literal["$and", "$or"], parts: object, place: str, depth: int, budget: _Budget) -> Where:
    if not isinstance(parts, list) or not parts:
        raise FilterProblem(f"{place} must be a list of one or more conditions")
    return _joined(logic, [_parse(part, f"{place}[{n}]", depth + 1, budget) for n, part in enumerate(parts)])


def _conditions(key: str, condition: object, place: str, budget: _Budget) -> list[Where]:
    if not key:
        raise FilterProblem("where: a key is empty")
    _check_unicode(key, "where: a key")
    if not isinstance(condition, Mapping):
        condition = {"$eq": condition}
    if not condition:
        raise FilterProblem(f"{place} is empty: give it a value or an operator")
    return [_comparison(key, operator, operand, place, budget) for operator, operand in condition.items()]


def _comparison(key: str, operator: Any, operand: object, place: str, budget: _Budget) -> Comparison:
    place = f"{place}.{operator}"
    if operator in _MEMBERSHIP:
        if not isinstance(operand, list) or not operand:
            raise FilterProblem(f"{place} must be a list of one or more values")
        budget.take(len(operand))
        values = tuple(_value(each, place) for each in operand)
        if len({_family(each) for each in values}) > 1:
            raise FilterProblem(f"{place}: values must be all texts, all numbers, or all true or false")
        return Comparison(key, operator, values)
    if operator in _ORDER:
        budget.take(1)
        value = _value(operand, place)
        if _family(value) is not float:
            raise FilterProblem(f"{place} must be a number")
        return Comparison(key, operator, (value,))
    if operator in _EQUALITY:
        budget.take(1)
        return Comparison(key, operator, (_value(operand, place),))
    raise _unknown(operator, place)


def _value(value: object, place: str) -> Value:
    if not isinstance(value, str | int | float):
        raise FilterProblem(f"{place} must be a text, a number, true or false")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise FilterProblem(f"{place} must be a number of 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise FilterProblem(f"{place} must be finite")
    if isinstance(value, str):
        _check_unicode(value, place)
    return value


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FilterProblem(f"{place} is no valid Unicode") from None


def _family(value: Value) -> type:
    """Values of different families are never equal."""
    return bool if isinstance(value, bool) else str if isinstance(value, str) else float


def is_number(value: Value) -> bool:
    return _family(value) is float


def _joined(logic: Literal["$and", "$or"], parts: list[Where]) -> Where:
    return parts[0] if len(parts) == 1 else Group(logic, tuple(parts))


def _unknown(operator: object, place: str) -> FilterProblem:
    return FilterProblem(f"{place}: there is no operator {quoted(str(operator))}; known: {', '.join(OPERATORS)}")
