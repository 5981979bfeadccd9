"""What a setting's text may be: each reads one kind; ValueError says what it must be.

The message follows the setting's name: "must be a whole number, not 'x'".
"""

from __future__ import annotations

from collections.abc import Callable


def integer(*, low: int, high: int) -> Callable[[str], int]:
    """A whole number of a range, ends included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"must be a whole number, not {text!r}") from None
        if not low <= value <= high:
            raise ValueError(f"must be between {low} and {high}, not {value}")
        return value

    return parse


def power_of_two(*, low: int, high: int) -> Callable[[str], int]:
    """A power of two of a range, ends included."""
    parse_integer = integer(low=low, high=high)

    def parse(text: str) -> int:
        value = parse_integer(text)
        if value & (value - 1):
            raise ValueError(f"must be a power of two, not {value}")
        return value

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """One of some words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, not {text!r}")
        return text

    return parse


def integer_of(*choices: int) -> Callable[[str], int]:
    """One of some whole numbers."""
    parse_word = one_of(*map(str, choices))
    return lambda text: int(parse_word(text))


def fraction(text: str) -> float:
    """A number above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"must be a number, not {text!r}") from None
    if not 0 < value <= 1:
        raise ValueError(f"must be above 0 and at most 1, not {text}")
    return value


def device(text: str) -> str:
    """What --device names."""
    kind, separator, index = text.partition(":")
    if text not in ("auto", "cpu", "cuda") and not (
        kind == "cuda" and separator and index.isdecimal()
    ):
        raise ValueError(f"must be auto, cpu, cuda or cuda:N, not {text!r}")
    return text


def boolean(text: str) -> bool:
    """A switch, as environments spell it."""
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(f"must be true or false, not {text!r}")


def path(text: str) -> str:
    """A path, not empty."""
    if not text:
        raise ValueError("must not be empty")
    return text


def address(text: str) -> str:
    """HOST:PORT."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"must be HOST:PORT with a port up to 65535, not {text!r}")
    return text
