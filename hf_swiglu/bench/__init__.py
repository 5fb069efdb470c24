"""The benchmarks: `hf-swiglu bench` measures, `hf-swiglu plot` draws what was measured.

timing.py      contenders that take turns, and the statistics of their times
kernels.py     the product by itself, against eager PyTorch and the bytes that it has to move
mlps.py        a whole MLP, with and without gradients
whole_models.py  a whole model: prefill, decode, a training step
rows.py        one JSON object for each case, with device, versions and commit
plot.py        from rows to charts and to the README's table
"""

from hf_swiglu.bench.plot import plot
from hf_swiglu.bench.suite import LEVELS, run_bench

__all__ = ["LEVELS", "plot", "run_bench"]
