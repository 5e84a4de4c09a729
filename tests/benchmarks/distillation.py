"""What a step of distillation costs, beside the passes that it is made of.

    python tests/benchmarks/distillation.py --hidden 512 --layers 12 --start 6 --remove 3

Builds a random Llama of the given shape, then, in one run and by turns, times the parts (a forward pass of the teacher,
of the student, of the student's suffix, a backward pass of the suffix) and whole steps of `distill`, online and offline.
Prints the ratio of an online step to teacher forward + suffix forward + suffix backward, that of an offline step to
student forward + suffix backward, and, from one child process each, the peak memory of an online step over that of the
bare suffix forward and backward. On a GPU (--device cuda) the weights are bfloat16 and the patch float32.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearpatch.method.calibration import Windows
from linearpatch.method.distillation import Offline, Online, only_patches_learn
from linearpatch.method.fusion import Patch
from linearpatch.method.pruning import prune
from linearpatch.workshop.cuts import Cut
from linearpatch.workshop.forward import run_model
from linearpatch.workshop.teacher_cache import cache_teacher


class World:
    "Teacher, student and windows, and one method for each thing that is timed."

    def __init__(self, a):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=a.vocab,
            hidden_size=a.hidden,
            intermediate_size=int(a.hidden * 3.5) // 64 * 64,
            num_hidden_layers=a.layers,
            num_attention_heads=max(1, a.hidden // 64),
            num_key_value_heads=max(1, a.hidden // 64),
            max_position_embeddings=a.seq_len,
        )
        with torch.device(a.device):
            self.teacher = (
                LlamaForCausalLM(config)
                .to(torch.bfloat16 if a.device == "cuda" else torch.float32)
                .eval()
            )
        cut, ids = Cut(a.start, a.start + a.remove), torch.randint(a.vocab, (a.windows, a.seq_len))
        P = torch.eye(a.hidden, dtype=torch.float64) * 1.2
        self.student = prune(self.teacher, [cut], [Patch(P, "hadamard", cut)], share=True)
        self.windows, self.a = (
            Windows(ids, torch.ones_like(ids, dtype=torch.bool), "random", bos=False),
            a,
        )
        self.sync = torch.cuda.synchronize if a.device == "cuda" else lambda: None

    def prepare(self, learning, folder=None):
        self.learning = list(learning.values())
        self.optimizer, self.online = (
            torch.optim.AdamW(self.learning, lr=1e-6),
            Online(self.student, self.windows, self.teacher),
        )
        if folder:
            self.offline = Offline(
                self.student, cache_teacher(self.teacher, self.windows, folder, top_k=100)
            )
        self.state = torch.randn(
            1, self.a.seq_len, self.a.hidden, device=self.a.device, dtype=self.teacher.dtype
        )

    def batch(self):
        return self.windows.ids[:1], self.windows.mask[:1]

    @torch.no_grad()
    def teacher_forward(self):
        run_model(self.teacher, *self.batch())

    @torch.no_grad()
    def student_forward(self):
        run_model(self.student, *self.batch())

    def suffix(self):
        "Forward, then backward; the two times."
        self.sync()
        t0 = time.perf_counter()
        loss = self.online.suffix(self.state, *self.batch()).float().logsumexp(-1).mean()
        self.sync()
        t1 = time.perf_counter()
        loss.backward()
        self.sync()
        return t1 - t0, time.perf_counter() - t1

    def step(self, objective):
        self.optimizer.zero_grad(set_to_none=True)
        kl, counted = objective([0])
        kl[counted].mean().backward()
        torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()

    def timed(self, work, *args):
        self.sync()
        t = time.perf_counter()
        work(*args)
        self.sync()
        return time.perf_counter() - t


def peak(a, what, queue):
    "Peak memory of one thing above what is resident before it (in a process of its own on the CPU)."
    world = World(a)
    with only_patches_learn(world.student) as learning:
        world.prepare(learning)
        work = world.suffix if what == "suffix" else lambda: world.step(world.online)
        work()
        if a.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return queue.put(torch.cuda.max_memory_allocated() - before)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")

        def high():
            return 1024 * next(
                int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")
            )

        before = high()
        work()
        queue.put(high() - before)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(
        hidden=512, layers=12, start=6, remove=3, vocab=4096, windows=2, seq_len=256, repeats=7
    ).items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    a = p.parse_args()
    world = World(a)
    with tempfile.TemporaryDirectory() as folder, only_patches_learn(world.student) as learning:
        world.prepare(learning, folder + "/cache")
        on, off = [], []
        for i in range(a.repeats + 1):
            online, offline = (
                world.timed(world.step, world.online),
                world.timed(world.step, world.offline),
            )
            teacher, student, (forward, backward) = (
                world.timed(world.teacher_forward),
                world.timed(world.student_forward),
                world.suffix(),
            )
            if i:
                on.append(online / (teacher + forward + backward))
                off.append(offline / (student + backward))
    print(
        f"hidden {a.hidden}, {a.layers} layers, {a.remove} removed from {a.start} on, windows of {a.seq_len}, vocabulary {a.vocab}, {a.device}"
    )
    for name, r, parts in (
        ("online", on, "teacher forward + suffix forward + suffix backward"),
        ("offline", off, "student forward + suffix backward"),
    ):
        print(
            f"time: {name} step / ({parts}) = {statistics.median(r):.2f} (median of {a.repeats}, {min(r):.2f} to {max(r):.2f})"
        )
    os.environ.update(
        MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536"
    )  # freed memory goes back at once
    context, peaks = multiprocessing.get_context("spawn"), {}
    for what in ("suffix", "online"):
        queue = context.Queue()
        child = context.Process(target=peak, args=(a, what, queue))
        child.start()
        peaks[what] = queue.get()
        child.join()
    logits = a.seq_len * a.vocab * 4 / 2**20
    print(
        f"peak memory above the model: online step {peaks['online'] / 2**20:.0f} MiB, bare suffix {peaks['suffix'] / 2**20:.0f} MiB; "
        f"the difference is {(peaks['online'] - peaks['suffix']) / 2**20 / logits:.1f} times a float32 tensor of logits ({logits:.0f} MiB)"
    )


if __name__ == "__main__":
    main()
