"""What the tests of training share."""

import torch

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
    batch = trainer._prepare_inputs(
        trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    )
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    return gradients(trainer.model)
