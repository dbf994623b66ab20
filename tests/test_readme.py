"""README, Makefile and the house rules say what is true."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CORE = ["model.py", "dataset.py", "train.py", "recognize.py"]
OTHERS = """beam_search chat continuation conversation encoder errors evaluation features hallucination
    manifest plot projector report resumable sampler score trainer"""
OTHERS = [f"{name}.py" for name in OTHERS.split()]
COMMANDS = [
    line.strip()
    for text in [README, *(path.read_text(encoding="utf-8") for path in ROOT.glob("recipes/*/*.sh"))]
    for line in text.replace("\\\n", " ").splitlines()
    if re.match(r"\s*(\$python|python|torchrun) ", line)
]


def lines_of(name: str) -> int:
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def test_core_stays_under_700_lines():
    assert sum(map(lines_of, CORE)) < 700


def test_line_counts_are_true():
    counts = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.M))
    assert set(CORE) < set(counts)
    assert {name: int(count) for name, count in counts.items()} == {name: lines_of(name) for name in counts}


@pytest.fixture(scope="module")
def help_of():
    texts = {}

    def text(script: str) -> str:
        if script not in texts:
            command = [sys.executable, script, "--help"]
            texts[script] = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        return texts[script]

    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_scripts_and_flags_that_exist(command, help_of):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    known = set(re.findall(r"--\w+", help_of(script)))
    used = {word for word in words[words.index(script) :] if word.startswith("--")}
    assert used <= known


def test_flags_in_the_text_exist(help_of):
    scripts = ["train.py", "recognize.py", "continuation.py", "score.py", "chat.py"]
    others = ["benchmarks/harness.py", "benchmarks/plan.py", "recipes/aishell/prepare.py"]
    texts = [*map(help_of, scripts), *((ROOT / name).read_text(encoding="utf-8") for name in others)]
    known = set(re.findall(r"--\w+", "".join(texts)))
    prose = re.findall(r"`(--[\w-]+)", README)
    assert prose and set(prose) <= known | {"--nproc_per_node", "--shutdown-timeout"}  # of torchrun


def test_paths_exist():
    paths = re.findall(r"`((?:\w+/)*\w+\.(?:py|json|txt|sh))`", README)
    made = {"config.json", "result.jsonl", "hello.wav"}
    assert len(paths) > 5
    assert [path for path in paths if path not in made and not (ROOT / path).exists()] == []
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`?make (\w+)`", README)) <= set(targets)


def test_no_path_of_a_machine_and_no_code_of_the_demo_in_the_core():
    for name in [*CORE, *OTHERS]:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "demo" not in text and not re.search(r"/(home|root|work|tmp)/", text), name


def test_scripts_do_not_import_each_other():
    scripts = {"train", "recognize", "continuation", "score", "chat"}
    for name in [*CORE, *OTHERS]:
        text = (ROOT / name).read_text(encoding="utf-8")
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
        assert not imported & scripts, name
        assert name != "model.py" or not imported & {"dataset", "beam_search"}
