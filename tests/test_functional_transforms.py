"""`swiglu` in what PyTorch does to functions: torch.compile, tracers, torch.func, and tensors that are not ordinary."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from support.forms import COLUMNS, FORMS, ROWS, every_form, gated, leaves, operands, random, self_gated
from support.outcome import assert_as_eager, outcome
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_swiglu import SwiGLU, backends, swiglu
from hf_swiglu.testing import counted_launches, kernels_at_every_size

pytestmark = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=f"{backends.unavailable('cpu')}")


# torch.compile and tracers


def captured(function, inputs, **options):
    """The forward and backward graphs that a compiler gets, and the outcome of `function` with them."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep), **options)
    return graphs, outcome(compiled, *inputs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@every_form
def test_compiled_code_holds_the_plain_formula(form, dynamic):
    graphs, result = captured(FORMS[form][0], operands(form), dynamic=dynamic)
    assert len(graphs) == 2, "a forward and a backward"
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert not any("hf_swiglu" in target for target in targets)
    assert any(target.startswith(("aten.sigmoid", "aten.silu")) for target in targets)
    torch.testing.assert_close(result, outcome(FORMS[form][1], *operands(form)))


def test_exported_programs_hold_the_plain_formula():
    x = random(ROWS, COLUMNS)
    program = torch.export.export(SwiGLU(), (x,), dynamic_shapes={"hidden_states": {0: torch.export.Dim("rows")}})
    assert "hf_swiglu" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x[:7]), self_gated(x[:7]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("needs_gradient", [False, True], ids=["no gradient", "gradient"])
def test_jit_traces_hold_the_plain_formula(needs_gradient):
    """A trace is run with gradients, loaded without this package and exported to ONNX: no operator survives that."""
    traced = torch.jit.trace(swiglu, random(ROWS, COLUMNS).requires_grad_(needs_gradient))
    assert "hf_swiglu::" not in str(traced.graph)
    torch.testing.assert_close(outcome(traced, random(3, 5)), outcome(self_gated, random(3, 5)))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_forward_and_backward(mode):
    def step(x):
        return torch.autograd.grad(swiglu(x).sum(), x)[0]

    graph = make_fx(step, tracing_mode=mode)(*leaves("self-gated"))
    (x,) = leaves("self-gated")
    torch.testing.assert_close(graph(x), torch.autograd.grad(self_gated(x).sum(), x)[0])


@pytest.mark.parametrize("has_up", [True, False], ids=["gated", "self-gated"])
def test_the_operators_pass_pytorchs_own_checks(has_up):
    """Schemas, fakes, and functionalisation of the outputs that they write into."""
    gate, up, grad, out, grad_gate, grad_up = random(6, 4, 5).unbind()
    power = 1 if has_up else 2
    up, grad_up = (up, grad_up) if has_up else (None, None)
    torch.library.opcheck(torch.ops.hf_swiglu.swiglu_fwd.default, (gate, up, out, power))
    torch.library.opcheck(torch.ops.hf_swiglu.swiglu_bwd.default, (grad, gate, up, grad_gate, grad_up, power))


# torch.func and forward mode: wrappers that a kernel could not see through


def transformed(name, function, inputs):
    func, many = torch.func, range(len(inputs))
    if name == "vmap":
        return func.vmap(function)(*inputs)
    if name == "vmap of columns":
        return func.vmap(function, in_dims=0, out_dims=1)(*inputs)
    if name == "grad":
        return func.grad(lambda *args: function(*args).square().sum(), argnums=tuple(many))(*inputs)
    if name == "per-sample grad":
        return func.vmap(func.grad(lambda *args: function(*args).square().sum(), argnums=tuple(many)))(*inputs)
    if name == "jvp":
        return func.jvp(function, tuple(inputs), tuple(tensor.cos() for tensor in inputs))
    if name == "vjp":
        out, pull = func.vjp(function, *inputs)
        return pull(out.cos())
    jacobian = {"jacrev": func.jacrev, "jacfwd": func.jacfwd, "hessian": func.hessian}[name]
    return jacobian(lambda *args: function(*args).sum(-1)[:2], argnums=tuple(many))(*inputs)


@pytest.mark.parametrize("name", ["vmap", "vmap of columns", "grad", "per-sample grad", "jvp", "vjp"])
@every_form
def test_function_transforms(form, name):
    inputs = operands(form)
    with counted_launches() as launches:
        result = transformed(name, FORMS[form][0], inputs)
    assert launches.names == []
    torch.testing.assert_close(result, transformed(name, FORMS[form][1], inputs))


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
@every_form
def test_jacobians(form, name):
    inputs = operands(form, 3, 4)
    with kernels_at_every_size():
        result = transformed(name, FORMS[form][0], inputs)
    torch.testing.assert_close(result, transformed(name, FORMS[form][1], inputs))


@every_form
def test_forward_mode_tangents(form):
    inputs = operands(form)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, tensor.cos()) for tensor in inputs]
        ours, plain = (forward_ad.unpack_dual(function(*duals)) for function in FORMS[form])
    assert ours.tangent is not None
    torch.testing.assert_close([*ours], [*plain])


# Tensors that are not ordinary: plain PyTorch computes what it always did


@every_form
def test_meta_and_fake_tensors(form):
    ours, plain = FORMS[form]
    inputs = leaves(form)
    meta = ours(*(tensor.to("meta") for tensor in inputs))
    with FakeTensorMode() as mode, counted_launches() as launches:
        fakes = [mode.from_tensor(tensor) for tensor in inputs]
        fake = ours(*fakes)
        gradients = torch.autograd.grad(fake.sum(), fakes)
    assert launches.names == []
    real = plain(*inputs)
    for result in (meta, fake):
        assert (result.shape, result.dtype, result.stride()) == (real.shape, real.dtype, real.stride())
    assert (meta.device.type, fake.device.type) == ("meta", "cpu")
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in inputs]


class Tagged(torch.Tensor):
    """A subclass that sees every function called on it."""

    seen: list

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs)


@every_form
def test_tensor_subclasses_keep_their_type(form):
    Tagged.seen = []
    inputs = operands(form)
    result = FORMS[form][0](*(tensor.as_subclass(Tagged) for tensor in inputs))
    assert type(result) is Tagged
    assert "silu" in Tagged.seen
    assert torch.equal(result.as_subclass(torch.Tensor), FORMS[form][1](*inputs))


def test_sparse_up():
    gate, up = operands("gated")
    up = F.dropout(up, 0.9).to_sparse()
    torch.testing.assert_close(swiglu(gate, up).to_dense(), gated(gate, up).to_dense())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout):
    nested = torch.nested.nested_tensor([random(90, COLUMNS), random(70, COLUMNS)], layout=layout)
    for result, expected in zip(swiglu(nested).unbind(), self_gated(nested).unbind(), strict=True):
        torch.testing.assert_close(result, expected)


def test_the_default_device_does_not_matter():
    x = random(ROWS, COLUMNS)
    with torch.device("meta"):
        result = swiglu(x)
    torch.testing.assert_close(result, self_gated(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@every_form
def test_cuda(form):
    inputs = [tensor.cuda().bfloat16() for tensor in operands(form)]
    with counted_launches("cuda") as launches:
        assert_as_eager(*FORMS[form], *inputs)
    assert launches.names == ["swiglu_fwd", "swiglu_bwd"]
