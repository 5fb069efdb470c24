"""Products of the source scan that are not the gate of an MLP. A class has no gate if rules match all of its products.

The rules match text: the class's name, the activation, and the product. They apply to classes without a fused gate, and
each rule names the kind of its products.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tools.model_support.activated_products import Product

_ANY = r"[\s\S]*"
# Activations with bounded or positive values. Gates of MLPs use them too, so no rule consists of this alone.
_SQUASHES = r".*(sigmoid|tanh|softplus|Sigmoid|Tanh|Softplus)"


@dataclass(frozen=True)
class Rule:
    """Full matches of the class's name, of the activation and of the product's source; all three must hold."""

    reason: str
    cls: str = _ANY
    activation: str = _ANY
    source: str = _ANY

    def holds(self, cls: str, product: Product) -> bool:
        texts = ((self.cls, cls), (self.activation, product.activation), (self.source, product.source))
        return all(re.fullmatch(pattern, text) for pattern, text in texts)


RULES = (
    Rule("a weight of experts or of their scores", r"\w*(Router|MoeBlock|Experts)",
         source=r".*(_weights|scores|routing_weights|weights|router_logits|shared_expert_gate)\b.*"),
    Rule("a soft cap of logits", activation=r".*tanh", source=r".*(soft_?cap|\bcap\b).*"),
    Rule("an output gate of attention", r"\w*(Attention|GatedProjection|PairWeightedAveraging|FoldDiffusionLayer)",
         _SQUASHES, r"(.* )?(attn_output|output|o|y|gate)\b.*"),
    Rule("an output gate of attention, and one of a transition", r"EsmFold2DiffusionLayer", _SQUASHES),
    Rule("a decay of linear attention's queries, keys or states", r"\w*Attention", source=r"\w+ \* \w*_decay"),
    Rule("a scale of attention's queries, keys or positions", r"\w*(Attention|PoolingHead)", _SQUASHES),
    Rule("a scale of attention's queries, made once at initialisation", r"Gemma3n\w+", _SQUASHES, r"q_scale \*.*"),
    Rule("the gate of a norm, behind a state-space or linear attention", r"\w*(RMSNormGated|GatedRMSNorm)"),
    Rule("a state-space or linear-attention recurrence",
         r"\w*(Mamba2?Mixer|Bamba\w*Mixer|FalconH1Mixer|MambaLayer|GatedDeltaNet|Parcae|ForgetGate|Rglru)"),
    Rule("the gate of a short convolution's output", r"\w*ShortConv", source=r"C \*.*"),
    Rule("a product with a mask", source=r".*\* \(?\w*mask\b.*|\w*mask\w* \*.*"),
    Rule("a scale from the config",
         source=r".*\* \(?(1 - )?self\.(config\.)?\w*(scale|scaling\w*|prob|max_depth)\w*\)?"),
    Rule("swish written out: x times its own sigmoid, and no other factor", source=r"(\w+) \* torch\.sigmoid\(\1\)"),
    Rule("a gate of a residual or of hyper-connections",
         r"\w*(HyperConnection|HyperHead|ResidualGate|GatedResidual|DFineGate|Deimv2Gate|PLELayer)", _SQUASHES),
    Rule("a learned parameter that gates a residual", activation=r".*[Tt]anh|self\.act_(cross_attn|dense)",
         source=r".*self\.(alpha_|gate|cross_attn)\w*.*"),
    Rule("squeeze and excitation: a sigmoid of the pooled input weighs its channels",
         r"\w*(SELayer|Squeeze\w*Excit\w+|SelectiveFeatureFusion|AFFBlock)"),
    Rule("a sigmoid gate of a protein fold's pairs or conditions", r"EsmFold\w*(MultiplicativeUpdate|LayerNorm)"),
    Rule("an activation with two inputs, counted in the class that calls it", r"\w*SwiGLU",
         source=r"self\.gate_softcap\(gate\).*"),
    Rule("the output of a whole gated MLP, scaled", source=r"mlp_gate \* mlp_output"),
    Rule("a prediction squashed into its range",
         r"\w*(Head|SeedBinRegressor|BinomialSoftmax|ForDepthEstimation|FeaturesToDepth|ScalarQuantization)"),
    Rule("a training loss or a matching cost", r"\w*(Loss|Matcher)"),
    Rule("boxes, masks, positions or scores of detected objects",
         r"(\w*Detr|Sam|EdgeTam|PPDocLayout)\w*(Model|Decoder|Encoder|Fusion)", r".*(sigmoid|relu|ref_point_head)"),
    Rule("a quantisation step, which returns an activation and its scale", r"IBert\w+"),
    Rule("a gate over time of a recurrent or autoregressive cell", r"xLSTMLayer|VitsWaveNet|UnivNetLvc\w+"),
    Rule("an index score, summed over heads", r"\w*Indexer(Scorer)?", r".*relu"),
    Rule("an activation's own forward and backward", r"GeLUFunction"),
)  # fmt: skip


def why_not_mlp_gate(cls: str, products: Sequence[Product]) -> str | None:
    """The kinds of the class's products, if none of them is the gate of an MLP; None otherwise."""
    reasons = [next((rule.reason for rule in RULES if rule.holds(cls, product)), None) for product in products]
    return None if None in reasons else "; ".join(dict.fromkeys(filter(None, reasons)))
