"""Which launcher started a process, and what it needs before torch is imported."""

from __future__ import annotations

import os

import pytest

from sft.ranks import (
    Rank,
    adopt_slurm,
    current_rank,
    environment,
    launched_by,
    num_threads,
    rank_variables,
    set_environment,
)
from zplan.errors import MachineError


def test_a_process_that_nobody_launched_is_no_rank() -> None:
    assert launched_by({}) is None
    assert launched_by({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("extra", "launcher"),
    [
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate"),
        ({}, "deepspeed"),
    ],
)
def test_launchers_are_told_apart_by_their_variables(extra: dict[str, str], launcher: str) -> None:
    assert launched_by({**rank_variables(rank=1, world_size=2, port=5), **extra}) == launcher


def test_srun_variables_become_torch_variables() -> None:
    variables = {
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_NODELIST": "node1,node2",
    }
    assert launched_by(variables) == "srun"
    adopt_slurm(variables)
    place = current_rank(variables)
    assert (place.rank, place.local_rank, place.world_size, place.local_world_size) == (5, 1, 8, 4)
    assert variables["MASTER_ADDR"] == "node1"


def test_a_compressed_node_list_is_refused_with_the_command_that_expands_it() -> None:
    variables = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODELIST": "node[1-2]"}
    with pytest.raises(MachineError, match="scontrol show hostnames"):
        adopt_slurm(variables)


def test_cpu_ranks_use_the_cpu_accelerator_one_thread_and_huge_pages() -> None:
    variables = environment("cpu")
    assert variables["DS_ACCELERATOR"] == "cpu"
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["THP_MEM_ALLOC_ENABLE"] == "1"
    assert "DS_ACCELERATOR" not in environment("cuda")


def test_the_ranks_of_a_node_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert num_threads(Rank()) == 6
    assert num_threads(Rank(local_world_size=4)) == 1
    assert num_threads(Rank(local_world_size=8)) == 1
    assert num_threads(Rank(world_size=8, local_world_size=2)) == 3


def test_what_accelerate_launch_decided_does_not_reach_the_training() -> None:
    variables = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "bf16", "CUDA_VISIBLE_DEVICES": "1"}
    set_environment("cuda", variables)
    assert variables == {**environment("cuda"), "CUDA_VISIBLE_DEVICES": "1"}
