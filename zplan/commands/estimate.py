"""`zplan estimate`: the ranked table, one configuration in detail, or one option explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from rich.console import Group, RenderableType
from rich.text import Text

from zplan.answer import best_index, candidates_data, estimate_data
from zplan.calibrate import Corrections, known_corrections, outdated
from zplan.commands import Answer
from zplan.corrected import correct, correction_data, correction_line
from zplan.errors import ExitCode
from zplan.fixes import buffer_settings
from zplan.hardware import Cluster
from zplan.job import Job
from zplan.planner import Candidate, Fix, evaluate, quantify_fixes, rank_candidates, smallest_change_that_fits
from zplan.report.terminal import fix_effect, question_lines, render_candidates, render_detail
from zplan.units import format_bytes
from zplan.zero_config import OffloadParam


def estimate(job: Job, *, explain: str | None, verbose: bool, quiet: bool) -> Answer:
    """Answer by formula: no GPU, no torch, no network."""
    if explain is not None:
        return _explained(job, explain)
    job = replace(job, warnings=(*job.warnings, *filter(None, [outdated(job.cluster)])))
    if job.choice is not None:
        return _detail(job, verbose=verbose, quiet=quiet)
    return _ranked(job, quiet=quiet)


def _headed(job: Job, body: RenderableType, *, quiet: bool) -> RenderableType:
    if quiet:
        return body
    return Group(question_lines(job.shape, job.recipe, job.cluster), Text(), body)


def _detail(job: Job, *, verbose: bool, quiet: bool) -> Answer:
    choice = job.choice_or_refuse()
    known = known_corrections(job.cluster)
    candidate = evaluate(job.shape, job.recipe, choice, job.cluster, bucket_rule=job.bucket_rule)
    candidate = correct(candidate, known, job.cluster)
    fixes = quantify_fixes(job.shape, job.recipe, choice, job.cluster, bucket_rule=job.bucket_rule)
    body: list[RenderableType] = [render_detail(candidate, fixes, verbose=verbose)]
    body += [*_corrections(known), *_warnings(job, told=candidate.memory.notes)]
    return Answer(
        data=lambda: estimate_data(
            candidate,
            shape=job.shape,
            recipe=job.recipe,
            cluster=job.cluster,
            origins=job.origins,
            fixes=fixes,
            warnings=job.warnings,
            calibration=correction_data(known),
        ),
        text=_headed(job, Group(*body), quiet=quiet),
        code=_code(candidate),
    )


def _corrections(known: Corrections | None) -> list[RenderableType]:
    return [] if known is None else [Text(correction_line(known), style="dim")]


def _warnings(job: Job, *, told: Sequence[str] = ()) -> list[RenderableType]:
    """What the question has that is odd; a key that a note calls dead is not called so again."""
    dead = {note.partition(_DEAD)[0] for note in told if _DEAD in note}
    again = [_DEAD in line and line.partition(_DEAD)[0].partition(".")[0] in dead for line in job.warnings]
    return [
        Text(f"warning: {line}", style="yellow")
        for line, is_told in zip(job.warnings, again, strict=True)
        if not is_told
    ]


_DEAD = " has no effect"


def _ranked(job: Job, *, quiet: bool) -> Answer:
    known = known_corrections(job.cluster)
    ranked = rank_candidates(job.shape, job.recipe, job.cluster, fixed=job.fixed, bucket_rule=job.bucket_rule)
    candidates = sorted((correct(item, known, job.cluster) for item in ranked), key=lambda item: item.tier)
    best = best_index(candidates)
    body: list[RenderableType] = [render_candidates(candidates, best=best, world_size=job.cluster.world_size)]
    body += [*_corrections(known), *_warnings(job), Text()]
    changes: tuple[Fix, ...] = ()
    if best is not None:
        body.append(Text(_hint(candidates[best], job.cluster), style="dim"))
    else:
        changes = smallest_change_that_fits(
            job.shape, job.recipe, job.cluster, fixed=job.fixed, bucket_rule=job.bucket_rule
        )
        body += _nothing_fits(candidates[0], changes, job.cluster)
    return Answer(
        data=lambda: candidates_data(
            candidates,
            shape=job.shape,
            recipe=job.recipe,
            cluster=job.cluster,
            origins=job.origins,
            changes=changes,
            warnings=job.warnings,
            calibration=correction_data(known),
        ),
        text=_headed(job, Group(*body), quiet=quiet),
        code=ExitCode.OK if best is not None or candidates[0].memory.fits else ExitCode.DOES_NOT_FIT,
    )


def _nothing_fits(closest: Candidate, changes: tuple[Fix, ...], cluster: Cluster) -> list[RenderableType]:
    """The closest one, why it is not called `fits`, and the smallest change of each kind with which something does."""
    if closest.tier == 1:
        lines = [Text(f"nothing is sure to fit; {closest.label} is tight:", style="yellow")]
        lines += [Text(f"  {note}") for note in closest.memory.notes if note.startswith("not modelled")]
        lines.append(Text(f"  settle it with zplan simulate {_flags(closest, cluster)}"))
    else:
        memory = closest.memory
        parts = (("GPU", memory.gpu), ("host", memory.host), ("NVMe", memory.nvme))
        short = " and ".join(f"{format_bytes(part.short_bytes)} of {name}" for name, part in parts if part.short_bytes)
        lines = [Text(f"nothing fits; {closest.label} comes closest, short of {short}", style="red")]
    if changes:
        lines.append(Text("smallest change of each kind with which something fits:"))
        lines += [Text(f"  {change.change}  ({fix_effect(change)})") for change in changes]
    elif closest.tier == 2:
        lines.append(Text("no smaller optimizer, shorter sequence, adapter, memory or number of GPUs helps alone"))
    return [*lines]


def _hint(candidate: Candidate, cluster: Cluster) -> str:
    """How to see the best one in detail, ready to type."""
    return f"the first in detail: add {_flags(candidate, cluster)}"


def _flags(candidate: Candidate, cluster: Cluster) -> str:
    choice = candidate.choice
    flags = [f"--stage {choice.zero.stage}", f"--micro-batch {choice.batch.train_micro_batch_size_per_gpu}"]
    if choice.zero.offloads_optimizer:
        flags.append(f"--offload-optimizer {choice.zero.offload_optimizer.device}")
    if choice.zero.offloads_param:
        flags.append(f"--offload-param {choice.zero.offload_param.device}")
        flags += buffer_settings(choice.zero.offload_param, OffloadParam())
    if choice.zero.offload_param.device == "nvme" and not choice.zero.stage3_prefetch_bucket_size:
        flags.append("--set stage3_prefetch_bucket_size=0")
    if choice.zero.overlap_comm:
        flags.append("--set overlap_comm=true")
    flags.append("--gradient-checkpointing" if choice.gradient_checkpointing else "--no-gradient-checkpointing")
    if choice.batch.sequence_parallel_size > 1:
        flags.append(f"--set sequence_parallel_size={choice.batch.sequence_parallel_size}")
    if choice.batch.autotp_size > 1:
        flags.append(f"--set autotp_size={choice.batch.autotp_size}")
    if choice.batch.world_size != cluster.world_size:
        flags.append(f"--set world_size={choice.batch.world_size}")
    return " ".join(flags)


def _explained(job: Job, key: str) -> Answer:
    from zplan.explain import explain

    choice = job.choice
    if choice is None:
        choice = rank_candidates(job.shape, job.recipe, job.cluster, fixed=job.fixed)[0].choice
    explanation = explain(key, job.shape, job.recipe, choice, job.cluster)
    lines = [Text(explanation.key, style="bold"), Text(explanation.text), Text()]
    lines += [Text(line) for line in explanation.effects]
    data = {
        "schema": "zplan.explanation/1",
        "key": explanation.key,
        "text": explanation.text,
        "effects": list(explanation.effects),
        "rows": [asdict(row) for row in explanation.rows],
        "documented_bound_bytes": explanation.documented_bound_bytes,
    }
    return Answer(data=lambda: data, text=Group(*lines))


def _code(candidate: Candidate) -> ExitCode:
    return ExitCode.OK if candidate.memory.fits else ExitCode.DOES_NOT_FIT
