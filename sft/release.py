"""What ZeRO-3 may release after a module, found without a search through the whole step for each of them."""

from __future__ import annotations

from deepspeed.runtime.zero import partitioned_param_coordinator as engine

from sft.software import is_read_deepspeed
from zplan import zero3_trace

params_to_release = zero3_trace.params_to_release(
    vars(engine.PartitionedParameterCoordinator).get(zero3_trace.METHOD), engine.iter_params
)


def is_quick() -> bool:
    """Whether the search costs a step nothing that could be felt."""
    return is_read_deepspeed()


def quicken_release() -> None:
    """Put `params_to_release` into DeepSpeed's engine; trials and trainings do this alike."""
    if is_quick():
        setattr(engine.PartitionedParameterCoordinator, zero3_trace.METHOD, params_to_release)
