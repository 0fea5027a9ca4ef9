"""What the documents show runs as shown."""

import ast
import itertools
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_published as published
import torch

from caddf.categorical import RowGenerators
from caddf.cli import main
from caddf.decoding import Task
from caddf.evaluation.protocol import PRESETS
from caddf.experiment import METHODS
from caddf.model_settings import ModelSettings
from caddf.models.backbone import DualBranch

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def run(source: str, **names) -> dict:
    exec(compile(source, "document", "exec"), names)
    return names


@pytest.fixture
def model() -> DualBranch:
    torch.manual_seed(0)
    return DualBranch(ModelSettings(size="debug").dual(vocab_size=20, bos_id=0))


def test_contributing_adds_an_objective(model):
    flat = run(blocks("CONTRIBUTING.md")[0])["Flat"]()
    loss = flat(model, torch.randint(20, (4, 16)), torch.Generator().manual_seed(0)).total
    loss.backward()
    assert loss.isfinite() and model.diffusion.embedding.map.grad is not None


def test_contributing_adds_a_decoder(model):
    decoder = run(blocks("CONTRIBUTING.md")[1])["LeftFirst"]()
    tokens = torch.tensor([[1, 2] + [20] * 6])
    task = Task(tokens, torch.tensor([8]), 20, RowGenerators(0, 1))
    with torch.no_grad():
        frames = list(decoder(model, task))
    assert [int(frame.fresh[0].nonzero()) for frame in frames] == [2, 3, 4, 5, 6, 7]
    assert (frames[-1].tokens < 20).all()


@pytest.mark.parametrize("place", ["src/caddf/objectives/flat.py", "src/caddf/decoding/left_first.py"])
def test_what_contributing_adds_passes_the_linter_and_is_typed(place):
    block = next(block for block in blocks("CONTRIBUTING.md") if block.startswith(f"# {place}\n"))
    source = block.removeprefix(f"# {place}\n")
    ruff = [sys.executable, "-m", "ruff"]
    check = [*ruff, "check", "--no-cache", "--extend-select", "ANN", "--stdin-filename", place, "-"]
    for command in (check, [*ruff, "format", "--no-cache", "--check", "--stdin-filename", place, "-"]):
        done = subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_contributing_adds_a_method(model, monkeypatch):
    import caddf.experiment

    monkeypatch.setattr(caddf.experiment, "METHODS", dict(METHODS))
    added = run(
        blocks("CONTRIBUTING.md")[2], METHODS=caddf.experiment.METHODS, _synergistic=caddf.experiment._synergistic
    )
    method = added["METHODS"]["caddf-ao"]
    objective = method.build(method.settings(**method.defaults), model.config)
    assert objective(model, torch.randint(20, (4, 16)), torch.Generator().manual_seed(0)).total.isfinite()


SMALL = {
    "--model.size": "debug",
    "--train.steps": "2",
    "--train.batch_size": "4",
    "--input": "my-text",
    "--test": "my-text",
    "--tokenizer gpt2": "bytes",
    "--max-windows": "2",
    "--samples": "1",
    "--max-new-tokens": "8",
    "--steps": "4",
    "--batch": "2",
    "--batch-size": "2",
    "--device": "cpu",
    "--dtype": "float32",
}
"""Options (with any value, or one) that take long or ask for what a machine may not have, and values in their place."""
HERE = {
    "bpe:2048": "bpe:400",
    "bpe:8192": "bpe:400",
    "hf:openai-community/gpt2": "gpt2",
    "hf:JingyangOu/radd-lambda-dce": "radd",
}
"""Tokenizers and names on the hub, and what stands for them."""
PREPARE = "caddf data prepare --input my-text --tokenizer bpe:400 --out my-data"
BEFORE = {
    "add-a-method.md": [PREPARE],
    "run-on-a-gpu.md": [PREPARE],
    "evaluate-with-lm-eval.md": [PREPARE, "caddf train --data my-data --out my-run --model.size debug --train.steps 2"],
}
"""Where a how-to begins with what another has made."""


def steps(name: str) -> list[tuple[str, str]]:
    """The blocks of a document in their order, each with its language."""
    return re.findall(
        r"^```(python|bash|yaml)\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands(block: str) -> list[list[str]]:
    """The words of each command: a line, but where a quotation or a backslash goes over its end."""
    lines, found = "", []
    for line in block.splitlines():
        lines += line + "\n"
        try:
            words = shlex.split(lines.replace("\\\n", " "), comments=True)
        except ValueError:  # an open quotation
            continue
        found, lines = [*found, words], ""
    assert not lines, "a quotation is never closed"
    return [words for words in found if words]


def run_small(words: list[str]) -> None:
    """Runs a command with the values of `SMALL` and `HERE`; of the harness's, makes the model that it asks for."""
    if "caddf.harness" in words:
        harness = pytest.importorskip("caddf.harness")
        harness.HarnessModel.create_from_arg_string(words[words.index("--model_args") + 1])
        return
    values = [
        SMALL.get(before) or SMALL.get(f"{before} {word}") or HERE.get(word, word)
        for before, word in itertools.pairwise(words)
    ]
    assert main(values[words.index("caddf") :]) == 0, words


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with what the how-tos take as given: text, a task's data, and checkpoints as published."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "WIDTH", 32)
    monkeypatch.setattr(published, "LENGTH", 1024)
    code = "def area(width, height):\n    result = width * height\n    return result\n\nimport time\n\n"
    code += "def now():\n    return time.time()\n\n"
    for folder in ("my-text", "tasks"):
        (tmp_path / folder).mkdir()
    for i in range(20):
        (tmp_path / "my-text" / f"{i}.txt").write_text(f"# File {i}.\n" + code * 4)
    (tmp_path / "pets.jsonl").write_text('{"question": "the cat sat on the", "answer": 0}\n' * 2)
    (tmp_path / "chapter.txt").write_text(code)
    gpt2, radd = published.CONFIGS["gpt2"], published.CONFIGS["radd-t-dce"]
    wide = {**radd["model"], "hidden_size": 32, "length": 1024}
    published.write(tmp_path / "gpt2", "gpt2", config={**gpt2, "n_embd": 32, "n_positions": 1024, "n_ctx": 1024})
    published.write(tmp_path / "radd", "radd-t-dce", config={**radd, "model": wide})
    methods = dict(METHODS)
    yield tmp_path
    METHODS.clear()
    METHODS.update(methods)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs" / "howto").glob("*.md")))
def test_a_howto_works_from_top_to_bottom(name, place):
    names: dict = {}
    for command in BEFORE.get(name, []):
        run_small(shlex.split(command))
    for language, block in steps(f"docs/howto/{name}"):
        if language == "yaml":
            (place / "tasks" / "task.yaml").write_text(block)
        elif language == "bash":
            for words in commands(block):
                run_small(words)
        else:
            if "lm_eval" in block:
                pytest.importorskip("lm_eval")
            for there, here in HERE.items():
                block = block.replace(f'"{there}"', f'"{here}"')
            names = run(block, **names)


def test_the_readme_writes_and_scores(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run(*blocks("README.md"))
    *frames, scores, _ = capsys.readouterr().out.splitlines()
    assert len(frames) > 5 and scores.startswith("[tensor([")


def test_benchmarks_are_run_from_python(place, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("caddf.benchmarks.measure.READ", 1 << 20)  # of 256 MiB
    run(*blocks("docs/benchmarks.md"))
    assert (
        "| caddf-lambda-dce | speculative" in capsys.readouterr().out and (place / "results/quick/decode.png").exists()
    )


def test_protocols_are_chosen_from_python(place, monkeypatch):
    monkeypatch.setitem(PRESETS, "radd", replace(PRESETS["radd"], samples=1))  # of 1,024
    text = "--train my-text --validation my-text --test my-text --max-documents 9"
    run_small(shlex.split(f"caddf data prepare {text} --tokenizer bpe:400 --out my-data"))
    size = "--model.size debug --model.context 1024 --train.steps 2"
    run_small(shlex.split(f"caddf train --data my-data --out my-run {size}"))
    run(*blocks("docs/evaluation.md"))


COMMAND = re.compile(r"(?:^    |`|^)caddf ((?:data |benchmark )?[a-z][\w-]*)([^`\n]*)", re.MULTILINE)


def test_every_option_that_is_shown_is_there(capsys):
    """Of all commands in the documents, within their text too."""
    shown: dict[str, set[str]] = {}
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for verb, rest in COMMAND.findall(path.read_text(encoding="utf-8")):
            shown.setdefault(verb, set()).update(re.findall(r"(?<!\S)--[a-z][\w.-]*", rest))
    assert len(shown) > 12
    for verb, options in shown.items():
        try:
            code = main([*verb.split(), "--help"])
        except SystemExit as done:
            code = done.code
        assert code == 0
        text = capsys.readouterr().out
        assert options <= {*re.findall(r"--[a-z][\w.-]*", text)}, (verb, options)


def test_files_import_from_their_floor_or_below():
    """As CONTRIBUTING.md has them; what only types need is nobody's."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    floors = {
        name: int(level)
        for level, what in re.findall(r"^\| (\d) \| (.*) \|$", text, re.M)
        for name in re.findall(r"`(\w+)(?:/|\.py)`", what.replace("through `interface.py`", ""))
    }
    package = ROOT / "src" / "caddf"
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "caddf":
                names = [node.module] if node.module != "caddf" else [f"caddf.{each.name}" for each in node.names]
                for other in {name.split(".")[1] for name in names}:
                    assert floors[own] >= floors[other], f"{path.relative_to(ROOT)} imports {other}"
