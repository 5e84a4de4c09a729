"""What the calibration pass costs beside a plain forward pass over the same windows.

    python tests/benchmarks/calibration_pass.py --hidden 1024 --layers 8 --remove 2
    python tests/benchmarks/calibration_pass.py --moments   # and the second moments of one cut
    python tests/benchmarks/calibration_pass.py --device cuda --hidden 4096 --seq-len 2048

Builds a random Llama of the given shape, then, in one run and by turns, times a plain forward pass
of its decoder and `collect` with the default settings (magnitudes raw and rotated, cosines,
token-wise ratios and massive tokens for every layer and every candidate cut). Prints the median
ratio of the times and, on a CPU, from one child process each, the difference of the peak memories
in units of one hidden state (seq_len x hidden float32 numbers).
"""

import argparse
import multiprocessing
import os
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearpatch.method.calibration import Windows
from linearpatch.method.mismatch import collect
from linearpatch.workshop.cuts import Cut


def setup(a):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=a.hidden,
        intermediate_size=int(a.hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 64,
        num_key_value_heads=a.hidden // 64,
        max_position_embeddings=a.seq_len,
    )
    ids = torch.randint(512, (a.windows, a.seq_len))
    windows = Windows(ids, torch.ones_like(ids, dtype=torch.bool), "random")
    return LlamaForCausalLM(config).to(a.device).eval(), windows


def wait(a):
    "Until the device has done what it was given."
    if a.device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.no_grad()
def plain(model, windows, a):
    for ids, _ in windows.batches(a.batch_size):
        model.model(input_ids=ids.to(a.device), use_cache=False)
    wait(a)


def gather(model, windows, a):
    middle = Cut((a.layers - a.remove) // 2, (a.layers + a.remove) // 2)
    moments = [middle] if a.moments else []
    collect(model, windows, n_remove=a.remove, batch_size=a.batch_size, moments=moments)
    wait(a)


def high_water():
    "The largest resident set since the last reset, in bytes (Linux)."
    return 1024 * next(
        int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")
    )


def peak(a, work, queue):
    model, windows = setup(a)
    work(model, windows[:1], a)  # first use allocates buffers of the libraries
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # reset the high-water mark to what is resident now
    before = high_water()
    work(model, windows, a)
    queue.put(high_water() - before)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(
        hidden=1024, layers=8, remove=2, windows=2, seq_len=512, batch_size=1, repeats=5
    ).items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    p.add_argument("--moments", action="store_true")
    p.add_argument("--device", default="cpu")
    a = p.parse_args()
    model, windows = setup(a)
    plain(model, windows, a)
    gather(model, windows, a)
    ratios = []
    for _ in range(a.repeats):
        times = []
        for work in (plain, gather, plain):
            t = time.perf_counter()
            work(model, windows, a)
            times.append(time.perf_counter() - t)
        ratios.append(2 * times[1] / (times[0] + times[2]))
    print(
        f"hidden {a.hidden}, {a.layers} layers, {a.remove} removed, {a.windows} windows of "
        f"{a.seq_len}, {torch.get_num_threads()} threads, {a.device}"
    )
    print(
        f"time: collect / plain forward = {statistics.median(ratios):.2f} "
        f"(median of {a.repeats}, {min(ratios):.2f} to {max(ratios):.2f})"
    )
    if a.device == "cpu":
        compare_peaks(a)


def compare_peaks(a):
    # freed memory goes back at once, so that the peak is of live memory
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    context, peaks = multiprocessing.get_context("spawn"), {}
    for work in (plain, gather):
        queue = context.Queue()
        child = context.Process(target=peak, args=(a, work, queue))
        child.start()
        peaks[work] = queue.get()
        child.join()
    state = a.seq_len * a.hidden * 4
    more = (peaks[gather] - peaks[plain]) / state
    print(
        f"peak memory: collect - plain forward = {more:.1f} hidden states of "
        f"{state / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
