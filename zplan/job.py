"""The flags of one command as values: which model, which recipe, which cluster, which choices are already made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import ceil
from pathlib import Path
from typing import Any, get_args

from zplan import recipe as recipe_module
from zplan.catalog import find_model, load_gpu
from zplan.errors import ConfigError
from zplan.hardware import Cluster
from zplan.memory.estimate import BucketRule
from zplan.model_shape import ModelShape
from zplan.options import Flags
from zplan.planner import Fixed, make_choice
from zplan.probe import describe_cluster
from zplan.recipe import Recipe
from zplan.units import parse_size
from zplan.zero_config import Choice, ZeroConfig

_RECIPE_FLAGS = (
    "dataset", "method", "lora_r", "lora_alpha", "max_length", "train_batch_size", "optimizer", "dtype", "attention",
    "loss", "packing", "learning_rate", "load_in_8bit", "lora_dropout", "use_rslora", "use_dora", "neftune_noise_alpha",
)  # fmt: skip
_CHOICES = {
    "method": recipe_module.Method,
    "dtype": recipe_module.DType,
    "attention": recipe_module.Attention,
    "loss": recipe_module.Loss,
    "optimizer": recipe_module.Optimizer,
}
AUTO_KEYS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""Keys that transformers fills in from the hidden size (integrations/deepspeed.py, trainer_config_finalize)."""
_DEFAULT_SEQUENCES = 16
"""Global batch when none is given, rounded up to a multiple of the ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything a backend or the planner needs."""

    shape: ModelShape
    recipe: Recipe
    cluster: Cluster
    fixed: Fixed
    """What the user decided; the rest is planned or tuned."""
    choice: Choice | None = None
    """One whole configuration: of a plan, of a DeepSpeed JSON, or of --stage; None asks for the ranking."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """DeepSpeed key -> user | auto | default | tuned."""

    bucket_rule: BucketRule = "engine"
    warnings: tuple[str, ...] = ()
    """What a DeepSpeed JSON says that has no effect, one line each."""

    def choice_or_refuse(self) -> Choice:
        """The configuration. Raises ConfigError when the flags name none."""
        if self.choice is None:
            raise ConfigError("no ZeRO stage given", because="one configuration has one stage", fix="--stage 2")
        return self.choice


def make_job(
    flags: Flags, *, probe_shape: Callable[[Path, str], ModelShape], probe_cluster: Callable[[], Cluster]
) -> Job:
    """Resolve the flags.

    Args:
        probe_shape: reads a config.json that no catalogue or cache knows (slow: imports torch).
        probe_cluster: looks at this machine; not called when the cluster is described.

    Raises:
        ConfigError: an unknown name, a value out of range, no model.
    """
    if flags.bucket_rule not in ("engine", "documented"):
        raise ConfigError(
            f"--bucket-rule is {flags.bucket_rule!r}", because="it is engine or documented", fix="--bucket-rule engine"
        )
    if flags.plan is not None:
        return _planned_job(flags, probe_shape, probe_cluster)
    if flags.model is None:
        raise ConfigError("no model given", because="the plan starts from the model's shape", fix="--model mistral-7b")
    shape = resolve_shape(flags.model, flags.set_model, probe_shape)
    cluster = resolve_cluster(flags, probe_cluster)
    recipe = resolve_recipe(flags, cluster)
    rule: BucketRule = "documented" if flags.bucket_rule == "documented" else "engine"
    job = Job(shape=shape, recipe=recipe, cluster=cluster, fixed=resolve_fixed(flags), bucket_rule=rule)
    if flags.ds_config is not None:
        return _described_job(flags, job)
    if flags.stage is None:
        return job
    return replace(job, choice=make_choice(shape, recipe, cluster, fixed=job.fixed), origins=_given_keys(job.fixed))


def _planned_job(
    flags: Flags, probe_shape: Callable[[Path, str], ModelShape], probe_cluster: Callable[[], Cluster]
) -> Job:
    """The plan's own question on this machine, or on the machine that the flags describe."""
    from zplan.files import load
    from zplan.plan import Plan

    assert flags.plan is not None
    plan = load(Plan, flags.plan)
    shape = resolve_shape(flags.model or plan.model_path, flags.set_model, probe_shape)
    cluster = resolve_cluster(flags, probe_cluster)
    recipe = resolve_recipe(flags, cluster, base=plan.recipe)
    return Job(
        shape=shape, recipe=recipe, cluster=cluster, fixed=resolve_fixed(flags), choice=plan.choice,
        origins=dict.fromkeys(_zero_keys(), "tuned"),
    )  # fmt: skip


def _described_job(flags: Flags, job: Job) -> Job:
    from zplan.ds_config import load_ds_config

    assert flags.ds_config is not None
    reading = load_ds_config(
        flags.ds_config, recipe=job.recipe, shape=job.shape, cluster=job.cluster, micro_batch=flags.micro_batch,
        gradient_checkpointing=flags.gradient_checkpointing,
    )  # fmt: skip
    return replace(
        job, recipe=reading.recipe, choice=reading.choice, origins=reading.origins, warnings=reading.warnings
    )


def _zero_keys() -> tuple[str, ...]:
    return tuple(item.name for item in fields(ZeroConfig))


def _given_keys(fixed: Fixed) -> dict[str, str]:
    """Where each DeepSpeed key of a configuration made from flags comes from."""
    origins = dict.fromkeys(_zero_keys(), "default")
    origins |= dict.fromkeys(AUTO_KEYS, "auto")
    for name in ("stage", "offload_optimizer", "offload_param"):
        if getattr(fixed, name) is not None:
            origins[name] = "user"
    for text in fixed.settings:
        origins[text.partition("=")[0].strip().partition(".")[0]] = "user"
    return origins


def resolve_shape(model: str, settings: list[str], probe_shape: Callable[[Path, str], ModelShape]) -> ModelShape:
    """The model's shape from catalogue, cache or config.json."""
    overrides = dict(_split_setting(text, "--set-model") for text in settings)
    found = find_model(model, overrides=overrides)
    return found if isinstance(found, ModelShape) else probe_shape(found, model)


def _split_setting(text: str, flag: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{flag} {text!r} is not KEY=VALUE", fix=f"{flag} hidden_size=4096")
    lowered = value.strip().lower()
    if lowered in ("true", "false"):
        return key.strip(), lowered == "true"
    try:
        return key.strip(), int(value)
    except ValueError:
        try:
            return key.strip(), float(value)
        except ValueError:
            return key.strip(), value.strip()


def resolve_cluster(flags: Flags, probe_cluster: Callable[[], Cluster]) -> Cluster:
    """A described cluster if --gpu is given, else this machine with the given parts replaced."""
    if flags.gpu is not None and flags.gpu != "cpu":
        return describe_cluster(
            load_gpu(flags.gpu),
            gpus_per_node=_at_least_one(flags.gpus_per_node, "--gpus-per-node") or 1,
            nodes=_at_least_one(flags.nodes, "--nodes") or 1,
            host_ram_bytes=parse_size(flags.host_ram, name="--host-ram") if flags.host_ram else None,
            nvme_bytes=parse_size(flags.nvme, name="--nvme") if flags.nvme else None,
        )
    cluster = probe_cluster()
    changes: dict[str, Any] = {}
    if flags.gpus_per_node:
        changes["gpus_per_node"] = _at_least_one(flags.gpus_per_node, "--gpus-per-node")
    if flags.nodes:
        changes["nodes"] = _at_least_one(flags.nodes, "--nodes")
    if flags.host_ram:
        ram = parse_size(flags.host_ram, name="--host-ram")
        changes["host"] = replace(cluster.host, total_bytes=ram, available_bytes=ram)
    if flags.nvme:
        host = changes.get("host", cluster.host)
        changes["host"] = replace(host, nvme_free_bytes=parse_size(flags.nvme, name="--nvme"))
    return replace(cluster, described=True, **changes) if changes else cluster


def _at_least_one(value: int | None, flag: str) -> int | None:
    if value is not None and not 1 <= value <= 1 << 20:
        raise ConfigError(f"{flag} is {value}, not between 1 and 2**20", fix=f"{flag} 8")
    return value


def resolve_recipe(flags: Flags, cluster: Cluster, base: Recipe | None = None) -> Recipe:
    """The recipe of the flags, over `base` (a plan's recipe) if there is one."""
    given = {name: getattr(flags, name) for name in _RECIPE_FLAGS if getattr(flags, name) is not None}
    for name in ("lora_target", "modules_to_save"):
        if getattr(flags, name):
            given[name] = tuple(getattr(flags, name))
    for name, allowed in _CHOICES.items():
        if name in given and given[name] not in get_args(allowed):
            raise ConfigError(
                f"--{name} is {given[name]!r}", because=f"it is one of {', '.join(get_args(allowed))}",
                fix=f"--{name} {get_args(allowed)[0]}",
            )  # fmt: skip
    if base is not None:
        return replace(base, **given)
    given.setdefault("dtype", default_dtype(cluster))
    given.setdefault("train_batch_size", ceil(_DEFAULT_SEQUENCES / cluster.world_size) * cluster.world_size)
    if "lora_r" in given:
        given.setdefault("lora_alpha", 2 * given["lora_r"])
    assert flags.model is not None
    return Recipe(model=absolute_if_path(flags.model), **_absolute_dataset(given))


def _absolute_dataset(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "dataset": absolute_if_path(given["dataset"])} if "dataset" in given else given


def absolute_if_path(name: str) -> str:
    """A path that exists becomes absolute, so that a plan works from any folder; a name stays a name."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def default_dtype(cluster: Cluster) -> str:
    """bf16 where the device computes in it; fp16 before Ampere; fp32 on CPU ranks (bf16 is emulated on most CPUs)."""
    if cluster.gpu.kind == "cpu":
        return "fp32"
    capability = cluster.gpu.compute_capability
    return "fp16" if capability is not None and float(capability) < 8.0 else "bf16"


def resolve_fixed(flags: Flags) -> Fixed:
    """The choices the user made."""
    return Fixed(
        stage=flags.stage,
        micro_batch=flags.micro_batch,
        gradient_checkpointing=flags.gradient_checkpointing,
        offload_optimizer=flags.offload_optimizer,
        offload_param=flags.offload_param,
        settings=tuple(flags.set_),
    )
