"""Put the real output of each `<!-- output: COMMAND -->` and the figures of `reports/` into README.md.

python tools/readme.py
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- output: (?P<command>[^\n]+) -->\n```text\n)(?P<body>.*?)(```)", re.DOTALL)

ACCURACY = re.compile(r"(<!-- accuracy -->\n)(.*?)(<!-- end -->)", re.DOTALL)
REPORTS = README.parent / "reports"
_SHARES = r"Peak \|error\|: median (?P<median>[\d.]+)%.*?largest (?P<largest>[\d.]+)%"
SUMMARIES = (
    (
        "simulated_vs_real", "simulated / real DeepSpeed on CPU ranks",
        r"(?P<count>\d+) ran on both sides.*?largest difference of a peak is (?P<largest>[\d.]+)%",
    ),
    ("formula_vs_simulation", "formula / simulated, real layer widths", r"(?P<count>\d+) simulated.*?" + _SHARES),
    ("formula_vs_real", "formula / real DeepSpeed on CPU ranks", r"(?P<count>\d+) ran\..*?" + _SHARES),
)  # fmt: skip
"""Report, what it compares, and the line that sums it up."""


def output(command: str) -> str:
    """What the command prints in a terminal of 80 columns."""
    env = {**os.environ, "COLUMNS": "80", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command.split(), capture_output=True, text=True, env=env, check=False)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"


def accuracy_table() -> str:
    """How close formula, simulation and real runs are, from the summaries that the benchmarks wrote.

    Raises:
        ValueError: a report has no such summary.
    """
    lines = ["| peak of a rank | configurations | median error | largest error |", "|---|---:|---:|---:|"]
    for name, compared, pattern in SUMMARIES:
        found = re.search(pattern, (REPORTS / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
        if found is None:
            raise ValueError(f"reports/{name}.md has no line like {pattern}")
        median = found.groupdict().get("median")
        middle = f"{median} %" if median else "-"
        lines.append(f"| [{compared}](reports/{name}.md) | {found['count']} | {middle} | {found['largest']} % |")
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    """The README with every block made anew."""
    text = BLOCK.sub(lambda match: match.group(1) + output(match["command"]) + match.group(4), text)
    return ACCURACY.sub(lambda match: match.group(1) + accuracy_table() + match.group(3), text)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
