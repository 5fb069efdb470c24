"""What patching did, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hf_swiglu.patching.memory import DEFAULT_KEEP

Verdict = Literal["fused", "already fused", "memory only", "skipped"]
FUSED: Verdict = "fused"
ALREADY_FUSED: Verdict = "already fused"
# A gate with another activation: no kernel computes it, and `keep` and `tile` apply all the same.
MEMORY_ONLY: Verdict = "memory only"
SKIPPED: Verdict = "skipped"


@dataclass(frozen=True)
class Entry:
    """What became of one module.

    `reason` says why it was not fused. `keep` and `tile` are what it got, None where it was skipped, and `note` says
    why that is not what was asked for.
    """

    name: str
    class_name: str
    verdict: Verdict
    kind: str = ""
    activation: str = ""
    reason: str = ""
    keep: int | None = None
    tile: int | None = None
    note: str = ""

    @property
    def memory(self) -> str:
        """What differs from the default, "keep=0, tile=512" for instance."""
        settings = ("keep", None if self.keep == DEFAULT_KEEP else self.keep), ("tile", self.tile)
        return ", ".join(f"{name}={value}" for name, value in settings if value is not None)


class PatchReport(Sequence[Entry]):
    """Every module that was fused, or that looked like a gated MLP and was skipped, in the model's order.

    Print it to read it; index or iterate it, or use `fused`, `already_fused`, `memory_only` and `skipped`, to compute
    with it.

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
    def memory_only(self) -> list[Entry]:
        return [entry for entry in self if entry.verdict == MEMORY_ONLY]

    @property
    def skipped(self) -> list[Entry]:
        return [entry for entry in self if entry.verdict == SKIPPED]

    def __str__(self) -> str:
        groups = defaultdict(list)
        for entry in self:
            groups[dataclasses.replace(entry, name="")].append(entry.name)
        counts = [f"{len(self.fused)} fused", f"{len(self.already_fused)} already fused"]
        counts += [f"{len(self.memory_only)} memory only"] if self.memory_only else []
        lines = [f"gated MLPs: {', '.join([*counts, f'{len(self.skipped)} skipped'])}"]
        for entry, names in groups.items():
            where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            parts = [entry.reason or f"{entry.kind} gate and up, {entry.activation}", entry.memory, entry.note]
            what = "; ".join(part for part in parts if part)
            lines.append(f"  {entry.verdict}: {len(names)} x {entry.class_name} ({where}): {what}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<PatchReport: {self!s}>"
