"""What the tuner, the simulation and the trainer need for processes of their own: an end with their parent, a port."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
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


def free_port() -> int:
    """A TCP port of this machine on which nobody listens now. Somebody may before it is used."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
