"""The colours and the style sheet of the report.

Figures are drawn in the light colours; in the page each of these becomes a CSS variable, so that the figures
follow the reader's light or dark scheme without being drawn twice.
"""

from __future__ import annotations

__all__ = ["COLOURS", "CSS", "GRID", "INK", "MUTED", "SERIES"]

INK, MUTED, GRID = "#1b2230", "#5b6472", "#dde1e7"
SERIES = ("#0b5fa5", "#b4530a", "#0a7350", "#8b2f8f", "#9c1c2e")

# name of the CSS variable -> (light, dark)
COLOURS = {
    "ink": (INK, "#e6e9ee"),
    "muted": (MUTED, "#a3acb9"),
    "grid": (GRID, "#363d49"),
    "s0": (SERIES[0], "#6cb6f5"),
    "s1": (SERIES[1], "#f2a65a"),
    "s2": (SERIES[2], "#56cf9f"),
    "s3": (SERIES[3], "#dd93e0"),
    "s4": (SERIES[4], "#f58a98"),
}

_LIGHT = "".join(f"--{name}:{light};" for name, (light, _) in COLOURS.items())
_DARK = "".join(f"--{name}:{dark};" for name, (_, dark) in COLOURS.items())

CSS = f"""
:root{{color-scheme:light dark;--page:#ffffff;--card:#f6f7f9;--warn:#fff4d6;{_LIGHT}}}
@media screen and (prefers-color-scheme:dark){{:root{{--page:#14181f;--card:#1c222b;--warn:#3a3018;{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:66rem;padding:1.5rem 1.25rem 4rem;background:var(--page);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
h1{{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem;overflow-wrap:anywhere}}
h2{{font-size:1.2rem;margin:2.6rem 0 .7rem;padding-top:.6rem;border-top:1px solid var(--grid)}}
p{{margin:.5rem 0;max-width:46rem}}
.note,figcaption,caption{{color:var(--muted);font-size:.875rem;line-height:1.45}}
.note{{font-weight:400}}
.status{{font-size:1.05rem}}
.warn{{background:var(--warn);border-left:4px solid var(--s1);padding:.5rem 1rem;margin:1rem 0;
overflow-wrap:anywhere}}
.warn ul{{margin:.2rem 0;padding-left:1.1rem}}
.scroll{{overflow-x:auto;margin:.8rem 0}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding-bottom:.4rem}}
th,td{{text-align:left;vertical-align:top;padding:.35rem 1.1rem .35rem 0;border-bottom:1px solid var(--grid)}}
thead th{{font-size:.875rem;color:var(--muted);font-weight:600;vertical-align:bottom}}
tbody th{{font-weight:600}}
.n{{text-align:right;white-space:nowrap}}
.headline td,.headline tbody th{{font-size:1.05rem}}
.headline .main{{font-size:1.35rem;font-weight:700;line-height:1.25}}
.facts{{display:grid;grid-template-columns:minmax(7rem,max-content) minmax(0,1fr);gap:.2rem 1.2rem;
margin:.8rem 0}}
.facts dt{{color:var(--muted)}}
.facts dd{{margin:0;overflow-wrap:anywhere}}
code,pre{{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.875em;
overflow-wrap:anywhere}}
pre{{background:var(--card);padding:.8rem 1rem;overflow-x:auto;white-space:pre-wrap;margin:.6rem 0}}
details{{margin:.8rem 0}}
summary{{cursor:pointer;font-weight:600;padding:.2rem 0}}
.figures{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.4rem;align-items:start}}
figure{{margin:0;background:var(--card);padding:.8rem .8rem .7rem;border-radius:.4rem;break-inside:avoid}}
figure h3{{margin:0 0 .3rem;font-size:1rem}}
figure svg{{display:block;width:100%;height:auto}}
figure svg *{{stroke-linejoin:round;stroke-linecap:butt}}
.chips{{display:flex;flex-wrap:wrap;gap:.3rem .4rem;list-style:none;margin:.6rem 0;padding:0}}
.chips li{{background:var(--card);border:1px solid var(--grid);border-radius:.3rem;padding:0 .45rem;
font-size:.875rem;overflow-wrap:anywhere}}
@media (max-width:32rem){{body{{padding:1rem .9rem 3rem}}th,td{{padding-right:.7rem}}
.facts{{grid-template-columns:minmax(0,1fr);gap:0}}.facts dd{{margin-bottom:.5rem}}.n{{white-space:normal}}
td,.headline td{{font-size:.95rem}}figure{{padding:.5rem}}}}
@media print{{body{{max-width:none;padding:0;font-size:10pt}}h2{{break-after:avoid}}
.scroll{{overflow:visible}}.figures{{grid-template-columns:1fr 1fr}}}}
""".strip()
