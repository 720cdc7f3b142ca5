"""The notebook as a reader changes it, one whole run with all of it: columns, layers, questions, a
loss, an evaluation.
"""

import json
import re

import pytest
import torch
from conftest import some_pairs
from safetensors.torch import load_file
from standins import SIZE
from trainers import SMALL

from rehearsal.notebook import CELLS, NOTEBOOK, run_cells

COLUMNS = 'columns.update(prompt=["ask"], chosen=["good"], rejected=["bad"])'
QUESTIONS = ["Who may redistribute?", "Why?"]
EVALUATION = """
words_of_answers = {question: len(answer.split()) for question, answer in run["after"].items()}
own_scores = score(model, rows.select(held_out))
own_accuracy = np.mean([chosen > rejected for chosen, rejected in own_scores])
"""


def change(cells, name, old, new):
    """The cell with a piece of its text replaced, which has to be there once."""
    assert cells[name].count(old) == 1, f"{name} has no {old!r} to change"
    cells[name] = cells[name].replace(old, new)


def example_of_a_loss():
    """The subclass that the notebook's text shows: a hinge that asks for a margin of 2."""
    (text,) = [cell.source for cell in NOTEBOOK.cells if cell.id == "own-loss-text"]
    return text.partition("```python\n")[2].partition("```")[0]


def change_cells(cells):
    """What a reader writes, each in the place that the notebook names for it."""
    first, rest = cells["find-markup"].split("\n", 1)
    cells["find-markup"] = f"{first}\n{COLUMNS}\n{rest}"
    asked = re.search(r"questions = \[.*?\n\]", cells["questions"], re.DOTALL)[0]
    change(cells, "questions", asked, f"questions = {QUESTIONS}")
    change(cells, "questions", "max_new_tokens=200", "max_new_tokens=20")
    change(cells, "make-trainer", "trainer = LastingTrainer(", "trainer = OwnTrainer(")
    change(
        cells, "make-trainer", "first_loss = loss_of_a_tie(loss_type, beta)", "first_loss = None"
    )
    cells["make-trainer"] = f"{example_of_a_loss()}\n\n{cells['make-trainer']}"
    cells["score-merged"] += EVALUATION


@pytest.fixture(scope="module")
def changed(models, tmp_path_factory):
    """The namespace after a whole run of the changed notebook."""
    folder = tmp_path_factory.mktemp("changed")
    pairs = folder / "pairs.jsonl"
    names = {"question": "ask", "chosen": "good", "rejected": "bad", "system": "system"}
    with pairs.open("w") as file:
        for row in some_pairs(40):
            file.write(json.dumps({names[name]: text for name, text in row.items()}) + "\n")
    sources = dict(base_model=models["qwen"], dataset_id=str(pairs), output_dir=str(folder / "run"))
    cells = dict(CELLS)
    change_cells(cells)
    with pytest.MonkeyPatch.context() as patch:
        for name in CELLS:
            patch.setitem(CELLS, name, cells[name])
        return run_cells(
            "install",
            list(CELLS)[-1],
            **SMALL | sources | dict(lora_rank=4, lora_targets="q_proj, v_proj"),
        )


def test_own_columns(changed):
    assert len(changed["pairs"]) == 40 and not changed["dropped"]


def test_own_layers_make_an_adapter_of_their_size(changed):
    """Two matrices of rank 4 beside the queries' and the values' projection of each layer."""
    hidden = SIZE["hidden_size"]
    keys = hidden * SIZE["num_key_value_heads"] // SIZE["num_attention_heads"]
    size = SIZE["num_hidden_layers"] * 4 * (hidden + hidden + hidden + keys)
    saved = load_file(changed["adapter_dir"] / "adapter_model.safetensors")
    assert changed["adapter_size"] == size == sum(weight.numel() for weight in saved.values())
    assert {name.split(".")[-3] for name in saved} == {"q_proj", "v_proj"}


def test_the_plan_knows_of_the_smaller_adapter(changed):
    arguments = changed["load_in_4bit"], changed["number_bytes"], changed["on_gpu"]
    larger = changed["adapter_numbers"](changed["config"], "all-linear", 4)
    bytes_of_larger = changed["always_there"](changed["skeleton"], larger, *arguments)
    assert bytes_of_larger - changed["fixed_bytes"] == 16 * (larger - changed["adapter_size"]) > 0


def test_own_layers_are_merged_alike_in_memory_and_in_shards(changed, tmp_path):
    base = changed["weights_folder"](changed["base"], None)
    changed["merge_in_memory"](changed["base"], None, changed["adapter_dir"], tmp_path / "whole")
    (tmp_path / "shards").mkdir()
    changed["merge_in_shards"](base, changed["adapter_dir"], tmp_path / "shards")
    before, whole, shards = [
        load_file(folder / "model.safetensors")
        for folder in (base, tmp_path / "whole", tmp_path / "shards")
    ]
    assert shards.keys() == whole.keys()
    assert all(torch.equal(weight, whole[name]) for name, weight in shards.items())
    moved = {name for name, weight in before.items() if not torch.equal(weight, whole[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "v_proj"} and len(moved) == 4


def test_own_questions(changed):
    assert list(changed["run"]["before"]) == list(changed["run"]["after"]) == QUESTIONS


def test_own_loss(changed):
    """It begins at 2, where policy and reference are the same, and falls by the margin."""
    losses = [entry["eval_loss"] for entry in changed["run"]["history"] if "eval_loss" in entry]
    margin = changed["evaluated"]["rewards/margins"].iloc[-1]
    assert changed["run"]["how"]["trainer"] == "OwnTrainer"
    assert losses[0] == pytest.approx(2, abs=1e-4)
    assert losses[-1] == pytest.approx(2 - margin, abs=1e-4) and margin > 0


def test_own_evaluation_of_the_merged_model(changed):
    assert set(changed["words_of_answers"]) == set(QUESTIONS)
    likelier = [chosen > rejected for chosen, rejected in changed["run"]["logps"]["merged"]]
    assert changed["own_accuracy"] == sum(likelier) / len(likelier)


def test_rewards_of_an_own_loss_are_logged_as_trls_are(changed):
    """So the curves, the table and the words are there, and agree with the scores at the end."""
    held_out = changed["evaluated"].iloc[-1]
    assert held_out["rewards/margins"] == pytest.approx(
        changed["scores"]["reward margin"]["trained"], abs=1e-4
    )
    gap = held_out["rewards/chosen"] - held_out["rewards/rejected"]
    assert held_out["rewards/margins"] == pytest.approx(gap, abs=1e-4)
    assert held_out["rewards/accuracies"] == changed["scores"]["reward accuracy"]["trained"]
