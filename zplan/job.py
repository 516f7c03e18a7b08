"""The flags of one command as values: which model, which recipe, which cluster, which choices are already made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, replace
from math import ceil
from pathlib import Path
from typing import Any, cast, get_args

from zplan import recipe as recipe_module
from zplan.autotp import refuse_uncut_loss
from zplan.candidates import is_choice_setting, lift_settings, splits
from zplan.catalog import find_model, load_gpu
from zplan.catalog.config_file import SIZES
from zplan.errors import ConfigError
from zplan.hardware import DESCRIBED_NVME, Cluster
from zplan.memory.estimate import BucketRule
from zplan.memory.families import default_attention
from zplan.model_shape import ModelShape
from zplan.options import Flags
from zplan.overrides import fixed_by_file, over_file, over_plan
from zplan.planner import Fixed, make_choice
from zplan.probe import describe_cluster
from zplan.recipe import Recipe
from zplan.sanity import (
    odd_sizes,
    refuse_adapters_of_experts,
    refuse_combinations,
    refuse_more_ranks_than_gpus,
    refuse_nvme_without_drive,
    refuse_offload,
    refuse_oversized_buckets,
)
from zplan.sequence import lost_masks, refuse_unshareable
from zplan.settings import gives_one_value, split_setting
from zplan.units import GIB, parse_size
from zplan.values import dataclass
from zplan.zero_config import Choice, OffloadDevice, ZeroConfig

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
    if flags.plan is not None and flags.ds_config is not None:
        raise ConfigError(
            "--plan and --ds-config are both given", because="each decides the choice", fix="leave one out"
        )
    if flags.plan is not None:
        return _planned_job(flags, probe_shape, probe_cluster)
    if flags.model is None:
        raise ConfigError("no model given", because="the plan starts from the model's shape", fix="--model mistral-7b")
    shape = resolve_shape(flags.model, flags.set_model, probe_shape)
    cluster = resolve_cluster(flags, probe_cluster)
    recipe = resolve_recipe(flags, cluster)
    if flags.attention is None:
        recipe = replace(recipe, attention=default_attention(shape.model_type))
    job = Job(shape=shape, recipe=recipe, cluster=cluster, fixed=resolve_fixed(flags), bucket_rule=_bucket_rule(flags))
    refuse_more_ranks_than_gpus(cluster, job.fixed)
    single = [text for text in flags.set_ if gives_one_value(text) and not is_choice_setting(text)]
    refuse_oversized_buckets(single, shape)
    if flags.ds_config is not None:
        return _checked(_described_job(flags, job))
    job = replace(job, origins=_given_keys(job.fixed))
    if flags.stage is None:
        return _checked(job)
    return _checked(replace(job, choice=make_choice(shape, recipe, cluster, fixed=job.fixed)))


def _checked(job: Job) -> Job:
    """The job with warnings about what is probably a mistake. Raises ConfigError for what cannot be meant."""
    refuse_nvme_without_drive(job.cluster, job.fixed, job.choice)
    refuse_adapters_of_experts(job.shape, job.recipe, job.choice)
    refuse_offload(job.cluster, job.recipe, job.choice)
    refuse_combinations(job.cluster, job.choice)
    if job.choice and job.choice.zero.offload_param.device == "nvme":
        from zplan.memory.swap_in import refuse_swapping

        refuse_swapping(job.shape, job.recipe, job.choice, on_cpu=job.cluster.gpu.kind == "cpu")
    split = splits(job.fixed)
    if job.choice:
        split = {name: getattr(job.choice.batch, name) for name in split}
    shared = split["sequence_parallel_size"]
    refuse_unshareable(job.shape, job.recipe, shared)
    refuse_uncut_loss(job.shape, job.recipe, split["autotp_size"])
    odd = (*odd_sizes(job.shape, job.recipe, job.choice), *lost_masks(job.shape, job.recipe, shared))
    return replace(job, warnings=(*job.warnings, *odd))


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
    fixed = lift_settings(resolve_fixed(flags))
    refuse_more_ranks_than_gpus(cluster, fixed)
    job = Job(
        shape=shape, recipe=recipe, cluster=cluster, fixed=fixed, choice=over_plan(plan.choice, fixed, recipe),
        origins=dict.fromkeys(_zero_keys(), "tuned") | _given_keys(fixed), bucket_rule=_bucket_rule(flags),
        warnings=tuple(_moved(plan.cluster, cluster)),
    )  # fmt: skip
    return _checked(job)


def _moved(planned: Cluster, found: Cluster) -> Iterator[str]:
    """What differs between the machine that a plan was made for and the one it is asked about."""
    for what, old, new in (
        ("GPU", planned.gpu.name, found.gpu.name),
        ("ranks", planned.world_size, found.world_size),
        ("nodes", planned.nodes, found.nodes),
    ):
        if old != new:
            yield f"the plan was made for another machine: {what} {old} there, {new} here"


def _described_job(flags: Flags, job: Job) -> Job:
    from zplan.ds_config import read_ds_config
    from zplan.files import load_json

    assert flags.ds_config is not None
    fixed = lift_settings(job.fixed)
    twice: list[str] = []
    data = over_file(load_json(flags.ds_config, on_duplicate=twice.append), fixed, given_recipe(flags))
    reading = read_ds_config(
        data, recipe=job.recipe, shape=job.shape, cluster=job.cluster, micro_batch=fixed.micro_batch,
        gradient_checkpointing=fixed.gradient_checkpointing, name=flags.ds_config,
    )  # fmt: skip
    return replace(
        job, recipe=reading.recipe, choice=reading.choice, origins=reading.origins,
        fixed=fixed_by_file(reading.choice, reading.origins, fixed),
        warnings=(*(f"{key} is written twice: the last one counts" for key in twice), *reading.warnings),
    )  # fmt: skip


def _zero_keys() -> tuple[str, ...]:
    return tuple(item.name for item in fields(ZeroConfig))


def _given_keys(fixed: Fixed) -> dict[str, str]:
    """The DeepSpeed keys that flags decide, offload devices as `offload_param.device`."""
    origins = {}
    for name in ("stage", "offload_optimizer", "offload_param"):
        if getattr(fixed, name) is not None:
            origins[name if name == "stage" else f"{name}.device"] = "user"
    return origins | {split_setting(text)[0]: "user" for text in fixed.settings}


def _bucket_rule(flags: Flags) -> BucketRule:
    if flags.bucket_rule not in get_args(BucketRule):
        raise ConfigError(
            f"--bucket-rule is {flags.bucket_rule!r}", because="it is engine or documented", fix="--bucket-rule engine"
        )
    return cast(BucketRule, flags.bucket_rule)


def resolve_shape(model: str, settings: list[str], probe_shape: Callable[[Path, str], ModelShape]) -> ModelShape:
    """The model's shape from catalogue, cache or config.json."""
    overrides = dict(_split_setting(text, "--set-model") for text in settings)
    found = find_model(model, overrides=overrides)
    return found if isinstance(found, ModelShape) else probe_shape(found, model)


def _split_setting(text: str, flag: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{flag} {text!r} is not KEY=VALUE", fix=f"{flag} hidden_size=4096")
    key, value = key.strip(), value.strip()
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    for read in (int, float):
        try:
            number = read(value)
        except ValueError:
            continue
        return key, int(number) if key in SIZES and float(number).is_integer() else number
    return key, value


def resolve_cluster(flags: Flags, probe_cluster: Callable[[], Cluster]) -> Cluster:
    """A described cluster if --gpu is given, else this machine with the given parts replaced."""
    per_node, nodes = _at_least_one(flags.gpus_per_node, "--gpus-per-node"), _at_least_one(flags.nodes, "--nodes")
    ram = _memory(flags.host_ram, "--host-ram")
    nvme = parse_size(flags.nvme, name="--nvme") if flags.nvme else None
    if flags.gpu is not None and flags.gpu != "cpu":
        return describe_cluster(
            load_gpu(flags.gpu), gpus_per_node=per_node or 1, nodes=nodes or 1, host_ram_bytes=ram, nvme_bytes=nvme
        )
    cluster = probe_cluster()
    host = cluster.host
    if ram is not None:
        host = replace(host, total_bytes=ram, available_bytes=ram, cgroup_limit_bytes=None)
    if nvme is not None:
        host = replace(host, nvme_free_bytes=nvme, nvme_path=host.nvme_path or DESCRIBED_NVME)
    changed = replace(cluster, host=host, gpus_per_node=per_node or cluster.gpus_per_node, nodes=nodes or cluster.nodes)
    return cluster if changed == cluster else replace(changed, described=True)


def _memory(text: str | None, flag: str) -> int | None:
    """Bytes of a memory size that has to be there: at least a GiB."""
    size = parse_size(text, name=flag) if text is not None else None
    if size is not None and size < GIB:
        raise ConfigError(
            f"{flag} is {text}, below 1 GiB", because="the number is bytes, with or without a unit", fix=f"{flag} 64GiB"
        )
    return size


def _at_least_one(value: int | None, flag: str) -> int | None:
    if value is not None and not 1 <= value <= 1 << 20:
        raise ConfigError(f"{flag} is {value}, not between 1 and 2**20", fix=f"{flag} 8")
    return value


def given_recipe(flags: Flags) -> dict[str, Any]:
    """The recipe flags that were typed, by the name of their field."""
    given = {name: getattr(flags, name) for name in _RECIPE_FLAGS if getattr(flags, name) is not None}
    return given | {
        name: tuple(getattr(flags, name)) for name in ("lora_target", "modules_to_save") if getattr(flags, name)
    }


def resolve_recipe(flags: Flags, cluster: Cluster, base: Recipe | None = None) -> Recipe:
    """The recipe of the flags, over `base` (a plan's recipe) if there is one."""
    given = given_recipe(flags)
    for name, allowed in _CHOICES.items():
        if name in given and given[name] not in get_args(allowed):
            raise ConfigError(
                f"--{name} is {given[name]!r}", because=f"it is one of {', '.join(get_args(allowed))}",
                fix=f"--{name} {get_args(allowed)[0]}",
            )  # fmt: skip
    if base is not None:
        model = absolute_if_path(flags.model) if flags.model is not None else base.model
        return replace(base, **_absolute_dataset(given), model=model)
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
    """The choices the user made. Raises ConfigError for a micro-batch or a device that there is not."""
    _at_least_one(flags.micro_batch, "--micro-batch")
    for flag, device in (("--offload-optimizer", flags.offload_optimizer), ("--offload-param", flags.offload_param)):
        if device is not None and device not in get_args(OffloadDevice):
            raise ConfigError(f"{flag} is {device!r}", because="it is none, cpu or nvme", fix=f"{flag} cpu")
    return Fixed(
        stage=flags.stage,
        micro_batch=flags.micro_batch,
        gradient_checkpointing=flags.gradient_checkpointing,
        offload_optimizer=flags.offload_optimizer,
        offload_param=flags.offload_param,
        settings=tuple(flags.set_),
    )
