"""Trials and trainings from one warm process, seconds instead of twenty each; `python -m tests.sft.warm` serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sft.serve import Group, Requests, fork_group, serve, start_trial
from zplan import files
from zplan.errors import ZplanError
from zplan.hardware import Cluster, Gpu, Host
from zplan.plan import Plan
from zplan.recipe import Recipe
from zplan.trial import TrialSpec
from zplan.zero_config import Choice, ZeroConfig, batch_sizes, deepspeed_config


def make_recipe(model: Path, dataset: Path | None, **changes: Any) -> Recipe:
    """fp32 and short sequences: what a CPU rank does in a tenth of a second."""
    given: dict[str, Any] = {
        "model": str(model),
        "dataset": None if dataset is None else str(dataset),
        "max_length": 64,
        "train_batch_size": 8,
        "dtype": "fp32",
        "lora_r": 4,
        "learning_rate": 1e-3,
    }
    return Recipe(**{**given, **changes})


def make_spec(recipe: Recipe, *, stage: Any = 2, ranks: int = 1, timed_steps: int = 2, **zero: Any) -> TrialSpec:
    """A trial of that recipe on CPU ranks, with small buckets."""
    buckets = {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
    return TrialSpec(
        recipe=recipe,
        choice=Choice(
            zero=ZeroConfig(stage=stage, **{**buckets, **zero}),
            batch=batch_sizes(recipe, micro_batch=2, world_size=ranks),
        ),
        cluster=Cluster(
            gpu=Gpu(name="CPU rank", kind="cpu", total_bytes=1 << 33, free_bytes=1 << 33),
            host=Host(total_bytes=1 << 34, available_bytes=1 << 34),
            gpus_per_node=ranks,
        ),
        model_path=recipe.model,
        timed_steps=timed_steps,
    )


def make_plan(recipe: Recipe, *, stage: Any = 2, ranks: int = 1, **zero: Any) -> Plan:
    """The plan with the same configuration as `make_spec`."""
    spec = make_spec(recipe, stage=stage, ranks=ranks, **zero)
    return Plan(
        model_path=recipe.model,
        recipe=recipe,
        choice=spec.choice,
        deepspeed=deepspeed_config(recipe, spec.choice, cpu_adam=False),
        cluster=spec.cluster,
    )


class WarmServer:
    """A child process that has imported everything and forks ranks."""

    def __init__(self) -> None:
        # DeepSpeed compiles Muon's orthogonalisation, for minutes on a CPU; run as it is written it computes the same
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sft.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.asked = ""
        """Output folder of the last request."""

    def send(self, request: dict[str, Any]) -> None:
        """Ask, without waiting for the answer."""
        assert self.process.stdin is not None
        if "session" in request:
            self.asked = str(Path(request["session"]).parent)
        self.asked = request.get("out", self.asked)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer to the last request; late ones of a test that gave up waiting are not this test's."""
        assert self.process.stdout is not None
        while True:
            answer: dict[str, Any] = json.loads(self.process.stdout.readline())
            if answer["out"] == self.asked:
                return answer

    def trial(self, spec: TrialSpec, out: Path) -> dict[str, Any]:
        """Run one trial to its end."""
        out.mkdir(parents=True, exist_ok=True)
        files.save(spec, out / "spec.json")
        self.send({"spec": str(out / "spec.json"), "out": str(out), "ranks": spec.choice.batch.world_size})
        return self.receive()

    def train(self, session: Any) -> dict[str, Any]:
        """Run one training to its end."""
        out = Path(session.output_dir)
        files.save(session, out / "run.json")
        self.send({"session": str(out / "run.json"), "ranks": session.plan.choice.batch.world_size})
        return self.receive()

    def close(self) -> None:
        """End it; its ranks end with it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def rank_pids(server: WarmServer) -> list[int]:
    """Processes of the running ranks, rank 0 first."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def start(request: dict[str, Any], answers: int) -> Group:
    """A trial, or a training if the request names a session."""
    if "session" not in request:
        return start_trial(request, answers)
    from sft.session import Session
    from sft.training import train_rank

    session = files.load(Session, request["session"])

    def work() -> int:
        try:
            return train_rank(session)
        except ZplanError as error:  # as main() does
            print(f"zplan: {error}")
            return int(error.exit_code)

    return fork_group(work, Path(session.output_dir), ranks=request["ranks"], answers=answers)


def not_compiled(builder: Any, verbose: bool = True) -> Any:
    """Of what Muon leaves to FusedAdam, DeepSpeed itself then makes the updates in torch (muon_optimizer.py:34).

    To compile it takes minutes, and two environments overwrite each other's in ~/.cache/torch_extensions.
    """
    raise RuntimeError("not compiled for tests")


if __name__ == "__main__":
    from sft.trial import preload

    protocol = os.dup(1)
    os.dup2(2, 1)
    preload("cpu")
    from deepspeed.ops.op_builder import FusedAdamBuilder

    import sft.training  # noqa: F401

    FusedAdamBuilder.load = not_compiled
    serve(Requests(0), protocol, start)
