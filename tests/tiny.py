"Tiny random models of many architectures, built from configs: nothing is downloaded."
import torch, transformers as tf
from dataclasses import dataclass

gpt = dict(vocab_size=64, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, max_position_embeddings=64,
           bos_token_id=0, eos_token_id=1, pad_token_id=2)
llama = dict(gpt, num_key_value_heads=2, intermediate_size=48)
headed = dict(llama, head_dim=8)
old = dict(vocab_size=64, n_embd=32, n_layer=6, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
experts = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**llama),
    "mistral": lambda: tf.MistralConfig(**headed, sliding_window=4),
    "qwen2": lambda: tf.Qwen2Config(**llama, use_sliding_window=True, sliding_window=4, max_window_layers=3),
    "qwen3": lambda: tf.Qwen3Config(**headed),
    "gemma2": lambda: tf.Gemma2Config(**headed, sliding_window=4),
    "gemma3": lambda: tf.Gemma3TextConfig(**headed, sliding_window=4),
    "phi3": lambda: tf.Phi3Config(**llama),
    "smollm3": lambda: tf.SmolLM3Config(**llama, no_rope_layer_interval=3),
    "opt": lambda: tf.OPTConfig(**gpt, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": lambda: tf.GPT2Config(**old),
    "gpt-j": lambda: tf.GPTJConfig(**old, rotary_dim=4),
    "gpt-neo": lambda: tf.GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=6, num_heads=4, window_size=4, max_position_embeddings=64,
                                       attention_types=[[["global", "local"], 3]], bos_token_id=0, eos_token_id=1),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**gpt, intermediate_size=48),
    "falcon": lambda: tf.FalconConfig(**gpt),
    "bloom": lambda: tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=1),
    "mpt": lambda: tf.MptConfig(vocab_size=64, d_model=32, n_layers=6, n_heads=4, max_seq_len=64),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(**headed, **experts, decoder_sparse_step=2, shared_expert_intermediate_size=16),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(**headed, **experts, mlp_only_layers=[0, 4]),
}
IDS = torch.tensor([[0, 5, 9, 33, 12, 7, 40, 8]])


def make(name):
    "A random model of six layers and width 32."
    torch.manual_seed(0)
    config = CONFIGS[name]() if isinstance(name, str) else name
    return tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def new_tokens(model, ids=IDS, n=6, **kw):
    return model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=2, **kw)


@dataclass
class FakePatch:
    "What prune needs of a patch."
    matrix: torch.Tensor
    cut: object
    family: str = "hadamard"


def random_patch(cut, hidden=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return FakePatch(torch.eye(hidden, dtype=torch.float64) + 0.2 * torch.randn(hidden, hidden, generator=g, dtype=torch.float64), cut)


class bypass:
    "The independent road to a pruned model: the intact teacher, whose removed layers hand on what they get, times P for the first of a run."
    def __init__(self, layers, cuts, patches=None): self.layers, self.cuts, self.patches = layers, cuts, patches or [None] * len(cuts)
    def __enter__(self):
        def hook(P):
            def through(layer, args, kwargs, out):
                h = args[0] if args else kwargs["hidden_states"]
                h = h if P is None else h @ P.to(h)
                return (h, *out[1:]) if isinstance(out, tuple) else h
            return through
        self.handles = [self.layers[i].register_forward_hook(hook(p.matrix if p is not None and i == c.start else None), with_kwargs=True)
                        for c, p in zip(self.cuts, self.patches) for i in c]
    def __exit__(self, *_):
        for h in self.handles: h.remove()
