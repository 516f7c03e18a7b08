"""A SimulationReport as terminal tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zplan.candidates import Candidate
from zplan.memory.terms import Verdict
from zplan.report.terminal import pace, verdict_text
from zplan.simulate.report import SimulationReport
from zplan.units import format_bytes, format_count

_TOP = 10


def render_simulation(
    report: SimulationReport, candidate: Candidate, *, verdict: Verdict, problems: Sequence[str] = ()
) -> RenderableType:
    """Phases beside the formula's, what was alive at the peak, who allocated it, collectives, speed by formula."""
    head = Text(f"{candidate.label}: ")
    head.append_text(verdict_text(verdict))
    parts: list[RenderableType] = [
        head, Text(), _phases(report, candidate), Text(), _categories(report), Text(), _allocations(report), Text(),
    ]  # fmt: skip
    if report.collectives:
        parts += [_collectives(report), Text()]
    used = (
        f"{format_bytes(report.gpu_reserved_bytes)} reserved, {format_bytes(report.gpu_used_bytes)} used (nvidia-smi)"
    )
    parts += [_traffic(report), Text(), Text(f"GPU peak: {used}; context and NCCL by formula")]
    parts += [Text(f"{pace(candidate.speed)}, by formula"), Text()]
    parts += [Text(line, style="red") for line in problems]
    parts += [Text(f"replaced: {line}", style="dim") for line in report.replaced]
    parts += [Text(f"note: {line}", style="dim") for line in report.notes]
    parts.append(
        Text(
            f"{format_count(report.num_operations)} operations in {report.wall_seconds:.1f} s, "
            f"{format_bytes(report.worker_rss_bytes)} of this machine's memory",
            style="dim",
        )
    )
    return Group(*parts)


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim",
        min_width=len(title),
    )  # fmt: skip
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    return table


def _phases(report: SimulationReport, candidate: Candidate) -> RenderableType:
    table = _table("Peak of each phase, one rank", "", *report.allocated_phases)
    formula = candidate.memory.gpu.phases
    rows = {
        "allocated, simulated": dict(report.allocated_phases),
        "allocated, formula": {str(phase): value for phase, value in formula.items()},
        "reserved, replayed": dict(report.reserved_phases),
        "host": dict(report.host_phases),
        "pinned": dict(report.pinned_phases),
    }
    for name, values in rows.items():
        table.add_row(name, *(format_bytes(values.get(phase)) for phase in report.allocated_phases))
    return table


def _categories(report: SimulationReport) -> RenderableType:
    table = _table(
        f"Alive at the peak: {format_bytes(report.gpu_allocated_bytes)} in {report.peak_phase}", "", "bytes", "share"
    )
    for name, value in sorted(report.categories.items(), key=lambda item: -item[1]):
        if value:
            table.add_row(name, format_bytes(value), f"{value / report.gpu_allocated_bytes:.1%}")
    return table


def _allocations(report: SimulationReport) -> RenderableType:
    table = _table("Who allocated it", "where", "bytes", "count")
    for item in report.top_allocations[:_TOP]:
        where = item.site if ":" in item.site else f"{item.site}, {item.category}"
        table.add_row(where, format_bytes(item.bytes), str(item.count))
    return table


def _traffic(report: SimulationReport) -> RenderableType:
    table = _table("Copies of one rank, whole run", "", "bytes")
    for name, value in (
        ("host to device", report.host_to_device_bytes), ("device to host", report.device_to_host_bytes),
        ("NVMe read", report.nvme_read_bytes), ("NVMe written", report.nvme_written_bytes),
    ):  # fmt: skip
        if value:
            table.add_row(name, format_bytes(value))
    return Group(table, Text(f"floating point operations of one rank's step: {format_count(report.flops)}"))


def _collectives(report: SimulationReport) -> RenderableType:
    table = _table("Collectives of one rank, whole run", "", "calls", "bytes")
    for item in report.collectives:
        table.add_row(item.name, str(item.count), format_bytes(item.bytes))
    return table
