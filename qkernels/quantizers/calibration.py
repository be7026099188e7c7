"""Calibration data: token ids, and the layers' inputs for them, one decoder block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def calibration_ids(
    tokenizer: Any, text: str, samples: int = 32, length: int = 512, seed: int = 0
) -> Tensor:
    """`samples` windows of `length` tokens from random places of a text, int64 (samples, length).

    Raises ValueError if the text has fewer than `length` + 1 tokens.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= length:
        raise ValueError(f"calibration text: expected more than {length} tokens, got {len(ids)}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length, (samples,), generator=generator)
    tokens = torch.tensor(ids, dtype=torch.int64)
    return torch.stack([tokens[s : s + length] for s in starts.tolist()])


def batches_of(calibration: Any, vocabulary: int | None) -> list[Tensor]:
    """`calibration` as a list of int64 (1, T) batches. Raises ValueError unless it holds token ids.

    vocabulary: number of ids that the model knows, None if unknown.
    """
    if isinstance(calibration, Tensor):
        calibration = list(calibration if calibration.dim() == 2 else calibration[None])
    if not isinstance(calibration, Sequence) or isinstance(calibration, str) or not calibration:
        raise ValueError(
            "calibration: expected token ids, a tensor (samples, tokens) or a list of tensors "
            f"(tokens,), got {type(calibration).__name__}; qkernels.calibration_ids makes them "
            "from a text"
        )
    batches = []
    for i, ids in enumerate(calibration):
        if (
            not isinstance(ids, Tensor)
            or ids.is_floating_point()
            or ids.dim() not in (1, 2)
            or not ids.numel()
        ):
            got = (
                f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            )
            raise ValueError(f"calibration[{i}]: expected integers of shape (tokens,), got {got}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise ValueError(
                f"calibration[{i}]: expected ids in [0, {vocabulary}), got {low}..{high}"
            )
        batches += list(
            ids.reshape(1, -1).long().split(1) if ids.dim() == 1 else ids.long().split(1)
        )
    return batches


class _Stop(Exception):  # noqa: N818 - nothing failed
    """Ends a forward pass early, once every needed input was seen."""


class Statistics:
    """Statistics of one layer input x (T, K) over all calibration tokens.

    Attributes:
        hessian: mean of x x^T, float32 (K, K); only if asked for.
        mean_abs, max_abs: mean and maximum of |x|, float32 (K).
        mean_square: mean of x^2, float32 (K).
        tokens: number of tokens.
    """

    def __init__(self, features: int, device: torch.device, *, hessian: bool) -> None:
        self.tokens = 0
        self.max_abs = torch.zeros(features, device=device)
        self._sum_abs = torch.zeros(features, dtype=torch.float64, device=device)
        self._sum_square = torch.zeros(features, dtype=torch.float64, device=device)
        self._sum = torch.zeros(features, features, device=device) if hessian else None

    def add(self, x: Tensor) -> None:
        """Count the inputs x (..., K)."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += x.shape[0]
        magnitude = x.abs()
        self.max_abs = torch.maximum(self.max_abs, magnitude.amax(0))
        self._sum_abs += magnitude.sum(0)
        self._sum_square += magnitude.square().sum(0)
        if self._sum is not None:
            self._sum.addmm_(x.T, x)

    @property
    def mean_abs(self) -> Tensor:
        return (self._sum_abs / self.tokens).float()

    @property
    def mean_square(self) -> Tensor:
        return (self._sum_square / self.tokens).float()

    @property
    def hessian(self) -> Tensor:
        assert self._sum is not None
        return self._sum / self.tokens

    def rescale(self, scale: Tensor) -> None:
        """Change the statistics as if x had been divided by scale (K)."""
        self.max_abs = self.max_abs / scale
        self._sum_abs = self._sum_abs / scale
        self._sum_square = self._sum_square / scale.double().square()
        if self._sum is not None:
            self._sum = self._sum / (scale[:, None] * scale[None, :])


class BlockInputs:
    """The arguments of one decoder block's calls, for all batches.

    At first they are those of the first block. `advance` replaces them by the outputs of a block,
    which are the inputs of the next block, so memory holds one block's activations at a time.
    """

    def __init__(self, model: nn.Module, first: nn.Module, batches: Iterable[Tensor]) -> None:
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append((args, kwargs))
            raise _Stop

        device = next(model.parameters()).device
        hook = first.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in batches:
                try:
                    model(batch.to(device), **_without_cache(model))
                except _Stop:
                    continue
                raise ValueError("model: its first decoder block was not called in a forward pass")
        finally:
            hook.remove()

    def advance(self, block: nn.Module) -> None:
        """Call `block`, the current one, for all batches; keep its outputs as the next inputs."""
        for i, (args, kwargs) in enumerate(self._calls):
            out = block(*args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
            if args:
                self._calls[i] = ((hidden, *args[1:]), kwargs)
            else:
                self._calls[i] = (args, {**kwargs, "hidden_states": hidden})

    def groups(self, block: nn.Module, layers: dict[str, nn.Linear]) -> list[list[str]]:
        """Names of `layers` in order of execution; names of layers with the same input together."""
        seen: list[tuple[Tensor, list[str]]] = []
        hooks = []

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                for x, names in seen:
                    if x is args[0]:
                        names.append(name)
                        return
                seen.append((args[0], [name]))

            return hook

        for name, linear in layers.items():
            hooks.append(linear.register_forward_pre_hook(note(name)))
        try:
            args, kwargs = self._calls[0]
            block(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        called = {name for _, names in seen for name in names}
        missing = sorted(set(layers) - called)
        if missing:
            raise ValueError(
                f"{missing[0]}: expected to be called in a forward pass of its block, was not"
            )
        return [names for _, names in seen]

    def collect(
        self, block: nn.Module, layers: dict[str, nn.Linear], *, hessian: bool, stop: bool
    ) -> dict[str, Statistics]:
        """Statistics of each layer's input.

        hessian: whether to collect it. stop: skip the rest of the block once all were called.
        """
        statistics: dict[str, Statistics] = {}
        left: set[str] = set()
        hooks = []

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                statistics[name].add(args[0])
                left.discard(name)
                if stop and not left:
                    raise _Stop

            return hook

        for name, linear in layers.items():
            device = linear.weight.device
            statistics[name] = Statistics(linear.in_features, device, hessian=hessian)
            hooks.append(linear.register_forward_pre_hook(note(name)))
        try:
            for args, kwargs in self._calls:
                left |= set(layers)
                try:
                    block(*args, **kwargs)
                except _Stop:
                    continue
        finally:
            for hook in hooks:
                hook.remove()
        return statistics


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """Arguments that turn off the key-value cache, which would keep the keys of all batches."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
