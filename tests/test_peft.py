"A student is a model of its own for what trains and adapts it: its name, adapters, and the Trainer."

import copy
import pickle

import pytest
import torch
import transformers as tf
from students import *

from linearpatch.method.folding import fold
from linearpatch.method.pruning import patch_modules, prune
from linearpatch.workshop.checkpoint import load_student, save_student
from linearpatch.workshop.cuts import Cut


class Rows(torch.utils.data.Dataset):
    "The same few tokens, again and again."

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"input_ids": IDS[0], "labels": IDS[0]}


def trained(model, folder, **more):
    how = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "report_to": []}
    how |= {"use_cpu": True, "disable_tqdm": True, "save_only_model": False}
    trainer = tf.Trainer(model, tf.TrainingArguments(folder, **how | more), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=bool(more))
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("peft")
    student = student_of("llama", "many")
    save_student(student, where / "student")
    scalar = FakePatch(1.5 * torch.eye(32, dtype=torch.float64), Cut(2, 4), "scalar")
    save_student(fold(prune(teacher_of("llama"), Cut(2, 4), [scalar])), where / "folded")
    return where


def test_the_name_is_the_students_own():
    teacher = teacher_of("llama")
    teacher.config._name_or_path = teacher.name_or_path = "/somewhere/me/llama-7b"
    student = prune(teacher, CUTS["many"], patches_for(CUTS["many"]), share=True)
    name = "student-of-llama-7b-without-0-1_2-3_4-6"
    assert student.name_or_path == student.config._name_or_path == name
    assert student.config.linearpatch["teacher"]["name"] == "/somewhere/me/llama-7b"
    assert teacher.name_or_path == teacher.config._name_or_path == "/somewhere/me/llama-7b"
    assert prune(teacher, Cut(2, 4), inplace=True).name_or_path != "/somewhere/me/llama-7b"


def test_a_loaded_student_reads_its_own_config(folder):
    "As PEFT does when it saves an adapter; and copies of the config can do it, too."
    student = load_student(folder / "student")
    config = student.config
    assert student.name_or_path == config._name_or_path == str(folder / "student")
    for again in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(again) is type(config) and again.to_dict() == config.to_dict()
        read = type(again).from_pretrained(folder / "student")
        assert read.num_hidden_layers == config.num_hidden_layers == 2
    assert type(config).from_pretrained(folder / "folded").num_hidden_layers == 4
    with pytest.raises(Exception, match="linearpatch.load"):
        tf.LlamaConfig.from_pretrained(folder / "student")


@pytest.mark.parametrize("kind", ["memory", "loaded", "auto", "folded"])
def test_lora(kind, folder, tmp_path):
    peft = pytest.importorskip("peft")
    if kind == "memory":
        student = student_of("llama", "many")
    elif kind == "auto":
        student = tf.AutoModelForCausalLM.from_pretrained(
            folder / "student", trust_remote_code=True
        )
    else:
        student = load_student(folder / ("student" if kind == "loaded" else "folded"))
    base = copy.deepcopy(student).eval()
    name, before = student.name_or_path, [p.weight.clone() for p in patch_modules(student)]
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    adapted = peft.get_peft_model(student, settings)
    assert not any("linear_patch" in key for key in adapted.targeted_module_names)
    trained(adapted, tmp_path / "runs")
    assert (tmp_path / "runs" / "checkpoint-2" / "adapter_config.json").is_file()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"] == name and "student" in name) or kind == "folded"
    want = logits(adapted)
    assert (want - logits(base)).abs().max() > 1e-3, "nothing was learnt"
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), want)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, [p.weight for p in patch_modules(merged)], before))
    save_student(merged, tmp_path / "merged")
    assert torch.equal(logits(load_student(tmp_path / "merged")), logits(merged))


def test_trainer_goes_on_from_a_checkpoint(folder, tmp_path):
    student = load_student(folder / "student")
    trained(student, tmp_path)
    assert (tmp_path / "checkpoint-2" / "modeling_linearpatch.py").is_file()
    last = load_student(tmp_path / "checkpoint-4")
    assert torch.equal(logits(last), logits(student.eval()))
    trainer = trained(load_student(folder / "student"), tmp_path, max_steps=6)
    assert trainer.state.global_step == 6
    assert not torch.equal(logits(trainer.model.eval()), logits(last))
