"""The page that a report is: one HTML file that runs nothing and asks nothing of anyone, in light, dark and print.

Everything from outside (file names, labels, configs) comes in through `text`. A Content-Security-Policy in the page
forbids scripts and requests besides, should that ever fail.
"""

import base64
import html
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Bar(NamedTuple):
    """One bar: what it stands for, its length as a share of the full width (0 to 1), and what is written beside it."""

    name: str
    share: float
    note: str


def printable(value: str) -> str:
    r"""The same text with everything unprintable spelled out: a newline as \n, a stray byte as \udcff.

    Also keeps characters that reverse or hide text, legal in file names, from doing so on the page.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def text(value: str) -> str:
    """`value` as HTML text or attribute, unprintable characters spelled out."""
    return html.escape(printable(value))


def count_columns(value: str) -> int:
    """Width of a text as a terminal has it: wide (East Asian) characters count as two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in value)


def shorten(value: str, most_columns: int) -> str:
    """As much of the printable text as fits into so many columns, with an ellipsis for what does not."""
    value = printable(value)
    if count_columns(value) <= most_columns:
        return value
    while count_columns(value) >= most_columns:
        value = value[:-1]
    return value + "…"


def render_page(title: str, body: Iterable[str]) -> str:
    """A whole HTML document; `body` is HTML, `title` is not."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
</body>
</html>
"""


def render_section(title: str, *content: str) -> str:
    """A titled part of the page; nothing where `content`, which is HTML, is empty."""
    return f"<section>\n<h2>{text(title)}</h2>\n{''.join(content)}\n</section>\n" if any(content) else ""


def render_figure(picture: str, *, title: str = "", caption: str = "") -> str:
    """A picture, which is HTML, between a title and a caption, which are not."""
    heading = f"<h3>{text(title)}</h3>\n" if title else ""
    return f"<figure>\n{heading}{picture}\n<figcaption>{text(caption)}</figcaption>\n</figure>\n"


def render_bars(bars: Iterable[Bar], *, alt: str) -> str:
    """Horizontal bars, one below the other, names on their left and notes on their right."""
    rows = "".join(
        f'<li><span class="name" title="{text(bar.name)}">{text(bar.name)}</span>'
        f'<span class="track"><span class="bar" style="width:{100 * bar.share:.1f}%"></span></span>'
        f'<span class="note">{text(bar.note)}</span></li>\n'
        for bar in bars
    )
    return f'<ul class="bars" aria-label="{text(alt)}">\n{rows}</ul>\n' if rows else ""


def render_facts(facts: Mapping[str, str]) -> str:
    """Names with their values, side by side as far as there is room."""
    pairs = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>\n" for name, value in facts.items())
    return f'<dl class="facts">\n{pairs}</dl>\n' if pairs else ""


def render_jpeg(data: bytes | None, *, alt: str) -> str:
    """A picture inside the page; a box that says so where there is none."""
    if data is None:
        return '<div class="nothing">no picture</div>'
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}" alt="{text(alt)}">'


_STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --muted: #5c6878; --grid: #e2e6eb;
  --train: #c2620e; --evaluation: #2259d6; --right: #2259d6; --wrong: #d43d2a; --good: #1a7f46; }
@media (prefers-color-scheme: dark) { :root {
  --page: #10141a; --card: #181e26; --ink: #e6eaf0; --muted: #9aa6b5; --grid: #2d3641;
  --train: #f2a156; --evaluation: #7aa7ff; --right: #4a7ff0; --wrong: #ee5c48; --good: #58c98a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); print-color-adjust: exact;
  -webkit-print-color-adjust: exact;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 48px; }
header p { margin: 0; }
h1 { font-size: 15px; font-weight: 600; margin: 0 0 6px; color: var(--muted); overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 14px; }
h3 { font-size: 14px; margin: 0 0 8px; }
.verdict { font-size: 25px; line-height: 1.3; font-weight: 650; text-wrap: balance; overflow-wrap: anywhere; }
.verdict b { color: var(--wrong); }
.verdict.good b { color: var(--good); }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 20px 22px;
  margin-top: 18px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 14px 22px;
  margin: 22px 0 0; }
.facts dt { font-size: 12px; color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 22px 34px; }
.three { margin-top: 22px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)); }
.three svg { max-width: 380px; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figcaption, .hint { font-size: 13px; color: var(--muted); margin: 6px 0 0; overflow-wrap: anywhere; }
svg { stroke-linejoin: round; display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-family: inherit !important; }
.matrix { margin: 0 auto; }
.bars { list-style: none; margin: 0; padding: 0; }
.bars li { display: grid; grid-template-columns: minmax(0, 1fr) minmax(40px, 1fr) minmax(0, 8.5em); gap: 12px;
  align-items: center; padding: 2.5px 0; break-inside: avoid; }
.bars .name { text-align: right; line-height: 1.3; overflow: hidden; overflow-wrap: anywhere; display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 3; font-size: 14px; }
.bars .track { background: var(--grid); border-radius: 3px; height: 13px; }
.bars .bar { display: block; background: var(--wrong); border-radius: 3px; height: 100%; min-width: 2px; }
.bars .note { color: var(--muted); font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: 18px 16px; }
.gallery img, .nothing { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px;
  background: var(--page); }
.nothing { display: grid; place-items: center; color: var(--muted); font-size: 13px; border: 1px dashed var(--grid); }
.gallery figcaption { font-size: 13px; line-height: 1.4; }
.gallery .label, .gallery .predicted { color: var(--ink); display: block; }
.gallery .predicted { color: var(--wrong); }
.gallery .uri { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  font-size: 11px; }
pre { overflow-x: auto; font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  margin: 12px 0 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 560px) { main { padding: 20px 12px; } section { padding: 16px 14px; }
  .bars li { grid-template-columns: minmax(0, 1fr) minmax(30px, 1fr) minmax(0, 7em); } }
@media print {
  :root { color-scheme: light; --page: #ffffff; --card: #ffffff; --ink: #000000; --muted: #444444; --grid: #dddddd;
    --train: #c2620e; --evaluation: #2259d6; --right: #2259d6; --wrong: #c23220; --good: #1a7f46; }
  main { padding: 0; max-width: none; } section { border: 0; padding: 6px 0; } h2 { break-after: avoid; }
  .columns { grid-template-columns: repeat(2, 1fr); gap: 14px 22px; } .three { grid-template-columns: repeat(3, 1fr); }
  .gallery { grid-template-columns: repeat(6, 1fr); }
  details::details-content { content-visibility: visible; block-size: auto; }
  pre { white-space: pre-wrap; } }
"""
