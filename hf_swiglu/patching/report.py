"""What patching did, for people and for programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["fused", "already fused", "skipped"]
FUSED: Verdict = "fused"
ALREADY_FUSED: Verdict = "already fused"
SKIPPED: Verdict = "skipped"


@dataclass(frozen=True)
class Entry:
    """What became of one module; `reason` says why a skipped one was skipped."""

    name: str
    class_name: str
    verdict: Verdict
    kind: str = ""
    activation: str = ""
    reason: str = ""


class PatchReport(Sequence[Entry]):
    """Every module that was fused, or that looked like a gated MLP and was skipped, in the model's order.

    Print it to read it; index or iterate it, or use `fused`, `already_fused` and `skipped`, to compute with it.

    Example:
        >>> from hf_swiglu.patching.report import Entry, PatchReport
        >>> print(PatchReport([Entry("layers.0.mlp", "LlamaMLP", "fused", "separate", "SiLU")]))
        gated MLPs: 1 fused, 0 already fused, 0 skipped
          fused: 1 x LlamaMLP (layers.0.mlp): separate gate and up, SiLU
    """

    def __init__(self, entries: Sequence[Entry]):
        self._entries = tuple(entries)

    def __getitem__(self, index):
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def fused(self) -> list[Entry]:
        return [entry for entry in self if entry.verdict == FUSED]

    @property
    def already_fused(self) -> list[Entry]:
        return [entry for entry in self if entry.verdict == ALREADY_FUSED]

    @property
    def skipped(self) -> list[Entry]:
        return [entry for entry in self if entry.verdict == SKIPPED]

    def __str__(self) -> str:
        groups = defaultdict(list)
        for entry in self:
            groups[entry.verdict, entry.class_name, entry.kind, entry.activation, entry.reason].append(entry.name)
        counts = f"{len(self.fused)} fused, {len(self.already_fused)} already fused, {len(self.skipped)} skipped"
        lines = [f"gated MLPs: {counts}"]
        for (verdict, class_name, kind, activation, reason), names in groups.items():
            where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            what = reason or f"{kind} gate and up, {activation}"
            lines.append(f"  {verdict}: {len(names)} x {class_name} ({where}): {what}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<PatchReport: {self!s}>"
