"""`zplan estimate`: the ranked table, one configuration in detail, or one option explained."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from zplan.answer import best_index, candidates_data, estimate_data
from zplan.commands import Answer
from zplan.errors import ExitCode
from zplan.job import Job
from zplan.planner import Candidate, Fix, evaluate, quantify_fixes, rank_candidates, smallest_change_that_fits
from zplan.report.terminal import question_lines, render_candidates, render_detail


def estimate(job: Job, *, explain: str | None, verbose: bool, quiet: bool) -> Answer:
    """Answer by formula: no GPU, no torch, no network."""
    if explain is not None:
        return _explained(job, explain)
    if job.choice is not None:
        return _detail(job, verbose=verbose, quiet=quiet)
    return _ranked(job, quiet=quiet)


def _headed(job: Job, body: RenderableType, *, quiet: bool) -> RenderableType:
    if quiet:
        return body
    return Group(question_lines(job.shape, job.recipe, job.cluster), Text(), body)


def _detail(job: Job, *, verbose: bool, quiet: bool) -> Answer:
    choice = job.choice_or_refuse()
    candidate = evaluate(job.shape, job.recipe, choice, job.cluster, bucket_rule=job.bucket_rule)
    fixes = quantify_fixes(job.shape, job.recipe, choice, job.cluster)
    body: list[RenderableType] = [render_detail(candidate, fixes, verbose=verbose)]
    body += [Text(f"warning: {line}", style="yellow") for line in job.warnings]
    return Answer(
        data=lambda: estimate_data(
            candidate, shape=job.shape, recipe=job.recipe, cluster=job.cluster, origins=job.origins, fixes=fixes
        ),
        text=_headed(job, Group(*body), quiet=quiet),
        code=_code(candidate),
    )


def _ranked(job: Job, *, quiet: bool) -> Answer:
    candidates = rank_candidates(job.shape, job.recipe, job.cluster, fixed=job.fixed, bucket_rule=job.bucket_rule)
    best = best_index(candidates)
    body: list[RenderableType] = [render_candidates(candidates, best=best, world_size=job.cluster.world_size), Text()]
    changes: tuple[Fix, ...] = ()
    if best is not None:
        body.append(Text(_hint(candidates[best]), style="dim"))
    else:
        changes = smallest_change_that_fits(job.shape, job.recipe, job.cluster, fixed=job.fixed)
        body.append(Text("nothing fits", style="red"))
        body += [Text(f"  {change.change}") for change in changes]
    return Answer(
        data=lambda: candidates_data(
            candidates, shape=job.shape, recipe=job.recipe, cluster=job.cluster, changes=changes
        ),
        text=_headed(job, Group(*body), quiet=quiet),
        code=ExitCode.OK if best is not None else ExitCode.DOES_NOT_FIT,
    )


def _hint(candidate: Candidate) -> str:
    """How to see the best one in detail, ready to type."""
    choice = candidate.choice
    flags = [f"--stage {choice.zero.stage}", f"--micro-batch {choice.batch.train_micro_batch_size_per_gpu}"]
    if choice.zero.offloads_optimizer:
        flags.append(f"--offload-optimizer {choice.zero.offload_optimizer.device}")
    if choice.zero.offloads_param:
        flags.append(f"--offload-param {choice.zero.offload_param.device}")
    flags.append("--gradient-checkpointing" if choice.gradient_checkpointing else "--no-gradient-checkpointing")
    return f"the first in detail: add {' '.join(flags)}"


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
    }
    return Answer(data=lambda: data, text=Group(*lines))


def _code(candidate: Candidate) -> ExitCode:
    return ExitCode.OK if candidate.memory.fits else ExitCode.DOES_NOT_FIT
