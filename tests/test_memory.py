"""Two buffers for backward: what one gated MLP keeps, and that its gradients are eager's all the same.

`pytest -s tests/test_memory.py` prints the table, in buffers of tokens x intermediate size.
"""

import copy
import ctypes
import gc
import sys
from functools import partial

import psutil
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from support.models import HIDDEN, WIDE, hidden_states
from support.outcome import outcome
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from hf_swiglu import backends, patch_model
from hf_swiglu.testing import counted_launches

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"{backends.unavailable('cpu')}")


def llama(hidden=HIDDEN, wide=WIDE) -> nn.Module:
    return LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=wide)).train()


def phi3(hidden=HIDDEN, wide=WIDE) -> nn.Module:
    return Phi3MLP(Phi3Config(hidden_size=hidden, intermediate_size=wide, pad_token_id=0)).train()


def lora(*sizes, dropout: float = 0.0) -> nn.Module:
    targets = ["gate_proj", "up_proj", "down_proj"]
    return inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, lora_dropout=dropout), llama(*sizes))


def frozen(*sizes, but: str = "") -> nn.Module:
    mlp = llama(*sizes).requires_grad_(False)
    if but:
        mlp.get_submodule(but).requires_grad_(True)
    return mlp


def plain(mlp, x):
    return mlp(x)


def autocast(mlp, x):
    with torch.autocast("cpu", torch.bfloat16):
        return mlp(x)


def keep_products_of_matrices(context, operator, *args, **kwargs):
    kept = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


reentrant = partial(checkpoint, use_reentrant=True)
not_reentrant = partial(checkpoint, use_reentrant=False)
selective = partial(
    checkpoint,
    use_reentrant=False,
    context_fn=partial(create_selective_checkpoint_contexts, keep_products_of_matrices),
)

# A narrow model makes everything but the buffers small, and malloc keeps no block as large as these for later: process
# memory follows them exactly.
TOKENS, LARGE = 2048, (32, 8192)

# What runs, whether its input needs a gradient, and the buffers that eager and the patched module keep.
ROWS = {
    "LLaMA": (llama, plain, True, 4, 2),
    "LLaMA, autocast to bfloat16": (llama, autocast, True, 4, 2),
    "Phi-3, packed gate and up": (phi3, plain, True, 4, 2),
    "LoRA on gate, up and down": (lora, plain, True, 4, 2),
    # In eager dropout keeps its mask, as floats on a CPU, and down what dropout made of the product: one more each.
    "LoRA with dropout": (partial(lora, dropout=0.1), plain, True, 5, 2),
    "frozen, below something trained": (frozen, plain, True, 3, 2),
    "frozen, nothing trained": (frozen, plain, False, 0, 0),
    "gate alone trained": (partial(frozen, but="gate_proj"), plain, False, 2, 2),
    "up alone trained": (partial(frozen, but="up_proj"), plain, False, 1, 1),
    "down alone trained": (partial(frozen, but="down_proj"), plain, False, 1, 1),
    "checkpointed, not reentrant": (llama, not_reentrant, True, 0, 0),
    "checkpointed, reentrant": (llama, reentrant, True, 0, 0),
}


def prepare(build, patch, input_trained):
    torch.manual_seed(0)
    mlp = build(*LARGE)
    if patch is not None:
        patch_model(mlp, keep=patch)
    return mlp, torch.randn(TOKENS, LARGE[0], requires_grad=input_trained)


def buffer_bytes(run):
    return TOKENS * LARGE[1] * (2 if run is autocast else 4)


def in_process_memory(build, run, input_trained, patch) -> float:
    mlp, x = prepare(build, patch, input_trained)
    # What the first call sets up, threads and packed weights for instance, is not kept for backward.
    run(mlp, x)
    before = resident()
    out = run(mlp, x)
    held = resident() - before
    del out
    return held / buffer_bytes(run)


def resident() -> int:
    gc.collect()
    if sys.platform == "linux":
        # What earlier tests freed must not be handed out again unseen.
        ctypes.CDLL(None).malloc_trim(0)
    memory = psutil.Process().memory_info()
    # Pages of libraries come and go with what else the machine does.
    return memory.rss - getattr(memory, "shared", 0)


def counted(build, run, input_trained, patch) -> float:
    """Every storage that autograd is given to save, once; the weights and their casts are not activations."""
    mlp, x = prepare(build, patch, input_trained)
    storages = {}

    def pack(tensor):
        if tensor.numel() >= TOKENS * LARGE[1]:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run(mlp, x)
    return sum(storage.nbytes() for storage in storages.values()) / buffer_bytes(run)


@pytest.fixture(scope="module")
def table():
    rows = []
    yield lambda *row: rows.append("{:35}{:8.2f}{:9.2f}".format(*row))
    print("\n\nbuffers kept, by process memory       eager  patched", *rows, sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_buffers_kept_for_backward(row, table):
    build, run, input_trained, *expected = ROWS[row]
    kept = [in_process_memory(build, run, input_trained, patch) for patch in (None, 2)]
    table(row, *kept)
    assert kept == pytest.approx(expected, abs=0.1)
    assert [counted(build, run, input_trained, patch) for patch in (None, 2)] == expected


@pytest.mark.slow
def test_keep_3_keeps_the_product_too(table):
    kept = in_process_memory(llama, plain, True, 3)
    table("LLaMA, keep=3", 4, kept)
    assert kept == pytest.approx(3, abs=0.1)


def shown(mlp, run=plain, **options):
    return outcome(partial(run, mlp), hidden_states(), of=mlp, **options)


def pair(build=llama):
    """The same module twice, plain and patched."""
    torch.manual_seed(0)
    mlp = build()
    patched = copy.deepcopy(mlp)
    patch_model(patched)
    return mlp, patched


def offloaded(mlp, x):
    with save_on_cpu():
        return mlp(x)


# Forward, recomputed for down, backward; checkpointing runs the forward once more. Under the modes of selective
# checkpointing the product is kept.
ONCE, TWICE = ["swiglu_fwd"] * 2 + ["swiglu_bwd"], ["swiglu_fwd"] * 3 + ["swiglu_bwd"]
WAYS = {plain: ONCE, autocast: ONCE, offloaded: ONCE, reentrant: TWICE, not_reentrant: TWICE, selective: ONCE}
WAY_NAMES = ["plain", "autocast", "save_on_cpu", "reentrant", "not_reentrant", "selective"]


@pytest.mark.parametrize("run", WAYS, ids=WAY_NAMES)
@pytest.mark.parametrize("build", [llama, phi3])
def test_outputs_and_gradients_are_eagers(build, run):
    mlp, patched = pair(build)
    with counted_launches() as launches:
        result = shown(patched, run)
    assert launches.names == WAYS[run]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if run is autocast else {}
    torch.testing.assert_close(result, shown(mlp, run), **tolerance)


def test_outer_hooks_see_everything_but_the_product():
    _, patched = pair()
    packed = []
    with saved_tensors_hooks(lambda tensor: packed.append(tensor.shape) or tensor.clone(), lambda tensor: tensor):
        patched(hidden_states())
    assert [shape[-1] for shape in packed if len(shape) == 3].count(WIDE) == 2, packed
    assert any(set(shape) == {HIDDEN, WIDE} for shape in packed), "down's weight, for the gradient of the product"


class ScaledInPlace(nn.Linear):
    """Writes into the product before it uses it."""

    def forward(self, x):
        return super().forward(x.mul_(2))


class HalfOfIt(nn.Linear):
    """Saves a view that begins where the product does, and one that does not."""

    def forward(self, x):
        half = x[..., : WIDE // 2] * x[..., WIDE // 2 :]
        return super().forward(torch.cat([half, half.square()], dim=-1))


class Quantised(nn.Linear):
    """As bitsandbytes' and others': integer weights, turned back into floats at every call, and nothing to train."""

    def forward(self, x):
        scale = self.weight.detach().abs().max() / 127
        return nn.functional.linear(x, (self.weight / scale).detach().round().to(torch.int8) * scale)


def with_down(linear_class):
    mlp = llama()
    mlp.down_proj.__class__ = linear_class
    return mlp


DOWNS = {
    "lora": lora,
    "lora with dropout": partial(lora, dropout=0.5),
    "in place": lambda: with_down(ScaledInPlace),
    "views": lambda: with_down(HalfOfIt),
    "frozen": lambda: frozen(but="gate_proj"),
}


@pytest.mark.parametrize("run", [plain, reentrant, not_reentrant], ids=["plain", "reentrant", "not_reentrant"])
@pytest.mark.parametrize("down", DOWNS)
def test_any_down_module_will_do(down, run):
    mlp, patched = pair(DOWNS[down])
    with counted_launches() as launches:
        result = shown(patched, run)
    assert "swiglu_bwd" in launches.names or down == "frozen"
    torch.testing.assert_close(result, shown(mlp, run))


def test_a_quantised_down_needs_no_product_at_all():
    mlp, patched = pair(lambda: with_down(Quantised))
    trained = [[m.gate_proj.weight, m.up_proj.weight] for m in (patched, mlp)]
    with counted_launches() as launches:
        result = shown(patched, wrt=trained[0])
    assert launches.names == ["swiglu_fwd", "swiglu_bwd"]
    torch.testing.assert_close(result, shown(mlp, wrt=trained[1]))


@pytest.mark.parametrize("weight", ["down_proj", "gate_proj"])
@pytest.mark.parametrize("run", [plain, not_reentrant], ids=["plain", "not_reentrant"])
def test_the_gradient_of_one_weight_alone(weight, run):
    mlp, patched = pair()
    result, expected = (shown(m, run, wrt=[m.get_submodule(weight).weight]) for m in (patched, mlp))
    torch.testing.assert_close(result, expected)


def test_a_kept_graph_gives_the_same_gradients_again():
    _, patched = pair()
    out = patched(hidden_states())
    weights = list(patched.parameters())
    first = torch.autograd.grad(out.sum(), weights, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    # Down's gradient alone leaves the product's node unvisited, and must not confuse the pass after it.
    torch.autograd.grad(out.sum(), patched.down_proj.weight, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), weights), kept))
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_a_gate_that_changed_since_raises():
    _, patched = pair()
    gates = []
    patched.gate_proj.register_forward_hook(lambda module, args, gate: gates.append(gate))
    out = patched(hidden_states())
    with torch.no_grad():
        gates[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("build", [llama, phi3, partial(lora, dropout=0.5)], ids=["llama", "phi3", "lora"])
def test_second_derivatives(build):
    """Through the gradient of down's weight, which multiplies the recomputed product."""

    def penalties(mlp):
        torch.manual_seed(1)
        weights = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
        first = torch.autograd.grad(mlp(hidden_states()).square().mean(), weights, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), weights)

    mlp, patched = pair(build)
    for module in (mlp, patched):
        # A fresh LoRA's B is zero, and so would be most of its derivatives.
        torch.manual_seed(2)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    for result, expected in zip(penalties(patched), penalties(mlp), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_torch_compile_trains_without_our_operators():
    mlp, patched = pair()
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, backend=collect)
    torch.testing.assert_close(shown(patched, lambda _, x: compiled(x)), shown(mlp))
    # What is recomputed for backward is a graph of its own inside.
    code = "".join(graph.code for graph in graphs[0].modules() if hasattr(graph, "code"))
    assert len(graphs) == 1 and "silu" in code and "hf_swiglu" not in code
