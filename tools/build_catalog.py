"""Write zplan/catalog/shapes/*.json and index.json from tools/models.py: `python tools/build_catalog.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hand_built import HAND_BUILT
from models import MODELS

from zplan.catalog.shapes import to_json
from zplan.model_probe import shape_of_config
from zplan.model_shape import ModelShape

CATALOG = Path(__file__).parent.parent / "zplan" / "catalog"


def main() -> int:
    """Build every shape, check it against its published count, write it. 1 if a count differs."""
    index: dict[str, dict[str, object]] = {}
    wrong = 0
    entries: list[tuple[ModelShape, list[str], int | None]] = [
        *((shape_of_config(config, name=name), ids, count) for name, ids, config, count in MODELS),
        *HAND_BUILT,
    ]
    (CATALOG / "shapes").mkdir(exist_ok=True)
    for shape, ids, count in entries:
        if count is not None and shape.num_parameters != count:
            print(f"{shape.name}: {shape.num_parameters:,}, published {count:,}")
            wrong += 1
        index[shape.name] = {"hub_ids": ids, "num_parameters": shape.num_parameters, "published": count}
        text = json.dumps(to_json(shape), separators=(",", ":"))
        (CATALOG / "shapes" / f"{shape.name}.json").write_text(text + "\n", encoding="utf-8")
    (CATALOG / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    print(f"{len(index)} models, {wrong} wrong counts")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
