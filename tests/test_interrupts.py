"""KeyboardInterrupt anywhere in patching, unpatching and training: a model is wholly patched or wholly as it was.

CPython handles signals between bytecodes, mostly where functions begin and loops turn. A trace function raises here
wherever a function or a line of hf_swiglu begins, which is more places than a signal has; a child process gets signals.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from support.models import fused, tiny_llama, tiny_phi3, tokens

import hf_swiglu
from hf_swiglu import _compat, patch_model, patch_on_load, unpatch_model
from hf_swiglu.patching import patch_on_load as on_load
from hf_swiglu.patching.memory import checkpointed_forward

# An interrupt of a generator that is being closed is printed, and goes no further.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PACKAGE = Path(hf_swiglu.__file__).parent
# The files that change a model.
CHANGING = [
    str(PACKAGE / "patching" / file)
    for file in ("patch_model.py", "activation_swap.py", "changes.py", "verify.py", "rewriting/fused_classes.py")
]
assert all(map(os.path.exists, CHANGING))


class Interrupts:
    """Raises KeyboardInterrupt in these files, at the lines with these numbers in the order in which lines run."""

    def __init__(self, files, *lines: int):
        self._files, self._lines = tuple(files), set(lines)
        self.count = 0

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self._files):
            return None
        if event in ("call", "line"):
            self.count += 1
            if self.count in self._lines:
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind, error, traceback):
        sys.settrace(self._before)
        return kind is KeyboardInterrupt


def count_lines(files, action) -> int:
    with Interrupts(files) as interrupts:
        action()
    return interrupts.count


def spread(lines, count):
    """Up to `count` of the numbers from 1 to `lines`; HF_SWIGLU_INTERRUPTS times as many."""
    return range(1, lines + 1, max(1, lines // (count * int(os.environ.get("HF_SWIGLU_INTERRUPTS", 1)))))


def state(model):
    """Everything that patching may change: classes, attributes, children and configs."""
    modules = [(type(module), dict(vars(module)), dict(module._modules)) for module in model.modules()]
    return modules, [
        dict(vars(part.config)) for part in model.modules() if isinstance(part, transformers.PreTrainedModel)
    ]


def kind(model):
    """`state` by names, because each patch makes its bound forwards and activations anew."""
    modules, configs = state(model)
    return [
        (cls, list(attributes), [(name, type(child)) for name, child in children.items()])
        for cls, attributes, children in modules
    ], configs


def hooked_llama():
    """With accelerate's hook on each MLP, which keeps the bound forward of the class on the instance."""
    model = tiny_llama()
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp, ModelHook())
    return model


CASES = {
    "plain": (tiny_llama, {}),
    "packed": (tiny_phi3, {"keep": 0}),
    "hooked": (hooked_llama, {}),
    "swapped": (hooked_llama, {"activation": "swiglu"}),
    "verified": (tiny_llama, {"verify": True}),
}
every_case = pytest.mark.parametrize("case", CASES)


def patched_and_known(case):
    """A model, the function that patches it, and its states before and after."""
    build, options = CASES[case]
    model = build()

    def patch():
        patch_model(model, **options)

    before = state(model)
    patch()
    after = kind(model)
    unpatch_model(model)
    assert state(model) == before and kind(model) != after
    return model, patch, before, after


def assert_whole(model, before, after, where):
    """Either the one state or the other, after which the model is unpatched; and the modes of PyTorch as before."""
    assert torch.is_grad_enabled() and torch.empty(0).is_cpu, where
    if fused(model):
        assert kind(model) == after, where
        unpatch_model(model)
    assert state(model) == before, where


@pytest.mark.slow
@every_case
def test_an_interrupt_at_any_line_of_patch_model_leaves_all_or_nothing(case):
    model, patch, before, after = patched_and_known(case)
    lines = count_lines(CHANGING, patch)
    unpatch_model(model)
    assert lines > 100
    for at in spread(lines, 150):
        with Interrupts(CHANGING, at):
            patch()
        assert_whole(model, before, after, at)
    every_file = [str(PACKAGE)]
    lines = count_lines(every_file, patch)
    unpatch_model(model)
    for at in spread(lines, 20):
        with Interrupts(every_file, at):
            patch()
        assert_whole(model, before, after, at)


@pytest.mark.slow
@pytest.mark.parametrize("case", ("hooked", "swapped", "verified"))
def test_a_second_interrupt_while_the_first_is_undone_changes_nothing(case):
    model, patch, before, after = patched_and_known(case)
    lines = count_lines(CHANGING, patch)
    unpatch_model(model)
    # Undoing runs fewer lines than this.
    for at in spread(lines, 15):
        for distance in (1, 2, 3, 4, 5, 6, 8, 12):
            with Interrupts(CHANGING, at, at + distance):
                patch()
            assert_whole(model, before, after, (at, distance))


@every_case
def test_an_interrupt_at_any_line_of_unpatch_model_leaves_all_or_nothing(case):
    model, patch, before, after = patched_and_known(case)
    patch()
    lines = count_lines(CHANGING, lambda: unpatch_model(model))
    for distance in (0, 1, 4):
        for at in spread(lines, 40):
            if not fused(model):
                patch()
            with Interrupts(CHANGING, at, at + distance):
                unpatch_model(model)
            assert kind(model) == after if fused(model) else state(model) == before, (at, distance)


@pytest.mark.slow
@pytest.mark.parametrize("distance", (0, *(pytest.param(lines, marks=pytest.mark.long) for lines in (1, 3))))
def test_an_interrupt_in_patch_on_load_leaves_no_hook(distance):
    files = [*CHANGING, on_load.__file__]
    base = transformers.PreTrainedModel
    original = base.__call__, base.__init_subclass__.__func__, transformers.LlamaForCausalLM.__init__
    built = []

    def load():
        built.clear()
        with patch_on_load():
            built.append(tiny_llama(num_hidden_layers=1))

    load()
    after = kind(built[0])
    unpatch_model(built[0])
    before = kind(built[0])
    lines = count_lines(files, load)
    for at in spread(lines, 40):
        with Interrupts(files, at, at + distance):
            load()
        # What interrupts the exit of a `with` block ends the block when the exception is dropped.
        gc.collect()
        assert (on_load._uses, on_load._replaced, on_load._session.get()) == ([], [], None), at
        assert not on_load._is_off.get(), at
        assert (base.__call__, base.__init_subclass__.__func__, transformers.LlamaForCausalLM.__init__) == original, at
        assert all(kind(model) in (before, after) for model in built), at
    load()
    assert kind(built[0]) == after


@pytest.mark.parametrize("moment", ("entering", "leaving"))
def test_an_abandoned_patch_on_load_that_is_collected_meanwhile_ends(moment, monkeypatch):
    real, contexts = on_load.call_all, []

    def call_all(calls):
        calls = list(calls)
        if not contexts:
            gc.collect()
        real(calls)

    def begin():
        context = patch_on_load(strict=False)
        context.__enter__()
        contexts.append(context)

    begin()
    if moment == "leaving":
        begin()
    # In a cycle, so that only the collector frees it.
    abandoned = [contexts.pop(0)]
    abandoned.append(abandoned)
    gc.disable()
    monkeypatch.setattr(on_load, "call_all", call_all)
    try:
        last = contexts.pop() if contexts else patch_on_load(strict=False)
        del abandoned
        if moment == "entering":
            last.__enter__()
            assert len(on_load._uses) == 1 and on_load._replaced
        last.__exit__(None, None, None)
    finally:
        gc.enable()
    assert (on_load._uses, on_load._replaced, on_load._session.get()) == ([], [], None)


TRAINED = ({}, {"keep": 1}, {"keep": 0}, {"tile": 16})


@pytest.mark.slow
@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_an_interrupt_at_any_line_of_a_training_step_changes_no_later_one(options):
    model = tiny_llama().train()
    inputs = tokens()
    patch_model(model, **options)

    def step():
        model.zero_grad()
        model(inputs, labels=inputs).loss.backward()

    step()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        logits = model(inputs).logits
    files = [str(PACKAGE)]
    lines = count_lines(files, step)
    for at in spread(lines, 60):
        with Interrupts(files, at):
            step()
        assert getattr(checkpointed_forward._state, "region", None) is None, at
        assert _compat.saved_tensors_default_hooks() is None, at
        if at % 5 == 1:
            with torch.no_grad():
                assert torch.equal(model(inputs).logits, logits), at
            step()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            assert all(torch.equal(gradients[name], expected[name]) for name in expected), at


SIGNALS = """
import random, signal, sys
sys.path.insert(0, sys.argv[1])
from test_interrupts import fused, kind, patched_and_known, state, unpatch_model
model, patch, before, after = patched_and_known("swapped")
random.seed(0)
interrupted = left = 0

def handler(*_):
    global left
    if left:
        left -= 1
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, handler)
for _ in range(60):
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 0.015), 1e-4)
            left = random.choice((1, 2))
            patch()
            unpatch_model(model)
        finally:
            left = 0
    except KeyboardInterrupt:
        interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert kind(model) == after if fused(model) else state(model) == before
    if fused(model):
        unpatch_model(model)
    assert state(model) == before
print(interrupted)
"""


@pytest.mark.slow
def test_signals_at_random_moments_leave_all_or_nothing():
    command = [sys.executable, "-c", SIGNALS, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
