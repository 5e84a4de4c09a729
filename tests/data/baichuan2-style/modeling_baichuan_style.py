"""A small model with what Baichuan2 has and transformers does not: query, key and value in one matrix, a head whose rows
are normalised, layers that return tuples and learn their number from the loop around them."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_baichuan_style import BaichuanStyleConfig


class RMSNorm(nn.Module):
    def __init__(self, hidden, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), eps

    def forward(self, x):
        return self.weight * (
            x.float() * (x.float().pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        ).to(x.dtype)


class NormHead(nn.Module):
    def __init__(self, hidden, vocab):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, hidden))

    def forward(self, x):
        return F.linear(x, F.normalize(self.weight))


CACHE = (
    "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
)  # from transformers 5.24 on, before


def rotate(x, position_ids):
    "Rotary positions, base 10000; x: (batch, heads, tokens, channels of a head)."
    half = x.shape[-1] // 2
    angle = position_ids[:, None, :, None] * 10000.0 ** -(
        torch.arange(half, device=x.device) / half
    )
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, mask, position_ids, cache, place):
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in self.W_pack(x).chunk(3, -1)
        )
        q, k = rotate(q, position_ids), rotate(k, position_ids)
        if cache is not None:
            k, v = cache.update(k, v, place)
        return self.o_proj(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        )


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, mask, position_ids, cache, place):
        x = x + self.self_attn(self.input_layernorm(x), mask, position_ids, cache, place)
        return (x + self.mlp(self.post_attention_layernorm(x)), cache)


class BaichuanStylePreTrainedModel(PreTrainedModel):
    config_class = BaichuanStyleConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]


class BaichuanStyleModel(BaichuanStylePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        cache=None,
        **_,
    ):
        if cache is None:
            cache = past_key_values
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache()
        seen = cache.get_seq_length() if cache is not None else 0
        at = torch.arange(seen, seen + x.shape[1], device=x.device)
        if position_ids is None:
            position_ids = at[None]
        mask = torch.arange(seen + x.shape[1], device=x.device)[None] <= at[:, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
        mask = mask | ~mask.any(
            -1, keepdim=True
        )  # a row of padding looks at everything, and nobody looks at it
        states = []
        for place, layer in enumerate(self.layers):
            states.append(x)
            x = layer(x, mask, position_ids, cache, place)[0]
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*states, x) if output_hidden_states else None,
            **{CACHE: cache},
        )


class BaichuanStyleForCausalLM(BaichuanStylePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = BaichuanStyleModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new):
        self.lm_head = new

    def forward(self, input_ids=None, labels=None, use_cache=None, **kwargs):
        out = self.model(
            input_ids, use_cache=self.config.use_cache if use_cache is None else use_cache, **kwargs
        )
        logits = self.lm_head(out.last_hidden_state)
        loss = (
            None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: out.get(CACHE)}
        )
