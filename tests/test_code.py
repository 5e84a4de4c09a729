"What tools say about the code as it stands: the linter, the formatter, the type checker."

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tool(*words, **kw):
    "Run a development tool on the repository."
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, **kw
    )


@pytest.mark.parametrize("words", [("check",), ("format", "--check")])
def test_ruff_has_nothing_to_say(words):
    "On the notebooks, the package, the tests and the tools."
    done = tool("ruff", *words, "--no-cache", ".")
    assert done.returncode == 0, done.stdout[-3000:]


def test_ruff_would_say_it(tmp_path):
    (tmp_path / "bad.py").write_text("import os\nx = undefined\n")
    done = tool("ruff", "check", "--no-cache", "--config", "pyproject.toml", str(tmp_path))
    assert done.returncode == 1 and "F821" in done.stdout and "F401" in done.stdout


def test_a_type_checker_reads_the_public_face(tmp_path):
    "It accepts a script that is right, and finds a mistake in each line of one that is wrong."
    done = tool(
        *("mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path)),
        *("tests/typed/right.py", "tests/typed/wrong.py"),
    )
    found = re.findall(r"tests/typed/(\w+)\.py:(\d+): error", done.stdout)
    assert "right" not in {name for name, _ in found}, done.stdout[-3000:]
    text = (ROOT / "tests/typed/wrong.py").read_text().splitlines()
    wrong = {n for n, line in enumerate(text, 1) if n > 3 and line}
    assert {int(n) for name, n in found} == wrong, done.stdout[-3000:]
