"Students, patches and folders that several test files save, spoil and load again."

import json
import shutil

import pytest
import torch
import transformers as tf
from tiny import *

from linearpatch.method.fusion import Patch
from linearpatch.method.models import load_playground
from linearpatch.method.pruning import prune
from linearpatch.workshop.checkpoint import save_student
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.patch_files import save_patch
from linearpatch.workshop.records import patch_digest

CUTS = {
    "middle": [Cut(2, 4)],
    "first": [Cut(0, 2)],
    "last": [Cut(4, 6)],
    "many": [Cut(0, 1), Cut(2, 3), Cut(4, 6)],
}
MORE = {
    "llama-tied": lambda: tf.LlamaConfig(**llama, tie_word_embeddings=True),
    "gemma3-vision": lambda: tf.Gemma3Config(
        text_config=dict(headed, sliding_window=4, model_type="gemma3_text"),
        mm_tokens_per_image=4,
        vision_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
    ),
}
PAD = torch.tensor([[2, 2, 2, 0, 5, 9, 33, 12], IDS[0].tolist()])


@pytest.fixture(autouse=True)
def quiet():
    tf.utils.logging.disable_progress_bar()
    tf.utils.logging.set_verbosity_error()
    yield
    tf.utils.logging.enable_progress_bar()
    tf.utils.logging.set_verbosity_warning()


def patches_for(cuts, hidden=32):
    fakes = [random_patch(c, hidden, seed=i) for i, c in enumerate(cuts)]
    return [Patch(p.matrix, p.family, p.cut, dict(tokens=7)) for p in fakes]


def teacher_of(name):
    if name == "gemma3-vision":
        torch.manual_seed(0)
        return tf.AutoModelForImageTextToText.from_config(MORE[name]()).eval()
    return make(MORE[name]() if name in MORE else name)


def student_of(name="llama", where="middle", **kw):
    return prune(teacher_of(name), CUTS[where], patches_for(CUTS[where]), **kw)


def logits(model, ids=IDS, **kw):
    with torch.no_grad():
        return model(ids, **kw).logits


def plain(config):
    "A config without what differs between a model in memory and one from a file."

    def without(x):
        return (
            {
                k: without(v)
                for k, v in x.items()
                if k not in ("architectures", "dtype", "linearpatch", "_name_or_path")
            }
            if isinstance(x, dict)
            else x
        )

    return without(json.loads(json.dumps(config.to_dict(), default=str)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A student and a patch on disk, to be copied and spoiled."
    folder = tmp_path_factory.mktemp("saved")
    student = student_of(where="many")
    save_student(student, folder / "student", load_playground()[1])
    save_patch(student, folder / "patch")
    (
        teacher_of("llama").save_pretrained(folder / "base"),
        load_playground()[1].save_pretrained(folder / "base"),
    )
    return folder


@pytest.fixture
def copies(saved, tmp_path):
    for p in saved.iterdir():
        shutil.copytree(p, tmp_path / p.name)
    return tmp_path


def edit(path, change):
    "Change a JSON file in place; `change` alters the object, or returns another one."
    values = json.loads(path.read_text())
    values = change(values) or values
    if path.name == "linearpatch.json" and isinstance(values, dict):
        values["sha256"] = patch_digest(values)  # as one would who knows the format
    path.write_text(json.dumps(values))


def gone(folder):
    return [p.name for p in folder.rglob("*") if p.name == "ran"]


class Bomb:
    "Unpickling this creates a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
