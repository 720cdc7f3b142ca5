"""fp16, as on a T4: a whole run with a live scaler of gradients, and bases that overflow in it. On a CPU, by autocast."""

import math
import shutil

import pytest
import torch
from trainers import SMALL, batch_of, read_record, train
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rehearsal.notebook import run_cell, run_cells


@pytest.fixture
def in_half(models, pairs_file, tmp_path, monkeypatch):
    """The namespace of a small run in fp16 whose trainer is built, with a scaler as a GPU has it."""

    monkeypatch.chdir(tmp_path)

    def run(base_model=models["qwen"], last="make-trainer", init_scale=2.0**16, **changes):
        parameters = dict(SMALL, base_model=base_model, dataset_id=pairs_file, load_in_4bit=False)
        parameters |= {"output_dir": str(tmp_path / "run"), **changes}
        nb = run_cells("install", "machine", **parameters)
        nb["dtype"] = torch.float16
        run_cells("run-folder", last, nb)
        if last == "make-trainer":
            accelerator = nb["trainer"].accelerator
            accelerator.native_amp = True  # which Accelerate leaves off in fp16 on a CPU
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        return nb

    return run


@pytest.fixture(autouse=True)
def grouped_keys(monkeypatch):
    """The notebook's change to transformers for cards before Ampere ends with the test."""
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)


def test_a_small_run_in_fp16_learns_with_a_live_scaler(in_half, tmp_path):
    nb = in_half(max_steps=6, learning_rate=1e-2)
    assert nb["training_args"].fp16 and not nb["training_args"].bf16
    scaled = []
    plain_step = nb["trainer"].accelerator.scaler.step

    def step(optimizer, *arguments):
        scaled.append(nb["trainer"].accelerator.scaler.get_scale())
        return plain_step(optimizer, *arguments)

    nb["trainer"].accelerator.scaler.step = step
    train(nb)
    losses = [entry["loss"] for entry in nb["run"]["history"] if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert min(losses) < 0.68 and all(math.isfinite(loss) for loss in losses)
    assert len(scaled) == 6 and min(scaled) > 1
    assert (tmp_path / "run" / "checkpoint-6" / "scaler.pt").exists()
    assert {x.dtype for x in nb["trainer"].model.parameters() if x.requires_grad} == {torch.float32}
    assert {x.dtype for x in nb["trainer"].model.parameters() if not x.requires_grad} == {
        torch.float16
    }


class InterruptAt(TrainerCallback):
    """Interrupts a training once, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **options):
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


@pytest.mark.parametrize("from_a_checkpoint", [True, False])
def test_a_training_in_fp16_that_was_interrupted_ends_as_if_it_had_not_been(
    in_half, from_a_checkpoint
):
    """The scale of the gradients, which the first steps lower, is set back as well."""
    undisturbed = in_half(output_dir="undisturbed", init_scale=2.0**22)
    train(undisturbed)
    nb = in_half(output_dir="interrupted", init_scale=2.0**22)
    nb["trainer"].add_callback(InterruptAt(3))
    with pytest.raises(KeyboardInterrupt):
        train(nb)
    if not from_a_checkpoint:
        for checkpoint in nb["folder"].glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    run_cells("train", "save", nb)
    assert undisturbed["trainer"].accelerator.scaler.get_scale() < 2.0**22
    assert nb["run"]["logps"] == undisturbed["run"]["logps"]


def test_the_gradient_in_fp16_is_that_of_float32(in_half, prepare):
    """Scaled back, and within the rounding of fp16."""
    nb = in_half()
    trainer, exact = nb["trainer"], prepare(load_in_4bit=False, output_dir=nb["output_dir"] + "32")
    norms = []
    for each in (trainer, exact["trainer"]):
        with each.accelerator.autocast():
            each.compute_loss(each.model.train(), batch_of(each)).backward()
        gradients = [x.grad.flatten() for x in each.model.parameters() if x.grad is not None]
        norms.append(torch.cat(gradients))
    assert torch.nn.functional.cosine_similarity(*norms, dim=0) > 0.999


@pytest.fixture(scope="module")
def overflowing(models, tmp_path_factory):
    """A base whose states in the first layer are too large for fp16, and fine in bf16; its weights are small."""
    folder = tmp_path_factory.mktemp("overflowing")
    model = AutoModelForCausalLM.from_pretrained(models["qwen"], dtype=torch.float32)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data *= 3e3
    mlp.down_proj.weight.data *= 1e5
    assert mlp.down_proj.weight.abs().max() < 60_000
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(models["qwen"]).save_pretrained(folder)
    return str(folder)


def test_a_base_that_overflows_in_fp16_is_told_before_any_training(in_half, overflowing):
    nb = in_half(overflowing, last="questions")
    with pytest.raises(ValueError, match="gives no numbers in torch.float16.*bfloat16, of Ampere"):
        run_cell("before", nb)
    assert "before" not in nb["run"]


def test_a_base_that_overflows_is_told_after_the_merge_with_its_scores_in_bf16(
    overflowing, pairs_file, tmp_path
):
    """Trained on a card with bf16, here in float32; the adapter is there, and the merged model is not pushed."""
    sources = dict(base_model=overflowing, dataset_id=pairs_file, load_in_4bit=False)
    nb = run_cells("install", "merge", **SMALL, **sources, output_dir=str(tmp_path / "run"))
    nb["on_gpu"] = True  # where it is scored in fp16
    with pytest.raises(ValueError, match="overflows in FP16.*is not pushed. Use the adapter"):
        run_cells("load-and-score", "score-merged", nb)
    assert nb["model"].dtype == torch.bfloat16
    assert torch.tensor(nb["run"]["logps"]["merged"]).isfinite().all()
    assert nb["is_whole"](nb["adapter_dir"])
    assert not read_record(tmp_path / "run")["after"]
