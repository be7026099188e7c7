"""StandIn: what `QuantLinear.weight` is. It says what the weight is like, and refuses to compute
with it.

Model code reads `layer.weight` for two reasons. Some asks for its dtype, shape or device: that
works. Some multiplies with it behind the layer's back, which packed bytes cannot do: that gets a
sentence.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

#: operators that Python looks up on the type alone
_OPERATORS = """
add radd sub rsub mul rmul matmul rmatmul truediv rtruediv floordiv rfloordiv pow rpow mod rmod neg pos abs
iadd isub imul itruediv imatmul lt le gt ge getitem setitem len iter array float int bool index
""".split()  # noqa: SIM905


class StandIn:
    """What a packed layer has for a `weight`.

    Attributes:
        shape, ndim: (N, K) and 2.
        dtype: what the model around the layer computes in.
        device: where the packed bytes are.

    torch's functions and Python's operators raise ValueError; so does all else that a tensor has,
    as AttributeError, for `hasattr` asks that way. It is no torch.Tensor.
    """

    requires_grad = False
    grad = None
    ndim = 2
    #: transformers initializes no parameter that says so
    _is_hf_initialized = True

    def __init__(
        self, format: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.format, self.shape, self.dtype, self.device = format, torch.Size(shape), dtype, device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return True

    def is_complex(self) -> bool:
        return False

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def data(self) -> StandIn:
        return self

    def detach(self) -> StandIn:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> StandIn:
        if requires_grad:
            self._refuse()
        return self

    def __repr__(self) -> str:
        return f"StandIn({self._what()}, dtype={self.dtype}, device={str(self.device)!r})"

    def _what(self) -> str:
        return f"packed {self.format} weight of shape {tuple(self.shape)}"

    def _sentence(self) -> str:
        return (
            f"weight: expected a tensor to compute with, got a {self._what()}, which only its layer multiplies "
            "with; layer.packed.dequantize() makes a tensor of it, and quantize_model's skip leaves a layer plain"
        )

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(self._sentence())

    def __getattr__(self, name: str) -> NoReturn:
        # Copying and pickling ask for methods that no tensor has, of an object without attributes
        # yet.
        what = name if name.startswith("__") else f"{name}: {self._sentence()}"
        raise AttributeError(what)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        for value in (*args, *(kwargs or {}).values()):
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(one, StandIn):
                    one._refuse()
        raise ValueError("weight: expected a tensor to compute with, got a packed weight")


for _name in _OPERATORS:
    setattr(StandIn, f"__{_name}__", StandIn._refuse)
