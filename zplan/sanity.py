"""Questions that can be computed and cannot be meant: refused, or answered with a warning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from zplan.candidates import Fixed
from zplan.combinations import offload_refused, refused_combinations
from zplan.errors import ConfigError
from zplan.hardware import Cluster
from zplan.memory.families import adapters_refused, leaf_refused
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.settings import setting_value, split_setting
from zplan.units import format_count, parse_size
from zplan.zero_config import Choice

BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")


def refuse_nvme_without_drive(cluster: Cluster, fixed: Fixed, choice: Choice | None) -> None:
    """Raises ConfigError when something is to go to an NVMe drive that the cluster does not have."""
    asked = [getattr(fixed, name) for name in ("offload_optimizer", "offload_param")]
    asked += [value for key, value in map(split_setting, fixed.settings) if key.endswith(".device")]
    if choice is not None and choice.zero.stage == 3:
        asked += [choice.zero.offload_optimizer.device, choice.zero.offload_param.device]
    if "nvme" in asked and not cluster.host.nvme_free_bytes:
        raise ConfigError(
            "offload to nvme, but the cluster has no NVMe drive",
            because="a machine is described with --nvme; this machine's current folder is looked at otherwise",
            fix="--nvme 2TiB",
        )


def refuse_adapters_of_experts(shape: ModelShape, recipe: Recipe, choice: Choice | None) -> None:
    """Raises ConfigError where PEFT does, or DeepSpeed in backward."""
    refused = adapters_refused(shape, recipe)
    if refused:
        what, _, why = refused.partition(": ")
        raise ConfigError(what, because=why, fix="--lora-target q_proj --lora-target v_proj")
    stopped = leaf_refused(shape, recipe, choice) if choice is not None else None
    if stopped:
        what, _, why = stopped.partition(": ")
        raise ConfigError(what, because=why, fix="--gradient-checkpointing")


def refuse_offload(cluster: Cluster, recipe: Recipe, choice: Choice | None) -> None:
    """Raises ConfigError where DeepSpeed's super_offload or partial offload does not run."""
    if choice is None:
        return
    refused = offload_refused(choice.zero, recipe.optimizer, on_cpu=cluster.gpu.kind == "cpu")
    if refused:
        what, _, why = refused.partition(": ")
        mend = "ratio=1" if what.startswith("offload_optimizer.ratio") else "super_offload=false"
        raise ConfigError(what, because=why, fix=f"--set offload_optimizer.{mend}")


def refuse_combinations(cluster: Cluster, choice: Choice | None) -> None:
    """Raises ConfigError for values that DeepSpeed refuses together, as a file with them is refused."""
    problems = tuple(refused_combinations(choice.zero, device_kind=cluster.gpu.kind)) if choice is not None else ()
    if problems:
        raise ConfigError(
            "DeepSpeed refuses this configuration", problems=problems, because="its engine asserts it",
            fix="mend the lines above with --set KEY=VALUE",
        )  # fmt: skip


def refuse_more_ranks_than_gpus(cluster: Cluster, fixed: Fixed) -> None:
    """Raises ConfigError for a number of ranks that was typed and that the cluster cannot seat."""
    settings = map(split_setting, fixed.settings)
    typed = [part for key, value in settings if key == "world_size" for part in value.replace("..", ",").split(",")]
    sizes = [parse_size(part.strip(), name="world_size") for part in typed]
    sizes += [fixed.world_size] if fixed.world_size is not None else []
    wrong = [size for size in sizes if not 1 <= size <= cluster.world_size]
    if wrong:
        raise ConfigError(
            f"world_size is {wrong[0]}, and the cluster has {cluster.world_size} ranks",
            because="a rank has a GPU of its own",
            fix=f"--set world_size={cluster.world_size}, or --gpus-per-node and --nodes for a larger cluster",
        )


def refuse_oversized_buckets(settings: Iterable[str], shape: ModelShape) -> None:
    """Raises ConfigError for a bucket that was typed and that the whole model cannot fill."""
    for key, value in map(setting_value, settings):
        if key in BUCKETS and value > shape.num_parameters:
            raise ConfigError(
                f"{key} is {value}, and {shape.name} has {shape.num_parameters} parameters",
                because="a bucket is allocated whole, in elements; what the model cannot fill is only lost",
                fix=f"--set {key}={shape.num_parameters}",
            )


def odd_sizes(shape: ModelShape, recipe: Recipe, choice: Choice | None) -> Iterator[str]:
    """What runs, or may run, and is probably a mistake; one line each."""
    if recipe.max_length > shape.max_position_embeddings > 0:
        yield f"max_length {recipe.max_length} is beyond the model's {shape.max_position_embeddings} positions"
    if choice is None or choice.zero.stage == 0:
        return
    bucket = choice.zero.reduce_bucket_size
    if bucket > shape.num_parameters:
        yield (
            f"reduce_bucket_size {bucket} is larger than the model ({format_count(shape.num_parameters)} parameters):"
            " it is allocated whole and never filled"
        )
