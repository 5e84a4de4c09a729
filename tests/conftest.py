import os, signal
from pathlib import Path
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# started in the background, a process ignores Ctrl-C, and so would the processes that the tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root(): return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def second_model():
    "A trained model that no chapter looks at, and its tokenizer."
    import torch
    from linearpatch.models import load_model
    return load_model(Path(__file__).resolve().parent / "data" / "llama-8x64", dtype=torch.float32)
