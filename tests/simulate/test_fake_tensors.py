"""What is answered without the dispatcher is what the dispatcher answers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch

from tests.simulate.test_learned import run
from zplan.simulate.fake_tensors import PositionalSignature


def seen(made: torch.Tensor, base: torch.Tensor) -> tuple[object, ...]:
    same_storage = made.untyped_storage()._cdata == base.untyped_storage()._cdata
    return made.shape, made.stride(), made.storage_offset(), made.dtype, made.device, made.requires_grad, same_storage


@pytest.mark.parametrize(
    ("short", "dispatched"),
    [
        (lambda x: x.detach(), torch.detach),
        (lambda x: x.data, torch.detach),
        (lambda x: x.narrow(0, 1, 2), lambda x: torch.narrow(x, 0, 1, 2)),
        (lambda x: x.narrow(-1, 2, 0), lambda x: torch.narrow(x, -1, 2, 0)),
        (lambda x: x[1:3], lambda x: torch.ops.aten.slice.Tensor(x, 0, 1, 3)),
        (lambda x: x[-2:], lambda x: torch.ops.aten.slice.Tensor(x, 0, -2, None)),
        (lambda x: x[3:1], lambda x: torch.ops.aten.slice.Tensor(x, 0, 3, 1)),
        (lambda x: x[:99], lambda x: torch.ops.aten.slice.Tensor(x, 0, None, 99)),
    ],
    ids=["detach", "data", "narrow", "narrow to nothing", "slice", "from behind", "empty slice", "beyond the end"],
)
def test_a_view_is_the_dispatchers_and_counts_as_one_operation(
    short: Callable[[torch.Tensor], torch.Tensor], dispatched: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def code(view: Callable[[torch.Tensor], torch.Tensor], answers: list[object]) -> None:
        base = torch.ones(4, 6, dtype=torch.bfloat16).t()
        base.requires_grad_(True)
        with torch.no_grad():
            answers.append(seen(view(base), base))

    ours: list[object] = []
    theirs: list[object] = []
    first, second = run(lambda: code(short, ours)), run(lambda: code(dispatched, theirs))
    assert ours == theirs
    assert first.num_operations == second.num_operations
    assert [event[0] for event in first.events] == [event[0] for event in second.events]


def test_a_copied_parameter_keeps_nothing_of_what_hangs_on_the_original() -> None:
    """As torch.nn.Parameter.__deepcopy__: PEFT copies modules_to_save, whose parameters DeepSpeed has marked."""

    def code() -> None:
        layer = torch.nn.Linear(4, 4)
        layer.weight.ds_id = (number for number in (1,))  # type: ignore[assignment]  # nothing that can be copied
        both = copy.deepcopy([layer, layer.weight])
        assert both[0].weight is both[1]
        assert isinstance(both[1], torch.nn.Parameter)
        assert not hasattr(both[1], "ds_id")
        assert both[1].data_ptr() != layer.weight.data_ptr()

    run(code)


def test_a_part_that_needs_a_gradient_has_one() -> None:
    def code() -> None:
        x = torch.ones(4, requires_grad=True)
        (x[1:3].sum() + x.narrow(0, 0, 2).sum() + x.detach().sum()).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert x[1:3].requires_grad
        assert not x.detach().requires_grad

    run(code)


def test_what_torch_refuses_is_refused() -> None:
    def code() -> None:
        with torch.no_grad(), pytest.raises(RuntimeError, match="exceeds dimension size"):
            torch.ones(4).narrow(0, 3, 2)

    run(code)


def test_arguments_by_position_are_bound_as_inspect_binds_them() -> None:
    def plain(a: int, b: int = 2) -> None: ...
    def starred(a: int, *rest: int, c: int = 3) -> None: ...

    for function, args, kwargs in (
        (plain, (1, 5), {}), (plain, (1,), {}), (plain, (1,), {"b": 7}),
        (starred, (1, 2), {}), (starred, (1,), {"c": 4}),
    ):  # fmt: skip
        bound = [signature(function).bind(*args, **kwargs) for signature in (PositionalSignature, inspect.signature)]
        for each in bound:
            each.apply_defaults()
        assert (bound[0].args, bound[0].kwargs) == (bound[1].args, bound[1].kwargs)
    with pytest.raises(TypeError, match="missing a required argument"):
        PositionalSignature(plain).bind()
