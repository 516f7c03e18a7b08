"""check_seams: the places in other libraries that the simulation holds on to, verified before it says a number."""

from __future__ import annotations


def check_seams() -> None:
    pass
