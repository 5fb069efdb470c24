"""Liger's patch of a model beside this one, in either order; on a CPU its kernels are never run."""

from liger_kernel.transformers import _apply_liger_kernel_to_instance
from support.models import tiny_llama

from hf_swiglu import patch_model


def test_liger_first_and_last_are_both_reported():
    for fuse_first in (False, True):
        model = tiny_llama()
        if fuse_first:
            assert len(patch_model(model).fused) == 2
        _apply_liger_kernel_to_instance(model=model)
        report = patch_model(model, strict=False)
        assert [entry.verdict for entry in report] == ["skipped"] * 2
        assert "replaced on the instance" in report[0].reason
