"""The launchers that people have, each really run with two CPU ranks: all end in the same finished training."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sft.warm import make_plan, make_recipe
from zplan import files
from zplan.processes import free_port

BIN = Path(sys.executable).parent
SECONDS = 240


def commands(launcher: str, arguments: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """What is typed, and its variables; two of them where every node or task is started by itself."""
    port = str(free_port())
    train = ["-m", "sft.train", *arguments]
    if launcher == "torchrun on two nodes":
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test"]
        node = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous, *train]
        return [(node, {}), (node, {})]
    if launcher == "deepspeed":
        line = [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={port}", "--module", *train[1:]]
        return [(line, {})]
    if launcher == "accelerate":
        line = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes=2", "--num_machines=1"]
        line += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}", *train]
        return [(line, {})]
    common = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "localhost", "MASTER_PORT": port}
    tasks = [{**common, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
    return [([sys.executable, *train], variables) for variables in tasks]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun on two nodes", "deepspeed", "accelerate", "srun's variables"])
def test_a_launcher_starts_the_same_training(
    launcher: str, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset), ranks=2)
    if launcher == "torchrun on two nodes":
        plan = replace(plan, cluster=replace(plan.cluster, gpus_per_node=1, nodes=2))
    files.save(plan, tmp_path / "plan.json")
    out = tmp_path / "run"
    arguments = ["--plan", str(tmp_path / "plan.json"), "--output-dir", str(out), "--max-steps", "2", "--force"]
    started = [
        subprocess.Popen(
            line,
            env={**os.environ, "DS_ACCELERATOR": "cpu", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for line, variables in commands(launcher, arguments)
    ]
    said = [process.communicate(timeout=SECONDS)[0].decode()[-3000:] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    report = files.load_json(out / "training_report.json")
    assert (report["outcome"], report["steps"]) == ("finished", 2)
