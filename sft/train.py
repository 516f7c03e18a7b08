"""`python -m sft.train --plan profiles/best.json`: train what a plan describes, on this machine.

Started by hand it checks the plan, starts one process per rank and watches them. Started by torchrun, deepspeed,
accelerate or srun it is one of the ranks. argparse, because Typer cannot express `--resume [CHECKPOINT]`.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft import preflight
from sft.agreement import check_agreement, check_weights
from sft.disk import check_adapter, check_disk, weight_shapes
from sft.failure import save_end
from sft.launch import PARENT_VARIABLE, launch
from sft.ranks import adopt_slurm, current_rank, die_with_parent, launched_by, set_environment
from sft.session import REPORT_FILE, SESSION_FILE, Session, with_resume
from sft.software import check_reporter, check_software
from zplan import files
from zplan.errors import ConfigError, ExitCode, ZplanError
from zplan.plan import Plan
from zplan.probe import DriverNvml
from zplan.recipe import Recipe


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(prog="python -m sft.train", description="Train what a plan describes.")
    line.add_argument("--plan", type=Path, help="profiles/*.json, as zplan tune wrote it")
    line.add_argument("--session", type=Path, help=argparse.SUPPRESS)
    line.add_argument("--output-dir", type=Path, help="default: runs/<name of the plan>")
    line.add_argument("--max-steps", type=int, help="optimizer steps; wins over --epochs")
    line.add_argument("--epochs", type=float, default=1.0)
    line.add_argument("--save-steps", type=int, help="steps between checkpoints; default: four over the run")
    line.add_argument("--resume", nargs="?", const="newest", metavar="CHECKPOINT", help="default: the newest whole one")
    line.add_argument("--force", action="store_true", help="train although the estimate says that it does not fit")
    line.add_argument(
        "--fallback", action="store_true", help="take a smaller configuration of the plan if it does not fit"
    )
    line.add_argument(
        "--merge",
        action="store_true",
        help="also write the adapter merged into the base weights, into OUTPUT_DIR/merged",
    )
    line.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model folder holds; default: never"
    )
    line.add_argument(
        "--report-to", default="none", help="none, tensorboard, wandb, mlflow, as transformers offers them"
    )
    line.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    _add_recipe(line.add_argument_group("instead of the plan's recipe"))
    _add_data(line.add_argument_group("data"))
    _add_evaluation(line.add_argument_group("evaluation"))
    return line


def _add_recipe(group: Any) -> None:
    group.add_argument("--learning-rate", type=float, help="instead of the plan's")
    group.add_argument("--seed", type=int, help="instead of the plan's")
    group.add_argument(
        "--neftune-noise-alpha", type=float, metavar="ALPHA", help="noise on the embeddings while training, e.g. 5"
    )
    group.add_argument(
        "--use-rslora", action="store_true", help="scale adapters by alpha / sqrt(r); needs no more memory"
    )
    group.add_argument(
        "--use-dora", action="store_true", help="train magnitudes beside the adapters; needs more memory"
    )


def _add_data(group: Any) -> None:
    group.add_argument("--dataset", help="file, folder or Hub id, instead of the plan's")
    group.add_argument(
        "--streaming", action="store_true", help="read the data while training, never all of them; needs --max-steps"
    )
    group.add_argument("--bad-rows", choices=("refuse", "skip"), default="refuse")
    group.add_argument("--loss-on", choices=("answers", "everything"), default="answers")
    group.add_argument("--prompt-key", help="column of the question, if it is not called prompt")
    group.add_argument("--response-key", help="column of the answer, if it is not called response")
    group.add_argument(
        "--response-template",
        type=lambda typed: typed.replace("\\n", "\n").replace("\\t", "\t"),
        help=r"heading before answers, e.g. '\n\n### Response:\n'",
    )
    group.add_argument(
        "--data-order",
        choices=("longest-first", "shuffled"),
        default="longest-first",
        help="longest-first (default): shuffled, but the longest examples come first, so that too little memory shows "
        "in step 1",
    )


def _add_evaluation(group: Any) -> None:
    group.add_argument(
        "--eval-fraction", type=float, default=0.0, help="held out; its loss is reported before and after"
    )
    group.add_argument(
        "--early-stopping-patience",
        type=int,
        metavar="N",
        help="evaluate at every checkpoint, stop after N without a lower held-out loss, keep the best; "
        "needs --eval-fraction",
    )
    group.add_argument("--sample-prompt", help="a question whose answer is reported before and after")


def asked_plan(options: argparse.Namespace) -> Plan:
    """The plan, with what the command line puts over its recipe.

    Raises:
        ConfigError: no plan, no data, no weights.
    """
    if options.plan is None:
        raise ConfigError("no plan", fix="--plan profiles/best.json")
    plan = files.load(Plan, options.plan)
    recipe = plan.recipe
    if options.dataset is not None:
        source = Path(options.dataset).expanduser()
        recipe = replace(recipe, dataset=str(source.resolve()) if source.exists() else options.dataset)
    named = ("learning_rate", "seed", "neftune_noise_alpha")
    changes: dict[str, Any] = {name: getattr(options, name) for name in named if getattr(options, name) is not None}
    changes |= {name: True for name in ("use_rslora", "use_dora") if getattr(options, name)}
    recipe = replace(recipe, **changes)
    if recipe.dataset is None:
        raise ConfigError("the plan names no dataset", fix="--dataset FILE.jsonl")
    if not Path(plan.model_path).is_dir():
        raise ConfigError(
            f"the plan's model folder {plan.model_path} does not exist",
            fix="download the model there, or make a new plan",
        )
    plan = replace(plan, recipe=recipe)
    return plan if options.learning_rate is None else with_learning_rate(plan, options.learning_rate)


def with_learning_rate(plan: Plan, learning_rate: float) -> Plan:
    """The plan and its ladder; where DeepSpeed makes the optimizer itself (Muon), its section has the rate too."""

    def changed(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
        if "optimizer" not in deepspeed:
            return dict(deepspeed)
        optimizer = deepspeed["optimizer"]
        return {**deepspeed, "optimizer": {**optimizer, "params": {**optimizer["params"], "lr": learning_rate}}}

    ladder = tuple(replace(rung, deepspeed=changed(rung.deepspeed)) for rung in plan.ladder)
    return replace(plan, deepspeed=changed(plan.deepspeed), ladder=ladder)


def make_session(options: argparse.Namespace) -> Session:
    """Plan and command line together.

    Raises:
        ConfigError: no plan, no data, no weights, or values that mean nothing.
    """
    plan = asked_plan(options)
    _check_values(options, plan.recipe)
    return Session(
        plan=plan,
        output_dir=str((options.output_dir or Path("runs") / options.plan.stem).resolve()),
        max_steps=options.max_steps or -1,
        num_train_epochs=options.epochs,
        save_steps=options.save_steps,
        eval_fraction=options.eval_fraction,
        sample_prompt=options.sample_prompt,
        bad_rows=options.bad_rows,
        loss_on=options.loss_on,
        prompt_key=options.prompt_key,
        response_key=options.response_key,
        response_template=options.response_template,
        streaming=options.streaming,
        report_to=options.report_to,
        data_order=options.data_order,
        early_stopping_patience=options.early_stopping_patience,
        merge=options.merge,
        trust_remote_code=options.trust_remote_code,
    )


def _check_values(options: argparse.Namespace, recipe: Recipe) -> None:
    for name in ("max_steps", "save_steps", "early_stopping_patience"):
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is {value}, below 1", fix=f"{flag} 100")
    if not 0 <= options.eval_fraction < 1:
        raise ConfigError(f"--eval-fraction is {options.eval_fraction}, not in [0, 1)", fix="--eval-fraction 0.05")
    if not 0 < options.epochs < math.inf:
        raise ConfigError(f"--epochs is {options.epochs}, not above 0", fix="--epochs 1")
    if options.early_stopping_patience and not options.eval_fraction:
        raise ConfigError(
            "--early-stopping-patience without --eval-fraction",
            because="it watches the loss of held-out examples, and none are held out",
            fix="--eval-fraction 0.05",
        )
    _check_streaming(options, recipe)
    if options.merge and recipe.method == "full":
        raise ConfigError(
            "--merge, and the plan's method is full",
            because="full fine-tuning writes full weights anyway; there is no adapter to merge",
            fix="leave --merge out",
        )


def _check_streaming(options: argparse.Namespace, recipe: Recipe) -> None:
    if options.streaming and options.max_steps is None:
        raise ConfigError(
            "--streaming without --max-steps",
            because="how many examples a stream has is not known before its end",
            fix="--max-steps 1000",
        )
    if options.streaming and recipe.packing:
        raise ConfigError(
            "--streaming, and the plan packs examples",
            because="packing sorts the examples by length, all of them",
            fix="a plan with --no-packing, or leave --streaming out",
        )


def prepare(options: argparse.Namespace) -> Session:
    """Everything that is decided before a rank exists, written to `run.json` in the output folder."""
    session = make_session(options)
    check_software(session.plan.recipe, session.plan.choice, session.plan.cluster.gpu.kind)
    check_reporter(session.report_to)
    check_agreement(session.plan.recipe, session.plan.choice, session.plan.deepspeed)
    if not options.force:
        check_weights(session.plan)
    check_adapter(session.plan.recipe, weight_shapes(Path(session.plan.model_path)))
    preflight.check_data(
        str(session.plan.recipe.dataset),
        skip_bad=session.bad_rows == "skip",
        prompt_key=session.prompt_key,
        response_key=session.response_key,
    )
    plan, notes = preflight.choose_rung(session.plan, fallback=options.fallback, force=options.force)
    session = replace(session, plan=plan)
    session, more = with_resume(session, options.resume)
    output_dir = Path(session.output_dir)
    preflight.check_writable(output_dir)
    if not options.force:
        check_disk(plan, output_dir, merge=session.merge)
        if session.merge:
            preflight.check_merge(plan)
    files.save(session, output_dir / SESSION_FILE)
    (output_dir / REPORT_FILE).unlink(missing_ok=True)  # of the part before: from now on only this one counts
    for note in notes + more:
        print(f"zplan: {note}", file=sys.stderr)
    return session


def train_here(options: argparse.Namespace) -> int:
    """Start the ranks of this machine."""
    session = prepare(options)
    cluster = session.plan.cluster
    if cluster.nodes > 1:
        ranks = f"--nnodes {cluster.nodes} --nproc-per-node {cluster.gpus_per_node}"
        raise ConfigError(
            f"the plan is for {cluster.nodes} nodes",
            because="one process cannot start ranks on other machines",
            fix=f"on every node: torchrun {ranks} --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m sft.train --plan "
            f"{options.plan}",
        )
    preflight.check_devices(session.plan, DriverNvml(), visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    for note in preflight.check_hub(str(session.plan.recipe.dataset)):
        print(f"zplan: {note}", file=sys.stderr)
    output_dir = Path(session.output_dir)
    ended = launch(
        ["--session", str(output_dir / SESSION_FILE)],
        num_ranks=session.plan.choice.batch.world_size,
        kind=cluster.gpu.kind,
        log_dir=output_dir,
    )
    if ended.reason:
        save_end(session, ended.reason, killed=ended.killed)
    return ended.status


def train_as_rank(options: argparse.Namespace, launcher: str) -> int:
    """Be one of the ranks; whoever started this process."""
    if launcher == "srun":
        adopt_slurm()
    if options.session is not None:
        _follow_parent()
        session = files.load(Session, options.session)
    else:
        signal.signal(signal.SIGTERM, _end_now)
        session = prepare(options) if current_rank().is_first else make_session(options)
    set_environment(session.plan.cluster.gpu.kind)
    from sft.training import train_rank  # torch and deepspeed: only after the environment is set

    return train_rank(session)


def _follow_parent() -> None:
    die_with_parent()
    if os.getppid() != int(os.environ.get(PARENT_VARIABLE, os.getppid())):
        sys.exit(int(ExitCode.BUG))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_now)


def _end_now(number: int, frame: object) -> None:
    """Nothing has been trained yet: nothing to save."""
    sys.exit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 malformed, 3 does not fit, 4 broken machine, 130 Ctrl-C, 143 SIGTERM."""
    options = parser().parse_args(arguments)
    launcher = launched_by()
    try:
        return train_here(options) if launcher is None else train_as_rank(options, launcher)
    except ZplanError as error:
        print(f"zplan: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
