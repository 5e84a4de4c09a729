"The families of patches against their defining properties."

import json

import pytest
import torch
from test_mismatch import states, windows
from tiny import make
from transformers import AutoModelForCausalLM

import linearpatch.method.families as families
from linearpatch.method.calibration import Windows
from linearpatch.method.distillation import distill
from linearpatch.method.families import (
    FAMILIES,
    NEEDS_DOWN,
    NEEDS_MOMENTS,
    REGISTRY,
    RIDGE,
    RIDGES,
    SHARE,
    Evidence,
    Fit,
    between,
    check_family,
    choose_ridge,
    cross_errors,
    fit_from,
    fit_patch,
    foldable_least_squares,
    least_squares,
    normal_equations,
    part_least_squares,
    patch_family,
    procrustes,
    with_down,
    with_mlp,
)
from linearpatch.method.folding import fold
from linearpatch.method.fusion import Patch, first_token, fuse
from linearpatch.method.mismatch import collect
from linearpatch.method.models import decoder_layers, n_layers
from linearpatch.method.pruning import drop_first, patch_modules, prune
from linearpatch.method.scaling import channel_scale
from linearpatch.workshop.accumulators import Moments
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.forward import layer_states, mlp_states
from linearpatch.workshop.patch_files import load_patch, save_patch

CUT = Cut(1, 4)
WIDE = make("llama").config.intermediate_size


@pytest.fixture(scope="module")
def fitted():
    model, w = make("llama"), windows(8, 16)
    X = states(model, w)
    x, y = (torch.cat([a[l] for a in X]) for l in (CUT.start, CUT.stop))
    return collect(model, w, n_remove=3, moments="all", batch_size=4, down=True), x, y


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
    weight = 1 / (x.norm(dim=1) * y.norm(dim=1))
    growth = (y.norm(dim=1) / x.norm(dim=1)).log().mean().exp()
    W = fit_patch(stats, CUT, "lstsq", ridge=0.1).matrix.clone().requires_grad_()
    lam = 0.1 * ((x * weight[:, None]).T @ x).diagonal().mean()
    prior, target = growth * torch.eye(32).double(), (1 - SHARE) * y + SHARE * growth * x
    fit = (weight[:, None] * (x @ W - target).square()).sum()
    objective = fit + lam * (W - prior).square().sum()
    objective.backward()
    assert W.grad.norm() < 1e-4 * objective.item()


def test_ridge_goes_from_the_data_to_the_typical_scale(fitted):
    stats = fitted[0]
    prior = stats.moments[CUT].growth * torch.eye(32).double()
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
    h, m, z = torch.randn(2, 3, 32), torch.randn(2, 3, 32), torch.randn(2, 3, WIDE)
    T = torch.eye(32).double() if patch.mlp is None else patch.mlp
    D = torch.zeros(WIDE, 32).double() if patch.down is None else patch.down
    expected = (h.double() - m.double() + m.double() @ T + z.double() @ D) @ patch.matrix
    torch.testing.assert_close(patch.apply(h, m, z), expected.float(), rtol=1e-3, atol=1e-3)
    assert patch.cut == CUT and patch.family == family and family in repr(patch)
    assert patch.distance == 0 if family in ("none", "mlp", "refit") else patch.distance > 0
    assert (patch.mlp is not None) == (family in ("mlp", "foldable", "joint"))
    assert (patch.down is not None) == (family in ("refit", "joint-refit"))


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
    found = least_squares(*normal_equations(moments, "mlp"), torch.eye(16).double(), 0.0)
    root = w.sqrt()[:, None]
    expected = torch.linalg.lstsq(root * torch.cat([x, m], 1), root * y).solution
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_foldable_is_the_best_of_its_kind():
    "No other scaled rotation, each with its own best B, has a smaller sum of squares."
    x, m, P, B = planted()
    y = x @ P + m @ B
    moments, w = sums(x, m, y)

    def cost(P):
        e = x @ P + m @ part_least_squares(moments, "mlp", P, 1e-9) - y
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
        *("none", "scalar", "diagonal", "hadamard", "procrustes", "lstsq", "mlp", "unweighted"),
        *("foldable", "joint", "refit", "joint-refit"),
    ) == FAMILIES
    fits = {"lstsq", "mlp", "foldable", "joint", "refit", "joint-refit"}
    assert fits | {"procrustes", "unweighted"} == NEEDS_MOMENTS
    assert dict.fromkeys(fits, "cv") | {"unweighted": 1e-6} == RIDGE
    assert {"refit", "joint-refit"} == NEEDS_DOWN


def test_a_family_is_added_in_one_place(monkeypatch, fitted):
    monkeypatch.setattr(families, "REGISTRY", dict(REGISTRY))

    @patch_family("half way", ridge=0.5)
    def fit_half_way(evidence, ridge):
        return Fit((1 - ridge) * evidence.identity + ridge * evidence.hadamard)

    patch, whole = fit_patch(fitted[0], CUT, "half way"), fit_patch(fitted[0], CUT)
    torch.testing.assert_close(patch.matrix, (torch.eye(32).double() + whole.matrix) / 2)
    assert patch.family == check_family("half way") and patch.info["ridge"] == 0.5
    assert patch.info["rotation"] is None and "half way" not in REGISTRY


# -- the ridge


@torch.no_grad()
def sides(model, w, cut):
    "x, m, z and y of every window, (N, T, ...)."
    seen = {}
    with (
        mlp_states(
            model,
            [cut.start - 1],
            lambda l, m: seen.update(m=m),
            lambda l, z: seen.update(z=z),
        ),
        layer_states(model, lambda l, x: seen.update({l: x})),
    ):
        model(w.ids, use_cache=False)
    return [seen[k].double() for k in (cut.start, "m", "z", cut.stop)]


@pytest.mark.parametrize("part", ["", "mlp", "down"])
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_cross_validation_judges_tokens_that_a_fit_has_not_seen(ridge, part):
    "Against a loop over the halves, with every token in memory."
    model, w = make("llama"), windows(6, 16)
    stats = collect(model, w, n_remove=3, moments="all", down=True)
    x, m, z, y = sides(model, w, CUT)
    u = torch.cat([x, {"": x[..., :0], "mlp": m, "down": z}[part]], -1)
    weight = 1 / (x.norm(dim=-1) * y.norm(dim=-1))
    growth = (y.norm(dim=-1) / x.norm(dim=-1)).log().mean().exp()
    error = 0.0
    for seen in (slice(0, None, 2), slice(1, None, 2)):
        unseen = slice(1 - seen.start, None, 2)
        us, ys, ws = (a[seen].flatten(0, 1) for a in (u, y, weight))
        gram = (us * ws[:, None]).T @ us
        pull = torch.cat(
            [b.mean().expand(len(b)) for b in gram.diagonal().split([32, len(gram) - 32])]
        )
        wanted = (us * ws[:, None]).T @ ys
        wanted[:32] += ridge * pull[:32, None] * growth * torch.eye(32).double()
        W = torch.linalg.solve(gram + ridge * pull.diag(), wanted)
        ut, yt, wt = (a[unseen].flatten(0, 1) for a in (u, y, weight))
        error += (wt * (ut @ W - yt).square().sum(1)).sum().item()
    whole = (weight * y.square().sum(-1)).sum().item()
    found = cross_errors(Evidence(stats, CUT), part)[ridge]
    assert found == pytest.approx(error / whole, rel=1e-3)


def test_the_strongest_ridge_that_is_as_good(fitted):
    evidence = Evidence(fitted[0], CUT)
    ridge, error = choose_ridge(evidence, "mlp")
    errors = cross_errors(evidence, "mlp")
    assert error == errors[ridge] <= 1.01 * min(errors.values())
    assert all(errors[r] > 1.01 * min(errors.values()) for r in RIDGES if r > ridge)


def test_a_sketch_of_y_orders_the_ridges_as_all_of_it_does(monkeypatch, fitted):
    whole = cross_errors(Evidence(fitted[0], CUT), "mlp")
    monkeypatch.setattr(families, "SKETCH", 8)  # so that 32 channels are many
    few = cross_errors(Evidence(fitted[0], CUT), "mlp")
    assert few != whole
    best = min(few, key=few.get)
    assert whole[best] <= 1.05 * min(whole.values())


def test_families_share_what_is_worked_out(monkeypatch, fitted):
    "One cross-validation a part and one hadamard patch for all families of a cut."
    solved, fused = [], []
    fuse_, judge = families.fuse, families.heldout_error
    monkeypatch.setattr(families, "heldout_error", lambda *a: solved.append(a) or judge(*a))
    monkeypatch.setattr(families, "fuse", lambda *a: fused.append(a) or fuse_(*a))
    evidence = Evidence(fitted[0], CUT)
    shared = {family: fit_from(evidence, family) for family in FAMILIES}
    assert len(solved) == 3 * 2 * len(RIDGES) and len(fused) == 1
    for family, patch in shared.items():
        alone = fit_patch(fitted[0], CUT, family)
        assert torch.equal(alone.matrix, patch.matrix) and alone.info == patch.info
        for one, other in ((alone.mlp, patch.mlp), (alone.down, patch.down)):
            assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


def test_one_window_has_nothing_to_validate_with():
    stats = collect(make("llama"), windows(1, 48), cuts=[CUT], moments=[CUT])
    assert choose_ridge(Evidence(stats, CUT), "mlp") == (max(RIDGES), float("inf"))


def test_least_error_below_zero(monkeypatch):
    "Rounding leaves an error below zero where hardly a token is known; the least is taken still."
    errors = {1e-3: -2e-9, 1e-2: 0.5, 1.0: 0.9}
    monkeypatch.setattr(families, "cross_errors", lambda evidence, part: errors)
    assert choose_ridge(None) == (1e-3, -2e-9)


def test_fits_follow_the_device_and_type_of_the_moments():
    "On the device `meta` nothing is computed, but what lies elsewhere is refused."
    x, m, P, B = planted()
    moments, _ = sums(x, m, x @ P + m @ B)
    for where in (dict(device="meta"), dict(dtype=torch.float32)):
        there = Moments(
            *(a.to(**where) if isinstance(a, torch.Tensor) else a for a in vars(moments).values())
        )
        prior = torch.eye(16).double()
        W = least_squares(*normal_equations(between(there), "mlp"), prior, 0.1)
        found = [
            least_squares(there.xx, there.xy, prior, 0.1),
            part_least_squares(there, "mlp", prior, 0.1),
            W,
            with_mlp(W[:16], W[16:]).mlp,
            with_down(W[:16], W[16:]).down,
        ]
        assert all((a.device, a.dtype) == (there.xx.device, there.xx.dtype) for a in found)


# -- the last matrix of the MLP


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2", "falcon"])
@pytest.mark.parametrize("family", ["refit", "joint-refit"])
def test_the_student_computes_x_P_plus_z_B(name, family):
    "What the student's layers see is what the patch promises, with nothing but new weights."
    teacher, cut = make(name), Cut(2, 4)
    w = Windows(torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0)))
    stats = collect(teacher, w, cuts=[cut], moments=[cut], batch_size=3, down=True)
    patch = fit_patch(stats, cut, family)
    x, m, z, _ = sides(teacher, w, cut)
    expected = (x + z @ patch.down) @ patch.matrix
    student, got = prune(teacher, cut, patch), {}
    with torch.no_grad(), layer_states(student, lambda l, h: got.update({l: h})):
        student(w.ids, use_cache=False)
    torch.testing.assert_close(got[2].double(), expected, rtol=1e-3, atol=1e-3)
    assert len(patch_modules(student)) == (family != "refit")
    assert student.config.linearpatch["folded"] == [{"cut": [2, 4], "family": family, "layer": 1}]
    plain = type(teacher)(student.config)
    if family == "refit":  # an ordinary model: its weights fit the class as it is
        plain.load_state_dict(student.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(plain.eval()(w.ids).logits, student(w.ids).logits)


def test_refit_finds_the_matrix_that_made_the_data():
    teacher, cut = make("llama"), Cut(2, 4)
    w = Windows(torch.randint(3, 64, (32, 24), generator=torch.Generator().manual_seed(0)))
    stats = collect(teacher, w, cuts=[cut], moments=[cut], batch_size=8, down=True)
    m = stats.moments[cut]
    D = torch.randn(WIDE, 32, generator=torch.Generator().manual_seed(1)).double()
    m.xy, m.zy = m.xx + m.xz @ D, m.xz.T + m.zz @ D  # y = x + z D
    identity = torch.eye(32).double()
    torch.testing.assert_close(
        part_least_squares(m, "down", identity, 1e-12), D, rtol=1e-3, atol=1e-3
    )


def test_where_no_single_matrix_ends_the_mlp_the_rest_is_fitted():
    teacher, cut = make("qwen3-moe"), Cut(2, 4)
    w = Windows(torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0)))
    stats = collect(teacher, w, cuts=[cut], moments=[cut], down=True)
    assert stats.moments[cut].has_mlp and not stats.moments[cut].has_down
    for family, rest in (("refit", "mlp"), ("joint-refit", "joint")):
        a, b = fit_patch(stats, cut, family), fit_patch(stats, cut, rest)
        assert a.down is None and torch.equal(a.mlp, b.mlp) and torch.equal(a.matrix, b.matrix)


def test_a_change_of_another_width_is_refused():
    patch = Patch(torch.eye(32).double(), "refit", Cut(2, 4), down=torch.zeros(8, 32).double())
    with pytest.raises(ValueError, match="8 inputs"):
        prune(make("llama"), Cut(2, 4), patch)


# -- the first token


def with_bos(n=12, length=24):
    ids = torch.randint(3, 64, (n, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    return Windows(ids)


@pytest.mark.parametrize("family", ["hadamard", "joint", "joint-refit"])
def test_sums_without_the_first_token_are_those_of_the_others(family):
    model, w = make("llama"), with_bos()
    stats = collect(model, w, cuts=[CUT], moments=[CUT], down=True)
    x, m, z, y = (a[:, 1:].flatten(0, 1) for a in sides(model, w, CUT))
    rest = Evidence(stats, CUT, first=True).moments
    weight = 1 / (x.norm(dim=1) * y.norm(dim=1))
    for found, a, b in ((rest.xx, x, x), (rest.xy, x, y), (rest.my, m, y), (rest.xz, x, z)):
        torch.testing.assert_close(found, (a * weight[:, None]).T @ b, rtol=1e-4, atol=1e-4)
    patch = fit_patch(stats, CUT, family, first=True)
    firsts = sides(model, w, CUT)
    got = patch.apply(*(a[:, :1] for a in firsts[:3]))
    torch.testing.assert_close(got, firsts[3][:, :1], rtol=1e-4, atol=1e-4)


def test_windows_without_a_fixed_first_token_are_refused():
    w = Windows(torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0)))
    stats = collect(make("llama"), w, cuts=[CUT], moments=[CUT])
    with pytest.raises(ValueError, match="no state of their own.*bos=True"):
        fit_patch(stats, CUT, "hadamard", first=True)
    bare = collect(make("llama"), with_bos(), cuts=[CUT])
    with pytest.raises(ValueError, match="takes the second moments"):
        fit_patch(bare, CUT, "hadamard", first=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2", "opt"])
def test_the_constant_is_right_with_padding_cache_and_chunks(name):
    "A student with the constant, in one pass, padded, in two chunks, and through save and load."
    teacher, cut, w = make(name), Cut(2, 4), with_bos()
    stats = collect(teacher, w, cuts=[cut], moments=[cut])
    student = prune(teacher, cut, fit_patch(stats, cut, "hadamard", first=True)).eval()
    bare = prune(teacher, cut, fit_patch(stats, cut, "hadamard")).eval()
    ids, seen = w.ids[:3], {}
    with torch.no_grad():
        with layer_states(teacher, lambda l, x: seen.update({l: x})):
            teacher(ids, use_cache=False)
        handle = decoder_layers(student)[2].register_forward_pre_hook(
            lambda l, a, k: seen.update(h=a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        whole = student(ids, use_cache=False).logits
        handle.remove()
        torch.testing.assert_close(seen["h"][:, 0], seen[4][:, 0], rtol=1e-4, atol=1e-4)
        assert (whole - bare(ids, use_cache=False).logits).abs().max() > 1e-4
        head = student(ids[:, :9], use_cache=True)
        tail = student(ids[:, 9:], past_key_values=head.past_key_values).logits
        torch.testing.assert_close(torch.cat([head.logits, tail], 1), whole, rtol=1e-3, atol=1e-3)
        mask = torch.ones(3, 28, dtype=torch.long)
        mask[:, :4] = 0
        padded = torch.cat([torch.full((3, 4), 2), ids], 1)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        left = dict() if name == "opt" else dict(position_ids=position)
        logits = student(padded, attention_mask=mask, use_cache=False, **left).logits[:, 4:]
        torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_constant_holds_while_text_is_written(cache):
    "Greedy tokens one at a time, from a cache, are those of full passes over the text so far."
    teacher, cuts, w = make("llama"), [Cut(1, 2), Cut(3, 4)], with_bos()
    stats = collect(teacher, w, cuts=cuts, moments=cuts)
    patches = [fit_patch(stats, cut, "hadamard", first=True) for cut in cuts]
    student = prune(teacher, cuts, patches).eval()
    assert all(hasattr(patch, "first_token") for patch in patch_modules(student))
    ids = w.ids[:2, :8]
    kind = dict(cache_implementation="static") if cache == "static" else {}
    written = student.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, **kind
    )
    text = ids
    with torch.no_grad():
        for _ in range(written.shape[1] - ids.shape[1]):
            best = student(text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            text = torch.cat([text, best], 1)
    assert torch.equal(written, text)


def test_the_constant_is_right_with_padding_behind():
    teacher, cut, w = make("llama"), Cut(2, 4), with_bos()
    stats = collect(teacher, w, cuts=[cut], moments=[cut])
    student = prune(teacher, cut, fit_patch(stats, cut, "joint", first=True)).eval()
    ids, mask = torch.full((2, 28), 2), torch.zeros(2, 28, dtype=torch.long)
    ids[:, :24], mask[:, :24] = w.ids[:2], 1
    with torch.no_grad():
        padded = student(ids, attention_mask=mask, use_cache=False).logits[:, :24]
        torch.testing.assert_close(
            padded, student(w.ids[:2], use_cache=False).logits, rtol=1e-3, atol=1e-3
        )


def test_training_leaves_the_constant_as_it_is():
    teacher, cut, w = make("llama"), Cut(2, 4), with_bos(16)
    stats = collect(teacher, w, cuts=[cut], moments=[cut])
    student = prune(teacher, cut, fit_patch(stats, cut, "hadamard", first=True))
    (patch,) = patch_modules(student)
    before = [p.clone() for p in (patch.weight, *patch.first_token.parameters())]
    distill(student, w, teacher=teacher, lr=1e-2, heldout=2)
    after = [patch.weight, *patch.first_token.parameters()]
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:]))


def test_a_state_of_zeros_is_not_the_first_token():
    token = first_token(torch.zeros(4), torch.ones(4))
    h, out = torch.zeros(2, 4), torch.full((2, 4), 3.0)
    assert torch.equal(token(h, out), out)
    token = first_token(torch.ones(4), 5 * torch.ones(4))
    h = torch.tensor([[1.0, 1.0, 1.0, 1.02], [1.0, 1.0, 1.0, 2.0]])
    assert token(h, out).tolist() == [[5.0] * 4, [3.0] * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_constant_is_saved_and_loaded(tmp_path, dtype):
    teacher, cut, w = make("llama").to(dtype), Cut(2, 4), with_bos()
    stats = collect(teacher, w, cuts=[cut], moments=[cut])
    patch = fit_patch(stats, cut, "joint", first=True)
    student = prune(teacher, cut, patch).eval()
    student.save_pretrained(tmp_path / "student")
    record = json.loads((tmp_path / "student/config.json").read_text())["linearpatch"]
    assert record["patches"][0]["first"] is True
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", trust_remote_code=True, dtype=dtype
    )
    for name, numbers in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], numbers), name
    rounding = torch.finfo(dtype).eps
    with torch.no_grad():
        logits = again.eval()(w.ids).logits
        assert (logits - student(w.ids).logits).norm() <= 8 * rounding * logits.norm()
    save_patch(patch, tmp_path / "patch", base=teacher)
    (loaded,) = load_patch(tmp_path / "patch")
    assert all(torch.equal(a, b) for a, b in zip(loaded.first, patch.first))


def test_the_constant_does_not_fold_but_can_be_dropped():
    teacher, cut, w = make("llama"), Cut(2, 4), with_bos()
    stats = collect(teacher, w, cuts=[cut], moments=[cut])
    student = prune(teacher, cut, fit_patch(stats, cut, "foldable", first=True))
    with pytest.raises(ValueError, match="cannot be multiplied into weights.*drop_first"):
        fold(student)
    folded = fold(drop_first(student))
    assert not patch_modules(folded) and folded.config.linearpatch["folded"]
