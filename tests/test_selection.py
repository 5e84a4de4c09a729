"Selection against independent implementations, on tiny random models of several architectures."
import json, math

import pytest, torch
import torch.nn.functional as F
from transformers import Gemma2Config, GPT2Config, LlamaConfig, AutoModelForCausalLM

from linearpatch.calibration import Windows
from linearpatch.fusion import fit_patch
from linearpatch.hadamard import make_rotation
from linearpatch.mismatch import collect, layer_states
from linearpatch.models import Cut, candidates, decoder_layers, n_layers, remove_layers, runs
from linearpatch.selection import (METRICS, Selection, Suffix, by_influence, by_patch, by_perplexity, by_random, by_similarity, by_taylor,
                                   count_layer_calls, run_model, score_cuts, select, taylor_importance, taylor_keep, token_kl, token_nll)

L, C, V = 6, 32, 61
small = dict(vocab_size=V, hidden_size=C, intermediate_size=48, num_hidden_layers=L, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, initializer_range=.2, bos_token_id=0, eos_token_id=1, pad_token_id=1)
CONFIGS = dict(llama=lambda: LlamaConfig(**small), gemma2=lambda: Gemma2Config(**small, head_dim=8, sliding_window=4),
               gpt2=lambda: GPT2Config(vocab_size=V, n_embd=C, n_layer=L, n_head=4, n_positions=64, initializer_range=.2))


def make(name="llama", seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request): return make(request.param)


@pytest.fixture(scope="module")
def llama(): return make()


@pytest.fixture(scope="module")
def windows():
    g = torch.Generator().manual_seed(1)
    return Windows(torch.randint(2, V, (7, 12), generator=g), torch.ones(7, 12, dtype=torch.bool), "random")


@pytest.fixture(scope="module")
def padded(windows):
    mask = windows.mask.clone()
    for row, real in enumerate([12, 9, 5, 12, 3, 7, 12]): mask[row, real:] = False
    return Windows(torch.where(mask, windows.ids, 1), mask, "padded")


def stats_of(model, windows, n=2, moments="all"):
    return collect(model, windows, cuts=[c for k in range(1, n + 1) for c in candidates(L, k)], rotation=make_rotation(C), moments=moments)


@pytest.fixture(scope="module")
def stats(llama, windows): return stats_of(llama, windows)


@torch.no_grad()
def streams(model, ids):
    "X^(0) ... X^(L) by patching the layers' forward: no hooks, no output_hidden_states (whose last entry is normed)."
    seen, layers = {}, decoder_layers(model)
    originals = [layer.forward for layer in layers]
    def wrap(l, forward):
        def f(*args, **kwargs):
            seen[l] = (args[0] if args else kwargs["hidden_states"]).clone()
            out = forward(*args, **kwargs)
            seen[l + 1] = (out[0] if isinstance(out, tuple) else out).clone()
            return out
        return f
    for l, layer in enumerate(layers): layer.forward = wrap(l, originals[l])
    try: model(input_ids=ids, use_cache=False)
    finally:
        for layer in layers: del layer.forward
    return [seen[l].double() for l in range(len(layers) + 1)]


@torch.no_grad()
def reference_loss(model, windows):
    "Mean next-token loss by HuggingFace's own labels, a window at a time."
    total = count = 0
    for ids, mask in zip(windows.ids, windows.mask):
        ids = ids[mask][None]
        total, count = total + model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return total / count


def naive_student(model, cut, patch):
    "Deep copy, removal, and a hook that multiplies by P."
    student = remove_layers(model, [cut])
    layers, P = decoder_layers(student), None if patch is None else patch.matrix.float()
    if P is None: return student
    if cut.start < len(layers):
        def enter(module, args, kwargs):
            if args: return (args[0] @ P, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] @ P}
        layers[cut.start].register_forward_pre_hook(enter, with_kwargs=True)
    else: layers[-1].register_forward_hook(lambda m, a, out: (out[0] @ P, *out[1:]) if isinstance(out, tuple) else out @ P)
    return student


# ---- cosine, angle, influence ------------------------------------------------------------------------------------------

def test_token_wise_cosine_is_the_papers(model, windows):
    stats, xs = stats_of(model, windows), streams(model, windows.ids)
    for n in (1, 2):
        want = {Cut(s, s + n): F.cosine_similarity(xs[s], xs[s + n], dim=-1).mean().item() for s in range(L - n + 1)}
        got = by_similarity(stats, n)
        assert got.scores.keys() == want.keys()
        for cut in want: assert got.scores[cut] == pytest.approx(want[cut], abs=1e-5)
        assert got.cuts == [max(want, key=want.get)] and got.best == "max"


def test_channel_cosine_is_the_public_codes(llama, windows, stats):
    xs = streams(llama, windows.ids)
    want = {Cut(s, s + 2): torch.stack([F.cosine_similarity(xs[s][i:i+1], xs[s + 2][i:i+1]).mean() for i in range(len(windows))]).mean().item()
            for s in range(L - 1)}
    got = select(stats=stats, n_remove=2, metric="cosine-channel")
    for cut in want: assert got.scores[cut] == pytest.approx(want[cut], abs=1e-5)


def test_angular_and_influence(llama, windows, stats):
    xs = streams(llama, windows.ids)
    cos = lambda a, b: F.cosine_similarity(xs[a], xs[b], dim=-1)
    got = select(stats=stats, n_remove=2, metric="angular")
    for cut, value in got.scores.items(): assert value == pytest.approx((cos(cut.start, cut.stop).clamp(-1, 1).arccos() / math.pi).mean().item(), abs=1e-4)
    assert got.scores[got.cuts[0]] == min(got.scores.values())
    bi = [1 - cos(l, l + 1).mean().item() for l in range(L)]
    got = by_influence(stats, 3)
    assert got.cuts == runs(sorted(range(L), key=bi.__getitem__)[:3]) and got.info["order"] == sorted(range(L), key=bi.__getitem__)[:3]
    for l in range(L): assert got.scores[Cut(l, l + 1)] == pytest.approx(bi[l], abs=1e-5)


# ---- the shared prefix --------------------------------------------------------------------------------------------------

def test_suffix_gives_the_models_logits_back(model, padded):
    states = {}
    with torch.no_grad(), layer_states(model, states.__setitem__): logits = run_model(model, padded.ids, padded.mask)
    for l in range(1, L + 1): torch.testing.assert_close(Suffix(model, l)(states[l], padded.ids, padded.mask)[padded.mask], logits[padded.mask], atol=1e-5, rtol=1e-5)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in decoder_layers(model))


@pytest.mark.parametrize("family", ["none", "hadamard", "lstsq"])
def test_patch_aware_equals_naive(model, windows, family):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stats = stats_of(model, windows)
    got = by_patch(model, stats, windows, 2, patch=family, batch_size=3)
    for cut in candidates(L, 2):
        student = naive_student(model, cut, None if family == "none" else fit_patch(stats, cut, family))
        assert got.scores[cut] == pytest.approx(math.exp(reference_loss(student, windows)), rel=2e-4)
    assert got.cuts == [min(got.scores, key=got.scores.get)]
    assert n_layers(model) == L and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_any_batch_size_and_padding(llama, padded):
    cuts = {cut: None for cut in candidates(L, 2)}
    one, many = score_cuts(llama, padded, cuts), score_cuts(llama, padded, cuts, batch_size=4)
    for cut in cuts:
        assert one[cut] == pytest.approx(many[cut], rel=1e-5)
        assert one[cut] == pytest.approx(math.exp(reference_loss(remove_layers(llama, [cut]), padded)), rel=1e-4)


def test_overlapping_windows_score_each_token_once(llama, windows):
    scored = torch.rand(windows.ids.shape, generator=torch.Generator().manual_seed(2)) < .5
    half, cut = Windows(windows.ids, windows.mask, "overlap", scored=scored), Cut(1, 3)
    with torch.no_grad():
        logp = remove_layers(llama, [cut])(input_ids=windows.ids).logits[:, :-1].log_softmax(-1)
    nll = -logp.gather(-1, windows.ids[:, 1:, None])[..., 0]
    assert score_cuts(llama, half, {cut: None}, batch_size=3)[cut] == pytest.approx(nll[scored[:, 1:]].mean().exp().item(), rel=1e-4)


def test_kl_equals_naive(llama, windows):
    got = score_cuts(llama, windows, {cut: None for cut in candidates(L, 2)}, objective="kl", batch_size=2)
    with torch.no_grad():
        p = llama(input_ids=windows.ids).logits[:, :-1].double().log_softmax(-1)
        for cut, value in got.items():
            q = remove_layers(llama, [cut])(input_ids=windows.ids).logits[:, :-1].double().log_softmax(-1)
            assert value == pytest.approx(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item(), rel=1e-4)
    logits = torch.randn(2, 5, V)
    assert token_kl(logits, logits, torch.ones(2, 5, dtype=torch.bool))[0].abs().max() < 1e-6


def test_counts(llama, windows):
    cuts = {cut: None for cut in candidates(L, 2)}
    with count_layer_calls(llama) as count: score_cuts(llama, windows, cuts, batch_size=7)
    assert count == [L + (L - 2) * (L - 1) // 2 + 1]
    with count_layer_calls(llama) as count: score_cuts(llama, windows, {Cut(2, 4): None, Cut(3, 5): None}, batch_size=7)
    assert count == [L + 2 + 1]
    run_model(llama, windows.ids, windows.mask)
    assert count == [L + 2 + 1]  # the hook is gone


def test_race_keeps_exact_finishers(llama, windows):
    many = Windows(windows.ids.repeat(5, 1)[torch.randperm(35)], torch.ones(35, 12, dtype=torch.bool), "random")
    cuts = {cut: None for cut in candidates(L, 1)}
    with count_layer_calls(llama) as plain: full = score_cuts(llama, many, cuts, batch_size=2)
    with count_layer_calls(llama) as raced: few = score_cuts(llama, many, cuts, batch_size=2, race=True)
    assert raced[0] < plain[0] and len(few) == 3 < len(full)
    for cut in few: assert few[cut] == pytest.approx(full[cut], rel=1e-9)
    assert score_cuts(llama, many, cuts, batch_size=35, race=True).keys() == full.keys()  # nothing to save in one batch


# ---- SLEB, Taylor, random -----------------------------------------------------------------------------------------------

def test_greedy_equals_brute_force(model, windows):
    left, order = list(range(L)), []
    for _ in range(3):
        tried = {l: reference_loss(remove_layers(model, runs(order + [l])), windows) for l in left if l not in (0, L - 1)}
        order.append(min(tried, key=tried.get)); left.remove(order[-1])
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
    assert chosen.cuts == runs(sorted(range(1, L - 1), key=want.tolist().__getitem__)[:2]) and chosen.info["kept"] == [0, L - 1]


def test_taylor_leaves_the_model_as_it_was(windows):
    model = make()
    weight, frozen = model.lm_head.weight, decoder_layers(model)[1].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight); held = weight.grad
    frozen.requires_grad_(False)
    with torch.no_grad(): first = taylor_importance(model, windows)  # works inside no_grad
    assert weight.grad is held and not frozen.requires_grad and first[1] > 0
    assert all(p.grad is None for p in model.parameters() if p is not weight)
    torch.testing.assert_close(first, taylor_importance(model, windows, batch_size=7), rtol=1e-5, atol=0)
    assert taylor_keep(32) == (4, 2) and taylor_keep(80) == (4, 2) and taylor_keep(8) == (1, 1)


def test_random_is_seeded():
    assert by_random(20, 6, 3) == by_random(20, 6, 3)
    assert len({tuple(by_random(20, 6, seed).layers) for seed in range(8)}) > 4
    assert all(len(by_random(20, 6, seed).layers) == 6 for seed in range(8))


# ---- select -------------------------------------------------------------------------------------------------------------

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
    assert by_similarity(stats, 2).plot().get_xlabel() == "start s" and by_influence(stats, 2).plot().get_xlabel() == "layer"
    assert by_random(L, 2).plot() is not None
    plt.close("all")


def test_given_cuts(llama, stats):
    assert select(llama, cuts=["3:4", Cut(1, 2), (2, 3)]).cuts == [Cut(1, 4)]
    assert select(stats=stats, cuts=[Cut(0, 2)]).metric == "given"
    for bad in ([Cut(1, 3), Cut(2, 4)], [Cut(4, L + 1)], [Cut(0, L)], []):  # overlap, out of range, everything, nothing
        with pytest.raises(ValueError): select(llama, cuts=bad)
    with pytest.raises(ValueError, match="pass model= or stats="): select(cuts=[Cut(1, 2)])


@pytest.mark.parametrize("request_, words", [
    (dict(metric="cosin", n_remove=2), "unknown metric 'cosin'.*cosine, angular.*patch-aware"),
    (dict(metric="cosine"), "n_remove is missing"),
    (dict(n_remove=2), "needs stats.*collect"),
    (dict(metric="patch-aware", n_remove=2), "needs stats and windows"),
    (dict(metric="perplexity", n_remove=2), "needs windows"),
    (dict(metric="cosine", n_remove=3, stats=True), "hold no cut of 3 layers.*collect"),
    (dict(metric="cosine", n_remove=L, stats=True), f"cannot remove {L} of {L} layers"),
    (dict(metric="influence", n_remove=0, stats=True), "cannot remove 0"),
    (dict(metric="random", n_remove=L), f"cannot remove {L}"),
    (dict(metric="taylor", n_remove=L - 1, windows=True), f"n_remove={L - 1} is too many.*at most {L - 2}"),
    (dict(metric="perplexity", n_remove=L - 1, windows=True), "too many"),
    (dict(metric="patch-aware", n_remove=2, windows=True, stats=True, patch="cubic"), "no patch family 'cubic'.*hadamard"),
    (dict(metric="patch-aware", n_remove=2, windows=True, stats=True, objective="accuracy"), "unknown objective 'accuracy'"),
])
def test_errors_name_value_and_remedy(llama, stats, windows, request_, words):
    given = {"stats": stats, "windows": windows}
    request_ = {k: given.get(k, v) if v is True else v for k, v in request_.items()}
    with count_layer_calls(llama) as count, pytest.raises(ValueError, match="(?s)" + words): select(llama, **request_)
    assert count == [0]  # nothing was computed


def test_family_without_moments(llama, windows):
    bare = collect(llama, windows, n_remove=2, rotation=make_rotation(C))
    with pytest.raises(ValueError, match="needs moments.*moments='all'"): select(llama, bare, windows, 2, "patch-aware", patch="lstsq")


def test_stats_of_another_model(stats, windows):
    other = remove_layers(make(), [Cut(0, 2)])
    with pytest.raises(ValueError, match=f"{L} layers, this one has {L - 2}"): select(other, stats, windows, 2)


def test_broken_activations(windows):
    model = make()
    with torch.no_grad(): model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite"): by_perplexity(model, windows, 1)
