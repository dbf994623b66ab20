"""WER or CER of what recognize.py wrote, with hallucinated utterances accounted for.

    python score.py result.jsonl                       # each line a record of the manifest and its `hyp`
    python score.py --ref test.jsonl --hyp result.txt  # `key<TAB>hyp` lines (or a result.jsonl), by key
    python score.py result.jsonl --unit char --normalizer basic --html report.html
    python score.py result.jsonl --metric bleu         # of a translation; chrf; exact, of an answer

Half a second for 2,600 utterances, 2 s with a normalizer. Prints the rate, its counts, a 95 % interval, the
same without hallucinated utterances (hallucination.py says which), and the five worst utterances aligned.

The reference is a record's `target`, else its `txt`. Each needs exactly one hypothesis: a missing, doubled or
unknown one is an error (exit code 2), and no line is skipped. A record with `error` in place of `hyp` (audio
that could not be read) counts as deletions and makes the exit code 1. What is written for an empty reference
counts as insertions.

--unit: `word`, or `char` with white space left out, as CER is counted on Mandarin. By default `char` where
most characters of the references are of scripts without spaces (Chinese, Japanese, Thai, ...), else `word`.
--normalizer: what both sides go through. `basic` and `english` are Whisper's: lower case, no punctuation, and
for English one spelling, and digits for numbers. `basic` destroys Indic and Thai marks (vowels, tones).
--metric: `wer` and `cer` are --unit word and char. `bleu` and `chrf` are sacrebleu's over the corpus, with
their signature; BLEU's tokenizer is zh for Chinese, char for other scripts without spaces, else 13a. `exact`
is the share of texts equal to their reference. These three are one line, without an interval or a report.
"""

import argparse
import html
import json
import math
import os
import re
import signal
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from string import Template
from urllib.parse import quote

import jiwer
import numpy as np

from hallucination import UNSPACED, hallucination


class Refused(ValueError):
    """What the user gave cannot be scored; the message says what and where."""


@dataclass
class Utterance:
    key: str
    ref: str
    hyp: str
    seconds: float | None  # of audio, where known
    wav: Path
    error: str | None  # why there is no hypothesis
    kind: str | None  # of hallucination
    pairs: list[tuple[str, str, str]] = field(default_factory=list)  # by `align`, as is the next
    errors: int = 0


def read_records(path: Path) -> dict[str, dict]:
    """The lines of a jsonl, or of a `.txt` of `key<TAB>hyp` lines, by key, with `where` each stood.

    The key is by default the stem of `wav`. Raises Refused where a line cannot be read or a key comes twice.
    """
    records = {}
    for number, line in enumerate(path.read_bytes().rstrip(b"\r\n").split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig")
            if path.suffix == ".txt":
                key, hyp = text.split("\t", maxsplit=1)
                record = {"key": key, "hyp": hyp}
            else:
                record = json.loads(text)
            key = str(record["key"]) if "key" in record else Path(record["wav"]).stem
        except (ValueError, TypeError, KeyError):
            needed = "key<TAB>hyp" if path.suffix == ".txt" else "a JSON object with wav or key"
            shown = line[:60].decode(errors="backslashreplace")
            raise Refused(f"{where}: {needed}, in UTF-8, is needed, not {shown!r}") from None
        if key in records:
            raise Refused(f"{where}: key {key!r} is at {records[key]['where']} too; give each line its own")
        records[key] = {**record, "where": where}
    return records


def read_utterances(ref_path: Path, hyp_path: Path) -> list[Utterance]:
    """The references in their order, each with its hypothesis; one path twice where each line holds both.

    Raises Refused with file and line for whatever cannot be read, is missing, doubled or unknown.
    """
    refs, hyps = read_records(ref_path), read_records(hyp_path)
    for key, record in hyps.items():
        if key not in refs:
            raise Refused(f"{record['where']}: key {key!r} is not in {ref_path}")
    missing = [key for key in refs if key not in hyps]
    if missing:
        first = f"the first for key {missing[0]!r} of {refs[missing[0]]['where']}"
        raise Refused(f"{hyp_path}: {len(missing)} of {len(refs)} hypotheses are missing, {first}")

    utterances = []
    for key, record in refs.items():
        ref = record.get("target", record.get("txt"))
        error = hyps[key].get("error") if "hyp" not in hyps[key] else None
        hyp = hyps[key].get("hyp", None if error is None else "")
        seconds = hyps[key].get("seconds", record.get("duration"))
        if not isinstance(ref, str):
            raise Refused(f"{record['where']}: target, or else txt, must be text, not {ref!r}")
        if not isinstance(hyp, str):
            raise Refused(f"{hyps[key]['where']}: hyp must be text, not {hyp!r}")
        if not isinstance(seconds, int | float | None):
            raise Refused(f"{hyps[key]['where']}: seconds must be a number, not {seconds!r}")
        wav, kind = ref_path.parent / str(record.get("wav", "")), hallucination(ref, hyp, seconds)
        utterances.append(Utterance(key, ref, hyp, seconds, wav, error, kind))
    return utterances


def choose_unit(refs: list[str]) -> str:
    """`char` where most characters are of scripts without spaces, `word` otherwise."""
    text = "".join("".join(refs).split())
    return "char" if len(re.findall(f"[{UNSPACED}]", text)) > len(text) / 2 else "word"


def make_normalizer(name: str) -> Callable[[str], str]:
    if name == "none":
        return str
    from whisper import normalizers  # not above, since it brings torch: 2 s

    return normalizers.BasicTextNormalizer() if name == "basic" else normalizers.EnglishTextNormalizer()


def whole_texts(utterances: list[Utterance], metric: str, normalize: Callable[[str], str]) -> str:
    """The line of `bleu`, `chrf` or `exact`; what has no hypothesis counts as empty."""
    refs = [" ".join(normalize(utterance.ref).split()) for utterance in utterances]
    hyps = [" ".join(normalize(utterance.hyp).split()) for utterance in utterances]
    if metric == "exact":
        equal = sum(map(str.__eq__, refs, hyps))
        return f"%EXACT {100 * equal / len(refs):.2f} [ {equal} / {len(refs)} ]"
    from sacrebleu.metrics import BLEU, CHRF

    tokenizer = "13a"
    if choose_unit(refs) == "char":  # zh would take a Thai or Japanese sentence for one word
        tokenizer = "char" if re.search("[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff]", "".join(refs)) else "zh"
    scorer = BLEU(tokenize=tokenizer) if metric == "bleu" else CHRF()
    rate = scorer.corpus_score(hyps, [refs]).score
    return f"%{metric.upper()} {rate:.2f} [ {scorer.get_signature()} ]"


def align(utterances: list[Utterance], unit: str, normalize: Callable[[str], str]) -> np.ndarray:
    """Levenshtein alignment (jiwer): fills in `pairs` and `errors`, and returns counts, (utterances, 4).

    A pair is a mark ("" correct, I inserted, D deleted, S substituted), a unit of the reference and one of
    the hypothesis, "" where there is none. Counts are of the reference's units, and of I, D and S.
    """
    space, process = ("", jiwer.process_characters) if unit == "char" else (" ", jiwer.process_words)
    refs = [space.join(normalize(utterance.ref).split()) for utterance in utterances]
    hyps = [space.join(normalize(utterance.hyp).split()) for utterance in utterances]
    output, counts = process(refs, hyps), []
    aligned = zip(utterances, output.references, output.hypotheses, output.alignments)
    for utterance, ref, hyp, chunks in aligned:
        for chunk in chunks:
            ref_units = ref[chunk.ref_start_idx : chunk.ref_end_idx]
            hyp_units = hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
            mark = "" if chunk.type == "equal" else chunk.type[0].upper()
            utterance.pairs += [(mark, *pair) for pair in zip_longest(ref_units, hyp_units, fillvalue="")]
        marks = Counter(mark for mark, _, _ in utterance.pairs)
        counts.append([len(ref), marks["I"], marks["D"], marks["S"]])
        utterance.errors = sum(counts[-1][1:])
    return np.array(counts)


def error_rate(counts: np.ndarray) -> float:
    """Errors per 100 units of the reference, over rows that `align` returned; nan if there are no units."""
    units, *errors = counts.sum(axis=0)
    return 100 * sum(errors) / units if units else math.nan


def total(counts: np.ndarray, unit: str) -> str:
    """The line that Kaldi made the custom."""
    units, inserted, deleted, substituted = counts.sum(axis=0)
    errors = f"{inserted + deleted + substituted} / {units}, {inserted} ins, {deleted} del, {substituted} sub"
    return f"%{'CER' if unit == 'char' else 'WER'} {error_rate(counts):.2f} [ {errors} ]"


def bootstrap(counts: np.ndarray, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the error rate over resampled utterances, in any order (Bisani and Ney 2004)."""
    counts = counts[np.lexsort(counts.T)]
    random = np.random.default_rng(seed)
    rates = [error_rate(counts[random.integers(len(counts), size=len(counts))]) for _ in range(resamples)]
    low, high = np.percentile([rate for rate in rates if not math.isnan(rate)] or math.nan, [2.5, 97.5])
    return float(low), float(high)


def summarize(utterances: list[Utterance], counts: np.ndarray, unit: str, normalizer: str) -> str:
    """What is printed before the worst utterances and stands on top of the report."""
    low, high = bootstrap(counts)
    kinds = Counter(utterance.kind for utterance in utterances if utterance.kind)
    by_kind = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
    lines = [
        f"{len(utterances)} utterances, unit {unit}, normalizer {normalizer}",
        total(counts, unit),
        f"95 % interval {low:.2f} to {high:.2f} (bootstrap over utterances)",
        f"without {kinds.total()} hallucinated utterances ({by_kind}):",
        total(counts[[utterance.kind is None for utterance in utterances]], unit),
    ]
    if not counts[:, 0].any():
        lines.append(f"the references hold no {unit}: errors are counted, but there is no rate")
    failed = [utterance for utterance in utterances if utterance.error is not None]
    if failed:
        first = f"{failed[0].key}: {failed[0].error}"
        lines.append(f"{len(failed)} could not be recognised and count as deletions, the first being {first}")
    refs, hyps = ("".join(getattr(utterance, side) for utterance in utterances) for side in ("ref", "hyp"))
    for side, one, other in (("references", refs, hyps), ("hypotheses", hyps, refs)):
        if normalizer == "none" and one.isupper() and other != other.upper():
            lines.append(f"only the {side} are upper case, and case counts: try --normalizer basic")
    return "\n".join(lines)


def three_lines(pairs: list[tuple[str, str, str]], columns: int = 100, blocks: int = 4) -> str:
    """An alignment for the terminal: reference over hypothesis over marks; of a long one the first blocks."""
    lines, used = [], columns
    for mark, ref, hyp in pairs:
        cells = ref or "*", hyp or "*", mark
        widths = [len(cell) + sum(unicodedata.east_asian_width(c) in "WF" for c in cell) for cell in cells]
        if used + 1 + max(widths) > columns:
            lines, used = [*lines, "REF:", "HYP:", "    "], 4
        for row, (cell, width) in enumerate(zip(cells, widths), start=-3):
            lines[row] += " " + cell + " " * (max(widths) - width)
        used += 1 + max(widths)
    return "\n".join(line.rstrip() for line in lines[: 3 * blocks] + ["..."] * (len(lines) > 3 * blocks))


def report(utterances: list[Utterance], summary: str, unit: str, folder: Path) -> str:
    """A page in `folder`, the utterances as they come; it loads nothing but the audio that one plays."""
    forms = {"": "{0}", "I": "<ins>{1}</ins>", "D": "<del>{0}</del>", "S": "<s>{0}</s><b>{1}</b>"}
    space, rows = "" if unit == "char" else " ", []
    for utterance in utterances:
        spans = []
        for mark, group in groupby(utterance.pairs, key=lambda pair: pair[0]):
            _, ref, hyp = (html.escape(space.join(side)) for side in zip(*group))
            spans.append(forms[mark].format(ref, hyp))
        about = [html.escape(str(line)) for line in (utterance.key, utterance.kind, utterance.error) if line]
        if utterance.wav.is_file():
            url = quote(os.path.relpath(utterance.wav, folder))
            about.append(f'<audio controls preload="none" src="{url}"></audio>')
        rows.append(f'<tr><td>{utterance.errors}<td>{"<br>".join(about)}<td dir="auto">{space.join(spans)}')
    return PAGE.substitute(summary=html.escape(summary), rows="\n".join(rows))


PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Ears: errors</title>
<style>
:root { color-scheme: light dark; --del: #b3003c; --ins: #0062a8; --sub: #7a5200; }
@media (prefers-color-scheme: dark) { :root { --del: #ff9eb5; --ins: #86c5ff; --sub: #f0c060; } }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 75em; margin: auto; padding: 1em; }
pre { white-space: pre-wrap; }
pre, td { overflow-wrap: anywhere; }
table { border-collapse: collapse; }
th, td { border-top: 1px solid #8888; padding: .4em .6em; text-align: start; vertical-align: top; }
td:nth-child(2) { min-width: 16em; font-size: .85em; }
audio { width: 16em; height: 2em; }
del, s { color: var(--del); border: 1px dashed; text-decoration: none; } /* a line would hide 一 */
ins { color: var(--ins); } ins::before { content: "+"; }
s, b { color: var(--sub); } b::before { content: "\\2192"; }
@media (max-width: 45em) {
  thead { display: none; } tr { display: block; border-top: 1px solid #8888; }
  td { display: inline-block; border: 0; } td:last-child { display: block; } }
</style>
<pre>$summary</pre>
<p><del>said, not written</del> <ins>written, not said</ins> <s>said</s><b>written instead</b></p>
<table>
<thead><tr><th>Errors<th>Utterance<th>Reference and hypothesis</thead>
$rows
</table>
</html>
""")


def main(argv: list[str] | None = None) -> int:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    parser.add_argument("result", nargs="?", type=Path, help="result.jsonl of recognize.py")
    parser.add_argument("--ref", type=Path, help="in place of result: the manifest, and with it")
    parser.add_argument("--hyp", type=Path, help="result.txt (key<TAB>hyp lines) or result.jsonl")
    counted = parser.add_mutually_exclusive_group()
    counted.add_argument("--unit", choices=["word", "char"], help="what is counted (default: by the script)")
    counted.add_argument(
        "--metric", choices=["wer", "cer", "bleu", "chrf", "exact"], help="default: by --unit"
    )
    norms = ["none", "basic", "english"]
    parser.add_argument("--normalizer", choices=norms, default="none", help="default: none")
    parser.add_argument("--html", type=Path, help="where to write a report of all utterances, worst first")
    args = parser.parse_args(argv)
    if bool(args.result) == bool(args.ref) or bool(args.ref) != bool(args.hyp):
        parser.error("give either result.jsonl, or --ref test.jsonl --hyp result.txt")
    if args.html and args.metric in ("bleu", "chrf", "exact"):
        parser.error("--html shows WER and CER")

    try:
        utterances = read_utterances(args.result or args.ref, args.result or args.hyp)
    except (OSError, Refused) as error:
        parser.exit(2, f"error: {error}\n")
    failed = int(any(utterance.error is not None for utterance in utterances))
    normalize = make_normalizer(args.normalizer)
    if args.metric in ("bleu", "chrf", "exact"):
        print(f"{len(utterances)} utterances, normalizer {args.normalizer}")
        print(whole_texts(utterances, args.metric, normalize))
        return failed
    unit = {"wer": "word", "cer": "char"}.get(args.metric, args.unit)
    unit = unit or choose_unit([utterance.ref for utterance in utterances])
    counts = align(utterances, unit, normalize)
    summary = summarize(utterances, counts, unit, args.normalizer)
    worst_first = sorted(utterances, key=lambda utterance: (-utterance.errors, utterance.key))

    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        page = report(worst_first, summary, unit, args.html.parent)
        args.html.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal has no such letters
    print(summary)
    for utterance in worst_first[:5]:
        if utterance.errors:
            kind = f", {utterance.kind}" if utterance.kind else ""
            print(f"\n{utterance.key}, errors: {utterance.errors}{kind}\n{three_lines(utterance.pairs)}")
    return failed


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, without a traceback
    sys.exit(main())
