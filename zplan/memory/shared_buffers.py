"""Gathers by all_reduce (stage3_use_all_reduce_for_fetch_params): parameters that are views of one buffer."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class SharedBuffers:
    """The parameters of one gather lie in one buffer, and it is there as long as one of them is; nothing is copied out
    of it. One that persists or that the graph keeps so holds all the others.

    Source: deepspeed 0.19.8, runtime/zero/partition_parameters.py:1447 (_all_gather_coalesced:
    use_all_reduce_for_fetch_params), :823 (AllReduceCoalescedHandle), :314 (free_param).
    """

    def __init__(self, num_parameters: int) -> None:
        self.held, self.kept = [0] * num_parameters, [0] * num_parameters
        """The buffer in which a parameter lies, and that in which the graph keeps it; 0 is none."""
        self._flights: set[tuple[int, ...]] = set()
        self._bytes: list[int] = [0]
        self._users: list[int] = [0]

    def gather(self, numbers: tuple[int, ...], num_bytes: int) -> None:
        """One buffer for all of them."""
        self._flights.add(numbers)
        for number in numbers:
            self.held[number] = len(self._bytes)
        self._bytes.append(num_bytes)
        self._users.append(len(numbers))

    def has(self, numbers: tuple[int, ...]) -> bool:
        """Whether a gather that is under way is one of these."""
        return numbers in self._flights

    def settle(self, numbers: tuple[int, ...]) -> bool:
        """It is no longer under way; whether it was one of these."""
        was = numbers in self._flights
        self._flights.discard(numbers)
        return was

    def release(self, numbers: Sequence[int]) -> int:
        """Bytes that go with these parameters."""
        return self._leave(self.held, numbers)

    def forget(self, numbers: Sequence[int]) -> int:
        """Bytes that go when the graph has used these parameters."""
        return self._leave(self.kept, numbers)

    def keep(self, numbers: Sequence[int]) -> None:
        """Released, but the graph still has them."""
        for number in numbers:
            self.kept[number], self.held[number] = self.held[number], 0

    def give_back(self, persistent: Collection[int], packed: Collection[int]) -> int:
        """Backward is over: bytes that stay until the update, of parameters that persist and of quantised ones that
        the graph keeps so long."""
        stays = {self.held[number] for number in persistent} | {self.kept[number] for number in packed}
        return sum(self._bytes[buffer] for buffer in stays)

    def _leave(self, places: list[int], numbers: Sequence[int]) -> int:
        freed = 0
        for number in numbers:
            buffer, places[number] = places[number], 0
            if buffer:
                self._users[buffer] -= 1
                freed += self._bytes[buffer] if not self._users[buffer] else 0
        return freed
