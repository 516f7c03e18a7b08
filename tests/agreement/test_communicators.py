"""Groups in which the simulated engine exchanges, against those that the formula counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from benchmarks.simulated_vs_real import SMALL, Case, request_of
import torch.distributed as dist
from torch.utils._pytree import tree_leaves
from zplan.memory.outside import num_communicators
from zplan.simulate.collectives import CollectiveRecorder
from zplan.simulate.run import simulate_run
from zplan.simulate.worker import import_libraries
from zplan.zero_config import ZeroConfig

def is_group(leaf):
    return isinstance(leaf, dist.ProcessGroup)

def exchanging(request):
    "Names of the groups of several ranks; the trainer's, of all ranks, has no name here."
    found = {None}
    def record(self, name, args, kwargs):
        group = next(filter(is_group, tree_leaves((args, kwargs), is_leaf=is_group)), None)
        if group is not None and group is not dist.group.WORLD and group.size() > 1:
            found.add(group.group_name)
    CollectiveRecorder.record = record
    simulate_run(request)
    return len(found)

def in_fork(request, out):
    child = os.fork()
    if not child:
        out.write_text(str(exchanging(request)))
        os._exit(0)
    os.waitpid(child, 0)
    return int(out.read_text())

import_libraries()
cases = [(Case(name="stage", world_size=4, zero=ZeroConfig(stage=stage, **SMALL)), 1) for stage in (0, 1, 2, 3)]
third = ZeroConfig(stage=3, **SMALL)
cases += [
    (Case(name="hpZ", world_size=4, zero=replace(third, zero_hpz_partition_size=2)), 1),
    (Case(name="qgZ", world_size=4, zero=replace(third, zero_quantized_gradients=True)), 1),
    (Case(name="qgZ between nodes", world_size=4, zero=replace(third, zero_quantized_gradients=True)), 2),
    (Case(name="Ulysses", world_size=4, sequence_parallel_size=2, zero=third), 1),
    (Case(name="Ulysses", world_size=4, sequence_parallel_size=4, zero=replace(third, stage=1)), 1),
    (Case(name="AutoTP", world_size=4, autotp_size=2, loss="full", zero=replace(third, stage=2)), 1),
    (Case(name="AutoTP over all", autotp_size=2, loss="full", zero=replace(third, stage=0)), 1),
]
rows = []
with tempfile.TemporaryDirectory() as folder:
    for case, nodes in cases:
        request = request_of(case)
        each = case.world_size // nodes
        request = replace(request, cluster=replace(request.cluster, gpus_per_node=each, nodes=nodes))
        rows.append([f"{case.name} {case.zero.stage}", num_communicators(request.choice, each),
                     in_fork(request, Path(folder) / "count")])
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_as_many_communicators_are_counted_as_groups_exchange() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, counted, exchange in json.loads(done.stdout.strip().splitlines()[-1]):
        assert counted == exchange, name
