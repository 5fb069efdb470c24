"""bfloat16 and float16: kernels return the bits of eager PyTorch, for every gate and whatever the layout."""

import math

import pytest
import torch
from support.kernel import NO_TABLE
from support.models import VOCABULARY, GatedMLP, hidden_states, tiny_llama, tiny_phi3, tokens
from support.packaged import needs_smollm2
from test_experts import build as experts
from torch import nn

from hf_swiglu import backends, patch_model, reference, swiglu, swiglu_packed
from hf_swiglu.commands import models
from hf_swiglu.reference import SILU, SWIGLU, GLUParams
from hf_swiglu.testing import counted_launches
from tools.model_support.comparison import RUNS_GROUPED_MM

if backends.unavailable("cpu"):
    pytest.skip(f"no CPU kernel: {backends.unavailable('cpu')}", allow_module_level=True)

from hf_swiglu.backends import _cpu_kernels, cpu

HALVES = (torch.bfloat16, torch.float16)
# (params, whether there is an up)
FORMS = {
    "silu times up": (SILU, True),
    "silu": (SILU, False),
    "swiglu": (SWIGLU, False),
    "swiglu times up": (SWIGLU, True),
    "gpt-oss": (GLUParams(alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0), True),
    "clamped": (GLUParams(gate_limit=0.3, up_limit=0.7), True),
    "step-3.7": (GLUParams(act_limit=0.3, up_limit=0.7), True),
    "all of it": (GLUParams(power=2, alpha=1.3, gate_limit=3.3, act_limit=8.0, up_limit=5.0, up_offset=0.1), True),
}


@pytest.fixture(params=_cpu_kernels.supported_cpu_capabilities())
def capability(request):
    before = _cpu_kernels.cpu_capability()
    _cpu_kernels.use_cpu_capability(request.param)
    yield request.param
    _cpu_kernels.use_cpu_capability(before)


def every(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def steps_apart(result, expected):
    """By how many numbers of the dtype two tensors differ, element by element; NaN equals NaN."""

    def ordered(tensor):
        bits = tensor.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF) - 1, bits)

    both = result.isnan() & expected.isnan()
    assert torch.equal(result.isnan(), expected.isnan())
    return torch.where(both, 0, (ordered(result) - ordered(expected)).abs())


def eager(gate, up, grad, params):
    leaves = [gate.clone().requires_grad_(), up if up is None else up.clone().requires_grad_()]
    product = reference.swiglu_fwd(*leaves, params)
    product.backward(grad)
    return product.detach(), *(leaf.grad for leaf in leaves if leaf is not None)


def kernel(gate, up, grad, params):
    outs = [torch.empty_like(gate) for _ in range(2 if up is None else 3)]
    cpu.swiglu_fwd(gate, up, outs[0], params)
    cpu.swiglu_bwd(grad, gate, up, outs[1], None if up is None else outs[2], params)
    return outs


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_gate(dtype, form, capability):
    params, has_up = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    gate, pairs, other = every(dtype), 0, 0
    for scale in (0.01, 1.0, 30.0, None):
        # Every number is a factor once, the limits themselves among them.
        up = every(dtype)[torch.randperm(2**16, generator=generator)]
        if scale is not None:
            up = (torch.randn(2**16, generator=generator) * scale).to(dtype)
            up[::7] = torch.tensor(params.up_limit).to(dtype) if math.isfinite(params.up_limit) else 1
        grad = torch.randn(2**16, generator=generator).to(dtype)
        ours = kernel(gate, up if has_up else None, grad, params)
        theirs = eager(gate, up if has_up else None, grad, params)
        differences = [steps_apart(mine, plain) for mine, plain in zip(ours, theirs, strict=True)]
        assert not differences[0].any(), "the product"
        assert not has_up or not differences[2].any(), "the gradient of up"
        assert differences[1].max() <= 1, "the gradient of gate"
        pairs, other = pairs + 2**16, other + int(differences[1].count_nonzero())
    assert other <= pairs * 1e-4


def test_a_single_rounding_would_be_noticed():
    gate, up = every(torch.bfloat16), every(torch.bfloat16).flip(0)
    once = (nn.functional.silu(gate.float()) * up.float()).bfloat16()
    assert steps_apart(once, reference.swiglu_fwd(gate, up)).count_nonzero() > 100


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(dtype, capability):
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(600, 2 * 72, generator=generator) * 4).to(dtype)
    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    expected = reference.swiglu_fwd(gate, up)
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for rows in (slice(0, 1), slice(1, 8), slice(0, 200), slice(0, 600)):
            given = gate[rows], up[rows]
            results = {
                "contiguous": swiglu(*given),
                "packed": swiglu_packed(gate_up[rows]),
                "halves": swiglu(*gate_up[rows].chunk(2, dim=-1)),
                "with gradients": swiglu(*(each.clone().requires_grad_() for each in given)),
                "transposed": swiglu(*(each.t().contiguous().t() for each in given)),
                "interleaved": swiglu(*(torch.stack([each, each], dim=-1)[..., 0] for each in given)),
                "columns": torch.cat([swiglu(*(each[:, :5] for each in given)), swiglu(*(e[:, 5:] for e in given))], 1),
            }
            for name, result in results.items():
                assert torch.equal(result, expected[rows]), (name, count, rows)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_patched_model_returns_the_same_bits(build, dtype):
    model = build().to(dtype)
    with torch.no_grad():
        expected, one = model(tokens()).logits, model(tokens()[:, :3]).logits
    trained = model(tokens()).logits
    patch_model(model, verify=True)
    with torch.no_grad(), counted_launches() as launches:
        assert torch.equal(model(tokens()).logits, expected) and torch.equal(model(tokens()[:, :3]).logits, one)
    assert launches.names == ["swiglu_fwd"] * (2 if NO_TABLE else 4)
    assert torch.equal(model(tokens()).logits, trained) and torch.equal(trained, expected)


def test_scoring_and_training_agree():
    """Log-probabilities scored without gradients are those of the training forward, whatever the batch."""
    model = tiny_llama().bfloat16()
    patch_model(model)
    for count in (4, 16, 31, 40):
        ids = tokens()[:1, :count]
        with torch.no_grad():
            scored = model(ids).logits.float().log_softmax(-1)
        assert torch.equal(model(ids).logits.float().log_softmax(-1), scored)


def losses_of_twenty_steps(model):
    generator = torch.Generator().manual_seed(0)
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=1e-3), []
    for _ in range(20):
        ids = torch.randint(3, VOCABULARY - 1, (2, 40), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


TRAINED = {
    "separate": tiny_llama,
    "packed": tiny_phi3,
    "experts": lambda: experts("mixtral", "grouped_mm"),
    "clamped experts": lambda: experts("gpt_oss", "eager"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_twenty_steps_of_bfloat16_have_the_same_losses(kind):
    if kind == "experts" and not RUNS_GROUPED_MM:
        pytest.skip("this PyTorch has no grouped_mm; with the loop over experts a gradient is hit that is a step off")
    # A gradient of gate differs by one step for two pairs in a million: over 20 such steps none is hit. For experts
    # that holds for two of four seeds: their weights are wide, and a loss that differs does so by 1e-5.
    expected = losses_of_twenty_steps(TRAINED[kind]().bfloat16())
    model = TRAINED[kind]().bfloat16()
    patch_model(model)
    with counted_launches() as launches:
        losses = losses_of_twenty_steps(model)
    assert "swiglu_bwd" in launches.names
    assert losses == expected


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("dtype", (torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)), ids=str)
def test_smollm2_returns_the_same_bits(dtype):
    model, tokenizer = models.load(models.resolve("smollm2"), torch.device("cpu"))
    model.to(dtype)
    ids = tokenizer("The tide was out, and the boats lay on their sides in the mud.", return_tensors="pt").input_ids

    def generated(sampled):
        torch.manual_seed(0)
        options = {"max_new_tokens": 16, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        return model.generate(ids, do_sample=sampled, **options)

    results = []
    for _ in range(2):
        with torch.no_grad():
            results.append([model(ids).logits, generated(False), generated(True)])
        patch_model(model)
    assert all(map(torch.equal, *results))


class SwishWrittenOut(GatedMLP):
    def forward(self, x):
        gate = self.w1(x)
        glu = gate * torch.sigmoid(gate)
        return self.w2(self.w3(x) * glu)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_swish_written_out_keeps_its_own_roundings(dtype):
    module, x = SwishWrittenOut().to(dtype), hidden_states(dtype)
    with torch.no_grad():
        expected = module(x)
        assert len(patch_model(nn.Sequential(module)).fused) == 1
        assert torch.equal(module(x), expected)
