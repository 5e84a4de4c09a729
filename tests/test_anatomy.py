"What touches the stream of a model, in every kind of layer."

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
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


def norms_with_one_added():
    "The norms of transformers that compute with 1 + weight, found in its source, but for one that scales its output besides."
    added = re.compile(r"\b1(\.0)? \+ self\.weight|self\.weight(\.float\(\))? \+ 1\b")
    models = Path(transformers.__file__).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        if not added.search(text := file.read_text(encoding="utf-8")):
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name in re.findall(r"^class (\w*Norm\w*)\(", text, re.MULTILINE):
            if added.search(inspect.getsource(getattr(module, name))) and "Scaled" not in name:
                yield getattr(module, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low, high", [(0.5, 1.5), (10, 130), (100, 130)])
def test_one_plus_weight_is_told_from_weight(low, high, dtype):
    "Also with gains as trained Gemmas have them, where 1 more or less is one percent."
    found = list(norms_with_one_added())
    assert {"GemmaRMSNorm", "Gemma3RMSNorm", "NemotronLayerNorm1P", "Qwen3NextRMSNorm"} <= {
        norm.__name__ for norm in found
    }
    plain = [
        torch.nn.RMSNorm,
        torch.nn.LayerNorm,
        transformers.models.llama.modeling_llama.LlamaRMSNorm,
    ]
    g = torch.Generator().manual_seed(0)
    for norm, offset in [*((n, 1.0) for n in found), *((n, 0.0) for n in plain)]:
        module, gain = norm(32), low + (high - low) * torch.rand(32, generator=g)
        module.weight.data = gain - offset
        read = read_norm(module.to(dtype), 32)
        assert read.offset == offset, norm
        torch.testing.assert_close(read.gain.float(), gain, rtol=0.01, atol=0.01)


def test_a_norm_of_another_kind_is_refused():
    class Doubled(transformers.models.llama.modeling_llama.LlamaRMSNorm):
        def forward(self, x):
            return 1.1 * super().forward(x)

    with pytest.raises(ValueError, match="neither a LayerNorm nor an RMSNorm"):
        read_norm(Doubled(32), 32)


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
