"""Deprecations that modules of this project cause are errors in tests; those within other libraries are ignored."""

import warnings

import pytest

OURS = ["hf_swiglu", "hf_swiglu.patching.load", "support.models", "test_anything", "finetune", "benchmarks.kernels"]
# As a library warns: the warning belongs to the module that calls `old`.
LIBRARY = "def old(warnings, category): warnings.warn('old is deprecated', category, stacklevel=2)"


def call_from(module, category):
    library = {"__name__": "library"}
    exec(LIBRARY, library)
    exec(
        "old(warnings, category)",
        {"__name__": module, "warnings": warnings, "category": category} | {"old": library["old"]},
    )


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", OURS)
def test_a_deprecation_of_ours_is_an_error(module, category):
    with pytest.raises(category, match="old is deprecated"):
        call_from(module, category)


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["transformers.trainer", "torch.testing", "hf_swiglu_lookalike"])
def test_a_deprecation_of_others_is_no_error(module, category):
    call_from(module, category)
