"""The command line: parse, call one function, print. The only file with imports inside functions: each command pays
only for what it uses, and `zplan estimate` starts as fast as Python does."""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

gc.set_threshold(200_000)
"""Objects between collections, from here on. Python's own 700 looks more than a hundred times at what is imported and
at what an estimate keeps until it ends, a tenth of its time, and frees nothing."""

import click  # noqa: E402
from rich.console import Console  # noqa: E402

from zplan.errors import ConfigError, ExitCode, MachineError, ZplanError  # noqa: E402
from zplan.options import Flags, SectionedCommand, output_flags, shared_flags  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import RenderableType

    from zplan.hardware import Cluster
    from zplan.job import Job
    from zplan.model_shape import ModelShape

# Names and paths are printed as they are: `:cat:` is no emoji and `[x]` no style (and rich loads neither's tables).
_errors = Console(stderr=True, highlight=False, emoji=False, markup=False)
_screen = Console(highlight=False, emoji=False, markup=False)
BEST_PLAN = "profiles/best.json"
STUDY = "profiles/study.journal"


@click.group(no_args_is_help=True, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100})
def app() -> None:
    """Plan, prove and tune the memory of a DeepSpeed fine-tuning run before it starts."""


def _probe_shape(path: Path, name: str) -> ModelShape:
    """Read a config.json that no catalogue or cache knows; the one slow import."""
    _errors.print(f"reading the shape of {name} with transformers (once; cached afterwards)", style="dim")
    from zplan.model_probe import probe_config

    return probe_config(path, name=Path(name).name if Path(name).exists() else name)


def _probe_cluster() -> Cluster:
    from zplan.probe import probe_hardware

    return probe_hardware()


def _job(flags: Flags) -> Job:
    from zplan.job import make_job

    return make_job(flags, probe_shape=_probe_shape, probe_cluster=_probe_cluster)


def _show(renderable: RenderableType | str) -> None:
    with _stdout():
        _screen.print(renderable)


@contextmanager
def _stdout() -> Iterator[None]:
    """What is written goes out here, so that a full disk behind `> FILE` is the machine's error and not our bug.

    Raises:
        MachineError: it cannot be written; a reader that has gone (`| head`) is `main`'s affair.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _close_stdout()
        raise MachineError(
            f"the answer cannot be written to stdout: {error.strerror or error}",
            because="that is where the shell sends it",
            fix="free space, or send it elsewhere",
        ) from error


def _close_stdout() -> None:
    """Else the interpreter tries once more at its end, and complains."""
    with suppress(OSError):
        sys.stdout.close()


def _finish(flags: Flags, data: Callable[[], Mapping[str, Any]], *, text: RenderableType, code: ExitCode) -> NoReturn:
    """Print once (table or JSON), write --out, leave with the verdict's code."""
    if flags.json:
        import json

        with _stdout():
            sys.stdout.write(json.dumps(data(), indent=2, allow_nan=False) + "\n")
    else:
        _show(text)
    if flags.out:
        from zplan.files import save_json

        save_json(data(), flags.out)
    raise click.exceptions.Exit(int(code))


@app.command()
@output_flags
def inspect(*, flags: Flags) -> None:
    """This machine: GPUs, host limits, software; what is wrong and how to mend it."""
    from zplan.doctor import diagnose, inspect_data
    from zplan.report.terminal import render_machine

    cluster = _probe_cluster()
    findings = diagnose(cluster)
    broken = any(finding.severity == "broken" for finding in findings)
    _finish(
        flags,
        lambda: inspect_data(cluster, findings),
        text=render_machine(cluster, findings, quiet=flags.quiet),
        code=ExitCode.BROKEN_MACHINE if broken else ExitCode.OK,
    )


@app.command(cls=SectionedCommand)
@click.option("--explain", help="Explain one option, with its effect in bytes.")
@shared_flags
def estimate(*, flags: Flags, explain: str | None) -> None:
    """GPU and host memory and step time from the model's shape: a ranked table, or one configuration in detail."""
    from zplan.commands.estimate import estimate as run

    answer = run(_job(flags), explain=explain, verbose=flags.verbose, quiet=flags.quiet)
    _finish(flags, answer.data, text=answer.text, code=answer.code)


@app.command(cls=SectionedCommand)
@click.option("--steps", default=2, help="Optimizer steps to run.", show_default=True)
@click.option("--trace", help="Write a Chrome/Perfetto trace to this file.")
@shared_flags
def simulate(*, flags: Flags, steps: int, trace: str | None) -> None:
    """Run the installed DeepSpeed engine itself on simulated GPUs: exact bytes, no GPU needed."""
    from zplan.commands.simulate import simulate as run

    answer = run(_job(flags), steps=steps, trace=trace, quiet=flags.quiet)
    _finish(flags, answer.data, text=answer.text, code=answer.code)


@app.command(cls=SectionedCommand)
@click.option("--trials", default=20, help="Trials to have in the study when done.", show_default=True)
@click.option("--backend", default="real", help="real, simulated or formula.", show_default=True)
@click.option("--study", default=STUDY, help="Journal file or database URL; running again resumes.", show_default=True)
@click.option("--objective", default="speed", help="speed, or pareto: speed, GPU and host memory.", show_default=True)
@click.option("--timeout", type=float, help="Seconds for the whole search.")
@click.option("--deadline", default=600.0, help="Seconds for one trial.", show_default=True)
@click.option("--timed-steps", default=3, help="Timed optimizer steps of each trial.", show_default=True)
@click.option("--seed", default=0, help="Seed of the search.", show_default=True)
@shared_flags
def tune(
    *,
    flags: Flags,
    trials: int,
    backend: str,
    study: str,
    objective: str,
    timeout: float | None,
    deadline: float,
    timed_steps: int,
    seed: int,
) -> None:
    """Search for the fastest configuration that fits, with short real trials; writes profiles/best.json."""
    from zplan.commands.tune import tune as run

    answer = run(
        _job(flags), trials=trials, backend=backend, study=study, plan_path=flags.out or BEST_PLAN,
        timeout_seconds=timeout, timed_steps=timed_steps, deadline_seconds=deadline, seed=seed, console=_errors,
        quiet=flags.quiet, objective=objective,
    )  # fmt: skip
    _finish(Flags(json=flags.json), answer.data, text=answer.text, code=answer.code)


@app.command()
@click.argument("trial", type=int)
@click.option("--study", default=STUDY, help="Journal file or database URL.", show_default=True)
@click.option("--out", default=BEST_PLAN, help="Plan to write.", show_default=True)
def pick(trial: int, *, study: str, out: str) -> None:
    """Write TRIAL of a study as the plan to train with, in place of the fastest."""
    from zplan.commands.tune import pick as run

    _show(run(trial, study=study, plan_path=out))


@app.command()
@click.argument("study", default=STUDY)
@click.option("--out", default="reports/study.html", help="HTML file to write.", show_default=True)
def report(study: str, *, out: str) -> None:
    """One self-contained HTML file about STUDY: a journal file, a database URL, or what `simulate --out` wrote."""
    if study.endswith(".json"):
        from zplan.report.timeline import write_timeline

        path = write_timeline(study, Path(out))
    else:
        from zplan.report.html import write_report

        path = write_report(study, Path(out))
    _show(f"wrote {path}")


@app.command()
@click.argument("plan")
@click.option(
    "--to", required=True, help="deepspeed, accelerate, torchrun, slurm, trl, axolotl, llama-factory or ms-swift."
)
@click.option("--out", default="profiles/export", help="Folder to write into.", show_default=True)
def export(plan: str, *, to: str, out: str) -> None:
    """Write PLAN, a plan of profiles/, as the files of another tool."""
    from zplan.export import KEYS_FROM, export_plan
    from zplan.files import load, save_text
    from zplan.plan import Plan

    for name, text in export_plan(load(Plan, plan), to).items():
        save_text(text, Path(out) / name)
        _show(f"wrote {Path(out) / name}")
    if to in KEYS_FROM:
        _show(f"note: keys are those of {KEYS_FROM[to]}; that tool's own parser has not read these files")


@app.command()
def demo() -> None:
    """Fetch the demo model and data, ready for the other commands."""
    from zplan.demo import prepare_demo

    assets = prepare_demo(observer=_errors.print)
    _show(f"model   {assets.model_dir}\ndataset {assets.dataset_path}")


def _fail(error: ZplanError) -> int:
    _errors.print(f"zplan: {error}", markup=False, soft_wrap=True)
    return int(error.exit_code)


def _as_config_error(error: click.ClickException) -> ConfigError:
    context = getattr(error, "ctx", None)
    return ConfigError(error.format_message(), fix=f"{context.command_path if context else 'zplan'} --help")


def main() -> NoReturn:
    """Turn errors into text and exit codes, once, here."""
    try:
        result = app(standalone_mode=False)
        code = int(result) if isinstance(result, int) else 0
    except ZplanError as error:
        code = _fail(error)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        code = _fail(_as_config_error(error))
    except (KeyboardInterrupt, click.Abort):
        _errors.print("zplan: interrupted")
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except Exception:
        import traceback

        traceback.print_exc()
        _errors.print("zplan: this is our bug; please report it with the lines above")
        code = ExitCode.BUG
    sys.exit(code)


if __name__ == "__main__":
    main()
