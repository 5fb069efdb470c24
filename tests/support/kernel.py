"""What a test expects of the C kernel: everything where it was built, plain PyTorch where it was not.

`make test-no-compiler` runs all tests without it.
"""

import pytest

from hf_swiglu import _compat, backends

NO_KERNEL = backends.unavailable("cpu")
HAS_KERNEL = NO_KERNEL is None

# For tests of the kernel itself and of what only it saves; the others compare numbers on the plain path too.
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason=str(NO_KERNEL))

# Without it small tensors run in plain PyTorch: reading tensors in Python takes longer than the kernel saves.
NO_TABLE = NO_KERNEL or (None if _compat.exchange_api else "this torch has no Tensor.__dlpack_c_exchange_api__")


def launched(*names):
    """The names of a forward's launches, with the kernel; without it, of none."""
    return list(names) if HAS_KERNEL else []
