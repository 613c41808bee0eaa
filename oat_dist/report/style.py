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

# Cells of the confusion matrix: nine shades, weak enough for the number in them.
_SHADES = "".join(f".k{level}{{--k:{5 * level}%}}" for level in range(1, 10))

CSS = f"""
:root{{color-scheme:light dark;--page:#ffffff;--edge:#00000022;--card:#f6f7f9;--warn:#fff4d6;{_LIGHT}}}
@media screen and (prefers-color-scheme:dark){{
:root{{--page:#14181f;--edge:#ffffff2c;--card:#1c222b;--warn:#3a3018;{_DARK}}}}}
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
.scroll{{overflow-x:auto;margin:.8rem 0;
background:linear-gradient(to right,var(--under,var(--page)) 40%,transparent) left/2.5rem 100% no-repeat local,
linear-gradient(to left,var(--under,var(--page)) 40%,transparent) right/2.5rem 100% no-repeat local,
linear-gradient(to right,var(--edge),transparent) left/.8rem 100% no-repeat scroll,
linear-gradient(to left,var(--edge),transparent) right/.8rem 100% no-repeat scroll}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding-bottom:.4rem}}
caption span{{display:block;position:sticky;left:0;max-width:min(46rem,calc(100vw - 2.5rem))}}
th,td{{text-align:left;vertical-align:top;padding:.35rem 1.1rem .35rem 0;border-bottom:1px solid var(--grid)}}
thead th{{font-size:.875rem;color:var(--muted);font-weight:600;vertical-align:bottom}}
tbody th{{font-weight:600}}
tbody th:not(.n){{min-width:8.5rem}}
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
figure{{--under:var(--card);margin:0;background:var(--card);padding:.8rem .8rem .7rem;border-radius:.4rem;
break-inside:avoid}}
figure h3{{margin:0 0 .3rem;font-size:1rem}}
figure svg{{display:block;width:100%;height:auto}}
figure svg *{{stroke-linejoin:round;stroke-linecap:butt}}
.chips{{display:flex;flex-wrap:wrap;gap:.3rem .4rem;margin:.6rem 0;padding:0;list-style-position:inside}}
.chips li{{background:var(--card);border:1px solid var(--grid);border-radius:.3rem;padding:0 .45rem;
font-size:.875rem;overflow-wrap:anywhere}}
.chips li::marker{{color:var(--muted)}}
nav{{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:1rem 0;font-size:.875rem}}
nav a{{color:var(--s0)}}
.stats{{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.8rem;margin:1.2rem 0}}
.stats div{{background:var(--card);border-radius:.4rem;padding:.6rem .8rem}}
.stats dt{{color:var(--muted);font-size:.875rem;overflow-wrap:anywhere}}
.stats dd{{margin:0;font-size:1.7rem;font-weight:700;line-height:1.25;font-variant-numeric:tabular-nums}}
.stats dd.note{{font-size:.875rem;font-weight:400}}
small{{color:var(--muted);font-size:.8rem;font-weight:400;white-space:nowrap}}
.n small{{display:block}}
.key{{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;list-style:none;margin:.3rem 0 .5rem;padding:0;font-size:.875rem}}
.key li{{display:flex;gap:.45rem;align-items:center;overflow-wrap:anywhere;min-width:0}}
.key svg{{flex:none;width:auto}}
figure .key svg{{display:inline-block;width:2.1rem;height:.75rem}}
.wide{{max-width:46rem;margin:1rem 0}}
.side{{display:flex;flex-wrap:wrap;gap:0 2rem;align-items:flex-start}}
.side>*{{min-width:0}}
.side>figure{{width:fit-content;max-width:100%}}.side figcaption{{contain:inline-size}}.side .grid{{width:43rem}}
.side table{{min-width:16rem}}
.half{{max-width:31rem}}
.scroll .grid{{min-width:34rem}}
section>figure{{margin:1rem 0}}
.grid text{{font-size:11px;fill:var(--ink)}}
.grid .shade,.grid .diagonal{{shape-rendering:crispEdges}}
.shade{{fill:var(--s1)}}.diagonal{{fill:var(--s0)}}
.field{{fill:var(--page);stroke:var(--grid)}}
.confusion td{{text-align:center;padding:.28rem .35rem;border:1px solid var(--grid);min-width:2.3rem;color:var(--ink)}}
.confusion .corner{{border:0;color:var(--muted);font-size:.75rem;text-align:left;vertical-align:bottom;
min-width:5.5rem}}
.confusion thead th{{vertical-align:bottom;padding:.3rem .1rem;text-align:center;color:var(--ink)}}
.confusion thead span{{writing-mode:vertical-rl;transform:rotate(180deg);max-height:9rem}}
.confusion tbody th{{font-size:.875rem;padding-right:.5rem;text-align:right;border:0;position:sticky;left:0;
background:var(--card)}}
.confusion tbody th:not(.n){{min-width:2rem}}
.confusion th,.confusion thead span{{white-space:nowrap;overflow:hidden;text-overflow:ellipsis;max-width:9rem}}
.confusion td.d{{background:color-mix(in srgb,var(--s0) var(--k,0%),transparent);font-weight:700}}
.confusion td.e{{background:color-mix(in srgb,var(--s1) var(--k,0%),transparent)}}
{_SHADES}
.bars{{width:100%;max-width:46rem}}
.bars th{{font-weight:400;overflow-wrap:anywhere}}
.bars td{{width:40%;min-width:6rem;padding-right:.6rem;vertical-align:middle}}
.bars .track{{display:inline-block;width:calc(100% - 4.2rem)}}
.bars .bar{{display:inline-block;height:.7rem;background:var(--s0);border-radius:.1rem;min-width:1px}}
.bars .count{{padding-left:.4rem;font-size:.875rem}}
.gallery{{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.2rem,1fr));gap:1rem .8rem;list-style:none;
margin:.8rem 0 1.4rem;padding:0}}
.gallery li{{font-size:.875rem;line-height:1.35;overflow-wrap:anywhere;break-inside:avoid}}
.picture{{background:var(--card);border-radius:.3rem;height:8.2rem;display:flex;align-items:center;
justify-content:center;margin-bottom:.35rem;padding:.3rem}}
.picture img{{max-width:100%;max-height:100%;object-fit:contain}}
.picture .tiny{{image-rendering:pixelated;width:100%;height:100%}}
.picture .hole{{color:var(--muted)}}
.gallery b,.gallery .answer{{display:block}}
.gallery .mark{{font-weight:700}}
section>h3{{font-size:1rem;margin:1.4rem 0 .3rem;overflow-wrap:anywhere}}
@media (max-width:32rem){{body{{padding:1rem .9rem 3rem}}th,td{{padding-right:.7rem}}
.facts{{grid-template-columns:minmax(0,1fr);gap:0}}.facts dd{{margin-bottom:.5rem}}
td,.headline td{{font-size:.95rem}}figure{{padding:.5rem}}thead .n{{white-space:normal}}
table:not(.confusion) tbody th:not(.n){{min-width:6.5rem}}.scroll td:not(.n){{min-width:7rem}}
.scroll .confusion td,.scroll .bars td{{min-width:2.3rem}}
.stats{{grid-template-columns:1fr 1fr}}.stats dd{{font-size:1.35rem}}
.gallery{{grid-template-columns:repeat(auto-fill,minmax(6rem,1fr))}}.picture{{height:6rem}}}}
@page{{margin:13mm}}
@media print{{body{{max-width:none;padding:0;font-size:10pt}}h2,h3{{break-after:avoid}}nav{{display:none}}
tr,.stats div,.warn{{break-inside:avoid}}section>.note,caption,thead{{break-after:avoid}}.side{{display:block}}
*{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
details::details-content{{content-visibility:visible;display:block}}details.long{{display:none}}
.scroll{{overflow:visible;background:none}}.figures{{grid-template-columns:1fr 1fr}}.confusion{{font-size:7.5pt}}
.confusion td{{min-width:0;padding:.15rem .2rem}}}}
""".strip()
