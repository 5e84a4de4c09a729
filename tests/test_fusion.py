"P and the other families against their defining properties."
import pytest, torch
from linearpatch.fusion import FAMILIES, NEEDS_MOMENTS, fit_patch, fuse, least_squares, procrustes
from linearpatch.hadamard import make_rotation
from linearpatch.mismatch import collect
from linearpatch.models import Cut
from linearpatch.scaling import channel_scale
from test_mismatch import states, windows
from tiny import make

CUT = Cut(1, 4)


@pytest.fixture(scope="module")
def fitted():
    model, w = make("llama"), windows(8, 16)
    X = states(model, w)
    x, y = (torch.cat([a[l] for a in X]) for l in (CUT.start, CUT.stop))
    return collect(model, w, n_remove=3, moments="all", batch_size=4), x, y


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt"])
def test_p_is_the_papers(name):
    model, w = make(name), windows(4)
    X, H = states(model, w), make_rotation(32).matrix.double()
    x, y = (torch.cat([a[l] for a in X]) @ H for l in (CUT.start, CUT.stop))
    d = y.abs().sum(0) / x.abs().sum(0)
    P = fit_patch(collect(model, w, n_remove=3), CUT).matrix
    torch.testing.assert_close(P, H @ d.diag() @ H.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [32, 36, 22])
def test_one_multiply_is_three(size):
    rotation, d, h = make_rotation(size), torch.rand(size).double() + 0.2, torch.randn(3, 5, size).double()
    P = fuse(d, rotation)
    torch.testing.assert_close(h @ P, rotation.inverse(rotation(h) * d), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(P, P.T)
    torch.testing.assert_close(torch.linalg.eigvalsh(P), d.sort().values, rtol=1e-6, atol=1e-6)


def test_simple_families(fitted):
    stats, x, y = fitted
    eye = torch.eye(32).double()
    assert torch.equal(fit_patch(stats, CUT, "none").matrix, eye)
    torch.testing.assert_close(fit_patch(stats, CUT, "scalar").matrix, eye * (y.abs().sum() / x.abs().sum()), rtol=1e-5, atol=0)
    torch.testing.assert_close(fit_patch(stats, CUT, "diagonal").matrix, (y.abs().sum(0) / x.abs().sum(0)).diag(), rtol=1e-5, atol=0)


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
            assert (x @ P @ torch.linalg.matrix_exp(A - A.T) - y).square().sum() > error  # another rotation
        for factor in (1 - step, 1 + step): assert (x @ P * factor - y).square().sum() > error  # another size


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
    distances = [(fit_patch(stats, CUT, "lstsq", ridge=r).matrix - prior).norm().item() for r in (0, 0.1, 10, 1e6)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-3 * distances[0]


def test_recovers_a_linear_map():
    x, W = torch.randn(200, 6).double(), torch.randn(6, 6).double()
    torch.testing.assert_close(least_squares(x.T @ x, x.T @ x @ W, torch.eye(6).double(), 0.), W)
    Q = torch.linalg.qr(W)[0]
    torch.testing.assert_close(procrustes(x.T @ (2 * x @ Q), x.square().sum().item()), 2 * Q)


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_apply_to_row_vectors(fitted, family):
    patch = fit_patch(fitted[0], CUT, family)
    h = torch.randn(2, 3, 32)
    torch.testing.assert_close(patch.apply(h), (h.double() @ patch.matrix).float(), rtol=1e-4, atol=1e-5)
    assert patch.cut == CUT and patch.family == family and family in repr(patch)
    assert patch.distance == 0 if family == "none" else patch.distance > 0


def test_averaging_reaches_the_scale(fitted):
    stats = fitted[0]
    P = fit_patch(stats, CUT, averaging="mean-of-ratios").matrix
    torch.testing.assert_close(P, fuse(channel_scale(stats, CUT, averaging="mean-of-ratios"), stats.rotation))
    assert not torch.equal(P, fit_patch(stats, CUT).matrix)


def test_bad_input(fitted):
    stats = fitted[0]
    bare = collect(make("llama"), windows(2), n_remove=3)
    with pytest.raises(ValueError, match="no patch family 'magic'.*hadamard"): fit_patch(stats, CUT, "magic")
    with pytest.raises(ValueError, match="out of range"): fit_patch(stats, Cut(5, 9))
    with pytest.raises(ValueError, match="ridge"): fit_patch(stats, CUT, "lstsq", ridge=-1)
    with pytest.raises(ValueError, match="one number a channel"): fuse(torch.ones(31), make_rotation(32))
    for family in NEEDS_MOMENTS:
        with pytest.raises(ValueError, match="needs the second moments.*moments="): fit_patch(bare, CUT, family)
