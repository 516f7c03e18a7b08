"""The inside of one rank of a training: build, train, evaluate, save, report."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import EarlyStoppingCallback, set_seed

from sft import build, data, outputs
from sft.agreement import check_agreement
from sft.callbacks import GracefulStop, MarkCheckpoints, ProgressLines, StepTimer
from sft.failure import disk_error, save_failure
from sft.meter import CudaMeter, measure_pinned_bytes, measure_used_bytes, peak_resident_bytes
from sft.order import longest
from sft.ranks import Rank, current_rank
from sft.safe_load import load_only_tensors, refused
from sft.session import Session
from sft.software import check_software
from sft.stream import open_stream
from zplan import files
from zplan.errors import DoesNotFitError, ExitCode

_COLLECTIVE_SECONDS = 1800.0
_MAX_SAVE_STEPS = 500
_SAVES_PER_RUN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A rank that is ready to train."""

    session: Session
    place: Rank
    tokenizer: Any
    data: data.Data
    trainer: build.PlanTrainer
    timer: StepTimer
    stop: GracefulStop


def train_rank(session: Session) -> int:
    """Train, and return this rank's exit status.

    Raises:
        ZplanError: malformed data, no memory, a broken machine.
    """
    prepared: Prepared | None = None
    try:
        prepared = prepare(session)
        prepared.trainer.train(resume_from_checkpoint=prepared.session.resume)
        return finish(prepared)
    except Exception as error:
        told = _explained(error, session)
        history = prepared.trainer.state.log_history if prepared else ()
        save_failure(session, f"{type(told).__name__}: {told}", rank=current_rank().rank, log_history=history)
        if told is error:
            raise
        raise told from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _explained(error: Exception, session: Session) -> Exception:
    """Out of memory and a full disk in the words of a user; anything else as it is."""
    if isinstance(error, torch.OutOfMemoryError):
        return DoesNotFitError(
            f"GPU memory ran out: {str(error).splitlines()[0]}",
            because="the plan's estimate or measurement was made for another machine, data or load",
            fix="--fallback, or zplan tune on this machine",
        )
    return refused(error) or disk_error(error, session) or error


def prepare(session: Session) -> Prepared:
    """Everything up to the first step."""
    build.quiet_libraries()
    load_only_tensors()
    place = current_rank()
    plan = session.plan
    kind = plan.cluster.gpu.kind
    build.check_world(plan.choice, place.world_size)
    check_software(plan.recipe, plan.choice, kind)
    check_agreement(plan.recipe, plan.choice, plan.deepspeed)
    build.init_process_group(kind, place, timeout_seconds=_COLLECTIVE_SECONDS)
    if kind == "cuda":
        torch.cuda.set_device(place.local_rank)
    session = _share(session)
    recipe = session.plan.recipe
    model_path, trusted = session.plan.model_path, session.trust_remote_code
    tokenizer = build.load_tokenizer(model_path, trust_remote_code=trusted)
    loaded = _load_data(session, tokenizer)
    if place.is_first:
        outputs.print_data_report(loaded)
    total_steps = num_steps(session, len(loaded.train))
    save_steps = session.save_steps or min(_MAX_SAVE_STEPS, max(1, -(-total_steps // _SAVES_PER_RUN)))
    args = build.sft_config(recipe, session.plan.choice, session.deepspeed, _run(session, save_steps, loaded), kind)
    set_seed(recipe.seed)
    model = build.load_model(model_path, recipe, weights="real", trust_remote_code=trusted)
    timer, stop = StepTimer(), GracefulStop()
    trainer = build.build_trainer(
        recipe,
        args,
        model,
        tokenizer,
        data.to_dataset(loaded.train) if loaded.stream is None else loaded.stream,
        eval_dataset=data.to_dataset(loaded.held_out) if loaded.held_out else None,
        first=_first_rows(session, loaded.train),
        callbacks=_callbacks(session, place, timer, stop),
    )
    timer.trainer = trainer
    return Prepared(
        session=session, place=place, tokenizer=tokenizer, data=loaded, trainer=trainer, timer=timer, stop=stop
    )


def _callbacks(session: Session, place: Rank, timer: StepTimer, stop: GracefulStop) -> list[Any]:
    mark = MarkCheckpoints(session.fingerprint, place.world_size, session.plan.choice.zero.stage)
    found: list[Any] = [timer, stop, mark]
    if place.is_first:
        found.append(ProgressLines(timer))
    if session.early_stopping_patience is not None:
        found.append(EarlyStoppingCallback(session.early_stopping_patience))
    return found


def _share(session: Session) -> Session:
    """Rank 0's decisions (fallback, checkpoint) reach ranks that another launcher started."""
    box: list[Any] = [files.to_data(session)]
    dist.broadcast_object_list(box, src=0)
    return files.from_data(Session, box[0], name="rank 0's session")


def _load_data(session: Session, tokenizer: Any) -> data.Data:
    source, options = str(session.plan.recipe.dataset), data_options(session)
    if session.streaming:
        return open_stream(source, tokenizer, options, shuffled=True)
    return data.load_data(source, tokenizer, options)


def data_options(session: Session) -> data.DataOptions:
    """How the session reads its data."""
    recipe = session.plan.recipe
    return data.DataOptions(
        max_length=recipe.max_length,
        seed=recipe.seed,
        eval_fraction=session.eval_fraction,
        bad_rows="skip" if session.bad_rows == "skip" else "refuse",
        loss_on="everything" if session.loss_on == "everything" else "answers",
        prompt_key=session.prompt_key,
        response_key=session.response_key,
        response_template=session.response_template,
    )


def num_steps(session: Session, num_examples: int) -> int:
    """Optimizer steps of the whole run (before packing, which makes it fewer)."""
    if session.max_steps > 0:
        return session.max_steps
    per_epoch = max(1, num_examples // session.plan.recipe.train_batch_size)
    return max(1, round(session.num_train_epochs * per_epoch))


def _first_rows(session: Session, examples: Sequence[data.Example]) -> tuple[int, ...]:
    """The longest examples, one whole step of them: the same however many ranks share it, so that a run may go on with
    another number of ranks. Packed sequences are all of one length."""
    if session.streaming or session.plan.recipe.packing or session.data_order == "shuffled":
        return ()
    return longest([len(item.input_ids) for item in examples], session.plan.recipe.train_batch_size)


def _run(session: Session, save_steps: int, loaded: data.Data) -> build.Run:
    extra: dict[str, Any] = {"report_to": session.report_to}
    if loaded.held_out and session.resume is None:
        extra["eval_on_start"] = True
    if session.early_stopping_patience is not None:
        extra |= {"eval_strategy": "steps", "eval_steps": save_steps, "load_best_model_at_end": True}
        extra |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    return build.Run(
        output_dir=Path(session.output_dir),
        max_steps=session.max_steps,
        num_train_epochs=session.num_train_epochs,
        learning_rate=session.plan.recipe.learning_rate,
        seed=session.plan.recipe.seed,
        save_steps=save_steps,
        extra=extra,
    )


def finish(prepared: Prepared) -> int:
    """After the last step: save, evaluate, measure, report."""
    trainer, session, place = prepared.trainer, prepared.session, prepared.place
    stopped = prepared.stop.stopped
    if not stopped:
        if prepared.data.held_out:
            trainer.evaluate()
        build.settle(trainer.model_wrapped)
        state = outputs.gather_weights(trainer.accelerator.unwrap_model(trainer.model), place)
        if place.is_first:
            outputs.save_model(trainer, prepared.tokenizer, state, Path(session.output_dir))
    reports = _gather_reports(prepared)
    dist.barrier()
    if not place.is_first:
        return _status(stopped)
    report = outputs.training_report(
        session,
        log_history=trainer.state.log_history,
        tokens_per_second=prepared.timer.tokens_per_second([item["tokens"] for item in reports]),
        step_seconds=prepared.timer.median_seconds,
        gpu=outputs.measured_gpu(reports),
        host_resident_bytes=sum(item["resident_bytes"] for item in reports[: place.local_world_size]),
        host_pinned_bytes=_total(reports[: place.local_world_size], "pinned_bytes"),
        outcome="stopped" if stopped else "finished",
        data=prepared.data,
    )
    if not stopped and session.sample_prompt:
        prompt = session.sample_prompt
        report["samples"] = outputs.sample_before_and_after(session, prepared.tokenizer, prompt)
    if not stopped and session.early_stopping_patience is not None:
        report["early_stopping"] = {
            "stopped_early": trainer.state.global_step < trainer.state.max_steps,
            "best_step": trainer.state.best_global_step,
            "best_held_out_loss": trainer.state.best_metric,
        }
    if not stopped and session.merge:
        report["merged"] = str(outputs.save_merged(session, prepared.tokenizer))
    outputs.save_report(report, session)
    outputs.print_summary(report, session)
    return _status(stopped)


def _status(stopped: bool) -> int:
    return 128 + signal.SIGTERM if stopped else int(ExitCode.OK)


def _gather_reports(prepared: Prepared) -> list[dict[str, Any]]:
    kind, local_rank = prepared.session.plan.cluster.gpu.kind, prepared.place.local_rank
    meter = CudaMeter(local_rank) if kind == "cuda" else None
    mine = {
        "tokens": prepared.timer.tokens,
        "allocated_bytes": meter.allocated_bytes if meter else None,
        "reserved_bytes": meter.reserved_bytes if meter else None,
        "used_bytes": measure_used_bytes(kind, local_rank),
        "resident_bytes": peak_resident_bytes(),
        "pinned_bytes": measure_pinned_bytes(kind),
    }
    gathered: list[Any] = [None] * prepared.place.world_size
    dist.all_gather_object(gathered, mine)
    return gathered


def _total(reports: Sequence[dict[str, Any]], key: str) -> int | None:
    values = [item[key] for item in reports]
    return None if None in values else sum(values)
