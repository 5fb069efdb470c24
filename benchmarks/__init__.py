"""The benchmarks: `python -m benchmarks measure` writes rows, `python -m benchmarks plot` draws them.

cli.py           the two commands
suite.py         runs the levels and writes a row for each case
kernels.py       level "kernel": the product alone, against eager PyTorch and the bytes that it has to move
mlps.py          level "mlp": an MLP, with and without gradients
whole_models.py  level "model": prefill, decode and training step of SmolLM2
contenders.py    shared by the levels: dtypes, torch.compile, the error for a wrong result
rows.py          one JSON object for each case, with device, versions and commit
charts.py        from rows to charts and to the tables of Markdown pages

`hf_swiglu.commands.timing` and `hf_swiglu.commands.peak_memory` measure time and memory, as in the demo.
"""
