"""A study as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, select_autoescape

from zplan import files
from zplan.calibrate import Accuracy, Corrections, accuracy, learn, library_versions, machine_name
from zplan.report.figures import accuracy_figure, history_figure, pareto_figure
from zplan.report.labels import QUANTITY_NAMES
from zplan.report.rows import study_rows
from zplan.report.trials import format_speed
from zplan.trial import Evidence
from zplan.tuner.ledger import Question, Record, load_study
from zplan.tuner.winner import compared, rank_records
from zplan.units import format_bytes, format_seconds


def write_report(study_path: str, out: Path) -> Path:
    """Render the study and write the page atomically.

    Raises:
        ConfigError: there is no such study.
        MachineError: the page cannot be written.
    """
    question, records = load_study(study_path)
    files.save_text(render_report(question, records), out)
    return out


def render_report(question: Question, records: tuple[Record, ...]) -> str:
    """The page as text."""
    rows = study_rows(records)
    ranked = rank_records(records)
    shown = [_cells(row) for _, row in rows.iterrows()]
    best = next((cells for cells in shown if ranked and cells["trial"] == ranked[0].number), None)
    environment = Environment(
        loader=PackageLoader("zplan.report", "."), autoescape=select_autoescape(["html", "j2"]), trim_blocks=True
    )
    return environment.get_template("study.html.j2").render(
        title=f"Tuning {Path(question.recipe.model).name}",
        question=_question_text(question),
        evidence=_EVIDENCE[question.evidence],
        against="simulation" if question.evidence == "simulated" else "measurement",
        num_ok=int((rows["outcome"] == "ok").sum()),
        trials=shown,
        best=best,
        history=history_figure(rows),
        pareto=pareto_figure(rows),
        accuracy=accuracy_figure(rows, question.evidence),
        errors=_error_cells(question, records),
        versions=library_versions(),
    )


_EVIDENCE: Mapping[Evidence, str] = {
    "measured": "All numbers are measured.",
    "simulated": "Memory is simulated and speed predicted: nothing was measured.",
    "formula": "All numbers are by formula: nothing was measured.",
    "calibrated": "All numbers are by formula, calibrated: nothing was measured.",
}


def _error_cells(question: Question, records: tuple[Record, ...]) -> list[dict[str, Any]]:
    """How far the formula was from these trials, and how far it is once corrected by the others of them."""
    if question.evidence != "measured":
        return []
    nothing = Corrections(machine=machine_name(question.cluster), versions={})
    return [_error(item) for item in accuracy(learn(nothing, compared(records, "")))]


def _error(item: Accuracy) -> dict[str, Any]:
    return {
        "quantity": QUANTITY_NAMES[item.quantity],
        "trials": item.num_trials,
        "before": f"{item.before:.1%}",
        "after": f"{item.after:.1%}" if item.after is not None else "-",
    }


def _question_text(question: Question) -> str:
    recipe, cluster = question.recipe, question.cluster
    nodes = f"{cluster.nodes} nodes of " if cluster.nodes > 1 else ""
    return (
        f"{recipe.method}, {recipe.dtype}, {recipe.optimizer}, {recipe.max_length} tokens, {recipe.train_batch_size} "
        f"sequences a step, on {nodes}{cluster.gpus_per_node} x {cluster.gpu.name}"
    )


def _cells(row: pd.Series[Any]) -> dict[str, Any]:
    def known(name: str) -> Any:
        return None if pd.isna(row[name]) else row[name]

    def size(name: str) -> str:
        return format_bytes(int(row[name])) if known(name) is not None else "-"

    return {
        "trial": int(row["trial"]),
        "configuration": row["configuration"],
        "outcome": row["outcome"],
        "message": row["message"],
        "speed": format_speed(known("tokens_per_second")),
        "step": format_seconds(known("step_seconds")),
        "gpu": size("gpu_bytes"),
        "predicted": size("predicted_gpu_bytes"),
        "error": f"{row['gpu_error']:+.1%}" if known("gpu_error") is not None else "-",
        "host": size("host_bytes"),
        "front": bool(row["front"]),
    }
