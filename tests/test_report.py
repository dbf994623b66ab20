"""The report says what score.py counted, runs no text of a manifest, and a browser sorts and searches it."""

import html
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[1]
EVIL = """<script>document.title = 'ran'</script><img src=x onerror="document.title = 'ran'"> & $policy {0}"""


class Page(HTMLParser):
    """What a browser makes of a report: its tags; the cells of each table's rows; each utterance's texts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.tables, self.articles, self.within = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "article":
            self.articles.append({"div": "", "p": ""})
        self.within = {"nav": "", "section": "table", "main": "main"}.get(tag, self.within)
        if tag in ("div", "p"):
            self.part = tag

    def handle_data(self, data):
        if self.within == "table" and self.tables and data.strip():
            self.tables[-1][-1][-1] += data
        if self.within == "main" and self.articles and data.strip("\n"):
            self.articles[-1][self.part] += data + "|" * (self.part == "div")

    def handle_endtag(self, tag):
        if tag in ("section", "main"):
            self.within = ""


def report(folder: Path, records: list[dict], *argv: str) -> tuple[str, str]:
    """What score.py prints of these records, and the report that it writes into `folder/out`."""
    result, page = folder / "result.jsonl", folder / "out" / "report.html"
    result.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    command = [sys.executable, ROOT / "score.py", result, "--html", page, *argv]
    return subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8").stdout, page.read_text("utf-8")


def make_records(count: int, seed: int = 0) -> list[dict]:
    """Records with empty texts, hallucinations and failures; some without speaker or seconds."""
    chance, records = random.Random(seed), []
    for number in range(count):
        ref, hyp = (
            " ".join(chance.choices("a bb ccc 你好 吗 d".split(), k=chance.randrange(9))) for _ in "ab"
        )
        hyp = chance.choice([ref, hyp, hyp, "there is no speech to transcribe", "so " * 9])
        record = {"key": f"k{number}", "txt": ref, "hyp": hyp, "speaker": chance.choice("ABC"), "id": number}
        record |= {"seconds": chance.expovariate(0.2), "noisy": chance.random() < 0.5}
        for name in chance.sample(["speaker", "seconds", "noisy"], k=chance.randrange(2)):
            del record[name]
        if chance.random() < 0.1:
            record["error"] = f"{number}.wav: truncated"
            del record["hyp"]
        records.append(record)
    return records


@pytest.mark.parametrize("unit", ["word", "char"])
def test_totals_are_those_printed_and_the_parts_add_up(tmp_path, unit):
    records = make_records(80)
    out, text = report(tmp_path, records, "--unit", unit)
    page, printed = Page(text), out.split("\n\n")[0].splitlines()
    for line in printed:
        assert f"<p>{html.escape(line)}</p>" in text or f"<h1>{html.escape(line)}</h1>" in text
    errors, units, inserted, deleted, substituted = map(int, re.findall(r"\d+", printed[1].split("[")[1]))

    names = ["by hallucination", "by duration", "by speaker", "by noisy"]
    assert [table[0][0] for table in page.tables] == names
    for head, *rows in page.tables:
        assert head[1:] == ["utterances", f"{unit}s", printed[1].split()[0], "ins", "del", "sub"]
        sums = [sum(int(row[column]) for row in rows) for column in (1, 2, 4, 5, 6)]
        assert sums == [len(records), units, inserted, deleted, substituted]
        for _, _, n, rate, *counts in rows:
            assert rate == (f"{100 * sum(map(int, counts)) / int(n):.2f}" if int(n) else "–")
    hallucinations, durations, speakers, _ = (
        {row[0]: int(row[1]) for row in table[1:]} for table in page.tables
    )
    said = Counter(re.findall(r"(\d+) (loop|refusal|silence|too long)", printed[3]))
    kinds = hallucinations.keys() - {"none", "not recognised"}
    assert said == Counter((str(hallucinations[kind]), kind) for kind in kinds)
    assert hallucinations["not recognised"] == sum("error" in record for record in records)
    assert durations["2 to 4 s"] == sum(2 <= record.get("seconds", 0) < 4 for record in records)
    assert durations["unknown"] == sum("seconds" not in record for record in records)
    assert speakers == Counter(record.get("speaker", "(none)") for record in records)


@pytest.mark.parametrize("unit", ["word", "char"])
def test_every_error_is_marked_and_the_worst_come_first(tmp_path, unit):
    records = make_records(60, seed=1)
    out, text = report(tmp_path, records, "--unit", unit)
    main, units = text.split("<main>")[1].split("</main>")[0], {}
    for tag in ("ins", "del", "s", "b"):
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", main)
        units[tag] = sum(len(text.split() if unit == "word" else text) for text in texts)
    inserted, deleted, substituted = map(int, re.search(r"(\d+) ins, (\d+) del, (\d+) sub", out).groups())
    assert units == {"ins": inserted, "del": deleted, "s": substituted, "b": substituted}

    page = Page(text)
    errors = [int(re.search(r"errors: (\d+) /", article["div"])[1]) for article in page.articles]
    assert len(errors) == len(records) and errors == sorted(errors, reverse=True)
    assert errors == [int(attrs["data-errors"]) for tag, attrs in page.tags if tag == "article"]
    for record in records:
        if "error" in record:
            [about] = [a["div"] for a in page.articles if a["div"].startswith(f"{record['key']}|")]
            assert f"|not recognised: {record['error']}|" in about
    css = text.split("<style>")[1]
    for sign in (
        'ins::before { content: "+"',
        "del, s { color: var(--del); border:",
        r'b::before { content: "\2192"',
    ):
        assert sign in css  # they differ by more than colour


def test_no_text_becomes_html_and_nothing_refers_to_the_network(tmp_path):
    (tmp_path / "wav").mkdir()
    (tmp_path / "wav" / "a b'\"#.wav").touch()
    part = {"wav": "wav/a b'\"#.wav", "start": 2, "duration": 1.5}
    records = [
        {"key": "right", "txt": "one two", "hyp": "one two", EVIL: EVIL, **part},
        {"key": EVIL, "txt": EVIL, "hyp": f"{EVIL} <b>x", EVIL: EVIL, "wav": "javascript:alert(1)"},
        {"key": "unread", "txt": "three", "error": f"<b>{EVIL}", EVIL: "<b>"},
        {"key": "right too", "txt": "one", "hyp": "one", EVIL: "<b>"},
    ]
    _, text = report(tmp_path, records)
    page = Page(text)
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["script"] == 1 and not tags.keys() & {"img", "link", "iframe", "object"}
    assert (tags["ins"], tags["del"], tags["s"], tags["b"]) == (1 + 1, 1 + 1, 1, 1)  # 1 each: the legend
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert [article["p"] for article in page.articles] == [f"{EVIL} <b>x", "three", "one two", "one"]
    assert page.articles[0]["div"].startswith(f"{EVIL}|errors: 1 / ")
    assert page.tables[-1][0][0] == f"by {EVIL}" and [row[0] for row in page.tables[-1][1:]] == ["<b>", EVIL]

    refs = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "action") if name in attrs]
    assert refs == ["../wav/a%20b%27%22%23.wav#t=2.000,3.500"]
    assert not re.search(r"https?:|=.?//|@import|url\(|fetch|XMLHttp", text)
    assert "default-src 'none'" in text and "script-src 'sha256-" in text


def test_it_says_so_where_no_audio_lies(tmp_path):
    hint, record = "no audio found", {"key": "a", "wav": "a.wav", "txt": "one", "hyp": "one"}
    assert hint in report(tmp_path, [record])[1]
    assert hint in report(tmp_path, [{**record, "wav": "a" * 300}])[1]  # longer than a name can be
    (tmp_path / "a.wav").touch()
    assert hint not in report(tmp_path, [record])[1]


@pytest.fixture(scope="module")
def chromium():
    name = next(filter(shutil.which, ["chromium", "chromium-browser", "google-chrome"]), None)
    if not name:
        pytest.skip("no chromium here: the report was not opened in a browser")
    driver = pytest.importorskip(
        "playwright.sync_api", reason="the report was not opened: pip install playwright"
    )
    with driver.sync_playwright() as playwright:
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        browser = playwright.chromium.launch(
            executable_path=shutil.which(name), args=[*flags, "--disable-sync"]
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens a page; fails on a script's error, a break of the page's policy, or a request that leaves."""
    page, wrong = chromium.new_page(viewport={"width": 400, "height": 900}), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("request", lambda request: request.url.startswith("file:") or wrong.append(request.url))

    def open_(path: Path):
        page.goto(path.as_uri())
        return page

    yield open_
    page.close()
    assert wrong == []


def test_in_a_browser_sorting_and_searching_work(tmp_path, opened):
    records = make_records(300, seed=2)
    _, text = report(tmp_path, records)
    page = opened(tmp_path / "out" / "report.html")
    shown = "[...document.querySelectorAll('article')].filter(row => row.checkVisibility())"
    keys = lambda: page.evaluate(f"{shown}.map(row => row.querySelector('bdi').textContent)")  # noqa: E731
    worst_first = keys()
    assert len(worst_first) == 300 and page.title() == "Ears: errors"

    page.select_option("select", "key")
    assert keys() == [record["key"] for record in records]  # k2 before k10
    page.select_option("select", "seconds")
    seconds = {record["key"]: record.get("seconds", 0) for record in records}
    assert [seconds[key] for key in keys()] == sorted(seconds.values(), reverse=True)
    page.select_option("select", "rate")
    rates = page.evaluate(f"{shown}.map(row => +row.dataset.rate)")
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1] == 0
    page.select_option("select", "errors")
    assert keys()[0] == worst_first[0] != records[0]["key"]

    for words, match in (
        ("TRUNCATED", lambda record: "error" in record),
        ("speaker: B", lambda record: record.get("speaker") == "B"),
        ("bb  ccc", lambda record: "bb ccc" in record["txt"] or "bb ccc" in record.get("hyp", "")),
        ("", lambda record: True),
    ):
        page.fill("input", words)
        assert sorted(keys()) == sorted(record["key"] for record in records if match(record)), words
        assert page.inner_text("output") == f"{len(keys())} of 300"
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_in_a_browser_no_text_runs_and_audio_plays(tmp_path, opened):
    wav = f"wav/{EVIL.replace('/', '|')}.wav"
    (tmp_path / "wav").mkdir()
    soundfile.write(tmp_path / wav, np.full(32000, 0.1), 16000)
    records = [
        {"key": EVIL, "txt": f"</p>{EVIL}", "hyp": EVIL, EVIL: EVIL, "wav": wav, "start": 1, "duration": 0.5},
        {"key": "b", "txt": EVIL, "error": EVIL, EVIL: "</main>"},
        {"key": "c", "txt": "x", "hyp": "</script>", EVIL: "</main>"},
        {"key": "d", "txt": "x", "hyp": "x", EVIL: EVIL},
    ]
    report(tmp_path, records)
    page = opened(tmp_path / "out" / "report.html")
    player = page.wait_for_selector("audio")
    assert player.evaluate("audio => [audio.preload, audio.readyState]") == ["none", 0]
    player.evaluate("audio => { audio.muted = true; return audio.play(); }")
    page.wait_for_function("document.querySelector('audio').currentTime > 1")  # from `start` on
    page.fill("input", ": </main>")
    assert page.inner_text("output") == "2 of 4" and page.title() == "Ears: errors"
    assert page.evaluate("[document.scripts.length, document.images.length]") == [1, 0]


def test_in_a_browser_10000_utterances_open_in_two_seconds(tmp_path, opened):
    chance, records = random.Random(0), []
    words = "the a king castle of to went daughter morning fine had one thing there".split()
    for number in range(10_000):
        ref = chance.choices(words, k=chance.randrange(5, 35))  # 20 words, of which every seventh is wrong
        hyp = [
            chance.choice(words) if chance.random() < 0.1 else word for word in ref if chance.random() < 0.95
        ]
        record = {"key": f"test-{number:05}", "wav": "a.wav", "txt": " ".join(ref), "hyp": " ".join(hyp)}
        records.append({**record, "seconds": len(ref) / 3, "speaker": f"s{number % 40}"})
    (tmp_path / "a.wav").touch()
    report(tmp_path, records)
    begun = time.perf_counter()
    page = opened(tmp_path / "out" / "report.html")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # painted
    print(f"opened in {time.perf_counter() - begun:.2f} s")
    assert page.locator("article").count() == 10_000
