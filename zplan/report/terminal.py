"""Answers as terminal tables. Rows in, Rich renderables out; nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zplan.hardware import Cluster
from zplan.memory.terms import MemoryEstimate, Term
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.report.labels import strategy_code, strategy_legend
from zplan.units import format_bytes, format_bytes_short, format_count, format_seconds

if TYPE_CHECKING:
    from zplan.doctor import Finding
    from zplan.planner import Candidate, Fix
    from zplan.speed.types import SpeedEstimate

VERDICT_STYLE = {"fits": "green", "tight": "yellow", "does_not_fit": "red"}
VERDICT_TEXT = {"fits": "fits", "tight": "tight", "does_not_fit": "does not fit"}
_SEVERITY_STYLE = {"ok": "green", "warning": "yellow", "broken": "red"}


RANGE_LEGEND = "low: nothing wasted; expected: as counted; high: what must fit"


def plain_table(title: str | None = None) -> Table:
    """Without lines."""
    return Table(
        title=title, title_justify="left", title_style="bold", caption_justify="left", caption_style="dim", box=None,
        pad_edge=False, header_style="dim",
    )  # fmt: skip


def verdict_text(verdict: str) -> Text:
    return Text(VERDICT_TEXT[verdict], style=VERDICT_STYLE[verdict])


def question_lines(shape: ModelShape, recipe: Recipe, cluster: Cluster) -> Text:
    """What is being asked, in two lines."""
    gpu = cluster.gpu
    where = "described" if cluster.described else "this machine"
    nodes = f"{cluster.nodes} nodes x " if cluster.nodes > 1 else ""
    return Text(
        f"{shape.name}: {format_count(shape.num_parameters)} parameters, {recipe.method}, {recipe.dtype}, "
        f"{recipe.optimizer}, {recipe.train_batch_size} x {recipe.max_length} tokens a step\n"
        f"{where}: {nodes}{cluster.gpus_per_node} x {gpu.name} ({format_bytes(gpu.free_bytes)} free), "
        f"host {format_bytes(cluster.host.available_bytes)} available"
    )


def render_candidates(candidates: Sequence[Candidate], *, best: int | None, world_size: int) -> RenderableType:
    """The ranked table: one strategy a row, best first; it fits 80 columns."""
    table = plain_table()
    for heading in ("", "strategy", "micro", "GPU", "host", "tokens/s", "verdict"):
        justify: Literal["left", "right"] = "left" if heading in ("", "strategy", "verdict") else "right"
        # on a narrow screen a strategy goes on in the next line; a number never loses a digit
        least = 12 if heading == "strategy" else None
        table.add_column(heading, justify=justify, no_wrap=heading != "strategy", min_width=least)
    for index, candidate in enumerate(candidates):
        memory, batch = candidate.memory, candidate.choice.batch
        speed = candidate.speed.tokens_per_second
        table.add_row(
            "→" if index == best else "",
            strategy_code(candidate.choice, world_size),
            f"{batch.train_micro_batch_size_per_gpu}x{batch.gradient_accumulation_steps}",
            format_bytes_short(memory.gpu.used.expected),
            format_bytes_short(memory.host.resident_bytes),
            "-" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}",
            _short_or_verdict(memory),
        )
    legend = strategy_legend(candidate.choice for candidate in candidates)
    return Group(table, Text(f"{legend}; G: GiB", style="dim"))


def _short_or_verdict(memory: MemoryEstimate) -> Text:
    """`fits`, `tight`, or how much is missing and where."""
    verdict = worst_verdict(memory)
    if verdict != "does_not_fit":
        return verdict_text(verdict)
    short = {"GPU": memory.gpu.short_bytes, "host": memory.host.short_bytes, "NVMe": memory.nvme.short_bytes}
    where = max(short, key=lambda name: short[name])
    return Text(f"{where} -{format_bytes_short(short[where])}", style=VERDICT_STYLE[verdict])


def worst_verdict(memory: MemoryEstimate) -> str:
    """The least favourable of GPU, host and NVMe."""
    order = ("does_not_fit", "tight", "fits")
    return min((memory.gpu.verdict, memory.host.verdict, memory.nvme.verdict), key=order.index)


def render_detail(candidate: Candidate, fixes: Sequence[Fix], *, verbose: bool) -> RenderableType:
    """One configuration: verdict, phases, terms at the peak, fixes."""
    memory, speed = candidate.memory, candidate.speed
    parts: list[RenderableType] = [_summary(candidate), Text(), _phases(memory), Text()]
    peak = memory.gpu.peak_phase
    at_peak = [term for term in memory.gpu.terms if peak in term.phases and term.bytes]
    parts += [_terms(f"GPU bytes at the peak ({peak})", at_peak, verbose=verbose), Text()]
    if memory.host.phases:
        host_peak = max(memory.host.phases, key=memory.host.phases.__getitem__)
        at_host = [term for term in memory.host.terms if host_peak in term.phases and term.bytes]
        parts += [_terms(f"Host bytes of a node at the peak ({host_peak})", at_host, verbose=verbose), Text()]
    if speed.parts and verbose:
        pieces = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in speed.parts.items())
        parts += [Text(f"step time before overlap: {pieces}"), Text()]
    if fixes:
        parts.append(_fixes(fixes, fits_now=candidate.tier == 0))
    notes = list(memory.notes)
    if memory.gpu.documented_bound_bytes is not None and not candidate.choice.zero.overlaps_comm:
        notes.append("documented 4.5x bound: without overlap_comm the documentation counts each bucket once")
    parts += [Text(f"note: {note}", style="dim") for note in notes]
    return Group(*parts)


def _summary(candidate: Candidate) -> RenderableType:
    memory, speed = candidate.memory, candidate.speed
    table = plain_table(candidate.label)
    for heading in ("", "low", "expected", "high", "available", ""):
        table.add_column(heading, justify="right" if heading else "left")
    gpu = memory.gpu
    for name, value in (("allocated", gpu.allocated), ("reserved", gpu.reserved), ("used (nvidia-smi)", gpu.used)):
        last = name.startswith("used")
        table.add_row(
            f"GPU {name}", format_bytes(value.low), format_bytes(value.expected), format_bytes(value.high),
            format_bytes(gpu.free_bytes) if last else "", verdict_text(gpu.verdict) if last else "",
        )  # fmt: skip
    table.caption = RANGE_LEGEND
    host, nvme = memory.host, memory.nvme
    free = min((limit.limit_bytes for limit in host.limits if limit.needed_bytes == host.resident_bytes), default=None)
    table.add_row(
        "host resident, a node", "", format_bytes(host.resident_bytes), "", format_bytes(free),
        verdict_text(host.verdict),
    )  # fmt: skip
    table.add_row("  of it pinned", "", format_bytes(host.pinned_bytes), "", "", "")
    if nvme.bytes:
        table.add_row(
            "NVMe, a node", "", format_bytes(nvme.bytes), "", format_bytes(nvme.free_bytes), verdict_text(nvme.verdict)
        )
    if gpu.documented_bound_bytes is not None:
        table.add_row("documented 4.5x bound", "", format_bytes(gpu.documented_bound_bytes), "", "", "")
    return table if speed.tokens_per_second is None else Group(table, Text(pace(speed)))


def pace(speed: SpeedEstimate) -> str:
    """`36,853 tokens/s, 445 ms a step, bound by compute`."""
    if speed.tokens_per_second is None:
        return "no tokens/s: this device's rates are not known"
    each = f"{speed.tokens_per_second:,.0f} tokens/s, {format_seconds(speed.step_seconds)} a step"
    return f"{each}, bound by {speed.bound_by}"


def _phases(memory: MemoryEstimate) -> RenderableType:
    table = plain_table("Peak of each phase")
    table.add_column("", no_wrap=True)
    for phase in memory.gpu.phases:
        table.add_column(phase, justify="right", no_wrap=True)
    table.add_row("GPU", *(format_bytes(value) for value in memory.gpu.phases.values()))
    if memory.host.phases:
        table.add_row("host", *(format_bytes(memory.host.phases.get(phase)) for phase in memory.gpu.phases))
    return table


def _terms(title: str, terms: Sequence[Term], *, verbose: bool) -> RenderableType:
    table = plain_table(title)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="dim", overflow="fold")
    for term in sorted(terms, key=lambda term: -term.bytes):
        table.add_row(
            term.name, format_bytes(term.bytes), term.formula if not verbose else f"{term.formula}\n{term.source}"
        )
    return table


def _fixes(fixes: Sequence[Fix], *, fits_now: bool) -> RenderableType:
    table = plain_table("What would change it")
    table.add_column("change")
    for heading in ("GPU", "host", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for fix in fixes:
        then = Text("then it fits", style="green") if fix.fits and not fits_now else Text()
        table.add_row(fix.change, signed(fix.gpu_bytes), signed(fix.host_bytes), _speed_change(fix), then)
    return table


def _speed_change(fix: Fix) -> str:
    return "-" if fix.tokens_per_second is None else f"{fix.tokens_per_second - 1:+.0%}"


def fix_effect(fix: Fix) -> str:
    """A fix's effect in one line: `GPU -21.4 GiB, host unchanged, tokens/s -24%`."""
    gpu, host = (signed(part) if part else "unchanged" for part in (fix.gpu_bytes, fix.host_bytes))
    return f"GPU {gpu}, host {host}, tokens/s {_speed_change(fix)}"


def signed(num_bytes: int | None) -> str:
    if not num_bytes:
        return "-"
    return ("+" if num_bytes > 0 else "") + format_bytes(num_bytes)


def render_machine(cluster: Cluster, findings: Sequence[Finding], *, quiet: bool = False) -> RenderableType:
    """`zplan inspect`: what is there, then what is wrong with it; `quiet` leaves what is in order out."""
    gpu, host = cluster.gpu, cluster.host
    table = plain_table("This machine")
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("")
    rows = [
        ("GPUs" if gpu.kind == "cuda" else "CPU ranks", f"{cluster.gpus_per_node} x {gpu.name}"),
        ("memory each", f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"),
        ("host RAM", f"{format_bytes(host.available_bytes)} available of {format_bytes(host.total_bytes)}"),
        ("cgroup limit", format_bytes(host.cgroup_limit_bytes) if host.cgroup_limit_bytes else "none"),
        ("memlock", "unlimited" if host.memlock_bytes is None else format_bytes(host.memlock_bytes)),
        ("/dev/shm", format_bytes(host.shm_bytes)),
        ("CPUs", str(host.num_cpus)),
        (
            "NVMe",
            f"{format_bytes(host.nvme_free_bytes)} free in {host.nvme_path}"
            if host.nvme_path
            else "none below the current folder",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    checks = plain_table("Checks")
    checks.add_column("", no_wrap=True)
    checks.add_column("")
    shown = [finding for finding in findings if not quiet or finding.severity != "ok"]
    if not shown:
        return Group(table, Text(), Text("nothing is wrong", style="green"))
    for finding in shown:
        text = finding.what
        if finding.severity != "ok":
            text += "".join(
                f"\n  {label}: {part}" for label, part in (("because", finding.because), ("try", finding.fix)) if part
            )
        checks.add_row(Text(finding.severity, style=_SEVERITY_STYLE[finding.severity]), text)
    return Group(table, Text(), checks)
