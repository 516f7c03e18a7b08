"""Write zplan/catalog/shapes/*.json and index.json from tools/models.py: `python tools/build_catalog.py`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hand_built import HAND_BUILT
from models import MODELS, MORE_MODELS

from zplan.catalog.shapes import to_json
from zplan.model_probe import shape_of_config
from zplan.model_shape import ModelShape

CATALOG = Path(__file__).parent.parent / "zplan" / "catalog"


def _from(where: str, name: str, config: dict[str, Any]) -> ModelShape:
    """A shape that says where its config was read."""
    shape = shape_of_config(config, name=name)
    return replace(shape, source=f"{shape.source}; config: {where}")


def main() -> int:
    """Build every shape, check it against its published count, write it. 1 if a count differs."""
    index: dict[str, dict[str, object]] = {}
    wrong = 0
    entries: list[tuple[ModelShape, list[str], int | None]] = [
        *((shape_of_config(config, name=name), ids, count) for name, ids, config, count in MODELS),
        *((_from(where, name, config), ids, count) for (name, ids, config, count), where in MORE_MODELS),
        *HAND_BUILT,
    ]
    (CATALOG / "shapes").mkdir(exist_ok=True)
    for shape, ids, count in entries:
        loaded = shape.num_parameters + (shape.beside_numel or 0)
        if count is not None and loaded != count:
            print(f"{shape.name}: {loaded:,}, published {count:,}")
            wrong += 1
        index[shape.name] = {"hub_ids": ids, "num_parameters": shape.num_parameters, "published": count}
        text = json.dumps(to_json(shape), separators=(",", ":"))
        (CATALOG / "shapes" / f"{shape.name}.json").write_text(text + "\n", encoding="utf-8")
    (CATALOG / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    print(f"{len(index)} models, {wrong} wrong counts")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
