"The scale against the paper's equations, written down again on hidden states of random models."

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linearpatch.method.calibration import Windows
from linearpatch.method.hadamard import make_rotation
from linearpatch.method.mismatch import collect
from linearpatch.method.models import decoder_layers
from linearpatch.method.scaling import AVERAGINGS, channel_scale, dead_channels, scale_report
from linearpatch.workshop.cuts import Cut

TINY = dict(
    vocab_size=61,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=40,
    num_hidden_layers=5,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
)


def tiny(kind="llama", hidden=24, seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, hidden_size=hidden, **TINY)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # larger branches: layers that change something
        for p in decoder_layers(model).parameters():
            if p.ndim > 1:
                p.mul_(8)
    return model


def windows(n=5, length=16, seed=0, padded=False):
    ids = torch.randint(2, 61, (n, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:  # real tokens first, then padding
        for i in range(n):
            mask[i, length - 2 * i :] = False
    return Windows(ids, mask, "random")


@torch.no_grad()
def states(model, w):
    "X^(0), ..., X^(L-1) by window, real tokens only (the last entry of transformers is normed)."
    out = [
        model(ids[None, mask], output_hidden_states=True).hidden_states[:-1]
        for ids, mask in zip(w.ids, w.mask)
    ]
    return [[layer[0].double() for layer in window] for window in out]


def reference(model, w, cut, H, averaging):
    "d_k = ||(X^(s+n) H)_k||_1 / ||(X^(s) H)_k||_1, over all tokens, or its mean over windows."
    sums = [[(X[l] @ H).abs().sum(0) for l in (cut.start, cut.stop)] for X in states(model, w)]
    if averaging == "mean-of-ratios":
        return torch.stack([after / before for before, after in sums]).mean(0)
    return sum(after for _, after in sums) / sum(before for before, _ in sums)


@pytest.mark.parametrize("averaging", AVERAGINGS)
@pytest.mark.parametrize(
    "kind, hidden", [("llama", 24), ("llama", 64), ("qwen2", 36), ("mistral", 28)]
)
def test_the_papers_equation(kind, hidden, averaging):
    model, w = tiny(kind, hidden), windows()
    H = make_rotation(hidden).matrix.double()
    cuts = [Cut(0, 2), Cut(1, 3), Cut(2, 4)]
    stats = collect(model, w, cuts=cuts, rotation=make_rotation(hidden), batch_size=2)
    for cut in cuts:
        for rotated, basis in ((True, H), (False, torch.eye(hidden, dtype=torch.float64))):
            d = channel_scale(stats, cut, rotated, averaging)
            assert d.shape == (hidden,) and d.dtype == torch.float64 and (d > 0).all()
            torch.testing.assert_close(
                d, reference(model, w, cut, basis, averaging), rtol=1e-5, atol=1e-5
            )


def test_a_cut_at_the_end_uses_the_raw_output():
    "X^(L) is what the last layer returns, before the final norm that transformers applies."
    model, w, seen = tiny(), windows(), []
    stats = collect(model, w, cuts=[Cut(3, 5)], rotation=make_rotation(24))
    keep = lambda layer, args, out: seen.append(out if torch.is_tensor(out) else out[0])
    handle = decoder_layers(model)[-1].register_forward_hook(keep)
    X = torch.cat([window[3] for window in states(model, w)])
    handle.remove()
    expected = torch.cat(seen).flatten(0, 1).double().abs().sum(0) / X.abs().sum(0)
    torch.testing.assert_close(
        channel_scale(stats, Cut(3, 5), rotated=False), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("averaging", AVERAGINGS)
def test_padding_does_not_count(averaging):
    model, w, cut = tiny(), windows(padded=True), Cut(1, 3)
    stats = collect(model, w, cuts=[cut], rotation=make_rotation(24), batch_size=3)
    expected = reference(model, w, cut, make_rotation(24).matrix.double(), averaging)
    torch.testing.assert_close(
        channel_scale(stats, cut, averaging=averaging), expected, rtol=1e-5, atol=1e-5
    )


def test_batch_size_and_merging_change_nothing():
    model, w, cut = tiny(), windows(6), Cut(1, 4)
    one, all_ = (
        collect(model, w, cuts=[cut], rotation=make_rotation(24), batch_size=b) for b in (1, 6)
    )
    parts = collect(model, w[:2], cuts=[cut], rotation=make_rotation(24)) + collect(
        model, w[2:], cuts=[cut], rotation=make_rotation(24)
    )
    for averaging in AVERAGINGS:
        d = channel_scale(one, cut, averaging=averaging)
        for other in (all_, parts):
            torch.testing.assert_close(
                channel_scale(other, cut, averaging=averaging), d, rtol=1e-5, atol=1e-5
            )


def test_scaled_magnitudes_match():
    model, w, cut = tiny(), windows(), Cut(1, 3)
    stats = collect(model, w, cuts=[cut], rotation=make_rotation(24))
    for rotated in (False, True):
        m = stats.magnitude(rotated=rotated)
        torch.testing.assert_close(channel_scale(stats, cut, rotated) * m[cut.start], m[cut.stop])


def test_ratio_of_means_does_not_depend_on_windows():
    before, after = (
        torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) + 0.1,
        torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) + 0.1,
    )

    def stats_of(b, a):
        "Statistics of windows with these sums, two sides of Cut(0, 1)."
        both = torch.stack([b.sum(0), a.sum(0)]).double()
        return SimpleNamespace(
            abs_sum=both,
            abs_sum_rot=both,
            n_layers=1,
            window_ratio=lambda cut, rotated: (a / b).mean(0),
        )

    fine, coarse = (
        stats_of(before, after),
        stats_of(before.reshape(2, 4, 6).sum(1), after.reshape(2, 4, 6).sum(1)),
    )
    torch.testing.assert_close(channel_scale(fine, Cut(0, 1)), channel_scale(coarse, Cut(0, 1)))
    assert not torch.allclose(
        *(channel_scale(s, Cut(0, 1), averaging="mean-of-ratios") for s in (fine, coarse))
    )


@pytest.mark.parametrize("averaging", AVERAGINGS)
def test_dead_channels(averaging):
    "Channel 3 is never written, channel 7 only by the removed layers: 0/0 and c/0."
    model, cut = tiny(), Cut(2, 4)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, [3, 7]] = 0
        for l, layer in enumerate(decoder_layers(model)):
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[[3, 7] if l < 2 else [3]] = 0
    stats = collect(model, windows(), cuts=[cut], rotation=make_rotation(24))
    assert dead_channels(stats, cut, rotated=False).nonzero()[:, 0].tolist() == [3, 7]
    assert not dead_channels(stats, cut).any()
    d = channel_scale(stats, cut, rotated=False, averaging=averaging)
    assert d[3] == d[7] == 1 and d.isfinite().all() and (d > 0).all()
    assert (channel_scale(stats, cut, averaging=averaging) > 0).all()
    assert scale_report(stats, cut, rotated=False, averaging=averaging)["dead"] == 2
    assert scale_report(stats, cut, averaging=averaging)["dead"] == 0


def test_a_channel_that_the_cut_silences():
    sums = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 3.0]], dtype=torch.float64)
    stats = SimpleNamespace(
        abs_sum=sums,
        abs_sum_rot=sums,
        n_layers=1,
        window_ratio=lambda cut, rotated: sums[1] / sums[0],
    )
    for averaging in AVERAGINGS:
        assert channel_scale(stats, Cut(0, 1), averaging=averaging).tolist() == [2, 1, 1]


def test_everything_dead():
    stats = SimpleNamespace(abs_sum=torch.zeros(2, 4), abs_sum_rot=torch.zeros(2, 4), n_layers=1)
    assert (
        channel_scale(stats, Cut(0, 1)).tolist() == [1] * 4
        and scale_report(stats, Cut(0, 1))["dead"] == 4
    )


def test_identical_sides_give_one():
    sums = torch.rand(1, 12, generator=torch.Generator().manual_seed(0)).expand(3, 12) + 0.1
    stats = SimpleNamespace(abs_sum=sums, abs_sum_rot=sums, n_layers=2)
    assert channel_scale(stats, Cut(0, 2)).eq(1).all()


def test_errors_name_the_value_and_the_choices():
    stats = SimpleNamespace(abs_sum=torch.ones(3, 4), abs_sum_rot=torch.ones(3, 4), n_layers=2)
    with pytest.raises(ValueError, match="'median'.*ratio-of-means"):
        channel_scale(stats, Cut(0, 1), averaging="median")
    with pytest.raises(ValueError, match="2 layers"):
        channel_scale(stats, Cut(1, 4))


def test_report_is_plain_numbers():
    stats = collect(tiny(), windows(), cuts=[Cut(1, 3)], rotation=make_rotation(24))
    report = scale_report(stats, Cut(1, 3))
    assert all(isinstance(v, (int, float)) for v in report.values())
    assert (
        report["n_channels"] == 24
        and report["min"] <= report["median"] <= report["max"]
        and report["spread"] >= 0
    )


def test_statistics_are_not_changed():
    stats = collect(tiny(), windows(), cuts=[Cut(1, 3)], rotation=make_rotation(24))
    sums = copy.deepcopy(stats.abs_sum)
    channel_scale(stats, Cut(1, 3), rotated=False).mul_(5)
    assert torch.equal(stats.abs_sum, sums)
