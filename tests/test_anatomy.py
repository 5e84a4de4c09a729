"What touches the stream of a model, in every kind of layer."

import pytest
import torch
from stream_models import make

from linearpatch.method.models import decoder_layers
from linearpatch.workshop.anatomy import anatomy, layer_outputs, norm_inputs, read_norm, trace


@pytest.mark.parametrize(
    "name, reads, writes",
    [
        ("llama", 5, 2),
        ("phi3", 2, 2),
        ("gpt2", 2, 2),
        ("mixtral", 5, 2),
        ("qwen2-moe", 5, 2),
        ("falcon", 2, 2),
        ("olmo2", 5, 0),
    ],
)
def test_anatomy(name, reads, writes):
    parts, unseen = anatomy(make(name))
    layer = [p for p in parts if p.place == 0]
    assert (
        unseen == []
        and sum(p.role == "read" for p in layer) == reads
        and sum(p.role == "write" for p in layer) == writes
    )
    assert sum(p.role == "post" for p in layer) == 2 * (name == "olmo2")
    assert {p.place for p in parts} == {-1, *range(6), 6}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo", "stablelm"])
def test_a_norm_does_what_was_read(name):
    model = make(name)
    part = next(p for p in anatomy(model)[0] if p.role == "norm")
    module = model.get_submodule(part.path)
    n, x = read_norm(module, 32), 3 * torch.randn(5, 32, dtype=torch.float64) + 1
    centered = x - x.mean(-1, keepdim=True) if n.centered else x
    size = (centered.square().mean(-1, keepdim=True) + n.eps).sqrt()
    want = centered / size * n.gain + (0 if n.bias is None else n.bias)
    with torch.no_grad():
        torch.testing.assert_close(module(x.float()).double(), want, atol=1e-4, rtol=1e-4)


def test_watching_leaves_no_hook():
    model = make("llama")
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(ids, dtype=torch.bool)
    trace(model)
    outputs = layer_outputs(model, ids, mask)
    norms = norm_inputs(model, ["model.norm"], [(ids, mask)], 7)
    assert len(outputs) == len(decoder_layers(model)) and norms["model.norm"].shape == (7, 32)
    last = outputs[-1].flatten(0, 1)[:7]
    unit = last / last.norm(dim=1, keepdim=True)
    torch.testing.assert_close(norms["model.norm"], unit, atol=1e-5, rtol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
