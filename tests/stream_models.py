"Models whose streams are rewritten: every architecture of `tiny`, and more distant relatives."

import torch
import transformers as tf
from tiny import CONFIGS, gpt, headed, llama

MORE = {
    "gemma": lambda: tf.GemmaConfig(**headed),
    "granite": lambda: tf.GraniteConfig(
        **llama, residual_multiplier=0.3, embedding_multiplier=2.0, logits_scaling=3.0
    ),
    "mixtral": lambda: tf.MixtralConfig(**llama, num_local_experts=4),
    "gpt-oss": lambda: tf.GptOssConfig(
        **(headed | dict(num_local_experts=4, num_experts_per_tok=2))
    ),
    "olmo": lambda: tf.OlmoConfig(**llama),
    "olmo2": lambda: tf.Olmo2Config(**llama),
    "glm4": lambda: tf.Glm4Config(**headed),
    "stablelm": lambda: tf.StableLmConfig(**llama, qk_layernorm=True),
    "starcoder2": lambda: tf.Starcoder2Config(**llama),
    "nemotron": lambda: tf.NemotronConfig(**llama),
    "phi": lambda: tf.PhiConfig(**gpt, intermediate_size=48),
    "cohere": lambda: tf.CohereConfig(**llama),
    "cohere2": lambda: tf.Cohere2Config(**llama),
    "falcon-two-norms": lambda: tf.FalconConfig(
        **gpt, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon-in-a-row": lambda: tf.FalconConfig(**gpt, parallel_attn=False, alibi=True, bias=True),
}
ALL = {
    name: config
    for name, config in (MORE | CONFIGS).items()
    if name not in ("opt-350m", "baichuan2")
}  # for these two see nbs/architectures.qmd


def make(name, **change):
    "Six random layers of width 32, the stream large beside eps, gains and biases that matter."
    config = ALL[name]() if isinstance(name, str) else name
    for k, v in change.items():
        setattr(config, k, v)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():
        with torch.no_grad():
            if p.dim() > 1:
                p.normal_(0, 0.3)
            else:
                p.add_(0.2 * torch.randn_like(p))
    return model
