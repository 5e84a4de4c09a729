"""Every causal language model of the installed transformers, tiny and random, cut in six ways.

    python tools/sweep.py --out nbs/records/sweep.json    # all of them, some ten minutes
    python tools/sweep.py --only llama gpt2               # these; with --out their rows are renewed
    python tools/sweep.py --page                          # the table of nbs/sweep.qmd, from the record

The architectures are discovered, not listed. For each, and for each cut, a student is compared with the intact model
whose removed layers hand on what they get, then with itself: with its cache, in generation, saved and loaded. A cut
ends as `right`, as `refused` (with the reason, before any work) or as `wrong`; a model of which no tiny one can be
built, or that does not run when intact, is `not built`. Wrong is a fault, always: then the exit code is 1.
"""

import argparse
import json
import logging
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tiny import bypass, liven

from linearpatch.method.models import decoder_layers, n_layers
from linearpatch.method.pruning import prune
from linearpatch.workshop.checkpoint import load_student, save_student
from linearpatch.workshop.cuts import Cut

RECORD = Path(__file__).resolve().parent.parent / "nbs" / "records" / "sweep.json"
PAGE = RECORD.parent.parent / "sweep.qmd"
BEGIN, END = "<!-- written by tools/sweep.py -->", "<!-- end -->"
IDS = torch.tensor([[5, 9, 33, 12, 7, 40, 8, 21, 3, 50]])
LAYERS = 6
CUTS = {
    "middle": [Cut(2, 4)],
    "first": [Cut(0, 2)],
    "one": [Cut(3, 4)],
    "last": [Cut(4, 6)],
    "half": [Cut(1, 4)],
    "several": [Cut(0, 1), Cut(2, 3), Cut(4, 5)],
}
WIDTHS = "hidden_size d_model n_embd dim word_embed_proj_dim embed_dim attention_hidden_size"
INNER = """intermediate_size ffn_dim n_inner moe_intermediate_size shared_expert_intermediate_size
decoder_ffn_dim moe_shared_expert_intermediate_size intermediate_size_mlp ffn_hidden_size"""
SIZES = {
    **dict.fromkeys(WIDTHS.split(), 32),
    **dict.fromkeys(INNER.split(), 48),
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers decoder_layers".split(), LAYERS),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads".split(), 4
    ),
    **dict.fromkeys("num_key_value_heads num_kv_heads".split(), 2),
    **dict.fromkeys("max_position_embeddings n_positions max_seq_len".split(), 64),
    **dict.fromkeys("num_local_experts num_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k".split(), 2),
    **dict.fromkeys("bos_token_id decoder_start_token_id".split(), 0),
    **dict.fromkeys("n_group topk_group".split(), 1),
    "vocab_size": 64,
    "unpadded_vocab_size": 64,
    "head_dim": 8,
    "sliding_window": 4,
    "rotary_dim": 4,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "rescale_every": 0,
    "mamba_d_state": 4,
    "state_size": 4,
    "is_decoder": True,
    "first_k_dense_replace": 2,
}


def names():
    "The model types of AutoModelForCausalLM, each once for its class and config."
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(name):
    "A tiny random model of a type, livened, so that every layer counts."
    config = tf.CONFIG_MAPPING[name]
    given = {k: v for k, v in SIZES.items() if hasattr(config, k) or k in config.attribute_map}
    given |= {k: SIZES[v] for k, v in config.attribute_map.items() if v in SIZES and k in given}
    given = {k: v for k, v in given.items() if k not in config.attribute_map}
    own = config(**given)
    text = own.get_text_config(decoder=True)
    if text.num_hidden_layers != LAYERS:
        raise ValueError(f"its config keeps {text.num_hidden_layers} layers")
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(own, dtype=torch.float32).eval()
    if (size := sum(p.numel() for p in model.parameters())) > 3e7:
        raise ValueError(f"the tiny model has {size:,} parameters")
    return liven(model)


def near(a, b):
    return (a - b).norm() <= 1e-4 * b.norm()


@torch.no_grad()
def scores(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def written(model, use_cache):
    "The scores of four new tokens, (4, V)."
    how = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 2}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    return torch.cat(model.generate(IDS, use_cache=use_cache, **how).logits)


def compare(model, cuts):
    "What is wrong with a student, one phrase; empty where nothing is. ValueError: it is refused."
    with bypass(decoder_layers(model), cuts):
        expected = scores(model)
    student = prune(model, cuts)
    if not near(scores(student), expected):
        return "scores differ from the intact model's whose removed layers hand on what they get"
    if not intact_agrees(student) and intact_agrees(model):
        return "with its cache it writes something else, or nothing"
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_student(student, f"{folder}/s")
            again = load_student(f"{folder}/s")
        except Exception as e:
            return f"saved, but not loaded: {type(e).__name__}: {e}".replace(folder, "FOLDER")
        return "" if near(scores(again), expected) else "after loading the scores differ"


def intact_agrees(model):
    "Whether the intact model generates, and the same with its cache as without."
    try:
        return near(written(model, True), written(model, False))
    except Exception:
        return False


def short(e):
    return " ".join(f"{type(e).__name__}: {e}".split())[:240]


def measure(name):
    "{cut: 'right', 'refused: ...' or 'wrong: ...'}, or {'not built': why}."
    try:
        model = build(name)
        layers = n_layers(model)
        scores(model)
    except Exception as e:
        return {"not built": short(e)}
    found = {}
    for kind, cuts in CUTS.items():
        try:
            wrong = compare(model, cuts)
            found[kind] = f"wrong: {wrong}"[:300] if wrong else "right"
        except ValueError as e:
            found[kind] = f"refused: {' '.join(str(e).split())}"[:300]
        except Exception as e:
            found[kind] = f"wrong: {short(e)}"
        if n_layers(model) != layers:
            found[kind] = "wrong: the intact model has changed"
    return found


# -- the page


def table(record):
    "Markdown: what was counted, and a row for each model type."
    rows, notes = [], {}
    for name, row in record["models"].items():
        cells = []
        for kind in record["cuts"]:
            said = row.get(kind) or f"not built: {row['not built']}"
            word, _, why = said.partition(": ")
            mark = f" ({notes.setdefault(why, len(notes) + 1)})" if why else ""
            cells.append(word + mark)
        rows.append(
            [
                f"`{name}`",
                *(["not built" + cells[0][9:]] + [""] * 5 if "not built" in row else cells),
            ]
        )
    words = [{v.partition(":")[0] for v in row.values()} for row in record["models"].values()]
    whole = sum(w == {"right"} for w in words)
    built = sum("not built" not in row for row in record["models"].values())
    lines = [
        f"transformers {record['transformers']} has {len(words)} types of causal language models; "
        f"of {built} a tiny one was built and runs. {whole} are right in all six cuts, "
        f"{sum('refused' in w for w in words)} refuse some or all of them, "
        f"and {sum('wrong' in w for w in words)} are wrong in some.",
        "",
        "| " + " | ".join(["Model type", *record["cuts"]]) + " |",
        "|" + " --- |" * (len(record["cuts"]) + 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"{i}. {why.replace('|', '/')}" for why, i in notes.items()),
    ]
    return "\n".join(lines)


def filled(page, record):
    "The page, with the table of the record between its marks."
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{rest.split(END)[1]}"


class TooLong(BaseException):
    "Not an Exception: nothing in between may take it for an answer of the model."


def overrun(*_):
    raise TooLong("it takes too long")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="model types; all where it is left out")
    parser.add_argument("--seconds", type=int, default=12, help="of one model, at most")
    parser.add_argument("--out", type=Path, default=None, help=f"the record, such as {RECORD.name}")
    parser.add_argument("--page", action="store_true", help=f"only write the table of {PAGE.name}")
    options = parser.parse_args()
    if options.page:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        return PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), record), "utf-8") < 1
    warnings.filterwarnings("ignore")
    tf.utils.logging.set_verbosity(logging.CRITICAL)
    tf.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, overrun)
    again = options.only and options.out and options.out.exists()
    results = json.loads(options.out.read_text("utf-8"))["models"] if again else {}
    for name in options.only or names():
        signal.alarm(options.seconds)
        try:
            results[name] = measure(name)
        except TooLong as e:
            results[name] = {"not built": str(e)}
        finally:
            signal.alarm(0)
        print(name, json.dumps(results[name]), flush=True)
    record = {
        "command": f"python tools/sweep.py --seconds {options.seconds} --out nbs/records/sweep.json",
        "transformers": tf.__version__,
        "torch": torch.__version__.partition("+")[0],
        "layers": LAYERS,
        "cuts": {kind: [[c.start, c.stop] for c in cuts] for kind, cuts in CUTS.items()},
        "models": dict(sorted(results.items())),
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return any(v.startswith("wrong") for row in results.values() for v in row.values())


if __name__ == "__main__":
    sys.exit(main())
