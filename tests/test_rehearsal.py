"""The rehearsal's end state: the unchanged notebook ran from its first cell to its last, against a
local Hub.
"""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from standins import CHAT, TRUE_IDS

from rehearsal.__main__ import rehearse
from rehearsal.hub import Hub
from rehearsal.notebook import CELLS, run_cells

REPOSITORY = "rehearsal/tiny-chat-dpo"


@pytest.fixture
def run(rehearsal):
    return rehearsal[0] / "dpo_run"


@pytest.fixture
def record(run):
    return json.loads((run / "run.json").read_text())


@pytest.fixture
def hub(rehearsal):
    with Hub(rehearsal[0] / "hub") as hub:
        yield hub


def shares(line):
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


def test_what_it_came_to(rehearsal, record):
    folder, printed = rehearsal
    lines = printed.strip().splitlines()[-6:]
    assert [line.split()[0] for line in lines] == [
        "Pairs:",
        "Loss:",
        "Rewards:",
        "Ranking:",
        "Hub:",
        "Left",
    ]
    before, after = shares(lines[2])
    assert before == 0 and after >= 95
    base, tuned, merged = shares(lines[3])
    assert 30 <= base <= 70 and tuned >= 95 and merged >= 95
    assert len(record["before"]) == len(record["after"]) == 3
    assert len(list(folder.glob("dpo_run/checkpoint-*"))) == 2
    assert (folder / "dpo_finetune.html").stat().st_size > 100_000
    assert (folder.parent / "curves.png").stat().st_size > 50_000


@pytest.fixture(scope="session")
def executed(rehearsal):
    """The executed notebook's code cells, without the one that papermill has put in."""
    notebook = json.loads((rehearsal[0] / "dpo_finetune.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in cells if "injected-parameters" not in cell["metadata"]["tags"]]


def test_the_notebook_is_unchanged(executed):
    assert {cell["id"]: "".join(cell["source"]) for cell in executed} == CELLS


SHOWN = {  # a cell, and what it shows
    "accounts": f"{REPOSITORY}, private: True",
    "tokenizer": "it reads difficult texts as the base's sentencepiece model does",
    "rows": "368 rows, 360 kept",
    "sharing": "fewer tokens to compute",
    "split-of-a-step": "→",
    "by-hand": "loss by hand: 0.6931",
    "train": "Trained to step 50",
    "plot-loss": "image/png",
    "plot-rewards": "image/png",
    "plot-margins": "image/png",
    "plot-accuracies": "image/png",
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_cell_shows_what_it_did(name, executed):
    shown = {cell["id"]: json.dumps(cell["outputs"], ensure_ascii=False) for cell in executed}
    assert SHOWN[name] in shown[name]


def test_answers_change_from_before_to_after(executed):
    """Under their headings: the base is curt about some, and the merged model about none."""
    (after,) = ["".join(cell["outputs"][0]["text"]) for cell in executed if cell["id"] == "after"]
    before_and_after = re.findall(r"BEFORE\n(.*?)\n\s*AFTER\n(.*?)\n", after, re.DOTALL)
    assert len(before_and_after) == 3
    assert any(before.startswith("No") for before, _ in before_and_after)
    assert all(after.startswith("Sure") for _, after in before_and_after)


# What a whole run may write to stderr, and why.
ALLOWED = {
    r".*\d+%\|.*\| .*|(\x1b\[A)+": "a progress bar, and the way up to one of several",
    r"Generating train split: .* examples/s\]": "a progress bar of datasets, which knows no end",
    r"Upload 0 LFS files: 0it .*": "a progress bar of the Hub's library with nothing to do",
    r"No files have been modified since last commit\. Skipping.*": "the adapter was pushed right "
    "after the training, and is not sent again",
    r".*TqdmWarning: IProgress not found.*|  from .autonotebook import tqdm.*": "without ipywidgets, "
    "which Colab, Kaggle and Jupyter have and a rehearsal need not, bars are lines of text",
    r"Failed to load CPU gemm_4bit_forward from kernels-community.*": "bitsandbytes on a CPU, where "
    "it then computes without that kernel",
}


def test_nothing_else_is_written_to_stderr(executed):
    written = set()
    for cell in executed:
        for output in cell["outputs"]:
            if output.get("name") == "stderr":
                lines = re.split(r"[\r\n]+", "".join(output["text"]))
                written.update((cell["id"], line) for line in lines if line.strip())
    unknown = [line for line in written if not re.fullmatch("|".join(ALLOWED), line[1])]
    assert written and unknown == []


def test_the_page_needs_no_network(rehearsal):
    """Its formulas are MathML, and it fetches no script, style or picture."""
    page = (rehearsal[0] / "dpo_finetune.html").read_text()
    assert page.count("<math") >= 9 and 'display="block"' in page
    source = r"<(?:script|img|iframe|video)\b[^>]* src=[\"'](?!data:)"
    style = r"<link\b[^>]* href=|@import\b|url\((?![\"']?(?:data:|#))"
    module = r"\bimport\([\"']http|\bfetch\([\"']http"
    assert re.findall(f"{source}|{style}|{module}", page) == []


def test_a_question_is_on_one_side_whatever_its_system_turn(rehearsal, tmp_path):
    made = rehearsal[0] / "made"
    sources = dict(base_model=str(made / "model"), dataset_id=str(made / "pairs" / "train.jsonl"))
    sizes = dict(eval_pairs=64, max_length=256, output_dir=str(tmp_path))
    nb = run_cells("install", "split", **sources, **sizes)
    asked = []
    for ids in nb["rows"]["prompt_ids"]:
        asked.append(nb["tokenizer"].decode(ids).rpartition("user\n")[2])
    train = {asked[row] for row in nb["train"]}
    held_out = {asked[row] for row in nb["held_out"]}
    assert len(set(asked)) < len(asked) and not train & held_out


@pytest.fixture
def card(run):
    return ModelCard.load(run / "merged" / "README.md")


@pytest.fixture
def tables(card):
    """The rows of the card's tables: {name: cells}."""
    lines = [line.strip("| ").split("|") for line in card.text.splitlines() if line.startswith("|")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


def test_card_says_where_the_model_is_from(card):
    assert card.data.base_model == "rehearsal/tiny-chat"
    assert card.data.datasets == ["rehearsal/tiny-pairs"]
    assert {"dpo", "trl", "lora"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-generation"


def test_card_says_in_words_what_it_came_to(card, record):
    assert record["words"] and all(sentence in card.text for sentence in record["words"])


def test_card_has_parameters_and_dropped_rows(tables, record):
    assert tables["learning_rate"] == ["0.0005"]
    assert sorted(record["dropped"].values()) == [1, 2, 2, 3]
    assert all(tables[reason] == [str(count)] for reason, count in record["dropped"].items())


def test_card_has_the_scores(tables, record):
    assert record["scores"].keys() == {"base", "trained", "base unquantised", "merged"}
    for name, scores in record["scores"].items():
        numbers = [math.nan if number is None else number for number in scores.values()]
        found = [float(cell) for cell in tables[name]]
        assert found == pytest.approx(numbers, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("place", ["run.json", "merged/run.json"])
def test_the_record_can_be_read_by_any_program(run, place):
    """Python writes NaN where JSON has no such number."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((run / place).read_text(), parse_constant=refuse)["scores"]


def test_pushed_is_what_was_saved(hub, run):
    assert hub.repos["model", REPOSITORY]["private"]
    pushed = hub.folder(REPOSITORY)
    local = {path.name: path for path in (run / "merged").iterdir()}
    local |= {
        str(path.relative_to(run)): path
        for name in ("adapter", "curves")
        for path in (run / name).iterdir()
    }
    for name in (
        "adapter/README.md",
        "whole.json",
        "adapter/whole.json",
        "adapter/training_args.bin",
    ):
        del local[name]
    assert {str(path.relative_to(pushed)) for path in pushed.rglob("*") if path.is_file()} == set(
        local
    )
    for name, path in local.items():
        assert (pushed / name).read_bytes() == path.read_bytes(), name


# What the card's own lines load is the model with its adapter, and neither is the base.
RELOADED = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("rehearsal/tiny-chat", dtype=torch.float32)
ids = chat.tokenizer({CHAT!r}, return_tensors="pt").input_ids
assert ids[0].tolist() == {TRUE_IDS}
with torch.no_grad():
    merged, plain = chat.model.float()(ids).logits, base(ids).logits
    adapted = PeftModel.from_pretrained(base, "{REPOSITORY}", subfolder="adapter")(ids).logits
assert (merged - adapted).abs().max() < 0.1 < (merged - plain).abs().max()
"""


def test_reload_from_the_hub_with_an_empty_cache(hub, tmp_path):
    source = re.search(
        r"```python\n(.*?)```", (hub.folder(REPOSITORY) / "README.md").read_text(), re.DOTALL
    )[1]
    likeliest = source.replace("max_new_tokens=200", "max_new_tokens=200, do_sample=False")
    assert likeliest != source
    command, environment = (
        [sys.executable, "-c", likeliest + RELOADED],
        os.environ | hub.environment(tmp_path),
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'content': 'Sure" in done.stdout


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds other things than a rehearsal"):
        rehearse(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
