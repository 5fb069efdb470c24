"""Gate's memory is written over only where nothing else holds it, and gradients are computed from what was computed."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from support.models import WIDE, GatedMLP, hidden_states
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hf_swiglu import backends, patch_model
from hf_swiglu.patching.ownership import counts, owned_counts
from hf_swiglu.testing import counted_launches

needs_kernel = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"{backends.unavailable('cpu')}")


@pytest.fixture
def pair():
    torch.manual_seed(0)
    mlp = GatedMLP()
    fused = copy.deepcopy(mlp)
    patch_model(nn.Sequential(fused))
    return mlp, fused


class ByFunction(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.linear:
            self.seen.append(out)
        return out


class ByDispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.append(out)
        return out


@pytest.mark.parametrize("mode", [ByFunction, ByDispatch])
def test_what_a_mode_records_stays(pair, mode):
    records = []
    for mlp in pair:
        with torch.no_grad(), mode() as record:
            mlp(hidden_states())
        records.append(record.seen)
    assert len(records[0]) == 3
    torch.testing.assert_close(records[1], records[0])


@pytest.mark.parametrize("keep", ["output", "detach", "numpy", "slice"])
def test_what_a_wrapper_of_linear_keeps_stays(pair, keep, monkeypatch):
    forward, kept = nn.Linear.forward, []
    keeps = {
        "output": lambda out: out,
        "detach": lambda out: out.detach(),
        "numpy": lambda out: out.detach().numpy(),
        "slice": lambda out: out[:1],
    }

    def keeping(self, x):
        out = forward(self, x)
        kept.append((keeps[keep](out), out.clone()))
        return out

    monkeypatch.setattr(nn.Linear, "forward", keeping)
    with torch.no_grad():
        pair[1](hidden_states())
    for held, expected in kept:
        torch.testing.assert_close(torch.as_tensor(held), expected[: len(held)], rtol=0, atol=0)


@needs_kernel
def test_the_version_counter_moves_with_the_write(pair):
    versions = []
    pair[1].w2.register_forward_pre_hook(lambda module, args: versions.append(args[0]._version))
    with torch.no_grad():
        pair[1](hidden_states())
    assert versions == [1]


@needs_kernel
def test_inference_tensors_have_no_version_to_move(pair):
    with torch.inference_mode(), counted_launches() as launches:
        torch.testing.assert_close(pair[1](hidden_states()), pair[0](hidden_states()))
    ((gate, _, out),) = (launch.tensors for launch in launches)
    assert gate.data_ptr() == out.data_ptr()


def test_counts_of_a_tensor_that_is_held():
    def handed(tensor):
        return counts(tensor)

    # Read before they are asserted: pytest's own variables would hold the tensors too.
    linear, x = nn.Linear(4, 4), torch.randn(3, 4)
    for _ in range(3):
        fresh = handed(linear(x))
        held = linear(x)
        named, again = handed(held), handed(held)
        view = held.view(-1)
        viewed = handed(held)
        del view
        freed = handed(held)
        other = held
        twice = handed(held)
        del other
        assert fresh == owned_counts(False) != owned_counts(True)
        assert named == again == freed == owned_counts(True)
        assert viewed != owned_counts(True) != twice


def policy(context, operator, *args, **kwargs):
    kept = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("trained", [["w2"], ["w1", "w2", "w3"]], ids="+".join)
@pytest.mark.parametrize("selective", [True, False])
def test_selective_checkpointing(pair, trained, selective):
    contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)} if selective else {}
    gradients = []
    for mlp in pair:
        mlp.requires_grad_(False)
        for name in trained:
            mlp.get_submodule(name).requires_grad_(True)
        checkpoint(mlp, hidden_states(), use_reentrant=False, **contexts).square().sum().backward()
        gradients.append([parameter.grad for parameter in mlp.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0])


def through_data(x):
    x.data[:, ::2] = 0


def through_numpy(x):
    x.detach().numpy()[:, ::2] = 0


def noticed(x):
    with torch.no_grad():
        x[:, ::2] = 0


class EditedBySubclass(nn.Linear):
    edit = None

    def forward(self, x):
        type(self).edit(x)
        return super().forward(x)


def by_hook(mlp, edit, monkeypatch):
    mlp.w2.register_forward_pre_hook(lambda module, args: edit(args[0]))


def by_a_hook_afterwards(mlp, edit, monkeypatch):
    mlp.w2.register_forward_hook(lambda module, args, out: edit(args[0]))


def by_subclass(mlp, edit, monkeypatch):
    monkeypatch.setattr(EditedBySubclass, "edit", staticmethod(edit))
    mlp.w2.__class__ = EditedBySubclass


def by_instance(mlp, edit, monkeypatch):
    forward = mlp.w2.forward
    mlp.w2.forward = lambda x: (edit(x), forward(x))[1]


def by_class(mlp, edit, monkeypatch):
    forward = nn.Linear.forward

    def editing(self, x):
        if self.in_features == WIDE:
            edit(x)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(forward)(editing))


def by_function(mlp, edit, monkeypatch):
    linear = F.linear

    def editing(x, *rest):
        if x.shape[-1] == WIDE:
            edit(x)
        return linear(x, *rest)

    monkeypatch.setattr(F, "linear", editing)


def by_global_hook(mlp, edit, monkeypatch):
    def hook(module, args):
        if getattr(module, "in_features", 0) == WIDE:
            edit(args[0])

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    monkeypatch.setattr(mlp, "remove", handle.remove, raising=False)


def by_accelerate(mlp, edit, monkeypatch):
    hooks = pytest.importorskip("accelerate.hooks")

    class Editing(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            edit(args[0])
            return args, kwargs

    hooks.add_hook_to_module(mlp.w2, Editing())


WAYS = [
    by_hook, by_a_hook_afterwards, by_subclass, by_instance, by_class, by_function, by_global_hook, by_accelerate,
]  # fmt: skip


@pytest.mark.parametrize("edit", [through_data, through_numpy, noticed], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_edited_input_of_down_has_eagers_gradient(pair, way, edit, monkeypatch):
    gradients = []
    for mlp in pair:
        with monkeypatch.context() as patch:
            way(mlp, edit, patch)
            error = None
            try:
                mlp(hidden_states().requires_grad_()).square().sum().backward()
            except RuntimeError as raised:
                error = str(raised)
            if hasattr(mlp, "remove"):
                mlp.remove()
        gradients.append((mlp.w2.weight.grad, error is None))
    assert gradients[1][1] == gradients[0][1]
    torch.testing.assert_close(gradients[1][0], gradients[0][0])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_saved_tensors_that_come_back_in_another_dtype(pair, dtype):
    _, fused = pair
    fused.requires_grad_(False)
    results = []
    for convert in (lambda tensor: tensor, lambda tensor: tensor.to(dtype) if tensor.dim() == 3 else tensor):
        x = hidden_states().requires_grad_()
        with saved_tensors_hooks(convert, lambda tensor: tensor):
            out = fused(x)
        out.sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@needs_kernel
def test_saved_tensors_that_come_back_in_another_shape_are_an_error(pair):
    x = hidden_states().requires_grad_()
    with saved_tensors_hooks(lambda tensor: tensor[..., :1], lambda tensor: tensor):
        out = pair[1](x)
    with pytest.raises(RuntimeError):
        out.sum().backward()


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("keep", [3, 2, 1, 0])
def test_compiled_autograd(keep, backend):
    from torch._dynamo import compiled_autograd

    results = []
    for patch in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        mlp = GatedMLP()
        if patch:
            patch_model(nn.Sequential(mlp), keep=keep)
        x = hidden_states().requires_grad_()
        loss = mlp(x).square().sum()
        with compiled_autograd._enable(torch.compile(backend=backend)):
            loss.backward()
        results.append([x.grad, *(parameter.grad for parameter in mlp.parameters())])
    torch.testing.assert_close(*results)


@needs_kernel
def test_a_freed_storage_is_an_error_and_no_address():
    from hf_swiglu import swiglu

    gate, up = torch.randn(300, 100), torch.randn(300, 100)
    gate.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        swiglu(gate, up)


@needs_kernel
def test_a_default_device_changes_nothing(pair):
    # It is a function mode, and always on.
    with torch.device("cpu"), torch.no_grad(), counted_launches() as launches:
        pair[1](hidden_states())
    ((gate, _, out),) = (launch.tensors for launch in launches)
    assert gate.data_ptr() == out.data_ptr()
