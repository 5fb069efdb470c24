"""One real model before and after `patch_model`: compares outputs, time and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_swiglu.commands import doctor, models
from hf_swiglu.commands.console import progress
from hf_swiglu.commands.inspection import nothing_to_fuse
from hf_swiglu.commands.peak_memory import peak_bytes
from hf_swiglu.commands.phases import (
    DECODED_TOKENS,
    PREFILL_TOKENS,
    TRAINING_BATCH,
    generate,
    phases,
    sample_tokens,
)
from hf_swiglu.commands.timing import Ratio, Times, take_turns
from hf_swiglu.patching.patch_model import patch_model
from hf_swiglu.patching.report import PatchReport

_WINDOW = 256
_PROMPT_TOKENS, _CONTINUATION_TOKENS = 64, 40

_LABELS = {
    "prefill": f"prefill, 1 x {PREFILL_TOKENS}",
    "decode": f"decode, {DECODED_TOKENS} tokens",
    "training": "training, {} x {}".format(*TRAINING_BATCH),
}

# Four digits; float32 rounding changes a perplexity by about one in 10^7.
_EQUAL_PERPLEXITY = 1e-5


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model for the sample text."""

    perplexity: float
    continuation: tuple[int, ...]

    def equals(self, other: Outputs) -> bool:
        close = abs(self.perplexity - other.perplexity) <= _EQUAL_PERPLEXITY * other.perplexity
        return close and self.continuation == other.continuation


@dataclass(frozen=True)
class Measurement:
    """Time and peak memory of one phase; element 0 of each pair is before patching, element 1 after."""

    phase: str
    times: tuple[Times, Times]
    peak_bytes: tuple[int, int]


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo; element 0 of each pair is before patching, element 1 after."""

    report: PatchReport
    outputs: tuple[Outputs, Outputs]
    measurements: list[Measurement]

    @property
    def equal(self) -> bool:
        return self.outputs[1].equals(self.outputs[0])


def run_demo(
    given: str = models.PACKAGED, *, seconds: float = 60, show: Callable[[object], None] = print
) -> DemoResult:
    """Load a causal language model in float32, and compare it before and after `patch_model`.

    Args:
        given: a Hub id, a folder, a .gguf file, or "smollm2".
        seconds: how long to measure; at least one round is completed.
        show: receives every line, and the closing `rich.table.Table`.

    Raises:
        ModelError: no such model, or nothing to fuse in it.
    """
    device = doctor.default_device()
    show(doctor.environment(device))
    source = models.resolve(given)
    show(f"loading {source.given} in float32")
    model, tokenizer = models.load(source, device)
    tokens = sample_tokens(tokenizer, device)

    patched = models.copy_sharing_parameters(model)
    report = patch_model(patched, strict=False)
    if not report.fused:
        raise models.ModelError(nothing_to_fuse(type(model).__name__, report))
    show(report)
    before, after = _outputs(model, tokens), _outputs(patched, tokens)
    _show_outputs(before, after, tokenizer, show)

    show(f"measuring for about {seconds:g} s; each phase runs before and after patching, in turns")
    result = DemoResult(report, (before, after), _measure(model, patched, tokens, seconds))
    show(table(result))
    return result


def table(result: DemoResult) -> Table:
    """The closing table; a ratio above 1 means that the patched model takes less by that factor."""
    rows = Table(
        box=box.SIMPLE, title="medians of the rounds; ratio above 1: less after patching", title_justify="left"
    )
    rows.add_column("phase")
    for name in ("before", "after", "ratio", "faster in"):
        rows.add_column(name, justify="right")
    for row in result.measurements:
        before, after = (times.median for times in row.times)
        ratio = Ratio.of(*row.times)
        judged = " noise" if ratio.is_noise else " slower" if ratio.median < 1 else ""
        won = f"{ratio.rounds_won} of {len(ratio.rounds)}"
        cells = (f"{before * 1e3:,.1f} ms", f"{after * 1e3:,.1f} ms", f"{ratio.median:.2f}x{judged}", won)
        rows.add_row(f"{row.phase}: time", *cells)
    for row in result.measurements:
        before, after = row.peak_bytes
        less = f"{before / after:.2f}x" + ("" if before >= after else " more")
        rows.add_row(f"{row.phase}: memory", f"{before / 1e6:,.1f} MB", f"{after / 1e6:,.1f} MB", less, "")
    rows.caption = (
        "ratio: the median of before/after in each round, not of the two columns\n"
        "noise: fewer than 4 rounds, or the middle half of them is on both sides of 1\n"
        "training: forward and backward\n"
        "memory: peak of what the phase allocates, beside the weights"
    )
    rows.caption_justify = "left"
    return rows


def _outputs(model: PreTrainedModel, tokens: Tensor) -> Outputs:
    continuation = generate(model, tokens[:, :_PROMPT_TOKENS], _CONTINUATION_TOKENS)[0, _PROMPT_TOKENS:]
    return Outputs(_perplexity(model, tokens), tuple(continuation.tolist()))


@torch.no_grad()
def _perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    losses = []
    for window in tokens.split(_WINDOW, dim=1):
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits.double(), window[0, 1:], reduction="none"))
    return torch.cat(losses).mean().exp().item()


def _show_outputs(
    before: Outputs, after: Outputs, tokenizer: PreTrainedTokenizerBase, show: Callable[[object], None]
) -> None:
    same = "identical" if before.continuation == after.continuation else "DIFFERENT"
    show(f"perplexity on The Tempest: {before.perplexity:.6f} before, {after.perplexity:.6f} after")
    show(f"greedy continuation, {len(after.continuation)} tokens: {same} before and after")
    show("  ..." + " ".join(str(tokenizer.decode(list(after.continuation))).split()))


def _measure(model: PreTrainedModel, patched: PreTrainedModel, tokens: Tensor, seconds: float) -> list[Measurement]:
    """The peak memory of each phase, whose measurement is also the warm-up, and then its time."""
    before, after = phases(model, tokens), phases(patched, tokens)
    share = seconds / (len(before) + len(after))
    results = []
    for phase, label in progress(_LABELS.items(), "measuring"):
        functions = {"before": before[phase], "after": after[phase]}
        peaks = [peak_bytes(function, model.device) for function in functions.values()]
        times = take_turns(functions, share, model.device, fewest_rounds=1, calls=1)
        results.append(Measurement(label, (times["before"], times["after"]), (peaks[0], peaks[1])))
    return results
