"""A rank in place of `sft.trial`: `python fake_trial.py BEHAVIOUR spec.json --out DIR`. No torch, starts at once."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

behaviour, spec, out = sys.argv[1], sys.argv[2], Path(sys.argv[4])
rank = int(os.environ["RANK"])


def result() -> None:
    """What rank 0 writes when all went well."""
    if rank == 0:
        data = {
            "schema": "zplan.result/1", "outcome": "ok", "evidence": "measured", "step_seconds": 0.5,
            "tokens_per_second": 1000.0 / json.loads(Path(spec).read_text())["choice"]["batch"]["world_size"],
            "gpu_allocated_bytes": 1 << 20,
        }  # fmt: skip
        (out / "result.json").write_text(json.dumps(data))


def sleep_for_ever() -> None:
    """Like a rank in a collective whose peer never comes."""
    while True:
        time.sleep(1)


def listen_on_the_rendezvous_port() -> None:
    """As rank 0 of torch does; the first time another program has it already."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    marker = out.parent / "port_was_taken"
    with socket.socket() as other, socket.socket() as ours:
        if not marker.exists():
            marker.write_text("")
            other.bind(address)
            other.listen()
        ours.bind(address)


def main() -> None:
    """Behave."""
    (out / f"progress_{rank}").write_text("load")
    (out / f"pid_{rank}").write_text(str(os.getpid()))
    match behaviour:
        case "ok":
            result()
        case "no_result":
            pass
        case "garbage_result":
            (out / "result.json").write_text("{ not json")
        case "slow":
            time.sleep(1.0)
            result()
        case "hang":
            sleep_for_ever()
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sleep_for_ever()
        case "child_hangs":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
            result()
        case "rank1_killed":
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            sleep_for_ever()
        case "rank1_exits_3":
            if rank == 1:
                sys.exit(3)
            print("RuntimeError: Connection closed by peer [127.0.0.1]:4711. GLHF!", file=sys.stderr)
            sys.exit(1)
        case "cuda_oom":
            if rank == 0:
                sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
            sleep_for_ever()
        case "error_file":
            (out / f"error_{rank}.json").write_text(
                json.dumps({"type": "AssertionError", "message": "Check batch related parameters.", "phase": "init"})
            )
            sys.exit(1)
        case "port_once":
            if rank == 0:
                listen_on_the_rendezvous_port()
            result()
        case "memory_limit":
            resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
            bytearray(1 << 30)
        case "no_ninja":
            sys.exit("RuntimeError: Unable to JIT load the cpu_adam op due to ninja not being installed.")
        case _:
            raise SystemExit(f"unknown behaviour {behaviour}")


main()
