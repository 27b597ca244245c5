"""Settings of heads in words, and what people type as lists."""

from __future__ import annotations

from ..errors import InputError
from ..plan import HeadSetting


def in_words(setting: HeadSetting | None, n: int) -> str:
    """Return what a head computes at a prompt of n tokens."""
    if setting is None:
        return "exact"
    sizes = setting.at(n)
    parts = [f"window {sizes.window}"]
    if sizes.columns:
        parts.append(f"{sizes.columns} columns")
    if sizes.blocks:
        parts.append(f"{sizes.blocks} blocks")
    if sizes.far_field != "none":
        parts.append(f"{'weighed ' if sizes.key_weights else ''}{sizes.far_field}")
    if sizes.correction:
        parts.append("correction")
    return ", ".join(parts)


def numbers(name: str, text: str, least: int, most: int | None = None) -> list[int]:
    """Read whole numbers separated by commas; a range a-b counts as all of them.

    Raises:
        InputError: something else is written, or a number is out of bounds.
    """
    found: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if not all(end.isascii() and end.isdigit() for end in ends) or len(ends) > 2:
            raise InputError(f"{name}={text!r}: give numbers separated by commas, as 2,15 or 0-3")
        first, last = int(ends[0]), int(ends[-1])
        bounds = f"from {least} on" if most is None else f"{least} to {most}"
        if first < least or (most is not None and last > most) or first > last:
            raise InputError(f"{name}={text!r}: {part.strip()} is not among those {bounds}")
        found.extend(range(first, last + 1))
    return sorted(set(found))
