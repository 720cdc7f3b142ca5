"""What the tests of training share."""

import json

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOTrainer

from rehearsal.notebook import run_cells

SMALL = dict(
    eval_pairs=8, max_steps=4, warmup_steps=1, pairs_per_step=8, max_length=512, learning_rate=1e-3
)


def perturb(model):
    """Moves the adapter off its start, where policy and reference are equal and much could go wrong
    unseen.
    """
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
    """The gradient of the adapter on the first four training pairs, as a training computes it."""
    trainer.model.train()
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    return gradients(trainer.model)


def build_trainer(precision=torch.float32, **parameters):
    """The namespace of a small run that has built its trainer. The base is not asked anything.

    precision: which a GPU would have chosen; a CPU takes float32.
    """
    nb = run_cells("install", "machine", **{**SMALL, **parameters})
    nb["dtype"] = precision
    nb = run_cells("run-folder", "questions", nb)
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


# TRL weights its other metrics by the tokens of each batch, so they depend on which pairs share
# one.
CURVES = "loss eval_loss grad_norm rewards/margins rewards/chosen rewards/rejected".split()


def curves(trainer):
    """Trains; returns {metric: its values in the order of the steps}."""
    trainer.train()
    found = {}
    for name in [*CURVES, "logps/chosen"]:
        found[name] = [entry[name] for entry in trainer.state.log_history if name in entry]
    return found


def as_texts(nb, places):
    """Rows of a notebook's run as the texts that TRL tokenizes itself."""
    decode, rows = nb["tokenizer"].decode, []
    for place in places:
        row = nb["rows"][place]
        rows.append({name: decode(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")})
    return Dataset.from_list(rows)


def stock_trainer(nb, order):
    """TRL's own trainer with its own tokenization, on these rows of a notebook's run and with its
    settings.
    """
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=nb["targets"], task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=nb["load_4bit"](nb["base"], nb["dtype"], quantise=nb["load_in_4bit"]),
        args=nb["training_args"],
        train_dataset=as_texts(nb, order),
        eval_dataset=as_texts(nb, nb["held_out"]),
        processing_class=nb["tokenizer"],
        peft_config=lora,
    )
    for parameter in trainer.model.parameters():  # of a 4-bit base TRL has the adapter in bf16
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def stock_curves(nb, order):
    """The curves of `stock_trainer`."""
    return curves(stock_trainer(nb, order))
