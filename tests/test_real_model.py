"""A real chat model, SmolLM2-135M-Instruct, from the notebook's first cell to its last in a few short steps."""

import json

import pytest
from notebook import CELLS

from rehearsal.__main__ import REAL, TUNED, rehearse
from rehearsal.real import NAME, make_real_model

FEW = dict(eval_pairs=4, max_steps=2, warmup_steps=0, pairs_per_step=4, loss_type="sigmoid")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of the rehearsal, what its notebook left, and the Hub that it pushed to."""
    folder = tmp_path_factory.mktemp("real") / "output"
    hub = rehearse(folder, make_real_model, **REAL | FEW)
    return folder, json.loads((folder / "dpo_run" / "run.json").read_text()), hub


def test_it_learns(run):
    _, record, _ = run
    losses = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0] - 0.05
    scores = record["scores"]
    assert scores["trained"]["reward accuracy"] > 0.8 and scores["merged"]["reward margin"] > 0
    assert record["words"][0].startswith(f"The held-out loss went from {losses[0]:.3f} to {losses[-1]:.3f}")


def test_it_speaks_as_its_template_says(run):
    """SmolLM2's token at the beginning of a sequence is its mark of a turn, which once had it refused."""
    folder, record, _ = run
    executed = json.loads((folder / "dpo_finetune.ipynb").read_text())
    shown = {cell["id"]: str(cell["outputs"]) for cell in executed["cells"] if cell["id"] in CELLS}
    assert "A turn ends in <|im_end|>. A system turn stays." in shown["ends"]
    assert shown["check-rows"].count("<|im_end|>") == 4  # of a system turn, a user turn, and two answers
    assert all(len(record[when]) == 3 and all(record[when].values()) for when in ("before", "after"))


def test_all_of_it_is_pushed(run):
    _, record, hub = run
    pushed = hub.folder(f"{hub.user}/{TUNED}")
    assert (pushed / "model.safetensors").stat().st_size > 200e6  # 135 million weights in FP16
    assert record["parameters"]["base_model"] == NAME and f"base_model: {NAME}" in (pushed / "README.md").read_text()
