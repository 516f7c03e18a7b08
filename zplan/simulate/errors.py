"""An exception inside the run, as a SimulationError that names the module and the operation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from zplan.simulate.report import SimulationError
from zplan.simulate.tracker import Tracker


@contextlib.contextmanager
def explained(tracker: Tracker) -> Iterator[None]:
    """Turn whatever goes wrong inside into a SimulationError."""
    try:
        yield
    except SimulationError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        where = innermost_module(error.__traceback__)
        raise SimulationError(
            f"{where}: {error.func} depends on values, and a simulated tensor has none",
            module=where,
            operation=str(error.func),
        ) from error
    except (UnsupportedOperatorException, NotImplementedError) as error:
        where = innermost_module(error.__traceback__)
        raise SimulationError(
            f"{where}: {tracker.operation} has no fake kernel ({first_line(error)})",
            module=where,
            operation=str(tracker.operation),
        ) from error
    except Exception as error:
        where = innermost_module(error.__traceback__)
        at = f", at {tracker.operation}" if tracker.operation else ""
        raise SimulationError(
            f"{where}: {type(error).__name__}: {first_line(error)} (in {tracker.phase}{at})",
            module=where,
            operation=str(tracker.operation),
            cause="refused" if refuses(error, tracker.phase) else "unsupported",
        ) from error


def refuses(error: Exception, phase: str) -> bool:
    """A library that checks its arguments: it does so at the start, and by these; a fake tensor fails otherwise."""
    return phase in ("load", "init") and isinstance(error, (ValueError, AssertionError, DeepSpeedConfigError))


def innermost_module(trace: TracebackType | None) -> str:
    """Class of the innermost nn.Module whose method was running, else the innermost function outside torch."""
    module = function = ""
    while trace is not None:
        frame: Any = trace.tb_frame
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and "/torch/" not in frame.f_code.co_filename:
            module = type(owner).__name__
        if "/torch/" not in frame.f_code.co_filename and "/zplan/simulate/" not in frame.f_code.co_filename:
            function = frame.f_code.co_qualname
        trace = trace.tb_next
    return module or function or "the trainer"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
