"Lesson 00: removing some layers of any decoder without breaking the rest, and loading models."

import json
import re

import pytest
import torch
from tiny import CONFIGS, IDS, bypass, make, new_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearpatch.method.models import (
    PLAYGROUND_REMOVE,
    decoder_layers,
    fingerprint,
    load_model,
    load_playground,
    n_layers,
    remove_layers,
    seed_everything,
)
from linearpatch.workshop.architectures import text_config
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.places import playground_path


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- removing


@pytest.mark.parametrize("name", CONFIGS)
def test_remove(name):
    teacher, cuts = make(name), [Cut(0, 1), Cut(3, 5)]
    before, config = state(teacher), teacher.config.to_dict()
    with torch.no_grad():
        dense = teacher(IDS).logits
        with bypass(decoder_layers(teacher), cuts):
            expected = teacher(IDS, use_cache=False).logits
        student = remove_layers(teacher, cuts)
        assert torch.equal(student(IDS).logits, expected)
        # the cache
        assert torch.equal(
            new_tokens(student, use_cache=True), new_tokens(student, use_cache=False)
        )
        # the teacher is as it was, and shares nothing
        assert (
            same(state(teacher), before)
            and teacher.config.to_dict() == config
            and torch.equal(teacher(IDS).logits, dense)
        )
    assert not {p.data_ptr() for p in teacher.parameters()} & {
        p.data_ptr() for p in student.parameters()
    }
    # the config builds the student: same weights, same function
    assert n_layers(student) == text_config(student).num_hidden_layers == 3
    assert (
        len(student.config.layer_types) == 3
        if hasattr(student.config, "layer_types") and student.config.layer_types
        else True
    )
    rebuilt = type(student)(
        type(student.config).from_dict(json.loads(student.config.to_json_string()))
    ).eval()
    rebuilt.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(IDS).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
def test_share_and_inplace(name):
    teacher = make(name)
    with torch.no_grad():
        expected = remove_layers(teacher, Cut(2, 4))(IDS).logits
    shared = remove_layers(teacher, Cut(2, 4), share=True)
    own = {id(p) for p in teacher.parameters()} | {id(b) for b in teacher.buffers()}
    assert all(id(p) in own for p in [*shared.parameters(), *shared.buffers()])
    assert (
        not {id(m) for m in teacher.modules()} & {id(m) for m in shared.modules()}
        and n_layers(teacher) == 6
    )
    with torch.no_grad():
        assert torch.equal(shared(IDS).logits, expected)
    twice = remove_layers(shared, Cut(0, 1), share=True)
    assert (n_layers(twice), n_layers(shared), n_layers(teacher)) == (3, 4, 6)
    assert remove_layers(teacher, Cut(2, 4), inplace=True) is teacher and n_layers(teacher) == 4
    with torch.no_grad():
        assert torch.equal(teacher(IDS).logits, expected)
    with pytest.raises(ValueError, match="choose one"):
        remove_layers(teacher, Cut(1, 2), inplace=True, share=True)


def test_removed_weights_are_not_copied():
    teacher = make("llama")
    copied = []

    class Watched(torch.nn.Parameter):
        def __deepcopy__(self, memo):
            copied.append(1)
            return torch.nn.Parameter(self.data.clone())

    gate = decoder_layers(teacher)[2].mlp.gate_proj
    gate.weight = Watched(gate.weight.data)
    remove_layers(teacher, Cut(2, 4))
    assert copied == []
    remove_layers(teacher, Cut(3, 4))
    assert copied == [1]


def test_seed_is_untouched():
    teacher = make("llama")
    torch.manual_seed(3)
    a = torch.rand(4)
    torch.manual_seed(3)
    remove_layers(teacher, Cut(2, 4))
    assert torch.equal(torch.rand(4), a)
    seed_everything(5)
    a = torch.rand(1)
    seed_everything(5)
    assert torch.equal(torch.rand(1), a)


def test_nothing_to_remove():
    teacher = make("llama")
    student = remove_layers(teacher, [])
    assert (
        student is not teacher and n_layers(student) == 6 and same(state(student), state(teacher))
    )


# -- loading


def test_playground():
    model, tokenizer = load_playground()
    assert (
        model.dtype == torch.float32
        and not model.training
        and n_layers(model) == model.config.num_hidden_layers > PLAYGROUND_REMOVE
    )
    assert tokenizer.bos_token_id is not None and len(tokenizer) <= model.config.vocab_size
    assert (playground_path() / "config.json").is_file()
    again, _ = load_model(playground_path(), dtype="bfloat16")
    assert again.dtype == torch.bfloat16


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match="no config.json") as e:
        load_model(tmp_path)
    assert str(tmp_path) in str(e.value)
    with pytest.raises(ValueError, match="there is no folder"):
        load_model(tmp_path / "nowhere")
    for name in ("./nowhere", "~/nowhere-at-all", "a/b/c"):
        with pytest.raises(ValueError, match="there is no folder " + re.escape(name)):
            load_model(name)
    (tmp_path / "f.txt").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        load_model(tmp_path / "f.txt")
    with pytest.raises(ValueError, match="no-such-model"):
        load_model("no-such-model-anywhere")
    with pytest.raises(ValueError, match="'float17' is no dtype"):
        load_model(playground_path(), dtype="float17")


def test_broken_folders(tmp_path):
    (tmp_path / "config.json").write_text("{ no json")
    with pytest.raises(ValueError, match="cannot read the config"):
        load_model(tmp_path)
    model, tokenizer = load_playground()
    model.config.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="cannot read the weights"):
        load_model(tmp_path / "b")


def test_remote_code_is_off(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "mine",
                "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
            }
        )
    )
    (tmp_path / "code.py").write_text("raise SystemExit('ran foreign code')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path)


def test_fingerprint_looks_at_every_number():
    "Also at those that an even spacing would never meet; a weight that changes is hashed again."
    model = make("llama")
    seen = {fingerprint(model)}
    weight = model.model.layers[1].mlp.down_proj.weight
    for place in ((0, 1), (3, 5), (-1, -1)):
        with torch.no_grad():
            weight[place] += 1
        seen.add(fingerprint(model))
    weight.data[:, 1::2] *= 1.5  # which PyTorch does not count as a change
    seen.add(fingerprint(model))
    assert len(seen) == 5 and fingerprint(model) in seen
    assert fingerprint(model.to(torch.bfloat16)) in seen


def test_students_need_load_student(tmp_path):
    model, tokenizer = load_playground()
    model.config.linearpatch = {"patches": [{"cut": [1, 2]}]}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load_student"):
        load_model(tmp_path)


def test_safetensors_only(tmp_path):
    "A pickle is not read; the message says how to convert it, and that works."
    model, tokenizer = load_playground()
    old, new = tmp_path / "old", tmp_path / "new"
    model.config.save_pretrained(old)
    tokenizer.save_pretrained(old)
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="not in safetensors.*use_safetensors=False.*save_pretrained"
    ):
        load_model(old)
    AutoModelForCausalLM.from_pretrained(old, use_safetensors=False).save_pretrained(new)
    AutoTokenizer.from_pretrained(old).save_pretrained(new)
    assert fingerprint(load_model(new)[0]) == fingerprint(model)


def test_a_pickle_beside_safetensors_is_not_opened(tmp_path):
    model, tokenizer = load_playground()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert fingerprint(load_model(tmp_path)[0]) == fingerprint(model)


def test_a_pickle_on_the_hub(monkeypatch):
    "Where the Hub has a model in another format only, transformers says to drop use_safetensors."
    from linearpatch.method import models

    asked = []

    def from_pretrained(name, **kwargs):
        asked.append(kwargs)
        raise OSError(f"{name} has no model.safetensors. Please do not set `use_safetensors=True`.")

    config = load_playground()[0].config
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="the weights of org/old are not in safetensors") as e:
        models._read_weights("org/old", config, dtype="auto")
    assert asked[0]["use_safetensors"] is True and "do not set" not in str(e.value)
