"""What `zplan simulate --out FILE` wrote, as one self-contained HTML file with its memory timeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from zplan import files
from zplan.errors import ConfigError
from zplan.report.figures import timeline_figure
from zplan.units import format_bytes, format_count


def write_timeline(path: str, out: Path) -> Path:
    """Render the page and write it atomically.

    Raises:
        ConfigError: the file is missing, or no answer of `zplan simulate`.
    """
    files.save_text(render_timeline(load_answer(path)), out)
    return out


def load_answer(path: str) -> dict[str, Any]:
    """The JSON of `zplan simulate`.

    Raises:
        ConfigError: the file is missing, or something else; a run that fell back to the formula has no timeline.
    """
    try:
        answer = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}", fix="zplan simulate --model M --stage 2 --out FILE"
        ) from None
    if not isinstance(answer, dict) or not answer.get("simulation"):
        raise ConfigError(
            f"{path} holds no simulation", because="a timeline is drawn from what `zplan simulate --out` wrote",
            fix="zplan simulate --model M --stage 2 --out FILE",
        )  # fmt: skip
    return answer


def render_timeline(answer: dict[str, Any]) -> str:
    """The page as text."""
    simulation, gpu = answer["simulation"], answer["gpu"]
    environment = Environment(
        loader=PackageLoader("zplan.report", "."), autoescape=select_autoescape(["html", "j2"]), trim_blocks=True
    )
    traffic = {
        **{f"{item['name']}, {item['count']} calls": item["bytes"] for item in simulation["collectives"]},
        "host to device": simulation["host_to_device_bytes"],
        "device to host": simulation["device_to_host_bytes"],
        "NVMe read": simulation["nvme_read_bytes"],
        "NVMe written": simulation["nvme_written_bytes"],
    }
    return environment.get_template("simulation.html.j2").render(
        title=f"{answer['model']['name']}, {answer['label']}",
        peak=format_bytes(simulation["gpu_allocated_bytes"]),
        phase=simulation["peak_phase"],
        reserved=format_bytes(simulation["gpu_reserved_bytes"]),
        verdict=gpu["verdict"].replace("_", " "),
        oom=simulation["oom_message"],
        timeline=timeline_figure(simulation, free_bytes=gpu["free_bytes"]),
        allocations=[{**item, "size": format_bytes(item["bytes"])} for item in simulation["top_allocations"]],
        traffic={name: format_bytes(size) for name, size in traffic.items() if size},
        flops=format_count(simulation["flops"]),
        replaced=simulation["replaced"],
        versions=simulation["versions"],
    )
