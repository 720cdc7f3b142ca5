"""A training step of the 7B shape on imagined GPUs: memory, and operations of each way to train.

    python benchmarks/simulate.py [--output FILE]    # needs no GPU; five minutes on two cores

TRL's DPOTrainer, PEFT, bitsandbytes and the notebook's own cells run as they are, on tensors that
have shapes and no numbers (FakeTensorMode); only what is made of integers is real, since shapes
depend on it. Counted are, in forward and backward, the bytes of all tensors alive, operations of
matrix products, kernels but for those of integers, and how often a GPU that has work is waited
for. The factors of each product are asserted to have one dtype. Beside a step of the default run,
in which each pair is seen once, a whole run on a small set is counted, in which pairs come back.

What it cannot see: how fast a kernel is, what a memory allocator wastes, what kernels need
inside, and what is written down here instead of asked of CUDA: which attention PyTorch chooses,
TRL's Triton kernels, and that bitsandbytes dequantises a layer before each product (with few
tokens some cards need not).
"""

import argparse
import contextlib
import json
import logging
import os
import random
import sys
import tempfile
import weakref
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.speed import SHAPES, draw_lengths, table  # noqa: E402
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
STEPS, PAIRS_PER_STEP = 200, 16
# Two steps whose operations are counted, of the first epoch: their pairs, in the order of training.
SAMPLED = range(16), range(1600, 1616)
SMALL_SET = 500  # pairs, all trained on: 6.4 epochs
SAMPLED_OF_SMALL_SET = range(16), range(240, 256)
STOCK_BATCH = 4
USUAL_CARD = "A100, 40 GB"  # for what is about the same on all cards
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
        """The operations of a matrix product or of attention, of which a causal one never computes
        half; else 0.
        """
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
        """What bitsandbytes does on CUDA with many tokens: the layer in 16 bits, then an ordinary
        product.
        """
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
            # As transformers has it, and the notebook before Ampere.
            "transformers.integrations.sdpa_attention.use_gqa_in_sdpa": lambda mask, *_: (
                mask is None and dtype != torch.float16
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
    """TRL's trainer for a model in NF4, with the adapter, its gradients and AdamW's moments in
    float32.
    """
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
    """DPO's, of a batch of (prompt, chosen, rejected) lengths. Pairs of the same lengths are the
    same pair.
    """
    rows = []
    for prompt, chosen, rejected in lengths:
        row = dict(prompt_ids=[1] * prompt, chosen_ids=[2] * chosen, rejected_ids=[3] * rejected)
        rows.append(row)
    with torch.autocast("cpu", dtype=dtype):
        return trainer.compute_loss(trainer.model, trainer.data_collator(rows))


def simulate(batches, layers, dtype, layers_to_checkpoint=None, share=True, remember=False):
    """The machine after forward and backward of batches, by a model of so many layers.

    layers_to_checkpoint: of (tokens, tokens of attention), as the notebook has it; None for never
    any.
    share: prompts are run once. remember: the reference of a pair is computed when it is first
    met, before the policy; else each time, beside the policy's activations, as under FSDP.
    """
    machine = Machine()
    config = hf.MistralConfig(**{**SHAPE, "num_hidden_layers": layers})
    with fake, machine:
        trainer = make_trainer(config, dtype, checkpointing=bool(layers_to_checkpoint))
    machine.peak, machine.counts = machine.now, Counter()
    with fake, machine, contextlib.ExitStack() as stack:
        for stand_in in machine.stand_ins(dtype).items():
            stack.enter_context(mock.patch(*stand_in))
        model = trainer.model.get_base_model()
        if share:
            alone("run-prompts-once")["run_prompts_once"](model, layers_to_checkpoint)
        elif layers_to_checkpoint:
            for layer in model.model.layers[layers_to_checkpoint(0, 0) :]:
                layer.gradient_checkpointing = False
        if remember:
            alone("remember-reference")["remember_reference"](trainer)
        for lengths in batches:
            loss(trainer, lengths, dtype).backward()
    return machine


def forward_operations(pairs):
    """(of the layers' products, of attention, of the head): the operations of one forward pass in
    which each distinct token of each pair is computed once, attention as it is masked, the head
    for the answers alone.
    """
    prompt, chosen, rejected = np.transpose(pairs)
    linear = LAYERS * 2 * LAYER * (prompt + chosen + rejected - 1)
    token_pairs = prompt**2 / 2
    for answer in (chosen, rejected):
        token_pairs = token_pairs + answer * (prompt + answer / 2)
    attention = LAYERS * 4 * token_pairs * HIDDEN
    head = 2 * SHAPE["vocab_size"] * HIDDEN * (chosen + rejected)
    return linear.sum(), attention.sum(), head.sum()


def least_of_policy(pairs):
    """Operations that forward and backward of pairs cannot do without: weights that are frozen get
    no gradients.
    """
    linear, attention, head = forward_operations(pairs)
    return 2 * linear + 3.5 * attention + 2 * head  # attention's backward: five products for two


def least_of_reference(pairs):
    """Operations that the reference of pairs cannot do without."""
    return sum(forward_operations(pairs))


def least(pairs):
    """Operations that a DPO step cannot do without, on pairs that are met for the first time."""
    return least_of_policy(pairs) + least_of_reference(pairs)


def whole_counts(batches, dtype, checkpointed, **how):
    """The counts of a model of all layers, of which so many are checkpointed on average: from
    models of one layer, of two, and of two of which one is checkpointed. how: as in `simulate`.
    """

    def count_with(layers, layers_to_checkpoint):
        if not checkpointed:
            return simulate(batches, layers, dtype, None, **how).counts
        return simulate(batches, layers, dtype, lambda *_: layers_to_checkpoint, **how).counts

    one, two, redone = count_with(1, 0), count_with(2, 0), count_with(2, 1)
    whole = {}
    for name in one:
        of_a_layer = two[name] - one[name]
        again = redone[name] - two[name]
        whole[name] = one[name] + (LAYERS - 1) * of_a_layer + checkpointed * again
    return whole


def count(batches, dtype, checkpointed, **how):
    """A step on average, on pairs met for the first time. Arguments as in `whole_counts`."""
    pairs = np.concatenate(batches)
    assert len(np.unique(pairs, axis=0)) == len(pairs)  # or some would be remembered
    steps = len(pairs) / PAIRS_PER_STEP
    whole = whole_counts(batches, dtype, checkpointed, **how)
    return dict(
        operations_over_bound=float(whole["products"] / least(pairs)),
        batches_per_step=len(batches) / steps,
        kernels_per_step=round(whole["kernels"] / steps),
        waits_per_step=round(whole["waits"] / steps),
    )


def default_lengths():
    """Lengths of the pairs of a default run, each seen once, none longer than its max_length."""
    drawn = draw_lengths("orca", 7000, 0)
    fitting = [pair for pair in drawn if pair[0] + max(pair[1:]) <= 1536]
    return np.array(fitting[: STEPS * PAIRS_PER_STEP])


def plan_for(card, lengths=None):
    """The notebook's own plan of its default run on a card: its namespace after the split of a
    step, with `pairs` in the order of training.

    lengths: (prompt, chosen, rejected) tokens of each pair that is trained on, by default
    `default_lengths`.
    """
    lengths = default_lengths() if lengths is None else lengths
    nb = run_cell("parameters", {})
    memory, dtype = CARDS[card]
    nb.update(on_gpu=True, memory=memory, dtype=dtype, sharded=False, trained=False, merged=True)
    nb.update(
        run=mock.Mock(),
        processes=SimpleNamespace(num_processes=1),
        gather_object=list,
        rows=[dict(prompt_ids=[1])],
        tokenizer=SimpleNamespace(pad_token_id=0),
        train=range(len(lengths)),
        lengths=pd.DataFrame(
            dict(shared=lengths.sum(axis=1) - 1, longest=lengths[:, 0] + lengths[:, 1:].max(axis=1))
        ),
    )
    unchanged = (
        "transformers.integrations.sdpa_attention.use_gqa_in_sdpa"  # before Ampere it is not
    )
    with tempfile.TemporaryDirectory() as folder, mock.patch(unchanged):
        hf.MistralConfig(**SHAPE).save_pretrained(folder)
        nb.update(base=folder, base_commit=None)
        with contextlib.redirect_stdout(None):
            run_cells("base", "split-of-a-step", nb)
    nb["pairs"] = lengths[nb["order"]]
    return nb


def batches_of_notebook(nb, sampled):
    """The batches of steps that the notebook trains on as it planned. sampled: the places of each
    step's pairs.
    """
    size, batches = nb["split"].pairs_at_once, []
    for step in sampled:
        batches += [nb["pairs"][start : start + size] for start in step[::size]]
    return batches


def batches_of_stock(nb, sampled):
    """Those of stock TRL on the same pairs: in random order inside a step."""
    batches = []
    for step in sampled:
        mixed = random.Random(step.start).sample(step, len(step))
        batches += np.split(nb["pairs"][mixed], len(step) // STOCK_BATCH)
    return batches


def mean_checkpointed(split):
    """Layers that are computed again for a token, on average."""
    tokens = split.linear_tokens
    return (split.checkpointed_layers * tokens).sum() / tokens.sum()


def peak_bytes(nb):
    """What a model of all layers takes at the most, of the batches that are the largest in one way
    or another.
    """
    split, pairs, size = nb["split"], nb["pairs"], nb["split"].pairs_at_once
    layers_to_checkpoint = None
    if split.checkpointed_layers.any():
        layers_to_checkpoint = partial(
            nb["layers_to_checkpoint"], nb["widths"], room_bytes=nb["room_bytes"]
        )
    measures = split.step_bytes, split.linear_tokens, split.attention_tokens
    starts = {size * int(values.argmax()) for values in measures}
    largest = [pairs[start : start + size] for start in starts]
    return simulate(largest, LAYERS, nb["dtype"], layers_to_checkpoint).peak


def measure_card(card):
    """The notebook's plan for a card: memory predicted and simulated, operations over the least
    there are.
    """
    nb = plan_for(card)
    split, pairs = nb["split"], nb["pairs"]
    counted = count(batches_of_notebook(nb, SAMPLED), nb["dtype"], mean_checkpointed(split))
    # Each pass over the weights takes as long as 130 tokens: policy, reference, backward, what is
    # done again.
    passes = 3 + split.checkpointed_layers / LAYERS
    dequantising = nb["TOKENS_PER_READING"] * passes.sum() * 2 * LAYERS * LAYER / least(pairs)
    cuda_bytes = 1.5e9  # CUDA's own
    return dict(
        name=card,
        split=f"{split.pairs_at_once} × {PAIRS_PER_STEP // split.pairs_at_once}",
        layers_checkpointed=float(split.checkpointed_layers.mean()),
        predicted_gb=float((nb["fixed_bytes"] + split.most_bytes) / 1e9),
        simulated_gb=(peak_bytes(nb) + cuda_bytes) / 1e9,
        with_dequantising_over_bound=float(counted["operations_over_bound"] + dequantising),
        **counted,
    )


def count_stock(checkpointed):
    """A step of stock TRL."""
    batches = batches_of_stock(plan_for(USUAL_CARD), SAMPLED)
    return count(batches, torch.bfloat16, checkpointed, share=False)


def count_small_set(share):
    """Operations of a whole run on a small set over the least, which has each reference once: where
    the reference is computed each time that a pair is seen, and where once.

    All pairs are trained on; evaluations are left out. share: by the notebook, else by stock TRL.
    """
    lengths = default_lengths()[:SMALL_SET]
    nb = plan_for(USUAL_CARD, lengths)
    if share:
        batches = batches_of_notebook(nb, SAMPLED_OF_SMALL_SET)
        checkpointed = mean_checkpointed(nb["split"])
    else:
        batches, checkpointed = batches_of_stock(nb, SAMPLED_OF_SMALL_SET), LAYERS
    how = dict(dtype=torch.bfloat16, checkpointed=checkpointed, share=share)
    # Met for the first time, and once more: what differs is the reference.
    first = whole_counts(batches, remember=True, **how)["products"]
    both = whole_counts(batches + batches, remember=True, **how)["products"]
    policy = both - first
    reference = first - policy
    sampled = np.concatenate(batches)
    policy_over_bound = policy / least_of_policy(sampled)
    reference_over_bound = reference / least_of_reference(sampled)
    # Of the whole run.
    seen, met = nb["pairs"], lengths[sorted(set(nb["order"]))]
    of_policy = policy_over_bound * least_of_policy(seen)
    each_time = of_policy + reference_over_bound * least_of_reference(seen)
    once = of_policy + reference_over_bound * least_of_reference(met)
    bound = least_of_policy(seen) + least_of_reference(met)
    return float(each_time / bound), float(once / bound)


def measure():
    """All that is simulated, by two processes."""
    with get_context("spawn").Pool(2, logging.disable, [logging.WARNING]) as pool:
        cards = pool.map_async(measure_card, CARDS, 1)
        stock = pool.map_async(count_stock, (LAYERS, 0), 1)
        small_set = pool.map_async(count_small_set, (False, True), 1)
        cards, (checkpointed, kept) = cards.get(), stock.get()
        (stock_each_time, stock_once), (_, notebook_once) = small_set.get()
    ways = [
        # The recipe has a second model where stock TRL switches the adapter off.
        dict(name="recipe of 2024", **checkpointed),
        dict(name="stock TRL", **checkpointed),
        dict(name="stock TRL without checkpointing", **kept),
    ]
    for card in cards:
        counted = {name: card[name] for name in kept}
        ways.append(dict(name=f"this notebook, {card['name']}", **counted))
    small_set = dict(
        stock=stock_each_time,
        stock_precomputed=stock_once,  # TRL's precompute_ref_log_probs computes the same batches
        notebook=notebook_once,
    )
    return dict(cards=cards, ways=ways, small_set=small_set)


def as_text(value):
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def report(found):
    """The Markdown tables of what was simulated."""
    tables = []
    for rows in (found["cards"], found["ways"]):
        header = [name.replace("_", " ") for name in rows[0]]
        tables.append(table(header, [[*map(as_text, row.values())] for row in rows]))
    rows = [[way.replace("_", " "), as_text(value)] for way, value in found["small_set"].items()]
    tables.append(table(["a whole run on a small set", "operations over bound"], rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="where to write what was found, as JSON")
    arguments = parser.parse_args()
    # For the processes to come.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", PYTHONWARNINGS="ignore")
    found = measure()
    print(report(found))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
