"""sft.train against a minimal hand-written TRL + DeepSpeed script: tokens/s, start-up, and the same losses?

    python benchmarks/trainer_overhead.py --stages 0 2 3 --methods full lora --steps 5 45

Both run alternately on the same model, data and DeepSpeed configuration, on CPU ranks, fp32. The script is what one
writes from the documentation: `messages`, a template with {% generation %}, assistant_only_loss, SFTTrainer.train().

Each runs twice, for few and for many steps. CPU seconds per step are the difference, which other work on the machine
changes little; tokens/s are wall clock, which it does change: quote them from an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import assets
from tests.sft.warm import make_plan, make_recipe
from zplan import files

SCRIPT = """
import json, sys, time
from datetime import timedelta
import deepspeed, deepspeed.ops, torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

model_path, data, out, method, steps, config = sys.argv[1:7]
deepspeed.ops.__dict__["__compatible_ops__"] = {}
torch.set_num_threads(1)
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, timeout=timedelta(seconds=300))
ds = json.load(open(config))
args = SFTConfig(output_dir=out, use_cpu=True, bf16=False, deepspeed=ds, max_length=64, max_steps=int(steps),
    per_device_train_batch_size=ds["train_micro_batch_size_per_gpu"], learning_rate=1e-3, seed=42, logging_steps=1,
    gradient_accumulation_steps=ds["gradient_accumulation_steps"], activation_checkpointing=True,
    activation_checkpointing_kwargs={"use_reentrant": method == "lora" and ds["zero_optimization"]["stage"] == 3},
    ddp_backend="gloo", dataloader_pin_memory=False, disable_tqdm=True, save_strategy="no", report_to="none",
    assistant_only_loss=True)
tokenizer = AutoTokenizer.from_pretrained(model_path)
rows = load_dataset("json", data_files=data, split="train", cache_dir=out)
rows = rows.map(lambda row: {"messages": [{"role": "user", "content": row["prompt"]},
    {"role": "assistant", "content": row["response"]}]}, remove_columns=["prompt", "response"])
tokenizer.chat_template = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
peft = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if method == "lora" else None
ends = []
class Clock(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        ends.append((time.perf_counter(), trainer._total_train_tokens))
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft,
    callbacks=[Clock()])
trainer.train()
(t0, n0), (t1, n1) = ends[0], ends[-1]
history = [{"step": e["step"], "loss": e["loss"]} for e in trainer.state.log_history if "loss" in e]
if args.process_index == 0:
    json.dump({"tokens_per_second": (n1 - n0) / (t1 - t0), "loss_history": history}, open(out + "/report.json", "w"))
torch.distributed.destroy_process_group()
"""


def run_ours(plan_path: Path, out: Path, steps: int) -> dict[str, Any]:
    """sft.train as a user types it, without checkpoints before the end (the script has none)."""
    command = [sys.executable, "-m", "sft.train", "--plan", str(plan_path), "--output-dir", str(out)]
    return _timed(
        [*command, "--max-steps", str(steps), "--save-steps", "100000", "--data-order", "shuffled"],
        out / "training_report.json",
    )


def run_script(arguments: list[str], out: Path, ranks: int) -> dict[str, Any]:
    """The hand-written script under torchrun, as the documentation starts it."""
    out.mkdir()
    script = out / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    return _timed([*launcher, "--rdzv-endpoint=localhost:0", str(script), *arguments], out / "report.json")


def _timed(command: list[str], report: Path) -> dict[str, Any]:
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before, started = _cpu_seconds(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return {
        **json.loads(report.read_text()),
        "wall": time.perf_counter() - started,
        "cpu": _cpu_seconds() - before,
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(stage: int, method: str, ranks: int, steps: tuple[int, int], folder: Path) -> dict[str, float]:
    """CPU seconds per step and of the start, tokens/s, and the largest difference between the loss curves."""
    model, data = assets.build_tiny_model(folder / "model"), assets.build_tiny_dataset(folder / "data", 256)
    plan = make_plan(make_recipe(model, data, method=method), stage=stage, ranks=ranks)
    files.save(plan, folder / "plan.json")
    files.save_json(dict(plan.deepspeed), folder / "ds.json")
    ours, theirs = [], []
    for count in steps:
        out = folder / f"script-{count}"
        arguments = [str(model), str(data), str(out), method, str(count), str(folder / "ds.json")]
        theirs.append(run_script(arguments, out, ranks))
        ours.append(run_ours(folder / "plan.json", folder / f"ours-{count}", count))
    pairs = zip(ours[1]["loss_history"], theirs[1]["loss_history"], strict=True)
    more = steps[1] - steps[0]
    return {
        "cpu_ours": (ours[1]["cpu"] - ours[0]["cpu"]) / more,
        "cpu_script": (theirs[1]["cpu"] - theirs[0]["cpu"]) / more,
        "start_ours": ours[0]["cpu"],
        "start_script": theirs[0]["cpu"],
        "wall_ours": ours[0]["wall"],
        "wall_script": theirs[0]["wall"],
        "speed_ours": ours[1]["tokens_per_second"],
        "speed_script": theirs[1]["tokens_per_second"],
        "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
    }


def row_of(stage: int, method: str, row: dict[str, float]) -> str:
    """One line of the table."""
    cells = [
        f"{stage}", method,
        f"{row['cpu_ours']:.4f}", f"{row['cpu_script']:.4f}", f"{row['cpu_script'] / row['cpu_ours']:.1%}",
        f"{row['speed_ours']:.0f}", f"{row['speed_script']:.0f}", f"{row['speed_ours'] / row['speed_script']:.1%}",
        f"{row['start_ours'] - row['start_script']:+.1f}", f"{row['wall_ours'] - row['wall_script']:+.1f}",
        f"{row['loss_difference']:.1e}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |\n"


HEAD = """# sft.train against a minimal hand-written TRL + DeepSpeed script

`{command}`

The tiny Llama of the tests (not the demo model: every second per step would be arithmetic that both share), fp32, CPU
ranks: {ranks}; {steps} steps; the same data, DeepSpeed configuration and seed, `--data-order shuffled`. CPU seconds per
step are the difference between the long and the short run, all processes; tokens/s are wall clock of the long run on a
machine that others used at the same time. A start is the short run as a whole: in ours it holds the estimate of the
plan, the sharing of the session and the saved model, of which the script does nothing. Each figure is one run.

| stage | method | CPU s/step: ours | script | script / ours | tokens/s: ours | script | ours / script \
| start: CPU s more | wall s more | loss differs by |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Append one row per stage and method to the report as it is done."""
    line = argparse.ArgumentParser(description=__doc__)
    line.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    line.add_argument("--methods", nargs="+", default=["full", "lora"])
    line.add_argument("--ranks", type=int, default=1)
    line.add_argument("--steps", type=int, nargs=2, default=(5, 85))
    line.add_argument("--out", type=Path, default=Path("reports/trainer_overhead.md"))
    options = line.parse_args()
    command = " ".join(["python benchmarks/trainer_overhead.py", *sys.argv[1:]])
    steps = " and ".join(map(str, options.steps))
    options.out.write_text(HEAD.format(command=command, ranks=options.ranks, steps=steps))
    for stage in options.stages:
        for method in options.methods:
            with tempfile.TemporaryDirectory() as folder:
                row = compare(stage, method, options.ranks, tuple(options.steps), Path(folder))
            with options.out.open("a") as report:
                report.write(row_of(stage, method, row))
            print(row_of(stage, method, row), end="", flush=True)


if __name__ == "__main__":
    main()
