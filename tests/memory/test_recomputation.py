"""Recomputed blocks: what runs again, and what stays while their backward runs."""

from __future__ import annotations

from collections.abc import Iterable

from zplan.memory.block_tape import record_block
from zplan.memory.events import Event, Step
from zplan.memory.tape import Tape, Value


def peak_and_net(steps: Iterable[Step]) -> tuple[int, int]:
    """The most bytes at once, and those that are left."""
    net = peak = 0
    for event, change, above in steps:
        if event == Event.BYTES:
            peak, net = max(peak, net + above), net + change
    return peak, net


def test_the_hooks_of_a_block_stay_outside_its_recomputation() -> None:
    def build(tape: Tape, x: Value) -> Value:
        tape.enter(0)
        tape.enter(1)
        out = tape.apply(8, [(x, 8)], saves=(x,))
        tape.exit(1)
        tape.exit(0)
        return out

    tape = record_block(build, 8, 8)
    of_module = [step for step in tape.recompute_whole if step[0] != Event.BYTES]
    assert of_module == [(Event.PRE_BACKWARD, 0, 0), (Event.PRE_FORWARD, 1, 0), (Event.POST_FORWARD, 1, 0)]


def test_a_recomputation_starts_when_a_saved_tensor_is_asked_for() -> None:
    def build(tape: Tape, x: Value) -> Value:
        first = tape.apply(8, [(x, 8)], saves=(x,))
        return tape.apply(8, [(first, 4)])

    before, *_ = record_block(build, 8, 8).recompute
    assert before == (Event.BYTES, 4 - 8, 4), "the last node has run: its result is there, the incoming gradient gone"


def test_what_a_recomputed_block_returns_besides_its_output_stays_until_its_backward_is_done() -> None:
    def build(tape: Tape, x: Value) -> Value:
        weights = tape.apply(100, [(x, 8)], saves_output=True)
        tape.hold(weights)
        return tape.apply(8, [(weights, 100)], saves=(weights,))

    def peak_of(*, returns_held: bool) -> int:
        return peak_and_net(record_block(build, 8, 8, returns_held=returns_held).backward_after_whole)[0]

    assert peak_of(returns_held=False) == 100 + 8
    # the zeros that are its gradient are somebody else's: the sum of the two gradients is a third tensor
    assert peak_of(returns_held=True) == 100 + 100


def test_nothing_is_added_into_the_gradient_that_a_reentrant_recomputation_was_given() -> None:
    """A residual: its two gradients meet after the branch has run; torch's checkpoint holds the one it was called
    with until it returns."""

    def build(tape: Tape, x: Value) -> Value:
        branch = tape.apply(8, [(x, 8)], saves=(x,))
        out = tape.apply(8, [(x, None), (branch, None)])
        tape.drop(branch)
        return out

    block = record_block(build, 8, 8)
    # the branch's, added into the incoming one, which is the input's; the input, which the branch saved, goes
    assert peak_and_net(block.backward) == (8, -8)
    assert peak_and_net(block.backward_after_whole) == (8 + 8, 8), "the branch's and their sum; the input stays"
