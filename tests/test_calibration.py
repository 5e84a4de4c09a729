"Token windows: every refusal, and the arithmetic of the cutting."

import logging

import pytest
import torch

from linearpatch.method import calibration
from linearpatch.method.calibration import (
    Windows,
    check_seq_len,
    load_windows,
    make_windows,
    sample_windows,
)
from linearpatch.method.models import load_playground


@pytest.fixture(scope="module")
def playground():
    return load_playground()


@pytest.fixture(scope="module")
def tokenizer(playground):
    return playground[1]


class Letters:
    "A tokenizer with one token a character, so that every window can be read."

    bos_token_id, eos_token_id, model_max_length = 0, 1, 1000

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens and not verbose
        return {"input_ids": [ord(c) for c in text]}


letters = Letters()
read = lambda ids: "".join(chr(i) for i in ids.tolist())
alphabet = "abcdefghijklmnopqrstuvwxyz"


def test_windows_behave_like_a_list():
    w = Windows(torch.arange(20).view(5, 4), mask=torch.ones(5, 4), source="s", bos=True, stride=3)
    assert (len(w), w.seq_len, w.n_tokens) == (5, 4, 20)
    assert (
        w[1:3].ids.tolist() == w.ids[1:3].tolist()
        and w[1:3].source == "s"
        and w[1:3].bos
        and w[1:3].stride == 3
    )
    assert w[-1].ids.tolist() == [[16, 17, 18, 19]]
    assert w[torch.tensor([4, 0])].ids[:, 0].tolist() == [16, 0]
    assert len(w[1::2]) == 2
    with pytest.raises(IndexError):
        w[5]
    assert [len(ids) for ids, mask in w.batches(2)] == [2, 2, 1]
    assert sum(len(one) for one in w) == 5  # iterates by its indices
    assert "5 x 4" in repr(w)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Windows(torch.arange(4)), "shape"),
        (lambda: Windows(torch.zeros(2, 3), mask=torch.ones(2, 4)), "mask has shape"),
        (lambda: Windows(torch.zeros(2, 3)).batches(0), "batch_size=0"),
    ],
)
def test_windows_refuse(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("bos", [True, False])
def test_consecutive_windows_cover_the_joined_stream(bos):
    w = make_windows(["abcde", "fgh"], letters, seq_len=4, bos=bos)
    body = w.ids[:, 1:] if bos else w.ids
    assert read(body.flatten()) == "abcde\n\nfgh"[: body.numel()]
    assert len(w) == 10 // (3 if bos else 4) and w.mask.all() and w.scored.all()
    if bos:
        assert (w.ids[:, 0] == 0).all()
    assert w.stride == (3 if bos else 4)


def test_random_windows_are_disjoint_seeded_and_everywhere():
    text = "".join(chr(1000 + i) for i in range(1000))  # every token its own place
    starts = []
    for seed in range(60):
        w = make_windows([text], letters, seq_len=11, samples=20, seed=seed)
        start = w.ids[:, 1] - 1000
        assert (w.ids[:, 1:] == 1000 + start[:, None] + torch.arange(10)).all()
        assert (start.sort().values.diff() >= 10).all()
        starts.append(start)
    again = make_windows([text], letters, seq_len=11, samples=20, seed=0)
    assert (again.ids[:, 1] - 1000).equal(starts[0]) and not starts[0].equal(starts[1])
    every = torch.cat(starts).double()
    assert abs(every.mean() - 495) < 30 and every.min() < 20 and every.max() > 970
    first = torch.stack(starts)[:, 0].double()  # shuffled: the first window is not the leftmost
    assert abs(first.mean() - 495) < 150


def test_as_many_windows_as_fit():
    w = make_windows([alphabet], letters, seq_len=14, samples=2)
    assert sorted(map(read, w.ids[:, 1:])) == [alphabet[:13], alphabet[13:]]


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("bos", [True, False])
def test_sliding_windows_score_each_token_once(stride, bos):
    w = make_windows([alphabet], letters, seq_len=6, stride=stride, bos=bos)
    body, scored = (w.ids[:, 1:], w.scored[:, 1:]) if bos else (w.ids, w.scored)
    assert read(body[scored]) == alphabet[: int(scored.sum())]
    assert len(alphabet) - int(scored.sum()) < stride


def test_windows_inside_documents():
    texts = [c * n for c, n in zip("abcdefgh", [3, 10, 4, 12, 5, 11, 1, 10])]
    w = make_windows(texts, letters, seq_len=11, samples=4, within=True)
    assert sorted(map(read, w.ids[:, 1:])) == [c * 10 for c in "bdfh"]
    with pytest.raises(ValueError, match="only 4 hold 10 tokens.*5 are needed"):
        make_windows(texts, letters, 11, samples=5, within=True)
    assert (
        len(make_windows(texts, letters, 6, within=True)) == 2 + 2 + 1 + 2 + 2
    )  # all there are: 5 tokens each


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (dict(texts=[]), "empty: it has 0 tokens, 9 are needed"),
        (dict(texts=["", " \n"]), "empty"),
        (dict(texts=["abc"]), "has 3 tokens, 9 are needed"),
        (dict(texts=[alphabet], samples=3), "has 26 tokens, 27 are needed .*at most 2 samples"),
        (dict(texts=[alphabet], samples=0), "samples=0"),
        (dict(texts=[alphabet], samples=-1), "samples=-1"),
        (dict(texts=[alphabet], seq_len=1), "seq_len=1"),
        (dict(texts=[alphabet], seq_len=2000), "longer than the tokenizer allows .1000 tokens"),
        (dict(texts=[alphabet], stride=0), "stride=0"),
        (dict(texts=[alphabet], stride=10), "stride=10"),
        (dict(texts=[alphabet], stride=3, samples=1), "stride=3"),
    ],
)
def test_too_little_and_nonsense(kwargs, says):
    with pytest.raises(ValueError, match=says):
        make_windows(**{"tokenizer": letters, "seq_len": 10, **kwargs})


def test_no_bos():
    class NoBos(Letters):
        bos_token_id = None

    for call in (
        lambda: make_windows([alphabet], NoBos(), 5),
        lambda: load_windows("passages", NoBos(), seq_len=5),
    ):
        with pytest.raises(ValueError, match="no BOS token: use bos=False .*--no-bos"):
            call()
    assert read(make_windows([alphabet], NoBos(), 5, bos=False).ids[0]) == "abcde"


def test_the_models_limit_counts_before_the_tokenizers(playground):
    model, _ = playground
    limit = model.config.max_position_embeddings

    class Short(Letters):
        model_max_length = 8

    check_seq_len(limit, Short(), model)
    with pytest.raises(ValueError, match=f"longer than the model allows .{limit} tokens"):
        check_seq_len(limit + 1, Short(), model)
    with pytest.raises(ValueError, match="tokenizer allows"):
        check_seq_len(9, Short())


def test_tokenizing_a_long_text_does_not_warn(tokenizer, caplog, capsys, recwarn, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", 64)
    tokenizer.deprecation_warnings.clear() if hasattr(tokenizer, "deprecation_warnings") else None
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        load_windows("passages", tokenizer, seq_len=64, samples=4)
    assert (
        not [r for r in caplog.records if "length" in r.getMessage()]
        and not recwarn.list
        and "length" not in capsys.readouterr().err
    )


def test_joined_before_tokenizing(tokenizer):
    texts = ["One river.", "", "Two rivers, and a third."]
    w = make_windows(texts, tokenizer, seq_len=5)
    stream = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    assert w.ids[:, 1:].flatten().tolist() == stream[: len(w) * 4]


# From a source in one call


def test_a_short_file_is_named(tmp_path):
    (tmp_path / "short.txt").write_text("abcdef")
    with pytest.raises(
        ValueError,
        match="the text of short.txt is too short: it has 6 tokens, 1278 are needed "
        ".142 windows x 9",
    ):
        load_windows(tmp_path / "short.txt", letters, seq_len=10, samples=142)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="the text of empty.txt is empty"):
        load_windows(tmp_path / "empty.txt", letters, seq_len=10)


def test_numbers_are_checked_before_any_text_is_read(monkeypatch):
    monkeypatch.setattr(calibration, "load_text", lambda *a: pytest.fail("text was read"))
    for kwargs in (dict(seq_len=5000), dict(seq_len=10, samples=0)):
        with pytest.raises(ValueError):
            load_windows("wikitext2", letters, **kwargs)


def test_c4_protocol(hub):
    w = load_windows("c4", letters, split="heldout", seq_len=20, samples=None)
    assert len(w) == 256 and w.stride is None and w.source == "c4/validation.00000-of-00008"
    assert all(read(row) in alphabet * 2 for row in w.ids[:, 1:])  # none crosses two documents
    assert len(load_windows("c4", letters, seq_len=20, samples=7)) == 7


def test_wikitext_protocol(hub):
    w = load_windows("wikitext2", letters, split="heldout", seq_len=20, samples=None, bos=False)
    assert w.source == "wikitext2/test" and w.stride == 20
    assert read(w.ids.flatten()).startswith(alphabet * 2 + "\n\n" + alphabet)


# Sampled from the model


def test_sampled_windows(playground):
    model, tokenizer = playground
    before = torch.get_rng_state()
    w = sample_windows(model, tokenizer, seq_len=24, samples=5, seed=3)
    assert torch.get_rng_state().equal(before)  # the caller's random state is untouched
    assert w.ids.shape == (5, 24) and w.mask.all() and w.bos and w.source == "self"
    assert (w.ids[:, 0] == tokenizer.bos_token_id).all()
    assert not torch.isin(
        w.ids[:, 1:], torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id])
    ).any()
    for batch_size in (1, 2):
        assert sample_windows(model, tokenizer, 24, 5, seed=3, batch_size=batch_size).ids.equal(
            w.ids
        )
    assert not sample_windows(model, tokenizer, 24, 5, seed=4).ids.equal(w.ids)
    assert len({tuple(row.tolist()) for row in w.ids}) == 5


def test_sampling_follows_the_models_distribution(playground):
    model, tokenizer = playground
    w = sample_windows(model, tokenizer, seq_len=2, samples=2000, batch_size=500)
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1]
    logits[[tokenizer.bos_token_id, tokenizer.eos_token_id]] = -torch.inf
    p, share = logits.softmax(-1), w.ids[:, 1].bincount(minlength=len(logits)) / len(w)
    for token in p.topk(5).indices:
        assert abs(share[token] - p[token]) < 5 * (p[token] / len(w)).sqrt()
    cold = sample_windows(model, tokenizer, seq_len=2, samples=50, temperature=1e-4)
    assert (cold.ids[:, 1] == p.argmax()).all()


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (dict(samples=0), "samples=0"),
        (dict(temperature=0), "temperature=0"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(seq_len=10**6), "longer than the model allows"),
        (dict(seq_len=1), "seq_len=1"),
    ],
)
def test_sampling_refuses(playground, kwargs, says):
    with pytest.raises(ValueError, match=says):
        sample_windows(*playground, **{"seq_len": 8, "samples": 2, **kwargs})


def test_sampling_needs_bos(playground):
    class NoBos(Letters):
        bos_token_id = None

    with pytest.raises(ValueError, match="no BOS"):
        sample_windows(playground[0], NoBos(), 8, 2)
