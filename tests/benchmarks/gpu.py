"""What each step costs on a card, for a model of LLaMA-3-8B's shape.

    python tests/benchmarks/gpu.py --out gpu.json
    python tests/benchmarks/gpu.py --deadline 300 --moment-windows 16  # a card for minutes only
    python tests/benchmarks/gpu.py --device cpu --layers 4 --hidden 64 --vocab 256 --windows 4 \
        --seq-len 64 --remove 1  # does the script itself work?

Timed are: a plain forward pass, the calibration pass (without and with second moments), a fit of
each patch family, prefill and decode of the dense model and of pruned, patched and folded
students, and online distillation; and the pieces in float64 that fits and folds are made of.

The weights and the tokens are random, so nothing is downloaded, and the numbers say what things
cost, never how good a patch is. Clocks are read on a synchronised device; a ratio is to a plain
forward pass (body and head, logits not kept), window for window, in the same run. The full size
takes about 26 GB of the device and some minutes; the record of an H200 is records/gpu.json. A
stage whose windows would take longer than `--budget` measures fewer and says so (`windows`):
`seconds` are of those, `seconds_all` of as many as `--windows` asks for.

The record (`--out`, JSON) is written anew around each stage, so a run that is killed keeps what
it had. A stage that fails is recorded with its exception, and the next one begins. Peak memory is
that of PyTorch's allocator on the device, the model included.
"""

import argparse
import contextlib
import gc
import hashlib
import itertools
import json
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import fields, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

import linearpatch
from linearpatch import FAMILIES, Cut, Windows, collect, distill, fit_patch, fold, prune
from linearpatch.method.families import Evidence, cross_error
from linearpatch.workshop.files import atomic_file

PAPER = {
    "patch_seconds": 30,
    "distillation_minutes": 30,
    "calibration_windows": 128,
    "distillation_windows": 5000,
    "model": "a 7B model on one GPU (arXiv 2505.24680)",
}
SLOW = ("procrustes", "mlp", "joint", "foldable")  # fits of many seconds at C = 4096


class OverBudget(Exception):
    "A stage took longer than it was given."


@contextlib.contextmanager
def limited(seconds):
    "OverBudget, at the next line of Python, when the block takes longer (where there are signals)."
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*args):
        raise OverBudget(f"took longer than its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def git_commit():
    "The commit of the working tree, '+' behind it where files differ; None outside a checkout."

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None


def source_digest():
    "Tells versions of the library apart where there is no git: a hash of its modules."
    files = sorted(Path(linearpatch.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


class Bench:
    "The record, the model and the windows, and what one stage leaves for later ones."

    def __init__(self, a):
        self.a, self.device, self.start = a, torch.device(a.device), time.perf_counter()
        self.cuda, self.kept = self.device.type == "cuda", {}
        card = torch.cuda.get_device_properties(self.device) if self.cuda else None
        self.record = dict(
            command=shlex.join(["python", *sys.argv]),
            commit=a.commit or git_commit(),
            sources=source_digest(),
            linearpatch=linearpatch.__version__,
            torch=torch.__version__,
            transformers=transformers.__version__,
            python=platform.python_version(),
            device=card.name if card else f"cpu ({platform.processor() or platform.machine()})",
            device_bytes=card.total_memory if card else None,
            cpu_threads=torch.get_num_threads(),
            arguments={k: v for k, v in vars(a).items() if k != "out"},
            paper=PAPER,
            stages={},
        )

    def now(self):
        "Seconds on the clock, once the device has done what it was told."
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def left(self):
        "Seconds until the deadline."
        return self.start + self.a.deadline - time.perf_counter() if self.a.deadline else 1e9

    def write(self):
        "The record as it is, onto the disk, all or nothing."
        self.record["seconds"] = time.perf_counter() - self.start
        if not self.a.out:
            return
        Path(self.a.out).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record, indent=1) + "\n"
        with atomic_file(self.a.out) as partial:
            partial.write_text(text, encoding="utf-8")

    def stage(self, name, work, *args):
        "Run `work(self, *args)`, which returns numbers; record them, or the exception."
        budget = min(self.a.budget, self.left())
        if self.left() < 1:
            self.record["stages"][name] = dict(skipped="no time left")
            return
        row = self.record["stages"][name] = dict(running=True)
        self.write()
        began = time.perf_counter()
        try:
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            with limited(budget):
                row |= work(self, *args) or {}
            self.now()
        except Exception as e:
            row |= dict(error=f"{type(e).__name__}: {e}"[:500], traceback=traceback.format_exc(-6))
        row.pop("running")
        row["stage_seconds"] = time.perf_counter() - began
        if self.cuda:
            row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self.write()
        print(f"{self.record['seconds']:6.1f} s  {describe(name, row)}", flush=True)

    def over(self, work, most=None):
        "Run `work(windows)` over as many windows as the stage's time allows, after one to warm up."
        windows = self.kept["windows"][: most or self.a.windows]
        work(windows[:1])
        t0 = self.now()
        work(windows[:1])
        each = self.now() - t0
        allowed = 0.8 * min(self.a.budget, self.left()) / each
        n = max(1, min(len(windows), int(allowed)))
        t0 = self.now()
        out = work(windows[:n])
        seconds = self.now() - t0
        return out, dict(
            windows=n,
            seconds=seconds,
            seconds_a_window=seconds / n,
            seconds_all=seconds / n * self.a.windows,
            tokens_per_second=n * self.a.seq_len / seconds,
        )

    def ratio(self, row, to="forward"):
        "The same numbers, with the time of a window as a multiple of that of another stage."
        base = self.record["stages"].get(to, {}).get("seconds_a_window")
        return row | ({f"ratio_to_{to}": row["seconds_a_window"] / base} if base else {})


def build(b):
    "A model with random weights, made on the device itself, and random windows."
    a = b.a
    heads = a.heads or max(1, a.hidden // 128)
    config = transformers.LlamaConfig(
        hidden_size=a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=heads,
        num_key_value_heads=a.kv_heads or max(1, heads // 4),
        vocab_size=a.vocab,
        intermediate_size=a.intermediate or 7 * a.hidden // 2,
        rope_theta=500000.0,
        max_position_embeddings=max(8192, a.seq_len + a.new),
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    with torch.device(b.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, a.dtype))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(a.vocab, (a.windows, a.seq_len), generator=generator)
    start = a.layers * 3 // 4 - 1 if a.start is None else a.start
    b.kept |= dict(
        model=model.eval(), windows=Windows(ids, source="random"), cut=Cut(start, start + a.remove)
    )
    shape = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        cut=[start, start + a.remove],
        placed=str(model.device),
        attention=config._attn_implementation,
        shape={k: getattr(config, k) for k in shape},
    )


@torch.no_grad()
def forward(b, head):
    "A plain forward pass, with the head or of the body alone; nothing is kept."
    model = b.kept["model"] if head else b.kept["model"].base_model

    def work(windows):
        for ids, _ in windows.batches(b.a.batch_size):
            model(input_ids=ids.to(b.device), use_cache=False)

    row = b.over(work)[1]
    return row if head else b.ratio(row)


def calibrate(b, moments):
    "The calibration pass over every candidate cut; with `moments`, those of one cut, too."
    cuts = [b.kept["cut"]] if moments else []

    def work(windows):
        return collect(
            b.kept["model"], windows, n_remove=b.a.remove, moments=cuts, batch_size=b.a.batch_size
        )

    b.kept["stats"], row = b.over(work, b.a.moment_windows if moments else None)
    extra = dict(mlp=b.kept["stats"].moments[cuts[0]].has_mlp) if moments else {}
    return b.ratio(b.ratio(row), "body") | extra


def profile(b):
    "One window of the pass under the profiler: what is launched, copied and waited for."
    from torch.profiler import ProfilerActivity, profile as profiler

    def work():
        collect(b.kept["model"], b.kept["windows"][:1], n_remove=b.a.remove)

    work()
    t0 = b.now()
    work()
    alone = b.now() - t0
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * b.cuda
    with profiler(activities=activities) as seen:
        work()
    events = seen.key_averages()
    on_device = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
    counted = (
        "LaunchKernel",
        "MemcpyAsync",
        "StreamSynchronize",
        "DeviceSynchronize",
        "aten::_local_scalar_dense",
        "aten::_to_copy",
    )
    calls = {word: sum(e.count for e in events if word in e.key) for word in counted}

    def top(events, key):
        best = sorted(events, key=lambda e: -getattr(e, key))[:12]
        return [[e.key[:80], e.count, getattr(e, key) / 1e6] for e in best]

    on_cpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    busy = sum(e.self_device_time_total for e in on_device) / 1e6
    return dict(
        seconds=alone,
        device_busy_seconds=busy if b.cuda else None,
        calls=calls,
        top_on_device=top(on_device, "self_device_time_total"),
        top_on_cpu=top(on_cpu, "self_cpu_time_total"),
    )


def first_patch(b):
    "LinearPatch itself, from the whole pass: the patch that all students get."
    t0 = b.now()
    patch = b.kept["patch"] = fit_patch(b.kept["stats"], b.kept["cut"])
    return dict(seconds=b.now() - t0, distance=patch.distance)


def placed(b, where):
    "The sums of the last pass, and where new tensors go: as the library has it, or on the device."
    if where == "library":
        return b.kept["stats"], contextlib.nullcontext()
    return moved(b.kept["stats"], b.device), torch.device(b.device)


def fit(b, family, where):
    "One patch from the sums of the last pass; moving them is not counted."
    stats, place = placed(b, where)
    t0 = b.now()
    with place:
        patch = fit_patch(stats, b.kept["cut"], family)
        row = dict(seconds=b.now() - t0, ridge=patch.info["ridge"], distance=patch.distance)
    known, new = b.kept.setdefault("matrices", {}).get(family), patch.matrix.cpu()
    if known is None:
        b.kept["matrices"][family] = new
    else:
        row["difference"] = ((new - known).norm() / known.norm()).item()  # of CPU and device
    return row


def moved(x, device):
    "A copy of sums with every tensor on the device: `Stats`, `Moments`, a rotation, or parts."
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {k: moved(v, device) for k, v in x.items()}
    if type(x).__name__ not in ("Stats", "Moments", "Rotation"):
        return x
    return replace(x, **{f.name: moved(getattr(x, f.name), device) for f in fields(x)})


def one_ridge(b, where):
    "The step of which `mlp`, `foldable` and `joint` make seven or eight: one ridge, both halves."
    stats, place = placed(b, where)
    t0 = b.now()
    with place:
        cross_error(Evidence(stats, b.kept["cut"]), 0.1)
    return dict(seconds=b.now() - t0)


def float64(b, device):
    "The pieces that fits and folds are made of, (C, C) in float64; the SVD is that of procrustes."
    C, row = b.a.hidden, {}
    A = torch.randn(C, C, dtype=torch.float64, device=device)
    S = A @ A.T / C + torch.eye(C, dtype=torch.float64, device=device)
    pieces = dict(
        product=lambda: A @ S,
        solve=lambda: torch.linalg.solve(S, A),
        inverse=lambda: torch.linalg.inv(S),
        eigh=lambda: torch.linalg.eigh(S),
    )
    for name, work in pieces.items():
        if device != "cpu":
            work()  # the first one loads libraries
        t0 = b.now()
        work()
        row[name + "_seconds"] = b.now() - t0
    return row


def make_students(b):
    "Pruned and patched (by LinearPatch itself) students on the teacher's weights."
    model, cut = b.kept["model"], b.kept["cut"]
    t0 = b.now()
    pruned = prune(model, cut, share=True)
    t1 = b.now()
    patched = prune(model, cut, b.kept["patch"], share=True)
    t2 = b.now()
    b.kept["students"] = dict(dense=model, pruned=pruned, patched=patched)
    return dict(prune_seconds=t1 - t0, prune_with_patch_seconds=t2 - t1)


def make_folded(b):
    "The patch folded into what lies behind the cut (home 0, whatever the error: nothing is real)."
    students = b.kept["students"]
    windows = b.kept["windows"][: min(4, b.a.windows)]
    folded = students["folded"] = fold(
        students["patched"], windows, force=True, share=True, home=0.0, batch_size=1
    )
    return dict(exact=folded.folding.exact, kl=folded.folding.kl)


@torch.no_grad()
def once(b, model, ids):
    "Seconds for the prompt, and for one new token, with the cache of keys and values."
    t0 = b.now()
    out = model(ids, use_cache=True, logits_to_keep=1)
    t1 = b.now()
    for _ in range(b.a.new):
        next_id, past = out.logits[:, -1:].argmax(-1), out.past_key_values
        out = model(next_id, past_key_values=past, use_cache=True)
    return t1 - t0, (b.now() - t1) / b.a.new


def latency(b):
    "Prefill and decode of every model there is, by turns; medians."
    models, ids = b.kept["students"], b.kept["windows"].ids[:1].to(b.device)
    for model in models.values():
        once(b, model, ids)
    turns, names = {name: [] for name in models}, list(models)
    for turn in range(b.a.repeats):
        first = turn % len(names)  # nobody is always the first
        for name in names[first:] + names[:first]:
            turns[name].append(once(b, models[name], ids))
    middle = {n: [statistics.median(t[i] for t in turns[n]) for i in (0, 1)] for n in names}
    out = {}
    for name, (prefill, token) in middle.items():
        out[name] = dict(
            prefill_seconds=prefill,
            decode_tokens_per_second=1 / token,
            prefill_ratio_to_dense=prefill / middle["dense"][0],
            decode_ratio_to_dense=token / middle["dense"][1],
            parameters=sum(p.numel() for p in models[name].parameters()),
        )
    return dict(models=out, prompt=b.a.seq_len, new=b.a.new, repeats=b.a.repeats)


def train(b):
    "Online distillation; the time of a step is the median, so the start does not count."
    model, cut, marks = b.kept["model"], b.kept["cut"], []
    student = prune(model, cut, b.kept["patch"], share=True)
    n = max(4, min(b.a.distill_windows, b.a.windows))
    did = distill(
        student,
        b.kept["windows"][:n],
        teacher=model,
        batch_size=b.a.batch_size,
        heldout=1,
        evals=1,
        callback=lambda _: marks.append(b.now()),
    )
    steps = [y - x for x, y in itertools.pairwise(marks[:-1])]  # the last one measures, too
    step = statistics.median(steps)
    speed = b.a.batch_size * b.a.seq_len / step
    tokens = PAPER["distillation_windows"] * b.a.seq_len
    row = dict(
        windows=n,
        steps=did.steps,
        step_seconds=step,
        step_range=[min(steps), max(steps)],
        seconds_a_window=step / b.a.batch_size,
        tokens_per_second=speed,
        minutes_for_the_papers_windows=tokens / speed / 60,
        with_measuring=did.seconds,
    )
    return b.ratio(row)


def describe(name, row):
    "One line about one stage."
    if "skipped" in row:
        return f"{name:24} skipped: {row['skipped']}"
    ratio = row.get("ratio_to_forward")
    words = [
        f"{name:24} {row.get('seconds', row.get('stage_seconds', 0)):8.2f} s",
        f"{ratio:6.2f} x forward" if ratio else " " * 16,
        f"{row['peak_bytes'] / 1e9:6.1f} GB" if "peak_bytes" in row else "",
    ]
    if "windows" in row:
        words.append(f"{row['windows']} windows")
    if "tokens_per_second" in row:
        words.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "error" in row:
        words.append("FAILED: " + row["error"].splitlines()[0][:90])
    lines = ["  ".join(words).rstrip()]
    for model, m in row.get("models", {}).items():
        lines.append(
            f"{'':10}{model:10} prefill {m['prefill_seconds'] * 1e3:8.2f} ms "
            f"({m['prefill_ratio_to_dense']:.2f} of dense), decode "
            f"{m['decode_tokens_per_second']:7.1f} tokens/s "
            f"({m['decode_ratio_to_dense']:.2f} of dense's time)"
        )
    return "\n".join(lines)


def summary(b):
    "The table, and the paper's two claims beside what was measured."
    stages = b.record["stages"]
    print(
        f"\n{b.record['device']}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {b.record['cpu_threads']} CPU threads"
    )
    for name, row in stages.items():
        print(describe(name, row))
    parts = [stages.get("pass", {}).get("seconds_all"), stages.get("patch", {}).get("seconds")]
    if None not in parts:
        print(f"patch for {b.a.windows} windows: {sum(parts):.1f} s (paper: about 30 s)")
    if minutes := stages.get("distillation", {}).get("minutes_for_the_papers_windows"):
        print(
            f"distillation on {PAPER['distillation_windows']} windows: {minutes:.1f} min "
            "(paper: within 30 min)"
        )


def run(b):
    "All stages, the important ones first, the slowest fits last."
    b.stage("build", build)
    if "model" not in b.kept:
        return
    b.stage("forward", forward, True)
    b.stage("body", forward, False)
    b.stage("pass", calibrate, False)
    b.stage("patch", first_patch)
    b.stage("students", make_students)
    b.stage("latency", latency)
    b.stage("distillation", train)
    b.stage("pass with moments", calibrate, True)
    b.stage("profile of the pass", profile)
    quick = [f for f in FAMILIES if f not in SLOW]
    for family in quick:
        b.stage(f"fit {family}", fit, family, "library")
    if b.cuda:
        b.stage("float64 on the device", float64, b.device)
        b.stage("one ridge on the device", one_ridge, "device")
        for family in [f for f in FAMILIES if f not in ("procrustes", "foldable")]:
            b.stage(f"fit {family} on the device", fit, family, "device")
    b.stage("one ridge", one_ridge, "library")
    b.stage("fit procrustes", fit, "procrustes", "library")
    b.stage("fold", make_folded)
    b.stage("latency with folded", latency)
    b.stage("float64 on the CPU", float64, "cpu")
    b.stage("fit mlp", fit, "mlp", "library")
    if b.cuda:
        b.stage("fit procrustes on the device", fit, "procrustes", "device")
    b.stage("fit joint", fit, "joint", "library")
    b.stage("fit foldable", fit, "foldable", "library")


def main():
    "Read the command line, run, and print the table whatever happens."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", help="where the record goes, a JSON file")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    numbers = dict(
        layers=32,
        hidden=4096,
        vocab=128256,
        remove=5,
        windows=128,
        seq_len=2048,
        batch_size=1,
        distill_windows=24,
        new=32,
        repeats=5,
    )
    for name, default in numbers.items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    for name, text in dict(
        intermediate="width of the MLP; default 3.5 x hidden",
        heads="default hidden / 128",
        kv_heads="default heads / 4",
        start="first removed layer; default 3/4 of them, less one",
        moment_windows="windows of the pass with moments; default all",
    ).items():
        p.add_argument("--" + name.replace("_", "-"), type=int, help=text)
    p.add_argument("--budget", type=float, default=600.0, help="most seconds for one stage")
    p.add_argument("--deadline", type=float, help="seconds after which no stage goes on")
    p.add_argument("--commit", help="to record where there is no git")
    b = Bench(p.parse_args())
    try:
        run(b)
    finally:
        b.write()
        summary(b)


if __name__ == "__main__":
    main()
