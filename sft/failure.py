"""`training_report.json` of a training that died: what is known of it, and how to go on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.checkpoint import newest_whole
from sft.session import REPORT_FILE, Session
from zplan import files


def save_failure(session: Session, reason: str, *, log_history: Sequence[dict[str, Any]] = ()) -> None:
    """Write the report; a disk that refuses it is named and does not hide the failure itself."""
    output_dir = Path(session.output_dir)
    history = [{"step": entry["step"], "loss": entry["loss"]} for entry in log_history if "loss" in entry]
    checkpoint, _ = newest_whole(output_dir)
    report = {
        "schema": "zplan.training_report/1",
        "outcome": "failed",
        "reason": reason,
        "steps": history[-1]["step"] if history else None,
        "loss_history": history,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "model": session.plan.model_path,
        "recipe": files.to_data(session.plan.recipe),
        "resumed_from": session.resume,
    }
    try:
        files.save_json(report, output_dir / REPORT_FILE)
    except OSError as error:
        print(f"zplan: no {REPORT_FILE} could be written: {error.strerror or error}", file=sys.stderr)
