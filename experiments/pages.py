"""The frame of a run's self-contained page: style and images are in it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """The whole page: `parts` are HTML, a section each, under an escaped `title`; `style` is added to the common one."""
    body = "\n".join(f"<section>{part}</section>" for part in parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def image(data: bytes, alt: str) -> str:
    """An embedded PNG."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def settings(config: Mapping[str, Any]) -> str:
    """All settings of a run, folded away."""
    rows = "".join(f"<tr><td><code>{escape(str(k))}</code></td><td>{escape(str(v))}</td></tr>\n" for k, v in config.items())
    return f"<details><summary>Settings</summary>\n<table>{rows}</table></details>"


STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --quiet: #59636e; --line: #d5dae0; --page: #fff; --soft: #f4f6f8;
  --mark: #0060a0; --alert: #fff4d6; --alert-line: #d99a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --quiet: #a0abb6; --line: #3a424b; --page: #14181c;
  --soft: #1e242a; --mark: #6db8ef; --alert: #352a0c; --alert-line: #d99a00; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0.5rem 0 0.8rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.6rem; }
p { max-width: 46rem; margin: 0 0 0.9rem; }
.lead { font-size: 1.15rem; border-left: 4px solid var(--mark); padding-left: 0.9rem; }
aside { background: var(--alert); border-left: 4px solid var(--alert-line); padding: 0.7rem 0.9rem; margin: 0.8rem 0;
  max-width: 46rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0.8rem; margin: 0; }
dl div { background: var(--soft); border-radius: 6px; padding: 0.8rem 0.95rem; }
dt { color: var(--quiet); font-size: 0.9rem; }
dd { margin: 0; font-size: 0.93rem; }
dd b { display: block; font-size: 1.3rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
figure { margin: 0.6rem 0 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 0.8rem; }
.panels img { display: block; width: 100%; max-width: 36rem; height: auto; background: #fff; border-radius: 6px; }
figcaption { color: var(--quiet); font-size: 0.93rem; margin-top: 0.5rem; max-width: 46rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; }
th { text-align: left; }
thead th, tbody th { padding: 0.5rem 0.8rem 0.35rem 0; }
tbody th { padding-top: 1.2rem; }
td { border-top: 1px solid var(--line); padding: 0.45rem 0.8rem 0.45rem 0; vertical-align: top; overflow-wrap: anywhere; }
td + td { font-variant-numeric: tabular-nums; min-width: 10.5rem; overflow-wrap: break-word; }
code { font: 0.9em ui-monospace, monospace; }
pre { background: var(--soft); border-radius: 6px; padding: 0.8rem 0.95rem; margin: 0 0 1.1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { margin-top: 1.6rem; border-top: 1px solid var(--line); padding-top: 0.8rem; }
summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; }
"""
