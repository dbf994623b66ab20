"""One HTML page of what score.py counted: totals, WER by duration and by key, every utterance aligned.

`python score.py result.jsonl --html report.html` writes it. It is one file and loads nothing but the audio
that one plays: text of a manifest is escaped, and the page's policy allows its own script and no network.
10,000 utterances are 4 MB and open in 1 s, since a browser lays out only those that are on the screen.
"""

import base64
import hashlib
import html
import os
from itertools import groupby
from pathlib import Path
from string import Template
from urllib.parse import quote

FORMS = {"": "{0}", "I": "<ins>{1}</ins>", "D": "<del>{0}</del>", "S": "<s>{0}</s><b>{1}</b>"}


def make_page(summary: str, tables: list[tuple], utterances: list, unit: str, folder: Path) -> str:
    """The page, to be put in `folder`, of score.py's summary, tables and aligned Utterances, as they come.

    A table is what it is by, and a row for each group of utterances: its name and six numbers.
    """
    first, rate, *others = map(html.escape, summary.split("\n"))
    if not any(os.path.isfile(utterance.wav) for utterance in utterances):
        others.append(
            "no audio found beside the result: --ref test.jsonl --hyp result.jsonl looks beside test.jsonl"
        )
    names = [name for name, _ in tables]
    return PAGE.substitute(
        policy=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
        script=SCRIPT,
        summary="".join(f"<{tag}>{line}</{tag}>" for tag, line in [("p", first), ("h1", rate)])
        + "".join(f"<p>{line}</p>" for line in others),
        tables="".join(make_table(name, rows, unit) for name, rows in tables),
        rows="\n".join(make_row(utterance, names, unit, folder) for utterance in utterances),
    )


def make_table(name: str, rows: list[tuple], unit: str) -> str:
    heads = [
        f"by {name}",
        "utterances",
        f"{unit}s",
        "%CER" if unit == "char" else "%WER",
        "ins",
        "del",
        "sub",
    ]
    heads = "".join(f"<th>{html.escape(head)}" for head in heads)
    lines = []
    for group, *numbers in rows:
        cells = "".join(f"<td>{n:.2f}" if isinstance(n, float) else f"<td>{n}" for n in numbers)
        lines.append(f"<tr><th><bdi>{html.escape(group)}</bdi>{cells.replace('nan', '–')}")
    return f"<div><table><thead><tr>{heads}<tbody>{''.join(lines)}</table></div>\n"


def make_row(utterance, names: list[str], unit: str, folder: Path) -> str:
    """An utterance: errors of units, key, keys of those names, what went wrong, audio, and the alignment."""
    space, spans = "" if unit == "char" else " ", []
    for mark, group in groupby(utterance.pairs, key=lambda pair: pair[0]):
        _, ref, hyp = (html.escape(space.join(side)) for side in zip(*group))
        spans.append(FORMS[mark].format(ref, hyp))
    units = sum(mark != "I" for mark, _, _ in utterance.pairs)
    seconds = utterance.seconds or 0
    known = [f"errors: {utterance.errors} / {units}"]
    known += [] if utterance.seconds is None else [f"{seconds:.2f} s"]
    known += [f"{name}: {utterance.others[name]}" for name in names if name in utterance.others]
    about = f"<bdi>{html.escape(utterance.key)}</bdi><small>{html.escape(', '.join(known))}</small>"
    wrong = [utterance.kind] if utterance.kind else []
    wrong += [] if utterance.error is None else [f"not recognised: {utterance.error}"]
    about += "".join(f"<em>{html.escape(line)}</em>" for line in wrong)
    if os.path.isfile(utterance.wav):
        url = quote(os.fsencode(os.path.relpath(utterance.wav, folder)))
        if utterance.start is not None:  # a part of a longer file
            url += f"#t={utterance.start:.3f}" + f",{utterance.start + seconds:.3f}" * bool(seconds)
        about += f'<a href="{url}">audio</a>'
    rate = utterance.errors / (units or 1)
    data = f'data-errors="{utterance.errors}" data-rate="{rate:.4f}" data-seconds="{seconds}"'
    return f'<article {data}><div>{about}</div><p dir="auto">{space.join(spans)}</article>'


SCRIPT = """
const find = name => document.querySelector(name);
const main = find("main"), order = find("select"), query = find("input"), rows = [...main.children];
let texts;

function textOf(row) {  // what is known of it, then the reference, then the hypothesis
  let about = "", ref = "", hyp = "";
  for (const node of row.firstChild.childNodes) about += node.textContent + " ";
  for (const {nodeName, textContent} of row.lastChild.childNodes) {
    if (nodeName != "INS" && nodeName != "B") ref += textContent;
    if (nodeName != "DEL" && nodeName != "S") hyp += textContent;
  }
  return [about, ref, hyp].join("\\n").toLowerCase().replace(/ +/g, " ");
}

function search() {
  texts ??= new Map(rows.map(row => [row, textOf(row)]));
  const words = query.value.trim().toLowerCase().replace(/ +/g, " ");
  let count = 0;
  for (const row of rows) count += !(row.hidden = !texts.get(row).includes(words));
  find("output").textContent = `${count} of ${rows.length}`;
}

function sort() {
  const by = order.value, {compare} = new Intl.Collator("en", {numeric: true});
  const pairs = rows.map(row => [by == "key" ? row.querySelector("bdi").textContent : +row.dataset[by], row]);
  pairs.sort(([a], [b]) => by == "key" ? compare(a, b) : b - a);
  main.append(...pairs.map(([, row]) => row));
}

function showPlayer({target, skipped}) {  // once a row is seen: 10,000 players at once take seconds
  const link = target.querySelector("a");
  if (skipped || !link) return;
  const player = {controls: true, preload: "none", src: link.href};
  link.replaceWith(Object.assign(document.createElement("audio"), player));
}

order.onchange = sort;
query.oninput = search;
main.addEventListener("contentvisibilityautostatechange", showPlayer);
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'sha256-$policy'; media-src 'self' file:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width">
<title>Ears: errors</title>
<style>
:root { color-scheme: light dark; --del: #b3003c; --ins: #0062a8; --sub: #7a5200; }
@media (prefers-color-scheme: dark) { :root { --del: #ff9eb5; --ins: #86c5ff; --sub: #f0c060; } }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 80em; margin: auto; padding: 1em;
  overflow-wrap: anywhere; }
h1 { font-size: 1.4em; margin: .2em 0; }
header p, article p { margin: 0; }
section { display: flex; flex-wrap: wrap; gap: 1.5em; margin: 1.5em 0; font-size: .85em; align-items: start; }
section div { overflow: auto; max-height: 30em; }
table { border-collapse: collapse; }
section, article div { font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8884; padding: .2em .5em; text-align: end; }
td, thead th { white-space: nowrap; }
th:first-child { text-align: start; min-width: 6em; white-space: normal; }
thead th { overflow-wrap: break-word; }
thead th { position: sticky; top: 0; background: Canvas; }
tbody th { font-weight: normal; }
nav { position: sticky; top: 0; background: Canvas; padding: .5em 0; }
nav, label { display: flex; flex-wrap: wrap; gap: .5em 1em; align-items: center; }
input, select { font: inherit; min-width: 0; }
article { border-top: 1px solid #8888; padding: .6em 0; content-visibility: auto;
  contain-intrinsic-size: auto 7em; display: grid; grid-template-columns: 19em 1fr; gap: .2em 1.5em; }
article[hidden] { display: none; }
bdi { font-weight: 600; }
tbody bdi { font-weight: normal; }
small, em { display: block; font-size: .85em; }
em { font-style: normal; } em::before { content: "\\26a0  "; }
article a, audio { display: block; width: 100%; max-width: 19em; height: 2.2em; margin-top: .3em; }
del, s { color: var(--del); border: 1px dashed; text-decoration: none; } /* a line would hide 一 */
ins { color: var(--ins); } ins::before { content: "+"; }
s, b { color: var(--sub); } b::before { content: "\\2192"; } b:dir(rtl)::before { content: "\\2190"; }
@media (max-width: 50em) {
  section { font-size: .75em; } section div { max-width: 100%; } th, td { padding: .2em .3em; }
  article { grid-template-columns: 1fr; } }
</style>
<header>$summary</header>
<section>
$tables</section>
<nav>
<label>Order <select autocomplete="off"><option value="errors">most errors first
<option value="rate">highest rate first<option value="seconds">longest audio first
<option value="key">by key</select></label>
<label>Search <input type="search" autocomplete="off" placeholder="text, key, loop, ..."></label>
<output></output>
</nav>
<p><del>said, not written</del> <ins>written, not said</ins> <s>said</s><b>written instead</b></p>
<main>
$rows
</main>
<script>$script</script>
</html>
""")
