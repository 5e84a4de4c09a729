"P against its defining properties."

import pytest
import torch
from test_mismatch import states, windows
from tiny import make

from linearpatch.method.families import fit_patch
from linearpatch.method.fusion import Patch, fuse
from linearpatch.method.hadamard import make_rotation
from linearpatch.method.mismatch import collect
from linearpatch.workshop.cuts import Cut

CUT = Cut(1, 4)


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
    rotation, d, h = (
        make_rotation(size),
        torch.rand(size).double() + 0.2,
        torch.randn(3, 5, size).double(),
    )
    P = fuse(d, rotation)
    torch.testing.assert_close(h @ P, rotation.inverse(rotation(h) * d), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(P, P.T)
    torch.testing.assert_close(torch.linalg.eigvalsh(P), d.sort().values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [32, 36, 22])
def test_it_can_be_undone(size):
    "Positive definite, and the inverse is the patch of 1 / d."
    rotation, d = make_rotation(size), torch.rand(size).double() + 0.2
    P = fuse(d, rotation)
    assert torch.linalg.eigvalsh(P).min() > 0
    torch.testing.assert_close(
        P @ fuse(1 / d, rotation), torch.eye(size).double(), rtol=1e-6, atol=1e-6
    )


def test_bad_input():
    with pytest.raises(ValueError, match="one number a channel"):
        fuse(torch.ones(31), make_rotation(32))
    patch = Patch(torch.eye(4).double(), "joint", CUT, mlp=torch.eye(4).double())
    with pytest.raises(ValueError, match="needs the MLP's part"):
        patch.apply(torch.randn(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_answers_in_the_type_of_the_states(dtype):
    h, m = torch.randn(2, 2, 3, 4, dtype=dtype)
    P, T = torch.randn(2, 4, 4).double()
    got = Patch(P, "joint", CUT, mlp=T).apply(h, m)
    expected = (h.double() + m.double() @ (T - torch.eye(4))) @ P
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0.1, atol=0.1)
    assert Patch(P, "own", CUT).distance == pytest.approx(
        ((P - torch.eye(4)).norm() / 2).item(), rel=1e-12
    )
