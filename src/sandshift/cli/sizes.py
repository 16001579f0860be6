"""Sizes as people write and read them: "512", "512M", "1.5GiB" in, "187.4 MiB" out."""

from __future__ import annotations

import math
import re
from typing import Any, Final

import click

MIB: Final = 1 << 20
_UNITS: Final = {"": MIB, "k": 1 << 10, "m": MIB, "g": 1 << 30, "t": 1 << 40}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_STEPS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_bytes(text: str) -> int:
    """Bytes of "512M", "1.5GiB"; without a unit MiB. All units are powers of 1024.

    Raises:
        ValueError: it is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write 512, 512M or 1.5G (without a unit: MiB)")
    number, unit = match.groups()
    size_bytes = float(number) * _UNITS[unit.lower()]
    if not math.isfinite(size_bytes):
        raise ValueError(f"a number of {len(number)} digits is too large for a size")
    return round(size_bytes)


def show_bytes(size_bytes: float) -> str:
    """ "187.4 MiB"."""
    value, step = float(size_bytes), 0
    while value >= 1024 and step < len(_STEPS) - 1:
        value, step = value / 1024, step + 1
    return f"{value:.0f} {_STEPS[step]}" if step == 0 else f"{value:.1f} {_STEPS[step]}"


class Size(click.ParamType[int]):
    """A command line's size, in bytes, within a range."""

    name = "size"

    def __init__(self, low_bytes: int, high_bytes: int) -> None:
        self._low_bytes = low_bytes
        self._high_bytes = high_bytes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            size_bytes = parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not self._low_bytes <= size_bytes <= self._high_bytes:
            self.fail(
                f"{value} is outside {show_bytes(self._low_bytes)} to {show_bytes(self._high_bytes)}",
                param,
                ctx,
            )
        return size_bytes
