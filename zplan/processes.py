"""Processes that end with their parent, however that ends; the tuner's, the simulation's and the trainer's."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from zplan.errors import MachineError

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(death_signal: signal.Signals = signal.SIGKILL) -> None:
    """In the child, after the fork: ask the kernel (Linux) to signal it when the thread that started it ends.

    Source: prctl(2), PR_SET_PDEATHSIG; it survives execve of a program that is not set-uid, and no fork inherits it.

    Raises:
        MachineError: the kernel refuses.
    """
    if _libc is None:
        return
    parent = os.getppid()
    if _libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        raise MachineError(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        os.kill(os.getpid(), death_signal)
