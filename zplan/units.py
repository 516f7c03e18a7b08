"""Sizes and counts as people write them, and as they read them."""

from __future__ import annotations

import re

from zplan.errors import ConfigError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
_FACTORS = {
    "": 1, "B": 1,
    "K": 10**3, "KB": 10**3, "KIB": KIB,
    "M": 10**6, "MB": 10**6, "MIB": MIB,
    "G": 10**9, "GB": 10**9, "GIB": GIB,
    "T": 10**12, "TB": 10**12, "TIB": TIB,
}  # fmt: skip
_NUMBER = re.compile(r"^\s*(\d+(?:_\d+)*(?:\.\d+)?(?:[eE][+]?\d+)?)\s*([A-Za-z]*)\s*$")
_LARGEST = 1 << 63


def parse_count(text: str, *, name: str) -> int:
    """`8`, `1_000` -> int: how many of something, which has no unit.

    Raises:
        ConfigError: not a whole number.
    """
    digits = text.replace("_", "")
    if not digits.isdecimal():
        raise ConfigError(f"{name} is {text!r}, not a whole number", fix=f"--set {name}=2")
    return int(digits)


def parse_size(text: str | int, *, name: str = "size") -> int:
    """`1e9`, `500_000_000`, `80GiB`, `2TB` -> int (bytes, or elements for DeepSpeed's counts).

    Raises:
        ConfigError: not a number, an unknown unit, negative, fractional or beyond 2**63.
    """
    if isinstance(text, bool):
        raise ConfigError(f"{name} is {text}, not a size", fix=f"{name} 1e9")
    if isinstance(text, int):
        value: float = text
        factor = 1
    else:
        match = _NUMBER.match(str(text))
        if match is None or match.group(2).upper() not in _FACTORS:
            raise ConfigError(
                f"{name} is {text!r}, not a size",
                because="a size is a number, with or without a unit (KiB MiB GiB TiB, KB MB GB TB)",
                fix=f"{name} 80GiB, {name} 1e9 or {name} 500_000_000",
            )
        digits = match.group(1).replace("_", "")
        value = int(digits) if digits.isdigit() else float(digits)
        factor = _FACTORS[match.group(2).upper()]
    number = value * factor
    if number < 0 or number >= _LARGEST:
        raise ConfigError(f"{name} is {text}, outside 0 ... 2**63", fix=f"{name} 1e9")
    if number != int(number):
        raise ConfigError(f"{name} is {text}, not a whole number of bytes or elements", fix=f"{name} {int(number)}")
    return int(number)


def format_bytes(num_bytes: int | None) -> str:
    """Bytes for people: `19.48 GiB`; unknown is `-`."""
    if num_bytes is None:
        return "-"
    sign, magnitude = ("-" if num_bytes < 0 else ""), abs(num_bytes)
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if magnitude >= factor:
            return f"{sign}{magnitude / factor:.2f} {unit}"
    return f"{sign}{magnitude} B"


def format_bytes_short(num_bytes: int | None) -> str:
    """Bytes in five characters: `19.5G`, `986M` (binary units)."""
    if num_bytes is None:
        return "-"
    unit, factor = next((pair for pair in (("T", TIB), ("G", GIB), ("M", MIB)) if num_bytes >= pair[1]), ("K", KIB))
    number = num_bytes / factor
    return f"{number:.1f}{unit}" if number < 100 else f"{number:.0f}{unit}"


def format_count(count: int) -> str:
    """Parameter counts for people: `7.25 B`, `134.5 M`."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if abs(count) >= factor:
            return f"{count / factor:.4g} {unit}"
    return str(count)


def format_seconds(seconds: float | None) -> str:
    """Durations for people: `820 ms`, `12.4 s`, `3 min 20 s`."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
