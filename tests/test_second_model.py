"What the chapters claim, on a trained model that none of them has looked at."

import math
from pathlib import Path

import pytest
import torch

from linearpatch.method.calibration import load_windows
from linearpatch.method.families import FAMILIES, fit_patch, least_squares
from linearpatch.method.fusion import Patch
from linearpatch.method.mismatch import collect
from linearpatch.method.models import load_model
from linearpatch.method.pruning import prune
from linearpatch.method.selection import select
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.evaluation import perplexity
from linearpatch.workshop.forward import layer_states

FOLDER = Path(__file__).parent / "data" / "llama-8x64"


@pytest.fixture(scope="module")
def world():
    model, tokenizer = load_model(FOLDER, dtype=torch.float32)
    calibration = load_windows("passages", tokenizer, seq_len=128, samples=96)
    heldout = load_windows("passages", tokenizer, split="heldout", seq_len=128, samples=None)[:48]
    stats = collect(model, calibration, n_remove=4, moments="all", batch_size=32)
    return model, calibration, heldout, stats, perplexity(model, heldout, batch_size=16)


def closed(world, cut, matrices):
    "The share of the gap that each patch closes."
    model, _, heldout, _, dense = world
    pruned = perplexity(prune(model, cut, share=True), heldout, batch_size=16)
    students = {k: prune(model, cut, [Patch(m, k, cut)], share=True) for k, m in matrices.items()}
    return pruned / dense, {
        k: (pruned - perplexity(s, heldout, batch_size=16)) / (pruned - dense)
        for k, s in students.items()
    }


def test_the_first_token_is_massive(world):
    stats = world[3]
    assert (
        stats.first_token_max[2:6] > 3 * stats.other_token_max[2:6]
    ).all()  # less massive than the playground's
    assert stats.massive[8 * 4].position == 0


def test_families_at_the_cut_that_cosine_selects(world):
    model, _, _, stats, _ = world
    (cut,) = select(model, stats, n_remove=4).cuts
    damage, share = closed(world, cut, {f: fit_patch(stats, cut, f).matrix for f in FAMILIES})
    assert damage > 1.5 and share["none"] == pytest.approx(0, abs=1e-6)
    assert 0.05 < share["hadamard"] < share["procrustes"] < share["lstsq"] < 1


def test_the_cut_that_removes_the_maker_of_the_massive_token(world):
    model, calibration, _, stats, _ = world
    cut, X = Cut(1, 5), {}
    assert stats.first_token_max[2] > 10 * stats.first_token_max[1]  # layer 1 makes it
    with torch.no_grad(), layer_states(model, lambda l, x: X.__setitem__(l, x.double())):
        model.base_model(calibration.ids)
    x, y = (
        X[l][:, 1:].flatten(0, 1) for l in (cut.start, cut.stop)
    )  # the first token of each window is left out
    w = 1 / (x.norm(dim=1) * y.norm(dim=1))
    prior = fit_patch(stats, cut, "hadamard").matrix
    without = least_squares((x * w[:, None]).T @ x, (x * w[:, None]).T @ y, prior, 0.001)
    _, share = closed(
        world, cut, {"balanced": fit_patch(stats, cut, "lstsq").matrix, "without": without}
    )
    assert share["balanced"] > share["without"] + 0.1


def test_bigger_blocks_hurt_more(world):
    model, _, heldout, _, dense = world
    damage = [
        perplexity(prune(model, Cut(2, 2 + n), share=True), heldout, batch_size=16)
        for n in (1, 3, 5)
    ]
    assert dense < damage[0] < damage[1] < damage[2] and math.isfinite(damage[2])
