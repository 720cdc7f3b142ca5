"""A real chat model, SmolLM2-135M-Instruct, from the notebook's first cell to its last in a few
short steps.
"""

import json

import pytest

from rehearsal.__main__ import REAL, TUNED, rehearse
from rehearsal.real import NAME, make_real_model

FEW = dict(eval_pairs=4, max_steps=2, warmup_steps=0, pairs_per_step=4, loss_type="sigmoid")


@pytest.mark.recipes
def test_a_real_model_learns_speaks_and_is_pushed(tmp_path):
    """Its token at the beginning of a sequence is its mark of a turn, which once had it refused."""
    hub = rehearse(tmp_path / "output", make_real_model, **REAL | FEW)
    record = json.loads((tmp_path / "output" / "dpo_run" / "run.json").read_text())
    losses = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0] - 0.05
    scores = record["scores"]
    assert scores["trained"]["reward accuracy"] > 0.8 and scores["merged"]["reward margin"] > 0
    assert all(
        len(record[when]) == 3 and all(record[when].values()) for when in ("before", "after")
    )

    executed = json.loads((tmp_path / "output" / "dpo_finetune.ipynb").read_text())
    shown = {cell["id"]: str(cell.get("outputs")) for cell in executed["cells"]}
    assert "a turn ends in: <|im_end|>" in shown["template"]
    assert "a system turn: stays" in shown["template"]
    # Of a system turn, a user turn, and two answers.
    assert shown["check-rows"].count("<|im_end|>") == 4

    pushed = hub.folder(f"{hub.user}/{TUNED}")
    assert (pushed / "model.safetensors").stat().st_size > 200e6  # 135 million weights in FP16
    assert f"base_model: {NAME}" in (pushed / "README.md").read_text()
