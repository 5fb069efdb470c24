"""`python -m hf_swiglu`: the command line without its console script."""

import sys

from hf_swiglu.commands.cli import main

sys.exit(main())
