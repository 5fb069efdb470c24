"""Every gated MLP of the installed transformers, counted twice, and what becomes of each.

scope.py, dataflow.py, scan.py    the source scan: text alone
configs.py, zoo.py                every model type, small, on the meta device
rules.py                          what of the scan is no gate of an MLP
comparison.py                     one small instance of a class before and after
verdicts.py, page.py              the verdicts, and docs/coverage.md
"""

from hf_swiglu.coverage.page import Census, Row
from hf_swiglu.coverage.verdicts import census

__all__ = ["Census", "Row", "census"]
