"""`python -m sft.trial spec.json --out DIR`: one rank of a trial, the trainer for a few timed steps -> result.json.

Start one process per rank with torch's env:// variables (RANK, WORLD_SIZE, MASTER_ADDR, ...). Rank 0 writes
`result.json` after all ranks have reported; a rank that fails writes `error_RANK.json` and exits with status 1.

The stack is imported inside functions: DeepSpeed picks its accelerator when it is imported, so the environment of the
spec's device must be set before.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from sft.ranks import Rank, current_rank, die_with_parent, ensure_rank, set_environment
from zplan import files
from zplan.errors import ExitCode, ZplanError
from zplan.trial import RESULT_FILE, SPEC_FILE, TrialSpec, error_file, progress_file

if TYPE_CHECKING:
    from zplan.hardware import DeviceKind

_TRACEBACK_CHARS = 8000
"""The end of a traceback names the cause; the rest is in the rank's log."""


class Progress:
    """Which phase a rank is in, and a file whose mtime is its heartbeat."""

    def __init__(self, out_dir: Path, rank: int) -> None:
        self.path = out_dir / progress_file(rank)
        self.phase = "spec"

    def enter(self, phase: str) -> None:
        """Note the phase that a failure would be placed in."""
        self.phase = phase
        self.beat()

    def beat(self) -> None:
        """Show that this rank is alive."""
        self.path.write_text(f"{self.phase} {time.time():.3f}\n")


def preload(kind: DeviceKind = "cpu") -> None:
    """Import everything that a rank needs, without a torch operator and without a thread, so that forks are cheap.

    deepspeed.initialize imports the Muon module at stage >= 1, and that one decorates with torch.compile, which loads
    torch._inductor (2 s of CPU time): here it is loaded by the first trial with Muon (`prepare_for_forks`).
    What is imported stays: no collection walks it, neither those that imports start (1 s) nor the one with which a
    training begins (0.3 s; accelerate 1.15, utils/memory.py, release_memory).
    """
    gc.disable()
    set_environment(kind)
    import deepspeed
    import torch

    with patch.object(torch, "compile", compiled_when_called):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    from deepspeed.module_inject import auto_ep_layer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.mistral import modeling_mistral  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    from sft import measure  # noqa: F401

    gc.freeze()
    gc.enable()


def compiled_when_called(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """What torch.compile makes of a function, made when it is first called."""

    @lru_cache(maxsize=1)
    def compiled() -> Callable[..., Any]:
        import torch

        return torch.compile(function, **options)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


def run_rank(spec: TrialSpec, out_dir: Path) -> int:
    """Run this process's part of a trial and return the exit status. Never raises: a failure is a file and a status."""
    place = current_rank()
    progress = Progress(out_dir, place.rank)
    try:
        set_environment(spec.cluster.gpu.kind)
        progress.enter("spec")
        from sft.measure import measure_trial

        result = measure_trial(spec, out_dir, place, progress)
        if result is not None:
            files.save(result, out_dir / RESULT_FILE)
    except BaseException as error:  # the process boundary: whatever it is, it becomes an answer
        _write_error(error, out_dir, place, progress)
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            return int(ExitCode.INTERRUPTED)
        return int(error.exit_code) if isinstance(error, ZplanError) else int(ExitCode.BUG)
    return int(ExitCode.OK)


def _write_error(error: BaseException, out_dir: Path, place: Rank, progress: Progress) -> None:
    kind = type(error)
    files.save_json(
        {
            "type": kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}",
            "message": str(error),
            "phase": progress.phase,
            "traceback": "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:],
        },
        out_dir / error_file(place.rank),
    )


def main(arguments: list[str] | None = None) -> int:
    """One rank in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m sft.trial", description="One rank of a trial.")
    parser.add_argument("spec", type=Path, help=f"the question ({SPEC_FILE})")
    parser.add_argument("--out", type=Path, required=True, help="folder for result, errors and heartbeat")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    die_with_parent()
    ensure_rank()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        spec = files.load(TrialSpec, options.spec)
    except ZplanError as error:
        _write_error(error, options.out, current_rank(), Progress(options.out, current_rank().rank))
        print(f"sft.trial: {error}", file=sys.stderr)
        return int(error.exit_code)
    return run_rank(spec, options.out)


if __name__ == "__main__":
    sys.exit(main())
