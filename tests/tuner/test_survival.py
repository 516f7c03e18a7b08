"""What a study outlives: a tuner killed, two tuners at once, damaged files, a full disk, a database not there."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tuner_process import tune
from zplan.errors import ConfigError
from zplan.trial import TrialResult, TrialSpec
from zplan.tuner.ledger import load_study
from zplan.tuner.storage import without_password

ROOT = Path(__file__).parents[2]


def _study(tmp_path: Path) -> str:
    return str(tmp_path / "study.journal")


def _start(
    study: str, n_trials: int, *seconds: float, number: int = 1, limit_bytes: int | None = None
) -> list[subprocess.Popen[str]]:
    """So many tuners, which begin when all have imported what they need."""

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    command = [sys.executable, "-m", "tests.tuner_process", study, str(n_trials), *map(str, seconds)]
    tuners = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=limit,
            env={**os.environ, "PYTHONPATH": _path()},
        ) for _ in range(number)
    ]  # fmt: skip
    for tuner in tuners:
        _read_until(tuner, "ready", 1)
    for tuner in tuners:
        assert tuner.stdin is not None
        tuner.stdin.write("\n")
        tuner.stdin.flush()
    return tuners


def _path() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def _read_until(process: subprocess.Popen[str], word: str, count: int) -> list[str]:
    lines: list[str] = []
    assert process.stdout is not None
    while sum(line.startswith(word) for line in lines) < count:
        line = process.stdout.readline()
        assert line, f"ended early: {lines}"
        lines.append(line.strip())
    return lines


def _finish(process: subprocess.Popen[str]) -> list[str]:
    text, _ = process.communicate(timeout=300)
    return text.splitlines()


def test_a_tuner_killed_in_a_trial_loses_only_that_trial_and_runs_it_again(tmp_path: Path) -> None:
    (process,) = _start(_study(tmp_path), 6, 0.0, 0.0, 600.0)
    lines = _read_until(process, "started", 3)
    process.send_signal(signal.SIGKILL)
    _finish(process)
    _, before = load_study(_study(tmp_path))
    assert len(before) == 2
    interrupted = lines[-1].split()[2]
    outcome = tune(_study(tmp_path), 4)
    assert outcome.records[:2] == before
    assert outcome.records[2].key == interrupted


def test_a_configuration_that_ends_the_tuner_twice_is_left_alone(tmp_path: Path) -> None:
    class Deadly:
        evidence = "measured"

        def run(self, spec: TrialSpec) -> TrialResult:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tune(_study(tmp_path), 3, backend=Deadly())
    outcome = tune(_study(tmp_path), 3)
    assert outcome.records
    assert all(record.origin != "baseline" for record in outcome.records)


def test_ctrl_c_leaves_a_study_that_resumes(tmp_path: Path) -> None:
    (process,) = _start(_study(tmp_path), 6, 0.0, 600.0)
    lines = _read_until(process, "started", 2)
    process.send_signal(signal.SIGINT)
    _finish(process)
    assert process.returncode == 130
    outcome = tune(_study(tmp_path), 3)
    assert outcome.records[1].key == lines[-1].split()[2]


@pytest.mark.parametrize("place", ["{}/study.journal", "sqlite:///{}/study.db"])
def test_two_tuners_share_one_study(tmp_path: Path, place: str) -> None:
    study = place.format(tmp_path)
    tuners = _start(study, 8, 0.3, number=2)
    outputs = [_finish(tuner) for tuner in tuners]
    assert all(tuner.returncode == 0 for tuner in tuners)
    finished = [[line for line in lines if line.startswith("finished")] for lines in outputs]
    assert all(lines for lines in finished)
    _, records = load_study(study)
    searched = [record.key for record in records if record.origin != "confirm"]
    assert 8 <= len(searched) <= 9  # both may start the last one
    assert len(set(searched)) == len(searched)


def test_a_study_cut_short_while_writing_loses_no_finished_trial(tmp_path: Path) -> None:
    before = tune(_study(tmp_path), 3).records
    with open(_study(tmp_path), "ab") as stream:
        stream.write(b'{"op_code": 6, "worker_id": "x", "trial')
    assert tune(_study(tmp_path), 4).records[: len(before)] == before


def test_a_study_damaged_in_the_middle_keeps_its_readable_trials(tmp_path: Path) -> None:
    before = tune(_study(tmp_path), 3).records
    path = Path(_study(tmp_path))
    lines = path.read_bytes().splitlines(keepends=True)
    records = [number for number, line in enumerate(lines) if b'"record"' in line]
    lines[records[0]] = b"\x00\xff garbage\n"
    path.write_bytes(b"".join(lines))
    outcome = tune(_study(tmp_path), 4)
    assert {record.key for record in before[1:]} <= {record.key for record in outcome.records}
    assert list(tmp_path.glob("study.journal.damaged-*"))


def test_a_file_that_is_no_study_is_refused_and_kept(tmp_path: Path) -> None:
    Path(_study(tmp_path)).write_text("my notes\n")
    with pytest.raises(ConfigError, match="is not a study"):
        tune(_study(tmp_path), 1)
    assert Path(_study(tmp_path)).read_text() == "my notes\n"


def test_a_full_disk_ends_the_tuner_but_loses_no_finished_trial(tmp_path: Path) -> None:
    tune(_study(tmp_path), 1)
    size = Path(_study(tmp_path)).stat().st_size
    (process,) = _start(_study(tmp_path), 20, 0.0, limit_bytes=size + 9_000)
    lines = _finish(process)
    assert process.returncode == 4
    assert any("cannot be read or written" in line for line in lines)
    finished = {line.split()[2] for line in lines if line.startswith("finished")}
    outcome = tune(_study(tmp_path), 20)
    assert finished <= {record.key for record in outcome.records}


def test_a_stale_lock_is_broken(tmp_path: Path) -> None:
    tune(_study(tmp_path), 1)
    os.symlink(_study(tmp_path), _study(tmp_path) + ".lock")
    started = time.monotonic()
    assert len(tune(_study(tmp_path), 2).records) >= 2
    assert time.monotonic() - started < 40


def test_a_database_url_works_too(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    first = tune(url, 2)
    assert tune(url, 3).records[: len(first.records)] == first.records


@pytest.mark.parametrize("url", ["mysql://nobody@nowhere/study", "no such://thing", "magic://x"])
def test_a_database_that_cannot_be_opened_says_what_to_install(url: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        tune(url, 1)
    assert refusal.value.fix


@pytest.mark.parametrize(
    ("study", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
        ("profiles/study.journal", "profiles/study.journal"),
    ],
)
def test_a_databases_password_is_told_to_nobody(study: str, shown: str) -> None:
    assert without_password(study) == shown
