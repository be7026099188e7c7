"""Perplexity of a causal language model, and its KL divergence from another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: rows of logits turned into float32 log-probabilities at a time: 128 x 128k vocabulary is 64 MB
CHUNK_ROWS = 128


@dataclass(frozen=True)
class Evaluation:
    """The results of `perplexity`.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood of the predicted tokens, in nats.
        tokens: number of predicted tokens; the first token of each window is not predicted.
        windows: number of windows.
        window: tokens in each window (the last may be shorter).
        kl: mean KL(reference || model) per predicted token in nats; None without a reference.
        agreement: fraction of tokens for which both models rank the same token first; None without
            a reference.
        reference_perplexity: perplexity of the reference; None without a reference.
        seconds: wall time.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int
    kl: float | None
    agreement: float | None
    reference_perplexity: float | None
    seconds: float


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    window: int = 512,
    max_tokens: int | None = None,
    reference: nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate `model` on token ids in windows that do not overlap, each without context before it.

    Log-probabilities are computed in float32, a bounded number of rows at a time, and summed in
    float64.

    Args:
        model, reference: called as `model(ids (1, T))`; the result is logits (1, T, vocabulary), as
            a tensor or as an object with `.logits`. Both are in eval mode during the call.
        ids: int64 (tokens), on any device; the first `max_tokens` of them are used.
        window: tokens of a window.
        progress: called with (windows done, windows) after each window.

    Raises:
        ValueError: for too few ids, ids outside the vocabulary, or a reference with another
            vocabulary.
    """
    tokens = _checked_ids(ids, window, max_tokens)
    chunks = [chunk for chunk in tokens.split(window) if chunk.numel() > 1]
    models = [m for m in (model, reference) if m is not None]
    training = [m.training for m in models]
    start = time.perf_counter()
    nll = torch.zeros((), dtype=torch.float64)
    reference_nll, kl = nll.clone(), nll.clone()
    agreeing = count = 0
    try:
        for m in models:
            m.eval()
        for done, chunk in enumerate(chunks, 1):
            logits = _logits(model, chunk)
            other = None if reference is None else _logits(reference, chunk)
            if other is not None and other.shape != logits.shape:
                raise ValueError(
                    f"reference: expected a vocabulary of {logits.shape[-1]} like the model's, "
                    f"got {other.shape[-1]}"
                )
            for begin in range(0, chunk.numel() - 1, CHUNK_ROWS):
                end = min(begin + CHUNK_ROWS, chunk.numel() - 1)
                labels = chunk[begin + 1 : end + 1].to(logits.device)
                log_p = logits[begin:end].float().log_softmax(-1)
                nll += _nll(log_p, labels)
                if other is None:
                    continue
                log_q = other[begin:end].to(log_p.device).float().log_softmax(-1)
                reference_nll += _nll(log_q, labels)
                divergence = torch.nn.functional.kl_div(
                    log_p, log_q, reduction="none", log_target=True
                )
                kl += divergence.sum(-1).double().sum().cpu()
                agreeing += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            count += chunk.numel() - 1
            if progress is not None:
                progress(done, len(chunks))
    finally:
        for m, mode in zip(models, training, strict=True):
            m.train(mode)
    mean = float(nll) / count
    return Evaluation(
        perplexity=_exp(mean),
        nll=mean,
        tokens=count,
        windows=len(chunks),
        window=window,
        kl=None if reference is None else float(kl) / count,
        agreement=None if reference is None else agreeing / count,
        reference_perplexity=None if reference is None else _exp(float(reference_nll) / count),
        seconds=time.perf_counter() - start,
    )


def _checked_ids(ids: Tensor | Sequence[int], window: int, max_tokens: int | None) -> Tensor:
    """The ids to use, int64 (tokens). Raises ValueError for a bad argument."""
    tokens = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
    if tokens.dim() == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise ValueError(
            f"ids: expected integers of shape (tokens,), got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}"
        )
    if window < 2:
        raise ValueError(f"window: expected at least 2 tokens, got {window}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens: expected at least 2, got {max_tokens}")
    tokens = tokens[:max_tokens].long()
    if tokens.numel() < 2:
        raise ValueError(f"ids: expected at least 2 tokens, got {tokens.numel()}")
    return tokens


def _logits(model: nn.Module, chunk: Tensor) -> Tensor:
    """The logits of one window, (T, vocabulary)."""
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    device = torch.device("cpu") if first is None else first.device
    getter = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if callable(getter) else None
    if isinstance(embeddings, nn.Embedding):
        _check_range(chunk, embeddings.num_embeddings)  # before it fails with an IndexError
    out: Any = model(chunk.to(device)[None])
    logits = getattr(out, "logits", out)
    _check_range(chunk, logits.shape[-1])
    return logits[0]


def _check_range(chunk: Tensor, vocabulary: int) -> None:
    low, high = int(chunk.min()), int(chunk.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"ids: expected values in [0, {vocabulary}), got {low}..{high}")


def _nll(log_p: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the labels, summed, float64 on the CPU."""
    return -log_p.gather(-1, labels[:, None]).double().sum().cpu()


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
