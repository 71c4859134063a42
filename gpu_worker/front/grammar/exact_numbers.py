"""Numbers of JSON schemas as the grammar library follows them. Those that it would change are refused.

It reads a number's digits and its power of ten as doubles, each of them rounded, and multiplies or divides them.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeGuard

_LARGEST_INTEGER = 2**63 - 1  # larger ones become this one where the schema asks for integers
_MAX_SIGNIFICAND = 2**64 - 1  # the library ignores digits after it
_MAX_POWER = 308
_EACH_INTEGER_IS_EXACT = 2**53
_SAFE_DIGITS = 15  # a double holds each decimal with this many digits
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def require_exact_value(value: float) -> None:
    """Refuse a number of `enum` or `const` that answers would not repeat. Raises: ValueError."""
    number = Decimal(str(value))
    is_integer = isinstance(value, int) and abs(value) <= _LARGEST_INTEGER
    if number.is_finite() and any(used != number for used in _used(number, is_integer)):
        raise ValueError(
            f"the number {value} in `enum` or `const` cannot be written exactly; use fewer digits, or a string"
        )


def require_exact_bounds(schema: Mapping[str, Any]) -> None:
    """Refuse bounds that would allow numbers which the schema does not, and other factors. Raises: ValueError."""
    is_integer = _asks_for_integers(schema)
    for name in _BOUNDS:
        value = schema.get(name)
        if _is_number(value):
            number = Decimal(str(value))
            uses = _used(number, is_integer) if number.is_finite() else []
            if not all(_is_kept(name, number, used, is_integer) for used in uses):
                raise ValueError(f"the number {value} in `{name}` cannot be followed exactly; use fewer digits")


def with_inclusive_bounds(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema with the nearest inclusive bound of 15 digits instead of an exclusive bound without fraction.

    The library would allow that bound itself if the other bound is less than 1 away, in this schema or beside it.
    """
    found = dict(schema)
    if _asks_for_integers(schema):
        return found
    for exclusive, inclusive, sign in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
        other = found.get(inclusive)
        bound = other if found.get(exclusive) is True else found.get(exclusive)  # draft 4 has a boolean
        nearest = _next_to(bound, sign)
        if nearest is not None:
            bounds = [nearest, other] if _is_number(other) else [nearest]
            found[inclusive] = max(bounds) if sign > 0 else min(bounds)
            del found[exclusive]
    return found


def _next_to(bound: Any, sign: int) -> float | None:
    if not _is_number(bound) or bound % 1 != 0:
        return None
    places = _SAFE_DIGITS - len(str(abs(int(bound))))
    return float(int(bound) + sign * Decimal(10) ** -places) if places > 0 else None


def _asks_for_integers(schema: Mapping[str, Any]) -> bool:
    names = schema.get("type")
    return isinstance(names, str | list) and "integer" in names and "number" not in names


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_kept(name: str, number: Decimal, used: Decimal, is_integer: bool) -> bool:
    if name == "minimum":
        return used >= number
    if name == "maximum":
        return used <= number
    # An exclusive bound of integers becomes an inclusive one by adding or subtracting 1 in doubles.
    return used == number and (name == "multipleOf" or not is_integer or abs(number) <= _EACH_INTEGER_IS_EXACT)


def _used(number: Decimal, is_integer: bool) -> list[Decimal]:
    """Return what the library makes of this number: it reads the schema of a tool once, and of an answer twice."""
    once = _read(number)
    return [_as_integer(read) if is_integer else read for read in (once, _read(once))]


def _as_integer(read: Decimal) -> Decimal:
    if not read.is_finite() or read != int(read):
        return read
    return min(Decimal(int(float(read))), Decimal(_LARGEST_INTEGER))


def _read(number: Decimal) -> Decimal:
    """Return the shortest form of the double that the library reads."""
    if not number.is_finite():
        return number
    sign, parts, power = number.as_tuple()
    digits = "".join(map(str, parts))
    length = 20 if int(digits[:20]) <= _MAX_SIGNIFICAND else 19
    exponent = int(power) + len(digits[length:])
    read = float(digits[:length])
    while exponent < -_MAX_POWER:
        read, exponent = read / float(f"1e{_MAX_POWER}"), exponent + _MAX_POWER
    scale = float(f"1e{abs(exponent)}")
    read = read * scale if exponent >= 0 else read / scale
    return Decimal(str(-read if sign else read))
