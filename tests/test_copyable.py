"""The cells that are worth copying, each run by itself in an empty namespace."""

import builtins
import dis
import re
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

from rehearsal.notebook import CELLS, NOTEBOOK, ROOT, alone, run_cell

FOLDED = [cell.id for cell in NOTEBOOK.cells if cell.metadata.get("cellView") == "form"]
BY_ITSELF = [name for name in CELLS if "Works by itself" in CELLS[name].partition("\n")[0]]
VISIBLE = ["load-model"]  # the one visible cell that is worth copying; its docstring says so


def outer_names(code):
    """What the functions in this code read from outside of themselves."""
    for inner in [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]:
        for step in dis.get_instructions(inner):
            if step.opname == "LOAD_GLOBAL":
                yield step.argval
        yield from outer_names(inner)


def names_read_by_functions(name):
    return set(outer_names(compile(CELLS[name], name, "exec"))) - vars(builtins).keys()


@pytest.fixture(scope="module")
def parameters():
    return run_cell("parameters", {}).keys() - {"__builtins__"}


@pytest.mark.parametrize("name", BY_ITSELF + VISIBLE)
def test_a_cell_that_says_so_works_by_itself(name, parameters):
    """It runs in an empty namespace, and brings all that its functions read."""
    brought = alone(name).keys()
    assert names_read_by_functions(name) <= brought and not parameters & brought


@pytest.mark.parametrize("name", FOLDED)
def test_functions_of_folded_cells_read_no_parameter(name, parameters):
    """They take them as arguments, so that a changed one cannot mean two things."""
    assert "beta" in parameters and not names_read_by_functions(name) & parameters


def test_the_readme_names_the_cells_to_copy():
    section = (ROOT / "README.md").read_text().partition("## Copy a part")[2].partition("\n## ")[0]
    functions = re.findall(r"^\| .* \| `(\w+)`.* \| ", section, re.M)
    defined = {
        function: [name for name in CELLS if f"def {function}(" in CELLS[name]]
        for function in functions
    }
    assert sorted(sum(defined.values(), [])) == sorted(BY_ITSELF + VISIBLE)


def train_all_parameters(model, pairs, folder, change=None):
    """A stock trainer's losses in training and evaluation, and the tokens that each model has
    computed.

    change: what is done to the trainer before it trains.
    """
    settings = dict(
        output_dir=str(folder),
        max_steps=6,  # two epochs
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        eval_steps=3,
        eval_strategy="steps",
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        ref_model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=DPOConfig(**settings),
        train_dataset=Dataset.from_list(pairs[4:]),
        eval_dataset=Dataset.from_list(pairs[:4]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    if change:
        change(trainer)
    tokens = {"policy": 0, "reference": 0}

    def count(which, module, args):
        tokens[which] += args[0].numel()

    for which, counted in (("policy", trainer.model), ("reference", trainer.ref_model)):
        counted.get_input_embeddings().register_forward_pre_hook(partial(count, which))
    trainer.train()
    history = trainer.state.log_history[:-1]
    return [entry.get("loss", entry.get("eval_loss")) for entry in history], tokens


@pytest.fixture(scope="module")
def stock(models, tmp_path_factory):
    """(model, pairs, losses, tokens) of a stock trainer that trains all parameters."""
    pairs = [{"prompt": row.pop("question"), **row} for row in some_pairs(16)]
    folder = tmp_path_factory.mktemp("stock")
    losses, tokens = train_all_parameters(models["llama3"], pairs, folder)
    assert len(losses) == 8 and losses[2] < losses[0]
    return models["llama3"], pairs, losses, tokens


def test_prompts_once_on_a_stock_trainer(stock, tmp_path):
    """The same losses for fewer tokens, with layers checkpointed as needed."""
    model, pairs, stock_losses, stock_tokens = stock

    def run_prompts_once(trainer):
        widths = alone("skeleton")["layer_widths"](trainer.model, in_4bit=False)
        needed = partial(
            alone("memory")["layers_to_checkpoint"], widths, room_bytes=1e6, number_bytes=4
        )
        alone("run-prompts-once")["run_prompts_once"](trainer.model, needed)

    losses, tokens = train_all_parameters(model, pairs, tmp_path, run_prompts_once)
    assert losses == pytest.approx(stock_losses, rel=1e-5)
    assert tokens["policy"] < 0.9 * stock_tokens["policy"]


def test_remembered_reference_on_a_stock_trainer(stock, tmp_path):
    """The same losses, and in the second epoch and evaluation the reference computes nothing."""
    model, pairs, stock_losses, stock_tokens = stock

    def remember_reference(trainer):
        alone("remember-reference")["remember_reference"](trainer)

    losses, tokens = train_all_parameters(model, pairs, tmp_path, remember_reference)
    assert losses == pytest.approx(stock_losses, rel=1e-5)
    assert tokens["policy"] == stock_tokens["policy"]
    assert tokens["reference"] < 0.6 * stock_tokens["reference"]


def test_load_4bit(models):
    model = alone("load-model")["load_4bit"](models["qwen"])
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.bfloat16


def test_load_unquantised(models):
    model = alone("load-model")["load_4bit"](models["qwen"], torch.float32, quantise=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


ROWS = [
    {"prompt_ids": [0, 5, 6, 7], "chosen_ids": [8, 9, 4], "rejected_ids": [11, 4]},
    {"prompt_ids": [0, 5], "chosen_ids": [4], "rejected_ids": [8, 9, 10, 11, 4]},
    {"prompt_ids": [0, 7, 6, 5, 9, 8], "chosen_ids": [12, 4], "rejected_ids": [13, 4]},
]


@pytest.fixture(scope="module")
def llama(models):
    return AutoModelForCausalLM.from_pretrained(models["llama3"], dtype=torch.float32).eval()


def test_score_is_the_sum_of_the_answers_log_probabilities(llama):
    row = ROWS[0]
    expected = []
    for answer in (row["chosen_ids"], row["rejected_ids"]):
        logps = llama(torch.tensor([row["prompt_ids"] + answer])).logits[0].log_softmax(-1)
        expected.append(sum(logps[3 + place, token].item() for place, token in enumerate(answer)))
    assert alone("ask")["score"](llama.train(), [row]) == [pytest.approx(expected, rel=1e-5)]
    logp = run_cell("by-hand", {"torch": torch, "trained": True})["logp"]
    assert logp(llama, row["prompt_ids"], row["chosen_ids"]) == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("pairs_at_once", [2, 3, 8])
def test_score_in_batches_equals_one_at_a_time(llama, pairs_at_once):
    score = alone("ask")["score"]
    one_at_a_time = score(llama, Dataset.from_list(ROWS))
    found = score(llama, Dataset.from_list(ROWS), pairs_at_once)
    assert np.array(found) == pytest.approx(np.array(one_at_a_time), rel=1e-5)
