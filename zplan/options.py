"""The command-line flags, the same for every command, and how they become a Recipe and a Cluster.

`expand` lets a command take one `Flags` value: Typer sees the fields of the dataclass as its options.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

from typer import Option

_MODEL, _RECIPE, _CHOICE, _CLUSTER, _OUTPUT = (
    "Model",
    "Recipe (never tuned)",
    "Choice (tuned unless given)",
    "Cluster",
    "Output",
)


def _flag(help_text: str, panel: str, *names: str, **more: Any) -> Any:
    return Option(*names, help=help_text, rich_help_panel=panel, show_default=False, **more)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Every flag as typed; None is "not given"."""

    model: Annotated[
        str | None,
        _flag("Catalogue name, Hub id (in the local cache), folder, config.json, or `custom`.", _MODEL),
    ] = None
    set_model: Annotated[
        list[str], _flag("KEY=VALUE of config.json for --model custom; repeatable.", _MODEL, "--set-model")
    ] = field(default_factory=list)
    method: Annotated[str | None, _flag("full, lora or qlora.", _RECIPE)] = None
    lora_r: Annotated[int | None, _flag("Rank of the adapters (16).", _RECIPE)] = None
    lora_alpha: Annotated[int | None, _flag("Scale of the adapters; twice the rank by default.", _RECIPE)] = None
    lora_target: Annotated[list[str], _flag("Module names, or all-linear; repeatable.", _RECIPE, "--lora-target")] = (
        field(default_factory=list)
    )
    max_length: Annotated[int | None, _flag("Longest sequence, tokens (1024).", _RECIPE)] = None
    train_batch_size: Annotated[int | None, _flag("Sequences per optimizer step, all ranks.", _RECIPE)] = None
    optimizer: Annotated[
        str | None, _flag("adamw, adamw_8bit, paged_adamw_8bit, adafactor, sgd, lion, ...", _RECIPE)
    ] = None
    dtype: Annotated[str | None, _flag("bf16, fp16 or fp32; by default what the device is good at.", _RECIPE)] = None
    attention: Annotated[str | None, _flag("sdpa, flash_attention_2 or eager.", _RECIPE)] = None
    loss: Annotated[str | None, _flag("nll, chunked_nll, liger or full (TRL's names).", _RECIPE)] = None
    packing: Annotated[
        bool | None, _flag("Pack short examples into full sequences.", _RECIPE, "--packing/--no-packing")
    ] = None
    dataset: Annotated[str | None, _flag("JSONL, JSON, CSV, Parquet, folder or Hub id.", _RECIPE)] = None
    learning_rate: Annotated[float | None, _flag("Peak learning rate (2e-5).", _RECIPE)] = None
    stage: Annotated[int | None, _flag("ZeRO stage 0, 1, 2 or 3.", _CHOICE)] = None
    micro_batch: Annotated[int | None, _flag("Sequences per GPU and forward pass.", _CHOICE)] = None
    gradient_checkpointing: Annotated[
        bool | None,
        _flag("Recompute activations.", _CHOICE, "--gradient-checkpointing/--no-gradient-checkpointing"),
    ] = None
    offload_optimizer: Annotated[str | None, _flag("none, cpu or nvme.", _CHOICE)] = None
    offload_param: Annotated[str | None, _flag("none, cpu or nvme.", _CHOICE)] = None
    set_: Annotated[list[str], _flag("KEY=VALUE for any DeepSpeed zero key; repeatable.", _CHOICE, "--set")] = field(
        default_factory=list
    )
    ds_config: Annotated[str | None, _flag("A DeepSpeed JSON to read the choice from.", _CHOICE)] = None
    plan: Annotated[str | None, _flag("A plan of profiles/ to read everything from.", _CHOICE)] = None
    bucket_rule: Annotated[str, _flag("engine, or documented: the 4.5x rule of the DeepSpeed docs.", _CHOICE)] = (
        "engine"
    )
    gpu: Annotated[str | None, _flag("Catalogue GPU such as h100-80gb, or cpu.", _CLUSTER)] = None
    gpus_per_node: Annotated[int | None, _flag("GPUs (or CPU ranks) of each node.", _CLUSTER)] = None
    nodes: Annotated[int | None, _flag("Nodes.", _CLUSTER)] = None
    host_ram: Annotated[str | None, _flag("RAM of each node, such as 1TiB.", _CLUSTER)] = None
    nvme: Annotated[str | None, _flag("Free NVMe of each node, such as 2TiB.", _CLUSTER)] = None
    json: Annotated[bool, _flag("JSON on stdout and nothing else.", _OUTPUT, "--json")] = False
    out: Annotated[str | None, _flag("Write the result to this file.", _OUTPUT)] = None
    quiet: Annotated[bool, _flag("Only the result.", _OUTPUT, "--quiet", "-q")] = False
    verbose: Annotated[bool, _flag("Every term and where it comes from.", _OUTPUT, "--verbose", "-v")] = False


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Give Typer the fields of `Flags` in place of the parameter `flags`."""
    hints = get_type_hints(Flags, include_extras=True)
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    shared = [
        inspect.Parameter(
            item.name, inspect.Parameter.KEYWORD_ONLY, default=_default(item), annotation=hints[item.name]
        )
        for item in dataclasses.fields(Flags)
    ]
    names = {item.name for item in dataclasses.fields(Flags)}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        flags = Flags(**{name: value for name, value in values.items() if name in names})
        command(flags=flags, **{name: value for name, value in values.items() if name not in names})

    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    run.__signature__ = inspect.Signature([*keyword_only, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*keyword_only, *shared]}
    return run


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
