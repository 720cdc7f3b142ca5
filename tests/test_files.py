"""The notebook as a file: folding, widths, pins, format, no outputs, no code from elsewhere."""

import ast
import re
import statistics
import subprocess
import sys

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from rehearsal.notebook import CELLS, NOTEBOOK, ROOT, alone

CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
FOLDED = [cell for cell in CODE if cell.source.startswith("# @title ")]
VISIBLE = [cell for cell in CODE if cell not in FOLDED]


def test_sizes():
    """Printed to be looked at, `pytest -k sizes -s`: only a cell that nobody could read is
    refused.
    """
    lines = {cell.id: cell.source.count("\n") + 1 for cell in CODE}
    for kind, cells in (("visible", VISIBLE), ("folded", FOLDED)):
        counts = [lines[cell.id] for cell in cells]
        print(f"\n{kind}: {len(cells)} cells, {sum(counts)} lines, ", end="")
        print(f"median {statistics.median(counts)}, longest {max(counts)}", end="")
    assert max(lines[cell.id] for cell in VISIBLE) <= 60


@pytest.mark.parametrize("cell", CODE, ids=CELLS)
def test_folded_cells_are_folded_everywhere_and_no_other_is(cell):
    """By Colab's form, by Jupyter's and by Kaggle's hidden source."""
    folded = cell in FOLDED
    assert (cell.metadata.get("cellView") == "form") == folded
    assert (cell.metadata.get("jupyter", {}).get("source_hidden") is True) == folded
    assert (cell.metadata.get("_kg_hide-input") is True) == folded


def test_no_visible_line_is_wider_than_100_columns():
    wide = {}
    for cell in VISIBLE:
        found = [line for line in cell.source.splitlines() if len(line) > 100]
        if found:
            wide[cell.id] = found
    assert wide == {}


@pytest.mark.parametrize("name", CELLS)
def test_text_is_read_and_written_in_utf8(name):
    """Windows has another encoding by default, in which a template with é or ｜ is not found
    again.
    """
    found = []
    for call in ast.walk(ast.parse(TransformerManager().transform_cell(CELLS[name]))):
        if not isinstance(call, ast.Call):
            continue
        function = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if function not in ("open", "opener", "read_text", "write_text"):
            continue
        ours = function == "read_text" and isinstance(call.func, ast.Name)  # of the notebook
        modes = [str(mode.value) for mode in call.args if isinstance(mode, ast.Constant)]
        encoded = any(keyword.arg == "encoding" for keyword in call.keywords)
        if not encoded and not ours and not any("b" in mode for mode in modes):
            found.append(ast.unparse(call))
    assert found == []


def test_install_cell_has_the_pins_of_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if not line.startswith("#")]
    assert {pin for pin in required if not pin.startswith("torch")} == set(
        alone("install")["PACKAGES"].split()
    )


def test_no_outputs():
    assert not any(cell.outputs or cell.execution_count for cell in CODE)


def test_ids_are_names_and_differ():
    ids = [cell.id for cell in NOTEBOOK.cells]
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in ids) and len(set(ids)) == len(ids)
    assert not [name for name in ids if re.fullmatch(r"[0-9a-f]{8}(-.*)?", name)]  # by chance


def test_no_tool_has_left_its_mark_in_the_metadata():
    assert sorted(NOTEBOOK.metadata) == ["accelerator", "colab", "kernelspec", "language_info"]


def test_colab_is_asked_for_a_gpu():
    assert NOTEBOOK.metadata.accelerator == "GPU" and NOTEBOOK.metadata.colab.gpuType == "T4"


def test_papermill_finds_the_parameters_by_their_tag():
    tagged = [cell.id for cell in CODE if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == ["parameters"]


def test_colab_makes_a_form_of_the_parameters():
    """Its help is @markdown, which the form shows; a plain comment it would hide."""
    form = r"\w+ = .+  # @param (\{type:\"\w+\"\}|\[.+\] \{allow-input:true\})|# @markdown .+"
    lines = CELLS["parameters"].splitlines()
    assert [line for line in lines if not re.fullmatch(form, line)] == []


def test_no_remote_code_no_pickles_no_magics():
    source = "\n".join(CELLS.values())
    unsafe = r"trust_remote_code=True|torch\.load\(|pickle|joblib|exec\(|(?<!\.)\beval\(|^\s*[%!]"
    assert re.findall(unsafe, source, re.MULTILINE) == []
    loads = r"Auto(?:Config\.from_pretrained|Tokenizer\.from_pretrained|ModelForCausalLM\.from_config)\([^)]*\)"
    calls = re.findall(loads, source)
    assert calls and all("trust_remote_code=False" in call for call in calls)


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_ruff(command):
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "."]
    subprocess.run(ruff, cwd=ROOT, check=True)


def test_no_file_names_a_folder_of_one_machine():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    texts = [
        ROOT / name
        for name in listed
        if name.endswith((".ipynb", ".md", ".py", ".txt", ".yaml", ".sh"))
    ]
    assert not [
        path
        for path in texts
        if path.exists() and re.search(r"/(work|home|root)/\w", path.read_text())
    ]


def test_one_warning_is_silenced_and_no_bar():
    """Of TRL and PEFT, by its own words: nothing else that a library says is kept back."""
    silencing = (
        r"filterwarnings|simplefilter|set_verbosity|TQDM_DISABLE|disable_progress|PYTHONWARN"
    )
    lines = [line for source in CELLS.values() for line in source.splitlines()]
    found = [line for line in lines if re.search(silencing, line)]
    assert found == [
        'warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)'
    ]
