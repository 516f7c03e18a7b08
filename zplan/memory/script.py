"""The script of a step: which calls the engine of the stage gets, and the course, a script with the bytes around it."""

from __future__ import annotations

from bisect import bisect_right
from typing import Final, Literal

from zplan.memory.coordinator import Fetches
from zplan.memory.laps import Laps
from zplan.values import dataclass

StepPhase = Literal["forward", "backward", "step"]
STEP_PHASES: tuple[StepPhase, ...] = ("forward", "backward", "step")
Kinds = tuple[int, ...]
"""Bytes by Kind."""


class Op:
    """What the engine is asked to do; plain numbers, read too often for an IntEnum."""

    NOTHING: Final = 0
    """End of a phase: closes the last stretch of bytes."""
    BEGIN: Final = 1
    PRE_MODULE: Final = 2
    POST_MODULE: Final = 3
    GRADIENT: Final = 4
    END_BACKWARD: Final = 5
    STEP: Final = 6
    RECOMPUTED_MODULE: Final = 7
    """PRE_MODULE within a reentrant recomputation."""
    END_RECOMPUTED: Final = 8
    """The layer that was recomputed has had its backward."""
    READ_HEAD: Final = 9
    """The loss reads the head's weight, or is done with it."""
    KEPT_MODULE: Final = 10
    """POST_MODULE within a non-reentrant recomputation."""
    VIEWED_MODULE: Final = 12
    """POST_MODULE of a module whose weights the graph keeps a view of."""
    MADE: Final = 13
    """A weight's gradient is there, and is reduced later (GRADIENT)."""
    END_STEP: Final = 11
    """The update is done."""


Call = tuple[int, int]
"""(Op, number of the module or of the parameter)."""


HOOKS = frozenset(
    {
        Op.PRE_MODULE, Op.POST_MODULE, Op.RECOMPUTED_MODULE, Op.END_RECOMPUTED, Op.READ_HEAD, Op.KEPT_MODULE,
        Op.VIEWED_MODULE, Op.END_STEP, Op.MADE,
    }
)  # fmt: skip
"""Calls that gather and release parameters; no gradient comes or goes in them."""
UPDATED = -3
"""Among the moments of a script of ZeRO-3: its last call but one, END_STEP, while it runs."""
UPDATED_IN_REDUCTION = -2
"""The moment of its reduction that stands for that one: from STEP to the last call."""


@dataclass(frozen=True, eq=False)
class Reduction:
    """The calls of a step without the hooks of its modules. One object per distinct sequence."""

    calls: tuple[Call, ...]
    phases: tuple[int, ...]
    """Number of the first call of each phase."""
    on_cpu: bool = False
    """The ranks are CPUs."""


@dataclass(frozen=True, eq=False)
class Script:
    """The calls of a step and what a ZeRO-3 engine must know to follow them. One object per distinct script."""

    calls: tuple[Call, ...]
    """Of the whole step, phase after phase."""
    phases: tuple[int, ...]
    """Number of the first call of each phase."""
    reduction: Reduction
    kept: tuple[int, ...]
    """Number of each call of the reduction among all calls."""
    fetches: Fetches
    """Modules in the order in which a step fetches them; empty below stage 3."""
    external: tuple[int, ...]
    """Parameters that DeepSpeed registers as external; they are not released."""
    head: tuple[int, ...]
    """Parameters of the output projection."""
    root: int = 0
    """Number of the model itself among the modules."""
    viewed: frozenset[int] = frozenset()
    """Weights whose product keeps a view of the gathered tensor."""
    unread: frozenset[int] = frozenset()
    """Parameters that modules read without owning them, in a gather of each one's own in the first forward."""
    laps: tuple[Laps, ...] = ()
    """Where its layers are called alike."""

    @property
    def root_call(self) -> int:
        """Number of the call with which the model itself is fetched."""
        return self.calls.index((Op.PRE_MODULE, self.root))

    @property
    def forward_modules(self) -> int:
        """Modules that forward fetches, the model itself aside."""
        return sum(op == Op.PRE_MODULE for op, _ in self.calls[: self.phases[1]]) - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Course:
    """A script with the bytes outside the engine. Each call has two moments: the largest since the call before it, and
    what is live while it runs. Every table of bytes over calls lists moments in this order."""

    script: Script
    moments: tuple[int, ...]
    spans: tuple[int, ...]
    """First moments of the spans between which nothing but activations changes."""
    others: tuple[Kinds, ...]
    """Bytes by kind, activations left out, of each span."""

    def kinds(self, moment: int) -> Kinds:
        """Bytes of a moment by kind."""
        others = self.others[bisect_right(self.spans, moment) - 1]
        return self.moments[moment] - sum(others), *others
