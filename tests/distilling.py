"What the tests of distillation share: a text, a teacher with its student, and a cache."

import torch
from tiny import fresh as make, random_patch

from linearpatch.method.calibration import Windows
from linearpatch.method.pruning import patch_modules, prune
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.teacher_cache import cache_teacher

CUT = Cut(2, 4)


def text(n=24, seq_len=12, vocab=64, seed=0, padded=False):
    ids = torch.randint(3, vocab, (n, seq_len), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[::2, -4:] = False
    return Windows(ids, mask, source="random", bos=False)


def pair(name="llama", cut=CUT):
    teacher = make(name)
    return teacher, prune(teacher, [cut], [random_patch(cut)], share=True)


def matrix(student):
    return patch_modules(student)[0].weight.detach().clone()


def make_cached(folder):
    "(teacher, student, cache of the teacher)."
    teacher, student = pair()
    settings = dict(top_k=10, batch_size=4, shard_windows=7)
    return teacher, student, cache_teacher(teacher, text(), folder / "cache", **settings)
