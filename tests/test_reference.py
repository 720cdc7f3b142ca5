"""What is remembered of the reference is what it would give again, and each pair's is computed once."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trainers import SMALL, read_record, train
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from rehearsal.notebook import alone, run_cell, run_cells

# 60 pairs less 44 held out, of which 48 are drawn: three epochs.
EPOCHS = dict(SMALL, eval_pairs=44, max_steps=6, learning_rate=1e-2, load_in_4bit=False)
METRICS = "loss grad_norm rewards/margins eval_loss eval_rewards/margins".split()


@pytest.fixture(scope="module")
def build(models, pairs_file):
    """Builds the trainer of a run of three epochs, with or without memory, in some precision."""

    def run(folder, dtype=torch.float32, remembers=True, **changes):
        parameters = dict(EPOCHS, base_model=models["qwen"], dataset_id=pairs_file, **changes)
        nb = run_cells("install", "machine", **parameters, output_dir=str(folder))
        nb["dtype"] = dtype
        run_cells("run-folder", "questions", nb)
        nb["before"] = {}
        run_cells("training-args", "remember-reference", nb)
        if not remembers:
            nb["remember_reference"] = lambda trainer, known: known
        return run_cells("make-trainer", "make-trainer", nb)

    return run


def numbers(run):
    """The metrics of a run by step, and its scores, as arrays."""
    metrics = {}
    for name in METRICS:
        metrics[name] = np.array([entry[name] for entry in run["history"] if name in entry])
    for name, logps in run["logps"].items():
        metrics[name] = np.array(logps)
    return metrics


def largest_differences(run, other):
    mine, others = numbers(run), numbers(other)
    assert mine.keys() == others.keys()
    return {name: np.abs(mine[name] - others[name]).max() for name in mine}


@pytest.fixture(scope="module")
def remembered(build, tmp_path_factory):
    """The namespace of a run of three epochs that remembers, and how often it computed each pair's reference."""
    nb = build(tmp_path_factory.mktemp("remembered") / "run")
    counts = count_references(nb)
    train(nb)
    return nb, counts


def count_references(nb):
    """Counts, from now on, the pairs whose reference a trainer computes: {pair_key: times}."""
    counts = Counter()
    trainer, plain = nb["trainer"], nb["trainer"].compute_ref_log_probs

    def compute_ref_log_probs(model, inputs):
        counts.update(nb["batch_keys"](inputs))
        return plain(model, inputs)

    trainer.compute_ref_log_probs = compute_ref_log_probs
    return counts


def test_each_pairs_reference_is_computed_once(remembered):
    """In three epochs of training, five evaluations, and the scores at the end."""
    nb, counts = remembered
    met = sorted({*nb["order"], *nb["held_out"]})
    assert len(nb["order"]) == 3 * len({*nb["order"]})
    assert counts == dict.fromkeys([nb["row_key"](nb["rows"][row]) for row in met], 1)


def test_nothing_computes_the_reference_besides(build, tmp_path):
    """Its forward passes are all that is run with the adapter switched off."""
    nb = build(tmp_path / "run", max_steps=2, warmup_steps=1)
    asked, passes = [], []
    trainer, plain = nb["trainer"], nb["trainer"].compute_ref_log_probs
    model = trainer.model

    def compute_ref_log_probs(*arguments):
        asked.append(1)
        return plain(*arguments)

    trainer.compute_ref_log_probs = compute_ref_log_probs

    def look(*arguments):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        if layer.disable_adapters:
            passes.append(1)

    model.base_model.model.model.layers[0].register_forward_pre_hook(look)
    # DPO by hand, between them, would ask it once more.
    for cell in ("run-prompts-once", "longest", "train", "save"):
        run_cell(cell, nb)
    assert len(passes) == len(asked) > 0


def test_losses_with_and_without_memory_are_equal(build, remembered, tmp_path):
    forgetful = train(build(tmp_path / "run", remembers=False))
    assert not forgetful["trainer"].precompute_ref_logps  # it did without
    differences = largest_differences(remembered[0]["run"], forgetful["run"])
    scores = differences.pop("base"), differences.pop("trained")
    assert max(differences.values()) < 1e-6
    assert max(scores) < 1e-4  # sums of up to a hundred tokens
    assert abs(numbers(forgetful["run"])["rewards/margins"]).max() > 0.01  # something was learnt


def test_losses_with_and_without_memory_are_equal_within_rounding_in_bf16(build, tmp_path):
    runs = []
    for remembers in (True, False):
        nb = build(tmp_path / str(remembers), dtype=torch.bfloat16, remembers=remembers)
        runs.append(train(nb)["run"])
    differences = largest_differences(*runs)
    # A log-probability of 30 nats has steps of 0.1 in bf16, of which a reward has a tenth.
    assert max(differences[name] for name in ("loss", "eval_loss")) < 0.02
    assert runs[0]["history"][1]["loss"] == pytest.approx(np.log(2), abs=0.01)


# After a cut.


class Cut(TrainerCallback):
    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **options):
        if state.global_step == self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def cut(build, tmp_path_factory):
    """The folder of a run that was cut in its second epoch."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    nb = build(folder)
    nb["trainer"].add_callback(Cut(after=4))
    with pytest.raises(KeyboardInterrupt):
        train(nb)
    return folder


def go_on(build, folder, change=None):
    """The namespace of the run that goes on in a folder, and the counts of the references that it computes."""
    if change:
        for checkpoint in folder.glob("checkpoint-*"):
            change(checkpoint)
    nb = build(folder)
    counts = count_references(nb)
    return train(nb), counts


def test_what_was_remembered_is_known_after_a_cut(build, cut, remembered, tmp_path):
    shutil.copytree(cut, tmp_path / "run")
    nb, counts = go_on(build, tmp_path / "run")
    assert not counts
    assert max(largest_differences(nb["run"], remembered[0]["run"]).values()) == 0


def edit(**changes):
    """A change of a checkpoint's reference.json, in a checkpoint that is whole otherwise."""

    def change(checkpoint):
        path = checkpoint / "reference.json"
        content = json.loads(path.read_text())
        content["logps"] = {key: [0, 0] for key in content["logps"]}
        path.write_text(json.dumps({**content, **changes}))
        reseal(checkpoint)

    return change


def reseal(checkpoint):
    alone("run-folder")["seal"](checkpoint)


def cut_in_half(checkpoint):
    path = checkpoint / "reference.json"
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    reseal(checkpoint)


def remove(checkpoint):
    (checkpoint / "reference.json").unlink()
    reseal(checkpoint)


UNUSABLE = {
    "missing": remove,
    "cut in half": cut_in_half,
    "of another base": edit(base="another"),
    "of another precision": edit(precision="torch.bfloat16"),
    "of a base in 4 bits": edit(in_4bit=True),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_the_reference_is_computed_again_where_what_was_remembered_cannot_be_used(
    build, cut, remembered, tmp_path, kind
):
    """And the run ends as it would have; what rounding does to other batches goes through two steps."""
    shutil.copytree(cut, tmp_path / "run")
    nb, counts = go_on(build, tmp_path / "run", UNUSABLE[kind])
    assert len(counts) == len({*nb["order"], *nb["held_out"]}) and set(counts.values()) == {1}
    differences = largest_differences(nb["run"], remembered[0]["run"])
    assert max(differences[name] for name in ("loss", "eval_loss")) < 1e-6
    assert read_record(tmp_path / "run")["trained"] == 6


# The part by itself.


def test_a_batch_and_a_row_give_a_pair_the_same_name(remembered):
    nb, _ = remembered
    rows = [nb["rows"][place] for place in range(5)]
    batch = nb["trainer"].data_collator(rows)
    assert nb["batch_keys"](batch) == [nb["row_key"](row) for row in rows]
    part = nb["select_pairs"](batch, [1, 3])
    assert nb["batch_keys"](part) == [nb["row_key"](rows[1]), nb["row_key"](rows[3])]


def test_another_pair_has_another_name():
    row_key = alone("remember-reference")["row_key"]
    row = dict(prompt_ids=[1, 2], chosen_ids=[3, 4], rejected_ids=[5])
    others = [
        dict(row, chosen_ids=[5], rejected_ids=[3, 4]),
        dict(row, prompt_ids=[1], chosen_ids=[2, 3, 4], rejected_ids=[2, 5]),
        dict(row, rejected_ids=[4]),
        dict(row, chosen_ids=[3], rejected_ids=[4, 5]),
        dict(row, prompt_ids=[2, 1]),
    ]
    assert len({row_key(each) for each in [row, *others]}) == 6


@pytest.mark.parametrize("why", ["is_fsdp_enabled", "is_deepspeed_enabled", "sync_ref_model"])
def test_nothing_is_remembered_where_it_would_be_wrong(why):
    args = SimpleNamespace(sync_ref_model=why == "sync_ref_model")
    trainer = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False, args=args)
    if why != "sync_ref_model":
        setattr(trainer, why, True)
    trainer.compute_loss = plain = object()
    assert alone("remember-reference")["remember_reference"](trainer) == {}
    assert trainer.compute_loss is plain and not hasattr(trainer, "precompute_ref_logps")


@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "a reference model of its own"])
def test_any_trainer_of_trl_remembers(models, tmp_path, adapter):
    """The part alone, on two epochs of texts that TRL itself tokenizes."""
    texts = [
        {"prompt": f"Tell {i}.", "chosen": "Yes " * i, "rejected": f"No {i}."} for i in range(1, 7)
    ]
    losses = []
    for remembers in (True, False):
        args = DPOConfig(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=2, seed=0,
            learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
            save_strategy="no",
        )  # fmt: skip
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(models["qwen"], dtype=torch.float32),
            args=args,
            train_dataset=Dataset.from_list(texts),
            processing_class=AutoTokenizer.from_pretrained(models["qwen"]),
            peft_config=LoraConfig(task_type="CAUSAL_LM") if adapter else None,
        )
        if remembers:
            known = alone("remember-reference")["remember_reference"](trainer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(known) == 6 and len(losses[0]) == 6 and losses[0][-1] < 0.69
