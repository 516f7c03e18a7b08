"""What breaks while a training runs: a full disk, a rank that dies, SIGKILL at any moment. Real processes."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sft import launch
from sft.checkpoint import MARK, list_checkpoints, make_universal, newest_whole
from sft.failure import disk_error, reported_failure, save_end, save_failure
from sft.session import Session, with_resume
from tests.sft.test_training import losses, make_session, train
from tests.sft.warm import WarmServer, make_plan, make_recipe, rank_pids
from zplan import files
from zplan.errors import MachineError

PATIENCE = 180.0
"""Seconds; the first test to use the warm process waits for its imports too."""


def begin(warm: WarmServer, session: Session) -> None:
    """Start the ranks and do not wait for their end."""
    out = Path(session.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    files.save(session, out / "run.json")
    warm.send({"session": str(out / "run.json"), "ranks": session.plan.choice.batch.world_size})


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fills_up_on_any_rank_is_named_and_the_run_goes_on_from_the_last_whole_checkpoint(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path, rank: int
) -> None:
    recipe = make_recipe(tiny_model_dir, tiny_dataset, method="lora")
    session = make_session(make_plan(recipe, ranks=2), tmp_path / "broken", max_steps=18, save_steps=2)
    out = Path(session.output_dir)
    begin(warm, session)
    wait_for(lambda: newest_whole(out)[0])
    limit = 16 << 10  # bytes a file: less than an adapter or a shard, more than a report
    resource.prlimit(rank_pids(warm)[rank], resource.RLIMIT_FSIZE, (limit, limit))
    assert warm.receive()["exit"][str(rank)] == 4
    report = files.load_json(out / "training_report.json")
    assert (report["outcome"], report["rank"]) == ("failed", rank)
    assert "could not be written to the end" in report["reason"]
    assert Path(report["checkpoint"]).name in report["reason"]
    resumed, notes = with_resume(session, None)
    assert resumed.resume == report["checkpoint"]
    assert f"continuing from {report['checkpoint']}" in notes
    assert all((item / MARK).exists() for item in list_checkpoints(out))
    whole = train(warm, resumed)
    unbroken = train(warm, make_session(session.plan, tmp_path / "unbroken", max_steps=18, save_steps=9))
    assert losses(whole) == losses(unbroken)


@pytest.mark.slow
def test_sigkill_of_any_rank_while_saving_loses_nothing(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset), ranks=2, stage=3)
    unbroken = train(warm, make_session(plan, tmp_path / "unbroken", max_steps=12, save_steps=6))
    session = make_session(plan, tmp_path / "broken", max_steps=12, save_steps=1)
    out, chance = Path(session.output_dir), random.Random(2)
    interrupted, step = 0, 0
    for _ in range(4):
        resumed, _ = with_resume(session, None)
        begin(warm, resumed)
        step += 2
        unfinished = out / f"checkpoint-{step}"
        wait_for(lambda folder=unfinished: folder.exists())
        time.sleep(chance.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(rank_pids(warm)[chance.randrange(2)], signal.SIGKILL)
        assert any(code != 0 for code in warm.receive()["exit"].values())
        found, skipped = newest_whole(out)
        assert found is not None
        interrupted += bool(skipped)
        step = int(found.name.removeprefix("checkpoint-"))
    assert interrupted > 0  # at least one was really cut short
    finished = train(warm, with_resume(session, None)[0])
    assert losses(finished) == losses(unbroken)
    saved, expected = (folder / "model.safetensors" for folder in (out, tmp_path / "unbroken"))
    assert saved.read_bytes() == expected.read_bytes()


def run_to_the_end(commands: list[list[str]], log_dir: Path) -> launch.Ended:
    ranks = launch.Ranks(processes=[subprocess.Popen(item, start_new_session=True) for item in commands])
    for rank in range(len(commands)):
        (log_dir / f"log_{rank}.txt").write_text("what the rank said\n")
    return launch._wait(ranks, log_dir)


def test_the_launcher_says_which_rank_ended_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = run_to_the_end([["sh", "-c", "sleep 0.3; exit 1"], ["sh", "-c", "kill -KILL $$"]], tmp_path)
    assert killed == launch.Ended(status=1, reason="rank 1 was ended by SIGKILL", killed=True)
    failed = run_to_the_end([["true"], ["sh", "-c", "exit 4"]], tmp_path)
    assert failed == launch.Ended(status=4, reason="rank 1 ended with status 4")
    assert "what the rank said" in capsys.readouterr().err
    assert run_to_the_end([["true"], ["true"]], tmp_path) == launch.Ended(status=0)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    found = Session(plan=make_plan(make_recipe(tmp_path, None)), output_dir=str(tmp_path))
    files.save(found, tmp_path / "run.json")
    return found


def test_the_first_rank_that_fails_is_the_one_reported(session: Session, tmp_path: Path) -> None:
    save_failure(session, "the cause", rank=1)
    save_failure(session, "connection closed by peer", rank=0)
    found = reported_failure(tmp_path)
    assert found is not None
    assert (found["reason"], found["rank"]) == ("the cause", 1)
    files.save(session, tmp_path / "run.json")  # the next start
    assert reported_failure(tmp_path) is None


def test_what_a_killed_rank_could_not_say_the_launcher_adds(session: Session, tmp_path: Path) -> None:
    save_failure(session, "connection closed by peer", rank=0)
    save_end(session, "rank 1 was ended by SIGKILL", killed=True)
    found = reported_failure(tmp_path)
    assert found is not None
    assert (found["reason"], found["then"]) == ("rank 1 was ended by SIGKILL", "connection closed by peer")


def test_a_report_that_cannot_be_written_does_not_hide_the_failure(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "training_report.json").mkdir()
    save_failure(session, "the cause")
    assert "no training_report.json could be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        ValueError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
)
def test_every_librarys_word_for_a_full_disk_is_understood(session: Session, error: Exception) -> None:
    told = disk_error(error, session)
    assert told is not None
    assert "starts again at step 0" in str(told)


def test_other_errors_are_not_a_full_disk(session: Session) -> None:
    assert disk_error(OSError(13, "Permission denied"), session) is None
    assert disk_error(RuntimeError("CUDA error"), session) is None


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    session = make_session(make_plan(make_recipe(tiny_model_dir, tiny_dataset)), tmp_path / "run", max_steps=2)
    train(warm, replace(session, save_steps=1))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (shard,) = checkpoint.glob("*/*_optim_states.pt")
    torch.save({"optimizer_state_dict": Trap(tmp_path / "ran")}, shard)
    resumed, _ = with_resume(session, str(checkpoint))
    assert warm.train(resumed)["exit"] == {"0": 2}
    assert "posix.mkdir" in files.load_json(tmp_path / "run" / "training_report.json")["reason"]
    with pytest.raises(MachineError, match="could not be converted"):
        make_universal(checkpoint, zero_stage=2)
    assert not (tmp_path / "ran").exists()
