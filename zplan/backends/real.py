"""RealBackend: a few timed steps of the trainer that later trains, in child processes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal

from zplan import files
from zplan.backends.extension_locks import remove_stale_locks
from zplan.backends.launcher import Launcher, Limits
from zplan.backends.outcome import Observed, classify
from zplan.backends.warm import WarmLauncher
from zplan.errors import ConfigError, MachineError
from zplan.hardware import Cluster
from zplan.trial import RESULT_FILE, SPEC_FILE, Outcome, TrialResult, TrialSpec
from zplan.units import GIB, MIB

_PORT_TAKEN = "Address already in use"
_PORT_ATTEMPTS = 3
_HOST_FLOOR_SHARE, _HOST_FLOOR_LEAST, _HOST_FLOOR_MOST = 0.03, 512 * MIB, 2 * GIB
"""Of the host's memory, kept free by the watchdog: below it Linux starts to thrash, then to kill."""


class RealBackend:
    """Runs trials on this machine: CUDA ranks, or CPU ranks with gloo."""

    evidence: Literal["measured"] = "measured"

    def __init__(self, work_dir: Path | str, launcher: Launcher | None = None) -> None:
        """Args:
        work_dir: one folder per trial goes below it.
        launcher: a warm server by default; `ColdLauncher()` starts a fresh interpreter for every rank.
        """
        self._work_dir = Path(work_dir)
        self._launcher = launcher

    def run(self, spec: TrialSpec) -> TrialResult:
        """Write spec.json, run the ranks, read result.json or say why there is none.

        Raises:
            ConfigError: more ranks than this machine has.
            MachineError: the trial's folder cannot be written, too little host memory, a process that will not end.
        """
        _check_ranks(spec)
        remove_stale_locks()
        out_dir = self._new_folder()
        files.save(spec, out_dir / SPEC_FILE)
        started = time.monotonic()
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            observed = self._launcher_for(spec.cluster).launch(
                out_dir / SPEC_FILE,
                out_dir,
                ranks=spec.choice.batch.world_size,
                env=trial_environment(spec.cluster),
                limits=_limits(spec),
            )
            outcome, message = classify(observed)
            if outcome is not Outcome.ENV_BROKEN or _PORT_TAKEN not in message or attempt == _PORT_ATTEMPTS:
                break
            _remove_answers(out_dir)
        wall_seconds = time.monotonic() - started
        return self._answer(out_dir, observed, outcome, message, wall_seconds)

    def start(self, cluster: Cluster) -> None:
        """Start what the first trial would wait for, while the search looks for that trial."""
        launcher = self._launcher_for(cluster)
        if isinstance(launcher, WarmLauncher):
            launcher.start(trial_environment(cluster))

    def close(self) -> None:
        """End what the launcher keeps between trials."""
        if self._launcher is not None:
            self._launcher.close()

    def _launcher_for(self, cluster: Cluster) -> Launcher:
        if self._launcher is None:
            self._launcher = WarmLauncher(cluster.gpu.kind)
        return self._launcher

    def _new_folder(self) -> Path:
        try:
            self._work_dir.mkdir(parents=True, exist_ok=True)
            return Path(mkdtemp(prefix="trial-", dir=self._work_dir.resolve()))
        except OSError as error:
            raise MachineError(
                f"{self._work_dir} cannot be written: {error.strerror}", fix="free disk space"
            ) from error

    def _answer(
        self, out_dir: Path, observed: Observed, outcome: Outcome, message: str, wall_seconds: float
    ) -> TrialResult:
        if outcome is Outcome.OK:
            try:
                return replace(files.load(TrialResult, out_dir / RESULT_FILE), wall_seconds=wall_seconds)
            except ConfigError as error:
                outcome, message = Outcome.RANK_LOST, f"result.json is not readable: {error.what}"
        return TrialResult(
            outcome=outcome, evidence="measured", message=f"{message} [logs: {out_dir}]", wall_seconds=wall_seconds
        )


def trial_environment(cluster: Cluster) -> Mapping[str, str]:
    """What every rank of a trial has in its environment besides torch's own variables."""
    env = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if cluster.gpu.kind == "cpu":
        env["DS_ACCELERATOR"] = "cpu"
    return env


def _limits(spec: TrialSpec) -> Limits:
    floor = int(spec.cluster.host.total_bytes * _HOST_FLOOR_SHARE)
    floor = min(max(floor, _HOST_FLOOR_LEAST), _HOST_FLOOR_MOST)
    return Limits(deadline_seconds=spec.deadline_seconds, host_floor_bytes=floor)


def _check_ranks(spec: TrialSpec) -> None:
    ranks, here = spec.choice.batch.world_size, spec.cluster.gpus_per_node
    if ranks > here:
        raise ConfigError(
            f"a trial needs {ranks} ranks, but this node has {here}",
            because="trials run on one node; torchrun, the deepspeed launcher or SLURM start runs on several",
            fix="--nodes 1",
        )


def _remove_answers(out_dir: Path) -> None:
    for path in out_dir.iterdir():
        if path.name != SPEC_FILE:
            path.unlink()
