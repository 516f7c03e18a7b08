"""DispatchCache: what a fake operation returned for arguments of these shapes, remembered.

FakeTensorMode has such a cache, made for every case of torch.compile; its key alone costs more than this whole path.
Thirty identical layers ask the same few hundred questions, so nearly every operation of a run is answered here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from zplan.simulate.learned import LEARNED

_UNCACHEABLE: Any = ()
_SLICE = torch.ops.aten.slice.Tensor
_ABSOLUTE = frozenset({torch.ops.aten.as_strided.default})
"""Operations whose result does not move with its argument's storage offset."""
_FACTORIES = frozenset({torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default, torch.ops.aten.ones.default})
"""Operations without a tensor among their arguments that are asked for often."""
_SAME, _VIEW, _NEW, _CONSTANT = range(4)
_LAYOUT = "_zplan_layout"
"""Where a tensor remembers the number of its layout."""
_META = torch.device("meta")
_POSITION = frozenset({int, type(None)})
_NOWHERE, _CLOSE = (0,), (1,)


class _Output(NamedTuple):
    """How to make one output again."""

    how: int
    argument: int = -1
    """For _SAME and _VIEW: which tensor argument."""
    value: Any = None
    """For _CONSTANT."""
    shape: Any = None
    stride: Any = None
    offset: int = 0
    """For _VIEW: from the argument's own offset."""
    dtype: Any = None
    device: Any = None
    layout: int = -1
    storage_bytes: int = 0
    """For _NEW."""


class DispatchCache:
    """Runs operations on fake tensors, from memory where it can.

    Args:
        track: told of every tensor that may have a new storage.
        track_new: told of every tensor that has one: tensor, device, bytes.
    """

    def __init__(
        self,
        track: Callable[[torch.Tensor], None],
        track_new: Callable[[torch.Tensor, torch.device, int], None],
        fake_mode: FakeTensorMode,
    ) -> None:
        self._track = track
        self._track_new = track_new
        self._fake_mode = fake_mode
        self._entries = LEARNED.entries
        self._inside = False
        """An operation runs that was not remembered: what it calls in turn is its own."""
        self.hits = self.misses = 0

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _SLICE:
            part = self._slice(*args, **kwargs)
            if part is not None:
                return part
        tensors: list[FakeTensor] = []
        parts: list[Any] = [id(func), torch.get_default_dtype()]
        cacheable = _describe(args, parts, tensors) and (not kwargs or _describe_named(kwargs, parts, tensors))
        if not cacheable or not (tensors or func in _FACTORIES):
            return self._run(func, args, kwargs)
        key = tuple(parts)
        entry = self._entries.get(key)
        if entry is None:
            out = self._run(func, args, kwargs)
            LEARNED.add(func, key, _learn(func, out, tensors))
            self.misses += 1
            return out
        if not entry:  # _UNCACHEABLE
            return self._run(func, args, kwargs)
        self.hits += 1
        container, outputs = entry
        if container is None:
            return self._make(outputs[0], tensors)
        return container([self._make(output, tensors) for output in outputs])

    def detached(self, base: Any) -> Any:
        """`base` itself under another name; None if it is not as plain as that."""
        if self._inside or type(base) is not FakeTensor or base.constant is not None:
            return None
        device = base._fake_device
        made = self._view(base, base.shape, base.stride(), base.storage_offset(), base.dtype, device)
        layout = base.__dict__.get(_LAYOUT)
        if layout is not None:
            made.__dict__[_LAYOUT] = layout
        return made

    def sliced(self, base: Any, dim: int, start: Any, end: Any) -> Any:
        """A slice in steps of one; None if it is not as plain as that."""
        plain = type(start) in _POSITION and type(end) in _POSITION
        return self._slice(base, dim, start, end) if plain and not self._inside else None

    def _slice(self, base: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
        """DeepSpeed cuts its flat buffers at another offset for every parameter, so no memory would help."""
        if type(base) is not FakeTensor or base.constant is not None or step < 1:
            return None
        shape, strides = list(base.shape), list(base.stride())
        if not shape:
            return None
        start, end, _ = slice(start, end).indices(shape[dim])
        offset = base.storage_offset() + min(start, shape[dim]) * strides[dim]
        shape[dim] = max(0, -(-(end - start) // step))
        strides[dim] *= step
        return self._view(base, shape, strides, offset, base.dtype, base._fake_device)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        inside, self._inside = self._inside, True
        try:
            out = func(*args, **kwargs) if kwargs else func(*args)
        finally:
            self._inside = inside
        _forget_layouts(args)
        if kwargs:
            _forget_layouts(kwargs.values())
        for item in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(item, torch.Tensor):
                self._track(item)
        return out

    def _make(self, output: _Output, tensors: list[FakeTensor]) -> Any:
        how, argument, value, shape, stride, offset, dtype, device, layout, storage_bytes = output
        if how == _NEW:
            made = _blank(shape, stride, dtype, storage_bytes)
            _dress(made, self._fake_mode, device)[_LAYOUT] = layout
            self._track_new(made, device, storage_bytes)
            return made
        if how == _SAME:
            return tensors[argument]
        if how == _CONSTANT:
            return value
        base = tensors[argument]
        made = self._view(base, shape, stride, base.storage_offset() + offset, dtype, device)
        made.__dict__[_LAYOUT] = layout
        return made

    def _view(self, base: FakeTensor, shape: Any, stride: Any, offset: Any, dtype: Any, device: Any) -> Any:
        """Another look at a tensor's storage."""
        return view_of(base.untyped_storage(), shape, stride, offset, dtype, device, fake_mode=self._fake_mode)


def _describe(values: Any, parts: list[Any], tensors: list[FakeTensor]) -> bool:
    """Append what decides an operation's outputs; False when that cannot be said."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            state = value.__dict__
            if state["constant"] is not None:
                return False
            tensors.append(value)
            number = state.get(_LAYOUT)
            if number is None:
                number = state[_LAYOUT] = _number(value)
            parts.append(number)
        elif kind is list or kind is tuple:
            parts.append(len(value))
            if not _describe(value, parts, tensors):
                return False
        elif kind in _PLAIN:
            parts.append(kind)
            parts.append(value)
        else:
            return False
    return True


def _describe_named(kwargs: dict[str, Any], parts: list[Any], tensors: list[FakeTensor]) -> bool:
    parts.extend(kwargs)
    return _describe(kwargs.values(), parts, tensors)


def _learn(func: Any, out: Any, tensors: list[FakeTensor]) -> Any:
    """(container, outputs) of an operation, or _UNCACHEABLE."""
    if torch.Tag.inplace_view in func.tags or func in _ABSOLUTE:
        return _UNCACHEABLE
    items = out if isinstance(out, (list, tuple)) else (out,)
    outputs: list[_Output] = []
    fresh: set[int] = set()
    for item in items:
        if isinstance(item, torch.Tensor):
            output = _learn_tensor(item, tensors, fresh)
            if output is None:
                return _UNCACHEABLE
            outputs.append(output)
        elif type(item) in _PLAIN:
            outputs.append(_Output(_CONSTANT, value=item))
        else:
            return _UNCACHEABLE
    return (type(out) if isinstance(out, (list, tuple)) else None, tuple(outputs))


def _learn_tensor(item: torch.Tensor, tensors: list[FakeTensor], fresh: set[int]) -> _Output | None:
    for number, tensor in enumerate(tensors):
        if item is tensor:
            return _Output(_SAME, argument=number)
    if type(item) is not FakeTensor or item.constant is not None or item.is_sparse or item.is_conj() or item.is_neg():
        return None
    layout: dict[str, Any] = {
        "shape": item.shape,
        "stride": item.stride(),
        "offset": item.storage_offset(),
        "dtype": item.dtype,
        "device": item._fake_device,
        "layout": _number(item),
    }
    storage = item.untyped_storage()
    for number, tensor in enumerate(tensors):
        if storage._cdata == tensor.untyped_storage()._cdata:
            layout["offset"] -= tensor.storage_offset()
            return _Output(_VIEW, argument=number, **layout)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(item.shape, item.stride(), strict=True))
    exact = storage.nbytes() == (extent * item.element_size() if item.numel() else 0)
    if item.storage_offset() or not exact or storage._cdata in fresh:
        return None
    fresh.add(storage._cdata)
    return _Output(_NEW, storage_bytes=storage.nbytes(), **layout)


def _number(tensor: FakeTensor) -> int:
    return LEARNED.number((tensor.shape, tensor.stride(), tensor.dtype, tensor._fake_device))


_PLAIN = frozenset(
    {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size}
)


def _forget_layouts(values: Any) -> None:
    """An operation that ran may have changed its arguments in place: `set_`, `resize_`, `t_`."""
    for value in values:
        if type(value) is FakeTensor:
            value.__dict__.pop(_LAYOUT, None)
        elif isinstance(value, (list, tuple)):
            _forget_layouts(value)


def forget_layout(tensor: torch.Tensor) -> None:
    """To be called by whoever gives a tensor other sizes, another dtype or another device beside all dispatch."""
    tensor.__dict__.pop(_LAYOUT, None)


_BLANK: dict[str, Any] = {"constant": None, "pytype": None, "dispatch_keys": None, "real_tensor": None}
for _memo in ("nonzero_memo", "item_memo", "unique_memo", "unique_consecutive_memo", "nested_int_memo"):
    _BLANK.update({f"_{_memo}": None, f"_{_memo}_vc": None, f"_{_memo}_epoch": None})
_KEYS_DEVICE = torch.device("cpu")
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def new_fake_tensor(inner: torch.Tensor, fake_mode: Any, device: torch.device, requires_grad: bool = False) -> Any:
    """A FakeTensor around a meta tensor, with the CPU's dispatch keys whatever its device is.

    With a device's own keys, `.data =` could not move a parameter between host and device, as it does for real.
    """
    made: Any = torch.Tensor._make_subclass(
        FakeTensor, inner, requires_grad, dispatch_device=True, device_for_backend_keys=_KEYS_DEVICE
    )
    torch._C._set_throw_on_mutable_data_ptr(made)
    _dress(made, fake_mode, device)
    return made


def new_storage(num_bytes: int) -> torch.UntypedStorage:
    """Of a fake tensor; nobody is told of it."""
    return _blank(_NOWHERE, _CLOSE, torch.uint8, num_bytes).untyped_storage()  # type: ignore[no-any-return]


def view_of(
    storage: torch.UntypedStorage, shape: Any, stride: Any, offset: Any, dtype: torch.dtype, device: torch.device,
    *, fake_mode: Any,
) -> Any:  # fmt: skip
    """A fake tensor on a storage that is there."""
    made = _blank(_NOWHERE, _CLOSE, dtype, 0)
    with torch._C._DisableTorchDispatch():
        made.set_(storage, offset, shape, stride)
    _dress(made, fake_mode, device)
    return made


def _blank(shape: Any, stride: Any, dtype: torch.dtype, storage_bytes: int) -> Any:
    """A tensor with a storage of its own and without the attributes of a FakeTensor."""
    return torch.Tensor._make_wrapper_subclass(
        FakeTensor, shape, strides=stride, dtype=dtype, device=_META, dispatch_device=True,
        storage_size=storage_bytes, _extra_dispatch_keys=_KEYS,
    )  # fmt: skip


def _dress(made: Any, fake_mode: Any, device: torch.device) -> dict[str, Any]:
    """Give a tensor the attributes of a FakeTensor, and return them."""
    state: dict[str, Any] = made.__dict__
    state.update(_BLANK)
    state["_fake_device"] = device
    state["fake_mode"] = fake_mode
    return state
