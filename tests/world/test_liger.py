"""Liger's patch of a model beside this one, in either order; on a CPU its kernels are never run."""

import pytest
from liger_kernel.transformers import _apply_liger_kernel_to_instance
from support.models import tiny_llama
from transformers.models.llama import modeling_llama

from hf_swiglu import patch_model


@pytest.fixture(autouse=True)
def transformers_own_classes():
    """Liger's patch of one model replaces names for later ones too."""
    names = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(names)


@pytest.mark.parametrize("fuse_first", [False, True])
def test_in_either_order_the_report_says_who_replaced_the_forward(fuse_first):
    model = tiny_llama()
    if fuse_first:
        assert len(patch_model(model).fused) == 2
    _apply_liger_kernel_to_instance(model=model)
    report = patch_model(model, strict=False)
    assert [entry.verdict for entry in report] == ["skipped"] * 2
    assert "replaced on the instance" in report[0].reason
    with pytest.raises(ValueError, match="nothing to fuse"):
        patch_model(tiny_llama())
