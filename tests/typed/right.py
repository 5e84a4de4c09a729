"A script as a user writes it: a type checker has nothing to say about it."

import linearpatch as lp

model, tokenizer = lp.load_model("org/model", dtype="bfloat16")
windows = lp.load_windows("passages", tokenizer, seq_len=128, samples=16)
stats: lp.Stats = lp.collect(model, windows, n_remove=4, moments="all")
cuts: list[lp.Cut] = lp.select(model, stats, windows, n_remove=4).cuts
patches: list[lp.Patch] = [lp.fit_patch(stats, cut, "joint", first=True) for cut in cuts]
student = lp.prune(model, cuts, patches)
trained: lp.Distilled = lp.distill(student, windows, teacher=model, lr=1e-4)
plain = lp.fold(lp.drop_first(student), windows, tolerance=0.02)
dense, scores = lp.score_students(model, {"mine": student, "plain": plain}, windows)
worst: float = max(kl for _, kl in scores.values()) + dense + trained.steps
lp.save_student(student, "out", tokenizer)
report: lp.Report = lp.run_pipeline("playground", cuts=((2, 8),), patch="auto")
