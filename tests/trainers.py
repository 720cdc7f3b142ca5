"""What the tests of training share."""

import json

import torch

from rehearsal.notebook import run_cells

SMALL = dict(
    eval_pairs=8, max_steps=4, warmup_steps=1, pairs_per_step=8, max_length=512, learning_rate=1e-3
)


def perturb(model):
    """Moves the adapter off its start, where policy and reference are equal and much could go wrong unseen."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)


def gradients(model):
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return found


def gradient(trainer):
    """The gradient of the adapter on the first four training pairs."""
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    return gradients(trainer.model)


def build_trainer(**parameters):
    """The namespace of a small run that has built its trainer. The base is not asked anything."""
    nb = run_cells("install", "questions", **{**SMALL, **parameters})
    nb["before"] = {}
    return run_cells("training-args", "make-trainer", nb)


def train(nb):
    """Runs the cells of the training, after those that built its trainer."""
    return run_cells("by-hand", "save", nb)


def batch_of(trainer, count=4):
    """The first training pairs as the trainer's batch."""
    rows = [trainer.train_dataset[place] for place in range(count)]
    return trainer._prepare_inputs(trainer.data_collator(rows))


def read_record(folder):
    """The content of a run's run.json."""
    return json.loads((folder / "run.json").read_text())
