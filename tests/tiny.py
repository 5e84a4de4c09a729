"Tiny random models of many architectures, built from configs: nothing is downloaded."

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf

gpt = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=6,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
llama = dict(gpt, num_key_value_heads=2, intermediate_size=48)
headed = dict(llama, head_dim=8)
old = dict(
    vocab_size=64, n_embd=32, n_layer=6, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
)
experts = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
far = dict(
    rope_parameters=dict(
        rope_type="llama3",
        rope_theta=10000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )
)
vision = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=6,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
BAICHUAN = Path(__file__).resolve().parent / "data" / "baichuan2-style"  # brings its own code

CONFIGS = {
    "llama-2": lambda: tf.LlamaConfig(**{**llama, "num_key_value_heads": 4}),
    "llama": lambda: tf.LlamaConfig(**llama),
    "llama-3": lambda: tf.LlamaConfig(**llama, **far),
    "llama-3.2": lambda: tf.LlamaConfig(**headed, **far, tie_word_embeddings=True),
    "mistral": lambda: tf.MistralConfig(**headed, sliding_window=4),
    "mixtral": lambda: tf.MixtralConfig(**llama, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": lambda: tf.Qwen2Config(
        **llama, use_sliding_window=True, sliding_window=4, max_window_layers=3
    ),
    "qwen2-r1": lambda: tf.Qwen2Config(
        **llama, use_sliding_window=False, tie_word_embeddings=False
    ),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(
        **headed, **experts, decoder_sparse_step=2, shared_expert_intermediate_size=16
    ),
    "qwen3": lambda: tf.Qwen3Config(**headed),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(**headed, **experts, mlp_only_layers=[0, 4]),
    "gemma": lambda: tf.GemmaConfig(**headed),
    "gemma2": lambda: tf.Gemma2Config(**headed, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**headed, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3-images": lambda: tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(
            **headed, sliding_window=4, query_pre_attn_scalar=8
        ).to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=60,
        eoi_token_index=61,
        image_token_index=62,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    ),
    "gemma4": lambda: tf.Gemma4TextConfig(
        **headed,
        sliding_window=4,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
    "phi": lambda: tf.PhiConfig(**llama),
    "phi3": lambda: tf.Phi3Config(**llama),
    "olmo2": lambda: tf.Olmo2Config(**llama),
    "olmo3": lambda: tf.Olmo3Config(**llama, sliding_window=4),
    "granite": lambda: tf.GraniteConfig(
        **llama,
        embedding_multiplier=6.0,
        residual_multiplier=0.5,
        attention_multiplier=0.25,
        logits_scaling=2.0,
    ),
    "smollm3": lambda: tf.SmolLM3Config(**llama, no_rope_layer_interval=3),
    "stablelm": lambda: tf.StableLmConfig(**llama, use_qkv_bias=True),
    "stablelm-parallel": lambda: tf.StableLmConfig(
        **llama, use_parallel_residual=True, qk_layernorm=True
    ),
    "starcoder2": lambda: tf.Starcoder2Config(**llama, sliding_window=4),
    "nemotron": lambda: tf.NemotronConfig(**headed),
    "glm4": lambda: tf.Glm4Config(**headed),
    "gpt-oss": lambda: tf.GptOssConfig(
        **headed,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16
        ),
    ),
    "deepseek-v3": lambda: tf.DeepseekV3Config(
        **{**llama, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=2,
        kv_lora_rank=8,
        q_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=10,
    ),
    "cohere": lambda: tf.CohereConfig(**llama, use_qk_norm=True),
    "cohere2": lambda: tf.Cohere2Config(**llama, sliding_window=4),
    "falcon": lambda: tf.FalconConfig(**gpt),
    "falcon-40b": lambda: tf.FalconConfig(**gpt, new_decoder_architecture=True, num_kv_heads=2),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**gpt, intermediate_size=48),
    "gpt-j": lambda: tf.GPTJConfig(**old, rotary_dim=4),
    "gpt-neo": lambda: tf.GPTNeoConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=6,
        num_heads=4,
        window_size=4,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 3]],
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt2": lambda: tf.GPT2Config(**old),
    "opt": lambda: tf.OPTConfig(**gpt, ffn_dim=48, word_embed_proj_dim=32),
    "opt-350m": lambda: tf.OPTConfig(
        **gpt, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "bloom": lambda: tf.BloomConfig(
        vocab_size=64, hidden_size=32, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=1
    ),
    "mpt": lambda: tf.MptConfig(vocab_size=64, d_model=32, n_layers=6, n_heads=4, max_seq_len=64),
    "baichuan2": lambda: tf.AutoConfig.from_pretrained(BAICHUAN, trust_remote_code=True),
}
IDS = torch.tensor([[0, 5, 9, 33, 12, 7, 40, 8]])


def liven(model):
    "Fresh weights as trained ones are: layers that count, norm gains far from 1, biases far from 0."
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for p in model.parameters():
            if id(p) in embeddings:
                p.normal_(std=0.5)
            elif p.dim() < 2:
                p += 0.3 * torch.randn_like(p)
            else:
                p.normal_(std=1.5 * p.shape[-1] ** -0.5)
    return model


def fresh(name):
    "A random model of six layers and width 32, as transformers initialises it."
    torch.manual_seed(0)
    config = CONFIGS[name]() if isinstance(name, str) else name
    return tf.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=True
    ).eval()


def make(name):
    return liven(fresh(name))


def new_tokens(model, ids=IDS, n=6, **kw):
    return model.generate(
        ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=2, **kw
    )


@dataclass
class FakePatch:
    "What prune needs of a patch."

    matrix: torch.Tensor
    cut: object
    family: str = "hadamard"
    mlp: torch.Tensor | None = None
    down: torch.Tensor | None = None
    first: tuple | None = None


def random_patch(cut, hidden=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return FakePatch(
        torch.eye(hidden, dtype=torch.float64)
        + 0.2 * torch.randn(hidden, hidden, generator=g, dtype=torch.float64),
        cut,
    )


class bypass:
    "The independent road to a pruned model: the intact teacher, whose removed layers hand on what they get, times P for the first of a run."

    def __init__(self, layers, cuts, patches=None):
        self.layers, self.cuts, self.patches = layers, cuts, patches or [None] * len(cuts)

    def __enter__(self):
        def hook(P):
            def through(layer, args, kwargs, out):
                h = args[0] if args else kwargs["hidden_states"]
                h = h if P is None else h @ P.to(h)
                return h if isinstance(out, torch.Tensor) else type(out)([h, *out[1:]])

            return through

        self.handles = [
            self.layers[i].register_forward_hook(
                hook(p.matrix if p is not None and i == c.start else None), with_kwargs=True
            )
            for c, p in zip(self.cuts, self.patches)
            for i in c
        ]

    def __exit__(self, *_):
        for h in self.handles:
            h.remove()
