"""BlockTape: one block recorded in every way that it can run, with and without recomputation."""

from __future__ import annotations

from collections.abc import Callable

from zplan.memory.events import Event, Step
from zplan.memory.tape import Tape, Tensor, Value
from zplan.values import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTape:
    """What the replay needs of one block: steps of its forward, recomputation and backward."""

    forward: tuple[Step, ...]
    """With saved tensors kept; ends with the output live and the input released unless it was saved."""
    forward_without_saving: tuple[Step, ...]
    """The first forward of a checkpointed block: the input stays, the output is new."""
    recompute: tuple[Step, ...]
    """Up to the early stop; ends with the saved tensors live. It begins with the backward up to the first node that
    asks for a saved tensor: asking for it is what starts a recomputation."""
    backward: tuple[Step, ...]
    """After a forward that kept; includes freeing the saved tensors and the incoming gradient, ends with the
    gradient of the input live."""
    backward_after_recompute: tuple[Step, ...]
    recompute_whole: tuple[Step, ...]
    """Reentrant checkpointing knows no early stop: the whole forward runs again, after the hook of the block itself."""
    backward_after_whole: tuple[Step, ...]
    """Ends with the incoming gradient live, which CheckpointFunction.backward holds as its argument (torch 2.13.0,
    utils/checkpoint.py)."""
    frees_input: bool
    """`forward` gives the input up: no operation saves it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTape:
    """A block whose input needs no gradient, without recomputation."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    frees_input: bool


Build = Callable[[Tape, Value], Value]
"""Runs a block's forward on a tape; returns the output."""


def record_block(build: Build, input_bytes: int, output_bytes: int, *, returns_held: bool = False) -> BlockTape:
    """Record one block in the three ways it can run.

    Args:
        returns_held: what it holds is a second output of it.
    """
    first = Tape()
    kept, kept_backward, frees_input = _run(build, input_bytes, output_bytes, first)
    loose, *_ = _run(build, input_bytes, output_bytes, Tape(keeps=False), keeps_input=True)
    recomputed = Tape(stop_at=first.last_saving)
    again, again_backward, _ = _run(build, input_bytes, output_bytes, recomputed, keeps_input=True)
    complete = Tape(returns_held=returns_held, keeps_gradient=True)
    whole, whole_backward, _ = _run(build, input_bytes, output_bytes, complete, keeps_input=True)
    before = recomputed.unpacks_at
    again, whole = _without_own_hooks(again), _without_own_hooks(whole)
    own = 1 if whole_backward[:1] and whole_backward[0][0] == Event.PRE_BACKWARD else 0
    return BlockTape(
        recompute_whole=whole_backward[:own] + whole,
        backward_after_whole=whole_backward[own:],
        forward=kept,
        forward_without_saving=loose,
        recompute=again_backward[:before] + again,
        backward=kept_backward,
        backward_after_recompute=again_backward[before:],
        frees_input=frees_input,
    )


def record_first(build: Build, input_bytes: int, output_bytes: int) -> FirstTape:
    """Record a block whose input needs no gradient."""
    forward, backward, frees_input = _run(build, input_bytes, output_bytes, Tape(), needs_gradient=False)
    return FirstTape(forward=forward, backward=backward, frees_input=frees_input)


def _without_own_hooks(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """A recomputation without the forward hooks of the block itself, the first module that it entered: these stay
    outside the checkpoint.

    Source: transformers 5.23.0, modeling_layers.py (GradientCheckpointingLayer: `forward` is checkpointed).
    """
    hooks = (Event.PRE_FORWARD, Event.POST_FORWARD)
    own = next((step[1] for step in steps if step[0] in hooks), None)
    return tuple(step for step in steps if not (step[0] in hooks and step[1] == own))


def _run(
    build: Build,
    input_bytes: int,
    output_bytes: int,
    tape: Tape,
    *,
    keeps_input: bool = False,
    needs_gradient: bool = True,
) -> tuple[tuple[Step, ...], tuple[Step, ...], bool]:
    """Steps of forward and backward, and whether the forward gives the input up."""
    source = Value(Tensor(input_bytes, foreign=True), needs_gradient=needs_gradient)
    if keeps_input:
        source.storage.refs += 1
    out = build(tape, source)
    tape.leave()
    tape.drop(source)
    tape.resume()
    tape.flush()
    forward, tape.steps = tuple(tape.steps), []
    frees_input = source.storage.refs == 0
    if tape.keeps:
        tape.backward(out, output_bytes)
    return forward, tuple(tape.steps), frees_input
