"""The command-line flags, the same for every command.

`shared_flags` lets a command take one `Flags` value: every field of the dataclass is an option of the command, in the
section of the help that it names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Any

import click

from zplan.errors import ConfigError
from zplan.values import dataclass

_MODEL, _RECIPE, _CHOICE, _CLUSTER, _OUTPUT = (
    "Model",
    "Recipe (never tuned)",
    "Choice (tuned unless given)",
    "Cluster",
    "Output",
)


class WholeNumber(click.ParamType[int]):
    """An int as people write them: 4096, 4_096, 1e6."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = float(str(value).replace("_", ""))
            if number.is_integer() and abs(number) < 1 << 53:
                return int(number)
        except (ValueError, OverflowError):
            pass
        flag = param.opts[0] if param else "value"
        raise ConfigError(f"{flag} is {value!r}, not a whole number", fix=f"{flag} {_EXAMPLES.get(flag, '8')}")


WHOLE = WholeNumber()
_EXAMPLES = {"--stage": "2", "--max-length": "1024", "--micro-batch": "1"}


class FlagOption(click.Option):
    """An option that knows its section of the help."""

    def __init__(self, *args: Any, section: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.section = section


class SectionedCommand(click.Command):
    """Its own options first, then the shared ones by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "") or "Options", []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


_FLAG = "flag"
_KINDS: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
"""By their name in an annotation. To evaluate the annotations takes 2 ms."""


@dataclass(frozen=True, slots=True)
class _Flag:
    help: str
    section: str
    names: tuple[str, ...]


def _flag(help_text: str, section: str, *names: str, default: Any = None) -> Any:
    metadata = {_FLAG: _Flag(help_text, section, names)}
    return (
        field(default_factory=list, metadata=metadata) if default is list else field(default=default, metadata=metadata)
    )


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Every flag as typed; None is "not given"."""

    model: str | None = _flag("Catalogue name, Hub id (in the local cache), folder, config.json, or `custom`.", _MODEL)
    set_model: list[str] = _flag(
        "KEY=VALUE of config.json for --model custom; repeatable.", _MODEL, "--set-model", default=list
    )
    method: str | None = _flag("full, lora or qlora.", _RECIPE)
    load_in_8bit: bool | None = _flag(
        "qlora on 8-bit instead of 4-bit weights.", _RECIPE, "--load-in-8bit/--load-in-4bit"
    )
    lora_r: int | None = _flag("Rank of the adapters (16).", _RECIPE)
    lora_alpha: int | None = _flag("Scale of the adapters; twice the rank by default.", _RECIPE)
    lora_target: list[str] = _flag("Module names, or all-linear; repeatable.", _RECIPE, "--lora-target", default=list)
    lora_dropout: float | None = _flag("Dropout before the adapters (0).", _RECIPE)
    modules_to_save: list[str] = _flag(
        "Modules trained whole beside the adapters; repeatable.", _RECIPE, "--modules-to-save", default=list
    )
    use_rslora: bool | None = _flag("Scale adapters by alpha / sqrt(r).", _RECIPE, "--use-rslora/--no-use-rslora")
    use_dora: bool | None = _flag("Train magnitudes beside the adapters.", _RECIPE, "--use-dora/--no-use-dora")
    neftune_noise_alpha: float | None = _flag("Noise on the embeddings while training, e.g. 5.", _RECIPE)
    max_length: int | None = _flag("Longest sequence, tokens (1024).", _RECIPE)
    train_batch_size: int | None = _flag("Sequences per optimizer step, all ranks.", _RECIPE)
    optimizer: str | None = _flag("adamw, adamw_8bit, paged_adamw_8bit, adafactor, sgd, lion, ...", _RECIPE)
    dtype: str | None = _flag("bf16, fp16 or fp32; by default what the device is good at.", _RECIPE)
    attention: str | None = _flag("sdpa, flash_attention_2 or eager.", _RECIPE)
    loss: str | None = _flag("nll, chunked_nll, liger or full (TRL's names).", _RECIPE)
    packing: bool | None = _flag("Pack short examples into full sequences.", _RECIPE, "--packing/--no-packing")
    dataset: str | None = _flag("JSONL, JSON, CSV, Parquet, folder or Hub id.", _RECIPE)
    learning_rate: float | None = _flag("Peak learning rate (2e-5).", _RECIPE)
    stage: int | None = _flag("ZeRO stage 0, 1, 2 or 3.", _CHOICE)
    micro_batch: int | None = _flag("Sequences per GPU and forward pass.", _CHOICE)
    gradient_checkpointing: bool | None = _flag(
        "Recompute activations.", _CHOICE, "--gradient-checkpointing/--no-gradient-checkpointing"
    )
    offload_optimizer: str | None = _flag("none, cpu or nvme.", _CHOICE)
    offload_param: str | None = _flag("none, cpu or nvme.", _CHOICE)
    set_: list[str] = _flag(
        "KEY=VALUE for any DeepSpeed zero key; repeatable.",
        _CHOICE,
        "--set",
        default=list,
    )
    ds_config: str | None = _flag("A DeepSpeed JSON to read the choice from.", _CHOICE)
    plan: str | None = _flag("A plan of profiles/ to read everything from.", _CHOICE)
    bucket_rule: str = _flag("engine, or documented: the 4.5x rule of the DeepSpeed docs.", _CHOICE, default="engine")
    gpu: str | None = _flag("Catalogue GPU such as h100-80gb, or cpu.", _CLUSTER)
    gpus_per_node: int | None = _flag("GPUs (or CPU ranks) of each node.", _CLUSTER)
    nodes: int | None = _flag("Nodes.", _CLUSTER)
    host_ram: str | None = _flag("RAM of each node, such as 1TiB.", _CLUSTER)
    nvme: str | None = _flag("Free NVMe of each node, such as 2TiB.", _CLUSTER)
    json: bool = _flag("JSON on stdout and nothing else.", _OUTPUT, "--json", default=False)
    out: str | None = _flag("Write the result to this file.", _OUTPUT)
    quiet: bool = _flag("Only the result.", _OUTPUT, "--quiet", "-q", default=False)
    verbose: bool = _flag("Every term and where it comes from.", _OUTPUT, "--verbose", "-v", default=False)


def shared_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a click command the fields of `Flags` as options; it receives them as one value, `flags`."""
    return _flags_as_options(command, _options())


def output_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Only the section Output of `shared_flags`."""
    return _flags_as_options(command, tuple(option for option in _options() if option.section == _OUTPUT))


def _flags_as_options(command: Callable[..., None], options: tuple[FlagOption, ...]) -> Callable[..., None]:
    names = [option.name for option in options]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in names if name is not None}
        command(flags=Flags(**given), **values)

    run.__click_params__ = [*getattr(command, "__click_params__", ()), *reversed(options)]  # type: ignore[attr-defined]
    return run


@functools.cache
def _options() -> tuple[FlagOption, ...]:
    return tuple(_option(item, item.metadata[_FLAG]) for item in fields(Flags))


def _option(item: Field[Any], flag: _Flag) -> FlagOption:
    spelled = flag.names or (f"--{item.name.replace('_', '-')}",)
    text = str(item.type)
    several = text.startswith("list[")
    scalar = _KINDS[text.removeprefix("list[").removesuffix("]").removesuffix(" | None")]
    more: dict[str, Any] = {"is_flag": True} if scalar is bool else {"type": WHOLE if scalar is int else scalar}
    return FlagOption(
        [item.name, *spelled], help=flag.help, section=flag.section, default=() if several else item.default,
        multiple=several, callback=_as_list if several else None, **more,
    )  # fmt: skip


def _as_list(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> list[str]:
    return list(values)
