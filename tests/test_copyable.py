"""The cells that are worth copying, each run by itself in an empty namespace and used as a stranger would use it."""

import builtins
import dis
import types
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import some_pairs
from huggingface_hub import ModelCard
from notebook import CELLS, alone, run_cell
from peft import LoraConfig, PeftModel, get_peft_model
from trainers import perturb
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

COPYABLE = ["read-pair", "encode", "memory", "load-model", "run-prompts-once", "score", "merge-in-shards", "card"]
QUESTION, CHOSEN, REJECTED = "What is a licence?", "A grant of rights.", "No  idea."
TURNS = [{"role": "user", "content": QUESTION}]

# A script of somebody who has TRL, a model and pairs, and has never seen the notebook.
SCRIPT = """
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

settings = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, eval_strategy="steps")
settings |= dict(eval_steps=3, save_strategy="no", report_to="none", bf16=False, use_cpu=True, output_dir=output)
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
    args=DPOConfig(**settings),
    train_dataset=Dataset.from_list(pairs[4:]),
    eval_dataset=Dataset.from_list(pairs[:4]),
    processing_class=AutoTokenizer.from_pretrained(folder),
    peft_config=LoraConfig(target_modules="all-linear") if lora else None,
)
"""


def outer_names(code):
    """What the functions in this code read from outside of themselves."""
    for inner in [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]:
        yield from (step.argval for step in dis.get_instructions(inner) if step.opname == "LOAD_GLOBAL")
        yield from outer_names(inner)


@pytest.mark.parametrize("name", COPYABLE)
def test_a_copied_cell_needs_nothing_else(name):
    """No function of it reads a parameter of the notebook, or anything else that the cell does not bring."""
    brought, parameters = alone(name).keys(), run_cell("parameters", {}).keys() - {"__builtins__"}
    names = set(outer_names(compile(CELLS[name], name, "exec")))
    assert names and names <= brought | vars(builtins).keys()
    assert "beta" in parameters and not parameters & brought


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "all parameters"])
def test_prompts_once_on_a_stock_trainer(models, tmp_path, lora):
    """The same losses for fewer tokens, with layers checkpointed as TRL does it or as each batch needs it."""
    runs, pairs = [], [{"prompt": row.pop("question"), **row} for row in some_pairs(16)]
    for copied in (False, True):
        script = {"folder": models["llama3"], "output": str(tmp_path), "pairs": pairs, "lora": lora}
        exec(SCRIPT, script)
        trainer, seen = script["trainer"], []
        model = trainer.model.get_base_model() if lora else trainer.model
        if copied:
            needed = partial(alone("memory")["layers_to_checkpoint"], model.config, room=1e6, in_4bit=False, width=4)
            alone("run-prompts-once")["run_prompts_once"](model, None if lora else needed)
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].numel()))
        trainer.train()
        logged = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history[:-1]]
        runs.append((logged, sum(seen)))
    (stock, stock_tokens), (ours, our_tokens) = runs
    assert len(stock) == 4 and stock[2] < stock[0] and ours == pytest.approx(stock, rel=1e-5)
    assert our_tokens < (0.7 if lora else 0.9) * stock_tokens


def test_read_pair():
    pair = TURNS, CHOSEN, REJECTED
    read_pair, user = alone("read-pair")["read_pair"], {"from": "human", "value": QUESTION}
    answers = [{"role": "assistant", "content": answer} for answer in (CHOSEN, REJECTED)]
    assert read_pair({"question": QUESTION, "chosen": CHOSEN, "rejected": f" {REJECTED}"}) == pair
    assert read_pair({"chosen": [*TURNS, answers[0]], "rejected": [*TURNS, answers[1]]}) == pair
    assert read_pair({"conversations": [user], "chosen": answers[0], "rejected": answers[1:]}) == pair
    asked = f"\n\nHuman: {QUESTION}\n\nAssistant:"
    texts = {"chosen": f"{asked} {CHOSEN}", "rejected": f"{asked} {REJECTED}"}
    assert read_pair(texts, "transcript") == pair
    with pytest.raises(ValueError, match="question"):
        read_pair({"question": "", "chosen": CHOSEN, "rejected": REJECTED})


def test_encode(models):
    encode, tokenizer = alone("encode")["encode"], AutoTokenizer.from_pretrained(models["llama3"])
    prompt = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    expected = {"prompt_ids": prompt}
    for name, answer in (("chosen_ids", CHOSEN), ("rejected_ids", REJECTED)):
        expected[name] = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    assert encode(tokenizer, TURNS, CHOSEN, REJECTED, 100) == expected
    with pytest.raises(ValueError, match="more than 20 tokens"):
        encode(tokenizer, TURNS, CHOSEN * 20, REJECTED, 20)


def test_plan(models):
    cell, config = alone("memory"), AutoConfig.from_pretrained(models["qwen"])
    once, longest = np.array([300, 200, 100, 50]), np.array([250, 150, 90, 40])
    size, tokens, _, layers = cell["plan"](config, once, longest, [1, 2, 4], 1e12)
    assert (size, *tokens, *layers) == (4, 650, 0)
    room = cell["step_memory"](config, 300, 500, 1)
    size, tokens, cells, layers = cell["plan"](config, once, longest, [1], room)
    assert [*tokens] == [*once] and [*cells] == [*2 * longest] and [*layers] == [1, 0, 0, 0]
    assert cell["layers_to_checkpoint"](config, 300, 500, room) == 1


def test_load_4bit(models):
    load_4bit = alone("load-model")["load_4bit"]
    layers = [module for module in load_4bit(models["qwen"]).modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14 and all(layer.weight.quant_type == "nf4" for layer in layers)
    assert all(layer.weight.quant_state.nested and layer.compute_dtype == torch.bfloat16 for layer in layers)
    assert {parameter.dtype for parameter in load_4bit(models["qwen"], torch.float32, False).parameters()} == {
        torch.float32
    }


def test_score(models):
    model = AutoModelForCausalLM.from_pretrained(models["llama3"], dtype=torch.float32)
    row, expected = {"prompt_ids": [0, 5, 6, 7], "chosen_ids": [8, 9, 4], "rejected_ids": [11, 4]}, []
    for answer in (row["chosen_ids"], row["rejected_ids"]):
        logps = model(torch.tensor([row["prompt_ids"] + answer])).logits[0].log_softmax(-1)
        expected.append(sum(logps[3 + i, token].item() for i, token in enumerate(answer)))
    found = alone("score")["score"](model.train(), [row, row])
    assert np.array(found) == pytest.approx(np.array([expected, expected]), rel=1e-5)


def test_merge_in_shards(models, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    base = AutoModelForCausalLM.from_pretrained(models["chatml"], dtype=torch.float16)
    base.config.save_pretrained(merged)
    base.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=7, target_modules="all-linear"))
    perturb(tuned)
    tuned.save_pretrained(adapter)
    alone("merge-in-shards")["merge_in_shards"](tmp_path / "base", adapter, merged, "100KB")
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float16).state_dict()
    base = AutoModelForCausalLM.from_pretrained(models["chatml"], dtype=torch.float16)
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    assert len(list(merged.glob("*.safetensors"))) > 3 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_model_card():
    scores = pd.DataFrame({"loss": [0.69, 0.5]}, ["base", "trained"])
    parameters = {"base_model": "someone/base", "dataset_id": "someone/pairs", "beta": 0.1}
    card = alone("card")["model_card"]("me/tuned", parameters, {"Scores": scores})
    assert isinstance(card, ModelCard)
    assert card.data.base_model == "someone/base" and "someone/pairs" in str(card.data.datasets)
    assert "# tuned" in card.text and "## Scores" in card.text and "| trained |" in card.text and "0.1" in card.text
