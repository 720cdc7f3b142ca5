"""The loss that is trained, the checks around it, and whole runs of the notebook on tiny models of other families."""

import math
import weakref
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from trainers import SMALL, batch_of, build_trainer, gradient, gradients, perturb, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehearsal.notebook import CELLS, alone, run_cell, run_cells


def sequence_logp(model, prompt, answer):
    """log pi(y|x): the sum over the answer's tokens of the log-probability of each, given all before it."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits
    logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return sum(logps[t, token] for t, token in enumerate(answer))


def equation_7(policy, reference, rows, beta):
    """The margins of some rows by Rafailov et al. (2023), equation 7."""
    margins = []
    for row in rows:
        x, y_w, y_l = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        with torch.no_grad():
            ref_w = sequence_logp(reference, x, y_w)
            ref_l = sequence_logp(reference, x, y_l)
        reward_w = beta * (sequence_logp(policy, x, y_w) - ref_w)
        reward_l = beta * (sequence_logp(policy, x, y_l) - ref_l)
        margins.append(reward_w - reward_l)
    return torch.stack(margins)


def test_loss_margins_and_gradient_are_the_papers(prepare, models):
    """Against equation 7, with the reference loaded as a model of its own."""
    beta = 0.3  # neither it nor this alpha is a default of the libraries
    trainer = prepare(load_in_4bit=False, beta=beta, lora_alpha=8)["trainer"]
    perturb(trainer.model)
    reference = AutoModelForCausalLM.from_pretrained(models["qwen"], dtype=torch.float32)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, 6))
    loss.backward()
    found, metrics = gradients(trainer.model), trainer._metrics["train"]

    rows = [trainer.train_dataset[place] for place in range(6)]
    margins = equation_7(trainer.model, reference, rows, beta)
    expected = -torch.log(1 / (1 + torch.exp(-margins))).mean()
    expected.backward()
    assert trainer.model.peft_config["default"].lora_alpha == 8
    assert abs(expected.item() - math.log(2)) > 1e-3  # the perturbed adapter is really in play
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    mean_margin = margins.mean().item()
    assert metrics["rewards/margins"][-1] == pytest.approx(mean_margin, rel=1e-4, abs=1e-5)
    assert metrics["rewards/accuracies"][-1] == pytest.approx((margins > 0).sum().item() / 6)
    for name, value in gradients(trainer.model).items():
        bound = 1e-5 * max(value.abs().max().item(), 1.0)
        assert torch.allclose(found[name], value, rtol=0, atol=bound), name


def test_the_loss_by_hand_is_the_trainers(prepare):
    """On a pair whose policy has left the reference, where a wrong sign or a forgotten beta would show."""
    nb = prepare(load_in_4bit=False, beta=0.3)
    perturb(nb["trainer"].model)
    nb["trainer"].model.eval()
    run_cell("by-hand", nb)
    by_trl = nb["trl_loss"](nb["trainer"], nb["pair"])
    assert nb["loss"] == pytest.approx(by_trl, rel=1e-4)
    assert abs(by_trl - math.log(2)) > 1e-3
    assert not nb["trainer"]._metrics["eval"]  # none of it is logged with the training's


# The settings: what the libraries are told, against literals.

PARAMETERS = dict(
    base_model="teknium/OpenHermes-2.5-Mistral-7B",
    base_revision="",
    new_model="NeuralHermes-2.5-Mistral-7B",
    dataset_id="Intel/orca_dpo_pairs",
    dataset_revision="",
    output_dir="dpo_run",
    eval_pairs=128,
    load_in_4bit=True,
    lora_rank=16,
    lora_alpha=16,
    lora_targets="all-linear",
    beta=0.1,
    loss_type="sigmoid",
    learning_rate=5e-5,
    max_steps=200,
    warmup_steps=100,
    pairs_per_step=16,
    max_length=1536,
    share_prompt=True,
    gpu_memory=0,
    push_to_hub=True,
    private=True,
    eval_tasks="",
    seed=42,
)
SETTINGS = dict(  # of DPOConfig, by the default parameters, on a CPU
    loss_type=["sigmoid"],
    beta=0.1,
    label_smoothing=0.0,
    learning_rate=5e-5,
    lr_scheduler_type="cosine",
    warmup_steps=100,
    max_steps=200,
    weight_decay=0.0,
    max_grad_norm=1.0,
    adam_beta1=0.9,
    adam_beta2=0.999,
    optim="adamw_torch",
    train_sampling_strategy="sequential",
    max_length=1536,
    seed=42,
    bf16=False,
    fp16=False,
    use_cpu=True,
    ddp_find_unused_parameters=False,
    eval_strategy="steps",
    eval_steps=0.25,
    eval_on_start=False,  # the cell of the training sets it
    save_strategy="steps",
    save_steps=0.125,
    save_total_limit=2,
    logging_steps=1,
    logging_nan_inf_filter=False,
    report_to=[],
    disable_dropout=True,
    precompute_ref_log_probs=False,
    use_weighting=False,
    ld_alpha=None,
    sync_ref_model=False,
    reference_free=False,
)


def test_the_default_parameters_are_the_articles():
    found = run_cell("parameters", {})
    del found["__builtins__"]
    assert found == PARAMETERS


@pytest.fixture(scope="module")
def default_settings(models, pairs_file, tmp_path_factory):
    """The namespace of a run by the default parameters that has made its settings."""
    sources = dict(base_model=models["qwen"], dataset_id=pairs_file)
    folder = tmp_path_factory.mktemp("defaults") / "run"
    nb = run_cells("install", "questions", **sources, eval_pairs=8, output_dir=str(folder))
    return run_cell("training-args", nb)


def test_the_settings_of_the_training_are_these(default_settings):
    args = default_settings["training_args"]
    found = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    assert found == {name: SETTINGS[name] for name in found}
    assert len(found) > 28  # the names are TRL's
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16


def test_an_adapter_is_made_by_the_parameters(prepare):
    nb = prepare(load_in_4bit=False, lora_rank=4, lora_alpha=12, lora_targets="q_proj, v_proj")
    lora = nb["trainer"].model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (4, 12, 0.0, "none")
    assert lora.target_modules == {"q_proj", "v_proj"} and lora.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    "loss_type, smoothing", [("sigmoid", 0.0), ("robust", 0.1), ("exo_pair", 0.001), ("ipo", 0.0)]
)
def test_label_smoothing_goes_with_the_loss(default_settings, loss_type, smoothing):
    nb = dict(default_settings, loss_type=loss_type)
    nb["run"] = type("Run", (), {"stage": staticmethod(lambda *names, **options: None)})
    assert run_cell("training-args", nb)["training_args"].label_smoothing == smoothing


def test_questions_are_asked_with_the_articles_settings(default_settings):
    expected = dict(max_new_tokens=200, do_sample=True, temperature=0.7, top_p=0.9)
    assert default_settings["sampling"] == expected


# The model that is trained.


def test_an_adapter_is_float32_and_its_base_in_4_bits(prepare):
    nb = prepare("chatml")
    adapter = [x for x in nb["trainer"].model.parameters() if x.requires_grad]
    assert {parameter.dtype for parameter in adapter} == {torch.float32}
    assert nb["trainer"].ref_model is None
    layers = [x for x in nb["trainer"].model.modules() if isinstance(x, nb["Linear4bit"])]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)  # see the next test


def test_an_evaluation_leaves_the_gradient_as_it_was(prepare):
    """bitsandbytes on a CPU with AVX512-BF16 repacks the weights in one, unless it is told not to."""
    trainer = prepare("chatml")["trainer"]
    perturb(trainer.model)
    before = gradient(trainer)
    trainer.evaluate()
    after = gradient(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_after_the_training_all_its_memory_is_free_for_the_merge(prepare):
    nb = train(prepare("chatml", max_steps=2))
    held = [nb["trainer"], *nb["trainer"].model.modules(), *nb["model"].parameters()]
    held = [weakref.ref(thing) for thing in held]
    run_cell("free", nb)
    assert not any(thing() for thing in held)


def test_questions_are_asked_as_pairs_are_trained(prepare):
    """All at once, padded on the left."""
    nb = prepare("llama3", load_in_4bit=False)
    nb["trainer"] = None  # they are asked before it is built
    with patch.object(nb["model"], "generate", wraps=nb["model"].generate) as generate:
        run_cell("before", nb)
    assert [*nb["before"]] == nb["questions"]
    assert nb["tokenizer"].backend_tokenizer.padding is None  # or it would be saved so
    ids, masks = (generate.call_args.kwargs[name] for name in ("input_ids", "attention_mask"))
    system = {"role": "system", "content": "You are a helpful assistant chatbot."}
    for question, row, mask in zip(nb["questions"], ids, masks, strict=True):
        turns = [system, {"role": "user", "content": question}]
        asked = nb["tokenizer"].apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert row[mask.bool()].tolist() == asked and mask[-len(asked) :].all()


# The checks of the notebook, each made to fail once.


def test_an_adapter_of_another_size_than_loras_is_told(prepare):
    nb = prepare(load_in_4bit=False)
    nb["adapter_size"] += 1
    with pytest.raises(ValueError, match="32,768 parameters would be trained"):
        run_cells("load", "load", nb)
        run_cell("make-trainer", nb)


def test_a_base_that_is_not_in_4_bits_is_told(prepare):
    nb = prepare(load_in_4bit=False)
    nb["BitsAndBytesConfig"] = lambda **settings: None
    with pytest.raises(AssertionError, match="quantise is True, layers in 4 bits: 0"):
        nb["load_4bit"](nb["base"])


LOSSES_OF_A_TIE = dict(sigmoid=math.log(2), sigmoid_norm=math.log(2), robust=math.log(2))
LOSSES_OF_A_TIE |= dict(ipo=0.01, apo_zero=1.0)  # with a beta of 5


@pytest.mark.parametrize("loss_type", [*LOSSES_OF_A_TIE, "sigmoid+sft"])
def test_the_first_loss_is_known_where_policy_and_reference_are_the_same(prepare, loss_type):
    """TRL's own loss on a batch, beside what a run is held to at step 1."""
    nb = prepare(load_in_4bit=False, loss_type=loss_type, beta=5)
    expected = nb["loss_of_a_tie"](loss_type, 5)
    assert expected == pytest.approx(LOSSES_OF_A_TIE.get(loss_type))
    loss = nb["trainer"].compute_loss(nb["trainer"].model.train(), batch_of(nb["trainer"]))
    if expected is not None:  # the sum with sft begins where the model is
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_wrong_first_loss_ends_the_run_at_step_1(prepare):
    nb = prepare(load_in_4bit=False)
    perturb(nb["trainer"].model)
    with pytest.raises(ValueError, match="first loss is .* and not 0.6931: policy and reference"):
        train(nb)
    assert nb["trainer"].state.global_step == 1
    assert "trained" not in nb["run"]


def test_attention_dropout_is_switched_off_and_said(models, pairs_file, tmp_path, capsys):
    """TRL switches modules off; this is a number in the base's config, and training would be noisy."""
    model = AutoModelForCausalLM.from_pretrained(models["llama3"])
    model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(models["llama3"]).save_pretrained(tmp_path / "base")
    sources = dict(base_model=str(tmp_path / "base"), dataset_id=pairs_file)
    nb = build_trainer(**sources, output_dir=str(tmp_path / "run"), load_in_4bit=False)
    assert "would drop attention scores at random" in capsys.readouterr().out
    train(nb)
    assert nb["run"]["history"][1]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    "margin, merged_margin, lost",
    [
        (2, 0.1, True),
        (2, 0.5, False),
        (1.0, 0.2, True),
        (1.0, 0.21, False),
        (0.05, 0, False),
        (0.05, -0.05, True),
        (-2, -1.5, False),
        (-2, 0, True),
    ],
)
def test_a_merge_that_loses_the_adapter_is_told(margin, merged_margin, lost):
    """By margins made up for both models; to have learnt the opposite is no fault of the merge."""
    evaluated = pd.DataFrame({"loss": [0.7, 0.5], "rewards/chosen": [0.0, 0.1]})
    scores = pd.DataFrame(
        {"reward margin": [margin, merged_margin], "reward accuracy": 1.0}, ["trained", "merged"]
    )
    nb = alone("words") | dict(run={"after": {}}, before={}, evaluated=evaluated, scores=scores)
    nb |= dict(held_out=np.array([0, 1]), shallow=0.5)
    with pytest.raises(ValueError, match="use the adapter") if lost else nullcontext():
        run_cell("what-it-came-to", nb)


# Whole runs: each family goes through the notebook by `base_model` alone.


@pytest.mark.parametrize(
    "family, system", [("llama3", "stays"), ("mistral-instruct", "joins the user turn")]
)
def test_a_whole_run_of_another_family(models, pairs_file, tmp_path, capsys, family, system):
    sources = dict(base_model=models[family], dataset_id=pairs_file, output_dir=str(tmp_path))
    nb = run_cells("install", list(CELLS)[-1], **{**SMALL, **sources})
    printed = capsys.readouterr().out
    assert f"a system turn: {system}" in printed
    assert "The model stays in" in printed
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    assert len(nb["run"]["history"]) == 4 + 5 + 1
    assert len(list(tmp_path.glob("curves/*.png"))) == 4


def test_what_is_public_names_no_folder_of_this_machine(models, pairs_file):
    parameters = dict(base_model=models["qwen"], dataset_id=pairs_file, seed=1)
    public = alone("card")["without_paths"](parameters)
    expected = dict(base_model=Path(models["qwen"]).name, dataset_id="pairs.jsonl", seed=1)
    assert public == expected
