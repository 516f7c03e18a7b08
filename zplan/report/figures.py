"""Rows -> SVG figures (Matplotlib), a few tens of kB each, readable offline."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from zplan.report.rows import accuracy_rows, best_so_far, pareto_rows
from zplan.units import GIB

_OK, _FAILED, _LINE = "#1f6f8b", "#c0392b", "#e08e0b"


def _svg(figure: Figure) -> str:
    stream = StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float = 6.4, height: float = 3.6) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _top(rows: pd.DataFrame) -> float | None:
    """Upper end of a speed axis that cuts no point in half; None where no trial has a speed."""
    fastest = rows["tokens_per_second"].max()
    return None if pd.isna(fastest) else 1.08 * float(fastest)


def history_figure(rows: pd.DataFrame) -> str:
    """Tokens/s of every trial and the best so far."""
    figure, axes = _axes()
    done = rows[rows["outcome"] == "ok"]
    failed = rows[rows["outcome"] != "ok"]
    axes.scatter(done["trial"], done["tokens_per_second"], color=_OK, label="ran", zorder=3)
    axes.scatter(failed["trial"], [0.0] * len(failed), color=_FAILED, marker="x", label="did not run", zorder=3)
    axes.step(rows["trial"], best_so_far(rows), where="post", color=_LINE, label="best so far")
    axes.set(xlabel="trial", ylabel="tokens/s", ylim=(0, _top(rows)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(frameon=False)
    return _svg(figure)


def pareto_figure(rows: pd.DataFrame) -> str:
    """Speed against GPU and against host bytes; numbered are the trials that nothing beats in all three."""
    figure, both = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True)
    done, front = rows[rows["outcome"] == "ok"], pareto_rows(rows)
    for axes, column, label in (
        (both[0], "gpu_bytes", "peak allocated per rank, GiB"),
        (both[1], "host_bytes", "host memory of a node, GiB"),
    ):
        axes.spines[["top", "right"]].set_visible(False)
        axes.scatter(done[column] / GIB, done["tokens_per_second"], color=_OK)
        axes.scatter(front[column] / GIB, front["tokens_per_second"], color=_LINE, zorder=3)
        for _, row in front.iterrows():
            place = (row[column] / GIB, row["tokens_per_second"])
            axes.annotate(f"{row['trial']}", place, textcoords="offset points", xytext=(4, 4))
        axes.set(xlabel=label, ylim=(0, _top(rows)))
    both[0].set_ylabel("tokens/s")
    both[0].yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return _svg(figure)


def accuracy_figure(rows: pd.DataFrame, evidence: str) -> str | None:
    """Predicted peak against that of the trials, which `evidence` names; None without a trial that has both."""
    both = accuracy_rows(rows)
    if both.empty:
        return None
    figure, axes = _axes(4.4, 4.0)
    measured, predicted = both["gpu_bytes"] / GIB, both["predicted_gpu_bytes"] / GIB
    limit = 1.05 * max(measured.max(), predicted.max())
    axes.plot([0, limit], [0, limit], color="#999999", linewidth=1)
    axes.fill_between([0, limit], [0, 0.95 * limit], [0, 1.05 * limit], color="#999999", alpha=0.15, label="±5 %")
    axes.scatter(measured, predicted, color=_OK, zorder=3)
    axes.set(xlabel=f"{evidence} peak, GiB", ylabel="predicted peak, GiB", xlim=(0, limit), ylim=(0, limit))
    axes.legend(frameon=False)
    return _svg(figure)


def timeline_figure(simulation: Mapping[str, Any], *, free_bytes: int | None) -> str:
    """GPU bytes of a dry run by category over its operations, host and pinned bytes as lines, phases marked."""
    figure, axes = _axes(9.6, 4.2)
    samples = simulation["samples"]
    when = [sample["operation"] for sample in samples]
    names = [name for name, _ in sorted(simulation["categories"].items(), key=lambda item: -item[1])]
    names += sorted({name for sample in samples for name in sample["categories"]} - set(names))
    heights = [[sample["categories"].get(name, 0) / GIB for sample in samples] for name in names]
    axes.stackplot(when, heights, labels=names, step="post", colors=plt.get_cmap("tab10").colors)
    for name, style in (("host_bytes", ":"), ("pinned_bytes", "--")):
        if any(sample[name] for sample in samples):
            axes.plot(when, [sample[name] / GIB for sample in samples], "k" + style, label=name.removesuffix("_bytes"))
    if free_bytes is not None and free_bytes < 2 * simulation["gpu_allocated_bytes"]:
        axes.axhline(free_bytes / GIB, color=_FAILED, linewidth=1, label="free on the card")
    top = axes.get_ylim()[1]
    for before, sample in zip([None, *samples], samples, strict=False):
        if before is None or before["phase"] != sample["phase"]:
            axes.axvline(sample["operation"], color="#999999", linewidth=0.5)
            axes.text(sample["operation"], top, sample["phase"], rotation=90, va="top", fontsize=7, color="#666666")
    axes.set(xlabel="operations", ylabel="GiB of one rank", ylim=(0, top))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _svg(figure)
