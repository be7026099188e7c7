"""PackedWeight: one quantized (N, K) matrix, in its checkpoint's own tensors or a kernel layout."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import counters, formats, layouts
from ..formats.base import check_weight
from ..tensors import plain, whole


def params_text(params: Mapping[str, Any]) -> str:
    """A format's parameters in a `repr`: "name=value, " for each."""
    return "".join(f"{name}={value!r}, " for name, value in params.items())


class Snapshot(NamedTuple):
    """A weight's layout and the tensors in that layout, which only ever change together."""

    layout: str
    storage: dict[str, Tensor]


class Prepackable:
    """Base of packed weights: the layout and its tensors are one `snapshot`, replaced as a whole.

    Threads may share it.

    Attributes:
        snapshot: a named tuple with at least `layout` and `storage`.
        plans: results of first calls that later calls reuse; for qkernels.ops and the backends.
    """

    __slots__ = ("_lock", "plans", "snapshot")
    snapshot: Any

    def __init__(self, snapshot: Any) -> None:
        self.snapshot = snapshot
        self.plans: dict[Any, Any] = {}
        self._lock = threading.Lock()

    @property
    def layout(self) -> str:
        return self.snapshot.layout  # type: ignore[no-any-return]

    @property
    def storage(self) -> dict[str, Tensor]:
        return self.snapshot.storage  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return next(iter(self.storage.values())).device

    def _move(self, layout: str) -> bool:
        """Replace the snapshot by `_packed(layout)`. Returns whether this call did.

        Of several threads one does it, and the others wait.
        """
        if layout == self.layout:
            return False
        with self._lock:
            if layout == self.layout:
                return False
            # torch counts no changes in place of tensors that are made in inference mode, but
            # cuda/launch.py asks for them
            with torch.inference_mode(False), torch.no_grad():
                self.snapshot = self._packed(layout)
            self.plans.clear()
            return True

    def _packed(self, layout: str) -> Any:
        """The snapshot in another layout."""
        raise NotImplementedError


class PackedWeight(Prepackable):
    """A quantized weight of shape (N, K). Threads may share one.

    Attributes:
        format: name of the storage format, one of `qkernels.formats.names()`.
        shape: (N, K), output and input features.
        params: the format's parameters, defaults filled in.
        layout: "checkpoint", or the kernel layout that the bytes are in now. There is only ever one
            copy: `prepack_` moves the bytes to a kernel layout and `tensors` restores them.
        storage: the tensors in `layout`, each contiguous: a strided one is copied.
        snapshot: layout and storage together, for readers that need both while another thread
            prepacks.

    Make one with `qkernels.quantize` or `qkernels.pack`, which validate.
    """

    __slots__ = ("_nbytes", "format", "params", "shape")
    snapshot: Snapshot
    #: the number of experts, as `PackedExperts.count`: this is one matrix
    count: ClassVar[int] = 0

    def __init__(
        self,
        format: str,
        shape: tuple[int, int],
        storage: Mapping[str, Tensor],
        params: Mapping[str, Any],
        layout: str = layouts.CHECKPOINT,
    ) -> None:
        self.format = format
        self.shape = (int(shape[0]), int(shape[1]))
        self.params = dict(params)
        storage = {
            name: whole(f"{format}: {name}", tensor, aligned=layout != layouts.CHECKPOINT)
            for name, tensor in storage.items()
        }
        super().__init__(Snapshot(layout, storage))
        self._nbytes: int | None = None
        counters.reserve(next(iter(storage.values())))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors under the checkpoint's names, bit for bit.

        In the checkpoint layout this costs nothing; from a kernel layout they are rebuilt at every
        access.
        """
        layout, storage = self.snapshot
        return layouts.unpack(formats.get(self.format), self.shape, self.params, storage, layout)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the checkpoint: codes, scales, zeros, tables, metadata."""
        if self._nbytes is None:
            self._nbytes = sum(t.numel() * t.element_size() for t in self.tensors.values())
        return self._nbytes

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / (N * K)."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as an (N, K) tensor of `dtype`: the format's pure-torch reference."""
        if self.device.type == "meta":
            return torch.empty(self.shape, dtype=dtype, device="meta")
        return formats.get(self.format).dequantize(self.tensors, self.shape, self.params).to(dtype)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight with its tensors on `device`; dtypes never change."""
        layout, storage = self.snapshot
        if self.device.type == "meta" and torch.device(device).type != "meta":
            raise ValueError(
                f"{self.format}: expected data to move to {device}, got a weight on the meta device"
            )
        moved = {k: v.to(device) for k, v in storage.items()}
        return PackedWeight(self.format, self.shape, moved, self.params, layout)

    def prepack_(self, layout: str) -> PackedWeight:
        """Move the bytes to a kernel layout, in place, freeing the checkpoint's. Returns self."""
        self._move(layout)
        return self

    def _packed(self, layout: str) -> Snapshot:
        _ = self.nbytes  # counts the checkpoint's tensors, so before they are gone
        return Snapshot(
            layout,
            layouts.pack(formats.get(self.format), self.shape, self.params, self.tensors, layout),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        layout, storage = self.snapshot
        return PackedWeight, (self.format, self.shape, storage, self.params, layout)

    def __repr__(self) -> str:
        return (
            f"PackedWeight({self.format!r}, shape={self.shape}, {params_text(self.params)}"
            f"bits_per_weight={self.bits_per_weight:.3f}, device={str(self.device)!r})"
        )


def quantize(weight: Tensor, format: str, **params: Any) -> PackedWeight:
    """Quantize `weight` (N, K), any float dtype, to `format` by round-to-nearest.

    The default group size is 128, or with a warning another one that suits this K better. The
    result is on the weight's device. Raises ValueError for an unknown format or parameter, a group
    size that does not fit, or a weight with NaN or infinite entries.
    """
    fmt = formats.get(format)
    check_weight(f"{format}: weight", weight)
    if weight.is_meta:
        raise ValueError(
            f"{format}: weight: expected data, got a tensor on the meta device; "
            "is the model offloaded?"
        )
    shape = (weight.shape[0], weight.shape[1])
    only_now = {k: params.pop(k) for k in fmt.quantize_only if k in params}
    only_now = fmt.check_types(only_now)  # parameters of the algorithm, which no weight keeps
    resolved = fmt.resolve(shape, fmt.complete({"the weight": shape}, params))
    with torch.no_grad():
        tensors = fmt.quantize(
            weight.detach().float().contiguous(), {**resolved, **fmt.quantize_only, **only_now}
        )
    resolved = fmt.resolve(shape, fmt.params_from_tensors(tensors, resolved))
    fmt.validate(tensors, shape, resolved)
    return PackedWeight(format, shape, tensors, resolved)


def pack(
    format: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], **params: Any
) -> PackedWeight:
    """Wrap a checkpoint's tensors (copied only if strided) as a weight of shape (N, K).

    Raises ValueError for a wrong dtype or shape, a missing or unknown tensor, a NaN scale or an
    index out of range; it names the tensor, what was expected and what came.
    """
    fmt = formats.get(format)
    if not isinstance(tensors, Mapping):
        raise ValueError(
            f"{format}: tensors: expected names and tensors, got a {type(tensors).__name__}"
        )
    tensors = {name: plain(f"{format}: {name}", tensor) for name, tensor in tensors.items()}
    params = fmt.check_types(params)
    shape = tuple(shape)  # type: ignore[assignment]  # a list or torch.Size will do
    fmt.check_shape(shape)
    fmt.check_sizes(tensors, shape)
    resolved = fmt.resolve(shape, fmt.params_from_tensors(tensors, params))
    fmt.validate(tensors, shape, resolved)
    return PackedWeight(format, shape, tensors, resolved)
