"""The memory of a training step with each `keep` and `tile`, from a model's config alone."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from transformers import PreTrainedModel

from hf_swiglu.commands.console import progress
from hf_swiglu.commands.inspection import build_on_meta, nothing_to_fuse
from hf_swiglu.commands.models import ModelError, enable_checkpointing, load_config, resolve
from hf_swiglu.commands.simulation import ATTENTION, Cost, simulate
from hf_swiglu.patching.patch_model import patch_model, unpatch_model

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
TILE = 512
# In ascending order of extra arithmetic; the first that fits is proposed.
SETTINGS: tuple[tuple[str, dict[str, int] | None], ...] = (
    ("unpatched", None),
    ("keep=3", {"keep": 3}),
    ("keep=2", {"keep": 2}),
    ("keep=1", {"keep": 1}),
    ("keep=0", {"keep": 0}),
    (f"tile={TILE}", {"keep": 0, "tile": TILE}),
)
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Row:
    """One setting: `options` are those of `patch_model`, None for the unpatched model; `fits` is None without a budget.

    `extra_percent` is the arithmetic that backward repeats, in percent of the unpatched step's matrix products.
    """

    setting: str
    options: dict[str, int] | None
    mlp_bytes: int
    peak_bytes: int
    extra_percent: float
    fits: bool | None


@dataclass(frozen=True)
class Plan:
    """A model, the number of tokens of a step, and the cost of the step with each setting.

    Peaks are weights, gradients, AdamW's two states, and the peak of the tensors alive in forward and backward, among
    them `logits_bytes` of float32 logits.
    """

    model: str
    tokens: int
    dtype: str
    checkpointing: bool
    budget_bytes: int | None
    weight_bytes: int
    optimizer_bytes: int
    logits_bytes: int
    rows: tuple[Row, ...]

    @property
    def proposal(self) -> Row | None:
        """The setting with the least extra arithmetic that fits the budget; the default without a budget."""
        patched = [row for row in self.rows if row.options is not None and row.options["keep"] != 3]
        return next((row for row in patched if row.fits is not False), None)

    @property
    def is_peak_elsewhere(self) -> bool:
        """Whether no setting changes the peak by 1 %: it is not in the MLPs."""
        peaks = [row.peak_bytes for row in self.rows]
        return max(peaks) - min(peaks) < 0.01 * max(peaks)

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self) | {"proposal": self.proposal.setting if self.proposal else None}


def plan_memory(
    given: str,
    *,
    tokens: int,
    dtype: str = "bf16",
    checkpointing: bool = False,
    budget: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Simulate a training step of one sequence on the meta device, unpatched and with each setting.

    Args:
        given: a Hub id, a folder with a config.json, a .gguf file, or "smollm2".
        tokens: of the sequence. A batch of such sequences multiplies the tensors of forward and backward.
        dtype: of weights, gradients and optimizer states: "bf16", "fp16", "fp32", or PyTorch's name, as "bfloat16".
        checkpointing: with gradient checkpointing.
        budget: such as "24GB" or "80GiB".
        trust_remote_code: run the code that the repository ships, where transformers has no class for it.

    Raises:
        ModelError: there is no such model, it has nothing to patch, or its forward does not run on the meta device.
        ValueError: an unknown dtype, a number of tokens below 1, or a budget that cannot be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES)}; got {dtype!r}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1; got {tokens}")
    limit = None if budget is None else read_bytes(budget)
    config = load_config(resolve(given), trust_remote_code=trust_remote_code)
    model = build_on_meta(given, config, trust_remote_code).train()
    model.to(DTYPES[dtype])  # type: ignore[arg-type]
    model.set_attn_implementation(ATTENTION)
    if checkpointing:
        enable_checkpointing(model)
    # With keep=0, so that MLPs with activations other than SiLU are included.
    report = patch_model(model, keep=0, strict=False)
    mlps = [entry.name for entry in (*report.fused, *report.memory_only)]
    if not mlps:
        raise ModelError(nothing_to_fuse(type(model).__name__, report))
    unpatch_model(model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rows: list[Row] = []
    unpatched: Cost | None = None
    for setting, options in progress(SETTINGS, "simulating training steps"):
        if options is not None:
            patch_model(model, strict=False, **options)  # type: ignore[arg-type]
        cost = _step(model, mlps, tokens)
        unpatch_model(model)
        unpatched = unpatched or cost
        peak = 3 * weights + cost.peak
        extra = 100 * (cost.flops / unpatched.flops - 1)
        rows.append(
            Row(setting, options, cost.kept_by_modules, peak, round(extra, 2), None if limit is None else peak <= limit)
        )
    logits = 4 * tokens * getattr(config.get_text_config(), "vocab_size", 0)
    return Plan(given, tokens, dtype, checkpointing, limit, weights, 2 * weights, logits, tuple(rows))


def table(plan: Plan) -> Table:
    """The plan for people to read."""
    rows = Table(box=box.SIMPLE, title_justify="left", caption_justify="left")
    steps = ", gradient checkpointing" if plan.checkpointing else ""
    rows.title = f"{plan.model}: one training step, 1 x {plan.tokens:,} tokens, {plan.dtype}{steps}"
    rows.add_column("setting")
    for name in ("MLPs keep", "peak", "arithmetic"):
        rows.add_column(name, justify="right")
    if plan.budget_bytes is not None:
        rows.add_column(f"fits {_gigabytes(plan.budget_bytes)}")
    for row in plan.rows:
        cells = [row.setting, _gigabytes(row.mlp_bytes), _gigabytes(row.peak_bytes), f"+ {row.extra_percent:.1f} %"]
        rows.add_row(*cells, *([] if row.fits is None else ["yes" if row.fits else "no"]))
    # rich wraps a caption to the table's width, 47 columns at least.
    rows.caption = "\n".join(
        [
            f"peak: weights {_gigabytes(plan.weight_bytes)}, as much for gradients,",
            f"  {_gigabytes(plan.optimizer_bytes)} for AdamW in the same dtype, activations",
            f"  (logits in float32: {_gigabytes(plan.logits_bytes)})",
            "arithmetic: of the whole step",
            _advice(plan),
        ]
    )
    return rows


def read_bytes(text: str) -> int:
    """The number of bytes in "24GB", "80 GiB" or "500m".

    Raises:
        ValueError: it cannot be read.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]I?)B?|B)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f'the budget must be a number and a unit, such as "24GB" or "80GiB"; got {text!r}')
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _advice(plan: Plan) -> str:
    elsewhere = "the peak is not in the MLPs and stays as it is\n" if plan.is_peak_elsewhere else ""
    if plan.budget_bytes is None:
        return f"{elsewhere}pass --budget for a proposed setting"
    if plan.proposal is not None:
        # A tile implies keep=0.
        options = plan.proposal.setting if plan.proposal.setting != "keep=2" else ""
        return f"{elsewhere}choose {plan.proposal.setting}: patch_model({', '.join(filter(None, ('model', options)))})"
    if not plan.checkpointing:
        return f"{elsewhere}none of them fits; try --checkpointing"
    return f"{elsewhere}none of them fits; shorten the sequence,\nor split the model over devices"


def _step(model: PreTrainedModel, mlps: list[str], tokens: int) -> Cost:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    modules = [model.get_submodule(name) for name in mlps]
    try:
        cost = simulate(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, modules)
    except Exception as error:
        # Any exception is possible: a forward may depend on values, which meta tensors do not have.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"{type(model).__name__} cannot be run without weights: {reason}") from error
    model.zero_grad(set_to_none=True)
    return cost


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
