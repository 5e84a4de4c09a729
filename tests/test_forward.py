"Running a model and looking inside, against plain forward passes."

import math

import pytest
import torch
import torch.nn.functional as F
from small import CONFIGS, L, V, make, padded_windows, random_windows, reference_loss
from torch import Tensor

import linearpatch.workshop.forward as forward
from linearpatch.method.calibration import Windows
from linearpatch.method.models import decoder_layers, remove_layers
from linearpatch.workshop.cuts import Cut, candidates
from linearpatch.workshop.forward import (
    Suffix,
    count_layer_calls,
    layer_states,
    mean_loss,
    run_body,
    run_model,
    score_cuts,
    token_kl,
    token_nll,
    token_slices,
)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def llama():
    return make()


@pytest.fixture(scope="module")
def windows():
    return random_windows()


@pytest.fixture(scope="module")
def padded():
    return padded_windows()


@torch.no_grad()
def test_the_body_is_what_the_head_receives(model, padded):
    logits = run_model(model, padded.ids, padded.mask)
    head = model.get_output_embeddings()(run_body(model, padded.ids, padded.mask))
    if cap := getattr(model.config, "final_logit_softcapping", None):
        head = (head / cap).tanh() * cap
    torch.testing.assert_close(head[padded.mask], logits[padded.mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("floats", [1, V, 3 * V, 5 * V + 1])
def test_slices_of_tokens_do_not_change_a_score(monkeypatch, dtype, floats):
    p, q = torch.randn(2, 3, 11, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.randint(V, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) < 0.8
    nll, kl = token_nll(q, ids, mask), token_kl(p, q, mask)
    log_p, log_q = (x[:, :-1].double().log_softmax(-1) for x in (p.float(), q.float()))
    by_hand = -log_q.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(nll[0].double(), by_hand, rtol=1e-5, atol=1e-6)
    by_hand = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl[0].double(), by_hand, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(forward, "MAX_FLOATS", floats)
    for whole, sliced in ((nll, token_nll(q, ids, mask)), (kl, token_kl(p, q, mask))):
        torch.testing.assert_close(sliced[0], whole[0], rtol=1e-6, atol=1e-7)
        assert torch.equal(sliced[1], whole[1])
        assert torch.equal(sliced[1], mask[:, 1:] & mask[:, :-1])


def test_no_float32_copy_is_larger_than_a_slice(monkeypatch):
    "What log_softmax and cross_entropy see at once is bounded, also for one long window."
    monkeypatch.setattr(forward, "MAX_FLOATS", 4 * V)
    seen, softmax, entropy = [], Tensor.log_softmax, F.cross_entropy
    monkeypatch.setattr(
        Tensor, "log_softmax", lambda x, dim: seen.append(x.numel()) or softmax(x, dim)
    )
    monkeypatch.setattr(
        F, "cross_entropy", lambda x, y, **kw: seen.append(x.numel()) or entropy(x, y, **kw)
    )
    logits, mask = torch.randn(2, 50, V), torch.ones(2, 50, dtype=torch.bool)
    token_kl(logits, logits, mask)
    token_nll(logits, torch.zeros(2, 50, dtype=torch.long), mask)
    assert max(seen) <= 4 * V and len(seen) == 2 * 3 * math.ceil(49 / 4)


def test_a_window_of_one_token_has_no_score():
    logits, one = torch.randn(2, 1, V), torch.ones(2, 1, dtype=torch.bool)
    assert token_kl(logits, logits, one)[0].shape == (2, 0)
    assert token_nll(logits, one.long(), one)[0].shape == (2, 0)


def test_scores_carry_gradients():
    p, q = torch.randn(2, 1, 7, V)
    q.requires_grad_()
    mask = torch.ones(1, 7, dtype=torch.bool)
    (got,) = torch.autograd.grad(token_kl(p, q, mask)[0].sum(), q)
    expected = torch.zeros_like(got)
    expected[:, :-1] = q[:, :-1].softmax(-1) - p[:, :-1].softmax(-1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_mean_loss_is_that_of_transformers(llama, padded, batch_size):
    assert mean_loss(llama, padded, batch_size) == pytest.approx(
        reference_loss(llama, padded), rel=1e-5
    )


def test_token_slices_cover_every_prediction_once(monkeypatch):
    monkeypatch.setattr(forward, "MAX_FLOATS", 1000)
    slices = token_slices((1, 12, 300))
    assert [(s.start, s.stop) for s in slices] == [(0, 4), (3, 7), (6, 10), (9, 12)]


# ---- the shared prefix -------------------------------------------------------------------------


def test_suffix_gives_the_models_logits_back(model, padded):
    states = {}
    with torch.no_grad(), layer_states(model, states.__setitem__):
        logits = run_model(model, padded.ids, padded.mask)
    for l in range(1, L + 1):
        torch.testing.assert_close(
            Suffix(model, l)(states[l], padded.ids, padded.mask)[padded.mask],
            logits[padded.mask],
            atol=1e-5,
            rtol=1e-5,
        )
    assert not any(
        layer._forward_pre_hooks or layer._forward_hooks for layer in decoder_layers(model)
    )


def test_any_batch_size_and_padding(llama, padded):
    cuts = dict.fromkeys(candidates(L, 2))
    one, many = score_cuts(llama, padded, cuts), score_cuts(llama, padded, cuts, batch_size=4)
    for cut in cuts:
        assert one[cut] == pytest.approx(many[cut], rel=1e-5)
        assert one[cut] == pytest.approx(
            math.exp(reference_loss(remove_layers(llama, [cut]), padded)), rel=1e-4
        )


def test_overlapping_windows_score_each_token_once(llama, windows):
    scored = torch.rand(windows.ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    half, cut = Windows(windows.ids, windows.mask, "overlap", scored=scored), Cut(1, 3)
    with torch.no_grad():
        logp = remove_layers(llama, [cut])(input_ids=windows.ids).logits[:, :-1].log_softmax(-1)
    nll = -logp.gather(-1, windows.ids[:, 1:, None])[..., 0]
    assert score_cuts(llama, half, {cut: None}, batch_size=3)[cut] == pytest.approx(
        nll[scored[:, 1:]].mean().exp().item(), rel=1e-4
    )


def test_kl_equals_naive(llama, windows):
    got = score_cuts(llama, windows, dict.fromkeys(candidates(L, 2)), objective="kl", batch_size=2)
    with torch.no_grad():
        p = llama(input_ids=windows.ids).logits[:, :-1].double().log_softmax(-1)
        for cut, value in got.items():
            q = (
                remove_layers(llama, [cut])(input_ids=windows.ids)
                .logits[:, :-1]
                .double()
                .log_softmax(-1)
            )
            assert value == pytest.approx(
                F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item(), rel=1e-4
            )
    logits = torch.randn(2, 5, V)
    assert token_kl(logits, logits, torch.ones(2, 5, dtype=torch.bool))[0].abs().max() < 1e-6


def test_counts(llama, windows):
    cuts = dict.fromkeys(candidates(L, 2))
    with count_layer_calls(llama) as count:
        score_cuts(llama, windows, cuts, batch_size=7)
    assert count == [L + (L - 2) * (L - 1) // 2 + 1]
    with count_layer_calls(llama) as count:
        score_cuts(llama, windows, {Cut(2, 4): None, Cut(3, 5): None}, batch_size=7)
    assert count == [L + 2 + 1]
    run_model(llama, windows.ids, windows.mask)
    assert count == [L + 2 + 1]  # the hook is gone


def test_race_keeps_exact_finishers(llama, windows):
    many = Windows(
        windows.ids.repeat(5, 1)[torch.randperm(35)], torch.ones(35, 12, dtype=torch.bool), "random"
    )
    cuts = dict.fromkeys(candidates(L, 1))
    with count_layer_calls(llama) as plain:
        full = score_cuts(llama, many, cuts, batch_size=2)
    with count_layer_calls(llama) as raced:
        few = score_cuts(llama, many, cuts, batch_size=2, race=True)
    assert raced[0] < plain[0] and len(few) == 3 < len(full)
    for cut in few:
        assert few[cut] == pytest.approx(full[cut], rel=1e-9)
    assert (
        score_cuts(llama, many, cuts, batch_size=35, race=True).keys() == full.keys()
    )  # nothing to save in one batch
