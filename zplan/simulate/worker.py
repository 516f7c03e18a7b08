"""`python -m zplan.simulate.worker`: one JSON request per line on stdin, one JSON answer per line on stdout.

The libraries are imported once; every request runs in a fork of this process, so that no run leaves anything behind
for the next but what operations return for arguments of known layouts. It ends when stdin does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import IO, Any

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
"""No real GPU, no network, one core; set before torch is imported."""


LIBRARIES = (
    "zplan.simulate.run",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "cpuinfo",
    "peft.utils.transformers_weight_conversion",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.gemma3.modeling_gemma3",
)
"""What runs import late, and the most asked-for families."""


def main() -> None:
    """Serve until stdin ends."""
    os.environ.update(ENVIRONMENT)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    import_libraries()
    answers.write(json.dumps({"ready": os.getpid()}) + "\n")
    answers.flush()
    for line in sys.stdin:
        if line.strip():
            _answer_in_child(line, answers)


def import_libraries() -> None:
    """Everything that a run imports, so that no fork imports it again."""
    gc.disable()  # a tenth of the time of the imports, which leave next to no garbage
    import torch

    with _no_compiler():
        for name in LIBRARIES:
            importlib.import_module(name)
    from zplan.simulate.device import register_device

    torch.set_num_threads(1)
    register_device()
    gc.enable()
    gc.set_threshold(10_000)  # of 700: a tenth of a run's time went into looking for garbage that is not there
    gc.collect()
    gc.freeze()  # forks neither scan nor copy what the imports left


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """`@torch.compile` and `@torch.compiler.disable` leave a function as it is.

    DeepSpeed's Muon and a few of transformers' modules are decorated so. The decorators load the compiler, a third of
    the time of all imports, and nothing can be compiled on fake tensors.
    """
    import torch

    def same(function: Any = None, *args: Any, **kwargs: Any) -> Any:
        return function if callable(function) else same

    before = torch.compile, torch.compiler.disable
    _set_decorators(same, same)
    try:
        yield
    finally:
        _set_decorators(*before)


def _set_decorators(compile_: Any, disable: Any) -> None:
    import torch

    vars(torch)["compile"] = compile_
    vars(torch.compiler)["disable"] = disable


def _answer_in_child(line: str, answers: IO[str]) -> None:
    """Fork, run, and say how it ended if the child cannot; what operations return need not be learned again."""
    from zplan.simulate.learned import LEARNED

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _refuse_network()
            LEARNED.start()
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
            answers.flush()
            with open(write, "wb") as pipe:
                pipe.write(LEARNED.news())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with open(read, "rb") as pipe:
        news = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        LEARNED.absorb(news)
    else:
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        answers.write(json.dumps({"error": {"what": f"the simulation ended with {how}", "cause": "broken"}}) + "\n")
        answers.flush()


def answer(data: dict[str, Any]) -> dict[str, Any]:
    """One request -> `{"report": ...}` or `{"error": ...}`."""
    from zplan import files
    from zplan.errors import ZplanError
    from zplan.simulate.report import SimulationError
    from zplan.simulate.request import SimulationRequest
    from zplan.simulate.run import simulate_run

    try:
        request = files.from_data(SimulationRequest, data, name="request")
        return {"report": files.to_data(simulate_run(request))}
    except SimulationError as error:
        traceback.print_exc()
        return {
            "error": {
                "what": error.what, "module": error.module, "operation": error.operation, "cause": error.cause,
                "fix": error.fix,
            }
        }  # fmt: skip
    except ZplanError as error:
        return {"error": {"what": "; ".join((error.what, *error.problems)), "cause": "refused", "fix": error.fix}}


def _refuse_network() -> None:
    """A dry run has nothing to fetch."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("the simulation opens no network")

    socket.socket.connect = refuse  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
