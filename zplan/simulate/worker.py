"""`python -m zplan.simulate.worker`: one JSON request per line on stdin, one JSON answer per line on stdout.

The libraries are imported once, and the model that was asked for last is kept built, in a fork of this process
(template.py); every request runs in a fork of that one, so that no run leaves anything behind for the next but what
operations return for arguments of known layouts, and what the model does in a micro-step. It ends when stdin does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

from zplan import files
from zplan.errors import ZplanError
from zplan.processes import die_with_parent
from zplan.simulate.report import SimulationError, SimulationReport
from zplan.simulate.request import SimulationRequest
from zplan.simulate.template import Template, loading_key

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
    worker = Worker(answers)
    for line in sys.stdin:
        if line.strip():
            worker.answer(line)
    worker.close()


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


class Worker:
    """Answers one line after the other, each in a fork; keeps the last model."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self._kept: tuple[str, Template] | None = None

    def answer(self, line: str) -> None:
        try:
            key = loading_key(_request(json.loads(line)))
        except ZplanError:
            key = None  # the fork says so
        if key is None or not self._from_template(key, line):
            in_fork(partial(answer, json.loads(line)), self._answers)

    def _from_template(self, key: str, line: str) -> bool:
        """False if the model cannot be built; a run of its own says why."""
        from zplan.simulate.learned import LEARNED

        if self._kept is None or self._kept[0] != key:
            self.close()
            self._kept = (key, Template(partial(_built, line, self._answers)))
        news = self._kept[1].ask(line)
        if news is None:
            self.close()
            return False
        for learned in news:
            LEARNED.absorb(learned)
        return True

    def close(self) -> None:
        """Let go of the model."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept[1].close()


def _built(line: str, answers: IO[str]) -> Callable[[str], list[bytes]]:
    """In the template's process: the model of a question, and what answers this one and others about it."""
    from zplan.simulate.learned import LEARNED
    from zplan.simulate.run import DryRun

    _refuse_network()
    LEARNED.start()
    run = DryRun(_request(json.loads(line))).__enter__()
    run.load()
    of_building = [LEARNED.news()]

    def answer(line: str) -> list[bytes]:
        news = [*of_building, *in_fork(partial(_responded, lambda: run.finish(_request(json.loads(line)))), answers)]
        of_building.clear()
        return news

    return answer


def in_fork(respond: Callable[[], dict[str, Any]], answers: IO[str]) -> list[bytes]:
    """Fork, run, and say how it ended if the child cannot; what operations return need not be learned again."""
    from zplan.simulate.learned import LEARNED

    read, write = os.pipe()
    printed = _Printed()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_with_parent()
            _refuse_network()
            LEARNED.start()
            answers.write(json.dumps(respond()) + "\n")
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
        return [news]
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    what = f"the simulation ended with {how}{printed.reason()}"
    answers.write(json.dumps({"error": {"what": what, "cause": "broken"}}) + "\n")
    answers.flush()
    return []


class _Printed:
    """What goes to stderr from now on, where that is a file, as the client has it."""

    def __init__(self) -> None:
        self._is_file = stat.S_ISREG(os.fstat(2).st_mode)
        self._start = os.lseek(2, 0, os.SEEK_END) if self._is_file else 0

    def reason(self) -> str:
        """The last line, or the one in which C++ says what was thrown, for the end of a sentence."""
        if not self._is_file:
            return ""
        text = os.pread(2, 1 << 20, self._start).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        thrown = [line.removeprefix("what():").strip() for line in lines if line.startswith("what():")]
        return f": {(thrown or lines)[-1]}" if lines else ""


def answer(data: dict[str, Any]) -> dict[str, Any]:
    """One request -> `{"report": ...}` or `{"error": ...}`."""
    from zplan.simulate.run import DryRun

    def report() -> SimulationReport:
        with DryRun(_request(data)) as run:
            _UNTIL_THE_END.append(run)
            run.load()
            return run.finish(run.request)

    return _responded(report)


_UNTIL_THE_END: list[Any] = []
"""A run that is not taken apart: the process ends, and that takes no time."""


def _request(data: dict[str, Any]) -> SimulationRequest:
    return files.from_data(SimulationRequest, data, name="request")


def _responded(report: Callable[[], SimulationReport]) -> dict[str, Any]:
    try:
        return {"report": files.to_data(report())}
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
