"""`training_report.json` of a training that died: which rank died first, of what, and how to go on."""

from __future__ import annotations

import errno
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.checkpoint import newest_whole
from sft.session import REPORT_FILE, SESSION_FILE, Session
from zplan import files
from zplan.errors import MachineError, ZplanError
from zplan.units import format_bytes

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")
"""How safetensors' SafetensorError ends."""
_TORCH_WRITER = "inline_container.cc"
"""torch.save's RuntimeError when the file did not grow as written: "unexpected pos 576 vs 534"."""


def disk_error(error: BaseException, session: Session) -> MachineError | None:
    """The failure as "the disk is full", in the words of a user; None if it is another one."""
    causes = (error, error.__cause__)
    if not any(_is_full(cause) for cause in causes if cause is not None):
        return None
    output_dir = Path(session.output_dir)
    checkpoint, _ = newest_whole(output_dir)
    after = "starts again at step 0" if checkpoint is None else f"continues from {checkpoint.name}, which is whole"
    return MachineError(
        f"{output_dir} could not be written to the end: {str(error).splitlines()[0]}",
        because=f"the disk or a file-size limit is full ({format_bytes(shutil.disk_usage(output_dir).free)} free)",
        fix=f"free space; the same command again {after}",
    )


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    found = _RUST_ERRNO.search(str(error))
    return (found is not None and int(found.group(1)) in _FULL) or (
        isinstance(error, RuntimeError) and _TORCH_WRITER in str(error)
    )


def save_failure(
    session: Session, reason: str, *, rank: int | None = None, log_history: Sequence[dict[str, Any]] = ()
) -> None:
    """Write the report, unless a rank that failed earlier has: what the others meet then is only that it is gone.

    A disk that refuses the report is named, and does not hide the failure itself.
    """
    output_dir = Path(session.output_dir)
    if reported_failure(output_dir) is not None:
        return
    history = [{"step": entry["step"], "loss": entry["loss"]} for entry in log_history if "loss" in entry]
    checkpoint, _ = newest_whole(output_dir)
    report = {
        "schema": "zplan.training_report/1",
        "outcome": "failed",
        "reason": reason,
        "rank": rank,
        "steps": history[-1]["step"] if history else None,
        "loss_history": history,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "model": session.plan.model_path,
        "recipe": files.to_data(session.plan.recipe),
        "resumed_from": session.resume,
    }
    _write(report, output_dir)


def reported_failure(output_dir: Path) -> dict[str, Any] | None:
    """What a rank of this start (`run.json` is written at every start) has reported; None if none has."""
    report, begun = output_dir / REPORT_FILE, output_dir / SESSION_FILE
    if not report.is_file() or not begun.is_file() or report.stat().st_mtime_ns < begun.stat().st_mtime_ns:
        return None
    found: dict[str, Any] = files.load_json(report)
    return found if found.get("outcome") == "failed" else None


def save_end(session: Session, ended: str, *, killed: bool) -> None:
    """What the launcher saw: the whole report if no rank could write one, the true reason if a rank was killed."""
    output_dir = Path(session.output_dir)
    found = reported_failure(output_dir)
    if found is None:
        if not (output_dir / REPORT_FILE).exists():
            save_failure(session, ended)
    elif killed:
        _write({**found, "reason": ended, "rank": None, "then": found["reason"]}, output_dir)


def _write(report: dict[str, Any], output_dir: Path) -> None:
    try:
        files.save_json(report, output_dir / REPORT_FILE)
    except ZplanError as error:
        print(f"zplan: no {REPORT_FILE} could be written: {error.what}", file=sys.stderr)
