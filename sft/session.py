"""What a training was asked to do: the plan, and what the command line put over it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft import checkpoint as checkpoints
from zplan import files
from zplan.errors import ConfigError
from zplan.plan import Plan

SESSION_FILE = "run.json"
REPORT_FILE = "training_report.json"
MERGED_FOLDER = "merged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One training, complete: every rank reads it from `run.json` in the output folder."""

    schema: str = "zplan.run/1"
    plan: Plan
    output_dir: str
    max_steps: int = -1
    num_train_epochs: float = 1.0
    save_steps: int | None = None
    """None: four checkpoints over the run, at most 500 steps apart."""
    eval_fraction: float = 0.0
    sample_prompt: str | None = None
    sample_tokens: int = 64
    bad_rows: str = "refuse"
    loss_on: str = "answers"
    prompt_key: str | None = None
    response_key: str | None = None
    response_template: str | None = None
    streaming: bool = False
    """Read the data while training."""
    report_to: str = "none"
    data_order: str = "longest-first"
    early_stopping_patience: int | None = None
    """Evaluate at every checkpoint; stop after so many without a lower held-out loss, and keep the best weights."""
    merge: bool = False
    """Also write the adapter merged into the base weights."""
    trust_remote_code: bool = False
    """Run Python code that the model folder holds."""
    resume: str | None = None
    """Checkpoint to continue from."""
    universal: bool = False
    """That checkpoint was converted for another number of ranks."""

    @property
    def fingerprint(self) -> str:
        """What must agree for a checkpoint to belong to this run: model, recipe, length; not the number of ranks."""
        data = {
            "model": self.plan.model_path,
            "recipe": files.to_data(self.plan.recipe),
            "stage": self.plan.choice.zero.stage,
            "length": [self.max_steps, self.num_train_epochs, self.eval_fraction],
            "data": [self.bad_rows, self.loss_on, self.prompt_key, self.response_key, self.response_template],
            "order": [self.data_order, self.streaming],
        }
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def deepspeed(self) -> dict[str, Any]:
        """The plan's configuration as it is; only a converted checkpoint adds the key that makes DeepSpeed read it."""
        config = dict(self.plan.deepspeed)
        return {**config, "checkpoint": {"load_universal": True}} if self.universal else config


def with_resume(session: Session, asked: str | None) -> tuple[Session, list[str]]:
    """Decide where to start, and say so.

    Args:
        asked: None (not asked), "newest", or the folder of a checkpoint.

    An unfinished run with the same fingerprint continues by itself: repeating a killed command must work. The folder of
    any other run is kept under another name, so that nothing finished is overwritten.
    """
    output_dir = Path(session.output_dir)
    if asked not in (None, "newest"):
        checkpoints.require_whole(Path(str(asked)))
        return _resumed(session, Path(str(asked)))
    notes = []
    same = _unfinished(output_dir) == session.fingerprint
    if asked == "newest" or same:
        found, skipped = checkpoints.newest_whole(output_dir)
        notes += [f"skipped {line}" for line in skipped]
        if same:
            checkpoints.remove_unfinished(output_dir)
        if found is not None:
            resumed, said = _resumed(session, found)
            return resumed, notes + said
        notes.append("no whole checkpoint to continue from: starting at step 0")
    elif _holds_a_run(output_dir):
        notes.append(f"{output_dir} holds another run: kept as {_move_aside(output_dir)}")
    return session, notes


def _resumed(session: Session, found: Path) -> tuple[Session, list[str]]:
    mark = checkpoints.load_mark(found)
    notes = [f"continuing from {found}"]
    if mark.fingerprint != session.fingerprint:
        notes.append("warning: that checkpoint was made with another plan, data or length")
    universal = False
    if mark.world_size != session.plan.choice.batch.world_size:
        _require_adam(session.plan, mark)
        notes.append(f"converting it from {mark.world_size} to {session.plan.choice.batch.world_size} ranks")
        universal = checkpoints.make_universal(found, zero_stage=session.plan.choice.zero.stage)
    return replace(session, resume=str(found), universal=universal), notes


def _require_adam(plan: Plan, mark: checkpoints.Mark) -> None:
    """Source: deepspeed 0.19.8, checkpoint/ds_to_universal.py:154 and :196 (extract_zero_shards, and of stage 3)."""
    if mark.zero_stage > 0 and plan.recipe.optimizer != "adamw":
        raise ConfigError(
            f"the checkpoint is of {mark.world_size} ranks, the plan for {plan.choice.batch.world_size}, and its "
            f"optimizer is {plan.recipe.optimizer}",
            because="DeepSpeed's conversion for another number of ranks reads Adam's exp_avg and exp_avg_sq only",
            fix=f"resume with {mark.world_size} ranks",
        )


def _unfinished(output_dir: Path) -> str | None:
    """Fingerprint of the run that was begun in this folder and not finished."""
    if not (output_dir / SESSION_FILE).is_file():
        return None
    report = output_dir / REPORT_FILE
    if report.is_file() and files.load_json(report).get("outcome") == "finished":
        return None
    try:
        return files.load(Session, output_dir / SESSION_FILE).fingerprint
    except ConfigError:
        return None


def _holds_a_run(output_dir: Path) -> bool:
    return (output_dir / SESSION_FILE).exists() or bool(checkpoints.list_checkpoints(output_dir))


def _move_aside(output_dir: Path) -> Path:
    number = 1
    while (kept := output_dir.with_name(f"{output_dir.name}.{number}")).exists():
        number += 1
    output_dir.rename(kept)
    return kept
