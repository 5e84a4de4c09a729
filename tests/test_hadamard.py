"Hadamard matrices are exact, the fast transform is their product, the fallback says what it is."

import math

import pytest
import torch

from linearpatch.method.hadamard import (
    fwht,
    hadamard,
    incoherence,
    jacobsthal,
    largest_split,
    make_rotation,
    paley1,
    paley2,
    paley_product,
    prime_power,
    sylvester,
    sylvester_on,
)

WIDTHS = [
    64,
    128,
    576,
    768,
    896,
    960,
    1152,
    1280,
    1536,
    1600,
    2048,
    2304,
    2560,
    2880,
    3072,
    3200,
    3584,
    4096,
    4544,
    5120,
    5376,
    6144,
    6656,
    7168,
    8192,
    12288,
]
KINDS = ["hadamard", "dct", "random", "identity"]


def gram_is_n(H):
    "H H^T = n I in exact arithmetic: integers far below 2^24 are exact in float32."
    return torch.equal(H.float() @ H.float().T, len(H) * torch.eye(len(H)))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("n", [n for n in WIDTHS if n <= 1600])
def test_every_width_whole(n):
    H = hadamard(n)
    assert H.dtype == torch.int8 and H.abs().eq(1).all() and gram_is_n(H)


@pytest.mark.parametrize("n", [n for n in WIDTHS if n > 1600])
def test_every_width_by_its_factors(n):
    "(A x B)(A x B)^T = A A^T x B B^T: exact factors are a proof for the matrix they make."
    power, names = largest_split(n)
    A, B = sylvester(power), paley_product(names)
    assert gram_is_n(B) and B.abs().eq(1).all() and power * len(B) == n
    while power > 1:  # Sylvester by its own doubling rule
        half = A[: power // 2, : power // 2]
        assert all(
            torch.equal(block, sign * half)
            for block, sign in zip(
                (
                    A[: power // 2, power // 2 :],
                    A[power // 2 :, : power // 2],
                    A[power // 2 :, power // 2 :],
                ),
                (1, 1, -1),
            )
        )
        A, power = half, power // 2
    assert A.tolist() == [[1]] and make_rotation(n).is_hadamard


@pytest.mark.parametrize("n", [4096, 5376])
def test_large_matrix_is_the_product_of_its_factors(n):
    H, (power, names) = hadamard(n), largest_split(n)
    B, S = paley_product(names), sylvester(power)
    m = len(B)
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:32]
    assert torch.equal(H[rows], (S[rows // m][:, :, None] * B[rows % m][:, None]).flatten(1))
    assert torch.equal(H[rows].float() @ H.float().T, n * torch.eye(n)[rows])


def test_rows_of_the_widest():
    "12288 as a rotation: unit vectors through the fast route give orthogonal rows of +-1/sqrt(C)."
    R = make_rotation(12288)
    rows = torch.zeros(8, R.size, dtype=torch.float64)
    rows[range(8), torch.randperm(R.size, generator=torch.Generator().manual_seed(0))[:8]] = 1
    rotated = R(rows)
    torch.testing.assert_close(rotated @ rotated.T, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(rotated.abs(), torch.full_like(rotated, R.size**-0.5))


@pytest.mark.parametrize("q", [3, 7, 11, 19, 23, 27, 83, 179, 243, 283, 343])
def test_paley1(q):
    H = paley1(q)
    assert len(H) == q + 1 and H.abs().eq(1).all() and gram_is_n(H)


@pytest.mark.parametrize("q", [5, 9, 13, 17, 25, 49, 81, 121, 125, 169])
def test_paley2(q):
    H = paley2(q)
    assert len(H) == 2 * (q + 1) and H.abs().eq(1).all() and gram_is_n(H)


@pytest.mark.parametrize("q", [3, 5, 9, 27, 49, 101, 125])
def test_quadratic_character(q):
    Q = jacobsthal(q).float()
    assert torch.equal(Q @ Q.T, q * torch.eye(q) - 1)
    assert torch.equal(Q, Q.T if q % 4 == 1 else -Q.T)
    if prime_power(q)[1] == 1:  # a prime: compare with Euler's criterion
        euler = [0] + [1 if pow(a, (q - 1) // 2, q) == 1 else -1 for a in range(1, q)]
        assert Q[:, 0].tolist() == euler


def test_prime_power():
    def slow(q):
        return next(
            (
                (p, k)
                for p in range(2, q + 1)
                if all(p % d for d in range(2, p))
                for k in range(1, 12)
                if p**k == q
            ),
            None,
        )

    assert [prime_power(q) for q in range(1, 260)] == [slow(q) for q in range(1, 260)]


def test_small_orders_and_where_there_is_none():
    found = [n for n in range(1, 120) if largest_split(n)]
    assert [n for n in found if n % 4] == [1, 2]
    assert [n for n in range(4, 120, 4) if n not in found] == [
        92,
        116,
    ]  # known to exist, not from these constructions
    for n in found:
        assert gram_is_n(hadamard(n))
    assert largest_split(1904)[1] == ("paley1(28)", "paley1(68)") and gram_is_n(hadamard(1904))


@pytest.mark.parametrize(
    "n, says",
    [
        (0, "at least 1"),
        (-4, "at least 1"),
        (3, "multiple of 4"),
        (6, "multiple of 4"),
        (92, r"make_rotation\(92\)"),
    ],
)
def test_no_construction(n, says):
    with pytest.raises(ValueError, match=says):
        hadamard(n)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sylvester(12),
        lambda: sylvester(0),
        lambda: paley1(5),
        lambda: paley1(15),
        lambda: paley2(7),
        lambda: paley2(21),
        lambda: jacobsthal(8),
        lambda: jacobsthal(15),
        lambda: fwht(torch.ones(3, 6)),
        lambda: make_rotation(0),
        lambda: make_rotation(8, "x"),
        lambda: make_rotation(8)(torch.ones(2, 4)),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 512, 1024])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)])
def test_fwht_is_the_product(n, shape):
    x = randn(*shape, n, dtype=torch.float64)
    torch.testing.assert_close(fwht(x), x @ sylvester(n).double())


def test_fwht_exact_on_integers_and_close_in_half():
    x = torch.randint(-1000, 1000, (4, 256), generator=torch.Generator().manual_seed(0))
    assert torch.equal(fwht(x), x @ sylvester(256).long())
    for dtype in (torch.bfloat16, torch.float16):
        h = randn(4, 256).to(dtype)
        assert torch.equal(fwht(h), (h.float() @ sylvester(256).float()).to(dtype)) or (
            (fwht(h).float() - h.float() @ sylvester(256).float()).abs().max() < 0.5
        )


def test_fwht_on_a_view():
    x = randn(16, 6, 5, dtype=torch.float64).permute(2, 1, 0)
    torch.testing.assert_close(fwht(x), x @ sylvester(16).double())


@pytest.mark.parametrize("n", [1, 2, 7, 30, 64, 92, 96, 576, 896])
@pytest.mark.parametrize("kind", KINDS)
def test_rotation_is_orthogonal_and_fast_equals_matrix(n, kind):
    R = make_rotation(n, kind)
    H, x = R.dense(torch.float64), randn(2, 3, n, dtype=torch.float64)
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(R(x), x @ H)
    torch.testing.assert_close(R.inverse(x), x @ H.T)
    torch.testing.assert_close(R.T.matrix, R.matrix.T)
    torch.testing.assert_close(R.inverse(R(x)), x)
    assert R.matrix.dtype == torch.float32 and R.matrix.shape == (n, n) and R.size == n


@pytest.mark.parametrize(
    "dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_types(dtype, tol):
    R, x = make_rotation(768), randn(5, 768).to(dtype)
    assert R(x).dtype == dtype
    torch.testing.assert_close(R(x).float(), x.float() @ R.matrix, atol=tol, rtol=tol)


def test_no_overflow_in_half():
    "A massive activation stays finite: the transform is scaled before it sums."
    x = torch.zeros(1, 4096, dtype=torch.float16)
    x[0, 7] = 60000.0
    assert make_rotation(4096)(x).isfinite().all()
    assert make_rotation(4096)(torch.full((1, 4096), 900.0, dtype=torch.float16)).isfinite().all()


def test_gradients():
    for n in (32, 36, 96):
        x = randn(2, n, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(make_rotation(n), x)


def test_names_and_honesty():
    assert make_rotation(64).name == "sylvester(64)" and make_rotation(1).name == "sylvester(1)"
    assert make_rotation(576).name == "sylvester(16) x paley2(36)"
    assert make_rotation(28).name == "paley1(28)"
    for n in (7, 30, 92):
        assert "dct" in make_rotation(n).name and not make_rotation(n).is_hadamard
    assert not any(make_rotation(64, kind).is_hadamard for kind in KINDS[1:])


def test_deterministic_and_remembered():
    assert make_rotation(96) is make_rotation(96)
    a, b = make_rotation(24, "random", seed=1), make_rotation(24, "random", seed=2)
    assert not torch.allclose(a.matrix, b.matrix)
    make_rotation.cache_clear()
    assert torch.equal(a.matrix, make_rotation(24, "random", seed=1).matrix)


@pytest.mark.parametrize("n", [64, 768, 2880])
def test_incoherence_bound(n):
    R, x = make_rotation(n), randn(50, n, dtype=torch.float64) ** 5
    assert (R(x).abs().amax(-1) <= x.abs().sum(-1) / math.sqrt(n) * (1 + 1e-9)).all()
    one_hot = torch.zeros(n)
    one_hot[n // 3] = 1
    assert incoherence(one_hot) == pytest.approx(math.sqrt(n)) and incoherence(
        R(one_hot)
    ) == pytest.approx(1, abs=1e-4)
    assert incoherence(torch.zeros(n)) == 0


@pytest.mark.parametrize("n", [7, 30, 92, 172])
def test_fallback_spreads_too(n):
    assert incoherence(make_rotation(n).matrix).max() <= math.sqrt(2) + 1e-4


def test_matrices_are_moved_once():
    "What a first call remembers is right for other types, and for gradients after inference mode."
    sylvester_on.cache_clear()
    R, x = make_rotation(768), randn(3, 768)
    with torch.inference_mode():
        first = R(x)
    moved = sylvester_on.cache_info().misses
    assert torch.equal(R(x), first) and sylvester_on.cache_info().misses == moved
    y = x.clone().requires_grad_()
    R(y).sum().backward()
    torch.testing.assert_close(y.grad[0], R.matrix.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(R(x.double()).float(), first, rtol=1e-4, atol=1e-5)
    assert R.T is R.T and torch.equal(R.T(first), R.inverse(first))
