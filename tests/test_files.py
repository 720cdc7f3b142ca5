"""The notebook as a file: pins, format, no outputs, and a script that plain Python can read."""

import re
import subprocess
import sys
import types

import pytest
from notebook import CELLS, NOTEBOOK, PATH, ROOT, run_cell


def test_install_cell_has_the_pins_of_requirements():
    required = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if line}
    installed = set(re.findall(r'"([^"]+[<>=][^"]+)"', CELLS["install"]))
    assert {pin for pin in required if not pin.startswith(("torch", "ipython"))} == installed


@pytest.mark.parametrize("on_colab", [False, True])
def test_install_only_on_colab(monkeypatch, on_colab):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    if on_colab:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    magics = []
    shell = types.SimpleNamespace(run_line_magic=lambda name, line: magics.append((name, line)))
    run_cell("install", {"get_ipython": lambda: shell})
    assert [line.split()[0] for name, line in magics] == (["install", "uninstall"] if on_colab else [])
    assert not any(re.search(r"\btorch\b", line) for name, line in magics)


def test_no_outputs_and_stable_ids():
    for cell in NOTEBOOK.cells:
        assert re.fullmatch(r"[a-z0-9-]+", cell.id)
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    assert len({cell.id for cell in NOTEBOOK.cells}) == len(NOTEBOOK.cells)


def test_parameters_cell():
    cell = next(cell for cell in NOTEBOOK.cells if cell.id == "parameters")
    assert cell.metadata.tags == ["parameters"]
    lines = cell.source.splitlines()
    assignments = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"\w+ = .+  # @param \{type:\"\w+\"\}", line) for line in assignments)
    assert lines[0].startswith("#") and {"beta", "max_length", "private"} <= {line.split()[0] for line in assignments}


def test_no_remote_code_and_no_pickles():
    source = "\n".join(CELLS.values())
    assert "trust_remote_code=True" not in source and "weights_only=False" not in source
    assert not re.search(
        r"torch\.load\(|pickle\.loads?\(|joblib|exec\(|eval\(\"", source.replace("torch.load(weights_only=True)", "")
    )
    calls = re.findall(r"\bAuto\w+\.from_\w+\((.*?)\n", source)
    assert len(calls) == 7 and [call for call in calls if "merged_dir" not in call and call]
    for call in re.findall(r"\bAuto\w+\.from_\w+\([^)]*\)", source):
        assert "trust_remote_code=False" in call or "merged_dir" in call, call
    assert source.count("use_safetensors=use_safetensors") == 1


@pytest.mark.parametrize(
    "command", [["format", "--check"], ["check", "--select", "E,F,I,B,UP", "--ignore", "E501"]], ids=["format", "lint"]
)
def test_ruff(command):
    folders = [PATH, *(ROOT / name for name in ("benchmarks", "rehearsal", "tests"))]
    subprocess.run([sys.executable, "-m", "ruff", *command, "--line-length", "120", *folders], check=True)


def test_sections_in_reading_order():
    headings = [
        cell.source.splitlines()[0]
        for cell in NOTEBOOK.cells
        if cell.source.startswith("#") and cell.cell_type == "markdown"
    ]
    assert headings[1:] == [
        f"## {name}"
        for name in (
            "Install,Parameters,Machine,Accounts,Sources,Preference data,ChatML,Model,Training,Curves,Merge,Hub,Evaluation,Generation"
        ).split(",")
    ]
    assert NOTEBOOK.cells[-1].cell_type == "code"
