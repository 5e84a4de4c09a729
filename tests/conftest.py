import os
import signal
from pathlib import Path
from string import ascii_lowercase

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# started in the background, a process ignores Ctrl-C, and so would the processes that the tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root():
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def second_model():
    "A trained model that no chapter looks at, and its tokenizer."
    import torch

    from linearpatch.method.models import load_model

    return load_model(Path(__file__).resolve().parent / "data" / "llama-8x64", dtype=torch.float32)


@pytest.fixture
def quiet():
    "Without transformers' progress bars."
    import transformers

    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def hub(monkeypatch):
    "A stand-in for the Hub that keeps what it is asked for."
    import datasets

    calls = []

    def load_dataset(path, **kwargs):
        calls.append((path, kwargs))
        rows = [{"text": ascii_lowercase * 2, "sentence": ascii_lowercase}] * 300
        if kwargs.get("streaming"):
            return datasets.IterableDataset.from_generator(lambda: iter(rows))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls
