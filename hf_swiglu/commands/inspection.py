"""Reports what `patch_model` would fuse in a model, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_swiglu.commands.models import ModelError, load_config, resolve
from hf_swiglu.patching.patch_model import patch_model
from hf_swiglu.patching.report import PatchReport


@dataclass(frozen=True)
class Inspection:
    """A model built without weights, and the report of `patch_model` on it."""

    class_name: str
    model_type: str
    parameters: int
    report: PatchReport

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "report": self.report.to_json()}

    def __str__(self) -> str:
        return (
            f"{self.class_name} ({self.model_type}), {self.parameters / 1e6:,.1f} M parameters, from its config alone\n"
            f"patch_model would report {self.report}"
        )


def inspect_model(given: str, *, trust_remote_code: bool = False) -> Inspection:
    """Build the model on the meta device, without loading a weight, and patch that.

    Args:
        given: a Hub id, a folder with a config.json, a .gguf file, or "smollm2".
        trust_remote_code: run the code that the repository ships, where transformers has no class for it.

    Raises:
        ModelError: there is no such model, or it cannot be built.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig
        >>> from hf_swiglu.commands.inspection import inspect_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        ...     print(inspect_model(folder))
        LlamaForCausalLM (llama), 6,738.4 M parameters, from its config alone
        patch_model would report gated MLPs: 32 fused, 0 already fused, 0 skipped
          fused: 32 x LlamaMLP: separate gate and up, SiLUActivation
            model.layers.0.mlp ... model.layers.31.mlp
    """
    config = load_config(resolve(given), trust_remote_code=trust_remote_code)
    model = build_on_meta(given, config, trust_remote_code)
    report = patch_model(model, strict=False)
    return Inspection(type(model).__name__, config.model_type, model.num_parameters(), report)


def nothing_to_fuse(class_name: str, report: PatchReport) -> str:
    """Why a model has no module to fuse, in one line."""
    why = "every gated MLP was skipped" if report else "no module multiplies an activated projection by another"
    return f"nothing to fuse in {class_name}: {why}"


def build_on_meta(given: str, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a config on the meta device: shapes, and no weights.

    Raises:
        ModelError: it cannot be built.
    """
    try:
        with torch.device("meta"):
            return _build(config, trust_remote_code)
    except Exception as error:
        # Any exception is possible: the class may not support the meta device, and the config may be written by hand.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"cannot build {given} from its config: {reason}") from error


def _build(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    own_code = trust_remote_code and hasattr(config, "auto_map")
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is not None and not own_code:
        return model_class(config)
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError:
        # Not a language model: an encoder, a vision or an audio model.
        return AutoModel.from_config(config, trust_remote_code=trust_remote_code)
