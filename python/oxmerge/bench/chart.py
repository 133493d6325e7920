"""The bars as SVG, and a whole page of HTML: one file, nothing fetched, light and dark."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from oxmerge.bench.compare import remarks
from oxmerge.bench.machine import warnings_of
from oxmerge.bench.panels import panels
from oxmerge.bench.table import comparison, heading, machine_lines, sections
from oxmerge.pages import CLOSING, opening

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from oxmerge.bench.panels import Bar, Panel
    from oxmerge.bench.record import Record
    from oxmerge.bench.table import Section

_WIDTH, _LABELS, _VALUES = 720, 220, 96
_BAR, _STEP, _TITLE, _AXIS, _GAP = 14, 21, 30, 20, 22
_TOP = 74
_KINDS = {
    "yardstick": "memcpy, storage, others",
    "oxmerge": "oxmerge",
    "mergekit": "mergekit",
}
# No CSS variables: not every program that draws SVG knows them.
_STYLE = """
.back { fill: #ffffff; } text { fill: #1c2330; font: 13px system-ui, sans-serif; }
.head { font-weight: 600; font-size: 17px; } .title { font-weight: 600; font-size: 14px; }
.quiet { fill: #5b6472; } .whisker { stroke: #1c2330; stroke-width: 1.5; opacity: .65; }
.grid { stroke: #8886; } .roof { stroke: #1c2330; stroke-width: 2.5; }
.yardstick { fill: #7d8899; } .oxmerge { fill: #2563eb; } .mergekit { fill: #d97706; }
@media (prefers-color-scheme: dark) {
  .back { fill: #14181f; } text { fill: #e6e9ef; } .quiet { fill: #a0a9b8; }
  .whisker, .roof { stroke: #e6e9ef; }
  .yardstick { fill: #7a879b; } .oxmerge { fill: #5b93ff; } .mergekit { fill: #f0a040; }
}
"""


def svg(record: Record) -> str:
    """Return the chart as an SVG document."""
    title = escape(heading(record))
    groups = list(panels(record))
    body = list(_legend({_kind(bar) for panel in groups for bar in panel.bars}))
    top = _TOP
    for panel in groups:
        body += _panel(panel, top)
        top += _TITLE + _STEP * len(panel.bars) + _AXIS + _GAP
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" '
                f'width="{_WIDTH}" height="{top}" role="img" aria-label="{title}">'
            ),
            f"<style>{_STYLE}</style>",
            f'<rect class="back" width="{_WIDTH}" height="{top}"/>',
            f'<text class="head" x="16" y="30">{title}</text>',
            *body,
            "</svg>",
            "",
        ]
    )


def page(record: Record, old: Record | None = None) -> str:
    """Return chart, tables and notes as one HTML page, and what changed since an old record."""
    lines = [opening(heading(record)), _list(machine_lines(record))]
    doubts = warnings_of(record.machine)
    if doubts:
        lines.append(f'<div class="doubtful">{_list(doubts)}</div>')
    if old is not None:
        lines += [*_section(comparison(old, record)), _list(list(remarks(old, record)))]
    lines += ['<div class="wide">', svg(record), "</div>"]
    for section in sections(record):
        lines += _section(section)
    return "\n".join([*lines, _list(record.notes), CLOSING])


def _section(section: Section) -> Iterator[str]:
    yield f'<h2>{escape(section.title)}</h2><div class="wide"><table>'
    yield _cells("th", section.head)
    yield from (_cells("td", row) for row in section.rows)
    yield "</table></div>"


def _legend(shown: set[str]) -> Iterator[str]:
    left = 16
    for kind, text in _KINDS.items():
        if kind not in shown:
            continue
        yield f'<rect class="{kind}" x="{left}" y="46" width="12" height="12" rx="2"/>'
        yield f'<text class="quiet" x="{left + 18}" y="57">{escape(text)}</text>'
        left += 42 + 7 * len(text)
    text = "GB/s; thin lines: quartiles"
    yield f'<text class="quiet" x="{_WIDTH - 16}" y="57" text-anchor="end">{text}</text>'


def _panel(panel: Panel, top: int) -> Iterator[str]:
    yield f'<text class="title" x="16" y="{top + 16}">{escape(panel.title)}</text>'
    scale = (_WIDTH - _LABELS - _VALUES - 16) / panel.most
    first, end = top + _TITLE, top + _TITLE + _STEP * len(panel.bars)
    for tick in panel.ticks:
        x = _LABELS + scale * tick
        yield f'<path class="grid" d="M{x:.1f} {first - 4}V{end}"/>'
        yield f'<text class="quiet" x="{x:.1f}" y="{end + 15}" text-anchor="middle">{tick:g}</text>'
    if panel.line is not None:
        x, text = _WIDTH - 16, f"| {escape(panel.line)}; % of it"
        yield f'<text class="quiet" x="{x}" y="{end + 15}" text-anchor="end">{text}</text>'
    for number, bar in enumerate(panel.bars):
        yield from _bar(bar, first + _STEP * number, scale)


def _bar(bar: Bar, top: int, scale: float) -> Iterator[str]:
    middle = top + _BAR / 2
    low, high = (_LABELS + scale * each for each in (bar.low, bar.high))
    yield f'<text x="{_LABELS - 8}" y="{top + 12}" text-anchor="end">{escape(bar.label)}</text>'
    length = max(scale * bar.value, 1)
    yield (
        f'<rect class="{_kind(bar)}" x="{_LABELS}" y="{top}" width="{length:.1f}" '
        f'height="{_BAR}" rx="2"/>'
    )
    yield f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}"/>'
    end = max(high, _LABELS + length)
    if bar.line is not None:
        roof = _LABELS + scale * bar.line
        yield f'<path class="roof" d="M{roof:.1f} {top - 2}V{top + _BAR + 2}"/>'
        end = max(end, roof)
    yield f'<text class="quiet" x="{end + 8:.1f}" y="{top + 12}">{escape(bar.text)}</text>'


def _kind(bar: Bar) -> str:
    return bar.by if bar.by in _KINDS else "yardstick"


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _cells(tag: str, row: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
