"""The HTML that a report is made of: a self-contained page, its sections, tables and figures."""

import html
from collections.abc import Sequence

from msa_jax.eval import figures

_CSS = """
:root{color-scheme:light dark;--panel:#f5f7f9;--muted:#59636e;--mark:#cfe5f5}
@media(prefers-color-scheme:dark){:root{--panel:#1d2125;--muted:#9aa4ae;--mark:#1f4a68}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1160px;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--grid)}
p{max-width:75ch}
.grid{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr))}
figure{margin:0;min-width:0}
figure svg{display:block;width:100%;height:auto;max-width:600px}
figure.wide svg{max-width:1100px}
figcaption,.note{color:var(--muted);font-size:.875rem;max-width:75ch}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th{font-weight:600;vertical-align:bottom}
thead th{white-space:normal;min-width:5rem}
th:first-child,td:first-child{text-align:left;padding-left:0}
td:first-child{white-space:normal}
.facts th,.facts td{text-align:left;vertical-align:top}
.facts td{white-space:normal;overflow-wrap:anywhere;min-width:8rem}
.facts td:first-child{overflow-wrap:normal}
summary{cursor:pointer;padding:.4rem 0}
.text{background:var(--panel);padding:.6rem .8rem;font:.8rem/1.45 ui-monospace,monospace;
 white-space:pre-wrap;overflow-wrap:anywhere;max-height:24rem;overflow-y:auto;margin:.3rem 0 1rem}
.text span{color:var(--muted)}
.text .kept{background:var(--mark);color:var(--ink)}
.text .own{background:#e69f00;color:#1f2328}
"""


def document(title: str, body: str) -> str:
    """A whole page, its styles inside it, that needs neither network nor script."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{figures.theme_css()}{_CSS}</style></head>"
        f"<body><main><h1>{text(title)}</h1>{body}</main></body></html>\n"
    )


def text(value: str) -> str:
    """`value` with its markup escaped. Elsewhere `body`, `parts` and `svg` are markup already."""
    return html.escape(value)


def section(title: str, body: str) -> str:
    """A titled part of the page."""
    return f"<section><h2>{text(title)}</h2>{body}</section>"


def details(title: str, body: str, *, opened: bool = False) -> str:
    """A part that the reader can open and close."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{text(title)}</summary>{body}</details>"


def note(value: str) -> str:
    """A remark on what stands above it."""
    return f"<p class=note>{text(value)}</p>"


def figure(svg: str, caption: str, *, wide: bool = False) -> str:
    """A figure of `msa_jax.eval.figures` with its caption, which also describes it to readers.

    Args:
      svg: as the figure functions return it.
      caption: plain text.
      wide: over the width of the page instead of a column.
    """
    described = svg.replace("<svg ", f'<svg role="img" aria-label="{text(caption)}" ', 1)
    style = " class=wide" if wide else ""
    return f"<figure{style}>{described}<figcaption>{text(caption)}</figcaption></figure>"


def grid(parts: Sequence[str]) -> str:
    """Parts side by side as far as the width allows."""
    return f"<div class=grid>{''.join(parts)}</div>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, style: str = "numbers") -> str:
    """A table that scrolls where it is too wide; `style` "facts" sets text instead of numbers."""
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<div class=scroll><table class={style}><thead><tr>{top}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )
