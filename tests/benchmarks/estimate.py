"""How near the estimate of memory comes: a random model of 57 million parameters is run as a recipe asks, in a process of its own.

python tests/benchmarks/estimate.py   # about five minutes on two cores; prints estimate and peak for a patched and a distilled row
"""

import resource
import subprocess
import sys
from dataclasses import replace

MODEL = dict(num_hidden_layers=8, stored="float32")


def run(name):
    import torch
    import transformers

    from linearpatch.workshop.estimates import memory_bytes
    from linearpatch.workshop.pipeline import run_pipeline
    from linearpatch.workshop.places import playground_path
    from linearpatch.workshop.recipe import find_recipe
    from linearpatch.workshop.reproduce import job_settings

    recipe = find_recipe(name)
    model = recipe.model | find_recipe("smollm2-135m-5-of-30").model | MODEL
    job = {k: v for k, v in recipe.job.items() if k != "cuts"} | dict(cuts=["4:6"], seq_len=1024)
    recipe = replace(recipe, model=model, job=job)
    numbers = {
        k: v
        for k, v in model.items()
        if k.startswith(("hidden", "intermediate", "num_", "vocab", "tie"))
    }
    m = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**numbers), dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(playground_path())
    weights = sum(p.numel() * 4 for p in m.parameters())
    before = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - weights
    )  # what Python and the libraries take
    small = dict(calibration="passages", eval=("passages",), samples=2) | (
        dict(distill_samples=6) if "distill" in job else {}
    )
    run_pipeline(m, tokenizer, **job_settings(recipe) | small)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(
        f"{name}: estimated {memory_bytes(recipe) / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, weights {weights / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        run(sys.argv[1])
    else:
        for name in ("llama2-7b-7-of-32", "llama2-7b-7-of-32-ft"):
            subprocess.run([sys.executable, __file__, name], check=True)
