"""Patching while models are built, and running scripts so."""

import subprocess
import sys
import threading

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from support.models import SIZES, fused, tiny_gpt2, tiny_llama, tokens
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlavaConfig

from hf_swiglu import patch_on_load, unpatch_model
from hf_swiglu.commands import cli
from hf_swiglu.commands.run_script import run_script

BASE = transformers.PreTrainedModel


def _classes():
    pending, found = [BASE], {}
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        found[cls] = {name: vars(cls).get(name) for name in ("__init__", "__call__", "__init_subclass__", "post_init")}
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = _classes()
    yield
    after = _classes()
    assert {cls: after[cls] for cls in before if cls in after} == {cls: before[cls] for cls in before if cls in after}
    assert not any("watch" in repr(value) for members in after.values() for value in members.values())


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}], ids=str)
def test_from_pretrained(checkpoint, options):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    with patch_on_load(verify=True) as reports:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    assert fused(model) == 2 and fused(plain) == 0
    assert [entry.name for entry in reports[0].fused] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, rtol=2e-2, atol=2e-2)
    assert fused(AutoModelForCausalLM.from_pretrained(checkpoint)) == 0


def test_constructors_and_from_config():
    with patch_on_load() as reports:
        built = LlamaForCausalLM(LlamaConfig(**SIZES))
        configured = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    assert fused(built) == fused(configured) == 2 and len(reports) == 2
    assert unpatch_model(built) == 2


def test_a_model_class_of_the_users_own():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))

    class Model(BASE):
        config_class = LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.mlp = Mlp()

    class Tidy(Model):
        def __init__(self, config):
            super().__init__(config)
            self.post_init()

    with patch_on_load() as reports:
        models = [Tidy(LlamaConfig(**SIZES)), Model(LlamaConfig(**SIZES))]
    assert [fused(model) for model in models] == [1, 1] and len(reports) == 2


def test_peft_from_pretrained(checkpoint, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    get_peft_model(base, LoraConfig(target_modules=["gate_proj", "down_proj"])).save_pretrained(tmp_path)
    with patch_on_load():
        base = AutoModelForCausalLM.from_pretrained(checkpoint)
        model = PeftModel.from_pretrained(base, tmp_path)
    assert fused(model) == 2


def test_swapping_at_load_is_the_configs_swap(checkpoint):
    by_config = AutoModelForCausalLM.from_pretrained(checkpoint, hidden_act="swiglu")
    with patch_on_load(activation="swiglu"):
        swapped = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert swapped.config.hidden_act == "swiglu" and fused(swapped) == 2
    torch.testing.assert_close(swapped(tokens()).logits, by_config(tokens()).logits)


def test_nested_contexts_use_their_own_options():
    config = LlamaConfig(**SIZES)
    with patch_on_load() as outer:
        with patch_on_load(only="model.layers.0.mlp") as inner:
            first = LlamaForCausalLM(config)
        second = LlamaForCausalLM(config)
    assert (fused(first), fused(second)) == (1, 2)
    assert (len(inner), len(outer)) == (1, 1)


def test_another_thread_is_not_affected():
    built = []
    with patch_on_load(strict=False):
        thread = threading.Thread(target=lambda: built.append(tiny_llama()))
        thread.start()
        thread.join()
    assert fused(built[0]) == 0


def test_an_exception_inside_comes_through():
    with pytest.raises(ZeroDivisionError), patch_on_load():
        raise ZeroDivisionError


def test_a_constructor_that_fails_does_not_spoil_the_next():
    with patch_on_load() as reports:
        with pytest.raises(Exception, match=r"heads|divisible|dimension|size"):
            LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": -1}))
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert fused(model) == 2 and len(reports) == 1


@pytest.mark.parametrize("build, message", [(tiny_gpt2, "nothing was fused"), (lambda: None, "no transformers")])
def test_nothing_fused_is_an_error(build, message):
    with pytest.raises(ValueError, match=message), patch_on_load():
        build()
    with patch_on_load(strict=False):
        build()


def test_unknown_options_and_patterns():
    with pytest.raises(TypeError, match="unknown option colour; the options are activation"), patch_on_load(colour=1):
        pass
    with pytest.raises(ValueError, match="matches no module name"), patch_on_load(only="Nothing"):
        tiny_llama()


@pytest.mark.skipif(
    not hasattr(transformers, "fusion_mapping") and "fusion_config" not in BASE.from_pretrained.__code__.co_varnames,
    reason="this transformers has no fusion_config",
)
def test_fusion_config(checkpoint):
    from transformers.monkey_patching import clear_patch_mapping

    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, fusion_config={"swiglu": True})
        assert fused(model) == 2
        # The mapping is by class name and lasts; a GELU-gated configuration of the class must stay what it is.
        with patch_on_load():
            assert fused(AutoModelForCausalLM.from_pretrained(checkpoint)) == 2
        gelu = AutoModelForCausalLM.from_pretrained(checkpoint, hidden_act="gelu", fusion_config={"swiglu": True})
        assert fused(gelu) == 0
    finally:
        clear_patch_mapping()
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)
    assert unpatch_model(model) == 2


SCRIPT = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(**{sizes}))
print(__name__, sys.argv[1:], type(model.model.layers[0].mlp).__bases__[0].__name__)
"""


def test_run_executes_a_script_as_python_would(tmp_path, capsys, monkeypatch):
    script = tmp_path / "train_model.py"
    script.write_text(SCRIPT.format(sizes=SIZES))
    before = list(sys.argv), list(sys.path)
    with patch_on_load() as reports:
        run_script(str(script), ["--epochs", "3"])
        monkeypatch.chdir(tmp_path)
        run_script("train_model", ["x"], module=True)
    assert capsys.readouterr().out == "__main__ ['--epochs', '3'] FusedModule\n__main__ ['x'] FusedModule\n"
    assert [len(report.fused) for report in reports] == [2, 2] and (sys.argv, sys.path) == before
    with pytest.raises(FileNotFoundError, match=r"there is no script 'nowhere.py'"):
        run_script("nowhere.py")


def test_the_run_command_says_where_to_look_when_nothing_was_fused(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text(
        "from transformers import GPT2Config, GPT2Model\n"
        "GPT2Model(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128))\n"
    )
    assert cli.main(["run", str(script)]) == 0
    assert "0 MLPs fused in 1 model; `hf-swiglu inspect MODEL` says why" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "code"), [("", 0), ("sys.exit(0)", 0), ("sys.exit(3)", 3)])
def test_the_run_command_says_what_was_fused_however_the_script_ends(tmp_path, ending, code):
    script = tmp_path / "train.py"
    warning = 'transformers.utils.logging.get_logger("transformers").warning("the script\'s own warning")'
    script.write_text(f"{SCRIPT.format(sizes=SIZES)}import transformers\n{warning}\n{ending}\n")
    command = [sys.executable, "-m", "hf_swiglu", "run", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "FusedModule" in done.stdout and "hf-swiglu: 2 MLPs fused in 1 model\n" in done.stderr
    # The other commands silence transformers; a script's warnings appear as without this command.
    assert "the script's own warning" in done.stderr


def test_composite_models_are_reported_once():
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config={"model_type": "clip_vision_model", **vision})
    with patch_on_load() as reports:
        model = transformers.LlavaForConditionalGeneration(config)
    assert fused(model) == 2 and len(reports) == 1


class Reward(BASE):
    """A model of the user's own that never calls post_init."""

    config_class, _supports_sdpa = LlamaConfig, True

    def __init__(self, config, head=1):
        super().__init__(config)
        self.model, self.head = transformers.LlamaModel(config), nn.Linear(config.hidden_size, head)

    def forward(self, ids):
        return self.head(self.model(ids)[0])


def test_a_model_without_post_init_and_the_next_one_are_fused_at_once():
    config = LlamaConfig(**SIZES)
    with patch_on_load() as reports:
        reward = Reward(config, head=2)
        assert fused(reward) == 2
        policy = LlamaForCausalLM(config)
        assert fused(policy) == 2
        assert [[entry.name for entry in report] for report in reports] == [
            ["model.layers.0.mlp", "model.layers.1.mlp"]
        ] * 2
    assert sum(len(report.fused) for report in reports) == 4


def test_a_post_init_that_comes_early_is_not_the_end():
    class Early(Reward):
        def __init__(self, config):
            super().__init__(config)
            self.post_init()
            self.extra = transformers.LlamaModel(config)

    with patch_on_load() as reports:
        assert fused(Early(LlamaConfig(**SIZES))) == 4
    assert [len(report.fused) for report in reports] == [4]


def test_a_class_that_is_defined_inside_is_seen():
    with patch_on_load():

        class Late(Reward):
            def __init__(self, config):
                super().__init__(config)

        assert fused(Late(LlamaConfig(**SIZES))) == 2


@pytest.mark.parametrize("called", ["the model", "its inner model", "nothing"])
def test_mlps_put_in_after_construction(called):
    config = LlamaConfig(**SIZES)
    with patch_on_load() as reports:
        model = LlamaForCausalLM(config)
        model.model.layers[0].mlp = type(LlamaForCausalLM(config).model.layers[0].mlp).__bases__[1](config)
        assert fused(model) == 1
        if called == "the model":
            model(tokens())
        elif called == "its inner model":
            # As PEFT's wrappers do, which call `forward` themselves.
            model.forward(tokens())
        if called != "nothing":
            assert fused(model) == 2
    assert fused(model) == 2
    assert [len(report.fused) for report in reports] == [2, 2]


def test_a_model_inside_another_is_counted_once():
    config = LlamaConfig(**SIZES)

    class Around(BASE):
        config_class, _supports_sdpa = LlamaConfig, True

        def __init__(self, config, inner):
            super().__init__(config)
            self.inner = inner

    with patch_on_load() as reports:
        outer = Around(config, LlamaForCausalLM(config))
    assert fused(outer) == 2
    assert sum(len(report.fused) for report in reports) == 2


@pytest.mark.slow
def test_calls_and_compilation_inside_are_what_they_were():
    with patch_on_load():
        model = tiny_llama()
        expected = model(tokens()).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens()).logits, expected)


WITH_CHILDREN = """
import multiprocessing, sys, threading
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build(out):
    model = LlamaForCausalLM(LlamaConfig(**{sizes}))
    out.put(sum(repr(module).startswith("Fused") for module in model.modules()))


def by_index(index, out):
    build(out)


if __name__ == "__main__":
    out = multiprocessing.get_context("spawn").SimpleQueue()
    thread = threading.Thread(target=build, args=(out,))
    thread.start()
    thread.join()
    for method in ("fork", "spawn"):
        child = multiprocessing.get_context(method).Process(target=build, args=(out,))
        child.start()
        child.join()
    torch.multiprocessing.spawn(by_index, (out,), nprocs=1)
    print([out.get() for _ in range(4)])
"""


@pytest.mark.slow
def test_the_run_command_carries_into_threads_and_child_processes(tmp_path):
    script = tmp_path / "parallel.py"
    script.write_text(WITH_CHILDREN.replace("{sizes}", repr(SIZES)))
    command = [sys.executable, "-m", "hf_swiglu", "run", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[2, 2, 2, 2]\n"
    assert done.stderr.count("2 MLPs fused in 1 model\n") == 4 and "hf-swiglu in SpawnProcess" in done.stderr
