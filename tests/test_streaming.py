"The engine of the pass, fed by hand with made-up states."

import pytest
import torch

from linearpatch.method.hadamard import make_rotation
from linearpatch.workshop.accumulators import (
    CHUNK,
    HalvedMoments,
    RunningSums,
    cosines,
    measure_window,
    token_ratios,
)
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.streaming import (
    TOP_TOKENS,
    Massive,
    RunningBatch,
    check_record,
    largest_tokens,
    last_uses,
    merge_massive,
    read_record,
    window_record,
)


def states(tokens=700, channels=16, seed=0):
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))


def test_running_sums_own_what_they_hold():
    sums, value = RunningSums(), torch.ones(3, dtype=torch.float64)
    sums.add("a", value)
    sums.add("a", value)
    assert value.tolist() == [1, 1, 1] and sums.read()["a"].tolist() == [2, 2, 2]
    sums.maximum("b", torch.tensor(2.0))
    sums.maximum("b", torch.tensor(1.0))
    assert sums.read()["b"] == 2.0 and isinstance(sums.read()["b"], float)
    assert all(v.dtype == torch.float64 for v in sums.values.values())


def test_chunks_do_not_show():
    "More tokens than are looked at together give what all at once give."
    x, y, rotation = states(), states(seed=1), make_rotation(16)
    assert len(x) > 2 * CHUNK
    a, b = (measure_window(s, rotation, keep_rotated=True) for s in (x, y))
    torch.testing.assert_close(a.rotated, x @ rotation.matrix)
    torch.testing.assert_close(a.abs_sum_rot, (x @ rotation.matrix).abs().sum(0))
    torch.testing.assert_close(a.channel_norm, x.norm(dim=0))
    by_token, products = cosines(a, b)
    torch.testing.assert_close(by_token, torch.cosine_similarity(x, y))
    torch.testing.assert_close(products, (x * y).sum(0), rtol=1e-4, atol=1e-4)
    sigma, counts = token_ratios(x, y)
    ratio = y.double().abs() / x.double().abs().clamp_min(1e-6)
    assert sigma.item() == pytest.approx(ratio.std(0, correction=0).mean().item(), rel=1e-3)
    assert counts.sum() == x.numel()
    assert measure_window(x, rotation).rotated is None


def test_half_precision_is_summed_in_float32():
    state = measure_window(states().bfloat16(), make_rotation(16))
    assert state.x.dtype == state.abs_sum.dtype == torch.float32


def test_halves_are_windows_by_number():
    moments, rotation = HalvedMoments(16, mlp=False), make_rotation(16)
    for window in (0, 1, 2):
        sides = (measure_window(states(9, seed=10 * window + i), rotation) for i in (0, 1))
        moments.add(window, *sides)
    m = moments.result()
    assert m.half.xx_trace == pytest.approx(states(9, seed=10).square().sum().item(), rel=1e-5)
    torch.testing.assert_close(
        m.half.xy_plain, (states(9, seed=10).T @ states(9, seed=11)).double()
    )
    assert not m.has_mlp and m.half.half is None and (m - m.half).xx_trace > 0


def test_records_name_the_tokens():
    x = states(20)
    x[7, 3] = -50
    places = torch.arange(20) + 5  # the window begins with padding
    ids = torch.arange(25) + 100
    found = read_record(window_record(measure_window(x, make_rotation(16))), 4, ids, places)
    assert len(found) == TOP_TOKENS
    assert found[0] == Massive(layer=4, position=12, token_id=112, channel=3, value=50.0)


def test_one_record_for_a_token():
    tokens = [Massive(l, i, i % 3, 0, float(i)) for l in (0, 1) for i in range(30)]
    assert [t.value for t in largest_tokens(t for t in tokens if t.layer == 0)] == [29, 28, 27]
    assert [(t.layer, t.value) for t in merge_massive(tokens[::-1])] == [
        (l, v) for l in (0, 1) for v in (29, 28, 27)
    ]


def test_a_record_of_bad_states_is_refused():
    x = states(5)
    x[2, 2] = float("inf")
    record = window_record(measure_window(x, make_rotation(16)))
    with pytest.raises(ValueError, match=r"X\^\(3\), window 8: a float16 model"):
        check_record(record, 3, 8)


def test_padding_is_left_out():
    mask = torch.tensor([[True] * 4, [False, False, True, True]])
    x = states(8).reshape(2, 4, 16)
    batch = RunningBatch(torch.zeros(2, 4, dtype=torch.long), mask)
    whole, part = batch.real_tokens(x)
    assert torch.equal(whole, x[0]) and torch.equal(part, x[1, 2:])


def test_states_are_held_as_long_as_they_are_needed():
    assert last_uses([Cut(0, 3), Cut(1, 2)], 3) == {0: 3, 1: 2, 2: 3, 3: 4}
