"""Before anything is loaded: does the plan still fit this machine, is there room for the checkpoints."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from sft.rows import is_hub_id, read_rows
from zplan import files
from zplan.errors import ConfigError, DoesNotFitError, ExitCode
from zplan.plan import Plan, Rung
from zplan.recipe import DTYPE_BYTES
from zplan.units import format_bytes

_ESTIMATE_SECONDS = 120
_OPTIMIZER_BYTES = 12
"""fp32 master weight, exp_avg and exp_avg_sq of a trainable parameter in mixed-precision Adam (an upper bound)."""
_KEPT_CHECKPOINTS = 3
"""save_total_limit 2, and the one being written."""


def check_fit(plan: Plan) -> tuple[bool, str]:
    """(fits, what the planner says). An answer other than fits / does not fit is no refusal: (True, warning).

    zplan is asked as a child process: the trainer does not import the planner.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        files.save(plan, path)
        command = [sys.executable, "-m", "zplan.cli", "estimate", "--plan", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_ESTIMATE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return True, f"warning: zplan estimate took longer than {_ESTIMATE_SECONDS} s"
    said = (done.stderr.strip() or done.stdout.strip())[-2000:]
    if done.returncode == ExitCode.DOES_NOT_FIT:
        return False, "\n".join(part for part in (done.stdout.strip(), done.stderr.strip()) if part)[-4000:]
    if done.returncode != ExitCode.OK:
        last = said.splitlines()[-1] if said else "no message"
        return True, f"warning: zplan estimate could not check this plan (exit {done.returncode}): {last}"
    return True, ""


def choose_rung(plan: Plan, *, fallback: bool, force: bool) -> tuple[Plan, list[str]]:
    """The plan, or with `fallback` the first rung of its ladder that fits.

    Raises:
        DoesNotFitError: nothing fits, unless `force`.
    """
    fits, said = check_fit(plan)
    if fits:
        return plan, [said] if said else []
    if force:
        return plan, ["warning: --force trains although the estimate does not fit", said]
    for rung in plan.ladder if fallback else ():
        candidate = on_rung(plan, rung)
        if check_fit(candidate)[0]:
            return candidate, [f"fallback: {rung.reason}"]
    more = " --fallback takes a smaller configuration of the plan;" if plan.ladder and not fallback else ""
    raise DoesNotFitError(
        "the plan does not fit this machine",
        problems=tuple(said.splitlines()),
        fix=f"zplan estimate lists what would help;{more} --force tries anyway",
    )


def on_rung(plan: Plan, rung: Rung) -> Plan:
    """The plan with a rung's configuration."""
    return replace(
        plan, choice=rung.choice, deepspeed=rung.deepspeed, predicted=rung.predicted, measured=rung.measured, ladder=()
    )


def checkpoint_bytes(plan: Plan) -> int | None:
    """Upper bound for one checkpoint; None if the weights' size is not known.

    parameters * (2 * weight bytes + 12)   full fine-tuning: model.safetensors, the engine's copy, the optimizer
    parameters * weight bytes              adapters: the engine's copy of the frozen weights (stages 0-2)
    """
    sizes = [item.stat().st_size for item in Path(plan.model_path).glob("*.safetensors")]
    if not sizes:
        return None
    weight_bytes = DTYPE_BYTES[plan.recipe.dtype]
    stored = 4 if _stored_dtype(plan) == "float32" else 2
    num_parameters = sum(sizes) // stored
    if plan.recipe.method == "full":
        return num_parameters * (2 * weight_bytes + _OPTIMIZER_BYTES)
    return num_parameters * weight_bytes


def _stored_dtype(plan: Plan) -> str:
    config = files.load_json(Path(plan.model_path) / "config.json")
    return str(config.get("dtype", config.get("torch_dtype", "bfloat16")))


def check_data(source: str) -> None:
    """Open a local source and look at its first row, before ranks spend their start on a wrong path.

    Raises:
        ConfigError: missing, unreadable, of an unknown kind, or empty.
    """
    if is_hub_id(source):
        return
    if next(iter(read_rows(source)), None) is None:
        raise ConfigError(f"{source} is empty", because="training needs at least one example", fix="check --dataset")


def check_writable(output_dir: Path) -> None:
    """Raises ConfigError if the folder cannot be made or written."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ConfigError(
            f"{output_dir} cannot be written: {error.strerror or error}", fix="--output-dir ELSEWHERE"
        ) from error


def check_disk(plan: Plan, output_dir: Path) -> None:
    """Raises DoesNotFitError if the checkpoints have no room."""
    size = checkpoint_bytes(plan)
    if size is None:
        return
    free = shutil.disk_usage(output_dir).free
    if size * _KEPT_CHECKPOINTS > free:
        raise DoesNotFitError(
            f"{output_dir} has {format_bytes(free)} free; checkpoints need {format_bytes(size * _KEPT_CHECKPOINTS)}",
            because=f"one is at most {format_bytes(size)}, two are kept while the next is written",
            fix="--output-dir on a larger disk, or --force",
        )
