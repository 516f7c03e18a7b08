"""Recorder: makes the tape of a run's first micro-step, and holds it to that of the next optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from zplan.simulate.tape import (
    INCOMING,
    Allocated,
    Freed,
    Gradient,
    Layout,
    Output,
    Part,
    Slot,
    Step,
    Tape,
    described,
    layout_of,
)
from zplan.simulate.tracker import ALLOCATE, Block, Tracker
from zplan.values import dataclass

aten = torch.ops.aten


class _NoTapeError(Exception):
    """The micro-step does something that a tape cannot say."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """A moment of the run."""

    events: int
    operations: int
    flops: int
    copied: dict[tuple[str, str], int]


@dataclass(slots=True)
class _Hooked:
    """The hooks of one parameter, from before the first one to after the last."""

    parameter: int
    block: Block
    layout: Layout
    before: _Mark
    kept: bool
    """Autograd took the gradient as it came; it copies one that others hold as well."""
    after: _Mark | None = None


class Recorder:
    """Watches the model of a run; everything runs as it would.

    Args:
        parameters: those that get gradients, with all the hooks that they will have.
    """

    def __init__(self, tracker: Tracker, parameters: Sequence[torch.Tensor]) -> None:
        self._tracker = tracker
        self._numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        self._parameters = parameters
        self._active = False
        self._marks: list[_Mark] = []
        """Start and end of forward, start and end of backward."""
        self._inputs: tuple[Any, ...] | None = None
        self._output: Any = None
        self._outputs: list[tuple[str, Block | None, Layout, bool]] = []
        self._incoming: Block | None = None
        self._hooked: list[_Hooked] = []
        for parameter in parameters:
            _surround(parameter, self._before_hooks, self._after_hooks)

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward, watched at the first micro-step of each optimizer step."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._marks or args or any(parameter.grad is not None for parameter in self._parameters):
                return forward(*args, **kwargs)
            self._inputs = described(kwargs)
            self._marks = [self._mark()]
            out = forward(**kwargs)
            self._marks.append(self._mark())
            self._look_at(out)
            return out

        return watched

    def finish(self) -> Tape | None:
        """The tape of the optimizer step that has ended; None if it cannot be told."""
        try:
            return self._tape() if len(self._marks) == 4 else None
        except _NoTapeError:
            return None
        finally:
            self._marks, self._hooked, self._outputs, self._incoming = [], [], [], None

    def _mark(self) -> _Mark:
        tracker = self._tracker
        flops = tracker.flops.get(tracker.step_index, 0)
        return _Mark(len(tracker.events), tracker.num_operations, flops, dict(tracker.copied))

    def _look_at(self, out: Any) -> None:
        self._output = type(out)
        items = out.items() if isinstance(out, dict) else ()
        for name, value in items:
            if not isinstance(value, torch.Tensor):
                self._outputs = []
                return
            derived = value.grad_fn is not None
            self._outputs.append((name, self._tracker.block_of(value), layout_of(value), derived))
            if value.grad_fn is not None:
                value.grad_fn.register_prehook(self._begin_backward)

    def _begin_backward(self, gradients: tuple[Any, ...]) -> None:
        """The first node of the model is about to run; outputs that lie behind another one are not the first."""
        if len(self._marks) == 2:
            self._marks.append(self._mark())
            self._incoming = self._tracker.block_of(gradients[0])
            self._active = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        """The last node has run; DeepSpeed's own callbacks were queued later."""
        self._marks.append(self._mark())
        self._active = False

    def _before_hooks(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if self._active and gradient is not None:
            block = self._tracker.block_of(gradient)
            assert block is not None
            kept = self._tracker.operation is aten.detach.default
            self._hooked.append(_Hooked(self._numbers[id(parameter)], block, layout_of(gradient), self._mark(), kept))

    def _after_hooks(self, parameter: torch.Tensor) -> None:
        if self._active:
            self._hooked[-1].after = self._mark()

    def _tape(self) -> Tape:
        if not self._outputs or self._inputs is None:
            raise _NoTapeError
        returned = self._outputs
        seen = {id(block) for _, block, _, _ in returned} | {id(hooked.block) for hooked in self._hooked}
        writer = _Writer(self._tracker, self._incoming, seen)
        start, end, start_backward, end_backward = self._marks
        writer.write(start, end)
        forward = writer.part()
        at = start_backward
        for hooked in self._hooked:
            assert hooked.after is not None
            writer.write(at, hooked.before)
            writer.gradient(hooked)
            at = hooked.after
        writer.write(at, end_backward)
        backward = writer.part()
        outputs = tuple(Output(name, writer.slot(block), layout, derived) for name, block, layout, derived in returned)
        with_output, with_graph = writer.left(start, start_backward, [block for _, block, _, _ in returned])
        return Tape(
            inputs=self._inputs, forward=forward, backward=backward, output=self._output, outputs=outputs,
            with_output=with_output, with_graph=with_graph,
        )  # fmt: skip


class _Writer:
    """Turns the tracker's events between two marks into steps."""

    def __init__(self, tracker: Tracker, incoming: Block | None, seen: set[int]) -> None:
        self._events = tracker.events
        self._incoming = incoming
        self._seen = seen
        self._slots: dict[int, Slot] = {}
        self._blocks: list[Block] = []
        self._freed: set[Slot] = set()
        self._gradients: set[Slot] = set()
        self._start_part()

    def _start_part(self) -> None:
        self._steps: list[Step] = []
        self._operations = self._flops = 0
        self._copied: dict[tuple[str, str], int] = {}

    def slot(self, block: Block | None) -> Slot:
        if id(block) not in self._slots:
            raise _NoTapeError  # it was there before
        return self._slots[id(block)]

    def write(self, start: _Mark, end: _Mark) -> None:
        shift = start.operations - self._operations
        for action, block, operation in self._events[start.events : end.events]:
            if block is None:
                raise _NoTapeError
            if action == ALLOCATE:
                slot = self._slots[id(block)] = len(self._blocks)
                self._blocks.append(block)
                seen = id(block) in self._seen
                self._steps.append(Allocated(
                    operation - shift, slot, block.kind, block.requested_bytes, block.stream, block.site,
                    None if seen else block.category, seen,
                ))  # fmt: skip
            elif block is self._incoming:
                self._steps.append(Freed(operation - shift, INCOMING))
            else:
                self._free(self.slot(block), operation - shift)
        self._operations += end.operations - start.operations
        self._flops += end.flops - start.flops
        for way, size in end.copied.items():
            self._copied[way] = self._copied.get(way, 0) + size - start.copied.get(way, 0)

    def _free(self, slot: Slot, operation: int) -> None:
        """A gradient that hooks have moved away goes with autograd's own reference, and at once."""
        self._freed.add(slot)
        if slot not in self._gradients:
            self._steps.append(Freed(operation, slot))
        elif not isinstance(self._steps[-1], Gradient) or self._steps[-1].operation != operation:
            raise _NoTapeError

    def gradient(self, hooked: _Hooked) -> None:
        slot = self.slot(hooked.block)
        if not hooked.kept or slot in self._gradients or slot in self._freed:
            raise _NoTapeError  # it is a copy, or of two parameters
        self._gradients.add(slot)
        self._steps.append(Gradient(self._operations, hooked.parameter, slot, hooked.layout))

    def part(self) -> Part:
        """All that was written since the last part."""
        part = Part(
            steps=tuple(self._steps), num_operations=self._operations, flops=self._flops,
            copied=tuple((way, size) for way, size in self._copied.items() if size),
        )  # fmt: skip
        self._start_part()
        return part

    def left(
        self, start: _Mark, backward: _Mark, outputs: list[Block | None]
    ) -> tuple[tuple[tuple[Slot, int], ...], tuple[Slot, ...]]:
        """Blocks that nobody sees and that no part frees: with which output they go, and those that go with the graph.

        Autograd's record of an output goes ahead of the output's own storage.
        """
        events = enumerate(self._events[start.events :], start.events)
        ends = {id(block): number for number, (action, block, _) in events if action != ALLOCATE}
        rest = [b for b in self._blocks if id(b) not in self._seen and self._slots[id(b)] not in self._freed]
        if any(id(block) not in ends for block in rest):
            raise _NoTapeError  # it stays
        with_output: list[tuple[Slot, int]] = []
        with_graph: list[Slot] = []
        for block in sorted(rest, key=lambda block: ends[id(block)]):
            end = ends[id(block)]
            if end >= backward.events:
                with_graph.append(self._slots[id(block)])
                continue
            later = [(ends.get(id(o), -1), n) for n, o in enumerate(outputs) if ends.get(id(o), -1) > end]
            if not later:
                raise _NoTapeError
            with_output.append((self._slots[id(block)], min(later)[1]))
        return tuple(with_output), tuple(with_graph)


def _surround(parameter: torch.Tensor, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Put one hook ahead of all that a parameter has, and one behind; autograd calls them as the dict lists them."""
    parameter.register_post_accumulate_grad_hook(after)  # type: ignore[no-untyped-call]
    hooks: Any = parameter._post_accumulate_grad_hooks
    others = list(hooks.items())
    hooks.clear()
    hooks["zplan"] = before
    hooks.update(others)
