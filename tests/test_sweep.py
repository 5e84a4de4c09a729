"Architectures of transformers, each cut in six ways: right, or refused with the reason, and never silently wrong."

import importlib.util
import json

import pytest
import torch
import transformers as tf
from repo import nbs, root
from tiny import FakePatch

from linearpatch.method.models import remove_layers
from linearpatch.method.pruning import prune
from linearpatch.workshop.checkpoint import load_student, save_student
from linearpatch.workshop.cuts import Cut

spec = importlib.util.spec_from_file_location("sweep", root / "tools" / "sweep.py")
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)
# classes that borrow another's code, configs with an infinity, hybrids, and layers of every kind
FIXED = """apertus arcee aria_text bert-generation biogpt bitnet bloom codegen cohere cohere2
deepseek_v3 ernie4_5 exaone exaone4 gemma gemma2 gemma3_text glm glm4 gpt2 gpt_neox
gpt_oss gptj granite granitemoe helium internlm3 jamba lfm2 llama mistral mixtral mpt
nemotron olmo olmo2 openai-gpt opt persimmon phi3 qwen2 qwen3 sarvam_moe smollm3 trocr""".split()
REFUSED = {"jamba"}  # at every cut: with the reason


pytestmark = pytest.mark.usefixtures("quiet")


def kinds(row):
    return {where: said.partition(":")[0] for where, said in row.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FIXED)
def test_right_or_refused(name):
    found = sweep.measure(name)
    assert set(found) == set(sweep.CUTS), found
    words = set(kinds(found).values())
    assert words == {"refused" if name in REFUSED else "right"}, found


def test_45_of_those_that_are_there():
    assert len(FIXED) == len(set(FIXED)) == 45 and set(FIXED) <= set(sweep.names())


def test_the_page_says_what_the_record_says():
    record = json.loads(sweep.RECORD.read_text(encoding="utf-8"))
    page = (nbs / "sweep.qmd").read_text(encoding="utf-8")
    assert sweep.filled(page, record) == page, "run python tools/sweep.py --page"
    wrong = {n for n, row in record["models"].items() if "wrong" in kinds(row).values()}
    assert wrong == {"plbart", "youtu"}, "known faults, which the page names"
    assert all(set(kinds(record["models"][n]).values()) <= {"right", "refused"} for n in FIXED)


def test_it_sees_what_is_wrong(monkeypatch):
    "A student whose removal was not checked, and that lost too much, is called wrong."
    monkeypatch.setattr(sweep, "prune", lambda m, cuts: remove_layers(m, [*cuts, Cut(5, 6)]))
    assert set(kinds(sweep.measure("llama")).values()) <= {"wrong", "refused"}
    assert kinds(sweep.measure("llama"))["middle"] == "wrong"


@pytest.mark.parametrize("name", ["exaone", "sarvam_moe", "trocr"])
def test_classes_that_serve_another_config(name, tmp_path):
    model = sweep.build(name)
    patch = FakePatch(1.5 * torch.eye(32, dtype=torch.float64), Cut(2, 4))
    student = prune(model, Cut(2, 4), [patch])
    save_student(student, tmp_path / "s")
    assert torch.equal(sweep.scores(load_student(tmp_path / "s")), sweep.scores(student))


def test_a_config_with_an_infinity(tmp_path):
    config = tf.FalconH1Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_n_groups=1,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    assert float("inf") in config.time_step_limit
    patch = FakePatch(1.5 * torch.eye(32, dtype=torch.float64), Cut(1, 3))
    student = prune(model, Cut(1, 3), [patch])
    save_student(student, tmp_path / "s")
    again = load_student(tmp_path / "s")
    assert tuple(again.config.time_step_limit) == tuple(config.time_step_limit)
    assert torch.equal(sweep.scores(again), sweep.scores(student))
