"""The notebook as a file: sizes, pins, format, no outputs, and a script that plain Python can read."""

import ast
import re
import statistics
import subprocess
import sys

import pytest
from notebook import CELLS, NOTEBOOK, PATH, ROOT

CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
FOLDED = {cell.id for cell in CODE if cell.metadata.get("cellView") == "form"}
LINES = {cell.id: cell.source.count("\n") + 1 for cell in CODE}


def test_sizes():
    """What keeps the notebook readable; `pytest -k sizes -s` prints it."""
    visible = {name: lines for name, lines in LINES.items() if name not in FOLDED}
    folded = {name: LINES[name] for name in FOLDED}
    imports = [len(re.findall(r"^(?:from|import) ", source, re.MULTILINE)) for source in CELLS.values()]
    before = list(CELLS)[: list(CELLS).index("first-row")]
    table = {  # what is counted: (how many, at most)
        "code lines": (sum(LINES.values()), 1000),
        "visible code lines": (sum(visible.values()), 700),
        "visible cells": (len(visible), 44),
        "folded cells": (len(folded), 12),
        "median of visible cells": (statistics.median(visible.values()), 15),
        "longest visible cell": (max(visible.values()), 45),
        "longest folded cell": (max(lines for name, lines in folded.items() if name != "run-prompts-once"), 60),
        "the cell that runs prompts once": (LINES["run-prompts-once"], 95),
        "cells with a guard on a stage": (
            sum(bool(re.search(r"^if not (?:trained|merged)", s, re.M)) for s in CELLS.values()),
            2,
        ),
        "visible lines before the first pair": (sum(visible.get(name, 0) for name in before), 120),
        "imports in one cell": (max(imports), 8),
    }
    print("\n" + "\n".join(f"{name:36} {value:6} of {limit}" for name, (value, limit) in table.items()))
    assert {name: value for name, (value, limit) in table.items() if value > limit} == {}


def test_folded_cells_say_what_they_hide():
    for cell, before in zip(NOTEBOOK.cells[1:], NOTEBOOK.cells, strict=False):
        if cell.id in FOLDED:
            assert cell.metadata.jupyter.source_hidden and cell.source.startswith("# @title ")
            assert before.cell_type == "markdown" or before.id in FOLDED


def test_install_cell_has_the_pins_of_requirements():
    required = set((ROOT / "requirements.txt").read_text().split())
    packages = next(
        ast.literal_eval(node.value)
        for node in ast.parse(CELLS["install"]).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "PACKAGES"
    )
    assert {pin for pin in required if not pin.startswith("torch")} == set(packages.split())


def test_no_outputs_and_stable_ids():
    assert all(not cell.outputs and cell.execution_count is None for cell in CODE)
    assert all(re.fullmatch(r"[a-z0-9-]+", cell.id) for cell in NOTEBOOK.cells)
    assert len({cell.id for cell in NOTEBOOK.cells}) == len(NOTEBOOK.cells)
    colab = NOTEBOOK.metadata.colab
    assert NOTEBOOK.metadata.accelerator == "GPU" and colab.gpuType == "T4" and colab.toc_visible


def test_parameters_cell():
    cell = next(cell for cell in CODE if cell.id == "parameters")
    assert cell.metadata.tags == ["parameters"]
    lines = [line for line in cell.source.splitlines() if not line.startswith("#")]
    assert all(
        re.fullmatch(r"\w+ = .+  # @param (\{type:\"\w+\"\}|\[.+\] \{allow-input:true\})", line) for line in lines
    )
    names = """base_model base_revision new_model dataset_id dataset_revision output_dir eval_pairs load_in_4bit lora_rank
    lora_alpha beta loss_type learning_rate max_steps warmup_steps pairs_per_step max_length share_prompt gpu_memory
    push_to_hub private eval_tasks seed"""
    assert {line.split()[0] for line in lines} == set(names.split())


def test_no_remote_code_no_pickles_no_magics():
    source = "\n".join(CELLS.values())
    assert "trust_remote_code=True" not in source and not re.search(
        r"torch\.load\(|pickle|joblib|exec\(|(?<!\.)\beval\(", source
    )
    assert not re.search(r"^\s*[%!]", source, re.MULTILINE)
    for name in ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "AutoModelForCausalLM.from_config"):
        for call in re.findall(re.escape(name) + r"\([^)]*\)", source):
            assert "trust_remote_code=False" in call, call


@pytest.mark.parametrize(
    "command", [["format", "--check"], ["check", "--select", "E,F,I,B,UP", "--ignore", "E501"]], ids=["format", "lint"]
)
def test_ruff(command):
    folders = [PATH, *(ROOT / name for name in ("benchmarks", "recipes", "rehearsal", "tests"))]
    subprocess.run([sys.executable, "-m", "ruff", *command, "--line-length", "120", *folders], check=True)


def test_sections_in_reading_order():
    headings = re.findall(r"^## (.+)$", "\n".join(c.source for c in NOTEBOOK.cells if c.cell_type == "markdown"), re.M)
    order = "Install,Parameters,Set up,Preference data,ChatML,Model,Training,Curves,Merge,Hub,Evaluation,Generation"
    assert headings == order.split(",") and NOTEBOOK.cells[-1].cell_type == "code"


def test_no_file_names_a_folder_of_one_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [ROOT / name for name in listed if name.endswith((".ipynb", ".md", ".py", ".txt", ".yaml", ".sh"))]
    assert not [path for path in texts if path.exists() and re.search(r"/(work|home|root)/\w", path.read_text())]
