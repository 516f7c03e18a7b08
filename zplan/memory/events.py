"""Events: what a tape says that happens in a block, besides the bytes that come and go."""

from __future__ import annotations

from typing import Final


class Event:
    """What the replay of a step must do next."""

    BYTES: Final = 0
    GRADIENT: Final = 1
    PRE_FORWARD: Final = 2
    POST_FORWARD: Final = 3
    PRE_BACKWARD: Final = 4
    POST_BACKWARD: Final = 5
    MADE: Final = 6
    """A gradient is there, and is handed over later (GRADIENT)."""


Step = tuple[int, int, int]
"""(Event, a, b): BYTES net, peak above the start; GRADIENT and MADE weight index; the others module index."""
