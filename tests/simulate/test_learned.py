"""What one run has learned of operations serves the next, and never a tensor that has changed since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.simulate.conftest import question
from zplan.simulate import dispatch_cache
from zplan.simulate.client import WorkerClient
from zplan.simulate.learned import Learned
from zplan.simulate.patches import Patches, install_fake_tensor_patches
from zplan.simulate.tracker import Tracker


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> Learned:
    fresh = Learned()
    monkeypatch.setattr(dispatch_cache, "LEARNED", fresh)
    return fresh


def run(code: Callable[[], None]) -> Tracker:
    mode = FakeTensorMode()
    tracker = Tracker({"cpu": "gpu"}, fake_mode=mode)
    with Patches() as patches:
        install_fake_tensor_patches(patches, tracker)
        with mode, tracker:
            code()
    return tracker


def swap_data(x: torch.Tensor) -> None:
    x.data = torch.empty(3, 2)


@pytest.mark.parametrize(
    "change",
    [swap_data, lambda x: x.t_(), lambda x: x.resize_(3, 2), lambda x: x.set_(torch.empty(3, 2))],
    ids=["data", "t_", "resize_", "set_"],
)
def test_a_tensor_that_has_changed_is_described_anew(learned: Learned, change: Callable[[torch.Tensor], None]) -> None:
    def code() -> None:
        x = torch.empty(2, 3)
        assert (x * 2).shape == (2, 3)
        change(x)
        assert (x * 2).shape == (3, 2)

    run(code)


def test_the_default_dtype_is_part_of_the_question(learned: Learned) -> None:
    def code() -> None:
        x = torch.ones(4, dtype=torch.int64)
        assert (x / 2).dtype == torch.float32
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert (x / 2).dtype == torch.bfloat16
        finally:
            torch.set_default_dtype(torch.float32)

    run(code)


def views_and_sums() -> None:
    x = torch.ones(4, 6)
    whole = x.view(24)
    part = whole[4:10]
    assert (whole.data_ptr(), part.shape, part.storage_offset()) == (x.data_ptr(), (6,), 4)
    assert part.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert part.view(torch.int32).dtype == torch.int32
    assert x.sum(dim=1).untyped_storage().nbytes() == 4 * 4
    assert [t.shape for t in x.split(2)] == [(2, 6), (2, 6)]


def test_a_fork_tells_its_parent_and_the_next_run_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    child, parent = Learned(), Learned()
    monkeypatch.setattr(dispatch_cache, "LEARNED", child)
    child.start()
    first = run(views_and_sums)
    parent.absorb(child.news())
    assert parent.entries == child.entries
    assert parent.layouts == child.layouts
    monkeypatch.setattr(dispatch_cache, "LEARNED", parent)
    again = run(views_and_sums)
    assert (first.run.misses > 5, again.run.misses) == (True, 0)  # type: ignore[union-attr]
    assert [e[0] for e in again.events] == [e[0] for e in first.events]
    assert again.num_operations == first.num_operations


def test_news_of_another_start_is_not_taken(learned: Learned) -> None:
    learned.start()
    run(views_and_sums)
    parent = Learned()
    parent.number((torch.Size((1,)), (1,), torch.float32, torch.device("cpu")))
    parent.absorb(learned.news())
    assert not parent.entries


def test_of_two_forks_from_the_same_state_only_the_first_one_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both number a layout of their own 0, so the length of the list says nothing."""
    parent = Learned()
    told = []
    for columns in (2, 3):
        child = Learned()
        child.start()
        child.number((torch.Size((columns,)), (1,), torch.float32, torch.device("cpu")))
        told.append([child.news()])
        child.start()
        monkeypatch.setattr(dispatch_cache, "LEARNED", child)
        run(lambda columns=columns: torch.ones(columns) * 2)  # type: ignore[misc]
        told[-1].append(child.news())
    parent.absorb(told[0][0])
    parent.absorb(told[1][1])
    assert not parent.entries
    parent.absorb(told[0][1])
    assert len(parent.entries) == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_the_second_answer_is_the_first(worker: WorkerClient, stage: int) -> None:
    asked = question(stage)
    first, second = worker.ask(asked), worker.ask(asked)
    measured = {"wall_seconds": 0.0, "cpu_seconds": 0.0, "worker_rss_bytes": 0, "num_played": 0}
    assert replace(first, **measured) == replace(second, **measured)  # type: ignore[arg-type]
