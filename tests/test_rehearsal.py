"""The rehearsal's end state: the unchanged notebook ran from its first cell to its last, against a local Hub."""

import json
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from test_tokenizer import CHAT, TRUE_IDS

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
    assert any(answer.startswith("No") for answer in record["before"].values())
    assert len(record["after"]) == 3 and all(
        answer.startswith("Sure") for answer in record["after"].values()
    )
    assert len(list(folder.glob("dpo_run/checkpoint-*"))) == 2
    assert (folder / "dpo_finetune.html").stat().st_size > 100_000
    assert (folder.parent / "curves.png").stat().st_size > 50_000


def test_the_notebook_is_unchanged_and_shows_every_choice(rehearsal):
    executed = json.loads((rehearsal[0] / "dpo_finetune.ipynb").read_text())
    code = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    code = [cell for cell in code if "injected-parameters" not in cell["metadata"]["tags"]]
    assert {cell["id"]: "".join(cell["source"]) for cell in code} == CELLS
    shown = {cell["id"]: json.dumps(cell["outputs"], ensure_ascii=False) for cell in code}
    expected = {
        "accounts": f"{REPOSITORY}, private: True",
        "tokenizer": "equal to a sentencepiece model",
        "rows": "Rows: 368. Dropped: 8. Kept: 360.",
        "split-of-a-step": "4 pairs at once × 4 accumulated: of the splits that fit, the one with the least work",
        "train": "Prompts are run once",
    }
    expected |= {
        f"plot-{name}": "image/png" for name in ("loss", "rewards", "margins", "accuracies")
    }
    assert [name for name, text in expected.items() if text not in shown[name]] == []


def test_a_question_is_on_one_side_whatever_its_system_turn(rehearsal, tmp_path):
    made, parameters = (
        rehearsal[0] / "made",
        dict(eval_pairs=64, max_length=256, output_dir=str(tmp_path)),
    )
    sources = dict(base_model=str(made / "model"), dataset_id=str(made / "pairs" / "train.jsonl"))
    nb = run_cells("install", "split", **sources, **parameters)
    asked = [
        nb["tokenizer"].decode(ids).rpartition("user\n")[2] for ids in nb["rows"]["prompt_ids"]
    ]
    train, held_out = ({asked[i] for i in nb[name]} for name in ("train", "held_out"))
    assert len(set(asked)) < len(asked) and not train & held_out


def test_card(run, record):
    card = ModelCard.load(run / "merged" / "README.md")
    assert card.data.base_model == "rehearsal/tiny-chat" and card.data.datasets == [
        "rehearsal/tiny-pairs"
    ]
    assert {"dpo", "trl", "lora"} <= set(
        card.data.tags
    ) and card.data.pipeline_tag == "text-generation"
    assert all(sentence in card.text for sentence in record["words"])
    lines = [line.strip("| ").split("|") for line in card.text.splitlines() if line.startswith("|")]
    table = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert table["learning_rate"] == ["0.0005"] and sorted(record["dropped"].values()) == [
        1,
        2,
        2,
        3,
    ]
    assert all(table[reason] == [str(count)] for reason, count in record["dropped"].items())
    for name, scores in record["scores"].items():
        assert [float(cell) for cell in table[name]] == pytest.approx([*scores.values()], abs=1e-4)


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
