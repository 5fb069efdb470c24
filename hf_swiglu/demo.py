"""One real model before and after `patch_model`: the same outputs, and what changes in time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_swiglu import doctor, models
from hf_swiglu.inspection import nothing_to_fuse
from hf_swiglu.measuring import default_device, peak_bytes, seconds_of
from hf_swiglu.patching.patch import patch_model, unpatch_model
from hf_swiglu.patching.report import PatchReport

WINDOW = 256
PROMPT_TOKENS, CONTINUATION_TOKENS = 64, 40
DECODED_TOKENS = 8

# Four digits; float32 rounding moves a perplexity by about one in 10^7.
_EQUAL_PERPLEXITY = 1e-5


@dataclass(frozen=True)
class Outputs:
    """What a model computes from the sample text."""

    perplexity: float
    continuation: tuple[int, ...]

    def equals(self, other: Outputs) -> bool:
        close = abs(self.perplexity - other.perplexity) <= _EQUAL_PERPLEXITY * other.perplexity
        return close and self.continuation == other.continuation


@dataclass
class Measurement:
    """One phase, before and after: seconds round by round, and peak bytes."""

    phase: str
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    peak_bytes: list[int] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Round by round, whose two halves stood next to each other: a median of these outlives a machine's moods."""
        return sorted(before / after for before, after in zip(*self.seconds, strict=True))

    @property
    def rounds_won(self) -> int:
        return sum(after < before for before, after in zip(*self.seconds, strict=True))


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found; element 0 of each pair is before patching, element 1 after."""

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
    device = default_device()
    show(doctor.environment(device))
    source = models.resolve(given)
    show(f"loading {source.given} in float32")
    model, tokenizer = models.load(source, device)
    tokens = sample_tokens(tokenizer, device)

    before = _outputs(model, tokens)
    report = patch_model(model, strict=False)
    if not report.fused:
        raise models.ModelError(nothing_to_fuse(type(model).__name__, report))
    show(report)
    after = _outputs(model, tokens)
    unpatch_model(model)
    _show_outputs(before, after, tokenizer, show)

    show(f"measuring for about {seconds:g} s; each round runs every phase before and after patching")
    measurements = _measure(model, tokens, seconds)
    result = DemoResult(report, (before, after), measurements)
    show(table(result))
    return result


def table(result: DemoResult) -> Table:
    """The closing table; a ratio above 1 means that the patched model takes that much less."""
    rounds = len(result.measurements[0].seconds[0])
    rows = Table(
        box=box.SIMPLE, title=f"medians of {rounds} rounds; ratio above 1: patching helps", title_justify="left"
    )
    rows.add_column("phase")
    for name in ("before", "after", "ratio", "faster in"):
        rows.add_column(name, justify="right")
    for row in result.measurements:
        before, after = (statistics.median(seconds) for seconds in row.seconds)
        ratio = f"{statistics.median(row.ratios):.2f}x" + _judged(row.ratios)
        won = f"{row.rounds_won} of {rounds}"
        rows.add_row(f"{row.phase}: time", f"{before * 1e3:,.1f} ms", f"{after * 1e3:,.1f} ms", ratio, won)
    for row in result.measurements:
        before, after = row.peak_bytes
        ratio = f"{before / after:.2f}x" + ("" if before >= after else " more")
        rows.add_row(f"{row.phase}: memory", f"{before / 1e6:,.1f} MB", f"{after / 1e6:,.1f} MB", ratio, "")
    rows.caption = (
        "noise: the middle half of the rounds has ratios above 1 and below\ntraining: forward and backward\n"
        "memory: peak of what the phase allocates, beside the weights"
    )
    rows.caption_justify = "left"
    return rows


def _judged(ratios: list[float]) -> str:
    """What the middle half of the rounds says."""
    quarter = len(ratios) // 4
    lowest, highest = ratios[quarter], ratios[-1 - quarter]
    return " slower" if highest < 1 else "" if lowest > 1 else " noise"


def sample_tokens(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Tensor:
    """Miranda and Prospero, The Tempest, Act I Scene 2, after Project Gutenberg's text, as one row of tokens."""
    text = resources.files("hf_swiglu").joinpath("sample.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids.to(device)
    if tokens.shape[1] < 2 * WINDOW:
        raise models.ModelError(f"the tokenizer makes {tokens.shape[1]} tokens of the sample text; expected over 512")
    return tokens


def _outputs(model: PreTrainedModel, tokens: Tensor) -> Outputs:
    continuation = generate(model, tokens[:, :PROMPT_TOKENS], CONTINUATION_TOKENS)[0, PROMPT_TOKENS:]
    return Outputs(_perplexity(model, tokens), tuple(continuation.tolist()))


@torch.no_grad()
def _perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    losses = []
    for window in tokens.split(WINDOW, dim=1):
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits.double(), window[0, 1:], reduction="none"))
    return torch.cat(losses).mean().exp().item()


def generate(model: PreTrainedModel, prompt: Tensor, count: int) -> Tensor:
    """Exactly `count` more tokens, greedily."""
    return model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=1,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )


def _show_outputs(
    before: Outputs, after: Outputs, tokenizer: PreTrainedTokenizerBase, show: Callable[[object], None]
) -> None:
    same = "identical" if before.continuation == after.continuation else "DIFFERENT"
    show(f"perplexity on The Tempest: {before.perplexity:.6f} before, {after.perplexity:.6f} after")
    show(f"greedy continuation, {len(after.continuation)} tokens: {same} before and after")
    show("  ..." + " ".join(str(tokenizer.decode(list(after.continuation))).split()))


def _phases(model: PreTrainedModel, tokens: Tensor) -> dict[str, Callable[[], object]]:
    batch = tokens[:, : 2 * WINDOW].reshape(2, WINDOW)

    def training_step() -> None:
        model.train()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        model.eval()

    return {
        f"prefill, 1 x {2 * WINDOW}": lambda: generate(model, tokens[:, : 2 * WINDOW], 1),
        f"decode, {DECODED_TOKENS} tokens": lambda: generate(model, tokens[:, :PROMPT_TOKENS], DECODED_TOKENS),
        f"training, 2 x {WINDOW}": training_step,
    }


def _measure(model: PreTrainedModel, tokens: Tensor, seconds: float) -> list[Measurement]:
    """Each phase's peak memory once, which warms everything up, and then its time, round by round."""
    phases = _phases(model, tokens)
    results = {phase: Measurement(phase) for phase in phases}
    end = time.perf_counter() + seconds
    for set_up in (unpatch_model, patch_model):
        set_up(model)
        for phase, run in phases.items():
            results[phase].peak_bytes.append(peak_bytes(run, model.device))
    rounds = 0
    while rounds == 0 or time.perf_counter() < end:
        # What the machine does beside this changes by the second, so before and after stand next to each other,
        # and take turns at being first.
        order = (0, 1) if rounds % 2 == 0 else (1, 0)
        for phase, run in phases.items():
            for patched in order:
                (patch_model if patched else unpatch_model)(model)
                results[phase].seconds[patched].append(seconds_of(run, model.device))
        rounds += 1
    unpatch_model(model)
    return list(results.values())
