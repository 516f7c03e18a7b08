"""The errors a user can meet, each with the exit code that `main()` gives it.

    ZplanError                     exit 1   our bug, unless a subclass says otherwise
    ├── ConfigError                exit 2   the question is malformed
    ├── DoesNotFitError            exit 3   the answer is "it does not fit"
    └── MachineError               exit 4   the machine or a version is broken

Every message has three parts: what is wrong (with the values), because of which limit and who sets it, and one
thing to type. `problems` carries every problem of a file at once.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit status means."""

    OK = 0
    BUG = 1
    MALFORMED = 2
    DOES_NOT_FIT = 3
    BROKEN_MACHINE = 4
    INTERRUPTED = 130


class ZplanError(Exception):
    """Base of all errors that carry what / because / try."""

    exit_code = ExitCode.BUG

    def __init__(
        self, what: str, *, because: str | None = None, fix: str | None = None, problems: tuple[str, ...] = ()
    ) -> None:
        super().__init__(what)
        self.what = what
        self.because = because
        self.fix = fix
        self.problems = problems

    def __str__(self) -> str:
        lines = [self.what, *(f"  - {problem}" for problem in self.problems)]
        if self.because:
            lines.append(f"  because: {self.because}")
        if self.fix:
            lines.append(f"  try:     {self.fix}")
        return "\n".join(lines)


class ConfigError(ZplanError):
    """A flag, a file or a combination that cannot mean anything."""

    exit_code = ExitCode.MALFORMED


class DoesNotFitError(ZplanError):
    """The configuration needs more GPU memory, host memory or disk than there is."""

    exit_code = ExitCode.DOES_NOT_FIT


class MachineError(ZplanError):
    """A driver, a compiler, a library version or a limit of this machine is in the way."""

    exit_code = ExitCode.BROKEN_MACHINE
