"""Stand-ins for DeepSpeed's compiled ops: the same memory behaviour, no arithmetic.

Fused Adam and CPU Adam update in place and allocate nothing on the device; their states are allocated by the Python
classes around them, which run as they are. The asynchronous I/O op moves bytes between a pinned buffer and a file.
"""

from __future__ import annotations

from typing import Any

import torch


class StandInOp:
    """A compiled module whose functions do nothing, except the two that only rearrange memory."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if attribute == "flatten":
            return torch._utils._flatten_dense_tensors
        if attribute == "unflatten":
            return torch._utils._unflatten_dense_tensors
        return lambda *args, **kwargs: 0


class StandInBuilder:
    """Answers for any `OpBuilder`."""

    def __init__(self, name: str = "") -> None:
        self.NAME = name

    def load(self, verbose: bool = True) -> StandInOp:
        return StandInOp(self.NAME)

    def is_compatible(self, verbose: bool = False) -> bool:
        return True

    def absolute_name(self) -> str:
        return self.NAME
