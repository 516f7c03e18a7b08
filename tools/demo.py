"""`make demo`: a real model is planned, tuned and trained before your eyes, step by step.

Every step is a command that you could have typed; it is printed before it runs. Killed at any point, it can be
repeated: the download is cached and the study resumes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from zplan.probe import probe_hardware

BIN = Path(sys.executable).parent
MODEL, DATASET = ".cache/demo/SmolLM2-135M-Instruct", ".cache/demo/construction-faq.jsonl"
QUESTION = "What is a bygglov (building permit)?"
ON_GPU = probe_hardware().gpu.kind == "cuda"
RECIPE = (
    ["--max-length", "160", "--train-batch-size", "16"] if ON_GPU else ["--max-length", "96", "--train-batch-size", "4"]
)
TRIALS, STEPS = ("12", "200") if ON_GPU else ("4", "20")


def step(title: str, *command: str) -> None:
    """Print a command, run it, say how long it took; a failure ends the demo with the command's own code."""
    print(f"\n\033[1m== {title}\033[0m\n$ {' '.join(command)}", flush=True)
    started = time.monotonic()
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, check=False)
    print(f"-- {time.monotonic() - started:.0f} s", flush=True)
    if done.returncode != 0:
        print(f"demo: this step ended with exit code {done.returncode}; mend it and repeat: make demo", file=sys.stderr)
        sys.exit(done.returncode)


def main() -> None:
    """All steps."""
    started = time.monotonic()
    step("a real model and real data", "zplan", "demo")
    step("what this machine has", "zplan", "inspect")
    step("what would fit, before anything runs", "zplan", "estimate", "--model", MODEL, *RECIPE)
    step(
        "the fastest configuration, by real trials", "zplan", "tune", "--model", MODEL, "--dataset", DATASET, *RECIPE,
        "--learning-rate", "1e-4", "--trials", TRIALS, "--timed-steps", "2", "--study", "profiles/demo.journal",
    )  # fmt: skip
    step(
        "train with it", "python", "-m", "sft.train", "--plan", "profiles/best.json", "--max-steps", STEPS,
        "--eval-fraction", "0.03", "--sample-prompt", QUESTION, "--output-dir", "runs/demo", "--save-steps", STEPS,
    )  # fmt: skip
    print(f"\ndone in {time.monotonic() - started:.0f} s: the model is in runs/demo, the plan in profiles/best.json")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ndemo: interrupted; repeat it to go on: make demo", file=sys.stderr)
        sys.exit(130)
