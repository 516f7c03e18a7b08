"""Player: the micro-steps of a model from a tape; everything outside of the model runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from zplan.simulate.dispatch_cache import new_storage
from zplan.simulate.learned import LEARNED
from zplan.simulate.recording import Recorder
from zplan.simulate.tape import (
    INCOMING,
    Allocated,
    Freed,
    Gradient,
    Layout,
    Output,
    Part,
    Slot,
    Tape,
    described,
    signature,
)
from zplan.simulate.tracker import Block, Tracker


class Tapes:
    """Of one run: plays the tape that fits it, or records one for the runs to come.

    Args:
        key: of `tape_key`.
    """

    def __init__(self, key: str, tracker: Tracker) -> None:
        self._key = key
        self._tracker = tracker
        self._recorder: Recorder | None = None
        self._recorded: list[Tape | None] = []
        self._full_key: Any = None

    def begin(self, model: Any) -> None:
        """From now on the model's forward is played, or watched. The engine has registered all of its hooks."""
        self._full_key = (self._key, signature(model))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tape = LEARNED.tapes.get(self._full_key)
        if tape is not None:
            model.forward = Player(tape, self._tracker, parameters).instead_of(model.forward)
        else:
            self._recorder = Recorder(self._tracker, parameters)
            model.forward = self._recorder.around(model.forward)

    def end_step(self) -> None:
        """An optimizer step has ended. Only what two of them in a row do alike becomes a tape."""
        if self._recorder is None:
            return
        self._recorded.append(self._recorder.finish())
        if len(self._recorded) == 2:
            first, second = self._recorded
            if first is not None and first == second:
                LEARNED.add_tape(self._full_key, first)


class Player:
    """Plays one tape to one run.

    Args:
        parameters: those that get gradients, in the order of the model.
    """

    def __init__(self, tape: Tape, tracker: Tracker, parameters: Sequence[torch.Tensor]) -> None:
        self._tape = tape
        self._tracker = tracker
        self._parameters = parameters

    def instead_of(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward; the real one for other inputs than those of the tape."""

        def played(*args: Any, **kwargs: Any) -> Any:
            if args or described(kwargs) != self._tape.inputs:
                return forward(*args, **kwargs)
            with _disable_current_modes():
                root = torch.empty(0, requires_grad=True)
            self._tracker.num_played += 1
            playback = Playback(self._tape, self._tracker, self._parameters)
            outputs = _MicroStep.apply(playback, root)  # type: ignore[no-untyped-call]
            names = (output.name for output in self._tape.outputs)
            return self._tape.output(**dict(zip(names, outputs, strict=True)))

        return played


class Playback:
    """One micro-step of a tape: the blocks that are taken at the moment."""

    def __init__(self, tape: Tape, tracker: Tracker, parameters: Sequence[torch.Tensor]) -> None:
        self._tape = tape
        self._tracker = tracker
        self._parameters = parameters
        self._blocks: dict[Slot, Block] = {}
        self._storages: dict[Slot, torch.UntypedStorage] = {}
        """Of the blocks that somebody outside sees."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        return self._tape.outputs

    def forward(self) -> list[Any]:
        """Play, and give the outputs; their storages stay with the graph if the backward of the model reads them."""
        self._play(self._tape.forward)
        made = [self._tensor(output.slot, output.layout) for output in self._tape.outputs]
        for slot, number in self._tape.with_output:
            made[number].zplan_rest = _Rest(self, (slot,))
        freed = {step.slot for step in self._tape.backward.steps if type(step) is Freed}
        self._storages = {slot: storage for slot, storage in self._storages.items() if slot in freed}
        return made

    def backward(self, incoming: torch.Tensor) -> None:
        self._play(self._tape.backward, incoming)

    def graph(self) -> _Rest:
        """To be held by the autograd graph."""
        return _Rest(self, self._tape.with_graph)

    def release(self, slot: Slot) -> None:
        block = self._blocks.pop(slot, None)
        if block is None:
            self._storages.pop(slot, None)
        else:
            self._tracker.release(block)

    def _play(self, part: Part, incoming: torch.Tensor | None = None) -> None:
        tracker = self._tracker
        start = tracker.num_operations
        for step in part.steps:
            tracker.num_operations = start + step.operation
            if type(step) is Allocated:
                self._allocate(step)
            elif type(step) is Gradient:
                start += self._accumulate(step)
            elif step.slot == INCOMING:
                assert incoming is not None
                tracker.forget(incoming.untyped_storage())
            else:
                self.release(step.slot)
        tracker.num_operations = start + part.num_operations
        if part.flops:
            tracker.count_flops(part.flops)
        for (source, target), num_bytes in part.copied:
            tracker.copy(source, target, num_bytes)

    def _allocate(self, step: Allocated) -> None:
        block = self._tracker.take(step.kind, step.num_bytes, step.stream, step.site, step.category)
        if step.seen:
            storage = self._storages[step.slot] = new_storage(step.num_bytes)
            self._tracker.adopt(storage, block)
        else:
            self._blocks[step.slot] = block

    def _accumulate(self, step: Gradient) -> int:
        """As autograd's AccumulateGrad, which then holds the gradient no longer; how many operations hooks ran.

        Source: torch 2.13, csrc/autograd/functions/accumulate_grad.{h,cpp}: `.grad` becomes a view of the gradient, or
        the gradient is added to it in place: one operation either way.
        """
        parameter, tracker = self._parameters[step.parameter], self._tracker
        gradient = self._tensor(step.slot, step.layout)
        del self._storages[step.slot]
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            tracker.num_operations -= 1
            parameter.grad.add_(gradient)
        del gradient
        before = tracker.num_operations
        for hook in list(parameter._post_accumulate_grad_hooks.values()):
            hook(parameter)
        return tracker.num_operations - before

    def _tensor(self, slot: Slot, layout: Layout) -> Any:
        return self._tracker.tensor_on(self._storages[slot], *layout)


class _Rest:
    """Blocks that go when this does."""

    def __init__(self, playback: Playback, slots: tuple[Slot, ...]) -> None:
        self._playback = playback
        self._slots = slots

    def __del__(self) -> None:
        for slot in self._slots:
            self._playback.release(slot)


class _MicroStep(torch.autograd.Function):
    """The model as one node of the autograd graph.

    Its parameters are no inputs of it: autograd would call their hooks once more, without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, playback: Playback, root: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.playback = playback
        ctx.rest = playback.graph()
        outputs = playback.forward()
        fixed = (made for made, output in zip(outputs, playback.outputs, strict=True) if not output.differentiable)
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (incoming,) = (gradient for gradient in gradients if gradient is not None)
        ctx.playback.backward(incoming)
        return None, None
