"Perplexity and KL against independent computations, in any batches, pieces, padding, precision."

import copy
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import linearpatch.workshop.evaluation as evaluation
import linearpatch.workshop.forward as forward
from linearpatch.method.calibration import Windows, load_windows, make_windows
from linearpatch.method.models import load_playground, remove_layers
from linearpatch.workshop.evaluation import (
    Evaluation,
    evaluate,
    kl_divergence,
    perplexity,
    protocol,
    token_losses,
)


def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            **dict(
                vocab_size=50,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=False,
                initializer_range=0.3,
            ),
            **kw,
        }
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def other():
    return tiny(1)


def windows(n=6, t=20, padded=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (n, t), generator=g)
    lengths = torch.randint(2, t + 1, (n, 1), generator=g) if padded else torch.full((n, 1), t)
    return Windows(ids, torch.arange(t) < lengths, source="noise")


@torch.no_grad()
def losses(model, w):
    "Window by window, without any padding, in float64."
    out = []
    for ids, mask in w.batches(1):
        ids = ids[mask][None]
        logp = model(ids).logits.double().log_softmax(-1)
        out += [-logp[0, t, ids[0, t + 1]].item() for t in range(ids.shape[1] - 1)]
    return torch.tensor(out)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_perplexity_is_the_exponential_of_the_token_mean(model, padded, batch_size):
    w = windows(padded=padded)
    expected = losses(model, w)
    nll, counted = token_losses(model, w, batch_size)
    assert nll.shape == counted.shape == (6, 19) and int(counted.sum()) == len(expected)
    assert torch.allclose(nll[counted].double(), expected.double(), atol=1e-5)
    assert perplexity(model, w, batch_size) == pytest.approx(expected.mean().exp().item(), rel=1e-5)


def test_left_padding(model):
    w = windows(n=2, t=12)
    mask = w.mask.clone()
    mask[0, :5] = False
    left = Windows(w.ids, mask)
    assert perplexity(model, left) == pytest.approx(
        losses(model, left).mean().exp().item(), rel=1e-4
    )


@pytest.mark.parametrize(
    "max_logits, max_floats", [(1, 1), (50 * 20 * 2, 333), (10**9, 50 * 6 * 3)]
)
def test_pieces_do_not_change_the_result(model, other, monkeypatch, max_logits, max_floats):
    w = windows(padded=True)
    ppl, kl = perplexity(model, w), kl_divergence(model, other, w)
    monkeypatch.setattr(forward, "MAX_LOGITS", max_logits)
    monkeypatch.setattr(forward, "MAX_FLOATS", max_floats)
    assert perplexity(model, w) == pytest.approx(ppl, rel=1e-6) and kl_divergence(
        model, other, w
    ) == pytest.approx(kl, rel=1e-5)


def test_no_tensor_of_all_float32_logits(model, monkeypatch):
    "What the loss sees at once is bounded, and so is what one forward pass returns."
    monkeypatch.setattr(forward, "MAX_LOGITS", 50 * 20 * 2)
    monkeypatch.setattr(forward, "MAX_FLOATS", 50 * 2 * 4)
    seen, passes = [], []
    nll, run = evaluation.token_nll, evaluation.run_model
    monkeypatch.setattr(
        evaluation,
        "token_nll",
        lambda logits, ids, mask: seen.append(logits[:, :-1].numel()) or nll(logits, ids, mask),
    )
    monkeypatch.setattr(
        evaluation, "run_model", lambda m, ids, mask: passes.append(len(ids)) or run(m, ids, mask)
    )
    perplexity(model, windows(), batch_size=6)
    assert max(seen) <= 50 * 2 * 4 and passes == [2, 2, 2]


def test_agrees_with_transformers_on_one_window(model):
    w = windows(n=1)
    with torch.no_grad():
        loss = model(w.ids, labels=w.ids).loss
    assert perplexity(model, w) == pytest.approx(loss.exp().item(), rel=1e-5)


def test_uniform_model_has_perplexity_of_the_vocabulary():
    uniform = tiny()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    assert perplexity(uniform, windows(padded=True)) == pytest.approx(50, rel=1e-5)


def test_scored_tokens_only(model):
    w = windows()
    part = Windows(w.ids, scored=(torch.arange(20) >= 15).expand(6, 20))
    nll, _ = token_losses(model, w)
    assert perplexity(model, part) == pytest.approx(
        nll[:, 14:].double().mean().exp().item(), rel=1e-6
    )


def test_absolute_positions():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    ).eval()
    w = windows(padded=True)
    assert perplexity(gpt2, w) == pytest.approx(losses(gpt2, w).mean().exp().item(), rel=1e-5)


def test_half_precision_models_have_their_loss_in_float32(model):
    half, w = copy.deepcopy(model).bfloat16(), windows()
    nll, counted = token_losses(half, w)
    with torch.no_grad():
        logits = half(w.ids).logits
    assert logits.dtype == torch.bfloat16 and nll.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), w.ids[:, 1:].flatten()
    )
    assert math.log(perplexity(half, w)) == pytest.approx(expected.item(), abs=1e-5)
    assert kl_divergence(model, half, w) == pytest.approx(0, abs=0.05)


# KL


def test_kl_against_the_definition(model, other):
    w = windows(padded=True)
    total = count = 0
    for ids, mask in w.batches(1):
        ids = ids[mask][None]
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (model, other))
        total, count = total + (p.exp() * (p - q)).sum().item(), count + len(p)
    for batch_size in (1, 4):
        assert kl_divergence(model, other, w, batch_size) == pytest.approx(total / count, rel=1e-5)
    assert kl_divergence(model, model, w) == 0
    assert kl_divergence(other, model, w) != pytest.approx(
        total / count, rel=1e-3
    )  # it has a direction


def test_kl_needs_one_vocabulary(model):
    with pytest.raises(ValueError, match="teacher has 50 tokens in its vocabulary, the student 60"):
        kl_divergence(model, tiny(vocab_size=60), windows())


# What must not happen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_are_named(value):
    broken, w = tiny(), windows(n=5)
    w.ids[w.ids == 7] = 8
    w.ids[3, 5] = 7
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = value
    for call in (
        lambda: perplexity(broken, w),
        lambda: kl_divergence(tiny(), broken, w),
        lambda: perplexity(broken, w, batch_size=2),
    ):
        with pytest.raises(ValueError, match="not finite .nan or inf. in window 3 of noise"):
            call()
    w.mask[3] = False  # hidden by padding, it does no harm
    assert math.isfinite(perplexity(broken, w, batch_size=1))


@pytest.mark.parametrize(
    "w, says",
    [
        (windows()[:0], "no windows"),
        (windows(t=65), "longer than the model allows .64 tokens"),
        (Windows(torch.zeros(2, 5), mask=torch.zeros(2, 5)), "no prediction counts"),
        (Windows(torch.zeros(1, 5), mask=[[1, 0, 1, 0, 1]]), "no prediction counts"),
    ],
)
def test_refusals(model, w, says):
    with pytest.raises(ValueError, match=says):
        perplexity(model, w)


def test_batch_size(model):
    with pytest.raises(ValueError, match="batch_size=0"):
        perplexity(model, windows(), batch_size=0)


def test_a_broken_model_has_no_infinite_perplexity():
    loud = tiny()
    with torch.no_grad():
        loud.lm_head.weight *= 1e5
    with pytest.raises(ValueError, match="no finite number"):
        perplexity(loud, windows())


def test_models_are_left_as_they_were(model):
    noisy = tiny(attention_dropout=0.5)
    noisy.train()
    assert (
        perplexity(noisy, windows()) == perplexity(noisy, windows())
        and noisy.training
        and noisy.model.layers[0].training
    )
    broken = tiny()
    broken.train()
    with torch.no_grad():
        broken.lm_head.weight[:] = float("nan")
    with pytest.raises(ValueError):
        perplexity(broken, windows())
    assert broken.training
    assert torch.is_grad_enabled() and all(p.grad is None for p in noisy.parameters())


# Tables


def test_evaluate(model, other):
    corpora = dict(a=windows(), b=windows(seed=1, padded=True))
    result = evaluate(dict(dense=model, other=other), corpora, teacher=model, batch_size=3)
    assert (
        isinstance(result, dict)
        and list(result) == ["a", "b"]
        and list(result["a"]) == ["dense", "other"]
    )
    for c, w in corpora.items():
        assert result[c]["other"] == pytest.approx(perplexity(other, w)) and result.kl[c][
            "other"
        ] == pytest.approx(kl_divergence(model, other, w), rel=1e-5)
        assert result.kl[c]["dense"] == 0 and result.protocol[c] == protocol(w)
    assert (
        "a PPL" in str(result)
        and "a KL" in str(result)
        and "noise: 6 windows of 20 tokens" in str(result)
    )
    assert result._repr_markdown_().count("\n| other") == 1
    plain = evaluate(dict(dense=model), corpora)
    assert (
        plain.kl == {}
        and "KL" not in str(plain)
        and plain == {c: {"dense": result[c]["dense"]} for c in corpora}
    )
    assert str(Evaluation())
    for models, texts in (({}, corpora), (dict(dense=model), {})):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate(models, texts)


def test_protocol_names_everything():
    class Letters:
        bos_token_id, model_max_length = 0, 1000

        def __call__(self, text, **kw):
            return {"input_ids": [ord(c) for c in text]}

    text = ["abcdefghijklmnopqrstuvwxyz"]
    say = lambda **kw: protocol(make_windows(text, Letters(), 6, source="letters", **kw))
    assert say() == "letters: 5 windows of 6 tokens, stride 5, BOS first, 25 predicted tokens"
    assert say(bos=False) == "letters: 4 windows of 6 tokens, stride 6, no BOS, 20 predicted tokens"
    assert (
        say(stride=2) == "letters: 11 windows of 6 tokens, stride 2, BOS first, 25 predicted tokens"
    )
    assert (
        say(samples=3)
        == "letters: 3 windows of 6 tokens, at random places, BOS first, 15 predicted tokens"
    )


def test_the_playground():
    playground, tokenizer = load_playground()
    heldout = load_windows("passages", tokenizer, split="heldout", seq_len=128, samples=None)[:24]
    short = load_windows("passages", tokenizer, split="heldout", seq_len=16, samples=None)[:200]
    dense, cut = (
        perplexity(playground, heldout),
        perplexity(remove_layers(playground, ["2:4"], share=True), heldout),
    )
    assert 5 < dense < 80 and cut > dense
    assert perplexity(playground, short) > dense  # less context
