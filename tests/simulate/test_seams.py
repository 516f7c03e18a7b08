"""Patches are undone, seams are verified, and errors say where."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from deepspeed.comm.torch import TorchBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from zplan.simulate import selfcheck
from zplan.simulate.collectives import COLLECTIVES, CollectiveRecorder
from zplan.simulate.errors import explained
from zplan.simulate.patches import (
    Patches,
    install_deepspeed_patches,
    install_fake_tensor_patches,
    install_gpu_patches,
)
from zplan.simulate.report import SimulationError
from zplan.simulate.tracker import Tracker
from zplan.simulate.worker import ENVIRONMENT


def test_every_patch_is_undone_on_exit() -> None:
    patches = Patches()
    mode = FakeTensorMode()
    tracker = Tracker({"cpu": "gpu"}, fake_mode=mode)
    originals: dict[tuple[int, str], object] = {}

    def remember(owner: object, name: str, value: object) -> None:
        originals.setdefault((id(owner), name), vars(owner).get(name))
        Patches.set(patches, owner, name, value)

    patches.set = remember  # type: ignore[method-assign]
    with patches:
        install_fake_tensor_patches(patches, tracker)
        install_deepspeed_patches(patches, CollectiveRecorder())
        install_gpu_patches(patches, tracker)
        assert len(patches.applied) > 30
    for owner, name in patches.applied:
        assert vars(owner).get(name) is originals[(id(owner), name)], name


def test_the_installed_libraries_have_every_seam() -> None:
    selfcheck.check_seams()


def test_what_a_patch_replaces_in_deepspeed_is_a_seam_that_is_checked() -> None:
    names = {seam.attribute.split(".")[-1] for seam in selfcheck.SEAMS}
    with Patches() as patches:
        install_deepspeed_patches(patches, CollectiveRecorder())
        replaced = {name for _, name in patches.applied}
    assert replaced - names - set(COLLECTIVES) == {"__compatible_ops__"}  # asking for it starts a compiler


def test_a_collective_that_nobody_counts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchBackend, "all_to_all_v", lambda self: None, raising=False)
    with pytest.raises(SimulationError, match=r"TorchBackend\.all_to_all_v is new"):
        selfcheck.check_seams()


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selfcheck.VERIFIED, "deepspeed", "0.20")
    with pytest.raises(SimulationError, match=r"deepspeed is 0\.19\.\d+, verified with 0\.20") as caught:
        selfcheck.check_seams()
    assert caught.value.cause == "broken"


def test_a_seam_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("deepspeed.runtime.zero.utils.get_lst_from_rank0")
    monkeypatch.setattr("trl.kernels.chunked_logprob._addmm_fp32", lambda acc, a, b, scale: None)
    with pytest.raises(SimulationError) as caught:
        selfcheck.check_seams()
    assert "deepspeed.runtime.zero.utils.get_lst_from_rank0 is gone" in caught.value.what
    assert "trl.kernels.chunked_logprob._addmm_fp32 takes" not in caught.value.what  # its first three are unchanged


class NeedsKernel(torch.nn.Module):
    """Calls an operation that has no fake kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.zplan_test.no_fake(x)
        return out


class BranchesOnData(torch.nn.Module):
    """Asks which values are positive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nonzero(x)


def test_an_operation_without_a_fake_kernel_names_module_and_operation() -> None:
    library = torch.library.Library("zplan_test", "DEF")
    library.define("no_fake(Tensor x) -> Tensor")
    library.impl("no_fake", lambda x: x.clone(), "CPU")
    error = error_of(NeedsKernel())
    assert (error.module, error.cause) == ("NeedsKernel", "unsupported")
    assert "no_fake" in error.operation


def test_a_data_dependent_branch_names_module_and_operation() -> None:
    error = error_of(BranchesOnData())
    assert (error.module, error.cause) == ("BranchesOnData", "unsupported")
    assert "nonzero" in error.operation


def error_of(module: torch.nn.Module) -> SimulationError:
    mode = FakeTensorMode()
    tracker = Tracker({"cpu": "gpu"}, fake_mode=mode)
    with pytest.raises(SimulationError) as caught, explained(tracker), mode, tracker:
        module(torch.ones(4))
    return caught.value


def test_the_worker_sees_no_gpu_and_opens_no_network() -> None:
    code = (
        "import socket, zplan.simulate.worker as w\n"
        "w._refuse_network()\n"
        "try:\n    socket.create_connection(('127.0.0.1', 9), timeout=1)\n"
        "except OSError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the simulation opens no network"
    assert ENVIRONMENT["CUDA_VISIBLE_DEVICES"] == ""
    assert ENVIRONMENT["HF_HUB_OFFLINE"] == "1"


def test_the_tracker_counts_512_byte_blocks_and_forgets_freed_ones() -> None:
    tracker = Tracker({"cpu": "gpu"})
    with tracker:
        first = torch.empty(100, dtype=torch.float32)
        view = first[10:]
        assert tracker.current["gpu"] == 512
        del first
        assert tracker.current["gpu"] == 512
        del view
        assert tracker.current["gpu"] == 0
    assert not isinstance(torch.empty(1), FakeTensor)
