"""Learning one block's learnables: what is minimised, what is kept, and what is said of it."""

import pytest
import torch

from lrquant.losses import means, value
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_optimizer import Batches, learn

WANTED = torch.linspace(0.5, 2.0, 8)  # what the learned scales of the other tokens should come to


def recipe(**changes: object) -> Recipe:
    return Recipe.preset("lrquant", epochs=8, batch_size=2, schedule="cosine").changed(**changes)


def massive_activations() -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets) of four samples: the first token's norm is a thousand times the others'."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 8)
    x[:, 0] *= 1000
    target = x * WANTED
    target[:, 0] = x[:, 0] + 10 * torch.randn(4, 8)  # an error that nothing learned changes
    return x, target


@pytest.mark.parametrize("dynamic", [False, True])
def test_balanced_learns_the_other_tokens_beside_a_long_one_and_is_kept(dynamic: bool) -> None:
    x, target = massive_activations()
    asked = recipe(loss="balanced", let_lr=0.1, dynamic_loss=dynamic)

    def forward(learnables, chosen):
        rows = list(chosen)
        first = x[rows, :1]
        return means(torch.cat([first, x[rows, 1:] * learnables["a.scale"]], 1), [target[rows]], asked.loss)

    learned = learn(forward, {"a.scale": torch.ones(8)}, Batches(4, 2), recipe=asked, seed=0, on_epoch=lambda *_: None)
    assert learned.outcome == "learned"
    assert learned.final_loss < learned.initial_loss
    assert (learned.learnables["a.scale"] - WANTED).abs().mean() < 0.7 * (1 - WANTED).abs().mean()
    assert learned.final_loss == pytest.approx(
        float(value([torch.tensor(term) for term in learned.final_terms], "balanced")), rel=1e-6
    )


def test_a_block_whose_best_epoch_is_its_start_says_that_it_stayed() -> None:
    target = torch.randn(2, 3, 8)

    def forward(learnables, chosen):
        return means(target[list(chosen)] * learnables["a.scale"], [target[list(chosen)]], "mse")

    asked = recipe(loss="mse", let_lr=0.5, epochs=1)
    start = {"a.scale": torch.ones(8) + 1e-4}
    learned = learn(forward, start, Batches(2, 1), recipe=asked, seed=0, on_epoch=lambda *_: None)
    assert learned.outcome == "kept initial"
    torch.testing.assert_close(learned.learnables["a.scale"], start["a.scale"])
