"""What a patch costs at run time: the unfolded and the folded student beside plain pruning.

    python tests/benchmarks/latency.py --hidden 1024 --layers 16 --remove 4

Builds a random Llama of the given shape and three students of it on the same weights: without a patch, with a patch as a
module of its own, and with the patch folded. Times, in one run and by turns, a forward pass over a prompt (prefill) and the
passes for new tokens with the cache of keys and values (decode), each for one sequence and for a batch. Prints the median
over all turns of the time divided by that of plain pruning in the same turn, and the quarter of the turns below and above.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearpatch.method.folding import fold
from linearpatch.method.fusion import Patch
from linearpatch.method.hadamard import random_orthogonal
from linearpatch.method.pruning import patch_modules, prune
from linearpatch.workshop.cuts import Cut


def students(a):
    "Plain, patched and folded, equal in everything else."
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        intermediate_size=int(a.hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 64,
        num_key_value_heads=a.hidden // 64,
        max_position_embeddings=a.prompt + a.new,
    )
    teacher = LlamaForCausalLM(config).to(a.device, getattr(torch, a.dtype)).eval()
    cut = Cut(a.layers // 2, a.layers // 2 + a.remove)
    patched = prune(
        teacher, cut, Patch(1.5 * random_orthogonal(a.hidden), "procrustes", cut), share=True
    )
    folded = fold(patched)
    assert len(patch_modules(patched)) == 1 and not patch_modules(folded)
    return {"plain": prune(teacher, cut, share=True), "unfolded": patched, "folded": folded}


@torch.no_grad()
def once(model, ids, a):
    "Seconds for the prompt, and for one new token."

    def now():
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    out = model(ids, use_cache=True, logits_to_keep=1)
    middle = now()
    for _ in range(a.new):
        out = model(out.logits.argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return middle - start, (now() - middle) / a.new


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(
        hidden=512, layers=12, remove=3, vocab=512, prompt=32, new=8, repeats=21
    ).items():
        p.add_argument("--" + name, type=int, default=default)
    p.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    a = p.parse_args()
    models = students(a)
    print(
        f"hidden {a.hidden}, {a.layers} layers, {a.remove} removed, prompt of {a.prompt}, {a.new} new tokens, {a.dtype} on {a.device}, {torch.get_num_threads()} threads"
    )
    for batch in a.batch:
        ids, turns = (
            torch.randint(a.vocab, (batch, a.prompt), device=a.device),
            {name: [] for name in models},
        )
        for m in models.values():
            once(m, ids, a)
        for turn in range(a.repeats):
            order = (
                list(models)[turn % 3 :] + list(models)[: turn % 3]
            )  # nobody is always the first
            for name in order:
                turns[name].append(once(models[name], ids, a))
        for phase, what in enumerate(("prefill", "decode")):
            for name in ("unfolded", "folded"):
                ratios = [t[phase] / q[phase] for t, q in zip(turns[name], turns["plain"])]
                low, middle, high = statistics.quantiles(ratios, n=4)
                print(
                    f"batch {batch:2} {what:7} {name:8} / plain = {middle:.3f} ({low:.3f} to {high:.3f})"
                )


if __name__ == "__main__":
    main()
