"""The simulation of GPUs: it counts what a real step does, and the tables that rest on it are those of today's notebook."""

import contextlib
import json
import re

import pytest
import torch
from benchmarks import simulate
from notebook import NOTEBOOK, ROOT, alone
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig

SDPA, HEAD = "torch.nn.functional.scaled_dot_product_attention", "trl.kernels.chunked_logprob"
HALF, BRAIN = torch.float16, torch.bfloat16
SMALL = dict(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, vocab_size=32)


class RealMachine(simulate.Machine):
    """On real tensors PEFT and TRL are still told that autocast is on and Triton there, or they would do something else."""

    def stand_ins(self, dtype):
        plain = super().stand_ins(dtype)
        told = {name: plain[name] for name in ("torch.is_autocast_enabled", "trl.trainer.utils._use_triton")}
        # The same as TRL's own, which is in place and passes PyTorch's counter unseen.
        return told | {f"{HEAD}._addmm_fp32": lambda out, a, b: out.add_(a.float() @ b.float())}


@pytest.mark.parametrize("checkpointed", [None, 1, 3])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "stock"])
def test_a_real_step_and_an_imagined_one(share, checkpointed, monkeypatch):
    """The operations to the last one, by PyTorch's own counter on real tensors, and the bytes to a hundredth."""
    monkeypatch.setattr(simulate, "SHAPE", simulate.SHAPE | SMALL)
    step = [[(20, 30, 30)] * 2], 3, BRAIN, checkpointed and (lambda *_: checkpointed), share
    imagined, counter = simulate.simulate(*step), FlopCounterMode(display=False)
    monkeypatch.setattr(simulate, "fake", counter)
    monkeypatch.setattr(simulate, "Machine", RealMachine)
    real = simulate.simulate(*step)
    # The counter does not know attention's kernel on a CPU: two products forward and five backward, half of each masked.
    attention = 4 * 2 * 50**2 * SMALL["hidden_size"] * (3 * (1 + 2.5 + 1) + (checkpointed or 0))
    assert imagined.counts["products"] == counter.get_total_flops() + attention
    assert real.counts["products"] == counter.get_total_flops()
    assert imagined.peak == pytest.approx(real.peak, rel=0.01)


@pytest.mark.parametrize("checkpointed", [0, 1, 4])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=["before Ampere", "Ampere"])
def test_the_arithmetic_of_memory(dtype, checkpointed):
    """What the notebook predicts for a batch, against all bytes alive above the weights; of the 7B's layers, four."""
    asked, batch = [], [(60, 200, 300), (150, 120, 90), (90, 250, 250)]
    runs = ([], [batch]), 4, dtype, lambda *size: asked.append(size) or checkpointed
    weights, alive = (simulate.simulate(batches, *runs[1:]).peak for batches in runs[0])
    config, kind = MistralConfig(**simulate.SHAPE | dict(num_hidden_layers=4)), dict(grouped=dtype != HALF)
    predicted = alone("memory")["step_memory"](config, *asked[0], checkpointed, **kind)
    print("XX",dtype, checkpointed, predicted / (alive - weights), asked)


def test_dtypes_that_differ_are_refused(monkeypatch):
    """In a product, in attention, in TRL's sum of products in place, and where the adapter meets 16 bits: no autocast."""
    machine = simulate.Machine()
    with simulate.fake, machine:
        half, single = (torch.ones(1, 1, 8, 8, dtype=dtype) for dtype in (BRAIN, torch.float32))
    attend, add = (machine.stand_ins(BRAIN)[name] for name in (SDPA, f"{HEAD}._addmm_fp32"))
    monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())
    products = {
        "mm": lambda: half[0, 0] @ single[0, 0],
        "attention": lambda: attend(half, half, single),
        "in place": lambda: add(single[0, 0], half[0, 0], single[0, 0]),
        "step": lambda: simulate.simulate([[(3, 4, 5)]], 1, BRAIN),
    }
    for product in products.values():
        with pytest.raises(AssertionError, match="CUDA refuses"), simulate.fake, machine:
            product()
