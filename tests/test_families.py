"The families of patches against their defining properties."

import pytest
import torch
from test_mismatch import states, windows
from tiny import make

import linearpatch.method.families as families
from linearpatch.method.calibration import Windows
from linearpatch.method.families import (
    FAMILIES,
    NEEDS_MOMENTS,
    REGISTRY,
    RIDGE,
    RIDGES,
    Evidence,
    between,
    check_family,
    choose_ridge,
    cross_error,
    fit_from,
    fit_patch,
    foldable_least_squares,
    joint_least_squares,
    least_squares,
    mlp_least_squares,
    patch_family,
    prior_share,
    procrustes,
    with_mlp,
)
from linearpatch.method.fusion import Patch, fuse
from linearpatch.method.mismatch import collect
from linearpatch.method.models import decoder_layers, n_layers
from linearpatch.method.pruning import patch_modules, prune
from linearpatch.method.scaling import channel_scale
from linearpatch.workshop.accumulators import Moments
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.forward import layer_states, mlp_states

CUT = Cut(1, 4)


@pytest.fixture(scope="module")
def fitted():
    model, w = make("llama"), windows(8, 16)
    X = states(model, w)
    x, y = (torch.cat([a[l] for a in X]) for l in (CUT.start, CUT.stop))
    return collect(model, w, n_remove=3, moments="all", batch_size=4), x, y


def test_simple_families(fitted):
    stats, x, y = fitted
    eye = torch.eye(32).double()
    assert torch.equal(fit_patch(stats, CUT, "none").matrix, eye)
    torch.testing.assert_close(
        fit_patch(stats, CUT, "scalar").matrix,
        eye * (y.abs().sum() / x.abs().sum()),
        rtol=1e-5,
        atol=0,
    )
    torch.testing.assert_close(
        fit_patch(stats, CUT, "diagonal").matrix,
        (y.abs().sum(0) / x.abs().sum(0)).diag(),
        rtol=1e-5,
        atol=0,
    )


def test_procrustes_is_the_best_scaled_rotation(fitted):
    stats, x, y = fitted
    P = fit_patch(stats, CUT, "procrustes").matrix
    c = torch.linalg.svdvals(P)
    torch.testing.assert_close(c, c.mean().expand(32))
    error = (x @ P - y).square().sum()
    g = torch.Generator().manual_seed(0)
    for step in (0.01, 0.1):
        for _ in range(10):
            A = torch.randn(32, 32, generator=g).double() * step
            assert (
                x @ P @ torch.linalg.matrix_exp(A - A.T) - y
            ).square().sum() > error  # another rotation
        for factor in (1 - step, 1 + step):
            assert (x @ P * factor - y).square().sum() > error  # another size


def test_least_squares_has_a_zero_gradient(fitted):
    stats, x, y = fitted
    weight, prior = 1 / (x.norm(dim=1) * y.norm(dim=1)), fit_patch(stats, CUT, "hadamard").matrix
    W = fit_patch(stats, CUT, "lstsq", ridge=0.1).matrix.clone().requires_grad_()
    lam = 0.1 * ((x * weight[:, None]).T @ x).diagonal().mean()
    objective = (weight[:, None] * (x @ W - y).square()).sum() + lam * (W - prior).square().sum()
    objective.backward()
    assert W.grad.norm() < 1e-4 * objective.item()


def test_ridge_goes_from_the_data_to_the_prior(fitted):
    stats, x, y = fitted
    prior = fit_patch(stats, CUT, "hadamard").matrix
    distances = [
        (fit_patch(stats, CUT, "lstsq", ridge=r).matrix - prior).norm().item()
        for r in (0, 0.1, 10, 1e6)
    ]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-3 * distances[0]


def test_recovers_a_linear_map():
    x, W = torch.randn(200, 6).double(), torch.randn(6, 6).double()
    torch.testing.assert_close(least_squares(x.T @ x, x.T @ x @ W, torch.eye(6).double(), 0.0), W)
    Q = torch.linalg.qr(W)[0]
    torch.testing.assert_close(procrustes(x.T @ (2 * x @ Q), x.square().sum().item()), 2 * Q)


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_apply_to_row_vectors(fitted, family):
    patch = fit_patch(fitted[0], CUT, family)
    h, m = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    T = torch.eye(32).double() if patch.mlp is None else patch.mlp
    expected = (h.double() - m.double() + m.double() @ T) @ patch.matrix
    torch.testing.assert_close(patch.apply(h, m), expected.float(), rtol=1e-4, atol=1e-4)
    assert patch.cut == CUT and patch.family == family and family in repr(patch)
    assert patch.distance == 0 if family in ("none", "mlp") else patch.distance > 0
    assert (patch.mlp is not None) == (family in ("mlp", "foldable", "joint"))


def test_averaging_reaches_the_scale(fitted):
    stats = fitted[0]
    P = fit_patch(stats, CUT, averaging="mean-of-ratios").matrix
    torch.testing.assert_close(
        P, fuse(channel_scale(stats, CUT, averaging="mean-of-ratios"), stats.rotation)
    )
    assert not torch.equal(P, fit_patch(stats, CUT).matrix)


def test_bad_input(fitted):
    stats = fitted[0]
    bare = collect(make("llama"), windows(2), n_remove=3)
    with pytest.raises(ValueError, match="no patch family 'magic'.*hadamard"):
        fit_patch(stats, CUT, "magic")
    with pytest.raises(ValueError, match="out of range"):
        fit_patch(stats, Cut(5, 9))
    with pytest.raises(ValueError, match="ridge"):
        fit_patch(stats, CUT, "lstsq", ridge=-1)
    for family in NEEDS_MOMENTS:
        with pytest.raises(ValueError, match="needs the second moments.*moments="):
            fit_patch(bare, CUT, family)


# -- a second matrix, for the MLP before the cut


def planted(C=16, N=4000, seed=0):
    "Tokens whose y is x P + m B: the sums of them, and the matrices."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    m = draw(N, C) @ draw(C, C)
    x, P, B = draw(N, C) + m, draw(C, C), draw(C, C)
    return x, m, P, B


def sums(x, m, y):
    w = 1 / (x.norm(dim=1) * y.norm(dim=1))
    wx, wm = x * w[:, None], m * w[:, None]
    return Moments(
        wx.T @ x,
        wx.T @ y,
        w.sum().item(),
        x.T @ y,
        x.square().sum().item(),
        wm.T @ m,
        wx.T @ m,
        wm.T @ y,
    ), w


def test_joint_least_squares_agrees_with_lstsq_of_the_stacked_regressors():
    x, m, P, B = planted()
    y = (
        x @ P
        + m @ B
        + torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )
    moments, w = sums(x, m, y)
    found = joint_least_squares(moments, torch.eye(16).double(), 0.0)
    root = w.sqrt()[:, None]
    expected = torch.linalg.lstsq(root * torch.cat([x, m], 1), root * y).solution
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-6, atol=1e-8)


def test_foldable_is_the_best_of_its_kind():
    "No other scaled rotation, each with its own best B, has a smaller sum of squares."
    x, m, P, B = planted()
    y = x @ P + m @ B
    moments, w = sums(x, m, y)

    def cost(P):
        e = x @ P + m @ mlp_least_squares(moments, P, 1e-9) - y
        return (w * e.square().sum(1)).sum().item()

    P, _ = foldable_least_squares(moments, 1e-9)
    torch.testing.assert_close(P @ P.T, (P @ P.T)[0, 0] * torch.eye(16).double(), atol=1e-8, rtol=0)
    best, g = cost(P), torch.Generator().manual_seed(2)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(5):
            A = size * torch.randn(16, 16, generator=g, dtype=torch.float64)
            assert (
                cost(P @ torch.linalg.matrix_exp(A - A.T)) > best
                and cost(P * (1 + size)) > best
                and cost(P * (1 - size)) > best
            )


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen3-moe", "qwen2-moe", "gpt2", "opt", "gpt-neox", "falcon"]
)
@pytest.mark.parametrize("family", ["mlp", "foldable", "joint"])
def test_the_student_computes_x_P_plus_m_B(name, family):
    "Without any hook of the library: P at the interface, T in the last matrix, h = a P + m T P."
    teacher, cut = make(name), Cut(2, 4)
    windows = Windows(torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0)))
    stats = collect(teacher, windows, cuts=[cut], moments=[cut], batch_size=3)
    assert stats.moments[cut].has_mlp
    patch = fit_patch(stats, cut, family)
    seen = {}
    with torch.no_grad():
        with (
            layer_states(teacher, lambda l, x: seen.update({l: x})),
            mlp_states(teacher, [1], lambda l, m: seen.update(m=m)),
        ):
            teacher(windows.ids, use_cache=False)
        expected = (seen[2] - seen["m"] + seen["m"] @ patch.mlp.float()) @ patch.matrix.float()
        torch.testing.assert_close(patch.apply(seen[2], seen["m"]), expected, rtol=1e-4, atol=1e-4)
        student, got = prune(teacher, cut, patch), {}
        handle = decoder_layers(student)[2].register_forward_pre_hook(
            lambda l, a, k: got.update(h=a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        student(windows.ids, use_cache=False)
        handle.remove()
    torch.testing.assert_close(got["h"], expected, rtol=1e-3, atol=1e-3)
    assert len(patch_modules(student)) == (family != "mlp") and student.config.linearpatch[
        "folded"
    ] == [{"cut": [2, 4], "family": family, "layer": 1}]


@pytest.mark.parametrize(
    "name,cut", [("gemma2", Cut(2, 4)), ("gemma3", Cut(2, 4)), ("llama", Cut(0, 2))]
)
def test_without_an_mlp_that_writes_linearly_the_rest_is_fitted(name, cut):
    teacher = make(name)
    windows = Windows(torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0)))
    stats = collect(teacher, windows, cuts=[cut], moments=[cut])
    assert not stats.moments[cut].has_mlp
    for family, rest in (("mlp", "none"), ("foldable", "procrustes"), ("joint", "lstsq")):
        a, b = fit_patch(stats, cut, family, ridge=0.1), fit_patch(stats, cut, rest, ridge=0.1)
        assert a.mlp is None and torch.equal(a.matrix, b.matrix)
        prune(teacher, cut, a)


def test_moments_add_up_and_do_not_depend_on_the_batch():
    teacher, cut = make("llama"), Cut(2, 4)
    windows = Windows(torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0)))
    one, many = (collect(teacher, windows, cuts=[cut], moments=[cut], batch_size=b) for b in (1, 6))
    halves = collect(teacher, windows[:2], cuts=[cut], moments=[cut]) + collect(
        teacher, windows[2:], cuts=[cut], moments=[cut]
    )
    for other in (many, halves):
        for k in ("xx", "xy", "mm", "xm", "my"):
            torch.testing.assert_close(
                getattr(one.moments[cut], k), getattr(other.moments[cut], k), rtol=1e-5, atol=1e-6
            )


def test_a_patch_for_an_mlp_is_refused_where_there_is_none():
    patch = lambda cut: Patch(torch.eye(32).double(), "mlp", cut, mlp=2 * torch.eye(32).double())
    with pytest.raises(ValueError, match="no layer is left before the cut"):
        prune(make("llama"), Cut(0, 2), patch(Cut(0, 2)))
    teacher = make("gemma2")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    with pytest.raises(ValueError, match="a norm stands between"):
        prune(teacher, Cut(2, 4), patch(Cut(2, 4)), inplace=True)
    assert n_layers(teacher) == 6 and all(
        torch.equal(v, before[k]) for k, v in teacher.state_dict().items()
    )
    with pytest.raises(ValueError, match=r"shape \(8, 8\)"):
        prune(
            make("llama"),
            Cut(2, 4),
            Patch(torch.eye(32).double(), "mlp", Cut(2, 4), mlp=torch.eye(8).double()),
        )


def test_the_teacher_keeps_its_mlp_when_weights_are_shared():
    teacher = make("llama")
    W = decoder_layers(teacher)[1].mlp.down_proj.weight
    student = prune(
        teacher,
        Cut(2, 4),
        Patch(torch.eye(32).double(), "mlp", Cut(2, 4), mlp=2 * torch.eye(32).double()),
        share=True,
    )
    assert decoder_layers(teacher)[1].mlp.down_proj.weight is W
    torch.testing.assert_close(decoder_layers(student)[1].mlp.down_proj.weight, 2 * W)


# -- one table of families


def test_the_table():
    assert (
        *("none", "scalar", "diagonal", "hadamard", "procrustes", "lstsq"),
        *("mlp", "foldable", "joint"),
    ) == FAMILIES
    assert {"procrustes", "lstsq", "mlp", "foldable", "joint"} == NEEDS_MOMENTS
    assert RIDGE == {"lstsq": 0.1, "mlp": "cv", "foldable": "cv", "joint": "cv"}


def test_a_family_is_added_in_one_place(monkeypatch, fitted):
    monkeypatch.setattr(families, "REGISTRY", dict(REGISTRY))

    @patch_family("half way", ridge=0.5)
    def fit_half_way(evidence, ridge):
        return (1 - ridge) * evidence.identity + ridge * evidence.hadamard, None

    patch, whole = fit_patch(fitted[0], CUT, "half way"), fit_patch(fitted[0], CUT)
    torch.testing.assert_close(patch.matrix, (torch.eye(32).double() + whole.matrix) / 2)
    assert patch.family == check_family("half way") and patch.info["ridge"] == 0.5
    assert patch.info["rotation"] is None and "half way" not in REGISTRY


# -- the ridge, and how much of the prior


@torch.no_grad()
def sides(model, w, cut):
    "x, m, y of every window, (N, T, C)."
    seen = {}
    with (
        mlp_states(model, [cut.start - 1], lambda l, m: seen.update(m=m)),
        layer_states(model, lambda l, x: seen.update({l: x})),
    ):
        model(w.ids, use_cache=False)
    return seen[cut.start].double(), seen["m"].double(), seen[cut.stop].double()


@pytest.mark.parametrize("ridge", [0.003, 0.1])
def test_cross_validation_judges_tokens_that_a_fit_has_not_seen(ridge):
    "Against a loop over the halves, with every token in memory."
    model, w = make("llama"), windows(6, 16)
    stats = collect(model, w, n_remove=3, moments="all")
    evidence, (x, m, y) = Evidence(stats, CUT), sides(model, w, CUT)
    prior, error = fit_patch(stats, CUT).matrix, 0.0
    for seen in (slice(0, None, 2), slice(1, None, 2)):
        unseen = slice(1 - seen.start, None, 2)
        P, B = joint_least_squares(
            sums(*(a[seen].flatten(0, 1) for a in (x, m, y)))[0], prior, ridge
        )
        xs, ms, ys = (a[unseen].flatten(0, 1) for a in (x, m, y))
        weight = 1 / (xs.norm(dim=1) * ys.norm(dim=1))
        error += (weight * (xs @ P + ms @ B - ys).square().sum(1)).sum().item()
    assert cross_error(evidence, ridge) == pytest.approx(error, rel=1e-4)
    xs, ys = x.flatten(0, 1), y.flatten(0, 1)
    weight = 1 / (xs.norm(dim=1) * ys.norm(dim=1))
    alone = (weight * (xs @ prior - ys).square().sum(1)).sum().item()
    assert prior_share(evidence, ridge) == pytest.approx(error / (error + alone), rel=1e-4)


def test_the_strongest_ridge_that_is_as_good(fitted):
    evidence = Evidence(fitted[0], CUT)
    ridge, error = choose_ridge(evidence)
    errors = {r: cross_error(evidence, r) for r in RIDGES}
    assert error == errors[ridge] <= 1.02 * min(errors.values())
    assert all(errors[r] > 1.02 * min(errors.values()) for r in RIDGES if r > ridge)


def test_families_share_what_is_worked_out(monkeypatch, fitted):
    "One cross-validation and one hadamard patch for all families of a cut, and the same patches."
    solved, fused = [], []
    fit_state, fuse_ = families._fit_state, families.fuse
    monkeypatch.setattr(families, "_fit_state", lambda *a: solved.append(a) or fit_state(*a))
    monkeypatch.setattr(families, "fuse", lambda *a: fused.append(a) or fuse_(*a))
    evidence = Evidence(fitted[0], CUT)
    shared = {family: fit_from(evidence, family) for family in FAMILIES}
    assert len(solved) == 2 * len(RIDGES) and len(fused) == 1
    for family, patch in shared.items():
        alone = fit_patch(fitted[0], CUT, family)
        assert torch.equal(alone.matrix, patch.matrix) and alone.info == patch.info
        assert (alone.mlp is None) == (patch.mlp is None)
        assert alone.mlp is None or torch.equal(alone.mlp, patch.mlp)


def test_one_window_has_nothing_to_validate_with():
    stats = collect(make("llama"), windows(1, 48), cuts=[CUT], moments=[CUT])
    evidence = Evidence(stats, CUT)
    assert choose_ridge(evidence) == (max(RIDGES), float("inf"))
    assert prior_share(evidence, 0.1) == 1.0


def test_fits_follow_the_device_and_type_of_the_moments():
    "On the device `meta` nothing is computed, but what lies elsewhere is refused."
    x, m, P, B = planted()
    moments, _ = sums(x, m, x @ P + m @ B)
    for where in (dict(device="meta"), dict(dtype=torch.float32)):
        there = Moments(
            *(a.to(**where) if isinstance(a, torch.Tensor) else a for a in vars(moments).values())
        )
        prior = torch.eye(16).double()
        nearer = between(there, prior, 0.3)
        found = [
            least_squares(there.xx, there.xy, prior, 0.1),
            mlp_least_squares(there, prior, 0.1),
            *joint_least_squares(nearer, prior, 0.1),
            *with_mlp(*joint_least_squares(nearer, prior, 0.1)),
        ]
        assert all((a.device, a.dtype) == (there.xx.device, there.xx.dtype) for a in found)
