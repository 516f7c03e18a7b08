"""Measured: what a simulation or a real run answered, one JSON line per configuration, so that a grid goes on where it
stopped and a changed formula is compared again in seconds. The formula's own bytes are never kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zplan import files
from zplan.simulate.report import SimulationReport
from zplan.simulate.request import SimulationRequest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "benchmarks"
KEPT = ("allocated_phases", "gpu_reserved_bytes", "host_phases", "pinned_phases", "oom_message", "wall_seconds")


class Measured:
    """Answers by request and by the state of the code that gave them; appended as they come.

    Args:
        name: of the file under .cache/benchmarks; None keeps nothing.
        ask: gives the report, or raises one of `errors`, whose text is then the answer.
    """

    def __init__(
        self,
        name: str | None,
        ask: Callable[[SimulationRequest], SimulationReport],
        *,
        errors: tuple[type[Exception], ...],
    ) -> None:
        self.path = FOLDER / f"{name}.jsonl" if name else None
        self.ask, self.errors = ask, errors
        self.source = simulator_digest()
        self.known: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self.known[entry["key"]] = entry["answer"]

    def answer(self, request: SimulationRequest) -> Mapping[str, Any]:
        """What was measured for this request; measured now if it never was with this code."""
        data = json.dumps([self.source, files.to_data(request)], sort_keys=True)
        key = hashlib.sha256(data.encode()).hexdigest()
        if key not in self.known:
            self.known[key] = self._measure(request)
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"key": key, "answer": self.known[key]}) + "\n")
        return self.known[key]

    def _measure(self, request: SimulationRequest) -> dict[str, Any]:
        try:
            report = files.to_data(self.ask(request))
        except self.errors as error:
            return {"error": (str(error).splitlines() or [type(error).__name__])[0]}
        return {name: report[name] for name in KEPT}


def simulator_digest() -> str:
    """Of every source file that decides what a simulation answers."""
    digest = hashlib.sha256()
    for path in (*sorted((ROOT / "zplan" / "simulate").glob("*.py")), ROOT / "zplan" / "zero_config.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def summary(errors: list[float]) -> str:
    """Median, 90th percentile and largest of |error|, in per cent."""
    ordered = sorted(abs(error) for error in errors)
    if not ordered:
        return "nothing was measured"
    return (
        f"median {ordered[(len(ordered) - 1) // 2]:.2%}, 90th percentile {ordered[int(0.9 * (len(ordered) - 1))]:.2%},"
        f" largest {ordered[-1]:.2%}"
    )
