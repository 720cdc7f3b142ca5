"""The loss that is trained, the checks around it, and whole runs of the notebook on tiny models of other families."""

import math
import weakref
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from trainers import SMALL, gradient, gradients, perturb
from transformers import AutoModelForCausalLM

from rehearsal.notebook import CELLS, alone, run_cell, run_cells


def test_loss_margins_and_gradient_are_the_papers(prepare, models):
    """Against Rafailov et al. (2023), equation 7, with the reference loaded as a model of its own."""
    beta = 0.3  # neither it nor this alpha is a default of the libraries
    trainer = prepare(load_in_4bit=False, beta=beta, lora_alpha=8)["trainer"]
    perturb(trainer.model)
    reference = AutoModelForCausalLM.from_pretrained(models["qwen"], dtype=torch.float32)
    rows = [trainer.train_dataset[i] for i in range(6)]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    loss.backward()
    found, metrics = gradients(trainer.model), trainer._metrics["train"]

    def logp(model, prompt, answer):
        """log pi(y|x): the sum over the answer's tokens of the log-probability of each, given all before it."""
        logps = (
            model(input_ids=torch.tensor([prompt + answer]))
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
        )
        return sum(logps[t, token] for t, token in enumerate(answer))

    margins = []
    for row in rows:
        x, y_w, y_l = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        with torch.no_grad():
            ref_w, ref_l = logp(reference, x, y_w), logp(reference, x, y_l)
        margins.append(
            beta * (logp(trainer.model, x, y_w) - ref_w)
            - beta * (logp(trainer.model, x, y_l) - ref_l)
        )
    margins = torch.stack(margins)
    expected = -torch.log(1 / (1 + torch.exp(-margins))).mean()
    expected.backward()
    assert trainer.model.peft_config["default"].lora_alpha == 8
    assert expected.item() != pytest.approx(
        math.log(2), abs=1e-3
    )  # the perturbed adapter is really in play
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["rewards/margins"][-1] == pytest.approx(
        margins.mean().item(), rel=1e-4, abs=1e-5
    )
    assert metrics["rewards/accuracies"][-1] == pytest.approx((margins > 0).sum().item() / 6)
    for name, value in gradients(trainer.model).items():
        assert torch.allclose(
            found[name], value, rtol=0, atol=1e-5 * max(value.abs().max().item(), 1.0)
        ), name


def test_a_4_bit_base_and_its_float32_adapter(prepare):
    """An evaluation leaves the gradient as it was: bitsandbytes on a CPU with AVX512-BF16 repacks the weights there.

    And once it is trained all of its memory is free for the merge.
    """
    nb = prepare("chatml", max_steps=2)
    trainer = nb["trainer"]
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {
        torch.float32
    } and trainer.ref_model is None
    perturb(trainer.model)
    before = gradient(trainer)
    trainer.evaluate()
    assert all(torch.equal(before[name], after) for name, after in gradient(trainer).items())
    # Other CPUs do not show it, so the cure is looked for as well.
    layers = [module for module in trainer.model.modules() if isinstance(module, nb["Linear4bit"])]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    del trainer, trainable, layers
    nb["trainer"] = None
    run_cell("train", nb)
    held = [nb["trainer"], *nb["trainer"].model.modules()]
    held = [weakref.ref(thing) for thing in (*held, *nb["model"].parameters())]
    run_cell("free", nb)
    assert not any(thing() for thing in held)


def test_questions_are_asked_as_pairs_are_trained(prepare):
    """All at once, padded on the left."""
    nb = prepare("llama3", load_in_4bit=False)
    with patch.object(nb["model"], "generate", wraps=nb["model"].generate) as generate:
        assert [*nb["ask"](nb["model"])] == nb["QUESTIONS"]
    assert nb["tokenizer"].backend_tokenizer.padding is None  # or it would be saved so
    ids, masks = (generate.call_args.kwargs[name] for name in ("input_ids", "attention_mask"))
    for question, row, mask in zip(nb["QUESTIONS"], ids, masks, strict=True):
        turns = [
            {"role": "system", "content": "You are a helpful assistant chatbot."},
            {"role": "user", "content": question},
        ]
        asked = nb["tokenizer"].apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert row[mask.bool()].tolist() == asked and mask[-len(asked) :].all()


# The checks of the notebook, each made to fail once.


def test_another_model_than_was_asked_for_is_told(prepare):
    nb = prepare(load_in_4bit=False)
    nb["adapter_size"] += 1
    with pytest.raises(AssertionError, match="parameters to train"):
        nb["make_trainer"](nb["load_4bit"](nb["base_model"], torch.float32, False))
    nb["BitsAndBytesConfig"] = lambda **settings: None
    with pytest.raises(AssertionError, match="0 layers"):
        nb["load_4bit"](nb["base_model"])


@pytest.mark.parametrize(
    "loss_type", ["sigmoid", "sigmoid_norm", "robust", "ipo", "apo_zero", "sigmoid+sft"]
)
def test_a_policy_that_is_not_the_reference_at_first_is_told(prepare, loss_type):
    """By a loss that does not begin where each loss begins, but for the sum with sft: that begins where the model is."""
    nb = prepare(load_in_4bit=False, loss_type=loss_type, beta=5)
    evaluated = (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "rewards/chosen",
        "rewards/rejected",
    )

    def begin():
        trainer = nb["trainer"]
        batch = trainer._prepare_inputs(
            trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        )
        loss = trainer.compute_loss(trainer.model.train(), batch).item()
        nb["run"]["history"] = [
            {"step": 1, "loss": loss, **{f"eval_{name}": 0.0 for name in evaluated}}
        ]
        run_cell("held-out", nb)

    begin()
    perturb(nb["trainer"].model)
    if loss_type == "sigmoid+sft":
        return begin()
    with pytest.raises(AssertionError, match="policy and reference differ"):
        begin()


@pytest.mark.parametrize(
    "trained, merged, lost", [(2, 0.1, True), (0.05, 0, False), (-2, -1.5, False), (-2, 0, True)]
)
def test_a_merge_that_loses_the_adapter_is_told(trained, merged, lost):
    """By margins made up for the trained and the merged model; to have learnt the opposite is no fault of the merge."""
    evaluated = pd.DataFrame({"loss": [0.7, 0.5], "rewards/chosen": [0.0, 0.1]})
    nb = alone("words") | dict(
        run={"before": {}, "after": {}}, evaluated=evaluated, held_out=[0, 1], shallow=0.5
    )
    nb |= dict(scores=pd.DataFrame({"reward accuracy": 1.0}, ["trained"]))
    nb |= dict(margins=np.array([[0, 0], [trained, trained], [0, 0], [merged, merged]]))
    with pytest.raises(AssertionError, match="use the adapter") if lost else nullcontext():
        run_cell("what-it-came-to", nb)


# Whole runs: each family goes through the notebook by `base_model` alone.


@pytest.mark.parametrize(
    "family, system", [("llama3", "stays"), ("mistral-instruct", "joins the user turn")]
)
def test_a_whole_run_of_another_family(models, pairs_file, tmp_path, capsys, family, system):
    sources = dict(base_model=models[family], dataset_id=pairs_file, output_dir=str(tmp_path))
    nb = run_cells("install", list(CELLS)[-1], **{**SMALL, **sources})
    printed = capsys.readouterr().out
    assert f"A system turn {system}" in printed and "The model stays in" in printed
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    assert len(nb["run"]["history"]) == 4 + 5 + 1 and len(list(tmp_path.glob("curves/*.png"))) == 4
    public = (tmp_path / "merged" / "README.md").read_text() + (
        tmp_path / "merged" / "run.json"
    ).read_text()
    assert (
        models[family] not in public and pairs_file not in public
    )  # folders mean nothing to others
