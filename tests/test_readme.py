"README.md is the front page of the site, and its two commands are what continuous integration runs."

import subprocess
import sys

import pytest
from repo import root

sys.path.insert(0, str(root / "tools"))
import readme


def test_readme_is_made_from_index():
    assert readme.differences() == [], "run python tools/readme.py make"


def test_two_commands():
    demo, test = readme.command("demo"), readme.command("test")
    assert "pip install" in demo and "linearpatch demo" in demo
    assert "pip install" in test and "tests/run.py" in test
    assert (root / "tests/run.py").exists()


def test_continuous_integration_runs_them():
    script = (root / ".ci/run").read_text(encoding="utf-8")
    assert "readme demo" in script and "readme test" in script


def test_a_missing_command_is_an_error():
    with pytest.raises(SystemExit, match="one line of code"):
        readme.command("demo", text="# no commands here")


def test_command_line():
    out = subprocess.run(
        [sys.executable, root / "tools/readme.py", "command", "demo"],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and out.stdout.strip() == readme.command("demo")
