"""check_seams: the places in other libraries that the simulation holds on to, verified before it says a number."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from typing import Any

from zplan.simulate.collectives import COLLECTIVES
from zplan.simulate.report import SimulationError
from zplan.values import dataclass

VERIFIED = {
    "torch": "2.13",
    "deepspeed": "0.19",
    "transformers": "5.23",
    "trl": "1.16",
    "peft": "0.21",
    "accelerate": "1.15",
}
"""Release lines that the simulation was compared with real runs on (reports/simulated_vs_real.md)."""


@dataclass(frozen=True, slots=True)
class Seam:
    """One attribute that a patch replaces or the trainer calls."""

    module: str
    attribute: str
    parameters: tuple[str, ...] | None = None
    """Its leading parameters; None where it is no Python function."""


SEAMS = (
    Seam("torch.utils.backend_registration", "_setup_privateuseone_for_python_backend", ("rename", "backend_module")),
    Seam("torch._subclasses.fake_tensor", "FakeTensor.__new__", ("cls", "fake_mode_or_elem", "elem", "device")),
    Seam("torch._subclasses.fake_tensor", "FakeTensor._normalize_fake_device", ("device",)),
    Seam("torch._library.simple_registry", "find_torch_dispatch_rule", ("op", "torch_dispatch_class")),
    Seam("torch", "Tensor.data_ptr"),
    Seam("torch", "Tensor.detach"),
    Seam("torch", "Tensor.narrow"),
    Seam("torch", "Tensor.record_stream"),
    Seam("torch", "Tensor.pin_memory"),
    Seam("torch", "Tensor.is_pinned"),
    Seam("torch", "UntypedStorage.resize_"),
    Seam("torch", "Tensor._use_count"),
    Seam("torch._C", "_storage_Use_Count"),
    Seam("torch._prims_common", "is_non_overlapping_and_dense_or_false", ("a",)),
    Seam("torch.autograd.graph", "_engine_run_backward", ("t_outputs",)),
    Seam("torch.autograd.graph", "Node.register_prehook", ("self", "fn")),
    Seam("torch", "Tensor._post_accumulate_grad_hooks"),
    Seam("torch.autograd.function", "inspect"),
    Seam("torch.nn", "Module._apply", ("self", "fn", "recurse")),
    Seam("torch.nn.functional", "scaled_dot_product_attention"),
    Seam("torch.testing._internal.distributed.fake_pg", "FakeStore"),
    Seam("deepspeed.comm.torch", "TorchBackend.all_gather_into_tensor", ("self",)),
    Seam("deepspeed.comm.torch", "TorchBackend.reduce_scatter_tensor", ("self",)),
    Seam("deepspeed.comm.torch", "TorchBackend.all_reduce", ("self",)),
    Seam("deepspeed.comm.torch", "TorchBackend.broadcast", ("self",)),
    Seam("deepspeed.comm.comm", "cdb"),
    Seam("deepspeed.ops", "_probe_compatible_ops", ()),  # asking for __compatible_ops__ itself starts a compiler
    Seam("deepspeed.ops.op_builder.builder", "OpBuilder.load", ("self", "verbose")),
    Seam("deepspeed.ops.op_builder.builder", "OpBuilder.jit_load", ("self", "verbose")),
    Seam("deepspeed.ops.op_builder", "QuantizerBuilder"),
    Seam("deepspeed.runtime.zero.partition_parameters", "CUDAQuantizer.quantizer_cuda_module"),
    Seam("deepspeed.runtime.comm.coalesced_collectives", "quantizer_module"),
    Seam("cpuinfo", "get_cpu_info", ()),
    Seam("deepspeed.runtime.superoffload.superoffload_utils", "mp"),
    Seam(
        "deepspeed.runtime.superoffload.superoffload_utils",
        "SuperOffloadCPUOptimizer._set_cpu_affinity",
        ("self", "cpuadam_cores_perc"),
    ),
    Seam("deepspeed.runtime.superoffload.superoffload_stage3", "_validate_superoffload_accelerator", ()),
    Seam("deepspeed.utils.groups", "_init_tp_mesh_device", ("tensor_model_parallel_size", "data_parallel_size")),
    Seam("deepspeed.utils.groups", "_init_tp_groups_with_new_group"),
    Seam("deepspeed.sequence.layer", "_dim_zero_all_to_all_op"),
    Seam("deepspeed.runtime.zero.utils", "get_lst_from_rank0", ("lst",)),
    Seam("deepspeed.runtime.zero.utils", "assert_ints_same_as_other_ranks"),
    Seam("deepspeed.runtime.zero.utils", "assert_lst_len_same_as_other_ranks"),
    Seam("deepspeed.runtime.zero.partitioned_param_coordinator", "iter_params", ("module", "recurse")),
    Seam("deepspeed.runtime.zero.partitioned_param_coordinator", "z3_leaf_module", ("model",)),
    Seam(
        "deepspeed.runtime.zero.partitioned_param_coordinator",
        "PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release",
    ),
    Seam("deepspeed.runtime.zero.parameter_offload", "iter_params", ("module", "recurse")),
    Seam("deepspeed.utils.nvtx", "enable_nvtx"),
    Seam("deepspeed.runtime.engine", "DeepSpeedEngine._check_for_duplicates", ("self", "optimizer")),
    Seam("deepspeed.runtime.zero.partition_parameters", "_orig_torch_tensor"),
    Seam("deepspeed.runtime.zero.partition_parameters", "_orig_torch_empty"),
    Seam("deepspeed.accelerator.abstract_accelerator", "DeepSpeedAccelerator.pin_memory", ("self", "tensor")),
    Seam("transformers.utils.import_utils", "is_fake_tensor", ("x",)),
    Seam("transformers.initialization", "no_init_weights"),
    Seam("transformers", "Trainer.get_decay_parameter_names", ("self", "model")),
    Seam("trl", "SFTTrainer.compute_loss", ("self", "model", "inputs", "return_outputs", "num_items_in_batch")),
    Seam("trl.trainer.utils", "add_fused_lm_head", ("model",)),
    Seam("trl.trainer.utils", "_use_triton", ("device",)),
    Seam("trl.kernels.chunked_logprob", "_use_triton", ("device",)),
    Seam("trl.kernels.chunked_logprob", "_forward_kernel"),
    Seam("trl.kernels.chunked_logprob", "_backward_kernel"),
    Seam("trl.kernels.chunked_logprob", "_addmm_fp32", ("acc", "a", "b")),
    Seam("accelerate.utils.deepspeed", "map_pytorch_optim_to_deepspeed", ("optimizer",)),
)


def check_seams() -> None:
    """Verify every seam and every version.

    Raises:
        SimulationError: what moved, all of it at once.
    """
    problems = [
        *filter(None, map(_version_problem, VERIFIED)),
        *filter(None, map(_seam_problem, SEAMS)),
        *(f"TorchBackend.{name} is new, and may communicate uncounted" for name in _unknown_methods()),
    ]
    if problems:
        raise SimulationError(
            f"the simulation does not fit the installed libraries: {'; '.join(problems)}", cause="broken"
        )


SILENT = frozenset(
    {
        "has_all_gather_into_tensor", "has_reduce_scatter_tensor", "init_process_group", "batch_isend_irecv",
        "get_rank", "get_world_size", "is_initialized", "get_backend", "new_group", "get_global_rank",
        "get_world_group", "destroy_process_group", "init_device_mesh", "enable_symm_mem_for_group",
    }
)  # fmt: skip
"""Methods of TorchBackend that move nothing, or hand over to those of COLLECTIVES."""


def _unknown_methods() -> list[str]:
    """What DeepSpeed's backend can do that is neither counted nor known to be silent."""
    backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
    public = {name for name, value in vars(backend).items() if callable(value) and not name.startswith("_")}
    return sorted(public - SILENT - set(COLLECTIVES))


def _version_problem(package: str) -> str:
    installed = importlib.metadata.version(package)
    line = VERIFIED[package]
    same = installed == line or installed.startswith((f"{line}.", f"{line}+"))
    return "" if same else f"{package} is {installed}, verified with {line}"


def _seam_problem(seam: Seam) -> str:
    """Why a seam does not hold; empty when it does."""
    where = f"{seam.module}.{seam.attribute}"
    try:
        found: Any = importlib.import_module(seam.module)
        for part in seam.attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return f"{where} is gone"
    if seam.parameters is None:
        return ""
    parameters = tuple(inspect.signature(found).parameters)[: len(seam.parameters)]
    return "" if parameters == seam.parameters else f"{where} takes {parameters}, not {seam.parameters}"
