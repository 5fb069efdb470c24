"""`python -m hf_swiglu.coverage > docs/coverage.md`"""

import sys

from hf_swiglu.coverage import census

sys.stdout.write(census().to_markdown())
