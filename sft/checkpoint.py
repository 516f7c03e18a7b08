"""Checkpoints that survive SIGKILL at any moment: which one is the newest whole one, and for how many ranks it is.

A checkpoint is whole when every rank has finished it (the mark, written last) and every archive in it has its end
record: a file cut short by a full disk or a dead machine has none.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from zplan import files
from zplan.errors import ConfigError, DoesNotFitError, MachineError, ZplanError
from zplan.units import format_bytes

MARK = "zplan_checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)$")
_CONVERT_SECONDS = 6 * 3600
_UNIVERSAL = "_universal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Written into a checkpoint by rank 0 after all ranks have finished it."""

    schema: str = "zplan.checkpoint/1"
    step: int
    world_size: int
    zero_stage: int
    fingerprint: str
    """Of the run that it belongs to."""


def list_checkpoints(output_dir: Path) -> list[Path]:
    """`checkpoint-N` folders, newest (highest N) first."""
    found = [
        (int(match.group(1)), item) for item in output_dir.glob("checkpoint-*") if (match := _NAME.search(item.name))
    ]
    return [item for _, item in sorted(found, reverse=True)]


def load_mark(checkpoint: Path) -> Mark:
    """Raises ConfigError if the checkpoint was never finished."""
    return files.load(Mark, checkpoint / MARK)


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it is whole."""
    try:
        mark = load_mark(checkpoint)
        state = files.load_json(checkpoint / "trainer_state.json")
    except ZplanError as error:
        return error.what
    if state.get("global_step") != mark.step:
        return f"trainer_state.json is at step {state.get('global_step')}, not {mark.step}"
    latest = checkpoint / "latest"
    if not latest.is_file():
        return "the file `latest` is missing"
    engine = checkpoint / latest.read_text().strip()
    archives = sorted(engine.glob("*.pt"))
    num_optim = sum(item.name.endswith("_optim_states.pt") for item in archives)
    if mark.zero_stage > 0 and num_optim != mark.world_size:
        return f"{num_optim} of {mark.world_size} optimizer shards in {engine.name}"
    if not archives:
        return f"no shards in {engine.name}"
    broken = [item.name for item in archives if not zipfile.is_zipfile(item)]
    broken += [item.name for item in checkpoint.glob("*.safetensors") if not is_whole_safetensors(item)]
    return f"cut short: {', '.join(broken)}" if broken else None


def is_whole_safetensors(path: Path) -> bool:
    """True if the file is as long as its header says."""
    size = path.stat().st_size
    if size < 8:
        return False
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > size - 8:
            return False
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return False
    ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
    return bool(size == 8 + length + max(ends, default=0))


def newest_whole(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and one line for each newer one that is not."""
    skipped: list[str] = []
    for checkpoint in list_checkpoints(output_dir):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name}: {damage}")
    return None, skipped


def remove_unfinished(output_dir: Path) -> list[Path]:
    """Delete the checkpoints that were never finished; the room they take is needed to go on after a full disk."""
    removed = [item for item in list_checkpoints(output_dir) if item.is_dir() and not (item / MARK).exists()]
    for item in removed:
        shutil.rmtree(item)
    return removed


def require_whole(checkpoint: Path) -> None:
    """Raises ConfigError for a checkpoint that the user named and that cannot be resumed from."""
    if not checkpoint.is_dir():
        raise ConfigError(f"{checkpoint} does not exist", fix="--resume (without a path) takes the newest whole one")
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ConfigError(
            f"{checkpoint} is not whole: {damage}", fix="--resume (without a path) takes the newest whole one"
        )


def written_bytes(checkpoint: Path) -> int:
    """Bytes that the training wrote into a checkpoint: all but what a conversion for other ranks has added."""
    inside = [item for item in checkpoint.rglob("*") if item.is_file()]
    return sum(item.stat().st_size for item in inside if _UNIVERSAL not in str(item.relative_to(checkpoint)))


def conversion_bytes(engine: Path) -> int:
    """Room that a conversion needs: every optimizer shard in slices, merged again, and the model states copied.

    Source: deepspeed 0.19.8, checkpoint/ds_to_universal.py:1189 (main; the slices are removed at the end).
    """
    sizes = {item.name: item.stat().st_size for item in engine.glob("*.pt")}
    optimizer = sum(size for name, size in sizes.items() if name.endswith("_optim_states.pt"))
    return 2 * optimizer + (sum(sizes.values()) - optimizer)


def _check_room(engine: Path) -> None:
    needed, free = conversion_bytes(engine), shutil.disk_usage(engine).free
    if free < needed:
        raise DoesNotFitError(
            f"{engine.parent} has {format_bytes(free)} free, {format_bytes(needed - free)} too little to convert it",
            because="a checkpoint for another number of ranks is written beside the one that is there",
            fix=f"free {format_bytes(needed - free)}, or resume with the checkpoint's own number of ranks",
        )


def make_universal(checkpoint: Path, *, zero_stage: int) -> bool:
    """Convert a checkpoint for another number of ranks; False if it needs no conversion (stage 0 keeps no shards).

    Source: deepspeed 0.19.8, checkpoint/ds_to_universal.py; `--inject_missing_state` accepts transformers' checkpoints.
    Loaded without running pickled code: sft/safe_load.py.

    Raises:
        ConfigError: the checkpoint is of another stage than the plan.
        DoesNotFitError: the disk has no room for the converted one.
        MachineError: the conversion failed.
    """
    mark = load_mark(checkpoint)
    if mark.zero_stage != zero_stage:
        raise ConfigError(
            f"{checkpoint.name} is of ZeRO stage {mark.zero_stage}, the plan of stage {zero_stage}",
            because="DeepSpeed's universal checkpoint does not change the stage",
            fix=f"a plan of stage {mark.zero_stage}, or the final model as --model of a new plan",
        )
    if zero_stage == 0:
        return False
    tag = (checkpoint / "latest").read_text().strip()
    target = checkpoint / f"{tag}{_UNIVERSAL}"
    if (checkpoint / "latest_universal").is_file() and target.is_dir():
        return True
    _check_room(checkpoint / tag)
    command = [
        sys.executable, "-m", "sft.safe_load",
        "--input_folder", str(checkpoint / tag), "--output_folder", str(target),
        "--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=_CONVERT_SECONDS, check=False)
    if done.returncode != 0 or not (checkpoint / "latest_universal").is_file():
        shutil.rmtree(target, ignore_errors=True)
        raise MachineError(
            f"{checkpoint.name} could not be converted for another number of ranks",
            because=(done.stderr.strip().splitlines() or ["no message"])[-1],
            fix=f"resume with {mark.world_size} ranks",
        )
    return True
