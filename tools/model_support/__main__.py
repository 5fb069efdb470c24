"""Prints docs/model-support.md on standard output, and model types that could not be built on standard error.

Takes minutes. `make coverage` runs it.
"""

import sys

from tools.model_support.classification import classify_installed_transformers


def main() -> None:
    result = classify_installed_transformers()
    print(result.to_markdown(), end="")
    for name, reason in result.unbuilt.items():
        print(f"not built: {name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
