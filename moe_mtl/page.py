"""Pieces of a self-contained HTML page: tables, pictures, the frame around them and its style.

Nothing is loaded from the network and no script runs. The page follows the reader's light or dark setting, and wide
tables scroll inside their own box on a phone, under a first column that stays.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

DPI = 180  # twice what a desktop page shows, so that pictures stay sharp on dense screens


def document(title: str, top: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page: the title, what stands below it, links to the sections, and the sections.

    Args:
        title: as plain text.
        top: HTML under the title.
        sections: heading and HTML of each; one without HTML is left out.
    """
    sections = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    main = "".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>{body}</section>' for i, (name, body) in enumerate(sections)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}</h1>{top}<nav>{links}</nav></header>"
        f"<main>{main}</main></body></html>\n"
    )


def th(text: str, span: int = 1) -> str:
    """The head of a row, of `span` rows."""
    rows = f' rowspan="{span}"' if span > 1 else ""
    return f'<th scope="row"{rows}>{escape(text)}</th>'


def td(text: str, number: bool = False, raw: bool = False) -> str:
    """A cell; `raw` text is HTML already."""
    return f"<td{' class=number' if number else ''}>{text if raw else escape(text)}</td>"


def table(head: Sequence[str], rows: Sequence[str], facts: bool = False) -> str:
    """A table in a box that scrolls.

    Args:
        head: names of the columns; one that starts with # stands over numbers.
        rows: the cells of each row, as HTML.
        facts: long cells wrap.
    """
    names = "".join(
        f'<th scope="col"{" class=number" if name[:1] == "#" else ""}>{escape(name.removeprefix("#"))}</th>'
        for name in head
    )
    top = f"<thead><tr>{names}</tr></thead>" if head else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    kind = " class=facts" if facts else ""
    return f'<div class="scroll" tabindex="0"><table{kind}>{top}<tbody>{body}</tbody></table></div>'


def picture(figure: Figure, title: str, caption: str, description: str) -> str:
    """A figure with its title and caption, inlined; the description is for who cannot see it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    note = f"<span>{escape(caption)}</span>" if caption else ""
    return (
        f'<figure><img alt="{escape(description)}" src="data:image/png;base64,{data}" loading="lazy">'
        f"<figcaption><b>{escape(title)}</b>{note}</figcaption></figure>"
    )


_STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1b1b1f;--soft:#5a5a63;--line:#d9d9d4;--accent:#2d5fb0;
 --better:#1a6e3c;--worse:#b3261e}
@media(prefers-color-scheme:dark){:root{--page:#16171a;--card:#212327;--ink:#ececea;--soft:#a9abb2;--line:#3a3d44;--accent:#86aef0;
 --better:#7ed49b;--worse:#ff9d94}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:76rem;background:var(--page);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 1rem}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p{max-width:46rem;margin:.5rem 0}
.note{color:var(--soft);font-size:.875rem}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin-top:1rem}
a{color:var(--accent)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.75rem}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.75rem 1rem}
.cards b{display:block;font-size:1.5rem;line-height:1.2}
.cards span{color:var(--soft);font-size:.875rem}
.scroll{overflow-x:auto;width:fit-content;max-width:100%;margin:.75rem 0;
 background:var(--card);border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;font-size:.875rem;overflow-wrap:normal}
th,td{padding:.35rem .75rem;text-align:left;vertical-align:top;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal;min-width:5rem}
th[scope=row]{white-space:normal;min-width:7rem}
th[scope=row],thead th:first-child{position:sticky;left:0;background:var(--card)}
.facts td{white-space:normal;min-width:14rem;overflow-wrap:anywhere}
th.number,td.number{text-align:right;font-variant-numeric:tabular-nums}
.change{display:inline-block;min-width:4.25rem;margin-left:.5rem;font-weight:600}
.better{color:var(--better)}
.worse{color:var(--worse)}
.share{display:inline-block;min-width:3rem}
.bar{display:inline-block;vertical-align:middle;width:5rem;height:.6rem;border-radius:2px;
 background:linear-gradient(var(--accent) 0 0) left/calc(var(--share)*100%) 100% no-repeat,var(--line)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem;align-items:start;margin-top:.75rem}
.gallery.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
figure{margin:0;background:#fff;border:1px solid var(--line);border-radius:8px;overflow:hidden}
figure img{display:block;width:100%;height:auto}
figcaption{padding:.5rem .75rem;background:var(--card);border-top:1px solid var(--line);font-size:.875rem}
figcaption b{margin-right:.75rem}
figcaption span{color:var(--soft)}
details{margin-top:1rem}
summary{cursor:pointer;color:var(--accent)}
pre{overflow-x:auto;padding:.75rem;
 background:var(--card);border:1px solid var(--line);border-radius:8px;font-size:.8125rem}
"""
