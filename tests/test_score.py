"""score.py counts what jiwer and a Levenshtein distance by hand count, and skips no line."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import sacrebleu

import score

ROOT = Path(score.__file__).parent
REAL = Path(os.environ.get("EARS_DATA", ROOT.parent / "shared" / "data"))
SENTENCES = [  # as they are read in public corpora: cased, upper case, punctuated, digits, Mandarin, short
    "that the forms of printed letters should be beautiful, and that their arrangement should be reasonable",
    "I'M SORRY SAID THE KING BUT I CANNOT LET YOU GO",
    "THERE IS NO SPEECH NOR LANGUAGE WHERE THEIR VOICE IS NOT HEARD",
    "He apologized for his long speech, and was heard no more.",
    "she had no audience as an aide to him, nor could she process it",
    "no no no no I will not",
    "seven seven seven two one one one",
    "TO BE OR NOT TO BE THAT IS THE QUESTION",
    "thank you thank you very much",
    "yes",
    "抱歉他不能来参加会议",
    "人工智能领域的研究没有停下",
    "三百二十八万一千一百三十八点四八",
    "慢慢慢慢地走过去",
    "สวัสดีครับ ยินดีที่ได้รู้จัก",
]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def random_pairs(seed: int, count: int = 60) -> list[tuple[str, str]]:
    """References, empty ones too, with hypotheses that are right, wrong, empty, longer, shorter."""
    words = random.Random(seed)
    text = lambda: " ".join(words.choices("a bb ccc 你好 吗 d", k=words.randrange(8)))  # noqa: E731
    return [("one two", "one"), *((text(), text()) for _ in range(count)), ("a", "")]


def records_of(pairs: list[tuple[str, str]]) -> list[dict]:
    return [{"wav": f"wav/{i}.wav", "txt": ref, "hyp": hyp} for i, (ref, hyp) in enumerate(pairs)]


def run(capsys, *argv) -> tuple[int, str, str]:
    try:
        code = score.main([str(arg) for arg in argv])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def rates(out: str) -> list[tuple[str, ...]]:
    """(name, rate, errors, units, ins, del, sub) of each total in the output."""
    form = r"^%(WER|CER) (nan|\d+\.\d\d) \[ (\d+) / (\d+), (\d+) ins, (\d+) del, (\d+) sub \]$"
    return re.findall(form, out, re.M)


def distance(ref, hyp) -> int:
    """Levenshtein distance, in the plainest way."""
    row = list(range(len(hyp) + 1))
    for i, a in enumerate(ref, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(hyp, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


@pytest.mark.parametrize("unit", ["word", "char"])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_jiwer_and_of_plain_dynamic_programming(tmp_path, capsys, unit, seed):
    pairs = random_pairs(seed)
    code, out, _ = run(capsys, write(tmp_path / "result.jsonl", records_of(pairs)), "--unit", unit)
    name, rate, *counts = rates(out)[0]
    errors, units, inserted, deleted, substituted = map(int, counts)

    split = str.split if unit == "word" else lambda text: list(text.replace(" ", ""))
    refs, hyps = ([split(text) for text in side] for side in zip(*pairs))
    assert errors == sum(map(distance, refs, hyps)) == inserted + deleted + substituted
    assert units == sum(map(len, refs))
    assert inserted - deleted == sum(map(len, hyps)) - units
    assert float(rate) == pytest.approx(100 * errors / units, abs=0.005)
    theirs = jiwer.process_words([" ".join(ref) for ref in refs], [" ".join(hyp) for hyp in hyps])
    assert (inserted, deleted, substituted) == (theirs.insertions, theirs.deletions, theirs.substitutions)
    assert (code, name) == (0, {"word": "WER", "char": "CER"}[unit])


def test_txt_and_jsonl_in_any_order_give_the_same_result(tmp_path, capsys):
    records = records_of(random_pairs(7))
    shuffled = [
        *random.Random(0).sample(records[:-1], len(records) - 1),
        records[-1],
    ]  # the last hyp is empty
    refs = [{"wav": record["wav"], "txt": record["txt"]} for record in records]
    lines = "\r\n".join(
        f"{Path(record['wav']).stem}\t{record['hyp'].replace(' ', chr(9))}" for record in shuffled
    )
    (tmp_path / "result.txt").write_text("\ufeff" + lines + "\r\n\r\n", "utf-8", newline="")
    ref = write(tmp_path / "test.jsonl", refs)

    one = run(capsys, write(tmp_path / "result.jsonl", records))
    assert one[0] == 0 and len(rates(one[1])) == 2
    assert run(capsys, write(tmp_path / "shuffled.jsonl", shuffled)) == one
    assert run(capsys, "--ref", ref, "--hyp", tmp_path / "shuffled.jsonl") == one
    assert run(capsys, "--ref", ref, "--hyp", tmp_path / "result.txt") == one


def test_the_reference_is_the_target_where_there_is_one(tmp_path, capsys):
    record = {"key": "a", "txt": "good morning", "target": "guten Morgen allerseits", "hyp": "guten Morgen"}
    assert rates(run(capsys, write(tmp_path / "r.jsonl", [record]))[1])[0][2:] == ("1", "3", "0", "1", "0")


GOOD = [{"key": "a", "txt": "one", "hyp": "one"}, {"key": "b", "txt": "two", "hyp": "two"}]


@pytest.mark.parametrize(
    ("ref", "hyp", "message"),
    [
        (None, "a\tone\n", "hypotheses are missing.*'b' of {ref}:2"),
        (None, "a\tone\nb\ttwo\na\tone\n", "{hyp}:3: key 'a' is at {hyp}:1 too"),
        (None, "a\tone\nb\ttwo\nc\ttwo\n", "{hyp}:3: key 'c' is not in {ref}"),
        (None, "a\tone\nb two\n", "{hyp}:2: key<TAB>hyp"),
        (None, "a\tone\n\nb\ttwo\n", "{hyp}:2: key<TAB>hyp"),
        (None, "", "{hyp}:1: key<TAB>hyp"),
        (None, b"a\tone\nb\t\xff\n", "{hyp}:2: key<TAB>hyp, in UTF-8"),
        (b"", "a\tone\n", "{ref}:1: a JSON object"),
        (b'{"key": "a", "txt": "one"}\n{"key": "b", "txt"\n', "a\tone\n", "{ref}:2: a JSON object"),
        (b'{"key": "a", "txt": "one"}\n\n{"key": "b", "txt": "two"}\n', "a\tone\n", "{ref}:2: a JSON object"),
        (b'["a", "one"]\n', "a\tone\n", "{ref}:1: a JSON object"),
        (b'{"txt": "one"}\n', "a\tone\n", "{ref}:1: a JSON object with wav or key"),
        (b'{"key": "a", "txt": "\xff"}\n', "a\tone\n", "{ref}:1: .*UTF-8"),
        (b'{"key": "a"}\n', "a\tone\n", "{ref}:1: target, or else txt, must be text"),
        (b'{"key": "a", "txt": "one", "duration": "2 s"}\n', "a\tone\n", "{hyp}:1: seconds must be a number"),
        (
            b'{"wav": "x/a.wav", "txt": "one"}\n{"wav": "y/a.flac", "txt": "two"}\n',
            "a\tone\n",
            "{ref}:2: key 'a'",
        ),
    ],
)
def test_a_line_that_cannot_be_scored_is_an_error_with_its_place(tmp_path, capsys, ref, hyp, message):
    ref_path, hyp_path = write(tmp_path / "test.jsonl", GOOD), tmp_path / "result.txt"
    if ref is not None:
        ref_path.write_bytes(ref)
    hyp_path.write_bytes(hyp if isinstance(hyp, bytes) else hyp.encode())
    code, out, err = run(capsys, "--ref", ref_path, "--hyp", hyp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message.format(ref=re.escape(str(ref_path)), hyp=re.escape(str(hyp_path))), err), err


@pytest.mark.parametrize("hyp", [{}, {"hyp": None}, {"hyp": 5}, {"error": None}])
def test_a_result_without_hypothesis_is_an_error(tmp_path, capsys, hyp):
    path = write(tmp_path / "result.jsonl", [GOOD[0], {"key": "b", "txt": "two", **hyp}])
    code, out, err = run(capsys, path)
    assert (code, out) == (2, "") and f"{path}:2: hyp must be text" in err
    path = write(tmp_path / "result.jsonl", [GOOD[0], GOOD[0]])
    assert "result.jsonl:2: key 'a'" in run(capsys, path)[2]


def test_no_file_and_half_a_command_are_errors(tmp_path, capsys):
    path, there = write(tmp_path / "result.jsonl", GOOD), ["--ref", tmp_path / "result.jsonl"]
    for argv in (
        ["no.jsonl"],
        [tmp_path],
        [*there, "--hyp", "no.txt"],
        [],
        there,
        there[::-1],
        [path, "--hyp", path],
    ):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "") and "error: " in err
    done = subprocess.run([sys.executable, ROOT / "score.py", "no.jsonl"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr


def test_what_could_not_be_read_counts_as_deletions_and_fails(tmp_path, capsys):
    records = [GOOD[0], {"key": "b", "txt": "two three", "error": "b.wav: truncated"}]
    code, out, _ = run(capsys, write(tmp_path / "result.jsonl", records))
    assert code == 1 and rates(out)[0][2:] == ("2", "3", "0", "2", "0")
    assert "1 could not be recognised and count as deletions, the first being b: b.wav: truncated" in out
    again = subprocess.run(
        [sys.executable, ROOT / "score.py", tmp_path / "result.jsonl"], stdout=subprocess.PIPE
    )
    assert (again.returncode, again.stdout.decode()) == (code, out)
    stale = write(tmp_path / "test.jsonl", [GOOD[0], {"key": "b", "txt": "two three", "hyp": "two three"}])
    assert run(capsys, "--ref", stale, "--hyp", tmp_path / "result.jsonl")[:2] == (code, out)


def test_words_for_an_empty_reference_are_insertions(tmp_path, capsys):
    records = [GOOD[0], {"key": "b", "txt": " ", "hyp": "thank you"}, {"key": "c", "txt": "", "hyp": ""}]
    out = run(capsys, write(tmp_path / "result.jsonl", records))[1]
    assert rates(out)[0][1:] == ("200.00", "2", "1", "2", "0", "0") and "nan" not in out
    assert "without 1 hallucinated utterances (1 silence)" in out and rates(out)[1][1:4] == ("0.00", "0", "1")


@pytest.mark.filterwarnings("error")
def test_empty_references_alone_have_no_rate(tmp_path, capsys):
    records = [{"key": "a", "txt": "", "hyp": "thank you"}, {"key": "b", "txt": "", "hyp": ""}]
    code, out, _ = run(capsys, write(tmp_path / "result.jsonl", records), "--html", tmp_path / "r.html")
    assert code == 0 and rates(out)[0][1:] == ("nan", "2", "0", "2", "0", "0")
    assert "the references hold no word: errors are counted, but there is no rate" in out


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_holds_the_estimate_and_narrows_with_more_utterances(seed):
    draws = np.random.default_rng(seed)
    counts = np.stack([draws.integers(5, 20, 100), *draws.integers(0, 3, (3, 100))], axis=1)
    low, high = score.bootstrap(counts)
    assert low < score.error_rate(counts) < high
    assert score.bootstrap(counts) == score.bootstrap(counts[::-1]) == (low, high)
    more_low, more_high = score.bootstrap(np.tile(counts, (25, 1)))
    assert (more_high - more_low) * 5 == pytest.approx(high - low, rel=0.15)  # as 1 / sqrt(utterances)


def test_the_interval_is_that_of_theory():
    """Of 400 one-word utterances, wrong with probability 0.2, the rate has a standard error of 2.0 %."""
    counts = np.array([[1, 0, 0, int(i % 5 == 0)] for i in range(400)])
    assert score.bootstrap(counts) == pytest.approx((20 - 1.96 * 2, 20 + 1.96 * 2), abs=0.4)


def test_the_unit_follows_the_script_and_is_named(tmp_path, capsys):
    def first(ref, hyp, *argv):
        out = run(capsys, write(tmp_path / "r.jsonl", [{"key": "a", "txt": ref, "hyp": hyp}]), *argv)[1]
        return out.splitlines()[0].split(", ")[1], *rates(out)[0][:4]

    assert first("即便是一些 别墅", "即便是一 些别墅项目") == ("unit char", "CER", "28.57", "2", "7")
    assert first("สวัสดี ครับ", "สวัสดีครับ") == ("unit char", "CER", "0.00", "0", "10")
    assert first("こんにちは", "こんにちわ") == ("unit char", "CER", "20.00", "1", "5")
    assert first("zero", "zeros") == ("unit word", "WER", "100.00", "1", "1")  # one word, yet no Chinese
    assert first("안녕하세요 여러분", "안녕하세요 여러분") == ("unit word", "WER", "0.00", "0", "2")
    assert first("the word 你好", "the word 你") == ("unit word", "WER", "33.33", "1", "3")
    assert first("即便是", "即便", "--unit", "word") == ("unit word", "WER", "100.00", "1", "1")
    assert first("a cat", "ac at", "--unit", "char") == ("unit char", "CER", "0.00", "0", "4")


def test_metric_wer_and_cer_are_unit_word_and_char(tmp_path, capsys):
    path = write(tmp_path / "result.jsonl", records_of(random_pairs(11)))
    for metric, unit in (("wer", "word"), ("cer", "char")):
        assert run(capsys, path, "--metric", metric) == run(capsys, path, "--unit", unit)


def last_line(capsys, path, *argv) -> str:
    code, out, err = run(capsys, path, *argv)
    assert (code, len(out.splitlines())) == (0, 2), err
    return out.splitlines()[1]


def test_bleu_and_chrf_are_sacrebleus_and_bear_its_signature(tmp_path, capsys):
    pairs = [(ref, " ".join(ref.split()[i % 3 :])) for i, ref in enumerate(SENTENCES[:10])]
    path = write(tmp_path / "result.jsonl", records_of(pairs))
    refs, hyps = zip(*pairs)
    bleu, chrf = sacrebleu.corpus_bleu(hyps, [refs]), sacrebleu.corpus_chrf(hyps, [refs])
    version = sacrebleu.__version__
    assert 50 < bleu.score < 99 and 50 < chrf.score < 99
    line = f"%BLEU {bleu.score:.2f} [ nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version} ]"
    assert last_line(capsys, path, "--metric", "bleu") == line
    line = f"%CHRF {chrf.score:.2f} [ nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version} ]"
    assert last_line(capsys, path, "--metric", "chrf") == line
    lower = sacrebleu.corpus_bleu(hyps, [refs], lowercase=True).score
    upper = write(tmp_path / "upper.jsonl", records_of([(ref, hyp.upper()) for ref, hyp in pairs]))
    line = last_line(capsys, upper, "--metric", "bleu", "--normalizer", "basic")
    assert lower * 0.9 < float(line.split()[1]) < 99


def test_bleu_cuts_what_has_no_spaces(tmp_path, capsys):
    for ref, hyp, tokenizer in (
        ("今天我们要去北京，看“天气”。", "今天我们要去北京，看一看。", "zh"),
        ("สวัสดีครับ ยินดีที่ได้รู้จัก", "สวัสดีครับ ยินดีที่รู้จัก", "char"),
        ("今日はとても天気がいいですね", "今日はとても天気がいいですよ", "char"),
    ):
        path = write(tmp_path / "result.jsonl", [{"key": "a", "txt": ref, "hyp": hyp}])
        line = last_line(capsys, path, "--metric", "bleu")
        assert f"tok:{tokenizer}|" in line and 30 < float(line.split()[1]) < 95


def test_exact_is_the_share_of_texts_that_equal_their_reference(tmp_path, capsys):
    pairs = [("lamp on", "lamp on"), ("lamp off", "Lamp off."), ("a  b", "a b"), ("yes", "no"), ("", "")]
    path = write(tmp_path / "result.jsonl", records_of(pairs))
    assert last_line(capsys, path, "--metric", "exact") == "%EXACT 60.00 [ 3 / 5 ]"
    normalized = last_line(capsys, path, "--metric", "exact", "--normalizer", "basic")
    assert normalized == "%EXACT 80.00 [ 4 / 5 ]"
    failed = write(tmp_path / "failed.jsonl", [GOOD[0], {"key": "b", "txt": "two", "error": "truncated"}])
    code, out, _ = run(capsys, failed, "--metric", "exact")
    assert code == 1 and "%EXACT 50.00 [ 1 / 2 ]" in out


def test_metrics_that_contradict_other_flags_are_errors(tmp_path, capsys):
    path = write(tmp_path / "result.jsonl", GOOD)
    for argv in (["--metric", "wer", "--unit", "word"], ["--metric", "bleu", "--html", tmp_path / "r.html"]):
        code, out, err = run(capsys, path, *argv)
        assert (code, out) == (2, "") and "error: " in err and not (tmp_path / "r.html").exists()


def test_normalizers_and_the_hint_that_one_is_needed(tmp_path, capsys):
    path = write(
        tmp_path / "r.jsonl", [{"key": "a", "txt": "MISTER BROWN'S COLOUR", "hyp": "Mr. Brown's color"}]
    )
    code, out, _ = run(capsys, path)
    assert rates(out)[0][1] == "100.00" and "only the references are upper case" in out
    code, out, _ = run(capsys, path, "--normalizer", "basic")
    assert rates(out)[0][2:4] == ("2", "4") and "upper case" not in out  # brown s
    assert rates(run(capsys, path, "--normalizer", "english")[1])[0][1] == "0.00"

    path = write(tmp_path / "r.jsonl", [{"key": "a", "txt": "Brown", "hyp": "BROWN"}])
    assert "only the hypotheses are upper case" in run(capsys, path)[1]
    for ref, hyp in (("BROWN", "BROWN"), ("Brown", "brown"), ("BROWN", ""), ("A股", "A股"), ("即便", "即便")):
        path = write(tmp_path / "r.jsonl", [{"key": "a", "txt": ref, "hyp": hyp}])
        assert "upper case" not in run(capsys, path)[1]


REFUSALS = [
    "I apologize, but it appears that there is no speech to transcribe.",
    "I’m sorry, but I can’t assist with that.",
    "I'M SORRY BUT I CANNOT TRANSCRIBE THE AUDIO",
    "I'm an AI.",
    "I can't transcribe this.",
    "As an AI language model, I don't have the ability to listen.",
    "There is no speech.",
    "It seems that you haven't provided any speech to transcribe.",
    "Please provide the speech.",
    "Please provide the audio you would like me to transcribe.",
    "it was a fine morning I'm sorry, but there is no audio provided.",
    "很抱歉，我无法识别这段语音。",
    "抱歉，我无法转录音频",
    "作为一个人工智能语言模型，我不能听",
    "请提供音频文件",
    "抱歉，我无法回答这个问题",
]
LOOPS = [
    "the the the the the the the",
    "thank you thank you thank you thank you",
    "it was a fine morning and the king, and the king, and the king, and the king",
    "he said that it was so he said that it was so he said that it was so",
    "!!!!!!!!!!!!!!!!",
    "今天今天今天今天今天",
]


@pytest.mark.parametrize(
    "ref", ["it was a fine morning and there is but one thing that I had to say to him", "今天是星期三"]
)
def test_refusals_and_loops_are_found_beside_any_reference(ref):
    assert {hyp: score.hallucination(ref, hyp) for hyp in REFUSALS} == dict.fromkeys(REFUSALS, "refusal")
    assert {hyp: score.hallucination(ref, hyp) for hyp in LOOPS} == dict.fromkeys(LOOPS, "loop")


def test_what_the_reference_says_too_is_no_hallucination():
    for text in REFUSALS + LOOPS:
        assert score.hallucination(text, text) is None, text
        assert score.hallucination(f"so {text}", f"and {text.lower()}", 60) is None, text
    assert (
        score.hallucination("i am sorry but i cannot hear the audio", "I'm sorry, but I can't hear the audio")
        is None
    )
    assert score.hallucination("no no no no", "no no no no no") is None
    twice = "and all I had it was and all I had it was and so on and on and off"
    assert score.hallucination("so", twice) is None
    assert score.hallucination("i can't transcribe", "I can’t transcribe") is None
    assert score.hallucination(" ".join(["ha"] * 20), " ".join(["ha"] * 30)) is None
    assert score.hallucination(" ".join(["ha"] * 3), " ".join(["ha"] * 30)) == "loop"


def test_text_is_silence_only_for_an_empty_reference():
    assert score.hallucination("", "thank you", 1.0) == "silence" == score.hallucination(" ", "谢谢")
    assert score.hallucination("", "", 1.0) is None is score.hallucination("", " .", 1.0)
    assert (
        score.hallucination("thanks", "thank you", 1.0) is None is score.hallucination("thank you", "", 1.0)
    )


def test_too_long_is_more_than_a_human_can_say():
    english, chinese = (
        "and then the king went to the castle to see his daughter ",
        "今天我们要去北京看一看那里的天气",
    )
    assert score.hallucination("yes", english, 0.5) == score.hallucination("是", chinese, 0.5) == "too long"
    assert score.hallucination("yes", english, 2.0) is None is score.hallucination("是", chinese, 2.0)
    assert score.hallucination("yes", english) is None  # seconds not known
    assert (
        score.hallucination(english, english + "once more", 0.1) is None
    )  # the seconds are wrong, not the text


def assert_real(texts: list[tuple[str, float | None]]) -> None:
    for seed in range(5):
        refs = random.Random(seed).sample(texts, len(texts))
        for (ref, _), (hyp, seconds) in zip(refs, texts):
            assert score.hallucination(ref, hyp, seconds) is None, (ref, hyp)
            assert score.hallucination(hyp, hyp, seconds) is None, hyp


def test_real_sentences_are_merely_wrong():
    assert_real([(text, seconds) for text in SENTENCES for seconds in (None, 0.4 + len(text) / 15)])


def test_real_transcripts_are_merely_wrong():
    paths = sorted(REAL.glob("*/*.jsonl"))
    if not paths:
        pytest.skip(f"no recordings at {REAL} (EARS_DATA)")
    for path in paths:
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert_real([(record["txt"], record["duration"]) for record in records])


def test_hallucinated_utterances_are_set_apart_by_kind(tmp_path, capsys):
    hyps = [REFUSALS[0], LOOPS[0], LOOPS[1], "one two four"]
    records = [
        {"key": str(i), "txt": "one two three", "hyp": hyp, "seconds": 9.5} for i, hyp in enumerate(hyps)
    ]
    records += [
        {"key": "4", "txt": "", "hyp": "you"},
        {"key": "5", "txt": "a", "hyp": "a" * 40, "seconds": 0.1},
    ]
    out = run(capsys, write(tmp_path / "result.jsonl", records))[1]
    assert "without 5 hallucinated utterances (2 loop, 1 refusal, 1 silence, 1 too long):" in out
    assert rates(out)[1][2:] == ("1", "3", "0", "0", "1")
    refs = [{key: value for key, value in record.items() if key in ("key", "txt")} for record in records]
    refs[5]["duration"] = 0.1
    (tmp_path / "result.txt").write_text("".join(f"{record['key']}\t{record['hyp']}\n" for record in records))
    ref = write(tmp_path / "test.jsonl", refs)
    assert run(capsys, "--ref", ref, "--hyp", tmp_path / "result.txt")[1] == out


def test_the_five_worst_are_aligned(tmp_path, capsys):
    records = [{"key": f"k{n}", "txt": "a " * n + "end", "hyp": "end"} for n in range(8)]
    out = run(capsys, write(tmp_path / "result.jsonl", records))[1]
    assert re.findall(r"^(k\d), errors: (\d)", out, re.M) == [(f"k{n}", str(n)) for n in (7, 6, 5, 4, 3)]
    assert "REF: a a a end\nHYP: * * * end\n     D D D" in out
    assert "errors:" not in run(capsys, write(tmp_path / "result.jsonl", GOOD))[1]

    pairs = [("", "我", "我"), ("S", "们", "门"), ("I", "", "a"), ("", "今", "今")]
    assert score.three_lines(pairs) == "REF: 我 们 * 今\nHYP: 我 门 a 今\n        S  I"
    long = score.three_lines([("I", "", "wide")] * 900, columns=30).splitlines()
    assert len(long) == 13 and long[-1] == "..." and max(map(len, long)) <= 30


def test_text_that_no_terminal_can_show_is_scored(tmp_path, capsys):
    result = tmp_path / "result.jsonl"
    result.write_text('{"key": "a", "txt": "one", "hyp": "\\ud83d"}\n')  # half of an emoji
    code, out, _ = run(capsys, result, "--html", tmp_path / "report.html")
    assert (
        code == 0 and rates(out)[0][2] == "1" and "&#55357;" in (tmp_path / "report.html").read_text("utf-8")
    )


def test_head_ends_it_silently(tmp_path):
    result, report = write(tmp_path / "result.jsonl", records_of(random_pairs(1))), tmp_path / "r.html"
    read, write_end = os.pipe()
    os.close(read)  # as head does once it has its lines
    command = [sys.executable, ROOT / "score.py", result, "--html", report]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.stderr == "" and report.read_text("utf-8").rstrip().endswith("</html>")
