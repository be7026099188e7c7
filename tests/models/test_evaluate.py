"""Perplexity and KL divergence against a plain computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qkernels.models import evaluate
from qkernels.models.evaluate import perplexity

from ..tiny import ids, tiny_model


class Table(nn.Module):
    """Logits that depend on the current token only."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    found = perplexity(Table(torch.zeros(50, 50)), torch.arange(50), window=8)
    assert found.perplexity == pytest.approx(50, rel=1e-6)
    assert (found.windows, found.tokens) == (7, 50 - 7)
    assert (found.kl, found.agreement, found.reference_perplexity) == (None, None, None)


def test_matches_a_direct_float64_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_ROWS", 5)  # several chunks a window, the last one short
    model, other, tokens = tiny_model(1).double(), tiny_model(2).double(), ids(100)
    nll, kl, agree = [], [], []
    with torch.no_grad():
        for window in tokens.split(33):
            if len(window) < 2:
                continue
            p = model(window[None]).logits[0, :-1].log_softmax(-1)
            q = other(window[None]).logits[0, :-1].log_softmax(-1)
            nll += [-p[i, t].item() for i, t in enumerate(window[1:])]
            kl += (q.exp() * (q - p)).sum(-1).tolist()
            agree += (p.argmax(-1) == q.argmax(-1)).tolist()
    found = perplexity(model, tokens, window=33, reference=other)
    assert found.tokens == len(nll) == 96  # 33 + 33 + 33 + 1: the last token has nothing to follow
    assert found.nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.agreement == sum(agree) / len(agree)
    swapped = perplexity(other, tokens, window=33).perplexity
    assert found.reference_perplexity == pytest.approx(swapped, rel=1e-6)


def test_a_model_has_no_divergence_from_itself() -> None:
    model = tiny_model()
    found = perplexity(model, ids(60), window=30, reference=model)
    assert abs(found.kl) < 1e-6
    assert found.agreement == 1


def test_max_tokens_and_progress() -> None:
    calls: list[tuple[int, int]] = []
    found = perplexity(
        tiny_model(), ids(500), window=16, max_tokens=40, progress=lambda *seen: calls.append(seen)
    )
    assert (found.windows, found.tokens) == (3, 15 + 15 + 7)
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_training_mode_is_restored() -> None:
    model = tiny_model().train()
    perplexity(model, ids(20))
    assert model.training


@pytest.mark.parametrize(("tokens", "options", "message"), [
    ([1], {}, "ids: expected at least 2 tokens, got 1"),
    (torch.rand(9), {}, "ids: expected integers of shape"),
    (torch.zeros(3, 3, dtype=torch.int64), {}, r"got torch.int64 of shape \(3, 3\)"),
    ([1, 2, 3], {"window": 1}, "window: expected at least 2 tokens, got 1"),
    ([1, 2, 3], {"max_tokens": 1}, "max_tokens: expected at least 2, got 1"),
    ([1, 2, -3], {}, "ids: expected values in"),
])  # fmt: skip
def test_bad_input(tokens: object, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(Table(torch.zeros(9, 9)), tokens, **options)


def test_reference_with_another_vocabulary() -> None:
    with pytest.raises(
        ValueError, match="reference: expected a vocabulary of 9 like the model's, got 8"
    ):
        perplexity(Table(torch.zeros(9, 9)), [1, 2], reference=Table(torch.zeros(9, 8)))


def test_ids_beyond_the_embeddings() -> None:
    with pytest.raises(ValueError, match=r"ids: expected values in \[0, 128\), got 5..128"):
        perplexity(tiny_model(), [5, 128])
