"""Projections that other libraries quantised: outputs and gradients as unpatched, whatever is kept, in tiles or not."""

import pytest
import torch
from support.models import fused, tiny_llama, tokens
from support.outcome import outcome

from hf_swiglu import patch_model
from hf_swiglu.testing import counted_launches


def quanto(model):
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)


def torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def _bitsandbytes(model, make):
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            plain = getattr(layer.mlp, name)
            quantised = make(plain.in_features, plain.out_features, bias=False)
            quantised.load_state_dict(plain.state_dict())
            # The move to a device quantises.
            setattr(layer.mlp, name, quantised.to("cpu"))


def bitsandbytes_8bit(model):
    from bitsandbytes.nn import Linear8bitLt

    _bitsandbytes(model, lambda *sizes, **options: Linear8bitLt(*sizes, has_fp16_weights=False, **options))


def bitsandbytes_4bit(model):
    from bitsandbytes.nn import Linear4bit

    _bitsandbytes(model, lambda *sizes, **options: Linear4bit(*sizes, compute_dtype=torch.float32, **options))


# Whether their rows are shown to be independent: a scale that is computed from all rows would not be.
LIBRARIES = {quanto: True, torchao: False, bitsandbytes_8bit: False, bitsandbytes_4bit: True}
# A tile of 48 rows is wide enough for a kernel.
SETTINGS = [{}, {"keep": 3}, {"keep": 1}, {"keep": 0}, {"tile": 48}]


def trained(model):
    return outcome(model.train(), input_ids=tokens(), labels=tokens())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("quantise", LIBRARIES, ids=lambda quantise: quantise.__name__)
def test_quantised_projections_train_as_unpatched(quantise, setting):
    plain, model = tiny_llama(), tiny_llama()
    quantise(plain)
    quantise(model)
    expected = trained(plain)
    assert not torch.allclose(expected["logits"], tiny_llama()(tokens()).logits, atol=1e-5), "it is quantised"
    (entry, *_) = patch_model(model, **setting)
    assert fused(model) == 2
    assert (entry.keep, entry.tile) == (
        0 if "tile" in setting else setting.get("keep", 2),
        setting.get("tile") if LIBRARIES[quantise] else None,
    )
    with counted_launches() as launches:
        actual = trained(model)
    assert launches.names.count("swiglu_bwd") >= 2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
