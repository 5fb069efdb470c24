"""Tiny models, and small helpers, that several test files share.

Wide enough for the kernels: 2 x 40 tokens of 320 features are more elements than
`dispatch.SMALLEST_DIFFERENTIATED["cpu"]`.
"""

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
)

from hf_swiglu.patching.classes import FusedModule

HIDDEN, WIDE, VOCABULARY = 64, 320, 128
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(**options) -> LlamaForCausalLM:
    return _seeded(LlamaForCausalLM, LlamaConfig(**SIZES | options))


def tiny_phi3(**options) -> Phi3ForCausalLM:
    return _seeded(Phi3ForCausalLM, Phi3Config(**SIZES | options))


def tiny_gemma(**options) -> GemmaForCausalLM:
    return _seeded(GemmaForCausalLM, GemmaConfig(**SIZES | {"head_dim": 16} | options))


def tiny_gpt2() -> GPT2LMHeadModel:
    """A model without a gated MLP."""
    sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
    return _seeded(GPT2LMHeadModel, GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def tiny_llava() -> LlavaForConditionalGeneration:
    """A composite model: `text_config` is a LLaMA's with "silu", `vision_config` a CLIP's with "quick_gelu"."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision, image_token_index=VOCABULARY - 1)
    return _seeded(LlavaForConditionalGeneration, config)


def _seeded(model_class, config):
    torch.manual_seed(0)
    return model_class(config).eval()


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, 40), generator=torch.Generator().manual_seed(seed))


def hidden_states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 40, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)


def fused(model: nn.Module) -> int:
    """How many modules of the model are fused."""
    return sum(isinstance(module, FusedModule) for module in model.modules())


class GatedMLP(nn.Module):
    """A gated MLP for lookalikes to inherit from: as LLaMA's, with names that no library knows."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, WIDE, bias=False)
        self.w3 = nn.Linear(HIDDEN, WIDE, bias=False)
        self.w2 = nn.Linear(WIDE, HIDDEN, bias=False)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))
