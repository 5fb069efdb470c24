"""What a test expects of the C kernel: everything where it was built, plain PyTorch where it was not.

`make test-no-compiler` runs all tests without it.
"""

import pytest

from hf_swiglu import backends

NO_KERNEL = backends.unavailable("cpu")
HAS_KERNEL = NO_KERNEL is None

# For tests of the kernel itself and of what only it saves; the others compare numbers on the plain path too.
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason=str(NO_KERNEL))


def launched(*names):
    """The names of a forward's launches, with the kernel; without it, of none."""
    return list(names) if HAS_KERNEL else []
