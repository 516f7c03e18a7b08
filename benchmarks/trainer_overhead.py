"""sft.train against a minimal hand-written TRL + DeepSpeed script: tokens/s, start-up, losses, kill and resume.

    python -m benchmarks.trainer_overhead                          # about 12 minutes on two idle cores
    python -m benchmarks.trainer_overhead --cases demo:2:full tiny:3:lora --repetitions 3

The script is what one writes from TRL's documentation. Both sides train the same model on the same data with the same
DeepSpeed configuration on CPU ranks, fp32, and run alternately (A B B A ...), timed by one stopwatch from outside: the
moment at which each prints the line of a step, and the CPU seconds that its processes had used by then. Every step has
the same examples on both sides, so a step's time is the median of its repetitions, and a speed is the sum of those.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tests import assets
from tests.sft.warm import make_plan, make_recipe
from zplan import files
from zplan.demo import prepare_demo
from zplan.plan import Plan

REPORT = Path(__file__).parents[1] / "reports" / "trainer_overhead.md"
SCRIPT = r"""
import json, os, sys
import deepspeed, deepspeed.ops, torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model_path, data, out, method, steps, config = sys.argv[1:7]
deepspeed.ops.__dict__["__compatible_ops__"] = {}
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
ds = json.load(open(config))
args = SFTConfig(output_dir=out, use_cpu=True, bf16=False, deepspeed=ds, max_length=64, max_steps=int(steps),
    per_device_train_batch_size=ds["train_micro_batch_size_per_gpu"], learning_rate=1e-3, seed=42, logging_steps=1,
    gradient_accumulation_steps=ds["gradient_accumulation_steps"], activation_checkpointing=True,
    activation_checkpointing_kwargs={"use_reentrant": method == "lora" and ds["zero_optimization"]["stage"] == 3},
    ddp_backend="gloo", dataloader_pin_memory=False, disable_tqdm=True, save_strategy="no", report_to="none",
    assistant_only_loss=True)
tokenizer = AutoTokenizer.from_pretrained(model_path)
rows = load_dataset("json", data_files=data, split="train", cache_dir=out)
tokenizer.chat_template = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
peft = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if method == "lora" else None
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft)
trainer.train()
trainer.save_state()
torch.distributed.destroy_process_group()
"""
CASES = [f"tiny:{stage}:{method}" for stage in range(4) for method in ("full", "lora")] + ["demo:2:full", "demo:3:lora"]
KILLED = ["tiny:2:full", "tiny:3:lora"]
_STEP_LINE = re.compile(r"step \d+/\d+ +loss|'num_tokens'")
"""Ours, and the dictionary that transformers' PrinterCallback prints of each step with TRL's metrics."""
_WARM_UP = 2
"""Steps whose end starts the clock: the first allocate and fill caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """The line of one step: seconds since the start, on the clock and on all CPUs."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One run of one side."""

    marks: tuple[Mark, ...]
    losses: tuple[float, ...]
    num_tokens: float | None = None
    """Of the timed steps, as TRL counts them; the script's log has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    model: Path
    data: Path
    method: str
    stage: int
    steps: int
    ranks: int
    train_batch_size: int

    @property
    def plan(self) -> Plan:
        recipe = make_recipe(self.model.resolve(), self.data.resolve(), method=self.method)
        return make_plan(replace(recipe, train_batch_size=self.train_batch_size), stage=self.stage, ranks=self.ranks)


def watch(command: Sequence[str], *, kill_at: int | None = None) -> tuple[Mark, ...]:
    """Run to the end, or kill all of it when it has printed so many steps; a mark for each step."""
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables["THP_MEM_ALLOC_ENABLE"] = "1"  # as sft.train sets it: the other side has the same pages
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**variables, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    marks, said = [], []
    for line in process.stdout:
        said.append(line)
        if _STEP_LINE.search(line):
            marks.append(Mark(wall=time.perf_counter() - started, cpu=_cpu_seconds(process.pid)))
            if len(marks) == kill_at:
                _kill(process.pid)
                break
    process.stdout.close()
    if process.wait() != 0 and kill_at is None:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(said[-40:])}")
    return tuple(marks)


def _family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def _cpu_seconds(pid: int) -> float:
    times = [member.cpu_times() for member in _family(pid)]
    return sum(item.user + item.system + item.children_user + item.children_system for item in times)


def _kill(pid: int) -> None:
    for member in _family(pid):
        os.kill(member.pid, signal.SIGKILL)


def ours(case: Case, folder: Path, out: Path, *, save_steps: int = 100_000) -> list[str]:
    """sft.train as a user types it; without checkpoints before the end, because the script has none."""
    files.save(case.plan, folder / "plan.json")
    return [
        sys.executable, "-m", "sft.train", "--plan", str(folder / "plan.json"), "--output-dir", str(out),
        "--max-steps", str(case.steps), "--save-steps", str(save_steps), "--data-order", "shuffled",
    ]  # fmt: skip


def script(case: Case, folder: Path, out: Path) -> list[str]:
    """The hand-written script under torchrun, as the documentation starts it."""
    files.save_json(dict(case.plan.deepspeed), folder / "ds.json")
    (folder / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={case.ranks}", "--rdzv-backend=c10d"]
    arguments = [case.model, case.data, out, case.method, case.steps, folder / "ds.json"]
    return [*launcher, "--rdzv-endpoint=localhost:0", str(folder / "script.py"), *map(str, arguments)]


def run_ours(case: Case, folder: Path, number: int) -> Timed:
    """One run of sft.train."""
    out = folder / f"ours-{number}"
    marks = watch(ours(case, folder, out))
    return Timed(marks=marks, losses=_losses(files.load_json(out / "training_report.json")["loss_history"]))


def run_script(case: Case, folder: Path, number: int) -> Timed:
    """One run of the script."""
    out = folder / f"script-{number}"
    out.mkdir()
    marks = watch(script(case, folder, out))
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    counted = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
    return Timed(marks=marks, losses=_losses(history), num_tokens=counted[-1] - counted[_WARM_UP - 1])


def run_killed(case: Case, folder: Path) -> tuple[float, ...]:
    """Losses of a run of ours that saves every second step, is killed in the middle, and is started again."""
    out = folder / "killed"
    command = ours(case, folder, out, save_steps=2)
    watch(command, kill_at=case.steps // 2 + 1)
    watch(command)
    report = files.load_json(out / "training_report.json")
    assert report["resumed_from"] is not None
    return _losses(report["loss_history"])


def _losses(history: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    return tuple(float(entry["loss"]) for entry in history if "loss" in entry)


def seconds_of_steps(runs: Sequence[Timed], clock: str) -> float:
    """All timed steps: each the median of its repetitions."""
    total = 0.0
    for index in range(_WARM_UP, len(runs[0].marks)):
        total += statistics.median(
            getattr(run.marks[index], clock) - getattr(run.marks[index - 1], clock) for run in runs
        )
    return total


def compare(case: Case, repetitions: int, folder: Path, *, killed: bool) -> dict[str, float | None]:
    """Both sides, alternately; the figures of one row."""
    sides: dict[str, list[Timed]] = {"ours": [], "script": []}
    for number in range(repetitions):
        order = [("ours", run_ours), ("script", run_script)]
        for name, run in order if number % 2 == 0 else order[::-1]:
            sides[name].append(run(case, folder, number))
    mine, theirs = sides["ours"], sides["script"]
    tokens = theirs[0].num_tokens
    assert tokens is not None
    pairs = zip(mine[0].losses, theirs[0].losses, strict=True)
    row: dict[str, float | None] = {
        "loss_difference": max(abs(a - b) for a, b in pairs),
        "resumed_difference": None,
        "start_wall": statistics.median(run.marks[0].wall for run in mine)
        - statistics.median(run.marks[0].wall for run in theirs),
        "start_cpu": statistics.median(run.marks[0].cpu for run in mine)
        - statistics.median(run.marks[0].cpu for run in theirs),
    }
    for clock in ("wall", "cpu"):
        row[f"{clock}_ours"] = tokens / seconds_of_steps(mine, clock)
        row[f"{clock}_script"] = tokens / seconds_of_steps(theirs, clock)
    if killed:
        resumed = run_killed(case, folder)
        row["resumed_difference"] = max(abs(a - b) for a, b in zip(resumed, mine[0].losses, strict=True))
    return row


def row_of(case: Case, row: dict[str, float | None]) -> str:
    """One line of the table."""

    def speed(clock: str) -> list[str]:
        mine, theirs = row[f"{clock}_ours"], row[f"{clock}_script"]
        assert mine is not None
        assert theirs is not None
        return [f"{mine:.1f}", f"{theirs:.1f}", f"{mine / theirs:.1%}"]

    resumed = row["resumed_difference"]
    cells = [case.name, f"{case.stage}", case.method, *speed("wall"), *speed("cpu")]
    cells += [f"{row['start_wall']:+.1f}", f"{row['start_cpu']:+.1f}", f"{row['loss_difference']:.1e}"]
    cells.append("-" if resumed is None else f"{resumed:.1e}")
    return "| " + " | ".join(cells) + " |\n"


HEAD = """# sft.train against a minimal hand-written TRL + DeepSpeed script

`{command}`

fp32 on {ranks} CPU rank(s), max_length 64, {repetitions} alternating repetitions, medians of each step; the first
{warm_up} of {steps} steps ({demo_steps} with `demo`) are not timed. Tokens per second of wall time say what a user sees
on an idle machine; tokens per CPU second say the same where others work too. The start is from typing the command to
the first step's line: ours holds the estimate of the plan on this machine and the checks of data and disk. "killed":
the largest difference between the losses of an unbroken run and those of one that was killed (SIGKILL, all processes)
and started again.

`tiny` is a Llama of 0.2 M parameters, whose step is nearly all overhead of the libraries: a harder test than the demo
model (`demo`, SmolLM2-135M-Instruct), whose step is arithmetic.

| model | stage | method | tokens/s: ours | script | ratio | tokens/CPU s: ours | script | ratio \
| start: wall s more | CPU s more | loss differs by | killed: loss differs by |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def prepare_case(words: str, options: argparse.Namespace, folder: Path) -> Case:
    """Model and data as both sides read them: `messages`, with a system turn, so that no template adds its own."""
    name, stage, method = words.split(":")
    if name == "demo":
        demo = prepare_demo(Path(__file__).parents[1] / ".cache" / "demo", observer=lambda said: None)
        model, rows = demo.model_dir, [json.loads(line) for line in demo.dataset_path.read_text().splitlines()]
        pairs = [(row["instruction"], row["output"]) for row in rows]
    else:
        model = assets.build_tiny_model(folder / "model")
        pairs = [(row["prompt"], row["response"]) for row in assets.tiny_rows(256)]
    turns = [
        {"messages": [{"role": r, "content": t} for r, t in (("system", "Short."), ("user", a), ("assistant", b))]}
        for a, b in pairs
    ]
    steps = options.demo_steps if name == "demo" else options.steps
    return Case(
        name=name,
        model=model,
        data=assets.write_jsonl(turns, folder / "train.jsonl"),
        method=method,
        stage=int(stage),
        steps=steps,
        ranks=options.ranks,
        train_batch_size=2 if name == "demo" else 8,
    )


def main() -> None:
    """Append one row per case to the report as it is done."""
    line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    line.add_argument("--cases", nargs="+", default=CASES, metavar="tiny|demo:STAGE:full|lora")
    line.add_argument("--killed", nargs="*", default=KILLED, metavar="CASE", help="also killed and started again")
    line.add_argument("--ranks", type=int, default=1)
    line.add_argument("--steps", type=int, default=42)
    line.add_argument("--demo-steps", type=int, default=6)
    line.add_argument("--repetitions", type=int, default=2)
    line.add_argument("--out", type=Path, default=REPORT)
    options = line.parse_args()
    command = " ".join(["python -m benchmarks.trainer_overhead", *sys.argv[1:]])
    text = HEAD.format(command=command, warm_up=_WARM_UP, **vars(options))
    options.out.write_text(text)
    for words in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            case = prepare_case(words, options, Path(folder))
            figures = compare(case, options.repetitions, Path(folder), killed=words in options.killed)
        with options.out.open("a") as report:
            report.write(row_of(case, figures))
        print(row_of(case, figures), end="", flush=True)


if __name__ == "__main__":
    main()
