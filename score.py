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
--html: a page of the same, also by duration and by each key with few values, and all utterances (report.py).
"""

import argparse
import json
import math
import re
import signal
import sys
import unicodedata
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import jiwer
import numpy as np

from hallucination import UNSPACED, hallucination
from report import make_page

OWN = {"key", "wav", "txt", "target", "start", "duration", "hyp", "score", "seconds", "error", "where"}
EDGES = [1, 2, 4, 8, 16, 32]  # seconds, of the table by duration
DURATIONS = ["under 1 s", *map("{} to {} s".format, EDGES, EDGES[1:]), f"{EDGES[-1]} s and over", "unknown"]


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
    start: float | None  # in seconds, where it is a part of `wav`
    others: dict  # what else the record holds
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
        start = record["start"] if isinstance(record.get("start"), int | float) else None
        others = {name: str(value) for name, value in (hyps[key] | record).items() if name not in OWN}
        utterances.append(Utterance(key, ref, hyp, seconds, wav, error, kind, start, others))
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


def tabulate(groups: list[str], counts: np.ndarray, order: list[str] | None = None) -> list[tuple]:
    """(group, utterances, units, rate, ins, del, sub) of each; in that order, by default worst first."""
    rows = []
    for group in order or dict.fromkeys(groups):
        part = counts[[other == group for other in groups]]
        units, *errors = part.sum(axis=0)
        rows.append((group, len(part), units, error_rate(part), *errors))
    if not order:
        rows.sort(key=lambda row: -sum(row[4:]) / max(row[2], 1))
    return [row for row in rows if row[1]]


def make_tables(utterances: list[Utterance], counts: np.ndarray) -> list[tuple[str, list[tuple]]]:
    """What is counted by hallucination, by duration, and by each other key of 2 to 100 values that recur."""
    tables = []
    kinds = ["not recognised" if u.error is not None else u.kind or "none" for u in utterances]
    tables.append(("hallucination", tabulate(kinds, counts)))
    durations = [DURATIONS[-1 if u.seconds is None else bisect(EDGES, u.seconds)] for u in utterances]
    tables.append(("duration", tabulate(durations, counts, DURATIONS)))
    for name in dict.fromkeys(name for utterance in utterances for name in utterance.others):
        values = [utterance.others.get(name, "(none)") for utterance in utterances]
        if 2 <= len(set(values)) <= min(100, len(values) / 2):
            tables.append((name, tabulate(values, counts)))
    return tables


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
        page = make_page(summary, make_tables(utterances, counts), worst_first, unit, args.html.parent)
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
