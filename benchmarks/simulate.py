"""A training step of the 7B shape on imagined GPUs: memory of the notebook's plan, operations of each way to train.

    python benchmarks/simulate.py [--output FILE]      # needs no GPU; under four minutes on two cores

TRL's DPOTrainer, PEFT, bitsandbytes and the notebook's own cells run as they are, on tensors that have shapes and no numbers
(FakeTensorMode); only what is made of integers is real, since shapes depend on it. Counted are, in forward and backward, the
bytes of all tensors alive, operations of matrix products, kernels but for those of integers, and how often a GPU that has
work is waited for. The factors of each product are asserted to have one dtype.

What it cannot see: how fast a kernel is, what a memory allocator wastes, what kernels need inside, and what is written down
here instead of asked of CUDA: which attention PyTorch chooses, TRL's Triton kernels, and that bitsandbytes dequantises a
layer before each product (with few tokens some cards need not).
"""

import argparse
import contextlib
import json
import logging
import os
import random
import sys
import weakref
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers as hf
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from trl import DPOConfig, DPOTrainer

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "tests")]
from speed import SHAPES, draw_lengths, table  # noqa: E402

from rehearsal.notebook import alone, run_cell, run_cells  # noqa: E402

CARDS = {  # bytes of memory; those without bf16 are older than Ampere
    "T4, 16 GB": (15.8e9, torch.float16),
    "L4 or RTX 4090, 24 GB": (23.6e9, torch.bfloat16),
    "A100, 40 GB": (42.3e9, torch.bfloat16),
    "A100 or H100, 80 GB": (84.9e9, torch.bfloat16),
    "H200, 141 GB": (150.0e9, torch.bfloat16),
}
SHAPE = dict(SHAPES["cuda"], num_key_value_heads=8, sliding_window=4096)
LAYERS, HIDDEN = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]
LAYER = HIDDEN * (2.5 * HIDDEN + 3 * SHAPE["intermediate_size"])  # numbers in a layer's matrices
SAMPLED = (
    range(16),
    range(1600, 1616),
)  # two steps whose operations are counted: their pairs, in the order of training
aten, bnb = torch.ops.aten, torch.ops.bitsandbytes
fake = FakeTensorMode(allow_non_fake_inputs=True)
quantize_4bit(
    torch.zeros(64, 64), compress_statistics=True
)  # what it keeps for later has to be real


class Machine(TorchDispatchMode):
    """Computes what is made of integers alone, leaves the rest to FakeTensorMode, and counts."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak, self.busy, self.counts = {}, 0, 0, False, Counter()

    def hold(self, x):
        """Counts the storage of a tensor until nothing needs it any more."""
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512

        def release(_):
            del self.alive[key]
            self.now -= size

        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, release)
            self.now += size
            self.peak = max(self.peak, self.now)

    def launch(self, kernels=1, products=0):
        self.busy |= kernels
        self.counts.update(kernels=kernels, products=products)

    def wait(self):
        self.counts["waits"] += self.busy  # waiting for a GPU that has nothing to do costs nothing
        self.busy = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is bnb.gemm_4bit.default:
            with self:
                return self.gemm_4bit(*args, **kwargs)
        tensors = [*filter(torch.is_tensor, tree_leaves((args, kwargs)))]
        imagined = any(isinstance(x, FakeTensor) for x in tensors)
        if not tensors:
            imagined = kwargs.get("dtype", torch.int64) not in (torch.int64, torch.bool)
        masked = func is aten.index.Tensor and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if masked or func in (aten._local_scalar_dense.default, aten.nonzero.default):
            self.wait()
        if imagined and func is aten._local_scalar_dense.default and args[0].is_floating_point():
            return 1.0  # a metric for the log
        if imagined and masked:  # a mask that is known becomes places that are known
            with unset_fake_temporarily():
                places = [
                    p
                    for x in args[1]
                    for p in (x.nonzero().unbind(1) if x.dtype == torch.bool else [x])
                ]
            args = (args[0], places)
        with contextlib.nullcontext() if imagined else unset_fake_temporarily():
            out = func(*args, **kwargs)
        silent = (
            func.is_view
            or func.namespace == "prim"
            or func.__name__.startswith(("_unsafe_view", "empty"))
        )
        self.launch(imagined and not silent, self.products(func, args, kwargs, out))
        for x in filter(torch.is_tensor, tree_leaves(out)):
            self.hold(x)
        return out

    def products(self, func, args, kwargs, out):
        """The operations of a matrix product or of attention, of which a causal one never computes half; else 0."""
        count = flop_registry.get(func._overloadpacket)
        if not count:
            return 0
        named = dict(
            zip([argument.name for argument in func._schema.arguments], args, strict=False)
        )
        factors = [x for name, x in named.items() if torch.is_tensor(x) and name != "logsumexp"]
        dtypes = {x.dtype for x in factors if x.is_floating_point()}
        assert len(dtypes) == 1, (
            f"{func} of {dtypes}, which FakeTensorMode does not mind and CUDA refuses."
        )
        return count(*args, **kwargs, out_val=out) // (2 if named.get("is_causal") else 1)

    @staticmethod
    def gemm_4bit(
        x,
        packed,
        shape,
        scales,
        blocksize,
        quant_type,
        bias,
        absmax_8bit,
        absmax_code,
        absmax_offset,
    ):
        """What bitsandbytes does on CUDA with many tokens: the layer in 16 bits, then an ordinary product."""
        scales = (
            bnb.dequantize_blockwise(absmax_8bit, scales, absmax_code, 256, torch.float32)
            + absmax_offset
        )
        weight = bnb.dequantize_4bit(packed, scales, blocksize, quant_type, shape, x.dtype)
        return torch.mm(x.view(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], -1)

    def stand_ins(self, dtype):
        """What PyTorch, PEFT and TRL do where there is a GPU: name -> function."""

        def attention(
            query,
            key,
            value,
            attn_mask=None,
            dropout_p=0.0,
            is_causal=False,
            scale=None,
            enable_gqa=False,
        ):
            if attn_mask is None and dtype == torch.bfloat16:
                return aten._scaled_dot_product_flash_attention(
                    query, key, value, 0.0, is_causal, scale=scale
                )[0]
            assert not enable_gqa, "The slow kernel that keeps all scores."
            if attn_mask is not None:
                bias = query.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
                attn_mask = bias.expand(*query.shape[:3], key.shape[2])
            kept = attn_mask, torch.is_grad_enabled(), 0.0
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, *kept, is_causal, scale=scale
            )[0]

        def add_product(total, *factors):  # of 16 bits, added to float32 in place
            self.launch(1, self.products(aten.mm.default, factors, {}, total))

        return {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.get_device_capability": lambda *_: (
                (7, 5) if dtype == torch.float16 else (8, 0)
            ),
            # As the notebook has it before Ampere.
            "transformers.integrations.sdpa_attention.use_gqa_in_sdpa": lambda *_: (
                dtype != torch.float16
            ),
            "torch.nn.functional.scaled_dot_product_attention": attention,
            # PEFT asks for that of CUDA; autocast itself asks, with a name, what to go back to.
            "torch.is_autocast_enabled": lambda *kind, plain=torch.is_autocast_enabled: (
                not kind or plain(*kind)
            ),
            "torch.Tensor.cpu": lambda x: self.wait() or x,
            "trl.trainer.utils._use_triton": lambda device: True,
            "trl.kernels.chunked_logprob._forward_tile": lambda *_, **__: (
                self.launch()
            ),  # Triton's, in place
            "trl.kernels.chunked_logprob._backward_tile": lambda *_, **__: self.launch(),
            "trl.kernels.chunked_logprob._addmm_fp32": add_product,
        }


def make_trainer(config, dtype, checkpointing):
    """TRL's trainer for a model in NF4, with the adapter, its gradients and AdamW's moments in float32."""
    nf4 = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    settings = dict(
        max_length=None, bf16=False, use_cpu=True, report_to="none", output_dir="."
    )  # nothing is written
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    model = hf.integrations.replace_with_bnb_linear(model, ["lm_head"], nf4)
    model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**settings, gradient_checkpointing=checkpointing),
        train_dataset=Dataset.from_list([dict(prompt="a", chosen="a", rejected="a")]),
        processing_class=hf.ByT5Tokenizer(),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    for module in trainer.model.train().modules():
        for name, old in [*module.named_parameters(recurse=False)]:
            weight = torch.zeros(old.shape, dtype=torch.float32 if old.requires_grad else dtype)
            if isinstance(module, Linear4bit):
                weight, module.quant_state = quantize_4bit(
                    weight, compress_statistics=True, quant_type="nf4"
                )
                module.support_avx512bf16_for_cpu = False
            module._parameters[name] = new = torch.nn.Parameter(weight, old.requires_grad)
            new.quant_state = getattr(module, "quant_state", None)
            if new.requires_grad:
                new.grad, new.mean, new.square = (torch.zeros_like(new) for _ in range(3))
        module._buffers.update(
            {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in module._buffers.items()}
        )
    return trainer


def loss(trainer, lengths, dtype):
    """DPO's, of a batch of (prompt, chosen, rejected) lengths."""
    ids = [
        dict(prompt_ids=[1] * p, chosen_ids=[2] * c, rejected_ids=[3] * r) for p, c, r in lengths
    ]
    with torch.autocast("cpu", dtype=dtype):
        return trainer.compute_loss(trainer.model, trainer.data_collator(ids))


def simulate(batches, layers, dtype, again=None, share=True):
    """The machine after forward and backward of batches. again(tokens, cells): layers to checkpoint, None for never any."""
    machine, config = Machine(), hf.MistralConfig(**SHAPE | dict(num_hidden_layers=layers))
    with fake, machine:
        trainer = make_trainer(config, dtype, checkpointing=bool(again))
    machine.peak, machine.counts = machine.now, Counter()
    with fake, machine, contextlib.ExitStack() as stack:
        for stand_in in machine.stand_ins(dtype).items():
            stack.enter_context(mock.patch(*stand_in))
        model = trainer.model.get_base_model()
        if share:
            alone("run-prompts-once")["run_prompts_once"](model, again)
        elif again:
            for layer in model.model.layers[again(0, 0) :]:
                layer.gradient_checkpointing = False
        for lengths in batches:
            loss(trainer, lengths, dtype).backward()
    return machine


def least(pairs):
    """Operations that DPO cannot do without: each distinct token once, forward, backward and in the reference's forward."""
    prompt, *answers = np.transpose(pairs)
    linear = (
        2 * LAYER * (prompt + sum(answers) - 1)
    )  # in each of three passes, since weights get no gradients
    cells = prompt**2 / 2 + sum(answer * (prompt + answer / 2) for answer in answers)
    attention = 4 * cells * HIDDEN * (1 + 2.5 + 1)  # backward: five products for two
    head = 2 * SHAPE["vocab_size"] * HIDDEN * sum(answers)  # it only sees answers
    return (LAYERS * (3 * linear + attention) + 3 * head).sum()


def count(batches, dtype, again, share=True):
    """A step on average with so many layers checkpointed, from one layer, two, and two of which one is checkpointed."""
    runs = ((layers, again and (lambda *_, n=n: n)) for layers, n in ((1, 0), (2, 0), (2, 1)))
    one, two, redone = (
        simulate(batches, layers, dtype, needed, share).counts for layers, needed in runs
    )
    whole = {
        key: one[key] + (LAYERS - 1) * (two[key] - one[key]) + again * (redone[key] - two[key])
        for key in one
    }
    pairs, steps = np.concatenate(batches), sum(map(len, batches)) / 16
    counted = dict(
        operations_over_bound=whole["products"] / least(pairs),
        batches_per_step=len(batches) / steps,
    )
    return counted | {f"{key}_per_step": round(whole[key] / steps) for key in ("kernels", "waits")}


def plan_for(card):
    """The notebook's own plan on a card: its namespace after the split of a step, with `pairs` in the order of training."""
    memory, dtype = CARDS[card]
    pairs = np.array(
        [pair for pair in draw_lengths("orca", 7000, 0) if pair[0] + max(pair[1:]) <= 1536][:3200]
    )
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.MistralConfig(**SHAPE))
    linear = [x for x in model.modules() if isinstance(x, torch.nn.Linear)][:-1]  # but the head
    known = dict(
        torch=torch, random=random, config=model.config, linear=linear, skeleton=model, shares=True
    )
    nb = run_cell("skeleton", run_cell("parameters", known))
    nb |= dict(
        on_gpu=True,
        memory=memory,
        dtype=dtype,
        trained=False,
        sharded=False,
        train=range(len(pairs)),
    )
    nb |= dict(
        processes=mock.Mock(num_processes=1),
        gather_object=list,
        parameter_count=model.num_parameters(),
    )
    nb["adapter_size"] = sum(
        nb["lora_rank"] * (layer.in_features + layer.out_features) for layer in linear
    )
    nb["once"], nb["longest"] = pairs.sum(axis=1) - 1, pairs[:, 0] + pairs[:, 1:].max(axis=1)
    with contextlib.redirect_stdout(None):
        run_cells("order", "split-of-a-step", nb)
    return nb | dict(pairs=pairs[nb["order"]])


def measure_card(card):
    """The notebook's plan for a card: memory predicted and simulated, operations over the least there are."""
    nb = plan_for(card)
    split, pairs, dtype = nb["split"], nb["pairs"], nb["dtype"]
    size, tokens, again = split.pairs_at_once, split.linear_tokens, split.checkpointed_layers
    needed = partial(nb["layers_to_checkpoint"], nb["widths"], room_bytes=nb["room"])
    most = {
        int(values.argmax()) * size for values in (split.step_bytes, tokens, split.attention_tokens)
    }
    peak = simulate(
        [pairs[i : i + size] for i in most], LAYERS, dtype, needed if again.any() else None
    ).peak
    starts = [i for step in SAMPLED for i in step[::size]]
    counted = count(
        [pairs[i : i + size] for i in starts], dtype, (again * tokens).sum() / tokens.sum()
    )
    # Each pass over the weights takes as long as 130 tokens: policy, reference, backward, and what is done again.
    reading = 130 * (3 + again / LAYERS).sum() * 2 * LAYERS * LAYER / least(pairs)
    found = dict(name=card, split=f"{size} × {16 // size}", layers_checkpointed=float(again.mean()))
    found |= dict(
        predicted_gb=float(nb["needs"].max() / 1e9), simulated_gb=peak / 1e9 + 1.5
    )  # of which 1.5 is CUDA's
    return found | dict(
        with_dequantising_over_bound=float(counted["operations_over_bound"] + reading), **counted
    )


def count_stock(again):
    """What stock TRL's step comes to: four pairs at once, in random order inside the step."""
    mixed = [i for step in SAMPLED for i in random.Random(step.start).sample(step, 16)]
    pairs = plan_for("A100, 40 GB")["pairs"][mixed]
    return count(np.split(pairs, len(pairs) // 4), torch.bfloat16, again, share=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="where to write what was found, as JSON")
    arguments = parser.parse_args()
    os.environ.update(
        HF_HUB_OFFLINE="1", TQDM_DISABLE="1", PYTHONWARNINGS="ignore"
    )  # of the processes to come
    with get_context("spawn").Pool(2, logging.disable, [logging.WARNING]) as pool:
        cards, stock = (
            pool.map_async(measure_card, CARDS, 1),
            pool.map_async(count_stock, (LAYERS, 0), 1),
        )
        cards, (stock, kept) = cards.get(), stock.get()
    # The recipe of 2024 has a second model where stock TRL switches the adapter off, and computes the same.
    ways = {"recipe of 2024": stock, "stock TRL": stock, "stock TRL without checkpointing": kept}
    ways |= {f"this notebook, {card['name']}": {key: card[key] for key in stock} for card in cards}
    found = dict(cards=cards, ways=[dict(name=name, **counted) for name, counted in ways.items()])
    for rows in found.values():
        cells = [[f"{x:.3f}" if isinstance(x, float) else x for x in row.values()] for row in rows]
        print(table([name.replace("_", " ") for name in rows[0]], cells), "\n")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
