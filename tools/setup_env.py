"""Create `.venv` with the tested set of packages: `python3 tools/setup_env.py` (or `make setup`).

Needs nothing but Python's standard library. Looks before it starts, can be interrupted at any moment and repeated, and
does nothing when the environment is already the one that pyproject.toml and constraints.txt describe.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".zplan-setup"
LEAST_PYTHON = (3, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of CPU builds."""
CPU_DISK_BYTES, CUDA_DISK_BYTES = 4 << 30, 12 << 30
"""What the environment takes, with and without CUDA's libraries, and pip's room to unpack."""


class SetupError(Exception):
    """What is wrong, because of what, and what to type."""

    def __init__(self, what: str, because: str, fix: str) -> None:
        super().__init__(f"setup: {what}\n  because: {because}\n  try:     {fix}")


def has_nvidia_driver() -> bool:
    """Whether this machine has an NVIDIA driver; only then are CUDA builds of any use."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def fingerprint() -> str:
    """Changes when the described environment does."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt", "tools/setup_env.py"):
        digest.update((ROOT / name).read_bytes())
    digest.update(f"{sys.version_info[:3]} {ROOT} {has_nvidia_driver()}".encode())
    return digest.hexdigest()


def is_current() -> bool:
    """Whether `.venv` is complete and up to date."""
    try:
        return STAMP.read_text() == fingerprint() and (VENV / "bin" / "zplan").exists()
    except OSError:
        return False


def check_machine() -> list[str]:
    """Everything that would stop the installation half-way, before it starts. Returns notes on what is optional."""
    if sys.version_info < LEAST_PYTHON:
        raise SetupError(
            f"this is Python {sys.version.split()[0]}",
            "zplan needs Python 3.11 or newer",
            "make setup PYTHON=python3.11",
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(
            "Python's venv module is missing", "Debian packs it apart", "apt-get install python3-venv"
        ) from error
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise SetupError(
            "no C++ compiler", "DeepSpeed compiles its CPU optimizer and I/O on first use", "apt-get install g++"
        )
    need = CUDA_DISK_BYTES if has_nvidia_driver() else CPU_DISK_BYTES
    free = shutil.disk_usage(ROOT).free
    if free < need:
        raise SetupError(
            f"{free / 2**30:.1f} GiB free under {ROOT}",
            f"the environment needs {need / 2**30:.0f} GiB",
            "free some space",
        )
    notes = []
    if not any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include")):
        notes.append("libaio is not installed: only NVMe offload needs it (apt-get install libaio-dev)")
    return notes


def run(*command: str, env: dict[str, str] | None = None) -> None:
    """Run one visible step; its failure is ours."""
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env=env)


def pip(*arguments: str) -> list[str]:
    return [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]


def torch_requirement() -> str:
    """The pinned torch."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def torch_arguments() -> list[str]:
    """Where torch comes from: pip's own index if that gives the right build, else PyTorch's index of CPU builds."""
    if has_nvidia_driver():
        return []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = pip("install", "--quiet", "--dry-run", "--no-deps", "--report", str(report), torch_requirement())
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode != 0:
            raise SetupError(
                f"pip does not find {torch_requirement()}",
                found.stderr.strip().splitlines()[-1] if found.stderr.strip() else "pip said nothing",
                "check the network and pip's index (pip config list), then repeat",
            )
        install = json.loads(report.read_text())["install"]
    needs = install[0]["metadata"].get("requires_dist", []) if install else []
    wants_cuda = any("nvidia" in need or need.startswith("triton") for need in needs)
    return ["--index-url", CPU_INDEX] if wants_cuda else []


def install() -> None:
    """Create and fill `.venv`."""
    if not (VENV / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", str(VENV))
    env = {**os.environ, "PIP_NO_INPUT": "1"}
    run(*pip("install", "--quiet", *torch_arguments(), torch_requirement()), env=env)
    run(*pip("install", "--quiet", "-c", "constraints.txt", "-e", ".[dev,nvme]"), env=env)
    run(str(VENV / "bin" / "python"), "-m", "compileall", "-q", "zplan", "sft")


def main() -> int:
    """0 when `.venv` is ready."""
    if is_current():
        return 0
    try:
        for note in check_machine():
            print(f"setup: {note}")
        print("setup: installing into .venv (some minutes; interrupted, it goes on when repeated)", flush=True)
        STAMP.unlink(missing_ok=True)
        install()
        STAMP.write_text(fingerprint())
    except SetupError as error:
        print(error, file=sys.stderr)
        return 4
    except subprocess.CalledProcessError as error:
        message = SetupError(
            f"a step failed: {' '.join(map(str, error.cmd))}",
            "see its own message above",
            "mend that, then repeat make setup",
        )
        print(message, file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("setup: interrupted; repeat it to go on", file=sys.stderr)
        return 130
    print("setup: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
