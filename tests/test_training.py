"""The loss that is trained, the checks around it, and whole runs of the notebook on tiny models of each family."""

import json
import math
import subprocess
import sys
import weakref

import pytest
import torch
from notebook import PATH, run_cell, run_cells
from safetensors.torch import load_file
from trainers import SMALL, gradient, gradients, perturb


def test_loss_margins_and_gradient_are_the_papers(prepare, models):
    """Against Rafailov et al. (2023), equation 7, with the reference loaded as a model of its own."""
    nb = prepare(load_in_4bit=False, beta=0.3, lora_alpha=8)  # neither is a default of the libraries
    trainer, beta = nb["trainer"], 0.3
    perturb(trainer.model)
    reference = nb["AutoModelForCausalLM"].from_pretrained(models["qwen"], dtype=torch.float32)
    rows = [trainer.train_dataset[i] for i in range(6)]

    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    loss.backward()
    found, metrics = gradients(trainer.model), {k: v[-1] for k, v in trainer._metrics["train"].items() if len(v)}

    def logp(model, prompt, answer):
        """log pi(y|x): the sum over the answer's tokens of the log-probability of each, given all before it."""
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        steps = range(len(prompt), len(prompt) + len(answer))
        return sum(logits[t - 1].log_softmax(-1)[(prompt + answer)[t]] for t in steps)

    losses, rewards_w, rewards_l = [], [], []
    for row in rows:
        x, y_w, y_l = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        with torch.no_grad():
            ref_w, ref_l = logp(reference, x, y_w), logp(reference, x, y_l)
        reward_w = beta * (logp(trainer.model, x, y_w) - ref_w)
        reward_l = beta * (logp(trainer.model, x, y_l) - ref_l)
        losses.append(-torch.log(1 / (1 + torch.exp(-(reward_w - reward_l)))))
        rewards_w.append(reward_w.item())
        rewards_l.append(reward_l.item())
    expected = torch.stack(losses).mean()
    expected.backward()

    assert expected.item() != pytest.approx(math.log(2), abs=1e-3)  # the perturbed adapter is really in play
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    margins = [chosen - rejected for chosen, rejected in zip(rewards_w, rewards_l, strict=True)]
    assert metrics["rewards/margins"] == pytest.approx(sum(margins) / 6, rel=1e-4, abs=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(sum(rewards_w) / 6, rel=1e-4, abs=1e-5)
    assert metrics["rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / 6)
    for name, value in gradients(trainer.model).items():
        scale = value.abs().max().item()
        assert torch.allclose(found[name], value, rtol=0, atol=1e-5 * max(scale, 1.0)), name
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), value.flatten(), 0) > 1 - 1e-5


def test_gradient_is_the_same_after_an_evaluation(prepare):
    """bitsandbytes on a CPU with AVX512-BF16 repacks 4-bit weights at the first evaluation, which spoils gradients."""
    nb = prepare("chatml")
    trainer = nb["trainer"]
    perturb(trainer.model)
    before = gradient(trainer)
    trainer.evaluate()
    for name, after in gradient(trainer).items():
        assert torch.equal(before[name], after), name
    # Other CPUs do not show it, so the cure is looked for as well.
    layers = [module for module in trainer.model.modules() if isinstance(module, nb["Linear4bit"])]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_gradient_checkpointing_changes_nothing(prepare):
    """Every run on a GPU recomputes activations in the backward pass; here it is compared with one that keeps them."""
    nb = prepare("chatml")
    perturb(nb["trainer"].model)
    kept = gradient(nb["trainer"])
    run_cells("load-model", "check-4bit", nb)
    nb["training_args"].gradient_checkpointing = True
    run_cells("trainer", "check-trainer", nb)
    nb["trainer"].model.gradient_checkpointing_enable()  # as `train` does at its start
    perturb(nb["trainer"].model)
    recomputed = gradient(nb["trainer"])
    assert nb["trainer"].model.get_base_model().is_gradient_checkpointing and recomputed.keys() == kept.keys()
    for name, value in recomputed.items():
        assert torch.allclose(kept[name], value, atol=1e-6), name


def test_four_bit_base_and_float32_adapter(prepare):
    nb = prepare("chatml")
    assert nb["layers_4bit"] == 14 and nb["nf4"].bnb_4bit_quant_type == "nf4" and nb["nf4"].bnb_4bit_use_double_quant
    assert nb["trainer"].ref_model is None
    assert {p.dtype for p in nb["trainer"].model.parameters() if p.requires_grad} == {torch.float32}


# The checks of the notebook, each made to fail once.


def test_check_4bit_fails_on_16_bit(prepare):
    nb = prepare(load_in_4bit=False)
    nb["load_in_4bit"] = True
    with pytest.raises(AssertionError, match="load_in_4bit is True, but 0 layers"):
        run_cell("check-4bit", nb)


def test_check_split_of_a_step_fails(prepare):
    nb = prepare()
    nb["accumulation"] += 1
    with pytest.raises(AssertionError, match="is not pairs_per_step"):
        run_cell("training-config", nb)


def test_check_trainer_fails_on_bf16(prepare):
    nb = prepare()
    nb["trainable"][0].data = nb["trainable"][0].data.bfloat16()
    with pytest.raises(AssertionError, match="must be float32"):
        run_cell("check-trainer", nb)


def test_check_trainer_fails_on_size(prepare):
    nb = prepare()
    nb["trainable"].pop()
    with pytest.raises(AssertionError, match="parameters would be trained"):
        run_cell("check-trainer", nb)


def test_check_trainer_fails_on_tokens(prepare):
    nb = prepare()
    first = nb["tokenized"][0]["prompt_ids"]
    change = lambda row: {"prompt_ids": row["prompt_ids"][1:] if row["prompt_ids"] == first else row["prompt_ids"]}  # noqa: E731
    nb["tokenized"] = nb["tokenized"].map(change)
    with pytest.raises(AssertionError, match="TRL made other tokens"):
        run_cell("check-trainer", nb)


def test_check_trainer_fails_on_rows(prepare):
    nb = prepare()
    nb["tokenized"] = nb["tokenized"].select(range(5))
    with pytest.raises(AssertionError, match="TRL dropped rows"):
        run_cell("check-trainer", nb)


@pytest.mark.parametrize(
    "losses, message", [([0.70, 0.60], "not ln 2"), ([math.log(2), math.log(2)], "Nothing was learnt")]
)
def test_check_loss_fails(prepare, losses, message):
    nb = prepare()
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    nb["trainer"].state.log_history = history + [{"step": nb["max_steps"], "eval_loss": 0.6}]
    with pytest.raises(AssertionError, match=message):
        run_cell("held-out", nb)


def test_a_merge_that_does_nothing_fails(prepare, monkeypatch):
    nb = prepare(load_in_4bit=False)
    run_cells("train", "free", nb)
    monkeypatch.setattr(nb["PeftModel"], "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(AssertionError, match="The adapter was not merged"):
        run_cell("merge-fp16", nb)


def test_check_merge_fails(prepare):
    nb = prepare(load_in_4bit=False)
    run_cells("train", "save-merged", nb)
    nb["scores"]["trained, 16-bit"] = (nb["scores"]["trained, 16-bit"][0] + 0.5, 0.0)
    with pytest.raises(AssertionError, match="more or fewer of the chosen answers"):
        run_cell("score-merged", nb)


def test_the_merge_gets_the_memory_of_the_trained_model(prepare):
    nb = prepare("chatml")
    model, trainer = weakref.ref(nb["trainer"].model), weakref.ref(nb["trainer"])
    layers = [module for module in nb["trainer"].model.modules() if isinstance(module, nb["Linear4bit"])]
    weights = [weakref.ref(layer.weight) for layer in layers]
    del layers
    run_cells("run-prompts-once", "free", nb)
    assert model() is None and trainer() is None
    assert weights and all(weight() is None for weight in weights)


# Whole runs. Each family goes through the notebook by `base_model` alone; each run has a second thing to show.


def papermill(folder, **parameters):
    options = [word for name, value in {**SMALL, **parameters}.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", str(PATH), "out.ipynb", *options, "--no-progress-bar"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.ipynb").read_text())


def check_run(folder):
    """What a finished run leaves in its folder."""
    merged = load_file(folder / "merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.float16}
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    for name in ("lengths", "loss", "rewards", "margins", "accuracies"):
        assert (folder / "curves" / f"{name}.png").stat().st_size > 5000
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    ):
        assert (folder / "merged" / name).exists()


def leveldb_records(data, header=7, block=32768):
    """The records of a log in LevelDB's framing: crc (4 bytes), length (2), type (1: whole, 2-4: first to last part)."""
    position, record = header, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # too little left in this block for another header
            position += block - position % block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_llama3_with_wandb(models, pairs_file, tmp_path, monkeypatch):
    """W&B gets every metric under the names of the article; read back from the file of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    papermill(tmp_path, base_model=models["llama3"], dataset_id=pairs_file)
    check_run(tmp_path / "dpo_run")
    logged = {}
    for data in leveldb_records(next(tmp_path.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()):
        for item in Record.FromString(data).history.item:
            logged.setdefault("/".join(item.nested_key) or item.key, []).append(json.loads(item.value_json))
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-4) and len(logged["train/loss"]) == 4
    for metric in ("chosen", "rejected", "margins", "accuracies"):
        assert len(logged[f"train/rewards/{metric}"]) == 4 and len(logged[f"eval/rewards/{metric}"]) == 5


def test_mistral_instruct(models, pairs_file, tmp_path):
    executed = papermill(tmp_path, base_model=models["mistral-instruct"], dataset_id=pairs_file)
    check_run(tmp_path / "dpo_run")
    text = json.dumps(executed)
    assert "folded into the first user turn" in text and "no token to push with" in text
