"""`python -m benchmarks`, in the root of the repository."""

import sys

from benchmarks.cli import main

sys.exit(main())
