"""RealBackend over real processes: every fault has one outcome, and nobody is left afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.backends.contract import BackendContract
from tests.oracle import TOY_RECIPE, toy_cluster
from zplan.backends import launcher as launcher_module
from zplan.backends.launcher import ColdLauncher, Limits
from zplan.backends.real import RealBackend
from zplan.backends.warm import WarmLauncher
from zplan.errors import ConfigError, MachineError
from zplan.trial import Outcome, TrialResult, TrialSpec
from zplan.zero_config import Choice, ZeroConfig, batch_sizes

FAKE = Path(__file__).with_name("fake_trial.py")


def fake_spec(*, world_size: int = 2, deadline_seconds: float = 30.0) -> TrialSpec:
    return TrialSpec(
        recipe=TOY_RECIPE,
        cluster=toy_cluster(kind="cpu", gpus=2),
        model_path="none",
        choice=Choice(zero=ZeroConfig(), batch=batch_sizes(TOY_RECIPE, micro_batch=1, world_size=world_size)),
        deadline_seconds=deadline_seconds,
    )


def fake_backend(folder: Path, behaviour: str) -> RealBackend:
    return RealBackend(folder / "trials", ColdLauncher((sys.executable, "-S", str(FAKE), behaviour)))


def _run(folder: Path, behaviour: str, **changes: float) -> TrialResult:
    result = fake_backend(folder, behaviour).run(replace(fake_spec(), **changes))
    assert nobody_left(folder)
    return result


def nobody_left(folder: Path) -> bool:
    """No living process has written its id into a trial's folder, or is a child of ours."""
    pids = [int(path.read_text()) for path in folder.glob("trials/trial-*/pid_*")]
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


class TestContract(BackendContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> RealBackend:
        return fake_backend(tmp_path, "ok")

    @pytest.fixture
    def spec(self) -> TrialSpec:
        return fake_spec()


@pytest.mark.parametrize(
    ("behaviour", "outcome", "words"),
    [
        ("rank1_killed", Outcome.RANK_LOST, "rank 1 was ended by SIGKILL"),
        ("rank1_exits_3", Outcome.RANK_LOST, "rank 1 ended with status 3"),
        ("cuda_oom", Outcome.GPU_OOM, "CUDA out of memory"),
        ("error_file", Outcome.BAD_CONFIG, "Check batch related parameters"),
        ("no_result", Outcome.RANK_LOST, "none wrote result.json"),
        ("garbage_result", Outcome.RANK_LOST, "result.json is not readable"),
        ("memory_limit", Outcome.HOST_OOM, "MemoryError"),
        ("no_ninja", Outcome.ENV_BROKEN, "pip install ninja"),
    ],
)
def test_a_fault_has_one_outcome(tmp_path: Path, behaviour: str, outcome: Outcome, words: str) -> None:
    result = _run(tmp_path, behaviour)
    assert result.outcome is outcome
    assert words in result.message


@pytest.mark.parametrize("behaviour", ["hang", "deaf"])
def test_a_trial_that_hangs_ends_at_its_deadline(tmp_path: Path, behaviour: str) -> None:
    started = time.monotonic()
    result = _run(tmp_path, behaviour, deadline_seconds=1.5)
    assert result.outcome is Outcome.TIMED_OUT
    assert time.monotonic() - started < 60  # a hang would last for ever


def test_a_silent_trial_ends_before_its_deadline(tmp_path: Path) -> None:
    launcher = ColdLauncher((sys.executable, "-S", str(FAKE), "hang"))
    spec_path = tmp_path / "spec.json"
    spec_path.write_text("{}")
    observed = launcher.launch(
        spec_path, tmp_path, ranks=1, env={}, limits=Limits(deadline_seconds=60, stall_seconds=1.0)
    )
    assert observed.watchdog == "stalled"


def test_host_memory_below_the_floor_ends_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def available() -> int:
        """Plenty at first; when a rank has started, another program has taken it."""
        return 1 << 20 if list(tmp_path.glob("trials/trial-*/pid_*")) else 1 << 50

    monkeypatch.setattr(launcher_module, "available_host_bytes", available)
    result = _run(tmp_path, "hang")
    assert result.outcome is Outcome.HOST_OOM
    assert "1.00 MiB" in result.message


def test_no_trial_starts_on_a_full_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_module, "available_host_bytes", lambda: 1 << 20)
    with pytest.raises(MachineError, match="available before the trial starts"):
        _run(tmp_path, "ok")


def test_children_of_ranks_are_ended_too(tmp_path: Path) -> None:
    result = _run(tmp_path, "child_hangs")
    assert result.outcome is Outcome.OK
    left = [p for p in psutil.process_iter() if p.name().startswith("python") and "time.sleep(600)" in _command(p)]
    assert not left


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


SERVER = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps({"out": request["out"], "exit": {"0": 0}, "ended_at": {"0": 0.1}, "ended_by_us": []}), flush=True)
"""


def test_a_server_that_was_started_early_runs_the_first_trial(tmp_path: Path) -> None:
    launcher = WarmLauncher("cpu", (sys.executable, "-c", SERVER))
    backend = RealBackend(tmp_path, launcher)
    try:
        backend.start(fake_spec().cluster)
        started = launcher._server
        assert started is not None
        assert started.poll() is None
        observed = launcher.launch(
            tmp_path / "spec.json", tmp_path, ranks=1, env={}, limits=Limits(deadline_seconds=30.0)
        )
        assert [item.returncode for item in observed.exits] == [0]
        assert launcher._server is started
    finally:
        backend.close()
    assert started.poll() is not None


def test_a_cold_launcher_has_nothing_to_start(tmp_path: Path) -> None:
    backend = fake_backend(tmp_path, "ok")
    backend.start(fake_spec().cluster)
    assert not list(tmp_path.iterdir())


def test_a_port_that_was_taken_is_tried_again(tmp_path: Path) -> None:
    assert _run(tmp_path, "port_once").outcome is Outcome.OK
    assert (tmp_path / "trials" / "port_was_taken").exists()


def test_more_ranks_than_the_node_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs 4 ranks"):
        fake_backend(tmp_path, "ok").run(fake_spec(world_size=4))


_TUNER = """
import sys
from pathlib import Path
from tests.backends.test_real import fake_backend, fake_spec
print("started", flush=True)
fake_backend(Path(sys.argv[1]), "deaf").run(fake_spec())
"""


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_no_orphans_when_the_tuner_is_ended(tmp_path: Path, signal_number: signal.Signals) -> None:
    tuner = subprocess.Popen(
        [sys.executable, "-c", _TUNER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
    )
    try:
        _wait_until(lambda: len(list(tmp_path.glob("trials/trial-*/pid_*"))) == 2)
        time.sleep(0.3)
        tuner.send_signal(signal_number)
        tuner.wait(timeout=120)
        _wait_until(lambda: nobody_left(tmp_path))
    finally:
        tuner.kill()
        tuner.wait()
        assert tuner.stdout is not None
        tuner.stdout.close()


def _wait_until(condition: object, timeout_seconds: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)
