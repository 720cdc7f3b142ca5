"""A training step of the 7B shape on imagined GPUs: memory of the notebook's plan, operations of each way to train.

    python benchmarks/simulate.py [--output FILE]      # needs no GPU; under four minutes on two cores

TRL's DPOTrainer, PEFT, bitsandbytes and the notebook's own cells run as they are, on tensors that have shapes and no numbers
(FakeTensorMode); only token ids, labels and masks are real, since shapes depend on them. Counted are the bytes of all
tensors alive, the operations of every matrix product, the kernels (those of integers alone aside), and the moments at which
a GPU that has work is waited for, of forward and backward. Asserted is that the factors of each product have one dtype.

What it cannot see: how fast a kernel is, what a memory allocator wastes, what kernels need inside, and whether CUDA has them
as they are written down here: which attention PyTorch chooses, TRL's Triton kernels, and that bitsandbytes dequantises
a layer before each product (with few tokens some cards need not).
"""

import argparse
import contextlib
import json
import logging
import os
import random
import sys
import tempfile
import types
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
from tokenizers import Tokenizer, models
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from trl import DPOConfig, DPOTrainer

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from notebook import alone, run_cell, run_cells  # noqa: E402
from speed import SHAPES, draw_lengths, table  # noqa: E402

CARDS = {  # bytes of memory, compute capability
    "T4, 16 GB": (15.8e9, (7, 5)),
    "L4 or RTX 4090, 24 GB": (23.6e9, (8, 9)),
    "A100, 40 GB": (42.3e9, (8, 0)),
    "A100 or H100, 80 GB": (84.9e9, (8, 0)),
    "H200, 141 GB": (150.0e9, (9, 0)),
}
SHAPE = dict(SHAPES["cuda"], num_key_value_heads=8, sliding_window=4096)
LAYERS, HIDDEN = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]
LAYER = HIDDEN * (2.5 * HIDDEN + 3 * SHAPE["intermediate_size"])  # numbers in a layer's matrices
PER_STEP, SAMPLED = 16, (0, 100)  # pairs of a step; the steps of the run whose operations are counted
aten, bnb = torch.ops.aten, torch.ops.bitsandbytes
fake = FakeTensorMode(allow_non_fake_inputs=True)
quantize_4bit(torch.zeros(64, 64), compress_statistics=True)  # what it keeps for later has to be real


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

    def wait(self):
        """The CPU waits for the GPU. If that has nothing to do, it costs nothing."""
        self.counts["waits"] += self.busy
        self.busy = False

    def launch(self, kernels=1, products=0):
        self.busy = True
        self.counts.update(kernels=kernels, products=products)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        imagined = any(isinstance(x, FakeTensor) for x in tensors)
        if not tensors:
            imagined = kwargs.get("dtype", torch.int64) not in (torch.int64, torch.bool)
        masked = func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        if masked or func in (aten._local_scalar_dense.default, aten.nonzero.default):
            self.wait()
        if func is bnb.gemm_4bit.default:
            with self:
                return self.gemm_4bit(*args, **kwargs)
        if imagined and func is aten._local_scalar_dense.default and args[0].is_floating_point():
            return 1.0  # a metric for the log
        if imagined and masked:  # a mask that is known becomes places that are known
            with unset_fake_temporarily():
                places = [p for x in args[1] for p in (x.nonzero().unbind(1) if x.dtype == torch.bool else [x])]
            args = (args[0], places)
        with contextlib.nullcontext() if imagined else unset_fake_temporarily():
            out = func(*args, **kwargs)
        silent = func.is_view or func.namespace == "prim" or func.__name__.startswith(("_unsafe_view", "empty"))
        if imagined and not silent:
            self.launch()
        self.counts["products"] += self.products(func, args, kwargs, out)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.hold(x)
        return out

    def products(self, func, args, kwargs, out):
        """The operations of a matrix product or of attention, of which a causal one never computes half; else 0."""
        count = flop_registry.get(func._overloadpacket)
        if not count:
            return 0
        named = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False))
        factors = [x for name, x in named.items() if isinstance(x, torch.Tensor) and name != "logsumexp"]
        dtypes = {x.dtype for x in factors if x.is_floating_point()}
        assert len(dtypes) == 1, f"{func} of {dtypes}, which FakeTensorMode does not mind and CUDA refuses."
        return count(*args, **kwargs, out_val=out) // (2 if named.get("is_causal") else 1)

    @staticmethod
    def gemm_4bit(x, packed, shape, scales, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset):
        """What bitsandbytes does on CUDA with many tokens: the layer in 16 bits, then an ordinary product."""
        scales = bnb.dequantize_blockwise(absmax_8bit, scales, absmax_code, 256, torch.float32) + absmax_offset
        weight = bnb.dequantize_4bit(packed, scales, blocksize, quant_type, shape, x.dtype)
        return torch.mm(x.view(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], -1)

    @contextlib.contextmanager
    def running(self, capability):
        """Inside, PyTorch seems to have a GPU of this capability, TRL seems to have Triton, and autocast is on."""

        def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            if attn_mask is None and capability >= (8, 0):
                return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
            assert not enable_gqa, "The slow kernel that keeps all scores."
            if attn_mask is not None:
                bias = query.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
                attn_mask = bias.expand(*query.shape[:3], key.shape[2])
            kept = attn_mask, torch.is_grad_enabled(), 0.0
            return aten._scaled_dot_product_efficient_attention(query, key, value, *kept, is_causal, scale=scale)[0]

        def add_product(total, *factors):  # of 16 bits, added to float32 in place
            self.launch(products=self.products(aten.mm.default, factors, {}, total))

        patches = {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.get_device_capability": lambda *_: capability,
            "torch.nn.functional.scaled_dot_product_attention": attention,
            "torch.is_autocast_enabled": lambda *_: True,  # PEFT asks for CUDA's
            "torch.Tensor.cpu": lambda x: self.wait() or x,
            "trl.trainer.utils._use_triton": lambda device: True,
            "trl.kernels.chunked_logprob._forward_tile": lambda *_, **__: self.launch(),  # Triton's, in place
            "trl.kernels.chunked_logprob._backward_tile": lambda *_, **__: self.launch(),
            "trl.kernels.chunked_logprob._addmm_fp32": add_product,
        }
        with contextlib.ExitStack() as stack:
            for name, stand_in in patches.items():
                stack.enter_context(mock.patch(name, stand_in))
            stack.enter_context(fake)
            stack.enter_context(self)
            yield


def make_trainer(config, dtype, checkpointing):
    """TRL's trainer for a 4-bit model of this shape, on the meta device."""
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    nf4 = hf.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    model = replace_with_bnb_linear(model, ["lm_head"], nf4)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method, model.hf_quantizer = "bitsandbytes", Bnb4BitHfQuantizer(nf4)
    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    kept = dict(output_dir=tempfile.mkdtemp(), max_length=None, report_to="none", gradient_checkpointing=checkpointing)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**kept, bf16=False, use_cpu=True),
        train_dataset=Dataset.from_list([dict(prompt="a", chosen="a", rejected="a")]),
        processing_class=hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>"),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer.model.train()
    return trainer


def materialise(model, dtype):
    """Gives a model its tensors: linear layers in NF4, the adapter, its gradients and AdamW's moments in float32."""
    for module in model.modules():
        for name, old in [*module.named_parameters(recurse=False)]:
            if isinstance(module, Linear4bit):
                weight = torch.zeros(old.shape, dtype=dtype)
                weight, module.quant_state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
                module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
                module.weight.quant_state, module.support_avx512bf16_for_cpu = module.quant_state, False
            else:
                weight = torch.zeros(old.shape, dtype=torch.float32 if old.requires_grad else dtype)
                module._parameters[name] = torch.nn.Parameter(weight, old.requires_grad)
        module._buffers.update({name: torch.zeros(x.shape, dtype=x.dtype) for name, x in module._buffers.items()})
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad, weight.mean, weight.square = (torch.zeros_like(weight) for _ in range(3))


def loss(trainer, lengths, dtype):
    """DPO's, of a batch of (prompt, chosen, rejected) lengths."""
    ids = [dict(prompt_ids=[1] * p, chosen_ids=[2] * c, rejected_ids=[3] * r) for p, c, r in lengths]
    with torch.autocast("cpu", dtype=dtype):
        return trainer.compute_loss(trainer.model, trainer.data_collator(ids))


def precision(capability):
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def simulate(batches, layers, capability, again=None, share=True):
    """The machine after forward and backward of batches. again(tokens, cells): layers to checkpoint, None for never any."""
    machine, dtype = Machine(), precision(capability)
    trainer = make_trainer(hf.MistralConfig(**dict(SHAPE, num_hidden_layers=layers)), dtype, again is not None)
    with fake, machine:
        materialise(trainer.model, dtype)
    machine.peak, machine.counts = machine.now, Counter()
    with machine.running(capability):
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
    """Operations that DPO cannot do without: each distinct token once, forward and backward, and the reference's forward.

    Backward passes through frozen weights, so each pass costs as much as the forward one. The head only sees answers.
    """
    total = 0
    for prompt, *answers in pairs:
        tokens = prompt + sum(answers) - 1
        cells = prompt**2 / 2 + sum(answer * (prompt + answer / 2) for answer in answers)
        attention = 4 * cells * HIDDEN * (1 + 2.5 + 1)  # backward: five products for two
        total += LAYERS * (3 * 2 * LAYER * tokens + attention) + 3 * 2 * SHAPE["vocab_size"] * HIDDEN * sum(answers)
    return total


def count(batches, capability, again, share=True):
    """What steps come to on average with so many layers checkpointed, from one layer, two, and two with one checkpointed."""
    found = []
    for layers, checkpointed in ((1, 0), (2, 0), (2, 1)):
        needed = (lambda *_, n=checkpointed: n) if again else None
        found.append(simulate(batches, layers, capability, needed, share).counts)
    one, two, redone = found
    whole = {key: one[key] + (LAYERS - 1) * (two[key] - one[key]) + again * (redone[key] - two[key]) for key in one}
    steps = sum(map(len, batches)) / PER_STEP
    counted = dict(operations_over_bound=whole["products"] / least(pair for batch in batches for pair in batch))
    counted |= dict(batches_per_step=len(batches) / steps)
    return counted | {f"{key}_per_step": round(whole[key] / steps) for key in ("kernels", "waits")}


def plan_for(card):
    """The notebook's own plan on a card: its namespace after the split of a step, with `pairs` in the order of training."""
    memory, capability = CARDS[card]
    pairs = [pair for pair in draw_lengths("orca", 7000, 0) if pair[0] + max(pair[1:]) <= 1536][:3200]
    pairs = np.array(pairs)
    with torch.device("meta"):
        skeleton = hf.AutoModelForCausalLM.from_config(hf.MistralConfig(**SHAPE))
    linear = [x for x in skeleton.modules() if isinstance(x, torch.nn.Linear)][:-1]  # but the head
    nb = run_cell("parameters", dict(torch=torch, random=random, config=skeleton.config, linear=linear))
    nb |= dict(on_gpu=True, memory=memory, dtype=precision(capability), trained=False, sharded=False)
    nb |= dict(processes=types.SimpleNamespace(num_processes=1), gather_object=list, train=range(len(pairs)))
    nb["parameter_count"] = skeleton.num_parameters()
    nb["adapter_size"] = sum(nb["lora_rank"] * (layer.in_features + layer.out_features) for layer in linear)
    nb["once"], nb["longest"] = pairs.sum(axis=1) - 1, pairs[:, 0] + pairs[:, 1:].max(axis=1)
    with contextlib.redirect_stdout(None):
        run_cells("order", "split-of-a-step", nb)
    return nb | dict(pairs=pairs[nb["order"]])


def measure_card(card):
    """The notebook's plan for a card: memory predicted and simulated, operations over the least there are."""
    memory, capability = CARDS[card]
    nb = plan_for(card)
    size, (tokens, cells, again), pairs = nb["at_once"], nb["batches"], nb["pairs"]
    needed = partial(nb["layers_to_checkpoint"], nb["config"], room=nb["budget"] - nb["fixed"], **nb["kind"])
    most = {int(values.argmax()) * size for values in (nb["needs"], tokens, cells)}
    peak = simulate([pairs[i : i + size] for i in most], LAYERS, capability, needed if again.any() else None).peak
    starts = [i for step in SAMPLED for i in range(step * PER_STEP, (step + 1) * PER_STEP, size)]
    counted = count([pairs[i : i + size] for i in starts], capability, (again * tokens).sum() / tokens.sum())
    # Each pass over the weights takes as long as 130 tokens: policy, reference, backward, and what is done again.
    reading = 130 * (3 + again / LAYERS).sum() * 2 * LAYERS * LAYER / least(pairs)
    return dict(
        name=card,
        split=f"{size} × {PER_STEP // size}",
        layers_checkpointed=float(again.mean()),
        predicted_gb=float(nb["needs"].max() / 1e9),
        simulated_gb=peak / 1e9 + 1.5,  # CUDA's own
        with_dequantising_over_bound=float(counted["operations_over_bound"] + reading),
        **counted,
    )


def count_stock(again):
    """What stock TRL's step comes to: four pairs at once, in random order inside the step."""
    pairs, batches = plan_for("A100, 40 GB")["pairs"], []
    for step in SAMPLED:
        mixed = random.Random(step).sample(pairs[step * PER_STEP : (step + 1) * PER_STEP].tolist(), PER_STEP)
        batches += [mixed[i : i + 4] for i in range(0, PER_STEP, 4)]
    return count(batches, (8, 0), again, share=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="where to write what was found, as JSON")
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", PYTHONWARNINGS="ignore")  # of the processes to come
    with get_context("spawn").Pool(2, logging.disable, [logging.WARNING]) as pool:
        cards = pool.map_async(measure_card, CARDS, 1)
        stock, kept = pool.map(count_stock, (LAYERS, 0), 1)
        cards = cards.get()
    # The recipe of 2024 has a second model where stock TRL switches the adapter off, and computes the same.
    ways = {"recipe of 2024": stock, "stock TRL": stock, "stock TRL without checkpointing": kept}
    ways |= {f"this notebook, {card['name']}": {key: card[key] for key in stock} for card in cards}
    found = dict(cards=cards, ways=[dict(name=name, **counted) for name, counted in ways.items()])
    for rows in found.values():
        cells = [[f"{x:.3f}" if isinstance(x, float) else x for x in row.values()] for row in rows]
        print(table([name.replace("_", " ") for name in rows[0]], cells), "\n")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
