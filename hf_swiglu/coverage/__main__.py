"""`python -m hf_swiglu.coverage > docs/coverage.md`; what could not be built goes to stderr."""

import sys

from hf_swiglu.coverage import census

taken = census()
sys.stdout.write(taken.to_markdown())
for name, reason in taken.unbuilt.items():
    print(f"not built: {name}: {reason}", file=sys.stderr)
