"""The cells that are worth copying, each run by itself in an empty namespace; most tests of the other files use them so."""

import builtins
import dis
import types
from functools import partial

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import some_pairs
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from rehearsal.notebook import CELLS, alone, run_cell

COPYABLE = """load-pairs read-pair encode split-by-question memory load-model run-prompts-once score merge-in-shards
card""".split()


def outer_names(code):
    """What the functions in this code read from outside of themselves."""
    for inner in [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]:
        yield from (
            step.argval for step in dis.get_instructions(inner) if step.opname == "LOAD_GLOBAL"
        )
        yield from outer_names(inner)


@pytest.mark.parametrize("name", COPYABLE)
def test_a_copied_cell_needs_nothing_else(name):
    """No function of it reads a parameter of the notebook, or anything else that the cell does not bring."""
    brought, parameters = alone(name).keys(), run_cell("parameters", {}).keys() - {"__builtins__"}
    names = set(outer_names(compile(CELLS[name], name, "exec")))
    assert names and names <= brought | vars(builtins).keys()
    assert "beta" in parameters and not parameters & brought


def test_prompts_once_on_a_stock_trainer(models, tmp_path):
    """By somebody who trains all parameters: the same losses for fewer tokens, with layers checkpointed as needed."""
    pairs = [{"prompt": row.pop("question"), **row} for row in some_pairs(16)]
    settings = dict(
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        eval_steps=3,
    )
    settings |= dict(
        eval_strategy="steps", save_strategy="no", report_to="none", bf16=False, use_cpu=True
    )
    runs = []
    for copied in (False, True):
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(models["llama3"], dtype="float32"),
            args=DPOConfig(output_dir=str(tmp_path), **settings),
            train_dataset=Dataset.from_list(pairs[4:]),
            eval_dataset=Dataset.from_list(pairs[:4]),
            processing_class=AutoTokenizer.from_pretrained(models["llama3"]),
        )
        config, embeddings, seen = trainer.model.config, trainer.model.get_input_embeddings(), []
        if copied:
            needed = partial(
                alone("memory")["layers_to_checkpoint"], config, room=1e6, in_4bit=False, width=4
            )
            alone("run-prompts-once")["run_prompts_once"](trainer.model, needed)
        embeddings.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].numel())
        )
        trainer.train()
        logged = [
            entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history[:-1]
        ]
        runs.append((logged, sum(seen)))
    (stock, stock_tokens), (ours, our_tokens) = runs
    assert len(stock) == 4 and stock[2] < stock[0] and ours == pytest.approx(stock, rel=1e-5)
    assert our_tokens < 0.9 * stock_tokens


def test_load_4bit(models):
    load_4bit = alone("load-model")["load_4bit"]
    layers = [
        module for module in load_4bit(models["qwen"]).modules() if isinstance(module, Linear4bit)
    ]
    assert len(layers) == 14 and all(layer.weight.quant_type == "nf4" for layer in layers)
    assert all(
        layer.weight.quant_state.nested and layer.compute_dtype == torch.bfloat16
        for layer in layers
    )
    plain = load_4bit(models["qwen"], torch.float32, False)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}


def test_score(models):
    model = AutoModelForCausalLM.from_pretrained(models["llama3"], dtype=torch.float32)
    row, expected = (
        {"prompt_ids": [0, 5, 6, 7], "chosen_ids": [8, 9, 4], "rejected_ids": [11, 4]},
        [],
    )
    for answer in (row["chosen_ids"], row["rejected_ids"]):
        logps = model(torch.tensor([row["prompt_ids"] + answer])).logits[0].log_softmax(-1)
        expected.append(sum(logps[3 + i, token].item() for i, token in enumerate(answer)))
    found = alone("score")["score"](model.train(), [row, row])
    assert np.array(found) == pytest.approx(np.array([expected, expected]), rel=1e-5)
