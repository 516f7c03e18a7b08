"""Streams and events of a device that finishes everything at once."""

from __future__ import annotations

from itertools import count
from typing import Any, ClassVar


class SimulatedEvent:
    """Always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 1.0


class SimulatedStream:
    """Only its number matters: the caching allocator keeps one pool of blocks per stream."""

    default: ClassVar[SimulatedStream]
    _numbers = count()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stream_id = next(self._numbers)
        self.device_index = 0

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or SimulatedEvent()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> SimulatedStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


SimulatedStream.default = SimulatedStream()
