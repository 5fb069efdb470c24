"""What the census found, and the page that shows it: the same for the same transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

FUSED, OTHER, DECLINED, NO_GATE, FAILED = "fused", "another activation", "declined", "not an MLP gate", "failed"
VERDICTS = (FUSED, OTHER, DECLINED, NO_GATE, FAILED)

_SECTIONS = {
    FAILED: "Faults",
    DECLINED: "Declined",
    OTHER: "Another activation",
    FUSED: "Fused",
    NO_GATE: "Not an MLP gate",
}

_INTRODUCTION = """\
# Coverage

Every class in the installed transformers that multiplies an activated tensor by another, and what `patch_model` does
with it. `make coverage` writes this page; do not edit it.

Two counts that know nothing of each other are compared. One reads the source of every `modeling_*.py` and lists each
class with such a product. The other builds every model type with its default config, but few layers, and looks for
gated products in the modules. For each class that is fused one small instance is run with random weights before and
after, and the output and every gradient are compared with float64: the error may be 1.5 times that of PyTorch in
float32, + 1e-6. Experts are compared under `eager`, `batched_mm` and `grouped_mm`.
"""


@dataclass(frozen=True)
class Row:
    """One class of the scan. A `failed` row is a fault of this package or of the census, never a verdict to keep."""

    family: str
    name: str
    kind: str
    activation: str
    verdict: str
    reason: str = ""

    @property
    def silu_gated(self) -> bool:
        """Whether it is a gated MLP whose gate, in the default config, is SiLU or a variant of it."""
        return self.verdict in (FUSED, DECLINED, FAILED)


@dataclass(frozen=True)
class Census:
    """Every class of the source scan with its verdict, and what could not be looked at."""

    version: str
    rows: tuple[Row, ...]
    # Classes that recognition found a SwiGLU in, and the source scan did not: faults of the scan.
    missed_by_scan: tuple[str, ...]
    # Model types that could not be built here, with the reason. Their classes were reached in other ways.
    unbuilt: dict[str, str]
    model_types: int

    @property
    def totals(self) -> dict[str, int]:
        counts = Counter(row.verdict for row in self.rows)
        return {verdict: counts[verdict] for verdict in VERDICTS}

    @property
    def fused_share(self) -> float:
        """The fused part of the SiLU-gated classes."""
        gated = [row for row in self.rows if row.silu_gated]
        return sum(row.verdict == FUSED for row in gated) / len(gated)

    def to_markdown(self) -> str:
        """docs/coverage.md."""
        parts = [_INTRODUCTION, _totals(self)]
        for verdict, title in _SECTIONS.items():
            rows = [row for row in self.rows if row.verdict == verdict]
            if rows:
                parts.append(f"## {title}\n\n{_table(rows)}")
        return "\n".join(parts)


def _totals(census: Census) -> str:
    totals = census.totals
    gated = sum(row.silu_gated for row in census.rows)
    kinds = Counter(row.kind for row in census.rows if row.verdict == FUSED)
    lines = [
        f"- transformers {census.version}: {census.model_types} model types",
        f"- {len(census.rows)} classes in the source scan",
        f"- {totals[FUSED]} fused: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
        f"- {totals[OTHER]} another activation than SiLU",
        f"- {totals[DECLINED]} declined",
        f"- {totals[NO_GATE]} not an MLP gate",
        f"- {totals[FAILED]} faults",
        f"- **{100 * census.fused_share:.1f} % of the {gated} SiLU-gated classes are fused**",
    ]
    if census.missed_by_scan:
        lines.append(f"- fused, but not in the source scan: {', '.join(census.missed_by_scan)}")
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[Row]) -> str:
    lines = ["| family | class | kind | activation | verdict | reason |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = (row.family, row.name, row.kind, f"`{row.activation}`", row.verdict, row.reason)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
