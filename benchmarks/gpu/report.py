"""What sections find, the table at the end, and the exit status."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from benchmarks.gpu.targets import TARGETS

Verdict = Literal["pass", "short", "FAIL", "report", "skipped"]
"""short: a speed below its target; FAIL: wrong, or an error."""

_HEADER = ("verdict", "what", "figure", "target", "denominator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    figure: str
    target: str
    denominator: str
    """What the figure is a share of, or compared with."""
    verdict: Verdict
    key: str | None = None
    """Of the target in TARGETS, where it is one."""

    @classmethod
    def of_target(cls, key: str, value: float, *, denominator: str, note: str = "") -> Self:
        """A measured value beside its target."""
        target = TARGETS[key]
        has_bound = target.at_least is not None or target.at_most is not None
        return cls(
            what=target.what + (f" ({note})" if note else ""),
            figure=target.show(value),
            target=target.text,
            denominator=denominator,
            verdict=("pass" if target.is_met(value) else "short") if has_bound else "report",
            key=key,
        )

    @classmethod
    def of_report(cls, what: str, figure: str, *, denominator: str = "") -> Self:
        """A measured value without a target."""
        return cls(
            what=what, figure=figure, target="report", denominator=denominator, verdict="report"
        )

    @classmethod
    def of_check(
        cls, what: str, *, figure: str, target: str, denominator: str, is_right: bool
    ) -> Self:
        """A property that must hold."""
        return cls(
            what=what,
            figure=figure,
            target=target,
            denominator=denominator,
            verdict="pass" if is_right else "FAIL",
        )


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one section found."""

    rows: list[Row] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    """Every median and spread, as JSON holds it."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises KeyError or TypeError for what is no outcome."""
        return cls(
            rows=[Row(**row) for row in values["rows"]],
            figures=dict(values["figures"]),
            notes=list(values["notes"]),
        )


def failed(name: str, reason: str) -> Outcome:
    """The outcome of a section that ended in an error."""
    row = Row(what=name, figure=reason, target="no error", denominator="", verdict="FAIL")
    return Outcome(rows=[row])


def skipped(name: str, reason: str) -> Outcome:
    """The outcome of a section that was not run."""
    row = Row(what=name, figure=reason, target="", denominator="", verdict="skipped")
    return Outcome(rows=[row])


def exit_status(outcomes: Iterable[Outcome]) -> int:
    """1 where anything is wrong; a speed short of its target is not."""
    return int(any(row.verdict == "FAIL" for outcome in outcomes for row in outcome.rows))


def text_table(rows: Sequence[Row]) -> str:
    """A line a row, short enough that a whole run fits into what a terminal keeps."""
    cells = [_HEADER, *((r.verdict, r.what, r.figure, r.target, r.denominator) for r in rows)]
    width = max(len(line[0]) for line in cells)
    return "\n".join(" | ".join((line[0].ljust(width), *line[1:])).rstrip(" |") for line in cells)
