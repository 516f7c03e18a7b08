"""What stands in for torch's own methods, so that fake tensors live through DeepSpeed, and at little cost."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from zplan.simulate.device import DEVICE
from zplan.simulate.dispatch_cache import forget_layout, new_fake_tensor
from zplan.simulate.tracker import Tracker


def fake_tensor_constructor(
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


def data_property(tracker: Tracker) -> property:
    base: Any = torch._C.TensorBase.data

    def get_data(self: torch.Tensor) -> Any:
        alias = tracker.detached(self)
        return base.__get__(self) if alias is None else alias

    def set_data(self: torch.Tensor, value: torch.Tensor) -> None:
        base.__set__(self, value)
        forget_layout(self)
        if isinstance(self, FakeTensor) and isinstance(value, FakeTensor):
            self.fake_device = value.fake_device
            self.constant = None

    return property(get_data, set_data)


def detach_of(tracker: Tracker) -> Callable[[torch.Tensor], torch.Tensor]:
    original = torch.Tensor.detach

    def detach(self: torch.Tensor) -> Any:
        alias = tracker.detached(self)
        return original(self) if alias is None else alias

    return detach


def narrow_of(tracker: Tracker) -> Callable[..., torch.Tensor]:
    original = torch.Tensor.narrow

    def narrow(self: torch.Tensor, dim: int, start: Any, length: Any) -> Any:
        if type(start) is int and type(length) is int and 0 <= start <= start + length <= self.shape[dim]:
            part = tracker.sliced(self, dim, start, start + length)
            if part is not None:
                return part
        return original(self, dim, start, length)

    return narrow


def tracked_resize(tracker: Tracker) -> Callable[..., Any]:
    original = torch.UntypedStorage.resize_

    def resize_(self: torch.UntypedStorage, size: int) -> Any:
        out = original(self, size)
        tracker.resized(self)
        return out

    return resize_


def distinct_data_ptr() -> Callable[[torch.Tensor], int]:
    original = torch.Tensor.data_ptr

    def data_ptr(self: torch.Tensor) -> int:
        if not isinstance(self, FakeTensor):
            return original(self)
        storage = self.untyped_storage()
        return storage._cdata * 4096 + self.storage_offset() * self.element_size() if storage.nbytes() else 0

    return data_ptr


def pin_memory_of(tracker: Tracker) -> Callable[..., torch.Tensor]:
    original = torch.Tensor.pin_memory

    def pin_memory(self: torch.Tensor, *args: Any) -> torch.Tensor:
        if not isinstance(self, FakeTensor):
            return original(self, *args)
        return self if tracker.is_pinned(self) else tracker.pinned_empty(tuple(self.shape), self.dtype)

    return pin_memory


def is_pinned_of(tracker: Tracker) -> Callable[..., bool]:
    original = torch.Tensor.is_pinned

    def is_pinned(self: torch.Tensor, *args: Any) -> bool:
        return tracker.is_pinned(self) if isinstance(self, FakeTensor) else original(self, *args)

    return is_pinned


def module_apply(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
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


def copied_parameter(self: torch.Tensor, memo: dict[int, Any]) -> Any:
    """torch.nn.Parameter.__deepcopy__, for parameters that are fake tensors by type."""
    if not getattr(self, "_is_param", False):
        return torch.Tensor.__deepcopy__(self, memo)  # type: ignore[no-untyped-call]
    if id(self) not in memo:
        memo[id(self)] = torch.nn.Parameter(self.data.clone(memory_format=torch.preserve_format), self.requires_grad)
    return memo[id(self)]


def _on_simulated_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def tensor_constructor(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Any:
        if not _on_simulated_device(device):
            return original(data, dtype=dtype, device=device, requires_grad=requires_grad, **kwargs)
        if isinstance(data, torch.Tensor):
            return data.detach().to(device=device, dtype=dtype or data.dtype)
        values = np.asarray(data)
        inferred = {"f": torch.get_default_dtype(), "i": torch.int64, "b": torch.bool}[values.dtype.kind]
        return torch.empty(values.shape, dtype=dtype or inferred, device=device, requires_grad=requires_grad)

    return tensor


def getitem_of(original: Callable[..., torch.Tensor], tracker: Tracker) -> Callable[..., torch.Tensor]:
    def getitem(self: torch.Tensor, item: Any) -> Any:
        if type(item) is slice:
            part = tracker.sliced(self, 0, item.start, item.stop) if item.step is None else None
            return original(self, item) if part is None else part
        if type(item) is tuple and any(type(part) is list for part in item) and _on_simulated_device(self.device):
            item = tuple(torch.tensor(p, device=self.device) if type(p) is list else p for p in item)
        elif type(item) is list and _on_simulated_device(self.device):
            item = torch.tensor(item, device=self.device)
        return original(self, item)

    return getitem


def empty_constructor(original: Callable[..., torch.Tensor], tracker: Tracker) -> Callable[..., torch.Tensor]:
    def empty(*size: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if not pin_memory:
            return original(*size, **kwargs)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return tracker.pinned_empty(tuple(shape), kwargs.get("dtype") or torch.get_default_dtype())

    return empty


class PositionalSignature:
    """inspect.signature(function), which need not search where every parameter is given by its position."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._signature = inspect.signature(function)
        parameters = self._signature.parameters.values()
        plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
        self._number = len(parameters) if plain else -1

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return (
            BoundByPosition(args) if len(args) == self._number and not kwargs else self._signature.bind(*args, **kwargs)
        )


class BoundByPosition:
    """inspect.BoundArguments without anything to add."""

    __slots__ = ("args",)
    kwargs: ClassVar[dict[str, Any]] = {}

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args

    def apply_defaults(self) -> None:
        pass
