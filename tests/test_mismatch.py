"The streaming pass against the same quantities computed from activations that are all kept."

import math
from itertools import pairwise

import pytest
import torch
from tiny import CONFIGS, make

from linearpatch.method.calibration import Windows
from linearpatch.method.hadamard import make_rotation
from linearpatch.method.mismatch import (
    collect,
    plot_magnitude,
    plot_massive,
    plot_ratios,
    ratio_quantiles,
)
from linearpatch.method.models import decoder_layers
from linearpatch.workshop.accumulators import RATIO_BINS
from linearpatch.workshop.cuts import Cut, candidates
from linearpatch.workshop.forward import layer_states


def windows(n=5, length=12, padded=False, seed=0):
    ids = torch.randint(3, 64, (n, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        for i in range(n):
            mask[i, length - i :] = False
    return Windows(ids, mask, "random")


@torch.no_grad()
def states(model, w):
    "Per window, X^(0..L) of the real tokens, each (tokens, C) float64, from hooks on the layers."
    out = []
    for ids, mask in zip(w.ids, w.mask):
        seen = {}
        with layer_states(model, lambda l, x: seen.setdefault(l, x[0].double())):
            model(ids[None, mask])
        out.append([seen[l] for l in sorted(seen)])
    return out


@pytest.mark.parametrize("name", list(CONFIGS))
def test_states_are_what_the_model_calls_hidden_states(name):
    model, w, seen = make(name), windows(2), {}
    hooks = lambda: [
        (len(layer._forward_hooks), len(layer._forward_pre_hooks))
        for layer in decoder_layers(model)
    ]
    with torch.no_grad():
        # transformers hangs its own hooks here, for good
        expected = model(w.ids, output_hidden_states=True).hidden_states
        before = hooks()
        with layer_states(model, lambda l, x: seen.setdefault(l, x)):
            model(w.ids)
    assert sorted(seen) == list(range(len(decoder_layers(model)) + 1))
    for l in range(len(seen) - 1):
        torch.testing.assert_close(seen[l], expected[l])  # the last one of transformers is normed
    assert hooks() == before


@pytest.mark.parametrize(
    "name, padded, batch_size",
    [
        ("llama", False, 1),
        ("llama", True, 3),
        ("gpt2", False, 2),
        ("gemma2", False, 4),
        ("opt", True, 2),
    ],
)
def test_sums(name, padded, batch_size):
    model, w = make(name), windows(padded=padded)
    stats, X = collect(model, w, n_remove=2, batch_size=batch_size), states(model, w)
    H = make_rotation(32).matrix.double()
    everything = [torch.cat([x[l] for x in X]) for l in range(7)]
    assert (stats.n_tokens, stats.n_windows, stats.cuts) == (int(w.mask.sum()), 5, candidates(6, 2))
    close = dict(rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        stats.magnitude(), torch.stack([x.abs().mean(0) for x in everything]), **close
    )
    torch.testing.assert_close(
        stats.magnitude(rotated=True),
        torch.stack([(x @ H).abs().mean(0) for x in everything]),
        **close,
    )
    for c in stats.cuts:
        x, y = everything[c.start], everything[c.stop]
        cos = torch.cosine_similarity(x, y, dim=1)
        assert stats.cosine[c] == pytest.approx(cos.mean().item(), abs=1e-5)
        assert stats.angular(c) == pytest.approx(
            (cos.clamp(-1, 1).acos() / math.pi).mean().item(), abs=1e-3
        )
        channel = torch.stack(
            [torch.cosine_similarity(a[c.start], a[c.stop], dim=0).mean() for a in X]
        ).mean()
        assert stats.cosine_channel[c] == pytest.approx(channel.item(), abs=1e-5)
        for rotated, R in ((False, torch.eye(32).double()), (True, H)):
            ratios = [((a[c.stop] @ R).abs(), (a[c.start] @ R).abs()) for a in X]
            sigma = torch.stack(
                [(b / a.clamp_min(1e-6)).std(0, correction=0).mean() for b, a in ratios]
            ).mean()
            assert stats.sigma(c, rotated) == pytest.approx(sigma.item(), rel=1e-2)
            torch.testing.assert_close(
                stats.window_ratio(c, rotated),
                torch.stack([b.sum(0) / a.sum(0) for b, a in ratios]).mean(0),
                **close,
            )
            assert stats.ratio_hist(c, rotated).sum() == x.numel()
    torch.testing.assert_close(
        stats.influence,
        torch.stack(
            [1 - torch.cosine_similarity(a, b, dim=1).mean() for a, b in pairwise(everything)]
        ),
        rtol=1e-4,
        atol=1e-5,
    )


def test_extremes():
    model, w = make("llama"), windows(padded=True)
    stats, X = collect(model, w, n_remove=1), states(model, w)
    for l in range(7):
        assert stats.first_token_max[l] == pytest.approx(
            max(x[l][0].abs().max().item() for x in X), rel=1e-6
        )
        assert stats.other_token_max[l] == pytest.approx(
            max(x[l][1:].abs().max().item() for x in X), rel=1e-6
        )
        top = next(t for t in stats.massive if t.layer == l)
        assert top.value == pytest.approx(max(x[l].abs().max().item() for x in X), rel=1e-6)
        assert any(
            x[l].shape[0] > top.position
            and x[l][top.position, top.channel].abs().item() == pytest.approx(top.value, rel=1e-6)
            for x in X
        )
        assert len({t.token_id for t in stats.massive if t.layer == l}) == len(
            [t for t in stats.massive if t.layer == l]
        )


def test_moments():
    model, w, c = make("llama"), windows(), Cut(1, 4)
    m, X = collect(model, w, cuts=[Cut(0, 2)], moments=[c]).moments[c], states(model, w)
    x, y = (torch.cat([a[l] for a in X]) for l in (c.start, c.stop))
    weight = 1 / (x.norm(dim=1) * y.norm(dim=1))
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m.xx, (x * weight[:, None]).T @ x, **close)
    torch.testing.assert_close(m.xy, (x * weight[:, None]).T @ y, **close)
    torch.testing.assert_close(m.xy_plain, x.T @ y, **close)
    assert m.weight == pytest.approx(weight.sum().item(), rel=1e-4) and m.xx_trace == pytest.approx(
        x.square().sum().item(), rel=1e-5
    )


def test_passes_add_up_and_batches_do_not_matter():
    model, w = make("llama"), windows(6)
    whole = collect(model, w, n_remove=2, moments="all", batch_size=6)
    parts = collect(model, w[:2], n_remove=2, moments="all") + collect(
        model, w[2:], n_remove=2, moments="all", batch_size=3
    )
    assert (parts.n_tokens, parts.n_windows) == (whole.n_tokens, whole.n_windows)
    for a, b in (
        (whole.abs_sum, parts.abs_sum),
        (whole.abs_sum_rot, parts.abs_sum_rot),
        (whole.token_max, parts.token_max),
        (whole.influence, parts.influence),
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for c in whole.cuts:
        torch.testing.assert_close(whole.moments[c].xx, parts.moments[c].xx, rtol=1e-4, atol=1e-6)
        assert whole.sigma(c) == pytest.approx(parts.sigma(c), rel=1e-3) and whole.cosine[
            c
        ] == pytest.approx(parts.cosine[c], rel=1e-5)
    with pytest.raises(ValueError, match="cannot add"):
        whole + collect(model, w, n_remove=1)


@torch.no_grad()
def test_the_half_is_every_second_window():
    model, w, c = make("llama"), windows(5), Cut(1, 4)
    stats = collect(model, w, cuts=[c], moments=[c], batch_size=2)
    odd = collect(model, Windows(w.ids[1::2], w.mask[1::2], "odd"), cuts=[c], moments=[c])
    half, alone = stats.moments[c].half, odd.moments[c]
    for name in ("xx", "xy", "xy_plain", "mm", "xm", "my"):
        torch.testing.assert_close(getattr(half, name), getattr(alone, name), rtol=1e-5, atol=1e-8)
    assert half.weight == pytest.approx(alone.weight, rel=1e-6)
    assert half.yy == pytest.approx(alone.yy, rel=1e-6) and half.half is None
    assert collect(model, w[:1], cuts=[c], moments=[c]).moments[c].half.weight == 0


def test_ratios_only_where_they_are_read():
    model, w = make("llama"), windows(3)
    c, other = Cut(1, 3), Cut(2, 4)
    everything = collect(model, w, n_remove=2)
    stats = collect(model, w, n_remove=2, ratios=[c])
    assert stats.sigma(c) == everything.sigma(c)
    assert torch.equal(stats.ratio_hist(c, rotated=True), everything.ratio_hist(c, rotated=True))
    assert stats.cosine == everything.cosine
    assert torch.equal(stats.window_ratio(other), everything.window_ratio(other))
    with pytest.raises(ValueError, match="no token-wise ratios"):
        stats.sigma(other)
    with pytest.raises(ValueError, match="cannot add"):
        stats + everything


def test_the_model_is_left_as_it_was():
    model, w = make("llama"), windows(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    collect(model, w, n_remove=2)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


def test_sums_do_not_grow_with_the_windows():
    model = make("llama")

    def size(o):
        return sum(
            v.numel() if isinstance(v, torch.Tensor) else size(v) if isinstance(v, dict) else 1
            for v in (o.values() if isinstance(o, dict) else vars(o).values())
        )

    few, many = (collect(model, windows(n), n_remove=2, batch_size=4) for n in (2, 20))
    assert size(few) == size(many) and len(few.massive) <= len(many.massive) <= 7 * 8


@pytest.mark.parametrize("damage, layer", [("nan", 2), ("inf", 3)])
def test_nan_and_infinity_name_the_layer(damage, layer):
    model = make("llama")
    with torch.no_grad():
        decoder_layers(model)[layer - 1].mlp.down_proj.weight.fill_(float(damage))
    with pytest.raises(ValueError, match=rf"NaN or infinity in X\^\({layer}\), window 0.*bfloat16"):
        collect(model, windows(), n_remove=1)


def test_bad_questions():
    model, w = make("llama"), windows(2)
    for kw, match in (
        (dict(n_remove=6), "cannot remove 6 of 6"),
        (dict(n_remove=0), "cannot remove 0"),
        ({}, "one of the two"),
        (dict(cuts=[Cut(4, 9)]), "out of range"),
        (dict(n_remove=1, rotation=make_rotation(16)), "size 16"),
    ):
        with pytest.raises(ValueError, match=match):
            collect(model, w, **kw)
    with pytest.raises(ValueError, match="was not compared"):
        collect(model, w, n_remove=2).sigma(Cut(0, 1))


def test_plots_show_the_numbers():
    stats = collect(make("llama"), windows(), n_remove=2)
    cut = stats.cuts[1]
    image = plot_magnitude(stats, cut=cut).images[0].get_array()
    torch.testing.assert_close(torch.tensor(image.data), stats.magnitude())
    assert len(plot_massive(stats).lines) == 3
    medians = [line.get_ydata()[0] for line in plot_ratios(stats, cut).lines]
    assert medians == [ratio_quantiles(stats, cut, r, [0.5])[0] for r in (False, True)]
    assert RATIO_BINS[0] < medians[0] < RATIO_BINS[-1]
