"The run that `remove_layers` makes before any work: what is wrong is refused, what is right is not."

import copy
import warnings

import pytest
import torch
import transformers as tf
from tiny import IDS, liven, llama, make

from linearpatch.method.models import decoder_layers, n_layers, remove_layers
from linearpatch.method.pruning import prune
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.removal import bypass, check_removal, difference


class TwoStreams(tf.LlamaForCausalLM):
    "Each layer reads what the layer before it has put beside the hidden states."

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.register_forward_pre_hook(self.bring, with_kwargs=True)

    def bring(self, layer, args, kwargs):
        if layer.self_attn.layer_idx == 0:
            self.second = torch.zeros_like(args[0])
        self.second = self.second + 0.5 * args[0].flip(-1)
        return (args[0] + self.second, *args[1:]), kwargs


@pytest.fixture
def two_streams():
    torch.manual_seed(0)
    return liven(TwoStreams(tf.LlamaConfig(**llama))).eval()


@pytest.mark.parametrize("how", [{}, {"inplace": True}, {"share": True}])
def test_a_second_stream_is_refused_and_nothing_changes(two_streams, how):
    before = copy.deepcopy(two_streams.state_dict())
    with pytest.raises(ValueError, match="Something goes from layer to layer"):
        remove_layers(two_streams, Cut(2, 4), **how)
    with pytest.raises(ValueError, match="Something goes from layer to layer"):
        prune(two_streams, Cut(2, 4), **how)
    assert n_layers(two_streams) == two_streams.config.num_hidden_layers == 6
    assert all(torch.equal(w, before[k]) for k, w in two_streams.state_dict().items())


def test_wrong_numbers_in_the_cache_are_found():
    teacher = make("llama")

    def wrong():
        student = remove_layers(teacher, Cut(0, 2), share=True)
        for layer in decoder_layers(student):
            layer.self_attn.layer_idx += 1
        return student

    with pytest.raises(ValueError, match="with its cache the rest writes wrongly"):
        check_removal(teacher, [0, 1], wrong)


def test_a_student_that_does_not_run_is_refused():
    teacher = make("llama")

    def broken():
        student = remove_layers(teacher, Cut(0, 2), share=True)
        del student.model.norm
        return student

    with pytest.raises(ValueError, match="the rest does not run"):
        check_removal(teacher, [0, 1], broken)


def test_no_weight_is_copied_for_the_check(monkeypatch):
    teacher, copied = make("llama"), []
    whole = torch.nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        torch.nn.Parameter, "__deepcopy__", lambda p, memo: copied.append(p) or whole(p, memo)
    )
    remove_layers(teacher, Cut(2, 4), share=True)
    remove_layers(teacher, Cut(2, 4), inplace=True)
    assert copied == []


def test_modes_and_hooks_are_as_before():
    teacher = make("llama").train()
    teacher.model.layers[1].eval()
    modes = [m.training for m in teacher.modules()]
    student = remove_layers(teacher, Cut(2, 4))
    assert [m.training for m in teacher.modules()] == modes and student.training
    assert not any(m._forward_hooks for m in teacher.modules())
    assert not any(m._forward_hooks for m in student.modules())


def test_what_cannot_run_is_not_checked_and_says_so():
    with torch.device("meta"):
        skeleton = tf.LlamaForCausalLM(tf.LlamaConfig(**llama))
    with pytest.warns(UserWarning, match="not checked by a run: its weights are offloaded"):
        assert n_layers(remove_layers(skeleton, Cut(2, 4))) == 4
    mute = make("llama")
    mute.model.embed_tokens.forward = lambda ids: 1 / 0
    with pytest.warns(UserWarning, match="the model does not run: division by zero"):
        assert n_layers(remove_layers(mute, Cut(2, 4))) == 4


def test_offloaded_to_disk(tmp_path):
    teacher = make("llama")
    expected = remove_layers(teacher, Cut(2, 4))
    teacher.save_pretrained(tmp_path / "m")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    away = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", device_map=places, offload_folder=tmp_path / "o"
    )
    with pytest.warns(UserWarning, match="not checked by a run"):
        student = remove_layers(away, Cut(2, 4), share=True)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, expected(IDS).logits)


def test_half_precision_passes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.bfloat16, torch.float16):
            assert n_layers(remove_layers(make("gpt2").to(dtype), [Cut(0, 1), Cut(3, 5)])) == 3


def test_difference():
    a = torch.tensor([3.0, 4.0])
    assert difference(a, a) == 0 and difference(2 * a, a) == pytest.approx(1)
    nan = torch.tensor([float("nan"), 4.0])
    assert difference(nan, a) == float("inf") and difference(nan, nan) == 0


def test_bypass_leaves_no_hook():
    model = make("gpt2")
    with pytest.raises(ZeroDivisionError), bypass(decoder_layers(model), [1]):
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in model.modules())
