"""Compare sentence embeddings of two models, by cosine and by nearest neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrquant.calibration.sentences import batches

NEIGHBOURS, BATCH = 10, 16


@dataclass(frozen=True)
class EmbeddingQuality:
    """How well a model keeps the embeddings of its original.

    `cosine` is the mean over sentences between the two embeddings of each, `least` the smallest, and `neighbours` the
    mean share of a sentence's ten nearest others (by cosine) that are the same in both.
    """

    cosine: float
    least: float
    neighbours: float
    sentences: int


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], *, seqlen: int) -> Tensor:
    """Unit vectors, (texts, hidden), float32: the mean of the last hidden states over tokens that are no padding."""
    device, found = next(model.parameters()).device, []
    for inputs in batches(tokenizer, texts, batch=BATCH, seqlen=seqlen):
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        body = model.base_model
        states = body(**inputs).last_hidden_state.float()  # (batch, tokens, hidden)
        mask = inputs["attention_mask"][..., None].float()
        found.append(((states * mask).sum(1) / mask.sum(1)).cpu())
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def compare_embeddings(ours: Tensor, theirs: Tensor) -> EmbeddingQuality:  # (sentences, hidden) each, unit vectors
    """How alike two models' embeddings of the same sentences are."""
    cosines = (ours.double() * theirs.double()).sum(-1)
    count = min(NEIGHBOURS, len(ours) - 1)
    one, other = (_nearest(vectors, count) for vectors in (ours, theirs))
    shared = [len(set(a) & set(b)) / count for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    return EmbeddingQuality(float(cosines.mean()), float(cosines.min()), sum(shared) / len(shared), len(ours))


def _nearest(vectors: Tensor, count: int) -> Tensor:
    """Indices of each row's nearest others, (rows, count)."""
    alike = vectors @ vectors.T
    alike.fill_diagonal_(-2)
    return alike.topk(count, dim=-1).indices
