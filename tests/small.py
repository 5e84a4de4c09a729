"Small random models, windows for them, and slow but sure ways to score a student."

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from linearpatch.method.calibration import Windows
from linearpatch.method.models import decoder_layers, remove_layers

L, C, V = 6, 32, 61
small = dict(
    vocab_size=V,
    hidden_size=C,
    intermediate_size=48,
    num_hidden_layers=L,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
CONFIGS = dict(
    llama=lambda: LlamaConfig(**small),
    gemma2=lambda: Gemma2Config(**small, head_dim=8, sliding_window=4),
    gpt2=lambda: GPT2Config(
        vocab_size=V, n_embd=C, n_layer=L, n_head=4, n_positions=64, initializer_range=0.2
    ),
)


def make(name="llama", seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()


def random_windows():
    g = torch.Generator().manual_seed(1)
    return Windows(
        torch.randint(2, V, (7, 12), generator=g), torch.ones(7, 12, dtype=torch.bool), "random"
    )


def padded_windows():
    windows = random_windows()
    mask = windows.mask.clone()
    for row, real in enumerate([12, 9, 5, 12, 3, 7, 12]):
        mask[row, real:] = False
    return Windows(torch.where(mask, windows.ids, 1), mask, "padded")


@torch.no_grad()
def reference_loss(model, windows):
    "Mean next-token loss by HuggingFace's own labels, a window at a time."
    total = count = 0
    for ids, mask in zip(windows.ids, windows.mask):
        ids = ids[mask][None]
        total, count = (
            total + model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1),
            count + ids.shape[1] - 1,
        )
    return total / count


def naive_student(model, cut, patch):
    "Deep copy, removal, and a hook that multiplies by P."
    student = remove_layers(model, [cut])
    layers, P = decoder_layers(student), None if patch is None else patch.matrix.float()
    if P is None:
        return student
    if cut.start < len(layers):

        def enter(module, args, kwargs):
            if args:
                return (args[0] @ P, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] @ P}

        layers[cut.start].register_forward_pre_hook(enter, with_kwargs=True)
    else:
        layers[-1].register_forward_hook(
            lambda m, a, out: (out[0] @ P, *out[1:]) if isinstance(out, tuple) else out @ P
        )
    return student
