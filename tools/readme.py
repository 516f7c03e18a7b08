"""Put the real output of each `<!-- output: COMMAND -->` into README.md: `python tools/readme.py`."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- output: (?P<command>[^\n]+) -->\n```text\n)(?P<body>.*?)(```)", re.DOTALL)


def output(command: str) -> str:
    """What the command prints in a terminal of 80 columns."""
    env = {**os.environ, "COLUMNS": "80", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command.split(), capture_output=True, text=True, env=env, check=False)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"


def render(text: str) -> str:
    """The README with every block made anew."""
    return BLOCK.sub(lambda match: match.group(1) + output(match["command"]) + match.group(4), text)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
