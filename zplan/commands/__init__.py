"""One module per command: question -> answer. `cli` parses and prints; nothing below knows the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from zplan.errors import ExitCode
from zplan.values import dataclass

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command found: for programs, for people, and as an exit code."""

    data: Callable[[], Mapping[str, Any]]
    """Made only when it is asked for: what most people read is the text."""
    text: RenderableType
    code: ExitCode = ExitCode.OK
