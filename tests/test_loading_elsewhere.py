"""Fusing what others build: remote code, quantisers, and scripts under a launcher."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import SIZES, fused, tokens
from support.processes import free_port
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto as quantizers
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_swiglu import patch_on_load

ROOT = Path(__file__).parent.parent

REMOTE = """
import torch
from support.processes import free_port
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

class RemoteConfig(LlamaConfig):
    model_type = "remote_llama"

class RemoteMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.both = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.back = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states):
        a, b = self.both(states).chunk(2, dim=-1)
        return self.back(nn.functional.silu(a) * b)

class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = RemoteMLP(config)
        self.post_init()
"""


def test_remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "modeling_remote.py").write_text(REMOTE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import modeling_remote

    config = modeling_remote.RemoteConfig(**SIZES)
    config.auto_map = {
        "AutoConfig": "modeling_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    torch.manual_seed(0)
    modeling_remote.RemoteForCausalLM(config).save_pretrained(tmp_path / "model")
    shutil.copy(tmp_path / "modeling_remote.py", tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    with patch_on_load(verify=True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    assert fused(model) == 2 and fused(plain) == 0
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)


class HalvesConfig(QuantizationConfigMixin):
    """A quantiser that needs no library and no GPU: each weight rounded to halves."""

    def __init__(self, **kwargs):
        self.quant_method = "halves"


class HalvesLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 2).round() / 2)


class HalvesQuantizer(HfQuantizer):
    requires_calibration = False
    is_serializable = is_trainable = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    quantised = HalvesLinear(child.in_features, child.out_features, bias=child.bias is not None)
                    setattr(module, name, quantised)

    def _process_model_after_weight_loading(self, model, **kwargs):
        return model


def test_quantised_projections(checkpoint, monkeypatch):
    monkeypatch.setitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "halves", HalvesConfig)
    monkeypatch.setitem(quantizers.AUTO_QUANTIZER_MAPPING, "halves", HalvesQuantizer)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=HalvesConfig())
    with patch_on_load(verify=True):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=HalvesConfig())
    assert fused(model) == 2 and type(model.model.layers[0].mlp.gate_proj) is HalvesLinear
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)


SCRIPT = """
import os, sys
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(**{sizes}))
fused = type(model.model.layers[0].mlp).__bases__[0].__name__
# One write: the two processes share the output.
sys.stdout.write(" ".join(map(str, ["rank", os.environ["RANK"], sys.argv[1:], fused])) + chr(10))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_run_under_a_launcher(launcher, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(sizes=SIZES))
    port = str(free_port())
    two = ["--config_file", str(ROOT / "examples" / "configs" / "ddp.yaml"), "--num_processes", "2"]
    launch = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
        "accelerate launch": ["accelerate.commands.launch", *two, "--main_process_port", port],
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", *launch[launcher], "-m", "hf_swiglu", "run", str(script), "--epochs", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} ['--epochs', '3'] FusedModule" in done.stdout
    assert done.stderr.count("hf-swiglu: 2 MLPs fused in 1 model\n") == 2
