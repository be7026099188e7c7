"""StandIn: the value of `QuantLinear.weight`, with the weight's shape, dtype and device only.

Model code reads `layer.weight` for two reasons. Some code asks for its dtype, shape or device: that
works. Some code multiplies with it instead of calling the layer: packed bytes cannot do that, so
the StandIn raises an error that says so.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

#: operators, which Python looks up on the type and not on the object
_OPERATORS = """
add radd sub rsub mul rmul matmul rmatmul truediv rtruediv floordiv rfloordiv pow rpow mod rmod
neg pos abs iadd isub imul itruediv imatmul lt le gt ge getitem setitem len iter array float int
bool index
""".split()  # noqa: SIM905


class StandIn:
    """The `weight` of a packed layer; not a torch.Tensor.

    torch's functions and Python's operators raise ValueError. All other attributes of a tensor
    raise AttributeError, so that `hasattr` works.

    Attributes:
        shape, ndim: (N, K) and 2.
        dtype: the dtype in which the model computes.
        device: the device of the packed bytes.
    """

    requires_grad = False
    grad = None
    ndim = 2
    #: tells transformers not to initialize it as a parameter
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
        return f"StandIn({self._description()}, dtype={self.dtype}, device={str(self.device)!r})"

    def _description(self) -> str:
        return f"packed {self.format} weight of shape {tuple(self.shape)}"

    def _message(self) -> str:
        return (
            f"weight: expected a tensor to compute with, got a {self._description()}, which only "
            "its layer multiplies with; layer.packed.dequantize() makes a tensor of it, and "
            "quantize_model's skip leaves a layer plain"
        )

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(self._message())

    def __getattr__(self, name: str) -> NoReturn:
        # copy and pickle ask for methods that no tensor has, before the object has attributes
        raise AttributeError(name if name.startswith("__") else f"{name}: {self._message()}")

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
