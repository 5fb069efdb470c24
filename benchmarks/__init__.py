"""The benchmarks: `python -m benchmarks measure` writes rows, `python -m benchmarks plot` draws them.

cli.py           the two commands
suite.py         runs the levels and writes a row for each case
kernels.py       level "kernel": the product by itself, against eager PyTorch and the bytes that it has to move
mlps.py          level "mlp": an MLP, with and without gradients
whole_models.py  level "model": prefill, decode and training step of SmolLM2
contenders.py    what the levels share: dtypes, torch.compile, the error for a wrong result
rows.py          one JSON object for each case, with device, versions and commit
charts.py        from rows to charts and to the tables of Markdown pages

Times and memory are taken by `hf_swiglu.commands.timing` and `hf_swiglu.commands.memory`, as in the demo.
"""
