"""The report of `patch_model`: printable, and iterable."""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_swiglu.patching.memory.settings import DEFAULT_KEEP

Verdict = Literal["fused", "already fused", "memory only", "skipped"]
FUSED: Verdict = "fused"
ALREADY_FUSED: Verdict = "already fused"
# A gate with another activation: no kernel computes it, but `keep` and `tile` apply.
MEMORY_ONLY: Verdict = "memory only"
SKIPPED: Verdict = "skipped"


@dataclass(frozen=True)
class Entry:
    """The result for one module.

    `reason` states why it was not fused. `keep` and `tile` are its effective settings, None where it was skipped, and
    `note` states why they differ from the requested ones.
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
        """The settings that differ from the default, such as "keep=0, tile=512"."""
        settings = ("keep", None if self.keep == DEFAULT_KEEP else self.keep), ("tile", self.tile)
        return ", ".join(f"{name}={value}" for name, value in settings if value is not None)


class PatchReport(Sequence[Entry]):
    """Every module that was fused, or that resembles a gated MLP and was skipped, in the model's order.

    A sequence of entries; `fused`, `already_fused`, `memory_only` and `skipped` select by verdict. `print` shows a
    summary of at most 80 columns, a notebook shows a table, and `to_json` has all of it for programs.

    Example:
        >>> from hf_swiglu.patching.report import Entry, PatchReport
        >>> print(PatchReport([Entry("layers.0.mlp", "LlamaMLP", "fused", "separate", "SiLU")]))
        gated MLPs: 1 fused, 0 already fused, 0 skipped
          fused: 1 x LlamaMLP: separate gate and up, SiLU
            layers.0.mlp
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

    def to_json(self) -> list[dict[str, object]]:
        """The entries as dictionaries, for `json.dumps`."""
        return [dataclasses.asdict(entry) for entry in self]

    def __str__(self) -> str:
        lines = [f"gated MLPs: {self._counts()}"]
        for entry, where, count in self._groups():
            lines += _wrapped(f"{entry.verdict}: {count} x {entry.class_name}: {_what(entry)}", "  ")
            lines += _wrapped(where, "    ")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A table, which notebooks show in place of `repr`."""
        rows = [
            (entry.verdict, str(count), entry.class_name, where, _what(entry)) for entry, where, count in self._groups()
        ]
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        head = "".join(f"<th>{name}</th>" for name in ("", "modules", "class", "where", "what"))
        return f"<table><caption>gated MLPs: {self._counts()}</caption><tr>{head}</tr>{body}</table>"

    def _counts(self) -> str:
        counts = [f"{len(self.fused)} fused", f"{len(self.already_fused)} already fused"]
        counts += [f"{len(self.memory_only)} memory only"] if self.memory_only else []
        return ", ".join([*counts, f"{len(self.skipped)} skipped"])

    def _groups(self) -> Iterator[tuple[Entry, str, int]]:
        """Entries that differ in their name alone: one of them, the first and the last name, and their number."""
        groups = defaultdict(list)
        for entry in self:
            groups[dataclasses.replace(entry, name="")].append(entry.name)
        for entry, names in groups.items():
            yield entry, names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}", len(names)

    def __repr__(self) -> str:
        return f"<PatchReport: {self!s}>"


def _what(entry: Entry) -> str:
    parts = [entry.reason or f"{entry.kind} gate and up, {entry.activation}", entry.memory, entry.note]
    return "; ".join(part for part in parts if part)


def _wrapped(text: str, indent: str) -> list[str]:
    """Lines of at most 80 columns; a module's name is never broken."""
    return textwrap.wrap(
        text,
        80,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
