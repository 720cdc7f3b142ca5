"""Batches of pairs as DPOTrainer makes them, for tests that call a model with them."""

import random

from trl.trainer.dpo_trainer import DataCollatorForPreference

# Lengths of prompt, chosen and rejected: alike, far apart, answers of one token, a prompt of one,
# and one that is longer than windows.
SHAPES = [(6, 5, 5), (3, 1, 1), (1, 12, 1), (9, 1, 14), (25, 4, 7), (2, 9, 3)]
NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")


def pairs(shapes):
    """Pairs of random tokens of these lengths."""
    rng = random.Random(0)
    found = []
    for shape in shapes:
        lengths = dict(zip(NAMES, shape, strict=True))
        found.append(
            {name: rng.choices(range(3, 64), k=length) for name, length in lengths.items()}
        )
    return found


def collated(shapes):
    """A batch of DPOTrainer's collator."""
    return DataCollatorForPreference(pad_token_id=0)(pairs(shapes))


def inputs(shapes=SHAPES):
    """What DPOTrainer calls the model with."""
    batch = collated(shapes)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    return dict(batch, labels=labels, fused_lm_head=True, use_cache=False)


def distinct_tokens(shapes):
    """How many tokens of a batch have to be computed: an answer's last one predicts nothing."""
    return sum(prompt + chosen + rejected - 1 for prompt, chosen, rejected in shapes)
