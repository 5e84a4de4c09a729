"Selection against independent implementations, on tiny random models of several architectures."

import json
import math

import pytest
import torch
import torch.nn.functional as F
from small import CONFIGS, C, L, make, naive_student, random_windows, reference_loss

import linearpatch.method.selection as selection
from linearpatch.method.families import Evidence, fit_patch, least_squares
from linearpatch.method.hadamard import make_rotation
from linearpatch.method.mismatch import collect
from linearpatch.method.models import decoder_layers, n_layers, remove_layers
from linearpatch.method.selection import (
    METRICS,
    NEEDS,
    RULES,
    Metric,
    by_influence,
    by_patch,
    by_perplexity,
    by_random,
    by_similarity,
    by_taylor,
    select,
    taylor_importance,
    taylor_keep,
)
from linearpatch.workshop.cuts import Cut, candidates, runs
from linearpatch.workshop.forward import count_layer_calls


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def llama():
    return make()


@pytest.fixture(scope="module")
def windows():
    return random_windows()


def stats_of(model, windows, n=2, moments="all"):
    return collect(
        model,
        windows,
        cuts=[c for k in range(1, n + 1) for c in candidates(L, k)],
        rotation=make_rotation(C),
        moments=moments,
    )


@pytest.fixture(scope="module")
def stats(llama, windows):
    return stats_of(llama, windows)


@torch.no_grad()
def streams(model, ids):
    "X^(0) ... X^(L) by patching each forward: output_hidden_states has a normed last entry."
    seen, layers = {}, decoder_layers(model)
    originals = [layer.forward for layer in layers]

    def wrap(l, forward):
        def f(*args, **kwargs):
            seen[l] = (args[0] if args else kwargs["hidden_states"]).clone()
            out = forward(*args, **kwargs)
            seen[l + 1] = (out[0] if isinstance(out, tuple) else out).clone()
            return out

        return f

    for l, layer in enumerate(layers):
        layer.forward = wrap(l, originals[l])
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return [seen[l].double() for l in range(len(layers) + 1)]


# ---- cosine, angle, influence ------------------------------------------------------------------


def test_token_wise_cosine_is_the_papers(model, windows):
    stats, xs = stats_of(model, windows), streams(model, windows.ids)
    for n in (1, 2):
        want = {
            Cut(s, s + n): F.cosine_similarity(xs[s], xs[s + n], dim=-1).mean().item()
            for s in range(L - n + 1)
        }
        got = by_similarity(stats, n)
        assert got.scores.keys() == want.keys()
        for cut in want:
            assert got.scores[cut] == pytest.approx(want[cut], abs=1e-5)
        assert got.cuts == [max(want, key=want.get)] and got.best == "max"


def test_channel_cosine_is_the_public_codes(llama, windows, stats):
    xs = streams(llama, windows.ids)
    want = {
        Cut(s, s + 2): torch.stack(
            [
                F.cosine_similarity(xs[s][i : i + 1], xs[s + 2][i : i + 1]).mean()
                for i in range(len(windows))
            ]
        )
        .mean()
        .item()
        for s in range(L - 1)
    }
    got = select(stats=stats, n_remove=2, metric="cosine-channel")
    for cut in want:
        assert got.scores[cut] == pytest.approx(want[cut], abs=1e-5)


def test_angular_and_influence(llama, windows, stats):
    xs = streams(llama, windows.ids)
    cos = lambda a, b: F.cosine_similarity(xs[a], xs[b], dim=-1)
    got = select(stats=stats, n_remove=2, metric="angular")
    for cut, value in got.scores.items():
        assert value == pytest.approx(
            (cos(cut.start, cut.stop).clamp(-1, 1).arccos() / math.pi).mean().item(), abs=1e-4
        )
    assert got.scores[got.cuts[0]] == min(got.scores.values())
    bi = [1 - cos(l, l + 1).mean().item() for l in range(L)]
    got = by_influence(stats, 3)
    assert (
        got.cuts == runs(sorted(range(L), key=bi.__getitem__)[:3])
        and got.info["order"] == sorted(range(L), key=bi.__getitem__)[:3]
    )
    for l in range(L):
        assert got.scores[Cut(l, l + 1)] == pytest.approx(bi[l], abs=1e-5)


@pytest.mark.parametrize("family", ["none", "hadamard", "lstsq"])
def test_patch_aware_equals_naive(model, windows, family):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stats = stats_of(model, windows)
    got = by_patch(model, stats, windows, 2, patch=family, batch_size=3)
    for cut in candidates(L, 2):
        student = naive_student(
            model, cut, None if family == "none" else fit_patch(stats, cut, family)
        )
        assert got.scores[cut] == pytest.approx(
            math.exp(reference_loss(student, windows)), rel=2e-4
        )
    assert got.cuts == [min(got.scores, key=got.scores.get)]
    assert n_layers(model) == L and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )


# ---- SLEB, Taylor, random ----------------------------------------------------------------------


def test_greedy_equals_brute_force(model, windows):
    left, order = list(range(L)), []
    for _ in range(3):
        tried = {
            l: reference_loss(remove_layers(model, runs(order + [l])), windows)
            for l in left
            if l not in (0, L - 1)
        }
        order.append(min(tried, key=tried.get))
        left.remove(order[-1])
    got = by_perplexity(model, windows, 3, batch_size=7)
    assert got.info["order"] == order and got.cuts == runs(order)
    assert got.info["perplexity"][-1] == pytest.approx(math.exp(tried[order[-1]]), rel=1e-4)
    free = by_perplexity(model, windows, 1, keep=(0, 0), batch_size=7)
    assert len(free.scores) == L and len(got.scores) == L - 2


def test_taylor_equals_autograd(model, windows):
    params = [list(layer.parameters()) for layer in decoder_layers(model)]
    loss = model(input_ids=windows.ids, labels=windows.ids).loss
    grads = iter(torch.autograd.grad(loss, sum(params, [])))
    want = torch.stack([sum((p * next(grads)).abs().sum() for p in ps) for ps in params]).detach()
    got = taylor_importance(model, windows, batch_size=3)
    torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=0)
    chosen = by_taylor(model, windows, 2)
    assert chosen.cuts == runs(
        sorted(range(1, L - 1), key=want.tolist().__getitem__)[:2]
    ) and chosen.info["kept"] == [0, L - 1]


def test_taylor_leaves_the_model_as_it_was(windows):
    model = make()
    weight, frozen = model.lm_head.weight, decoder_layers(model)[1].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    held = weight.grad
    frozen.requires_grad_(False)
    with torch.no_grad():
        first = taylor_importance(model, windows)  # works inside no_grad
    assert weight.grad is held and not frozen.requires_grad and first[1] > 0
    assert all(p.grad is None for p in model.parameters() if p is not weight)
    torch.testing.assert_close(
        first, taylor_importance(model, windows, batch_size=7), rtol=1e-5, atol=0
    )
    assert taylor_keep(32) == (4, 2) and taylor_keep(80) == (4, 2) and taylor_keep(8) == (1, 1)


def test_random_is_seeded():
    assert by_random(20, 6, 3) == by_random(20, 6, 3)
    assert len({tuple(by_random(20, 6, seed).layers) for seed in range(8)}) > 4
    assert all(len(by_random(20, 6, seed).layers) == 6 for seed in range(8))


# ---- select ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_select_runs_every_metric(llama, stats, windows, metric):
    got = select(llama, stats, windows, 2, metric, batch_size=7)
    assert got.metric == metric and len(got.layers) == 2 and got.cuts == runs(got.layers)
    assert got == select(llama, stats, windows, 2, metric, batch_size=7)
    assert json.loads(json.dumps(got.record()))["cuts"] == [[c.start, c.stop] for c in got.cuts]
    assert repr(got).startswith(f"Selection by {metric}: Cut[") and len(repr(got)) < 120


def test_plot(stats):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    assert (
        by_similarity(stats, 2).plot().get_xlabel() == "start s"
        and by_influence(stats, 2).plot().get_xlabel() == "layer"
    )
    assert by_random(L, 2).plot() is not None
    plt.close("all")


def test_given_cuts(llama, stats):
    assert select(llama, cuts=["3:4", Cut(1, 2), (2, 3)]).cuts == [Cut(1, 4)]
    assert select(stats=stats, cuts=[Cut(0, 2)]).metric == "given"
    for bad in (
        [Cut(1, 3), Cut(2, 4)],
        [Cut(4, L + 1)],
        [Cut(0, L)],
        [],
    ):  # overlap, out of range, everything, nothing
        with pytest.raises(ValueError):
            select(llama, cuts=bad)
    with pytest.raises(ValueError, match="pass model= or stats="):
        select(cuts=[Cut(1, 2)])


@pytest.mark.parametrize(
    "request_, words",
    [
        (dict(metric="cosin", n_remove=2), "unknown metric 'cosin'.*cosine, angular.*patch-aware"),
        (dict(metric="cosine"), "n_remove is missing"),
        (dict(n_remove=2), "needs stats.*collect"),
        (dict(metric="patch-aware", n_remove=2), "needs stats and windows"),
        (dict(metric="perplexity", n_remove=2), "needs windows"),
        (dict(metric="cosine", n_remove=3, stats=True), "hold no cut of 3 layers.*collect"),
        (dict(metric="cosine", n_remove=L, stats=True), f"cannot remove {L} of {L} layers"),
        (dict(metric="influence", n_remove=0, stats=True), "cannot remove 0"),
        (dict(metric="random", n_remove=L), f"cannot remove {L}"),
        (
            dict(metric="taylor", n_remove=L - 1, windows=True),
            f"n_remove={L - 1} is too many.*at most {L - 2}",
        ),
        (dict(metric="perplexity", n_remove=L - 1, windows=True), "too many"),
        (
            dict(metric="patch-aware", n_remove=2, windows=True, stats=True, patch="cubic"),
            "no patch family 'cubic'.*hadamard",
        ),
        (
            dict(metric="patch-aware", n_remove=2, windows=True, stats=True, objective="accuracy"),
            "unknown objective 'accuracy'",
        ),
    ],
)
def test_errors_name_value_and_remedy(llama, stats, windows, request_, words):
    given = {"stats": stats, "windows": windows}
    request_ = {k: given.get(k, v) if v is True else v for k, v in request_.items()}
    with count_layer_calls(llama) as count, pytest.raises(ValueError, match="(?s)" + words):
        select(llama, **request_)
    assert count == [0]  # nothing was computed


def test_family_without_moments(llama, windows):
    bare = collect(llama, windows, n_remove=2, rotation=make_rotation(C))
    with pytest.raises(ValueError, match="needs moments.*moments='all'"):
        select(llama, bare, windows, 2, "patch-aware", patch="lstsq")


def test_stats_of_another_model(stats, windows):
    other = remove_layers(make(), [Cut(0, 2)])
    with pytest.raises(ValueError, match=f"{L} layers, this one has {L - 2}"):
        select(other, stats, windows, 2)


def test_broken_activations(windows):
    model = make()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        by_perplexity(model, windows, 1)


def test_a_metric_is_added_in_one_place(monkeypatch, stats):
    assert list(METRICS) == list(RULES) == list(NEEDS)
    assert {name: rule.needs for name, rule in RULES.items()} == NEEDS
    rule = Metric(["stats"], lambda r: by_similarity(r.stats, r.n_remove, "angular"))
    monkeypatch.setitem(RULES, "own", rule)
    monkeypatch.setattr(selection, "METRICS", (*METRICS, "own"))
    monkeypatch.setitem(NEEDS, "own", rule.needs)
    assert (
        select(stats=stats, n_remove=2, metric="own").cuts
        == by_similarity(stats, 2, "angular").cuts
    )
    with pytest.raises(ValueError, match="metric 'own' needs stats"):
        select(n_remove=2, metric="own")


def test_explained_takes_the_cut_that_a_regression_restores_best():
    "Against a direct loop: fit on one half of the windows, judge on the other."
    from test_families import sides, with_bos
    from tiny import make as tiny_model

    from linearpatch.method.families import choose_ridge

    model, w = tiny_model("llama"), with_bos(16)
    stats = collect(model, w, n_remove=2, moments="all")
    chosen = select(stats=stats, n_remove=2, metric="explained")
    assert chosen.best == "min" and chosen.scores[chosen.cuts[0]] == min(chosen.scores.values())
    assert set(chosen.scores) == set(stats.cuts)
    for cut in stats.cuts[1:]:
        ridge, _ = choose_ridge(Evidence(stats, cut), "mlp")
        x, m, _, y = sides(model, w, cut)
        weight, total, wrong = 1 / (x.norm(dim=-1) * y.norm(dim=-1)), 0.0, 0.0
        growth = (y.norm(dim=-1) / x.norm(dim=-1)).log().mean().exp()
        for seen in (slice(0, None, 2), slice(1, None, 2)):
            unseen = slice(1 - seen.start, None, 2)
            u, t, v = (a[seen].flatten(0, 1) for a in (torch.cat([x, m], -1), y, weight))
            gram = (u * v[:, None]).T @ u
            fit = least_squares(
                gram, (u * v[:, None]).T @ t, growth * torch.eye(32).double(), ridge
            )
            u, t, v = (a[unseen].flatten(0, 1) for a in (torch.cat([x, m], -1), y, weight))
            wrong += (v * (u @ fit - t).square().sum(1)).sum().item()
            total += (v * t.square().sum(1)).sum().item()
        assert chosen.scores[cut] == pytest.approx(wrong / total, rel=1e-3)
    bare = collect(model, w, n_remove=2)
    with pytest.raises(ValueError, match="no second moments.*moments='all'"):
        select(stats=bare, n_remove=2, metric="explained")
