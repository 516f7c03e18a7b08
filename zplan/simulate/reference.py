"""The same run on real tensors and real CPU ranks (gloo), counted by the same tracker: what a simulation is held to."""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator

from zplan import files
from zplan.processes import free_port
from zplan.simulate import trainer
from zplan.simulate.accelerator import TrackedCpuAccelerator
from zplan.simulate.collectives import CollectiveRecorder
from zplan.simulate.patches import Patches, install_recorder, install_resize_tracking
from zplan.simulate.report import SimulationReport
from zplan.simulate.request import SimulationRequest
from zplan.simulate.run import make_report, simulate_run
from zplan.simulate.tracker import Tracker
from zplan.simulate.trainer import Run
from zplan.zero_config import deepspeed_config


def run_on_real_ranks(request: SimulationRequest, folder: Path) -> SimulationReport:
    """Rank 0's report of a real run; every rank is a fork of this process.

    Raises:
        RuntimeError: a rank failed; its last lines are in the message.
    """
    world = request.choice.batch.world_size
    port = free_port()
    children = [
        _fork(lambda rank=rank: _real_rank(request, rank, port), folder / f"rank{rank}") for rank in range(world)
    ]
    return _collect(children, folder / "rank0")


def simulate_in_fork(request: SimulationRequest, folder: Path) -> SimulationReport:
    """The simulation of the same request, in a fork, so that neither leaves anything behind for the other."""
    return _collect([_fork(lambda: simulate_run(request), folder / "simulated")], folder / "simulated")


def _real_rank(request: SimulationRequest, rank: int, port: int) -> SimulationReport:
    world = request.choice.batch.world_size
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.manual_seed(0)
    tracker = Tracker({"cpu": "gpu"})
    recorder = CollectiveRecorder()
    run = Run(
        model_config=dict(request.config),
        recipe=request.recipe,
        choice=request.choice,
        deepspeed_config=deepspeed_config(request.recipe, request.choice, cpu_adam=False),
        device="cpu",
        steps=request.steps,
        initialise=request.initialise,
    )
    set_accelerator(
        TrackedCpuAccelerator(
            tracker,
            asynchronous=request.cuda_answers,
            communication="gloo",
            total_bytes=request.cluster.gpu.total_bytes,
        )
    )
    with Patches() as patches:
        install_recorder(patches, recorder)
        install_resize_tracking(patches, tracker)
        # answering as CUDA does, DeepSpeed records streams, which a CPU does not have
        patches.set(torch.Tensor, "record_stream", lambda self, stream: None)
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=120))
        with tracker:
            trainer.train(run, tracker)
        dist.barrier()
    return make_report(request, tracker, recorder, wall_seconds=0.0)


def _fork(job: Any, out: Path) -> int:
    """Run a job in a child; its report goes to `out`.json, what it prints to `out`.log."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(f"{out}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        Path(f"{out}.json").write_text(json.dumps(files.to_data(job())))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _collect(children: list[int], out: Path) -> SimulationReport:
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        tail = Path(f"{out}.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"exit {codes}: {' '.join(tail)}")
    return files.from_data(SimulationReport, json.loads(Path(f"{out}.json").read_text()), name=str(out))
