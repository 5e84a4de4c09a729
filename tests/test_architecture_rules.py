"What the config and the weights of any architecture say about single layers, and what is refused."

import copy

import pytest
import torch
import transformers as tf
from tiny import CONFIGS, IDS, bypass, headed, llama, make, new_tokens, old
from torch import nn

from linearpatch.method.models import (
    decoder_layers,
    hidden_size,
    input_device,
    load_model,
    n_layers,
    remove_layers,
)
from linearpatch.workshop.architectures import _compare, layers_name, mlp_module, mlp_weights
from linearpatch.workshop.cuts import Cut

PATHS = {
    "opt": "model.decoder.layers",
    "opt-350m": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt-j": "transformer.h",
    "gpt-neo": "transformer.h",
    "gpt-neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "falcon-40b": "transformer.h",
    "bloom": "transformer.h",
    "mpt": "transformer.blocks",
    "gemma3-images": "model.language_model.layers",
}


# -- the layers, and the last word of one


@pytest.mark.parametrize("name", CONFIGS)
def test_find(name):
    model = make(name)
    assert layers_name(model) == PATHS.get(name, "model.layers")
    assert (n_layers(model), hidden_size(model), input_device(model)) == (
        6,
        32,
        torch.device("cpu"),
    )


def test_mlp_module():
    "A dense MLP is seen at its last matrix, a mixture of experts as a whole, however it is stored."
    dense, mixture = decoder_layers(make("llama"))[0], decoder_layers(make("mixtral"))[0]
    assert mlp_module(dense) is dense.mlp.down_proj
    assert mlp_weights(mixture) == [("mlp.experts", "down_proj")]
    assert mlp_module(mixture) is mixture.mlp
    shared = decoder_layers(make("qwen2-moe"))[1]  # an expert for all tokens beside the others
    assert mlp_module(shared) is shared.mlp


@pytest.mark.parametrize("shared", [False, True])
def test_mlp_module_of_a_list_of_experts(shared):
    "As Mixtral and others were before transformers 5, and as remote code is."
    one = lambda: nn.ModuleDict(dict(w1=nn.Linear(4, 8), w2=nn.Linear(8, 4)))
    block = nn.ModuleDict(dict(gate=nn.Linear(4, 2), experts=nn.ModuleList([one(), one()])))
    if shared:
        block["shared_expert"] = one()
    layer = nn.ModuleDict(dict(block_sparse_moe=block))
    assert len(mlp_weights(layer)) == 2 + shared and mlp_module(layer) is block


# -- the config


def test_config_lists():
    student = remove_layers(make("gemma3"), Cut(1, 3))
    whole = CONFIGS["gemma3"]().layer_types
    assert student.config.layer_types == whole[:1] + whole[3:]
    assert remove_layers(make("smollm3"), Cut(2, 3)).config.no_rope_layers == [1, 1, 1, 1, 0]
    assert remove_layers(make("gpt-neo"), Cut(1, 2)).config.attention_types == [
        [["global", "global", "local", "global", "local"], 1]
    ]
    assert remove_layers(make("gpt2"), Cut(1, 3)).config.n_layer == 4
    assert remove_layers(make("mpt"), Cut(1, 3)).config.n_layers == 4


def test_config_indices():
    assert remove_layers(make("qwen2"), [Cut(1, 2), Cut(4, 5)]).config.max_window_layers == 2
    assert remove_layers(make("qwen3-moe"), Cut(0, 2)).config.mlp_only_layers == [2]
    sparse = remove_layers(make("qwen2-moe"), Cut(1, 2)).config  # layers 1, 3, 5 are sparse
    assert (sparse.mlp_only_layers, sparse.decoder_sparse_step) == ([0, 1, 3], 1)


def test_config_settings_of_single_layers():
    "Gemma 4: every second layer has wider heads, and the last one must."
    teacher = make("gemma4")
    assert [int(i) for i in teacher.config.to_dict()["per_layer_config"]] == [1, 3, 5]
    student = remove_layers(teacher, [Cut(0, 1), Cut(2, 3)])
    assert [int(i) for i in student.config.to_dict()["per_layer_config"]] == [0, 1, 3] and len(
        teacher.config.layer_types
    ) == 6
    with pytest.raises(ValueError, match="would have another layer_types"):
        remove_layers(teacher, Cut(5, 6))


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
    teacher.hf_device_map = {
        "model.embed_tokens": 0,
        **{f"model.layers.{i}": i // 3 for i in range(6)},
        "lm_head": 1,
    }
    student = remove_layers(teacher, Cut(1, 3))
    assert student.hf_device_map == {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.layers.2": 1,
        "model.layers.3": 1,
        "lm_head": 1,
    }
    assert len(teacher.hf_device_map) == 8


def test_multimodal():
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**llama).to_dict(),
        image_token_index=60,
        vision_config=tf.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=6,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            projection_dim=16,
        ).to_dict(),
    )
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    assert layers_name(model).endswith("language_model.layers") and "vision" not in layers_name(
        model
    )
    with torch.no_grad():
        with bypass(decoder_layers(model), [Cut(1, 3)]):
            expected = model(IDS, use_cache=False).logits
        student = remove_layers(model, Cut(1, 3))
        assert torch.equal(student(IDS).logits, expected)
    assert (
        student.config.text_config.num_hidden_layers == 4
        and student.config.vision_config.num_hidden_layers == 6
    )
    assert torch.equal(new_tokens(student, use_cache=True), new_tokens(student, use_cache=False))


# -- what cannot be right is refused, before anything changes


@pytest.mark.parametrize(
    "config, match",
    [
        (
            lambda: tf.GPT2Config(**old, scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx",
        ),
        (lambda: tf.DiffLlamaConfig(**llama), r"lambda_init"),
        (
            lambda: tf.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=6),
            "rescale_every = 6",
        ),
        (
            lambda: tf.JambaConfig(
                **{k: v for k, v in llama.items() if k != "max_position_embeddings"},
                num_experts=4,
                mamba_d_state=4,
                attn_layer_period=3,
                attn_layer_offset=1,
            ),
            "a saved student would differ",
        ),
        (
            lambda: tf.Gemma4TextConfig(
                **headed, hidden_size_per_layer_input=4, vocab_size_per_layer_input=64
            ),
            "one part for each layer",
        ),
    ],
)
def test_refused(config, match):
    model = make(config())
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=match):
        remove_layers(model, Cut(1, 3), inplace=True)
    assert n_layers(model) == 6 and model.config.to_dict() == before


def test_a_borrowed_choice_of_tokens_is_refused():
    model = make("llama")
    model.config.indexer_types = ["full", "shared"] * 3
    with pytest.raises(ValueError, match=r"layers \[1, 3, 5\] take the choice of tokens"):
        remove_layers(model, Cut(1, 3))
    model.config.indexer_types = ["full"] * 6
    assert n_layers(remove_layers(model, Cut(1, 3))) == 4


def test_shared_keys_are_refused():
    model = make("llama")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ValueError, match="num_kv_shared_layers = 2"):
        remove_layers(model, Cut(1, 3))


@pytest.mark.parametrize(
    "config, match",
    [
        (
            lambda: tf.T5Config(
                vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4
            ),
            "encoder-decoder",
        ),
        (
            lambda: tf.BertConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=32,
            ),
            "is an encoder",
        ),
        (
            lambda: tf.ViTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
            ),
            "no causal language model",
        ),
    ],
)
def test_no_decoder(config, match, tmp_path):
    model = tf.AutoModel.from_config(config())
    with pytest.raises(ValueError, match=match):
        decoder_layers(model)
    with pytest.raises(ValueError, match=match):
        remove_layers(model, Cut(0, 1))
    config().save_pretrained(
        tmp_path
    )  # no weights there: the error comes before they are looked for
    with pytest.raises(ValueError, match=match):
        load_model(tmp_path)


def test_bert_as_decoder_is_one():
    config = tf.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        is_decoder=True,
    )
    assert n_layers(remove_layers(tf.BertLMHeadModel(config).eval(), Cut(1, 2))) == 2


def test_the_message_names_the_first_difference_in_the_order_of_the_modules():
    keys = [(f"part{i}", "size") for i in range(20)]
    with pytest.raises(ValueError, match=r"in layer 3, part0\.size is 1, but its new place 2 .* 2"):
        _compare("it", dict.fromkeys(keys, 1), dict.fromkeys(keys, 2), 3, 2)
