"""Child processes that end with their parent, however that ends."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """In the child, after the fork: it is killed when the thread that started it ends, by SIGKILL too.

    Source: prctl(2), PR_SET_PDEATHSIG; it survives execve of a program that is not set-uid, and no fork inherits it.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
