"""The status of every class, and docs/model-support.md, which is the same for the same transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

FUSED, OTHER, DECLINED, NO_GATE, FAILED = "fused", "another activation", "declined", "not an MLP gate", "failed"
STATUSES = (FUSED, OTHER, DECLINED, NO_GATE, FAILED)

_SECTIONS = {
    FAILED: "Failed",
    DECLINED: "Declined",
    OTHER: "Another activation",
    FUSED: "Fused",
    NO_GATE: "Not an MLP gate",
}

_INTRODUCTION = """\
# Model support

Every class in the installed transformers that multiplies an activated tensor by another, and what `patch_model` does
with it. `make coverage` writes this page; do not edit it.

Two independent counts are compared. One reads the source of every `modeling_*.py` and lists each class with such a
product. The other builds every model type with its default config, but few layers, and searches the modules for gated
products. For each fused class one small instance runs with random weights before and after, and the output and every
gradient are compared with float64: the error may be 1.5 times that of PyTorch in float32, + 1e-6. Experts are compared
under `eager`, `batched_mm` and `grouped_mm`.
"""


@dataclass(frozen=True)
class ClassStatus:
    """One class of the scan. `failed` is a fault of hf_swiglu or of this tool."""

    family: str
    name: str
    kind: str
    activation: str
    status: str
    reason: str = ""

    @property
    def silu_gated(self) -> bool:
        """Whether it is a gated MLP whose gate, in the default config, is SiLU or a variant of it."""
        return self.status in (FUSED, DECLINED, FAILED)


@dataclass(frozen=True)
class ModelSupport:
    """Every class of the source scan with its status, and the model types that could not be built."""

    version: str
    rows: tuple[ClassStatus, ...]
    # Classes with a SwiGLU that recognition found and the source scan did not: faults of the scan.
    missed_by_scan: tuple[str, ...]
    # Model type -> why it could not be built. Its classes are in other models, or were built by themselves.
    unbuilt: dict[str, str]
    model_types: int

    @property
    def totals(self) -> dict[str, int]:
        counts = Counter(row.status for row in self.rows)
        return {status: counts[status] for status in STATUSES}

    @property
    def fused_share(self) -> float:
        """The fused part of the SiLU-gated classes."""
        gated = [row for row in self.rows if row.silu_gated]
        return sum(row.status == FUSED for row in gated) / len(gated)

    def to_markdown(self) -> str:
        """The text of docs/model-support.md."""
        parts = [_INTRODUCTION, _totals(self)]
        for status, title in _SECTIONS.items():
            rows = [row for row in self.rows if row.status == status]
            if rows:
                parts.append(f"## {title}\n\n{_table(rows)}")
        return "\n".join(parts)


def _totals(support: ModelSupport) -> str:
    totals = support.totals
    gated = sum(row.silu_gated for row in support.rows)
    kinds = Counter(row.kind for row in support.rows if row.status == FUSED)
    lines = [
        f"- transformers {support.version}: {support.model_types} model types",
        f"- {len(support.rows)} classes in the source scan",
        f"- {totals[FUSED]} fused: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        f"- {totals[OTHER]} another activation than SiLU",
        f"- {totals[DECLINED]} declined",
        f"- {totals[NO_GATE]} not an MLP gate",
        f"- {totals[FAILED]} failed",
        f"- **{100 * support.fused_share:.1f} % of the {gated} SiLU-gated classes are fused**",
    ]
    if support.missed_by_scan:
        lines.append(f"- fused, but not in the source scan: {', '.join(support.missed_by_scan)}")
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[ClassStatus]) -> str:
    lines = ["| family | class | kind | activation | status | reason |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = (row.family, row.name, row.kind, f"`{row.activation}`", row.status, row.reason)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
