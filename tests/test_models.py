"Chapter 00: finding the layers of any decoder, and removing some without breaking the rest."
import copy, json, re
import pytest, torch, transformers as tf
from linearpatch.models import *
from tiny import CONFIGS, IDS, bypass, headed, llama, make, new_tokens, old

PATHS = {"opt": "model.decoder.layers", "opt-350m": "model.decoder.layers", "gpt2": "transformer.h", "gpt-j": "transformer.h", "gpt-neo": "transformer.h",
         "gpt-neox": "gpt_neox.layers", "falcon": "transformer.h", "falcon-40b": "transformer.h", "bloom": "transformer.h", "mpt": "transformer.blocks",
         "gemma3-images": "model.language_model.layers"}


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- cuts

def test_cut():
    c = Cut(2, 5)
    assert (c.n, list(c), 4 in c, 5 in c, str(c), repr(c)) == (3, [2, 3, 4], True, False, "Cut[2, 5)", "Cut[2, 5)")
    assert c == Cut.parse("2:5") == Cut.parse(" 2 : 5 ") and Cut(1, 9) < c < Cut(2, 6) and len({c, Cut(2, 5)}) == 1
    for bad in ((5, 2), (3, 3), (-1, 2)):
        with pytest.raises(ValueError, match="0 <= start < stop"): Cut(*bad)
    with pytest.raises(TypeError): Cut(1.5, 3)
    for bad in ("2-5", "2:", "a:b", "5"):
        with pytest.raises(ValueError, match="START:STOP"): Cut.parse(bad)


def test_candidates():
    assert candidates(4, 2) == [Cut(0, 2), Cut(1, 3), Cut(2, 4)] and len(candidates(32, 9)) == 24
    for n in (0, -1, 4, 9):
        with pytest.raises(ValueError, match=f"cannot remove {n} of 4.*at most 3"): candidates(4, n)


def test_runs(): assert runs([24, 25, 26, 28, 29, 23, 27, 23]) == [Cut(23, 30)] and runs([5, 1, 2]) == [Cut(1, 3), Cut(5, 6)] and runs([]) == []


def test_check_cuts():
    assert check_cuts([(5, 6), "1:2", Cut(2, 3)], 8) == [Cut(1, 3), Cut(5, 6)]
    assert check_cuts(Cut(1, 3), 8) == check_cuts("1:3", 8) == [Cut(1, 3)]
    with pytest.raises(ValueError, match=r"Cut\[6, 9\) is out of range.*8 layers"): check_cuts(Cut(6, 9), 8)
    with pytest.raises(ValueError, match=r"overlap at layer 4.*Cut\[2, 6\)"): check_cuts([Cut(4, 6), Cut(2, 5)], 8)
    with pytest.raises(ValueError, match="all 8 layers"): check_cuts([Cut(0, 4), Cut(4, 8)], 8)


# -- any architecture

@pytest.mark.parametrize("name", CONFIGS)
def test_find(name):
    model = make(name)
    assert layers_name(model) == PATHS.get(name, "model.layers")
    assert (n_layers(model), hidden_size(model), input_device(model)) == (6, 32, torch.device("cpu"))


@pytest.mark.parametrize("name", CONFIGS)
def test_remove(name):
    teacher, cuts = make(name), [Cut(0, 1), Cut(3, 5)]
    before, config = state(teacher), teacher.config.to_dict()
    with torch.no_grad():
        dense = teacher(IDS).logits
        with bypass(decoder_layers(teacher), cuts): expected = teacher(IDS, use_cache=False).logits
        student = remove_layers(teacher, cuts)
        assert torch.equal(student(IDS).logits, expected)
        # the cache
        assert torch.equal(new_tokens(student, use_cache=True), new_tokens(student, use_cache=False))
        # the teacher is as it was, and shares nothing
        assert same(state(teacher), before) and teacher.config.to_dict() == config and torch.equal(teacher(IDS).logits, dense)
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    # the config builds the student: same weights, same function
    assert n_layers(student) == text_config(student).num_hidden_layers == 3
    assert len(student.config.layer_types) == 3 if hasattr(student.config, "layer_types") and student.config.layer_types else True
    rebuilt = type(student)(type(student.config).from_dict(json.loads(student.config.to_json_string()))).eval()
    rebuilt.load_state_dict(student.state_dict())
    with torch.no_grad(): assert torch.equal(rebuilt(IDS).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
def test_share_and_inplace(name):
    teacher = make(name)
    with torch.no_grad(): expected = remove_layers(teacher, Cut(2, 4))(IDS).logits
    shared = remove_layers(teacher, Cut(2, 4), share=True)
    own = {id(p) for p in teacher.parameters()} | {id(b) for b in teacher.buffers()}
    assert all(id(p) in own for p in [*shared.parameters(), *shared.buffers()])
    assert not {id(m) for m in teacher.modules()} & {id(m) for m in shared.modules()} and n_layers(teacher) == 6
    with torch.no_grad(): assert torch.equal(shared(IDS).logits, expected)
    twice = remove_layers(shared, Cut(0, 1), share=True)
    assert (n_layers(twice), n_layers(shared), n_layers(teacher)) == (3, 4, 6)
    assert remove_layers(teacher, Cut(2, 4), inplace=True) is teacher and n_layers(teacher) == 4
    with torch.no_grad(): assert torch.equal(teacher(IDS).logits, expected)
    with pytest.raises(ValueError, match="choose one"): remove_layers(teacher, Cut(1, 2), inplace=True, share=True)


def test_removed_weights_are_not_copied():
    teacher = make("llama")
    copied = []
    class Watched(torch.nn.Parameter):
        def __deepcopy__(self, memo): copied.append(1); return torch.nn.Parameter(self.data.clone())
    gate = decoder_layers(teacher)[2].mlp.gate_proj
    gate.weight = Watched(gate.weight.data)
    remove_layers(teacher, Cut(2, 4)); assert copied == []
    remove_layers(teacher, Cut(3, 4)); assert copied == [1]


def test_seed_is_untouched():
    teacher = make("llama")
    torch.manual_seed(3); a = torch.rand(4)
    torch.manual_seed(3); remove_layers(teacher, Cut(2, 4)); assert torch.equal(torch.rand(4), a)
    seed_everything(5); a = torch.rand(1); seed_everything(5); assert torch.equal(torch.rand(1), a)


def test_nothing_to_remove():
    teacher = make("llama")
    student = remove_layers(teacher, [])
    assert student is not teacher and n_layers(student) == 6 and same(state(student), state(teacher))


# -- the config

def test_config_lists():
    student = remove_layers(make("gemma3"), Cut(1, 3))
    whole = CONFIGS["gemma3"]().layer_types
    assert student.config.layer_types == whole[:1] + whole[3:]
    assert remove_layers(make("smollm3"), Cut(2, 3)).config.no_rope_layers == [1, 1, 1, 1, 0]
    assert remove_layers(make("gpt-neo"), Cut(1, 2)).config.attention_types == [[["global", "global", "local", "global", "local"], 1]]
    assert remove_layers(make("gpt2"), Cut(1, 3)).config.n_layer == 4
    assert remove_layers(make("mpt"), Cut(1, 3)).config.n_layers == 4


def test_config_indices():
    assert remove_layers(make("qwen2"), [Cut(1, 2), Cut(4, 5)]).config.max_window_layers == 2
    assert remove_layers(make("qwen3-moe"), Cut(0, 2)).config.mlp_only_layers == [2]
    sparse = remove_layers(make("qwen2-moe"), Cut(1, 2)).config # layers 1, 3, 5 are sparse
    assert (sparse.mlp_only_layers, sparse.decoder_sparse_step) == ([0, 1, 3], 1)


def test_config_settings_of_single_layers():
    "Gemma 4: every second layer has wider heads, and the last one must."
    teacher = make("gemma4")
    assert [int(i) for i in teacher.config.to_dict()["per_layer_config"]] == [1, 3, 5]
    student = remove_layers(teacher, [Cut(0, 1), Cut(2, 3)])
    assert [int(i) for i in student.config.to_dict()["per_layer_config"]] == [0, 1, 3] and len(teacher.config.layer_types) == 6
    with pytest.raises(ValueError, match="would have another layer_types"): remove_layers(teacher, Cut(5, 6))


def test_config_special_tokens_are_no_layers():
    config = tf.LlamaConfig(**{**llama, "num_hidden_layers": 2, "eos_token_id": [1, 3]})
    assert remove_layers(make(config), Cut(0, 1)).config.eos_token_id == [1, 3]


def test_layer_indices():
    student = remove_layers(make("llama"), Cut(1, 3))
    assert [layer.self_attn.layer_idx for layer in decoder_layers(student)] == [0, 1, 2, 3]
    neo = remove_layers(make("gpt-neo"), Cut(1, 3))
    assert [layer.attn.attention.layer_id for layer in decoder_layers(neo)] == [0, 1, 2, 3]


def test_device_map():
    teacher = make("llama")
    teacher.hf_device_map = {"model.embed_tokens": 0, **{f"model.layers.{i}": i // 3 for i in range(6)}, "lm_head": 1}
    student = remove_layers(teacher, Cut(1, 3))
    assert student.hf_device_map == {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1, "model.layers.3": 1, "lm_head": 1}
    assert len(teacher.hf_device_map) == 8


def test_multimodal():
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**llama).to_dict(), image_token_index=60, vision_config=tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16).to_dict())
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    assert layers_name(model).endswith("language_model.layers") and "vision" not in layers_name(model)
    with torch.no_grad():
        with bypass(decoder_layers(model), [Cut(1, 3)]): expected = model(IDS, use_cache=False).logits
        student = remove_layers(model, Cut(1, 3))
        assert torch.equal(student(IDS).logits, expected)
    assert student.config.text_config.num_hidden_layers == 4 and student.config.vision_config.num_hidden_layers == 6
    assert torch.equal(new_tokens(student, use_cache=True), new_tokens(student, use_cache=False))


# -- what cannot be right is refused, before anything changes

@pytest.mark.parametrize("config, match", [
    (lambda: tf.GPT2Config(**old, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    (lambda: tf.DiffLlamaConfig(**llama), r"lambda_init"),
    (lambda: tf.JambaConfig(**{k: v for k, v in llama.items() if k != "max_position_embeddings"}, num_experts=4, mamba_d_state=4,
                            attn_layer_period=3, attn_layer_offset=1), "a saved student would differ"),
    (lambda: tf.Gemma4TextConfig(**headed, hidden_size_per_layer_input=4, vocab_size_per_layer_input=64), "one part for each layer")])
def test_refused(config, match):
    model = make(config())
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=match): remove_layers(model, Cut(1, 3), inplace=True)
    assert n_layers(model) == 6 and model.config.to_dict() == before


def test_shared_keys_are_refused():
    model = make("llama")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ValueError, match="num_kv_shared_layers = 2"): remove_layers(model, Cut(1, 3))


@pytest.mark.parametrize("config, match", [
    (lambda: tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4), "encoder-decoder"),
    (lambda: tf.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32), "is an encoder"),
    (lambda: tf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32), "no causal language model")])
def test_no_decoder(config, match, tmp_path):
    model = tf.AutoModel.from_config(config())
    with pytest.raises(ValueError, match=match): decoder_layers(model)
    with pytest.raises(ValueError, match=match): remove_layers(model, Cut(0, 1))
    config().save_pretrained(tmp_path) # no weights there: the error comes before they are looked for
    with pytest.raises(ValueError, match=match): load_model(tmp_path)


def test_bert_as_decoder_is_one():
    config = tf.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, is_decoder=True)
    assert n_layers(remove_layers(tf.BertLMHeadModel(config).eval(), Cut(1, 2))) == 2


# -- loading

def test_playground():
    model, tokenizer = load_playground()
    assert model.dtype == torch.float32 and not model.training and n_layers(model) == model.config.num_hidden_layers > PLAYGROUND_REMOVE
    assert tokenizer.bos_token_id is not None and len(tokenizer) <= model.config.vocab_size
    assert (playground_path() / "config.json").is_file()
    again, _ = load_model(playground_path(), dtype="bfloat16")
    assert again.dtype == torch.bfloat16


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match="no config.json") as e: load_model(tmp_path)
    assert str(tmp_path) in str(e.value)
    with pytest.raises(ValueError, match="there is no folder"): load_model(tmp_path / "nowhere")
    for name in ("./nowhere", "~/nowhere-at-all", "a/b/c"):
        with pytest.raises(ValueError, match="there is no folder " + re.escape(name)): load_model(name)
    (tmp_path / "f.txt").write_text("x")
    with pytest.raises(ValueError, match="is a file"): load_model(tmp_path / "f.txt")
    with pytest.raises(ValueError, match="no-such-model"): load_model("no-such-model-anywhere")
    with pytest.raises(ValueError, match="'float17' is no dtype"): load_model(playground_path(), dtype="float17")


def test_broken_folders(tmp_path):
    (tmp_path / "config.json").write_text("{ no json")
    with pytest.raises(ValueError, match="cannot read the config"): load_model(tmp_path)
    model, tokenizer = load_playground()
    model.config.save_pretrained(tmp_path / "b"); tokenizer.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="cannot read the weights"): load_model(tmp_path / "b")


def test_remote_code_is_off(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}))
    (tmp_path / "code.py").write_text("raise SystemExit('ran foreign code')")
    with pytest.raises(ValueError, match="trust_remote_code"): load_model(tmp_path)


def test_students_need_load_student(tmp_path):
    model, tokenizer = load_playground()
    model.config.linearpatch = {"patches": [{"cut": [1, 2]}]}
    model.save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load_student"): load_model(tmp_path)
