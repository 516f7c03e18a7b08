"""Every change that the simulation makes to other libraries: in one place, one line of reason each, undone on exit."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from zplan.simulate.collectives import COLLECTIVES, Agreement, CollectiveRecorder, counted_exchange, finished
from zplan.simulate.device import DEVICE
from zplan.simulate.fake_tensors import (
    PositionalSignature,
    copied_parameter,
    data_property,
    detach_of,
    distinct_data_ptr,
    empty_constructor,
    fake_tensor_constructor,
    getitem_of,
    is_pinned_of,
    module_apply,
    narrow_of,
    pin_memory_of,
    tensor_constructor,
    tracked_resize,
)
from zplan.simulate.listing import counted_parameters, listed_parameters
from zplan.simulate.ops import StandInBuilder, StandInOp
from zplan.simulate.optimizer_process import OptimizerProcesses, spawned
from zplan.simulate.tracker import Tracker
from zplan.zero3_trace import METHOD, params_to_release

aten = torch.ops.aten
MISSING = object()


class Patches:
    """Replaced attributes, restored in reverse order on exit."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self.applied: list[tuple[Any, str]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        before = vars(owner).get(name, MISSING)
        self._undo.callback(delattr, owner, name) if before is MISSING else self._undo.callback(
            setattr, owner, name, before
        )
        setattr(owner, name, value)
        self.applied.append((owner, name))

    def __enter__(self) -> Patches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()


def install_fake_tensor_patches(patches: Patches, tracker: Tracker) -> None:
    """What fake tensors lack to live through DeepSpeed."""
    # with a device's own dispatch keys, `.data =` could not move a parameter between host and device
    patches.set(FakeTensor, "__new__", fake_tensor_constructor)
    # torch looks for a rule of each operation under each mode, in three calls; there is none for the tracker
    registry = importlib.import_module("torch._library.simple_registry")
    patches.set(registry, "find_torch_dispatch_rule", _dispatch_rule(registry.find_torch_dispatch_rule))
    # torch swaps `.data` without the fake device, and DeepSpeed moves every parameter by `.data =`
    patches.set(torch.Tensor, "data", data_property(tracker))
    # a third of a run's operations, and the way through the dispatcher costs more than they do
    patches.set(torch.Tensor, "detach", detach_of(tracker))
    patches.set(torch.Tensor, "narrow", narrow_of(tracker))
    install_resize_tracking(patches, tracker)
    # DeepSpeed keys parameters by address and asserts alignment; a fake tensor has no address
    patches.set(torch.Tensor, "data_ptr", distinct_data_ptr())
    # no stream ever delays a free here
    patches.set(torch.Tensor, "record_stream", lambda self, stream: None)
    # a build without CUDA cannot pin; the tracker keeps which bytes are pinned
    patches.set(torch.Tensor, "pin_memory", pin_memory_of(tracker))
    patches.set(torch.Tensor, "is_pinned", is_pinned_of(tracker))
    # torch refuses `.data =` and swap_tensors on fake parameters, where real ones keep their identity
    patches.set(torch.nn.Module, "_apply", module_apply)
    # torch copies any other tensor with all that hangs on it, of a parameter the values alone (PEFT: modules_to_save)
    patches.set(FakeTensor, "__deepcopy__", copied_parameter)
    # data from Python goes through a real CPU tensor, which a device without kernels cannot take
    constructor = tensor_constructor(torch.tensor)
    # torch notes once what `with torch.device(...)` moves, and would note the functions set below instead of its own
    torch.utils._device._device_constructors()
    patches.set(torch, "tensor", constructor)
    patches.set(torch, "empty", empty_constructor(torch.empty, tracker))
    partition = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    # a list of positions goes to the tensor's device below all dispatch, where a simulated device has no kernels
    patches.set(torch.Tensor, "__getitem__", getitem_of(torch.Tensor.__getitem__, tracker))
    # zero.Init restores these two on exit
    patches.set(partition, "_orig_torch_tensor", constructor)
    patches.set(partition, "_orig_torch_empty", torch.empty)
    # transformers takes a fake tensor for a sign of tracing and then builds masks that training does not build
    patches.set(importlib.import_module("transformers.utils.import_utils"), "is_fake_tensor", lambda x: False)


def _dispatch_rule(original: Callable[[Any, type], Any]) -> Callable[[Any, type], Any]:
    return lambda operation, mode: None if mode is Tracker else original(operation, mode)


def install_resize_tracking(patches: Patches, tracker: Tracker) -> None:
    """The one allocation that is not dispatched, on real and on fake tensors."""
    # resizing a storage is not dispatched, so the tracker would miss it
    patches.set(torch.UntypedStorage, "resize_", tracked_resize(tracker))


def install_gpu_patches(patches: Patches, tracker: Tracker) -> None:
    """Choices that libraries make by asking for a device called "cuda"."""
    # the kernel that CUDA would choose; the choice for other devices is the math kernel
    patches.set(F, "scaled_dot_product_attention", _attention(F.scaled_dot_product_attention))
    chunked = importlib.import_module("trl.kernels.chunked_logprob")
    # TRL takes its Triton kernels on CUDA only; they work in place and allocate nothing
    for name in ("trl.kernels.chunked_logprob", "trl.trainer.utils"):
        patches.set(importlib.import_module(name), "_use_triton", lambda device: device.type == DEVICE)
    patches.set(chunked, "_forward_kernel", InPlaceKernel())
    patches.set(chunked, "_backward_kernel", InPlaceKernel())
    patches.set(chunked, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)))
    # addmm into float32 is one cuBLAS call on CUDA and two casts elsewhere
    patches.set(chunked, "_addmm_fp32", _addmm_fp32(tracker))


def install_process_patches(patches: Patches, processes: OptimizerProcesses) -> None:
    """SuperOffload on simulated GPUs."""
    utils = importlib.import_module("deepspeed.runtime.superoffload.superoffload_utils")
    # its worker would be spawned, and a tensor without memory cannot be sent there
    patches.set(utils, "mp", spawned(processes))
    # it would pin this process to some of the cores
    patches.set(utils.SuperOffloadCPUOptimizer, "_set_cpu_affinity", lambda self, cpuadam_cores_perc: None)
    # it asks for a device called "cuda"
    stage3 = importlib.import_module("deepspeed.runtime.superoffload.superoffload_stage3")
    patches.set(stage3, "_validate_superoffload_accelerator", lambda: None)


def install_deepspeed_patches(patches: Patches, recorder: CollectiveRecorder) -> None:
    """DeepSpeed's collectives, compiled ops and cross-rank checks."""
    backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
    for name in COLLECTIVES:
        if hasattr(backend, name):
            patches.set(backend, name, recorder.instead_of(name))
    builder = importlib.import_module("deepspeed.ops.op_builder.builder").OpBuilder
    # compiled kernels dereference addresses
    patches.set(builder, "load", lambda self, verbose=True: StandInOp(self.name))
    patches.set(builder, "jit_load", lambda self, verbose=True: StandInOp(self.name))
    # taken for the accelerator at import, when it was the CPU's, which has none
    patches.set(
        importlib.import_module("deepspeed.ops.op_builder"), "QuantizerBuilder", lambda: StandInBuilder("quantizer")
    )
    # both keep the quantizer that they have loaded once
    partition = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    patches.set(partition.CUDAQuantizer, "quantizer_cuda_module", None)
    patches.set(importlib.import_module("deepspeed.runtime.comm.coalesced_collectives"), "quantizer_module", None)
    # the probe of every op starts compilers
    patches.set(importlib.import_module("deepspeed.ops"), "__compatible_ops__", {})
    # CPU Adam asks for the vendor, to warn of fp16 on AMD; the answer takes three processes
    patches.set(importlib.import_module("cpuinfo"), "get_cpu_info", dict)
    # marks for a profiler that is not there, around 100,000 calls
    patches.set(importlib.import_module("deepspeed.utils.nvtx"), "enable_nvtx", False)
    # the same parameters of the same modules are listed for each release up to the reuse distance, 700,000 times
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    listed = listed_parameters(coordinator.iter_params)
    for owner in (coordinator, importlib.import_module("deepspeed.runtime.zero.parameter_offload")):
        patches.set(owner, "iter_params", listed)
        # asked as often; nn.Module answers hasattr by an exception
        patches.set(owner, "z3_leaf_module", lambda module: module.__dict__.get("_z3_leaf", False))
    # every parameter is looked for in a list of all that the optimizer has
    engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    patches.set(engine, "_check_for_duplicates", counted_parameters(engine._check_for_duplicates))
    # what a module may release is looked up among all modules of the reuse distance, for each module anew
    owner = coordinator.PartitionedParameterCoordinator
    patches.set(owner, METHOD, params_to_release(vars(owner)[METHOD], listed))
    # torch reads the signature of an autograd function anew at each of its calls
    patches.set(torch.autograd.function, "inspect", SimpleNamespace(signature=functools.cache(PositionalSignature)))
    # fake tensors run the exchange's rule of shapes, which communicates nothing
    layer = importlib.import_module("deepspeed.sequence.layer")
    patches.set(layer, "_dim_zero_all_to_all_op", counted_exchange(layer._dim_zero_all_to_all_op, recorder))
    # a mesh of ranks is a tensor, and a fake one has no values
    groups = importlib.import_module("deepspeed.utils.groups")
    patches.set(groups, "_init_tp_mesh_device", groups_without_mesh(groups))
    zero_utils = importlib.import_module("deepspeed.runtime.zero.utils")
    # rank 0 would compare its own values with what it received from itself; the broadcasts are counted
    agreement = Agreement(recorder)
    patches.set(zero_utils, "get_lst_from_rank0", agreement.from_rank0)
    for module in ("stage3", "partition_parameters", "partitioned_param_coordinator", "utils"):
        owner = importlib.import_module(f"deepspeed.runtime.zero.{module}")
        for check, answer in (
            ("assert_ints_same_as_other_ranks", agreement.on_ints),
            ("assert_lst_len_same_as_other_ranks", agreement.on_length),
        ):
            if check in vars(owner):
                patches.set(owner, check, answer)


def groups_without_mesh(groups: Any) -> Callable[..., Any]:
    """DeepSpeed's own second way to the groups of AutoTP (utils/groups.py, _init_tp_mesh_device)."""

    def init(tensor_model_parallel_size: int = 1, data_parallel_size: int | None = None) -> Any:
        if groups._TENSOR_MODEL_PARALLEL_GROUP is not None:
            return None
        sizes = data_parallel_size or torch.distributed.get_world_size() // tensor_model_parallel_size
        return groups._init_tp_groups_with_new_group(tensor_model_parallel_size, sizes)

    return init


def install_recorder(patches: Patches, recorder: CollectiveRecorder) -> None:
    """The real counterpart: collectives run, and are counted."""
    # the probe of every op starts compilers
    patches.set(importlib.import_module("deepspeed.ops"), "__compatible_ops__", {})
    backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
    for name in COLLECTIVES:
        if name in vars(backend):
            patches.set(backend, name, recorder.around(name, getattr(backend, name)))
    # the loss of shared sequences is gathered past DeepSpeed (torch.distributed.nn.functional)
    for name in ("all_gather", "scatter"):
        patches.set(torch.distributed, name, finished(getattr(torch.distributed, name)))


class InPlaceKernel:
    """A Triton kernel that writes where it is told and allocates nothing: `kernel[grid](...)`."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _addmm_fp32(tracker: Tracker) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    def addmm(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        tracker.count_flops(2 * a.numel() * b.shape[-1])

    return addmm


def _attention(original: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own order on CUDA: flash for half precision without a mask, memory-efficient next, math last.

    Source: torch 2.13, aten/native/transformers/cuda/sdp_utils.cpp (select_sdp_backend).
    """

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        half = query.dtype in (torch.float16, torch.bfloat16)
        dims = {query.shape[-1], key.shape[-1], value.shape[-1]}
        if half and attn_mask is None and len(dims) == 1 and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale
            )[0]
        if not enable_gqa:
            needs_gradient = query.requires_grad or key.requires_grad or value.requires_grad
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
            )[0]
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    return attention
