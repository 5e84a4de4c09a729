"Cuts: half-open ranges of layers, read from text, checked and merged."

import subprocess
import sys

import pytest

from linearpatch.workshop.cuts import Cut, candidates, check_cuts, runs


def test_a_cut_is_read_without_pytorch():
    code = """
import sys
from linearpatch.workshop.cuts import Cut
heavy = {"torch", "transformers", "numpy", "pydantic"} & set(sys.modules)
print(Cut.parse("2:5"), heavy or "light")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Cut[2, 5) light"


def test_cut():
    c = Cut(2, 5)
    assert (c.n, list(c), 4 in c, 5 in c, str(c), repr(c)) == (
        3,
        [2, 3, 4],
        True,
        False,
        "Cut[2, 5)",
        "Cut[2, 5)",
    )
    assert (
        c == Cut.parse("2:5") == Cut.parse(" 2 : 5 ")
        and Cut(1, 9) < c < Cut(2, 6)
        and len({c, Cut(2, 5)}) == 1
    )
    for bad in ((5, 2), (3, 3), (-1, 2)):
        with pytest.raises(ValueError, match="0 <= start < stop"):
            Cut(*bad)
    with pytest.raises(TypeError):
        Cut(1.5, 3)
    for bad in ("2-5", "2:", "a:b", "5"):
        with pytest.raises(ValueError, match="START:STOP"):
            Cut.parse(bad)


def test_candidates():
    assert candidates(4, 2) == [Cut(0, 2), Cut(1, 3), Cut(2, 4)] and len(candidates(32, 9)) == 24
    for n in (0, -1, 4, 9):
        with pytest.raises(ValueError, match=f"cannot remove {n} of 4.*at most 3"):
            candidates(4, n)


def test_runs():
    assert (
        runs([24, 25, 26, 28, 29, 23, 27, 23]) == [Cut(23, 30)]
        and runs([5, 1, 2]) == [Cut(1, 3), Cut(5, 6)]
        and runs([]) == []
    )


def test_check_cuts():
    assert check_cuts([(5, 6), "1:2", Cut(2, 3)], 8) == [Cut(1, 3), Cut(5, 6)]
    assert check_cuts(Cut(1, 3), 8) == check_cuts("1:3", 8) == [Cut(1, 3)]
    with pytest.raises(ValueError, match=r"Cut\[6, 9\) is out of range.*8 layers"):
        check_cuts(Cut(6, 9), 8)
    with pytest.raises(ValueError, match=r"overlap at layer 4.*Cut\[2, 6\)"):
        check_cuts([Cut(4, 6), Cut(2, 5)], 8)
    with pytest.raises(ValueError, match="all 8 layers"):
        check_cuts([Cut(0, 4), Cut(4, 8)], 8)
