"""Template: a process that holds a built model; each question about that model is answered in a fork of it.

A tuner asks dozens of configurations of one model, and building it is a sixth of a run. It is the run's own first part
(run.DryRun.load), so an answer is the same whether the model was built for it or for an earlier question. What the
forks learn goes up to the template, for the next question, and on to the worker, for the next model.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
from collections.abc import Callable
from io import BufferedRWPair

from zplan import files
from zplan.processes import die_with_parent
from zplan.simulate.request import SimulationRequest

AFTER_LOADING = frozenset(
    {
        "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions", "allgather_bucket_size",
        "overlap_comm", "round_robin_gradients", "offload_optimizer", "sub_group_size", "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    }
)  # fmt: skip
"""Of ZeroConfig: what zero.Init does not read; the engine does, later.

Source: deepspeed 0.19.8, runtime/zero/partition_parameters.py (Init.__init__).
"""


def loading_key(request: SimulationRequest) -> str | None:
    """Equal for two questions whose models are built alike; None where building takes what the question does not name.

    Below stage 3 the model is built without a look at DeepSpeed's configuration. With NVMe offload, zero.Init opens
    the run's own folder.
    """
    zero, batch = request.choice.zero, request.choice.batch
    if "nvme" in (zero.offload_optimizer.device, zero.offload_param.device):
        return None
    data = files.to_data(request)
    model = [data[name] for name in ("config", "recipe", "cluster", "initialise", "cuda_answers")]
    model += [batch.sequence_parallel_size, batch.autotp_size]
    if zero.stage == 3:
        section = data["choice"]["zero"]
        model += [batch.world_size, {name: section[name] for name in section if name not in AFTER_LOADING}]
    return json.dumps(model, sort_keys=True)


class Template:
    """The parent's end. `_serve` runs in the process that is forked here, and never returns.

    Args:
        build: makes the model and returns what answers a question about it and tells the news (learned.py).
    """

    def __init__(self, build: Callable[[], Callable[[str], list[bytes]]]) -> None:
        ours, theirs = socket.socketpair()
        self._child = os.fork()
        if self._child == 0:
            die_with_parent()
            ours.close()
            _serve(build, theirs.makefile("rwb"))
        theirs.close()
        self._socket = ours
        self._pipe: BufferedRWPair = ours.makefile("rwb")

    def ask(self, line: str) -> list[bytes] | None:
        """Let it answer, and hear what was learned; None when it cannot, and is gone."""
        with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
            self._pipe.write(line.strip().encode() + b"\n")
            self._pipe.flush()
            news: list[bytes] = pickle.load(self._pipe)
            return news
        return None

    def close(self) -> None:
        """It ends when nobody can ask it any more."""
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._socket.close()
        os.waitpid(self._child, 0)


def _serve(build: Callable[[], Callable[[str], list[bytes]]], pipe: BufferedRWPair) -> None:
    try:
        answer = build()
        for line in pipe:
            pickle.dump(answer(line.decode()), pipe)
            pipe.flush()
    finally:
        os._exit(0)
