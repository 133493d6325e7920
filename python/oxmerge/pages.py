"""Pages of HTML: each one file that fetches nothing, light and dark."""

from __future__ import annotations

from html import escape

__all__ = ["CLOSING", "opening"]

_STYLE = """
:root { color-scheme: light dark; }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif;
  color: #1c2330; background: #fff; }
@media (prefers-color-scheme: dark) { body { color: #e6e9ef; background: #14181f; } }
svg { max-width: 100%; min-width: 34rem; height: auto; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
.wide { overflow-x: auto; } .doubtful { border-left: 4px solid #d97706; padding-left: .8rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #8884;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""
#: What ends a page.
CLOSING = "</body></html>\n"
# The browser itself sees to it that nothing is fetched.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def opening(title: str, style: str = "") -> str:
    """Return what begins a page, up to its headline; `style` is added to the common one."""
    title = escape(title)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}{style}</style></head><body>",
            f"<h1>{title}</h1>",
        ]
    )
