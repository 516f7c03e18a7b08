"""Data: known models and GPUs, each with its source. Generated shapes: `python tools/build_catalog.py`."""

from zplan.catalog.find import find_model, hub_ids, hub_snapshot, model_names
from zplan.catalog.gpus import Links, find_gpu, gpu_names, load_gpu, load_links

__all__ = [
    "Links", "find_gpu", "find_model", "gpu_names", "hub_ids", "hub_snapshot", "load_gpu", "load_links", "model_names",
]  # fmt: skip
