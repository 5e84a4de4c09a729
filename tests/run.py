"""Pass every test of the project: the notebooks first, then pytest. Fails when either has nothing to run.

python tests/run.py
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
os.chdir(root)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a background job ignores it, and so would what it starts


def cpus():
    "CPU cores that this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(what, *command):
    print(f"\n-- {what}", flush=True)
    if code := subprocess.run([sys.executable, *command]).returncode:
        sys.exit(f"{what}: failed with exit code {code}")


notebooks = [
    p
    for p in sorted((root / "nbs").rglob("*.ipynb"))
    if not any(part.startswith(("_", ".")) for part in p.relative_to(root).parts)
]
if not notebooks:
    sys.exit("no notebook to test in nbs/")
if silenced := list((root / "nbs").rglob(".notest")):
    sys.exit(f"these files keep notebooks from being tested: {silenced}")

workers = max(1, min(cpus(), 8, len(notebooks)))
os.environ.update(
    OMP_NUM_THREADS=str(max(1, cpus() // workers)),
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    PYTHONUNBUFFERED="1",
)

run(
    f"{len(notebooks)} notebooks, {workers} at a time",
    "-c",
    "from nbdev.test import nbdev_test; nbdev_test.__wrapped__("
    f"n_workers={workers}, do_print=True, timing=True)",
)
run(f"pytest, {workers} at a time", "-m", "pytest", "-n", str(workers), "--dist", "worksteal")
