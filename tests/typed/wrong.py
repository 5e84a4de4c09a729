"Every line from the first call on is a mistake that a type checker is to find."

import linearpatch as lp

lp.prune(3, 3, patchs=4)
lp.load_windows(128, None, seq_len="long")
lp.Cut("2", 8)
lp.fit_patch("stats", lp.Cut(2, 8))
count: int = lp.n_layers("playground")
text: str = lp.perplexity
