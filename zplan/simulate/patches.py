"""Every change that the simulation makes to other libraries: in one place, one line of reason each, undone on exit."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from zplan.simulate.collectives import COLLECTIVES, Agreement, CollectiveRecorder, counted_exchange, finished
from zplan.simulate.device import DEVICE
from zplan.simulate.dispatch_cache import forget_layout, new_fake_tensor
from zplan.simulate.ops import StandInBuilder, StandInOp
from zplan.simulate.optimizer_process import OptimizerProcesses, spawned
from zplan.simulate.tracker import Tracker

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
    patches.set(FakeTensor, "__new__", _new_fake_tensor)
    # torch looks for a rule of each operation under each mode, in three calls; there is none for the tracker
    registry = importlib.import_module("torch._library.simple_registry")
    patches.set(registry, "find_torch_dispatch_rule", _dispatch_rule(registry.find_torch_dispatch_rule))
    # torch swaps `.data` without the fake device, and DeepSpeed moves every parameter by `.data =`
    patches.set(torch.Tensor, "data", _data_property())
    install_resize_tracking(patches, tracker)
    # DeepSpeed keys parameters by address and asserts alignment; a fake tensor has no address
    patches.set(torch.Tensor, "data_ptr", _distinct_data_ptr())
    # no stream ever delays a free here
    patches.set(torch.Tensor, "record_stream", lambda self, stream: None)
    # a build without CUDA cannot pin; the tracker keeps which bytes are pinned
    patches.set(torch.Tensor, "pin_memory", _pin_memory(tracker))
    patches.set(torch.Tensor, "is_pinned", _is_pinned(tracker))
    # torch refuses `.data =` and swap_tensors on fake parameters, where real ones keep their identity
    patches.set(torch.nn.Module, "_apply", _module_apply)
    # data from Python goes through a real CPU tensor, which a device without kernels cannot take
    constructor = _tensor_constructor(torch.tensor)
    patches.set(torch, "tensor", constructor)
    patches.set(torch, "empty", _empty_constructor(torch.empty, tracker))
    partition = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    # a list of positions goes to the tensor's device below all dispatch, where a simulated device has no kernels
    patches.set(torch.Tensor, "__getitem__", _getitem(torch.Tensor.__getitem__))
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
    patches.set(torch.UntypedStorage, "resize_", _tracked_resize(tracker))


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
    # what a module may release is looked up among all modules of the reuse distance, also where it is nothing
    owner, name = coordinator.PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release"
    patches.set(owner, name, params_to_release(vars(owner)[name], listed))
    # torch reads the signature of an autograd function anew at each of its calls
    patches.set(torch.autograd.function, "inspect", SimpleNamespace(signature=functools.cache(inspect.signature)))
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


def listed_parameters(original: Callable[..., Any]) -> Callable[..., tuple[torch.nn.Parameter, ...]]:
    """DeepSpeed's iter_params (runtime/zero/partitioned_param_coordinator.py), asked once for each module.

    The engine registers no parameter after its start but external ones, which appear at the first use: a module is
    listed again when their number has changed.
    """
    own: dict[torch.nn.Module, tuple[int, tuple[torch.nn.Parameter, ...]]] = {}
    with_children: dict[torch.nn.Module, tuple[int, tuple[torch.nn.Parameter, ...]]] = {}

    def iter_params(module: torch.nn.Module, recurse: bool = False) -> tuple[torch.nn.Parameter, ...]:
        listed = with_children if recurse else own
        found = listed.get(module)
        external = len(module.__dict__.get("_external_params", ()))
        if found is None or found[0] != external:
            found = listed[module] = (external, tuple(original(module, recurse=recurse)))
        return found[1]

    return iter_params


def params_to_release(original: Callable[..., set[int]], listed: Callable[..., Any]) -> Callable[..., set[int]]:
    """DeepSpeed's `__params_to_release` (runtime/zero/partitioned_param_coordinator.py) without a search for nothing.

    It starts from the module's parameters that do not persist and only ever discards some. Like the original it gives
    the same set for the same question, because the caller adds to it.
    """

    @functools.cache
    def params_to_release(coordinator: Any, submodule: torch.nn.Module, step_id: int) -> set[int]:
        parameters = listed(submodule, recurse=submodule.__dict__.get("_z3_leaf", False))
        if coordinator.is_complete_trace() and all(parameter.ds_persist for parameter in parameters):
            return set()
        return original(coordinator, submodule, step_id)

    return params_to_release


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


def _new_fake_tensor(
    cls: type[FakeTensor], fake_mode: Any, elem: torch.Tensor, device: torch.device, constant: Any = None,
    real_tensor: Any = None, pytype: Any = None, dispatch_keys: Any = None, *,
    requires_grad: bool | None = None, _is_param: bool = False,
) -> FakeTensor:  # fmt: skip
    """FakeTensor.__new__ with the CPU's dispatch keys on every device."""
    made: FakeTensor = new_fake_tensor(
        elem, fake_mode, FakeTensor._normalize_fake_device(device),
        elem.requires_grad if requires_grad is None else requires_grad,
    )  # fmt: skip
    made.constant = constant
    made.pytype = pytype
    made.dispatch_keys = dispatch_keys
    if _is_param:
        made._is_param = _is_param
    return made


def _data_property() -> property:
    base: Any = torch._C.TensorBase.data

    def set_data(self: torch.Tensor, value: torch.Tensor) -> None:
        base.__set__(self, value)
        forget_layout(self)
        if isinstance(self, FakeTensor) and isinstance(value, FakeTensor):
            self.fake_device = value.fake_device
            self.constant = None

    return property(lambda self: base.__get__(self), set_data)


def _tracked_resize(tracker: Tracker) -> Callable[..., Any]:
    original = torch.UntypedStorage.resize_

    def resize_(self: torch.UntypedStorage, size: int) -> Any:
        out = original(self, size)
        tracker.resized(self)
        return out

    return resize_


def _distinct_data_ptr() -> Callable[[torch.Tensor], int]:
    original = torch.Tensor.data_ptr

    def data_ptr(self: torch.Tensor) -> int:
        if not isinstance(self, FakeTensor):
            return original(self)
        storage = self.untyped_storage()
        return storage._cdata * 4096 + self.storage_offset() * self.element_size() if storage.nbytes() else 0

    return data_ptr


def _pin_memory(tracker: Tracker) -> Callable[..., torch.Tensor]:
    original = torch.Tensor.pin_memory

    def pin_memory(self: torch.Tensor, *args: Any) -> torch.Tensor:
        if not isinstance(self, FakeTensor):
            return original(self, *args)
        return self if tracker.is_pinned(self) else tracker.pinned_empty(tuple(self.shape), self.dtype)

    return pin_memory


def _is_pinned(tracker: Tracker) -> Callable[..., bool]:
    original = torch.Tensor.is_pinned

    def is_pinned(self: torch.Tensor, *args: Any) -> bool:
        return tracker.is_pinned(self) if isinstance(self, FakeTensor) else original(self, *args)

    return is_pinned


def _module_apply(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    if recurse:
        for child in self.children():
            child._apply(fn)  # type: ignore[no-untyped-call]
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = fn(parameter)
                if parameter.grad is not None:
                    parameter.grad.data = fn(parameter.grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _on_simulated_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def _tensor_constructor(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Any:
        if not _on_simulated_device(device):
            return original(data, dtype=dtype, device=device, requires_grad=requires_grad, **kwargs)
        if isinstance(data, torch.Tensor):
            return data.detach().to(device=device, dtype=dtype or data.dtype)
        values = np.asarray(data)
        inferred = {"f": torch.get_default_dtype(), "i": torch.int64, "b": torch.bool}[values.dtype.kind]
        return torch.empty(values.shape, dtype=dtype or inferred, device=device, requires_grad=requires_grad)

    return tensor


def _getitem(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def getitem(self: torch.Tensor, item: Any) -> torch.Tensor:
        if type(item) is tuple and any(type(part) is list for part in item) and _on_simulated_device(self.device):
            item = tuple(torch.tensor(p, device=self.device) if type(p) is list else p for p in item)
        elif type(item) is list and _on_simulated_device(self.device):
            item = torch.tensor(item, device=self.device)
        return original(self, item)

    return getitem


def _empty_constructor(original: Callable[..., torch.Tensor], tracker: Tracker) -> Callable[..., torch.Tensor]:
    def empty(*size: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if not pin_memory:
            return original(*size, **kwargs)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return tracker.pinned_empty(tuple(shape), kwargs.get("dtype") or torch.get_default_dtype())

    return empty


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
