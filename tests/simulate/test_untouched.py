"""A run leaves the process, the files, the network and the GPU as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.simulate.conftest import TINY_LLAMA, question
from zplan import files
from zplan.simulate.worker import ENVIRONMENT
from zplan.zero_config import OffloadOptimizer, OffloadParam

RUN = """
import json, os, sys, tempfile
os.environ.update(json.loads(sys.argv[2]))
from zplan.simulate import worker
worker.import_libraries()
import torch
from zplan import files
from zplan.simulate import patches, run
from zplan.simulate.request import SimulationRequest

events, changed, ours = [], {}, tempfile.gettempdir()
WATCHED = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "socket.connect", "subprocess.Popen", "os.fork")

def watch(event, arguments):
    if event not in WATCHED:
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if event in ("os.rmdir", "os.remove") and arguments[1] != -1:
        return  # inside a folder that is being removed: the folder itself is checked
    path = str(arguments[0]) if arguments else ""
    if not path.startswith(os.path.join(ours, "zplan-nvme-")):
        events.append([event, path])

def remember(self, owner, name, value):
    changed.setdefault((id(owner), name), (owner, vars(owner).get(name, patches.MISSING)))
    original(self, owner, name, value)

original, patches.Patches.set = patches.Patches.set, remember
environment = dict(os.environ)
request = files.from_data(SimulationRequest, json.loads(sys.argv[1]), name="request")
sys.addaudithook(watch)
report = run.simulate_run(request)
answer = {
    "events": list(events),
    "changed": len(changed),
    "left": [
        name for (_, name), (owner, before) in changed.items()
        if vars(owner).get(name, patches.MISSING) is not before
    ],
    "environment": environment == dict(os.environ),
    "cuda": torch.cuda.is_initialized(),
    "written": report.nvme_written_bytes,
}
print(json.dumps(answer))
"""


def test_a_run_with_nvme_touches_no_file_no_network_no_gpu_and_leaves_no_patch(tmp_path: Path) -> None:
    zero = {
        "offload_optimizer": OffloadOptimizer(device="nvme", nvme_path=str(tmp_path)),
        "offload_param": OffloadParam(device="cpu"),
    }
    config = {**TINY_LLAMA, "vocab_size": 20_000}  # large enough to be swapped
    request = json.dumps(files.to_data(question(3, world_size=1, config=config, zero=zero)))
    done = subprocess.run(
        [sys.executable, "-c", RUN, request, json.dumps(ENVIRONMENT)],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["events"] == []
    assert answer["changed"] > 30
    assert answer["left"] == []
    assert answer["environment"]
    assert not answer["cuda"]
    assert answer["written"] > 0
    assert list(tmp_path.iterdir()) == []
