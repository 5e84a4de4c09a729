"Chapter 07: the student is an ordinary model, whatever the architecture and wherever the cut."

import copy
import gc
import weakref

import pytest
import torch
import transformers as tf
from tiny import CONFIGS, IDS, bypass, make, new_tokens, random_patch

from linearpatch.method.models import *
from linearpatch.method.pruning import *
from linearpatch.workshop.architectures import *
from linearpatch.workshop.cuts import *
from linearpatch.workshop.forward import *

CUTS = {
    "middle": [Cut(2, 4)],
    "first": [Cut(0, 2)],
    "last": [Cut(4, 6)],
    "many": [Cut(0, 1), Cut(2, 3), Cut(4, 6)],
}


pytestmark = pytest.mark.usefixtures("quiet")


def patches_for(cuts):
    return [random_patch(c, seed=i) for i, c in enumerate(cuts)]


def student_of(name="llama", where="middle", **kw):
    return prune(make(name), CUTS[where], patches_for(CUTS[where]), **kw)


def logits(model, ids=IDS, **kw):
    with torch.no_grad():
        return model(ids, **kw).logits


# -- the function


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("where", ["middle", "many"])
def test_function_and_cache(name, where):
    teacher, cuts = make(name), CUTS[where]
    patches = patches_for(cuts)
    with bypass(decoder_layers(teacher), cuts, patches):
        expected = logits(teacher, use_cache=False)
    dense = logits(teacher)
    student = prune(teacher, cuts, patches)
    torch.testing.assert_close(logits(student), expected, rtol=1e-5, atol=1e-6)
    assert (logits(student) - logits(remove_layers(teacher, cuts))).abs().max() > 1e-4, (
        "the patches do something"
    )
    assert (
        torch.equal(logits(teacher), dense)
        and not hasattr(teacher.config, "linearpatch")
        and patch_modules(teacher) == []
    )
    assert torch.equal(new_tokens(student, use_cache=True), new_tokens(student, use_cache=False))


@pytest.mark.parametrize("where", CUTS)
def test_every_place(where):
    teacher, cuts = make("llama"), CUTS[where]
    patches = patches_for(cuts)
    with bypass(decoder_layers(teacher), cuts, patches):
        expected = logits(teacher, use_cache=False)
    student = prune(teacher, cuts, patches)
    torch.testing.assert_close(logits(student), expected, rtol=1e-5, atol=1e-6)
    weights = [m.weight for m in patch_modules(student)]
    assert (
        len(weights) == len(cuts)
        and all(torch.equal(w, p.matrix.T.float()) for w, p in zip(weights, patches))
        and all(w.is_contiguous() for w in weights)
    )
    assert all(w.data_ptr() != p.matrix.data_ptr() for w, p in zip(weights, patches))
    assert student.config.linearpatch["cuts"] == [[c.start, c.stop] for c in cuts]


def test_interfaces():
    assert interfaces([Cut(2, 4)], 6) == [(2, "input")]
    assert interfaces([Cut(0, 2)], 6) == [(0, "input")]
    assert interfaces([Cut(4, 6)], 6) == [(3, "output")]
    assert interfaces([Cut(0, 1), Cut(2, 3), Cut(4, 6)], 6) == [
        (0, "input"),
        (1, "input"),
        (1, "output"),
    ]


def test_identity_patch_changes_nothing():
    teacher, cut = make("llama"), Cut(2, 4)
    patch = random_patch(cut)
    patch.matrix = torch.eye(32)
    assert torch.equal(logits(prune(teacher, cut, patch)), logits(remove_layers(teacher, cut)))
    patch.family = "none"
    student = prune(teacher, cut, patch)
    assert patch_modules(student) == [] and student.config.linearpatch["patches"] == []


def test_no_patches():
    teacher = make("gpt2")
    assert torch.equal(logits(prune(teacher, "1:3")), logits(remove_layers(teacher, Cut(1, 3))))


def test_keyword_and_tuple_layers():
    "Decoder layers may be called by keyword, and older versions return tuples."
    student = student_of(where="many")
    expected = logits(student)
    for layer in decoder_layers(
        student
    ):  # hooks run outside forward, so a tuple from forward is what the output hook sees
        inner = layer.forward
        layer.forward = lambda *a, inner=inner, **k: (inner(*a, **k),)
    unpack = [
        layer.register_forward_hook(lambda m, a, out: out[0]) for layer in decoder_layers(student)
    ]
    assert torch.equal(logits(student), expected) and len(unpack) == 2
    layer, h = decoder_layers(student_of())[2], torch.randn(1, 4, 32)
    rope = make("llama").model.rotary_emb(h, torch.arange(4)[None])
    with torch.no_grad():
        assert torch.equal(
            layer(hidden_states=h, position_embeddings=rope), layer(h, position_embeddings=rope)
        )


# -- an ordinary model


def test_ordinary_model():
    student = student_of()
    assert type(student).__name__ == "LlamaForCausalLM"
    assert isinstance(student, tf.LlamaForCausalLM) and isinstance(student, tf.PreTrainedModel)
    assert student.config.num_hidden_layers == 4
    assert "model.layers.2.linear_patch.weight" in student.state_dict()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom"])
def test_padding(name):
    student = student_of(name, "many")
    ids = torch.tensor([[2, 2, 2, 0, 5, 9, 33, 12], IDS[0].tolist()])
    together = new_tokens(student, ids, attention_mask=(ids != 2).long())
    assert together[0, 3:].tolist() == new_tokens(student, ids[:1, 3:])[0].tolist() and torch.equal(
        together[1:], new_tokens(student, ids[1:])
    )


def test_static_cache():
    student = student_of(where="many")
    assert torch.equal(
        new_tokens(student, cache_implementation="static", disable_compile=True),
        new_tokens(student),
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compile(name):
    student = student_of(name, "many")
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, use_cache=False), logits(student))


@pytest.mark.parametrize(
    "dtype, patch_dtype, want",
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, None, torch.float32),
    ],
)
def test_dtypes(dtype, patch_dtype, want):
    teacher = tf.AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=dtype).eval()
    student = prune(teacher, Cut(2, 4), random_patch(Cut(2, 4)), dtype=patch_dtype)
    assert (
        patch_modules(student)[0].weight.dtype == want
        and logits(student).dtype == dtype
        and logits(student).isfinite().all()
    )


@pytest.mark.parametrize("where", ["middle", "many"])
def test_gradients(where):
    student = student_of(where=where).train()
    student(IDS, labels=IDS).loss.backward()
    grads = [m.weight.grad.clone() for m in patch_modules(student)]
    assert all(g.abs().sum() > 0 for g in grads)
    student.zero_grad()
    getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
    student(IDS, labels=IDS, use_cache=False).loss.backward()
    for m, g in zip(patch_modules(student), grads):
        torch.testing.assert_close(m.weight.grad, g)


def test_gradient_is_right():
    student, eps = (
        student_of("gpt2").double().eval(),
        1e-6,
    )  # Llama's norm computes in float32 in any model
    weight = patch_modules(student)[0].weight

    def loss():
        return student(IDS).logits.square().mean()  # the models' own loss is in float32

    loss().backward()
    g = weight.grad[3, 5].item()
    with torch.no_grad():
        weight[3, 5] += eps
        up = loss()
        weight[3, 5] -= 2 * eps
        down = loss()
    assert abs((up - down).item() / (2 * eps) - g) < 1e-5 * abs(g)


def test_deepcopy():
    student = student_of(where="many")
    expected, other = logits(student), copy.deepcopy(student)
    assert torch.equal(logits(other), expected)
    with torch.no_grad():
        for m in patch_modules(other):
            m.weight.zero_()
    assert torch.equal(logits(student), expected) and not torch.equal(logits(other), expected)


def test_a_student_saves_itself_with_its_patches(tmp_path):
    student = student_of()
    for name, model in (("s", student), ("copy", copy.deepcopy(student))):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            tf.AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=False)
        with pytest.raises(Exception, match="trust_remote_code=True"):
            tf.LlamaForCausalLM.from_pretrained(tmp_path / name)
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert torch.equal(logits(again), logits(student))
        with pytest.raises(ValueError, match="push_to_hub"):  # it would upload before the seal
            model.save_pretrained(tmp_path / "u", push_to_hub=True)
    assert not (tmp_path / "u").exists()
    prune(make("llama"), CUTS["middle"]).save_pretrained(
        tmp_path / "t"
    )  # no patch, nothing to lose
    assert (
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "t").config.linearpatch["patches"] == []
    )


def test_a_student_without_its_patches_is_free_again(tmp_path):
    student = student_of()
    for layer in decoder_layers(student):
        vars(layer)["_modules"].pop("linear_patch", None)
    guard(student).save_pretrained(tmp_path / "s")
    assert (tmp_path / "s" / "model.safetensors").exists()
    assert type(student) is tf.LlamaForCausalLM and not list((tmp_path / "s").glob("*.py"))


def test_a_student_leaves_memory_with_its_last_name():
    gc.collect()
    gc.disable()
    try:
        student = student_of()
        ref = weakref.ref(student)
        del student
        assert ref() is None
    finally:
        gc.enable()


def test_inplace_and_share():
    teacher = make("llama")
    expected = logits(student_of(where="many"))
    shared = prune(teacher, CUTS["many"], patches_for(CUTS["many"]), share=True)
    own = {id(p) for p in teacher.parameters()}
    assert {n for n, p in shared.named_parameters() if id(p) not in own} == {
        "model.layers.0.linear_patch.weight",
        "model.layers.1.linear_patch.weight",
        "model.layers.1.linear_patch_out.weight",
    }
    assert torch.equal(logits(shared), expected) and n_layers(teacher) == 6
    assert prune(teacher, CUTS["many"], patches_for(CUTS["many"]), inplace=True) is teacher
    assert torch.equal(logits(teacher), expected)


# -- accelerate


@pytest.mark.filterwarnings("ignore")
def test_offload(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    student = student_of(where="many")
    expected = logits(student)
    places = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
    }
    spread = accelerate.dispatch_model(
        copy.deepcopy(student),
        places,
        main_device="cpu",
        offload_dir=str(tmp_path),
        force_hooks=True,
    )
    assert patch_modules(spread)[1].weight.device.type == "meta" and torch.equal(
        logits(spread), expected
    )
    teacher = make("llama")  # and a teacher whose weights are away while it is pruned
    accelerate.cpu_offload(teacher, execution_device="cpu")
    assert next(teacher.parameters()).device.type == "meta"
    assert torch.equal(logits(prune(teacher, CUTS["many"], patches_for(CUTS["many"]))), expected)


def test_patch_follows_the_device():
    "A hidden state on another device goes to the patch, as it would go to the layer."
    from linearpatch.shipped.modeling_linearpatch import times_matrix

    patch = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        out = times_matrix(patch, torch.ones(2, 4, dtype=torch.float16))
    assert out.dtype == torch.float16
    if torch.cuda.is_available():
        h = torch.ones(2, 4, device="cuda")
        assert (
            times_matrix(patch, h).device.type == "cpu"
            and times_matrix(patch.cuda(), h.cpu()).device.type == "cuda"
        )


class Stored(torch.nn.Module):
    "A matrix in eight bits, as a quantizer leaves it: the weight only stores."

    def __init__(self, linear):
        super().__init__()
        whole = linear.weight.data
        self.size = whole.abs().max() / 127
        self.weight = torch.nn.Parameter((whole / self.size).round().to(torch.int8), False)
        self.bias = linear.bias

    def forward(self, h):
        return torch.nn.functional.linear(h, self.weight.to(h.dtype) * self.size, self.bias)


def in_eight_bits(module):
    "Every nn.Linear is replaced, as bitsandbytes and its kin do."
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, Stored(child))
        else:
            in_eight_bits(child)
    return module


def test_a_quantizer_leaves_the_patch_alone(tmp_path):
    "In eight bits a student is as far from itself as its teacher is from its own."

    def rounding(model):
        exact = logits(model)
        return (logits(in_eight_bits(model)) - exact).norm() / exact.norm()

    teacher = make("llama")
    student = prune(teacher, CUTS["many"], patches_for(CUTS["many"]))
    whole = [patch.weight.clone() for patch in patch_modules(student)]
    student.save_pretrained(tmp_path)
    read = tf.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    off = rounding(teacher)
    for model in (student, read):
        assert 0 < rounding(model) < 3 * off < 0.5
        assert all(map(torch.equal, [p.weight for p in patch_modules(model)], whole))


@pytest.mark.parametrize("storage", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_the_stream_is_never_cast_to_a_type_that_only_stores(storage):
    from linearpatch.shipped.modeling_linearpatch import times_matrix

    class Packed(torch.nn.Module):
        "Its weight is stored in another type than it computes in."

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4, 4).to(storage), False)

        def forward(self, h):
            assert h.dtype.is_floating_point and h.dtype.itemsize > 1
            return 2 * h

    h = torch.tensor([[0.25, -0.5, 3.75, 0.1]])
    for dtype in (torch.float32, torch.bfloat16):
        out = times_matrix(Packed(), h.to(dtype))
        assert out.dtype == dtype and torch.equal(out, 2 * h.to(dtype))


# -- bad input


@pytest.mark.parametrize(
    "cuts, patches, match",
    [
        ([Cut(1, 3)], [Cut(1, 2)], "do not fit"),
        ([Cut(1, 3)], [], "do not fit"),
        ([Cut(1, 2), Cut(3, 4)], [Cut(1, 2)], "do not fit"),
        ([Cut(1, 3)], [Cut(1, 3), Cut(1, 3)], "do not fit"),
        ([Cut(1, 2), Cut(2, 3)], [Cut(1, 2), Cut(2, 3)], "contiguous run"),
        ([Cut(4, 7)], None, "out of range"),
        ([Cut(1, 4), Cut(2, 5)], None, "overlap"),
        ([Cut(0, 6)], None, "keep at least one"),
    ],
)
def test_bad_cuts_and_patches(cuts, patches, match):
    teacher = make("llama")
    with pytest.raises(ValueError, match=match):
        prune(
            teacher,
            cuts,
            patches if patches is None else [random_patch(c) for c in patches],
            inplace=True,
        )
    assert n_layers(teacher) == 6


def test_bad_matrices():
    teacher, cut = make("llama"), Cut(1, 3)
    with pytest.raises(ValueError, match=r"\(16, 16\).*\(32, 32\)"):
        prune(teacher, cut, random_patch(cut, 16), inplace=True)
    for bad in (float("nan"), float("inf")):
        patch = random_patch(cut)
        patch.matrix[3, 4] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            prune(teacher, cut, patch, inplace=True)
    patch = random_patch(cut)
    patch.matrix[0, 0] = 1e6
    with pytest.raises(ValueError, match="infinity in torch.float16"):
        prune(teacher, cut, patch, dtype=torch.float16, inplace=True)
    assert n_layers(teacher) == 6


def test_no_second_pruning():
    with pytest.raises(ValueError, match="a student already.*all cuts at once"):
        prune(student_of(), Cut(1, 2))
