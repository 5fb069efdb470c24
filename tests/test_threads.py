"""Many threads at once: operators have the bits of one thread, and models are patched side by side."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import time

import pytest
import torch
from support.forms import FORMS, every_form, leaves
from support.models import GatedMLP, fused, hidden_states, tiny_llama, tiny_phi3, tokens

from hf_swiglu import patch_model, swiglu, unpatch_model
from hf_swiglu.patching.recognition.method_source import parsed
from hf_swiglu.patching.rewriting.fused_classes import FusedModule

THREADS = 16


@pytest.fixture(autouse=True)
def _frequent_switches():
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(2)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def in_threads(count, function):
    """`function(index)` in that many threads, which start together; raises what one of them raised."""
    start, errors, results = threading.Barrier(count), [], [None] * count

    def run(index):
        try:
            start.wait(timeout=60)
            results[index] = function(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive()
    for error in errors:
        raise error
    return results


@every_form
@pytest.mark.parametrize("shape", ((130, 128), (270, 256)), ids=("one thread each", "several threads each"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_operators_in_16_threads_have_the_bits_of_one(form, shape, dtype):
    function, _ = FORMS[form]

    def outcomes(scale):
        inputs = [(tensor.detach() * scale).requires_grad_() for tensor in leaves(form, *shape, dtype=dtype)]
        product = function(*inputs)
        product.backward(torch.ones_like(product))
        return [product.detach(), *(tensor.grad for tensor in inputs)]

    # Another input for each thread: a result in another thread's memory would show.
    expected = [outcomes(1 + index / THREADS) for index in range(THREADS)]
    found = in_threads(THREADS, lambda index: [outcomes(1 + index / THREADS) for _ in range(5)])
    for index in range(THREADS):
        for repeated in found[index]:
            assert all(map(torch.equal, repeated, expected[index]))


def test_two_threads_that_write_one_output_leave_one_of_two_results_in_each_element():
    from hf_swiglu.backends import cpu
    from hf_swiglu.reference import SILU

    up = torch.ones(1_000, 701, dtype=torch.bfloat16)
    gates, out = (up, up * 3), torch.empty_like(up)
    products = [swiglu(gate, up) for gate in gates]

    def write(index):
        for _ in range(20):
            cpu.swiglu_fwd(gates[index], up, out, SILU)

    in_threads(2, write)
    assert ((out == products[0]) | (out == products[1])).all()


@pytest.mark.slow
@pytest.mark.parametrize("options", ({}, {"keep": 0}, {"activation": "swiglu"}), ids=str)
def test_two_threads_patch_and_unpatch_their_models(options):
    builders = (tiny_llama, tiny_llama, tiny_phi3)
    models = [build() for build in builders]
    expected = [model(tokens()).logits for model in models]

    def cycles(index):
        model = models[index]
        for _ in range(8):
            report = patch_model(model, **options if index < 2 else {})
            assert len(report.fused) == 2 and fused(model) == 2
            if not options:
                torch.testing.assert_close(model(tokens()).logits, expected[index])
            assert unpatch_model(model) == 2 and fused(model) == 0

    in_threads(len(models), cycles)
    for model, logits in zip(models, expected):
        assert torch.equal(model(tokens()).logits, logits)


def test_threads_that_fuse_a_class_for_the_first_time_at_once():
    class Unseen(GatedMLP):
        def forward(self, x):
            return self.w2(self.act(self.w1(x)) * self.w3(x))

    modules = [Unseen() for _ in range(THREADS)]
    x = hidden_states()
    expected = [module(x) for module in modules]
    in_threads(THREADS, lambda index: patch_model(modules[index]))
    # Some threads make a class of their own, of the same content.
    assert all(isinstance(module, FusedModule) for module in modules)
    for module, output in zip(modules, expected):
        torch.testing.assert_close(module(x), output)


def test_threads_parse_at_once():
    # Python code that runs during a garbage collection lets another thread run in the middle of a parse.
    callback, thresholds = lambda *_: time.sleep(0), gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(10)
    source = inspect.getsource(GatedMLP)
    try:
        in_threads(4, lambda index: [parsed(source) for _ in range(100)])
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*thresholds)


@pytest.mark.slow
def test_threads_that_patch_one_model_leave_it_as_one_of_them_does():
    model = tiny_llama()
    logits = model(tokens()).logits
    in_threads(4, lambda index: [patch_model(model, keep=index % 3) for _ in range(5)])
    assert fused(model) == 2
    torch.testing.assert_close(model(tokens()).logits, logits)
    in_threads(4, lambda index: unpatch_model(model))
    assert fused(model) == 0 and torch.equal(model(tokens()).logits, logits)
