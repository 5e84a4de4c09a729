"A card says what is known of a model, and nothing else."

import json

from students import *
from tiny import *

from linearpatch.method.models import *
from linearpatch.method.pruning import *
from linearpatch.workshop.cards import *
from linearpatch.workshop.checkpoint import *
from linearpatch.workshop.cuts import *
from linearpatch.workshop.patch_files import *


def front(folder):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md").data.to_dict()


def test_cards(tmp_path):
    teacher = teacher_of("llama")
    teacher.config._name_or_path, teacher.config._commit_hash = (
        "meta-llama/Llama-2-7b-hf",
        "0123abc",
    )
    student = prune(teacher, CUTS["many"], patches_for(CUTS["many"]))
    numbers = dict(
        perplexity=dict(wikitext2=dict(dense=5.4712, pruned=18.6, patched=8.6, distilled=7.2)),
        retained=0.9488,
        command="linearpatch run X --out /secret/place/out",
        license="llama2",
        calibration=dict(source="/secret/place/text.txt", samples=128, seq_len=2048),
        distillation=dict(mode="offline", source="wikitext2", windows=5000, seq_len=2048),
    )
    save_student(student, tmp_path / "s", card=numbers)
    save_patch(student, tmp_path / "p", card=dict(numbers, license=None))
    a, b = front(tmp_path / "s"), front(tmp_path / "p")
    assert a["base_model"] == b["base_model"] == "meta-llama/Llama-2-7b-hf" and (
        a["library_name"],
        b["library_name"],
    ) == ("transformers", "linearpatch")
    assert (
        "linearpatch" in a["tags"]
        and a["license"] == "llama2"
        and b["license"] == "other"
        and b["license_link"] == "https://huggingface.co/meta-llama/Llama-2-7b-hf"
    )
    for folder in ("s", "p"):
        text = (tmp_path / folder / "README.md").read_text()
        for part in (
            "| wikitext2 | 5.47 | 18.60 | 8.60 | 7.20 |",
            "94.9%",
            "0123abc",
            fingerprint(teacher),
            "layers 0, 2, 4 to 5 (counted from 0) of 6",
            "hadamard",
            "128 windows of 2048 tokens of text.txt",
            "offline, 5000 windows",
            "linearpatch run X --out out",
            "Its licence and its terms of use",
            "linearpatch.load",
        ):
            assert part in text, part
        assert "/secret" not in text
    assert (
        json.loads((tmp_path / "p/linearpatch.json").read_text())["base"]["revision"] == "0123abc"
    )


def test_a_card_without_numbers_claims_none(tmp_path):
    teacher = teacher_of("llama")
    teacher.config._name_or_path = str(tmp_path / "private" / "my-model")
    save_student(prune(teacher, CUTS["middle"], patches_for(CUTS["middle"])), tmp_path / "s")
    text = (tmp_path / "s/README.md").read_text()
    assert (
        "No measurements were recorded" in text
        and "`my-model`" in text
        and str(tmp_path) not in text
        and "base_model" not in front(tmp_path / "s")
    )
