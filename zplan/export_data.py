"""The columns of a plan's data in the words of other trainers, seen from the first row of a local JSON Lines file.

Keys: axolotl at 07e83ab, utils/schemas/datasets.py (SFTDataset, UserDefinedPrompterType); LLaMA-Factory at 015ff25,
data/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from zplan.errors import ConfigError

Columns = Literal["messages", "conversations", "alpaca", "prompt and response", "prompt and completion", "text"]

_RECOGNISED: tuple[tuple[frozenset[str], Columns], ...] = (
    (frozenset({"messages"}), "messages"),
    (frozenset({"conversations"}), "conversations"),
    (frozenset({"instruction", "output"}), "alpaca"),
    (frozenset({"prompt", "response"}), "prompt and response"),
    (frozenset({"prompt", "completion"}), "prompt and completion"),
    (frozenset({"text"}), "text"),
)
"""In the order in which the trainer recognises them."""


def _axolotl_pair(prompt: str, response: str) -> Mapping[str, Any]:
    fields = {"field_instruction": prompt, "field_output": response}
    return {"type": {**fields, "format": "{instruction}", "no_input_format": "{instruction}"}}


AXOLOTL: Mapping[Columns | None, Mapping[str, Any]] = {
    "messages": {"type": "chat_template", "field_messages": "messages"},
    "conversations": {
        "type": "chat_template",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    },
    "alpaca": {"type": "alpaca"},
    "prompt and response": _axolotl_pair("prompt", "response"),
    "prompt and completion": _axolotl_pair("prompt", "completion"),
    "text": {"type": "completion", "field": "text"},
    None: _axolotl_pair("PROMPT_COLUMN", "RESPONSE_COLUMN"),
}
"""Beside `path` in axolotl's `datasets`; None: names for the user to fill in."""

LLAMA_FACTORY: Mapping[Columns | None, Mapping[str, Any]] = {
    "messages": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
    "conversations": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "alpaca": {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
    "prompt and response": {"columns": {"prompt": "prompt", "response": "response"}},
    "prompt and completion": {"columns": {"prompt": "prompt", "response": "completion"}},
    "text": {"columns": {"prompt": "text"}},
    None: {"columns": {"prompt": "PROMPT_COLUMN", "response": "RESPONSE_COLUMN"}},
}
"""Beside `file_name` in LLaMA-Factory's dataset_info.json."""


def columns_of(dataset: str | None) -> Columns | None:
    """What the first row holds; None where no row can be seen (no data, a Hub id, another kind of file).

    Raises:
        ConfigError: the first row is no object, or its columns are in no known schema.
    """
    path = Path(dataset or "")
    if path.suffix.lower() not in (".jsonl", ".ndjson") or not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8-sig") as stream:
            row = json.loads(next((line for line in stream if line.strip()), "null"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"the first row of {path} cannot be read: {error}", fix="check --dataset") from error
    found = set(row) if isinstance(row, dict) else set()
    for needed, name in _RECOGNISED:
        if needed <= found:
            return name
    raise ConfigError(
        f"the columns of {path} are {', '.join(sorted(found)) or 'none'}",
        because="other trainers are told the names of the columns",
        fix="rename them to prompt and response",
    )
