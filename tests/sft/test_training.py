"""Real trainings on CPU ranks: they learn, stop, resume and leave a model that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft.checkpoint import conversion_bytes, list_checkpoints, written_bytes
from sft.disk import expected_writes
from sft.session import Session, with_resume
from tests.sft.warm import WarmServer, make_plan, make_recipe, rank_pids
from zplan import files
from zplan.plan import Plan

STEPS = 6


def make_session(plan: Plan, output_dir: Path, **changes: Any) -> Session:
    return Session(plan=plan, output_dir=str(output_dir), **{"max_steps": STEPS, "save_steps": 3, **changes})


def train(warm: WarmServer, session: Session) -> dict[str, Any]:
    answer = warm.train(session)
    logs = "".join(path.read_text()[-2000:] for path in Path(session.output_dir).glob("log_*.txt"))
    assert not any(answer["exit"].values()), logs
    expected = expected_writes(session.plan, merge=False)
    assert expected is not None
    for checkpoint in list_checkpoints(Path(session.output_dir)):
        assert written_bytes(checkpoint) <= expected.checkpoint_bytes
    return dict(files.load_json(Path(session.output_dir) / "training_report.json"))


def losses(report: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in report["loss_history"]]


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_a_full_fine_tuning_learns_and_leaves_a_model_that_transformers_loads(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path, stage: int, ranks: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset), stage=stage, ranks=ranks)
    report = train(warm, make_session(plan, tmp_path, eval_fraction=0.1))
    assert report["outcome"] == "finished"
    assert losses(report)[-1] < losses(report)[0]
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].shape == before[name].shape for name in before)
    assert not after["lm_head.weight"].equal(before["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    card = (tmp_path / "README.md").read_text()
    for shown in (
        f"| ZeRO stage, ranks | {stage}, {ranks} |",
        "| training loss |",
        "deepspeed 0.",
        f'"stage": {stage}',
    ):
        assert shown in card


def test_weights_of_a_tied_model_are_gathered_after_an_evaluation(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """As SmolLM2: a tied head that ZeRO-3 gathers for the loss, and nothing persistent."""
    model_dir = tmp_path / "tied"
    shutil.copytree(tiny_model_dir, model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    zero = {"stage3_param_persistence_threshold": 640, "stage3_prefetch_bucket_size": 3686}
    plan = make_plan(make_recipe(model_dir, tiny_dataset), stage=3, ranks=2, **zero)
    report = train(warm, make_session(plan, tmp_path / "run", eval_fraction=0.1, max_steps=2, save_steps=2))
    assert report["outcome"] == "finished"
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (3, 2)])
def test_lora_leaves_an_adapter_and_an_answer(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path, stage: int, ranks: int
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset, method="lora"), stage=stage, ranks=ranks)
    report = train(warm, make_session(plan, tmp_path, sample_prompt="Which wall?", sample_tokens=4))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0
    assert not (tmp_path / "model.safetensors").exists()
    assert report["samples"][0].keys() == {"prompt", "before", "after"}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path)
    trained = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert trained
    assert all(weight.abs().sum() > 0 for weight in trained)  # they start at zero


def test_losses_are_equal_at_every_stage(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    histories = []
    for stage in (0, 1, 2, 3):
        plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset), stage=stage, ranks=2)
        histories.append(losses(train(warm, make_session(plan, tmp_path / str(stage), max_steps=3, save_steps=3))))
    for history in histories[1:]:
        assert history == pytest.approx(histories[0], rel=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize(("stage", "method"), [(2, "full"), (3, "lora")])
def test_a_resumed_run_ends_like_an_unbroken_one(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path, stage: int, method: str
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset, method=method), stage=stage, ranks=2)
    unbroken = train(warm, make_session(plan, tmp_path / "unbroken"))
    broken = make_session(plan, tmp_path / "broken")
    train(warm, broken)
    (tmp_path / "broken" / "training_report.json").unlink()
    (tmp_path / "broken" / "checkpoint-6" / "zplan_checkpoint.json").unlink()  # as if killed while it was written
    resumed, notes = with_resume(broken, None)
    assert notes[0].startswith("skipped checkpoint-6")
    assert str(resumed.resume).endswith("checkpoint-3")
    assert losses(train(warm, resumed)) == losses(unbroken)


@pytest.mark.slow
def test_a_run_of_two_ranks_continues_on_one(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tiny_model_dir, tiny_dataset)
    session = make_session(make_plan(recipe, ranks=2), tmp_path)
    unbroken = train(warm, session)
    alone, notes = with_resume(replace(session, plan=make_plan(recipe, ranks=1)), str(tmp_path / "checkpoint-3"))
    assert notes[-1] == "converting it from 2 to 1 ranks"
    assert alone.universal
    converted = tmp_path / "checkpoint-3" / "global_step3_universal"
    added = sum(item.stat().st_size for item in converted.rglob("*") if item.is_file())
    assert 0 < added <= conversion_bytes(tmp_path / "checkpoint-3" / "global_step3")
    assert losses(train(warm, alone)) == pytest.approx(losses(unbroken), rel=1e-5)  # fp32 sums in another order


def test_sigterm_saves_and_the_next_start_continues(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset), ranks=2)
    session = make_session(plan, tmp_path, max_steps=2000, save_steps=3)
    files.save(session, tmp_path / "run.json")
    warm.send({"session": str(tmp_path / "run.json"), "ranks": 2})
    deadline = time.monotonic() + 180
    while not (tmp_path / "checkpoint-3" / "zplan_checkpoint.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(rank_pids(warm)[1], signal.SIGTERM)  # one rank is told; all agree
    assert warm.receive()["exit"] == {"0": 143, "1": 143}
    report = files.load_json(tmp_path / "training_report.json")
    assert report["outcome"] == "stopped"
    resumed, _ = with_resume(session, None)
    assert str(resumed.resume).endswith(f"checkpoint-{report['steps']}")


def test_a_plan_that_contradicts_itself_is_refused(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset))
    wrong = replace(plan, deepspeed={**plan.deepspeed, "gradient_clipping": 0.5})
    assert warm.train(make_session(wrong, tmp_path))["exit"] == {"0": 2}
    assert "gradient_clipping is 0.5" in (tmp_path / "log_0.txt").read_text()


def test_a_training_that_dies_says_why_in_its_report(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset))
    session = make_session(plan, tmp_path)
    (tmp_path / "checkpoint-3").write_text("a file where the checkpoint's folder has to be")
    assert warm.train(session)["exit"] != {"0": 0}
    report = files.load_json(tmp_path / "training_report.json")
    assert report["outcome"] == "failed"
    assert "checkpoint-3" in report["reason"]
    assert [entry["step"] for entry in report["loss_history"]] == [1, 2, 3]


def command(plan: Plan, tmp_path: Path, *more: str) -> list[str]:
    files.save(plan, tmp_path / "plan.json")
    return [sys.executable, "-m", "sft.train", "--plan", str(tmp_path / "plan.json"), "--force", *more]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "/nowhere/data.jsonl"], "/nowhere/data.jsonl does not exist"),
        (["--max-steps", "0"], "--max-steps is 0, below 1"),
        (["--resume", "/nowhere/checkpoint-3"], "/nowhere/checkpoint-3 does not exist"),
        (["--output-dir", "/proc/here"], "/proc/here cannot be written"),
    ],
)
@pytest.mark.slow
def test_bad_input_ends_with_status_2(
    tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset))
    line = command(plan, tmp_path, "--output-dir", str(tmp_path / "run"), *arguments)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_a_plan_edited_by_hand_names_its_unknown_keys(tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset))
    line = command(plan, tmp_path)
    data = files.load_json(tmp_path / "plan.json")
    data["choice"]["zero"]["stag"] = 3
    files.save_json(data, tmp_path / "plan.json")
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "choice.zero.stag: unknown key" in done.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_leaves_no_process(tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset), ranks=2)
    run = tmp_path / "run"
    line = command(plan, tmp_path, "--output-dir", str(run), "--max-steps", "5000", "--save-steps", "3")
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (run / "checkpoint-3" / "zplan_checkpoint.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=180)
    assert process.returncode == 130
    assert len(children) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert files.load_json(run / "training_report.json")["outcome"] == "stopped"
