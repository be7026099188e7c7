"""A pretended GPU: tensors that claim to be on "cuda" and lie in the CPU's memory.

    with pretend_gpu.visible(): ...

torch believes that it sees an H100. Code that mixes devices fails as it would on a GPU, and so does
code that waits for the GPU while a CUDA graph is captured. A graph replays what was captured.
Triton kernels run in triton's interpreter, CUDA kernels in the emulator of csrc. A test on the
pretended GPU says nothing about speed, nor whether a kernel is right on a real GPU. It runs the
code around the kernels, which no machine without a GPU would execute otherwise.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

# it lists what torch.cuda holds, so it must have looked before anything is replaced
import torch._dynamo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as pytree_leaves
from torch.utils._pytree import tree_map_only

CUDA = torch.device("cuda:0")
#: operators whose result only the host can know: they wait for the GPU
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Pretended(torch.Tensor):
    """`held`, a CPU tensor, that claims to be on the GPU.

    For C++, which must not look for a driver, it is a meta tensor.
    """

    held: torch.Tensor
    #: all there are: the memory that kernels may touch
    alive: weakref.WeakSet[Pretended] = weakref.WeakSet()

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(),
            dtype=real.dtype, layout=real.layout, device="meta", requires_grad=False,
        )  # fmt: skip
        made.held = real
        cls.alive.add(made)
        if Graph.capturing is not None:
            Graph.capturing.kept.append(made)  # a graph's memory is its own
        return made

    device = CUDA  # type: ignore[assignment]
    is_cuda, is_cpu, is_meta = True, False, False

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def get_device(self) -> int:
        return 0

    def new_tensor(
        self, data: Any, *, dtype: Any = None, device: Any = CUDA, **_: Any
    ) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device)

    def __getitem__(self, where: Any) -> torch.Tensor:
        place = tree_map_only(torch.Tensor, _held, where)
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in pytree_leaves(place)):
            _waits("index by a mask")
        found = self.held[place]
        if found.untyped_storage().data_ptr() != self.held.untyped_storage().data_ptr():
            _record(lambda: found.copy_(self.held[place]))
        return Pretended(found)

    def __setitem__(self, where: Any, value: Any) -> None:
        place, given = tree_map_only(torch.Tensor, _held, (where, value))
        self.held[place] = given
        _record(lambda: self.held.__setitem__(place, given))

    def item(self) -> Any:
        _waits("item")
        return self.held.item()

    def tolist(self) -> Any:
        _waits("tolist")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    __index__ = __int__

    def __format__(self, form: str) -> str:
        return format(self.item(), form) if self.dim() == 0 else repr(self)

    def __repr__(self, **_: Any) -> str:
        return f"pretended {self.held!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretended:
        return memo.setdefault(id(self), self.clone())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, Pretended) else tensor


class Graph:
    """A stand-in for torch.cuda.CUDAGraph: a replay repeats what was done during the capture."""

    capturing: Graph | None = None
    numbers = itertools.count(1)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = next(self.numbers)
        self.steps: list[Callable[[], None]] = []
        self.kept: list[torch.Tensor] = []

    def replay(self) -> None:
        for step in self.steps:
            step()


def _waits(name: str) -> None:
    if Graph.capturing is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
    if _State.sync == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation ({name})")


class _State:
    sync = "default"


#: our operators -> what they run
_OURS: dict[str, Any] = {}


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
    pretended = any(isinstance(t, Pretended) for t in tensors)
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    if pretended and target is not None and target.type == "meta":
        target = CUDA  # what C++ takes a pretended tensor's device for
    space, name = func._schema.name.split("::")
    if space == "qkernels" and pretended:  # on the GPU's own tensors
        with _Everywhere():
            return _OURS[name](*args, **kwargs)
    if name in ("_to_copy", "copy_", "_pin_memory"):
        away = [t for t in tensors if not isinstance(t, Pretended)]
        if (
            pretended
            and (away or (target is not None and target.type == "cpu"))
            and not kwargs.get("non_blocking")
        ):
            _waits(name)
    else:
        for t in tensors:
            if (
                pretended
                and not isinstance(t, Pretended)
                and t.dim() > 0
                and not name.startswith("index")
            ):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but got cpu in {func}"
                )
    if pretended and name.startswith(_WAITING):
        _waits(name)
    on_gpu = (target.type == "cuda") if target is not None else pretended
    if "generator" in kwargs and kwargs["generator"] is not None:
        on_gpu = on_gpu or getattr(kwargs["generator"], "pretended", False)
    if target is not None and target.type == "cuda":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    args, kwargs = tree_map_only(Pretended, lambda t: t.held, (args, kwargs))
    out = func(*args, **kwargs)
    if func._schema.returns and any(
        r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns
    ):
        _record(lambda: func(*args, **kwargs))
        return next(t for t in tensors) if isinstance(out, torch.Tensor) else out
    if not on_gpu:
        return out
    made = tree_map_only(torch.Tensor, Pretended, out)
    if isinstance(out, torch.Tensor) and not any(r.alias_info for r in func._schema.returns):
        _record(lambda: out.copy_(func(*args, **kwargs)))
    return made


def _record(step: Callable[[], Any]) -> None:
    if Graph.capturing is not None:
        Graph.capturing.steps.append(step)


class _Everywhere(TorchDispatchMode):
    """Handles calls without a tensor on the GPU: factories with device="cuda"."""

    def __torch_dispatch__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Stream:
    cuda_stream = 0
    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        _waits("Stream.synchronize")


class _Event(_Stream):
    def record(self, *_: Any) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 0.001  # a pretended time of one microsecond


@contextmanager
def _graph(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


def _mode(name: str) -> None:
    _State.sync = str(name)


def _properties(*_: Any) -> Any:
    return types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
        total_memory=80 * 2**30, L2_cache_size=50 * 2**20,
    )  # fmt: skip


class _Generator(torch.Generator):
    pretended = False

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made: _Generator = super().__new__(cls, "cpu")
        made.pretended = torch.device(device).type == "cuda"
        return made


def _size_of(name: str) -> int:
    """Bytes of a kernel's call struct."""
    from qkernels.backends.cuda import calls, eight_bit, transforms

    kinds = {"weight_only": calls.WeightOnlyCall, "transform": transforms.TransformCall,
             "quantize": eight_bit.QuantizeCall, "eight_bit": eight_bit.EightBitCall}  # fmt: skip
    return ctypes.sizeof(next(kind for start, kind in kinds.items() if name.startswith(start)))


class _Extension:
    """The compiled kernels, by the emulator."""

    def run(self, name: str, address: int) -> str:
        # a copy, because the caller writes into the struct for the next call
        kept = ctypes.string_at(address, _size_of(name))
        error = self._run(name, kept)
        _record(lambda: self._run(name, kept))
        return error

    def _run(self, name: str, call: bytes) -> str:
        from tests.cuda import host

        again = ctypes.create_string_buffer(call)
        library, function = host.entry(name)
        memory = {t.held.untyped_storage().data_ptr(): t.held for t in list(Pretended.alive)}
        bytes_of = [
            torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in memory.values()
        ]
        host.expose(library, [], bytes_of)
        return str(function(again).decode())


@contextmanager
def visible() -> Iterator[None]:
    """Within the context, torch sees a GPU."""
    from triton.runtime import interpreter

    from qkernels import counters
    from qkernels.backends import cuda
    from qkernels.ops import matmul as ops
    from qkernels.ops import moe

    executor = interpreter.GridExecutor
    called = executor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Pretended, lambda t: t.held, (args, kwargs))
        _record(lambda: called(self, *args, **kwargs))
        return called(self, *args, **kwargs)

    def moved(make: Any) -> Any:
        """For functions that fill C++ memory themselves, which no dispatch mode sees."""

        def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
            found = make(*args, **kwargs)
            return found if device is None else found.to(device)

        return made

    to, where = torch.Tensor.to, torch.where

    def to_device_of(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Tensor.to for the GPU or for the device of another tensor.

        C++ takes a pretended tensor for meta, and would want a driver for the GPU.
        """
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        named = [
            a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device, int))
        ]
        if not named or type(named[0]) is bool or torch.device(named[0]).type != "cuda":
            return to(self, *args, **kwargs)
        types = [a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)]
        found = to(self, *types)
        if isinstance(found, Pretended):
            return found
        _waits("copy from the host")
        return Pretended(found.detach().clone())

    def where_of(condition: Any, *values: Any) -> Any:
        """torch.where with numbers as tensors, because C++ would make them meta tensors."""
        return where(
            condition, *(v if isinstance(v, torch.Tensor) else torch.tensor(v) for v in values)
        )

    def raw_stream(index: int) -> int:
        return 0 if Graph.capturing is None else 1  # the default stream cannot be captured

    def capture_of(stream: int) -> int:
        return 0 if Graph.capturing is None else Graph.capturing.number

    nothing = lambda *_, **__: None  # noqa: E731
    replaced = {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": nothing,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": nothing,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: _properties().name, "get_device_properties": _properties,
        "synchronize": lambda *_: _waits("synchronize"), "current_stream": lambda *_: _Stream(),
        "Stream": _Stream, "stream": lambda *_: nullcontext(), "Event": _Event, "CUDAGraph": Graph,
        "graph": _graph, "device_of": lambda *_: nullcontext(), "device": lambda *_: nullcontext(),
        "memory_allocated": lambda *_: 2**30, "max_memory_allocated": lambda *_: 2**30,
        "reset_peak_memory_stats": nothing, "empty_cache": nothing, "set_sync_debug_mode": _mode,
        "is_current_stream_capturing": lambda: Graph.capturing is not None,
    }  # fmt: skip
    with (
        mock.patch.multiple(torch.cuda, create=True, **replaced),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", raw_stream, create=True),
        mock.patch.object(torch._C, "_cuda_getDevice", create=True, return_value=0),
        mock.patch.multiple(
            torch,
            Generator=_Generator,
            tensor=moved(torch.tensor),
            as_tensor=moved(torch.as_tensor),
            where=where_of,
            # C++ will not have views of these made there
            inference_mode=lambda mode=True: torch.no_grad(),
        ),
        mock.patch.object(torch.Tensor, "to", to_device_of),
        mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: to_device_of(self, CUDA)),
        mock.patch.object(executor, "__call__", call),
        # As if no mode were on: the way that eager calls take.
        mock.patch.object(ops, "needs_operator", return_value=False),
        mock.patch.dict(
            _OURS,
            matmul=ops._matmul_impl,
            grad_input=ops._grad_input_impl,
            grouped_matmul=moe._grouped_impl,
            fused_moe=moe._fused_impl,
        ),
        # The interpreter cannot run the instructions of PDL.
        mock.patch.dict(os.environ, QKERNELS_PDL="0"),
        mock.patch.object(counters, "capture_of", capture_of),
        mock.patch.object(counters, "_apart", lambda make: make()),  # modes are set for a thread
        mock.patch.dict(counters._arenas),
        mock.patch.dict(counters._regions),
        mock.patch.object(cuda.build, "extension", _Extension),
        _Everywhere(),
    ):
        yield
