"""tile=N: at most N rows of gate and up at a time, where the source shows that rows are independent."""

import copy
from functools import partial, update_wrapper

import pytest
import torch
import torch.nn.functional as F
from support.lookalikes import LOOKALIKES
from support.models import HIDDEN, WIDE, GatedMLP, hidden_states, tiny_llama, tokens
from test_keep import MODULES, RUNS, assert_close, built, gemma, llama, lora, phi3, run_and_differentiate
from test_memory import LARGE, TOKENS, Quantised
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_swiglu import patch_model
from hf_swiglu.commands.peak_memory import peak_bytes
from hf_swiglu.patching.activations import defining_module
from hf_swiglu.patching.memory import rowwise_proof

ROWWISE = {
    "functional_silu", "factors_swapped", "packed_gate_first", "packed_gate_last", "packed_slices",
    "packed_interleaved", "sigmoid_spelled_out", "sigmoid_with_alpha", "clamped", "activation_clamped",
    "clamped_on_one_side", "up_plus_one", "normalised_product", "normalised_gate", "trailing_scale",
    "whole_number_scale", "multipliers", "float32_inside", "dropout_child", "functional_dropout", "dropout_always_on",
    "dropout_by_a_childs_flag", "branches_on_training", "branches_on_a_childs_training", "two_products",
    "gate_used_again", "activation_used_again", "product_used_again", "up_made_from_gate", "self_gated",
    "another_activation", "broadcast_up", "keyword_only_scale", "sparse",
}  # fmt: skip
REPEATABLE = {"packed_along_tokens", "branches_on_a_missing_argument", "returns_a_tuple"}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_is_shown_of_a_forward(name):
    module = LOOKALIKES[name][0]()
    shown = rowwise_proof.shown(module, type(module))
    assert (name in ROWWISE) == (not shown.not_rowwise), shown
    assert (name in ROWWISE | REPEATABLE) == (not shown.not_repeatable), shown


@pytest.mark.parametrize("name", sorted(ROWWISE))
def test_rows_are_independent_where_it_is_shown(name):
    """As evidence: a row by itself is what it is among others."""
    module = LOOKALIKES[name][0]().double().eval()
    if "dropout" in name:
        module.forward = partial(_without_dropout, module, module.forward)
    x = hidden_states(torch.float64)
    assert_close([module(x)[1, 3:5].detach()], [module(x[1, 3:5]).detach()], 1e-12)


def _without_dropout(module, forward, x):
    original, F.dropout = F.dropout, lambda x, *rest, **named: x
    try:
        return forward(x)
    finally:
        F.dropout = original


class OverRows(nn.Linear):
    def forward(self, x):
        return F.linear(x - x.mean(0, keepdim=True), self.weight)


class Centred(GatedMLP):
    def forward(self, x):
        gate = self.w1(x)
        return self.w2(self.act(gate - gate.mean(0)) * self.w3(x))


class Normed(GatedMLP):
    def __init__(self):
        super().__init__()
        self.norm = LlamaRMSNorm(WIDE)

    def forward(self, x):
        return self.w2(self.norm(self.act(self.w1(x)) * self.w3(x)))


class Batched(GatedMLP):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(40)

    def forward(self, x):
        return self.w2(self.norm(self.act(self.w1(x)) * self.w3(x)))


class Scaled(GatedMLP):
    def __init__(self, *shape):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(*shape))

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x) * self.scale)


def with_child(name, cls):
    mlp = GatedMLP()
    mlp.get_submodule(name).__class__ = cls
    return mlp


MORE = {
    "a linear over rows": (partial(with_child, "w1", OverRows), True, False),
    "a mean over rows": (Centred, True, False),
    "an RMSNorm, by its source": (Normed, True, True),
    "a BatchNorm, which counts": (Batched, False, False),
    "a vector": (partial(Scaled, WIDE), True, True),
    "a scale for each row": (partial(Scaled, 40, 1), True, False),
    "integer weights": (partial(with_child, "w2", Quantised), True, True),
}


@pytest.mark.parametrize("name", MORE)
def test_what_is_shown_of_children_and_weights(name):
    build, repeatable, independent = MORE[name]
    module = build()
    shown = rowwise_proof.shown(module, type(module))
    assert (not shown.not_repeatable, not shown.not_rowwise) == (repeatable, independent), shown
    plain, patched = module.train(), copy.deepcopy(module)
    report = patch_model(nn.Sequential(patched), tile=16, verify=not isinstance(module, (Scaled, Batched)))
    assert (report[0].tile is not None) == independent and bool(report[0].note) == (not independent)
    assert_close(run_and_differentiate(patched), run_and_differentiate(plain))


def calls_of(mlp, run):
    """How many rows each call of down has."""
    rows = []
    forward = nn.Linear.forward

    def counting(self, x):
        if (self.in_features, self.out_features) == (WIDE, HIDDEN):
            rows.append(x.numel() // WIDE)
        return forward(self, x)

    # Of a usual library, as far as anything can tell.
    counting.__globals__["__name__"], name = "torch.nn.counting", counting.__globals__["__name__"]
    nn.Linear.forward = counting
    try:
        run()
    finally:
        nn.Linear.forward, counting.__globals__["__name__"] = forward, name
    return rows


@pytest.mark.parametrize("build", [llama, phi3, gemma, lora], ids=["llama", "phi3", "gemma", "lora"])
def test_the_rows_of_each_call(build):
    """Two sequences of 40 are 80 rows, in tiles of 32, 32 and 16: batches make the last tile no larger."""
    mlp, _ = built(build, tile=32)
    x = hidden_states().requires_grad_()
    with torch.no_grad():
        assert calls_of(mlp, lambda: mlp(x)) == [32, 32, 16]
    assert calls_of(mlp, lambda: mlp(x).sum().backward()) == [32, 32, 16]
    assert calls_of(mlp, lambda: mlp(x[:, :16]).sum().backward()) == [32]
    assert calls_of(mlp, lambda: mlp(x.transpose(0, 1)).sum().backward()) == [32, 32, 16]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    "module", [name for name in MODULES if "dropout" not in name and name != "something after down"]
)
@pytest.mark.parametrize("tile", [1, 16, 33, 500])
def test_outputs_and_gradients_are_the_untiled_ones(tile, module, run):
    mlp, patched = built(MODULES[module])[0], built(MODULES[module], tile=tile)[0]
    results, expected = (run_and_differentiate(each, RUNS[run]) for each in (patched, mlp))
    # Gradients of weights are summed over tiles; not scaled by their number.
    assert_close(results, expected, tolerance=5e-2 if run == "autocast" else 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(patched(hidden_states()), mlp(hidden_states()))


def test_dropout_draws_its_masks_tile_by_tile():
    mlp, patched = built(partial(lora, dropout=0.5))[0], built(partial(lora, dropout=0.5), tile=16)[0]
    for module in (mlp, patched):
        torch.manual_seed(2)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)

    def in_tiles(_, x):
        return torch.cat([mlp(rows) for rows in x.flatten(0, 1).split(16)]).view_as(x)

    # The masks of the recomputation are those of the forward.
    assert_close(run_and_differentiate(patched), run_and_differentiate(mlp, in_tiles))


def test_gradients_arrive_once_in_each_backward():
    mlp, _ = built(llama, tile=16)
    counts = dict.fromkeys(["gate_proj", "up_proj", "down_proj"], 0)

    for name in counts:

        def arrived(parameter, name=name):
            counts[name] += 1

        mlp.get_submodule(name).weight.register_post_accumulate_grad_hook(arrived)
    mlp(hidden_states()).sum().backward()
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("tile", [16, 33])
def test_a_kept_graph_gives_the_same_gradients_again(tile):
    mlp, _ = built(llama, tile=tile)
    weights, loss = list(mlp.parameters()), mlp(hidden_states()).square().sum()
    first = [grad.clone() for grad in torch.autograd.grad(loss, weights, retain_graph=True)]
    assert all(map(torch.equal, torch.autograd.grad(loss, weights), first))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weights)


def test_changes_after_patching_are_seen():
    mlp, report = built(GatedMLP, tile=16)
    assert report[0].tile == 16
    x = hidden_states()
    for change in (
        lambda: mlp.w1.register_forward_hook(lambda module, args, out: out - out.mean(0)),
        lambda: setattr(mlp, "w3", OverRows(HIDDEN, WIDE, bias=False)),
        lambda: setattr(mlp, "w2", nn.Sequential(nn.Linear(WIDE, 40), nn.BatchNorm1d(40), nn.Linear(40, HIDDEN))),
    ):
        change()
        results = []
        for run in (mlp, partial(GatedMLP.forward, mlp)):
            with torch.no_grad():
                results.append(run(x))
            results.append(run(x).detach())
        torch.testing.assert_close(results[:2], results[2:])


def test_a_class_whose_forward_was_replaced(monkeypatch):
    mlp, _ = built(GatedMLP, tile=16)
    monkeypatch.setattr(GatedMLP, "forward", lambda self, x: self.w2(self.act(self.w1(x - x.mean(0))) * self.w3(x)))
    x = hidden_states()
    torch.testing.assert_close(mlp(x), GatedMLP.forward(mlp, x))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), GatedMLP.forward(mlp, x))


@pytest.mark.parametrize("grad", [False, True])
def test_the_peak_is_that_of_one_tile(grad):
    x = torch.randn(TOKENS, LARGE[0])

    def run(mlp):
        out = mlp(x)
        if grad:
            out.sum().backward()

    def peak(**setting):
        mlp, _ = built(llama, *LARGE, **setting)
        with torch.set_grad_enabled(grad):
            return peak_bytes(lambda: run(mlp), torch.device("cpu")) / (TOKENS * LARGE[1] * 4)

    # A quarter of the rows; and some tensors of the input's width, or the weights' gradients.
    assert peak(tile=TOKENS // 4) < peak(keep=0) / 3


def test_generation_and_whole_models():
    model = tiny_llama()
    plain = copy.deepcopy(model)
    patch_model(model, tile=16)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **options), plain.generate(tokens(), **options))


def test_modules_that_are_not_shown_say_why():
    _, report = built(Centred, tile=16)
    assert (report[0].keep, report[0].tile) == (0, None)
    assert "not tiled: its forward calls mean along dimensions other than the last" in " ".join(str(report).split())


class Wrapped:
    """A forward on the instance, with the attributes of the class's."""

    def __init__(self, module):
        update_wrapper(self, module.forward)
        self._forward = module.forward

    def __call__(self, x):
        return self._forward(x - x.mean(0))


@pytest.mark.parametrize("name", ["w1", "w3", "w2"])
def test_a_forward_on_an_instance_that_looks_like_the_class_s(name):
    mlp, _ = built(GatedMLP, tile=16)
    child = mlp.get_submodule(name)
    child.forward = Wrapped(child)
    x = hidden_states()
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), GatedMLP.forward(mlp, x))


@pytest.mark.parametrize("wrap", [partial, torch.compiler.disable, lambda hook: torch.compiler.disable(partial(hook))])
def test_a_wrapped_hook_is_of_the_library_that_defines_it(wrap):
    namespace = {"__name__": "deepspeed.runtime.zero.parameter_offload"}
    exec("def hook(module, args): pass", namespace)
    assert defining_module(wrap(namespace["hook"])) == "deepspeed.runtime.zero.parameter_offload."
    assert defining_module(wrap(hidden_states)) == "support.models."
