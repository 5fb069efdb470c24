"""Small tensors reach the kernels in tests; `test_functional` checks the sizes that the package ships with."""

from hf_swiglu import backends

SHIPPED = dict(backends.SMALLEST_KERNEL), dict(backends.SMALLEST_DIFFERENTIATED)
backends.SMALLEST_DIFFERENTIATED["cpu"] = backends.SMALLEST_KERNEL["cpu"]
