"""offload_param on NVMe: whether its buffers suffice for the parameters that are in host memory at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from zplan.autotp import cut_shape
from zplan.errors import ConfigError
from zplan.memory.estimate import course_of
from zplan.memory.fetch_limits import Limits
from zplan.memory.instances import Instances, instances
from zplan.memory.on_drive import moved_to_host, parts_on_drive
from zplan.memory.script import Script
from zplan.memory.shards import shard
from zplan.memory.swapping import Asked, buffers_used
from zplan.memory.trainable import Layout, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.values import dataclass
from zplan.zero_config import Choice


def refuse_swapping(shape: ModelShape, recipe: Recipe, choice: Choice, *, on_cpu: bool) -> None:
    """Refuse buffers of offload_param of which DeepSpeed asserts that there are more, or larger ones.

    Raises:
        ConfigError: naming what is enough.
    """
    param = choice.zero.offload_param
    if choice.zero.stage != 3 or param.device != "nvme":
        return
    swap = _Swap.of(shape, recipe, choice, on_cpu=on_cpu)
    if swap.largest > param.buffer_size:
        raise ConfigError(
            f"offload_param.buffer_size is {param.buffer_size}, and a rank's part of the largest parameter has"
            f" {swap.largest} elements",
            because="DeepSpeed asserts that a buffer holds it (partitioned_param_swapper.py, get_buffer)",
            fix=f"--set offload_param.buffer_size={swap.largest}",
        )
    short = swap.short(choice)
    if short is None:
        return
    raise ConfigError(
        f"offload_param.buffer_count is {param.buffer_count}: {short[0]} parameters are read at once where {short[1]}"
        " buffers are free",
        because="DeepSpeed asserts a buffer for each, and none twice (partitioned_param_swapper.py, swap_in)",
        fix=next(_mends(swap, choice)),
    )


def with_enough_buffers(
    shape: ModelShape, recipe: Recipe, choice: Choice, *, on_cpu: bool, given: Collection[str] = ()
) -> Choice:
    """The choice with as many buffers of offload_param, and as large ones, as DeepSpeed takes. Where no number is
    enough, nothing is read ahead: without it a module's parameters and those that are kept are all there is.

    Args:
        given: keys that are not to be changed.

    Raises:
        ConfigError: not without one of these.
    """
    if choice.zero.stage != 3 or choice.zero.offload_param.device != "nvme":
        return choice
    swap = _Swap.of(shape, recipe, choice, on_cpu=on_cpu)
    param = choice.zero.offload_param
    if "offload_param.buffer_size" not in given:
        param = replace(param, buffer_size=max(param.buffer_size, swap.largest))
    sized = replace(choice, zero=replace(choice.zero, offload_param=param))
    if "offload_param.buffer_count" not in given:
        zeros = [sized.zero]
        if PREFETCH not in given:
            zeros.append(replace(sized.zero, **{PREFETCH: 0}))  # type: ignore[arg-type]
        for zero in zeros:
            count = swap.enough(replace(sized, zero=zero))
            if count is not None:
                param = replace(param, buffer_count=count)
                return replace(sized, zero=replace(zero, offload_param=param))
    refuse_swapping(shape, recipe, sized, on_cpu=on_cpu)
    return sized


REUSE, PREFETCH = "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"


@dataclass(frozen=True, eq=False, slots=True)
class _Swap:
    """What a model swaps under a choice, and in which step."""

    laid: Layout
    items: Instances
    script: Script
    largest: int
    """Elements of the largest partition that is written."""

    @classmethod
    def of(cls, shape: ModelShape, recipe: Recipe, choice: Choice, *, on_cpu: bool) -> _Swap:
        shape = cut_shape(shape, choice.batch.autotp_size)
        laid = layout(shape, recipe)
        items = instances(laid)
        script = course_of(shape, recipe, laid, choice, on_cpu=on_cpu).script
        return cls(laid, items, script, max(parts_on_drive(items, choice).values(), default=0))

    def short(self, choice: Choice) -> tuple[int, int] | None:
        """(parameters that are read at once, buffers that are free then), where the choice's buffers do not suffice."""
        count = choice.zero.offload_param.buffer_count
        loading = read_while_loading(self.laid, self.items, parts_on_drive(self.items, choice))
        if loading > count:
            return loading, count
        return buffers_used(self.items, self.script, asked_of(self.items, choice), count).short

    def enough(self, choice: Choice) -> int | None:
        """The choice's number of buffers or a larger one with which DeepSpeed runs: what a step with too few would have
        taken, until one has enough; None if none was found."""
        loading = read_while_loading(self.laid, self.items, parts_on_drive(self.items, choice))
        count, asked = max(choice.zero.offload_param.buffer_count, loading), asked_of(self.items, choice)
        used = buffers_used(self.items, self.script, asked, count)
        while used.short is not None:
            if used.count == count:
                return None
            count = used.count
            used = buffers_used(self.items, self.script, asked, count)
        return count


def _mends(swap: _Swap, choice: Choice) -> Iterator[str]:
    """What helps alone, each tried."""
    count = swap.enough(choice)
    if count is not None:
        yield f"--set offload_param.buffer_count={count}"
    for keys in ((REUSE,), (PREFETCH,), (REUSE, PREFETCH)):
        zero = replace(choice.zero, **dict.fromkeys(keys, 0))  # type: ignore[arg-type]
        if swap.short(replace(choice, zero=zero)) is None:
            yield " ".join(f"--set {key}=0" for key in keys)
    yield "--offload-param cpu"


def read_while_loading(laid: Layout, items: Instances, on_drive: Iterable[int]) -> int:
    """Most that are gathered at once when weights are initialised: those of a module and of the modules in it.

    Source: transformers 5.23.0, integrations/deepspeed.py (initialize_weights_zero3).
    """
    counts, written = Counter[tuple[int, str]](), set(on_drive)
    for index, block in enumerate(laid.blocks):
        for local, weight in enumerate(block.weights):
            if items.base[index] + local in written and ".lora_" not in weight.name:
                module = weight.module.removesuffix(".base_layer")
                counts[index, module] += 1
                counts[index, module.rpartition(".")[0]] += bool(module)
    return max(counts.values(), default=0)


def asked_of(items: Instances, choice: Choice) -> Asked:
    """What a choice asks of its buffers in a step."""
    on_drive = parts_on_drive(items, choice)
    return Asked(
        limits=Limits.of(choice.zero), persistent=shard(items, choice.zero, choice.batch.zero_ranks).persistent,
        swapped=frozenset(on_drive) - moved_to_host(items, choice),
        accumulates=choice.batch.gradient_accumulation_steps > 1,
    )  # fmt: skip
