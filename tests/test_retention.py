"Retained performance: ratios, their error against a simulation and the bootstrap, the table."

import json
import math

import numpy as np
import pytest

from linearpatch.method.models import load_playground
from linearpatch.method.pruning import prune
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.harness import TaskScore, TaskScores, evaluate_tasks, load_tasks
from linearpatch.workshop.retention import compare_tasks, retained, worse_tasks


@pytest.fixture(scope="module")
def playground():
    return load_playground()


@pytest.fixture(scope="module")
def loaded():
    return load_tasks("offline")


@pytest.fixture(scope="module")
def dense(playground, loaded):
    return evaluate_tasks(*playground, loaded, batch_size=64)


@pytest.fixture(scope="module")
def pruned(playground, loaded):
    return evaluate_tasks(
        prune(playground[0], Cut(2, 8), share=True), playground[1], loaded, batch_size=64
    )


def scores(values, n=400, seed=0):
    rng = np.random.default_rng(seed)
    return TaskScores(
        {
            t: TaskScore.of("acc", (rng.random(n) < v).astype(float).tolist())
            for t, v in values.items()
        }
    )


def test_retained_is_the_mean_of_ratios():
    a, b = scores(dict(x=0.5, y=0.9)), scores(dict(x=0.8, y=0.95), seed=1)
    assert retained(a, b).value == pytest.approx(
        (a["x"].value / b["x"].value + a["y"].value / b["y"].value) / 2
    )
    assert retained(b, b).value == 1 and retained(b, b).stderr == pytest.approx(0, abs=1e-12)
    plain = retained(dict(x=50.0, y=90.0), dict(x=80.0, y=95.0))
    assert (
        plain.value == pytest.approx((50 / 80 + 90 / 95) / 2)
        and math.isnan(plain.stderr)
        and not plain.paired
    )


def test_standard_error_against_a_simulation():
    "Two models, right or wrong together more often than not: how RP scatters over many draws."
    rng, n, draws, p_both, p_dense, p_student = (
        np.random.default_rng(0),
        200,
        3000,
        (0.5, 0.6, 0.75),
        (0.25, 0.2, 0.2),
        (0.05, 0.1, 0.02),
    )
    values, paired, unpaired = [], [], []
    for i in range(draws):
        dense, student = {}, {}
        for k, (both, d, s) in enumerate(zip(p_both, p_dense, p_student)):
            u = rng.random(n)
            dense[k] = TaskScore.of("acc", (u < both + d).astype(float).tolist())
            student[k] = TaskScore.of(
                "acc", ((u < both) | ((u >= both + d) & (u < both + d + s))).astype(float).tolist()
            )
        r = retained(student, dense)
        values.append(r.value)
        paired.append(r.stderr)
        if i < 200:
            unpaired.append(
                retained(
                    {k: TaskScore("acc", v.value, v.stderr, n) for k, v in student.items()},
                    {k: TaskScore("acc", v.value, v.stderr, n) for k, v in dense.items()},
                ).stderr
            )
    assert np.mean(paired) == pytest.approx(np.std(values), rel=0.06)
    assert np.mean(unpaired) > 1.1 * np.std(values), (
        "without the items, the standard error is too large"
    )


def test_standard_error_against_the_bootstrap(dense, pruned):
    rng, n = np.random.default_rng(0), 200
    hits = {t: (np.array(pruned[t].hits), np.array(dense[t].hits)) for t in dense}
    draw = lambda p, q: (lambda i: p[i].mean() / q[i].mean())(rng.integers(n, size=n))
    again = [np.mean([draw(*h) for h in hits.values()]) for _ in range(1500)]
    r = retained(pruned, dense)
    assert r.paired and r.stderr == pytest.approx(np.std(again), rel=0.12) and 0.7 < r.value < 0.95


def test_retained_needs_the_same_tasks():
    with pytest.raises(ValueError, match="different tasks.*y"):
        retained(dict(x=1.0), dict(x=1.0, y=1.0))
    with pytest.raises(ValueError, match="never right on x"):
        retained(dict(x=1.0), dict(x=0.0))


def test_table_and_warning():
    a, b, c = (
        scores(dict(x=0.9, y=0.9)),
        scores(dict(x=0.5, y=0.5), seed=1),
        scores(dict(x=0.4, y=0.6), seed=2),
    )
    worse = worse_tasks(c, b)
    assert set(worse) == {"x"} and worse["x"][0] == c["x"].value - b["x"].value
    assert worse["x"][1] == pytest.approx(
        np.std(np.subtract(c["x"].hits, b["x"].hits), ddof=1) / 20
    )
    table = compare_tasks(dict(dense=a, pruned=b, patched=c), pruned="pruned")
    assert json.loads(json.dumps(table)) == table and set(table["worse"]) == {"patched"}
    text, page = str(table), table._repr_markdown_()
    assert (
        f"{100 * c['x'].value:.2f}!" in text
        and "! patched is worse than without its patch on x (" in text
        and text.count("!") == 2
    )
    assert f"| {100 * retained(c, a).value:.2f} |" in page and page.startswith(
        "| accuracy, % | dense | pruned | patched |"
    )
