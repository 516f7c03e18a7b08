"""The README is a promise: its commands run as written, its output is what they print."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
MAKE = [command for command in COMMANDS if command.startswith("make ")]
OWN = [command for command in COMMANDS if "my-model" in command or "best.json" in command or command == "zplan report"]
REST = [command for command in COMMANDS if command not in MAKE and command not in OWN]


def run(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the README as a shell would, with this environment's tools first."""
    env = {**os.environ, "COLUMNS": "80", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done


def test_every_command_is_accounted_for() -> None:
    assert MAKE == ["make demo", "make test"]
    assert len(OWN) == 5
    assert len(REST) >= 7


@pytest.mark.parametrize("command", REST)
def test_a_command_about_the_catalogue_runs_as_written(command: str) -> None:
    run(command, ROOT)


@pytest.mark.slow
def test_the_commands_for_an_own_model_run_in_order(tiny_model_dir: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "my-model")
    shutil.copy(tiny_dataset, tmp_path / "my-data.jsonl")
    for command in OWN:
        run(command, tmp_path)
    assert (tmp_path / "runs" / "best" / "training_report.json").exists()
    assert (tmp_path / "reports" / "study.html").exists()


def test_the_shown_output_is_what_the_commands_print() -> None:
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.render(README) == README, "python tools/readme.py"
