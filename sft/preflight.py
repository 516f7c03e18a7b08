"""Before anything is loaded: does the plan still fit this machine, can the data be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path

from sft.disk import weight_shapes
from sft.rows import BadRow, is_hub_id, read_rows
from sft.schema import SchemaError, parse_row
from zplan import files
from zplan.errors import ConfigError, DoesNotFitError, ExitCode
from zplan.plan import Plan, Rung
from zplan.probe import Nvml, visible_devices
from zplan.units import format_bytes

_ESTIMATE_SECONDS = 120
_FIRST_ROWS = 1000
_HUB_SECONDS = 10.0
_SHOWN = 10


def _estimate(plan: Plan, *flags: str) -> subprocess.CompletedProcess[str] | None:
    """zplan, asked as a child process: the trainer does not import the planner. None if it takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        files.save(plan, path)
        command = [sys.executable, "-m", "zplan.cli", "estimate", "--plan", str(path), *flags]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=_ESTIMATE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return None


def check_fit(plan: Plan) -> tuple[bool, str]:
    """(fits, what the planner says). An answer other than fits / does not fit is no refusal: (True, warning)."""
    done = _estimate(plan)
    if done is None:
        return True, f"warning: zplan estimate took longer than {_ESTIMATE_SECONDS} s"
    said = (done.stderr.strip() or done.stdout.strip())[-2000:]
    if done.returncode == ExitCode.DOES_NOT_FIT:
        return False, "\n".join(part for part in (done.stdout.strip(), done.stderr.strip()) if part)[-4000:]
    if done.returncode != ExitCode.OK:
        last = said.splitlines()[-1] if said else "no message"
        return True, f"warning: zplan estimate could not check this plan (exit {done.returncode}): {last}"
    return True, ""


def check_devices(plan: Plan, nvml: Nvml, *, visible: str | None) -> None:
    """A GPU for every rank that is started here. Where no driver answers, CUDA itself has to say so.

    Args:
        visible: CUDA_VISIBLE_DEVICES.

    Raises:
        DoesNotFitError: the plan has more ranks than this machine has GPUs; --force cannot help.
    """
    ranks, devices = plan.choice.batch.world_size, visible_devices(nvml.devices(), visible)
    if plan.cluster.gpu.kind != "cuda" or not devices or ranks <= len(devices):
        return
    raise DoesNotFitError(
        f"the plan starts {ranks} ranks, and this machine has {len(devices)} GPU{'s' * (len(devices) > 1)} for them",
        because="every rank needs a GPU of its own" + (f" (CUDA_VISIBLE_DEVICES is {visible})" if visible else ""),
        fix=f"a plan for this machine: zplan tune --model {plan.model_path} --dataset {plan.recipe.dataset or 'DATA'}",
    )


def check_merge(plan: Plan) -> None:
    """Host memory for --merge: rank 0 loads the base once more while the training is still in memory.

        the host's bytes of a step + all elements * weight bytes + one matrix that is being added

    Raises:
        DoesNotFitError: with the bytes that lack; the adapter alone can be merged later, elsewhere.
    """
    shapes = weight_shapes(Path(plan.model_path))
    done = _estimate(plan, "--json")
    if not shapes or done is None or done.returncode not in (ExitCode.OK, ExitCode.DOES_NOT_FIT):
        return  # check_fit has said why
    answer = json.loads(done.stdout)
    sizes = [prod(shape) for shape in shapes.values()]
    merging = (sum(sizes) + max(sizes)) * plan.recipe.weight_bytes
    host = answer["cluster"]["host"]
    limits = (host["available_bytes"], host["cgroup_limit_bytes"])
    free = min(limit for limit in limits if limit is not None)
    short = answer["host"]["phases"]["step"] + merging - free
    if short > 0:
        raise DoesNotFitError(
            f"--merge at the end is short by {format_bytes(short)} of host memory",
            because=f"rank 0 loads the base model again, {format_bytes(merging)}, while the training is in memory",
            fix="leave --merge out and merge the adapter afterwards (peft: merge_and_unload), or --force",
        )


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


def check_data(source: str, *, skip_bad: bool, prompt_key: str | None = None, response_key: str | None = None) -> None:
    """Open a local source and look at its first rows, before ranks spend their start on a wrong path or column.

    Raises:
        ConfigError: missing, unreadable, of an unknown kind, empty, or with bad rows that are not to be skipped.
    """
    if is_hub_id(source):
        return
    rows = list(islice(read_rows(source), _FIRST_ROWS))
    if not rows:
        raise ConfigError(f"{source} is empty", because="training needs at least one example", fix="check --dataset")
    bad = []
    for row in rows:
        try:
            if isinstance(row, BadRow):
                bad.append(str(row))
            else:
                parse_row(row.value, prompt_key=prompt_key, response_key=response_key)
        except SchemaError as error:
            bad.append(f"{row.where}: {error}")
    nothing_left = len(bad) == len(rows) < _FIRST_ROWS
    if nothing_left or (bad and not skip_bad):
        keys = "check --dataset, --prompt-key and --response-key"
        raise ConfigError(
            f"{len(bad)} of the first {len(rows)} rows of {source} cannot be used",
            problems=tuple(bad[:_SHOWN]) + ((f"and {len(bad) - _SHOWN} more",) if len(bad) > _SHOWN else ()),
            fix=keys if len(bad) == len(rows) else "--bad-rows skip trains on the others",
        )


def check_hub(source: str) -> list[str]:
    """One question to the Hub before ranks start; notes. If it does not answer, the ranks only look in the cache.

    Otherwise every rank would ask six times, for half a minute, each on its own.

    Raises:
        ConfigError: the Hub knows no such data set, or does not show it to this user.
    """
    if not is_hub_id(source):
        return []
    from huggingface_hub import HfApi, is_offline_mode  # a quarter of a second that files need not pay
    from huggingface_hub.errors import RepositoryNotFoundError

    if is_offline_mode():
        return []
    try:
        HfApi().dataset_info(source, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{source} is no file here and no data set that the Hub shows you",
            because="it is misspelt, or private and you are not logged in (hf auth login)",
            fix="--dataset FILE.jsonl",
        ) from error
    except Exception as error:  # the process boundary to a remote service: every other failure means "no answer"
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        return [f"warning: the Hub does not answer ({error}); {source} is taken from the cache if it is there"]
    return []


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
