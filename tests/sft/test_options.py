"""Switches of a training: noise, kinds of adapters, early stopping, merging."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sft import build
from sft import train as command_line
from sft.agreement import check_agreement
from sft.preflight import on_rung
from sft.session import Session
from tests.sft.test_training import losses, make_session, train
from tests.sft.warm import WarmServer, make_plan, make_recipe
from zplan import files
from zplan.commands.tune import tune
from zplan.errors import ConfigError
from zplan.job import make_job
from zplan.model_probe import probe_config
from zplan.options import Flags
from zplan.plan import Rung
from zplan.probe import probe_hardware


def parsed(model: Path, dataset: Path, folder: Path, *arguments: str, method: Any = "lora") -> Session:
    """The session that a command line makes of a plan."""
    files.save(make_plan(make_recipe(model, dataset, method=method)), folder / "plan.json")
    options: argparse.Namespace = command_line.parser().parse_args(["--plan", str(folder / "plan.json"), *arguments])
    return command_line.make_session(options)


def test_the_switches_reach_the_recipe_and_the_session(
    tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    arguments = ["--neftune-noise-alpha", "5", "--use-rslora", "--use-dora", "--merge"]
    session = parsed(
        tiny_model_dir, tiny_dataset, tmp_path, *arguments, "--early-stopping-patience", "2", "--eval-fraction", "0.1"
    )
    recipe = session.plan.recipe
    assert (recipe.neftune_noise_alpha, recipe.use_rslora, recipe.use_dora) == (5.0, True, True)
    assert (session.early_stopping_patience, session.merge) == (2, True)


def test_what_is_asked_of_zplan_reaches_the_run_unchanged(
    tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    asked = Flags(
        model=str(tiny_model_dir), dataset=str(tiny_dataset), method="lora", lora_dropout=0.1, use_rslora=True,
        use_dora=True, neftune_noise_alpha=5.0, modules_to_save=["lm_head"], gpu="cpu", stage=2, max_length=64,
    )  # fmt: skip
    job = make_job(asked, probe_shape=lambda path, name: probe_config(path, name=name), probe_cluster=probe_hardware)
    tune(
        job, trials=1, backend="formula", study=str(tmp_path / "study"), plan_path=str(tmp_path / "plan.json"),
        timeout_seconds=None, timed_steps=1, deadline_seconds=60, seed=0, console=Console(quiet=True), quiet=True,
    )  # fmt: skip
    options = command_line.parser().parse_args(["--plan", str(tmp_path / "plan.json")])
    session = command_line.make_session(options)
    assert session.plan.recipe == job.recipe
    adapter = build.peft_config(session.plan.recipe)
    assert adapter is not None
    assert (adapter.use_rslora, adapter.use_dora, adapter.lora_dropout) == (True, True, 0.1)
    assert adapter.modules_to_save == ["lm_head"]


def test_a_response_template_is_typed_as_in_a_file(tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    session = parsed(tiny_model_dir, tiny_dataset, tmp_path, "--response-template", r"\n\n### Response:")
    assert session.response_template == "\n\n### Response:"


def test_another_learning_rate_reaches_deepspeed_s_own_optimizer(
    tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset, optimizer="muon"))
    rung = Rung(reason="smaller", choice=plan.choice, deepspeed=plan.deepspeed, predicted=None, measured=None)
    files.save(replace(plan, ladder=(rung,)), tmp_path / "plan.json")
    line = ["--plan", str(tmp_path / "plan.json"), "--learning-rate", "0.5"]
    plan = command_line.make_session(command_line.parser().parse_args(line)).plan
    for asked in (plan, on_rung(plan, plan.ladder[0])):
        assert asked.deepspeed["optimizer"]["params"]["lr"] == 0.5
        check_agreement(asked.recipe, asked.choice, asked.deepspeed)


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        ("lora", ["--early-stopping-patience", "2"], "without --eval-fraction"),
        ("lora", ["--early-stopping-patience", "0", "--eval-fraction", "0.1"], "below 1"),
        ("lora", ["--eval-fraction", "1.5"], r"not in \[0, 1\)"),
        ("lora", ["--neftune-noise-alpha", "-1"], "neftune_noise_alpha is -1.0"),
        ("full", ["--merge"], "there is no adapter to merge"),
        ("full", ["--use-dora"], "are for adapters"),
    ],
)
def test_switches_that_mean_nothing_are_refused(
    tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path, method: str, arguments: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parsed(tiny_model_dir, tiny_dataset, tmp_path, *arguments, method=method)


@pytest.mark.slow
def test_dora_learns_the_same_at_stage_3_and_is_merged_into_a_model_that_transformers_loads(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = make_recipe(tiny_model_dir, tiny_dataset, method="lora", use_rslora=True, use_dora=True)
    zero = {"stage3_param_persistence_threshold": 0}  # nothing stays gathered
    reports = []
    for stage in (2, 3):
        plan = make_plan(recipe, stage=stage, ranks=2, **zero)
        reports.append(
            train(warm, make_session(plan, tmp_path / str(stage), max_steps=3, save_steps=3, merge=stage == 3))
        )
    assert losses(reports[1]) == pytest.approx(losses(reports[0]), rel=1e-5)  # fp32 sums in another order
    report, folder = reports[1], tmp_path / "3"
    config = files.load_json(folder / "adapter_config.json")
    assert (config["use_rslora"], config["use_dora"]) == (True, True)
    assert losses(report)[-1] < losses(report)[0]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokens = torch.arange(1, 17).reshape(1, -1)
    with torch.no_grad():
        before = base.eval()(tokens).logits
        with_adapter = PeftModel.from_pretrained(base, folder).eval()(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(report["merged"]).eval()(tokens).logits
    torch.testing.assert_close(merged, with_adapter, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, before, rtol=1e-4, atol=1e-4)


def test_neftune_adds_noise_to_training_and_none_to_evaluation(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    reports = []
    for alpha in (None, 50.0):
        plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset, neftune_noise_alpha=alpha), stage=2)
        session = make_session(plan, tmp_path / str(alpha), max_steps=1, save_steps=1, eval_fraction=0.1)
        reports.append(train(warm, session))
    plain, noisy = reports
    assert losses(plain) != losses(noisy)
    assert plain["held_out_loss"]["before"] == noisy["held_out_loss"]["before"]


def test_early_stopping_ends_a_run_that_gets_worse_and_keeps_the_best_weights(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tiny_model_dir, tiny_dataset, learning_rate=1.0)  # diverges
    session = make_session(
        make_plan(recipe, stage=3, ranks=2), tmp_path, max_steps=40, save_steps=1, eval_fraction=0.1,
        early_stopping_patience=2,
    )  # fmt: skip
    report = train(warm, session)
    found = report["early_stopping"]
    best = tmp_path / f"checkpoint-{found['best_step']}"
    assert files.load_json(best / "trainer_state.json")["best_model_checkpoint"] == str(best)  # so it is kept
    assert found["stopped_early"]
    assert report["steps"] == found["best_step"] + 2
    assert report["held_out_loss"]["after"] == pytest.approx(found["best_held_out_loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_s_muon_learns(
    warm: WarmServer, tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path, stage: int
) -> None:
    plan = make_plan(make_recipe(tiny_model_dir, tiny_dataset, optimizer="muon"), stage=stage, ranks=2)
    files.save(plan, tmp_path / "plan.json")
    line = ["--plan", str(tmp_path / "plan.json"), "--max-steps", "3", "--output-dir", str(tmp_path / "run")]
    report = train(warm, command_line.prepare(command_line.parser().parse_args(line)))
    assert report["outcome"] == "finished"
    assert sorted(losses(report), reverse=True) == losses(report)
    assert losses(report)[-1] < losses(report)[0] - 0.1
