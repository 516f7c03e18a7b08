"""ZeRO-3's parameter coordinator: which parameters are gathered, waited for and released at each module of a step.

Only the order matters here, not the bytes: the same schedule serves any number of ranks, any dtype and any offload.

Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import accumulate
from typing import Final

from zplan.memory.fetch_limits import Bounds, Limits
from zplan.values import dataclass

NOT_AVAILABLE, INFLIGHT, AVAILABLE = 0, 1, 2
RECOMPUTED = -1
"""Stands for the recomputed layer among a parameter's users."""


class Act:
    """What happens to parameters at a module; plain numbers, read too often for an IntEnum."""

    GATHER: Final = 0
    """One collective for all of them is launched."""
    ARRIVE: Final = 1
    """The collective is waited for the first time: every parameter becomes a tensor of its own."""
    SETTLE: Final = 2
    """The last of its parameters is waited for: a coalesced buffer goes away."""
    RELEASE: Final = 3
    """Back to the partition."""
    KEEP: Final = 4
    """Released, but the recomputed graph still holds the gathered tensor."""
    FORGET: Final = 5
    """The graph has used it."""
    GIVE_BACK: Final = 6
    """Backward is over: whatever is still gathered goes."""
    UPDATE: Final = 7
    """The update is done."""
    DROP: Final = 8
    """The node that makes a weight's gradient has run, and with it goes what the graph has kept of the weight."""
    FETCH: Final = 9
    """A parameter that the module does not own is read for the first time and gathered alone."""


Action = tuple[int, tuple[int, ...]]
"""(Act, parameters)."""


@dataclass(frozen=True, slots=True)
class Fetches:
    """The recorded trace: which module is fetched at which step, and how far it is to the next use of a parameter."""

    queue: tuple[tuple[int, int], ...]
    """(parameter, step) in the order of the trace."""
    uses: Mapping[int, tuple[int, ...]]
    """Steps that use a parameter, ascending."""
    passed: tuple[int, ...]
    """Elements of all modules fetched before a step."""
    modules: Mapping[int, tuple[int, ...]]
    """Module number -> parameters it owns."""
    numel: tuple[int, ...]
    """Elements of each parameter."""
    of_leaves: Fetches | None = None
    """The same trace as the release of a leaf module sees it: every module with all parameters within it."""
    leaf_numbers: frozenset[int] = frozenset()
    """Parameters of leaf modules."""
    _distances: dict[tuple[int, int], tuple[tuple[int, int], ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        order: Sequence[int],
        modules: Mapping[int, tuple[int, ...]],
        numel: tuple[int, ...],
        leaves: frozenset[int] = frozenset(),
        inside: Mapping[int, tuple[int, ...]] | None = None,
    ) -> Fetches:
        """From the modules in the order in which a step fetches them.

        Args:
            leaves: modules that are hooked as one; on the way to another module's next use their parameters are not
                seen (__params_to_release asks whether the module that is released is a leaf, not the one it passes).
            inside: module -> all parameters within it; needed where there are leaves.
        """
        queue = tuple((number, step) for step, module in enumerate(order) for number in modules.get(module, ()))
        uses: dict[int, list[int]] = {}
        for number, step in queue:
            uses.setdefault(number, []).append(step)
        seen = ((() if module in leaves else modules.get(module, ())) for module in order)
        return cls(
            queue=queue,
            uses={number: tuple(steps) for number, steps in uses.items()},
            passed=tuple(accumulate((sum(numel[number] for number in numbers) for numbers in seen), initial=0)),
            modules=modules,
            numel=numel,
            of_leaves=cls.of(order, inside, numel) if leaves and inside else None,
            leaf_numbers=frozenset(number for leaf in leaves for number in modules.get(leaf, ())),
        )

    def distance(self, number: int, step: int) -> int:
        """Elements fetched from `step` until the parameter is used again; more than any limit if it is not.

        Source: __params_to_release.
        """
        if self.of_leaves is not None and number in self.leaf_numbers:
            return self.of_leaves.distance(number, step)
        uses = self.uses.get(number, ())
        index = bisect_left(uses, step)
        return self.passed[uses[index]] - self.passed[step] if index < len(uses) else sys.maxsize

    def distances(self, module: int, step: int) -> tuple[tuple[int, int], ...]:
        """Each parameter of a module with its distance."""
        key = (module, step)
        known = self._distances.get(key)
        if known is None:
            owned = self.modules.get(module, ())
            known = self._distances[key] = tuple((number, self.distance(number, step)) for number in owned)
        return known


@dataclass(slots=True)
class Flight:
    """A collective that somebody still has to wait for."""

    numbers: tuple[int, ...]
    waiting: int
    has_arrived: bool = False


class Coordinator:
    """PartitionedParameterCoordinator from the second step on, when the trace is known.

    Args:
        persistent: parameters that are never released.
        missing: persistent parameters that are gathered when a module needs them, not before the step.
        external: parameters registered as external; they are not released (release_sub_module).
        trainable: whether each parameter trains.
        viewed: weights that the graph of any forward keeps a view of.
        staying: those of them that it keeps until it goes itself, whoever released them.
        unread: parameters that a module reads without owning them; not known as its own before they were read.
        num_unread: steps of the first forward, in which they are read.
        resting: frozen parameters that stay when the recomputation that fetched them is over.
    """

    def __init__(
        self,
        fetches: Fetches,
        limits: Limits,
        *,
        persistent: frozenset[int],
        external: Sequence[int],
        trainable: Sequence[bool],
        viewed: frozenset[int] = frozenset(),
        staying: frozenset[int] = frozenset(),
        missing: frozenset[int] = frozenset(),
        unread: frozenset[int] = frozenset(),
        num_unread: int = 0,
        resting: frozenset[int] = frozenset(),
    ) -> None:
        self.unread, self.num_unread, self.resting = unread, num_unread, resting
        self.fetches, self.persistent, self.external = fetches, persistent, frozenset(external)
        self.trainable = trainable
        self.limits = limits
        self.prefetch, self.live, self.reuse = Bounds(), Bounds(), Bounds()
        size = len(fetches.numel)
        self.status = [NOT_AVAILABLE] * size
        for number in persistent - missing:
            self.status[number] = AVAILABLE
        self.head = 0
        """What of the queue has been taken."""
        self.last_use = [-1] * size
        self.users: dict[int, set[int]] = {}
        self.inflight: dict[int, Flight] = {}
        self.recomputed: list[int] = []
        self.kept: dict[int, tuple[int, ...]] = {}
        self.viewed, self.staying = viewed, staying
        self.step = 0
        self.available_numel = 0
        self.actions: list[Action] = []

    def pre_module(self, module: int) -> tuple[Action, ...]:
        """fetch_sub_module: gather what the module needs, wait for it, prefetch what comes next."""
        self.actions = []
        needed = self.fetches.modules.get(module)
        if needed:
            self._gather(needed)
            users, inflight = self.users, self.inflight
            for number in needed:
                if number in users:
                    users[number].add(module)
                else:
                    users[number] = {module}
                if number in inflight:
                    self._wait(number)
            self._pop_queue(needed)
        if self.head < len(self.fetches.queue):
            self._prefetch()
        self.step += 1
        return tuple(self.actions)

    def post_module(self, module: int) -> tuple[Action, ...]:
        """release_sub_module: free what is not used again within stage3_max_reuse_distance elements."""
        released = []
        for number, distance in self.fetches.distances(module, self.step):
            is_releasable = self._is_releasable(number, distance)
            self._leave(number, module)
            if is_releasable and self._release(number):
                released.append(number)
        forgotten = self.kept.pop(module, ()) if self.kept else ()
        if not released and not forgotten:
            return ()
        stays = tuple(number for number in released if number in self.staying) if self.staying else ()
        freed = tuple(number for number in released if number not in self.staying) if stays else tuple(released)
        return (
            *(((Act.KEEP, stays),) if stays else ()),
            *(((Act.RELEASE, freed),) if freed else ()),
            *(((Act.FORGET, forgotten),) if forgotten else ()),
        )

    def kept_module(self, module: int) -> tuple[Action, ...]:
        """release_sub_module within a non-reentrant recomputation: its graph keeps a view of every weight it saved,
        until the backward of the module; by then the parameter is gathered a second time.

        Source: torch 2.13.0, utils/checkpoint.py (_recomputation_hook: inner_pack returns x.detach()).
        """
        done = self.post_module(module)
        kept = tuple(number for _, numbers in done for number in numbers)
        if kept:
            self.kept[module] = kept
        return tuple((Act.KEEP, numbers) for _, numbers in done)

    def viewed_module(self, module: int) -> tuple[Action, ...]:
        """As `kept_module`, but only for the weights that the graph of any forward keeps a view of."""
        done = self.post_module(module)
        released = tuple(number for _, numbers in done for number in numbers)
        kept = tuple(number for number in released if number in self.viewed)
        if not kept:
            return done
        self.kept[module] = kept
        rest = tuple(number for number in released if number not in self.viewed)
        return ((Act.KEEP, kept), *(((Act.RELEASE, rest),) if rest else ()))

    def recomputed_module(self, module: int) -> tuple[Action, ...]:
        """A frozen parameter that a recomputation fetches belongs to the recomputed layer until its backward is done.

        Source: update_recompute_parameters (:391).
        """
        done = self.pre_module(module)
        for number in self.fetches.modules.get(module, ()):
            if not self.trainable[number] and number not in self.persistent:
                self.users.setdefault(number, set()).add(RECOMPUTED)
                self.recomputed.append(number)
        return done

    def end_recomputed(self) -> tuple[Action, ...]:
        """release_sub_module of the layer: its recomputed parameters go, however soon they are used again."""
        released = []
        for number in self.recomputed:
            self._leave(number, RECOMPUTED)
            if number not in self.external and number not in self.resting and self._release(number):
                released.append(number)
        self.recomputed = []
        return ((Act.RELEASE, tuple(released)),) if released else ()

    def _leave(self, number: int, module: int) -> None:
        users = self.users.get(number)
        if users is not None:
            users.discard(module)
            if not users:
                del self.users[number]

    def _release(self, number: int) -> bool:
        if self.status[number] != AVAILABLE or number in self.users:
            return False
        self.status[number] = NOT_AVAILABLE
        self.available_numel -= self.fetches.numel[number]
        return True

    def _is_releasable(self, number: int, distance: int) -> bool:
        if number in self.persistent or number in self.external or self.last_use[number] > self.step:
            return False
        return self.is_far(distance)

    def is_far(self, distance: int) -> bool:
        """Not used again within stage3_max_reuse_distance."""
        if distance >= self.limits.reuse:
            self.reuse.not_above(distance)
            return True
        self.reuse.above(distance)
        return False

    def _pop_queue(self, needed: Sequence[int]) -> None:
        last_use, now, missing = self.last_use, self.step, 0
        for number in needed:
            missing += last_use[number] < now
        if not missing:
            return
        queue, found = self.fetches.queue, set[int]()
        while self.head < len(queue) and len(found) < missing:
            number, step = queue[self.head]
            self.head += 1
            last_use[number] = step
            found.add(number)

    def _prefetch(self) -> None:
        """While numel < min(stage3_prefetch_bucket_size, stage3_max_live_parameters - available)."""
        queue, status, last_use = self.fetches.queue, self.status, self.last_use
        numel, last, most, room = 0, -1, self.limits.prefetch, self.limits.live - self.available_numel
        if room < most:
            most = room
        if most <= 0:
            self._stops_at(0)
            return
        chosen: set[int] = set()
        while self.head < len(queue) and numel < most:
            last = numel
            number, step = queue[self.head]
            self.head += 1
            if step > last_use[number]:
                last_use[number] = step
            if status[number] == NOT_AVAILABLE and number not in chosen:
                chosen.add(number)
                numel += self.fetches.numel[number]
        if last >= 0:
            self.prefetch.above(last)
            self.live.above(last + self.available_numel)
        if self.head < len(queue):
            self._stops_at(numel)
        if chosen:
            self._gather(sorted(chosen))

    def _stops_at(self, numel: int) -> None:
        """One of the limits was reached."""
        if numel >= self.limits.prefetch:
            self.prefetch.not_above(numel)
        else:
            self.live.not_above(numel + self.available_numel)

    def decides_alike(self, limits: Limits) -> bool:
        """Whether every decision so far would have been the same under these limits."""
        return limits.prefetch in self.prefetch and limits.live in self.live and limits.reuse in self.reuse

    def _gather(self, numbers: Sequence[int]) -> None:
        status = self.status
        wanted = tuple([number for number in numbers if status[number] == NOT_AVAILABLE])
        if not wanted:
            return
        if self.step < self.num_unread and self.unread.issuperset(wanted):
            self._fetch(wanted)
            return
        gather, numel = Flight(wanted, len(wanted)), self.fetches.numel
        for number in wanted:
            status[number] = INFLIGHT
            self.available_numel += numel[number]
            self.inflight[number] = gather
        self.actions.append((Act.GATHER, wanted))

    def _fetch(self, wanted: tuple[int, ...]) -> None:
        """One after the other, waited for at once (ZeROOrderedDict.__getitem__)."""
        for number in wanted:
            self.status[number] = AVAILABLE
            self.available_numel += self.fetches.numel[number]
        self.actions.append((Act.FETCH, wanted))

    def read_head(self, numbers: tuple[int, ...]) -> tuple[Action, ...]:
        """The loss reads the head's weight outside of any module, or is done with it. The first time it is gathered
        there; from then on the model gathers it."""
        self.actions = []
        if not self.num_unread:
            return ()
        if self.status[numbers[0]] == NOT_AVAILABLE:
            self._fetch(numbers)
            return tuple(self.actions)
        released = tuple(number for number in numbers if self._release(number))
        return ((Act.RELEASE, released),) if released else ()

    def _wait(self, number: int) -> None:
        gather = self.inflight.pop(number)
        gather.waiting -= 1
        if not gather.has_arrived:
            gather.has_arrived = True
            for other in gather.numbers:
                self.status[other] = AVAILABLE
            self.actions.append((Act.ARRIVE, gather.numbers))
        if gather.waiting == 0:
            self.actions.append((Act.SETTLE, gather.numbers))
