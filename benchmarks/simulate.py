"""A training step of the 7B shape on imagined GPUs: memory of the notebook's plan, operations of each way to train.

    python benchmarks/simulate.py [--output FILE]      # needs no GPU; under four minutes on two cores

TRL's DPOTrainer, PEFT, the 4-bit layers and the notebook's own cells run as they are, on tensors that have shapes and no
numbers (FakeTensorMode); only token ids, labels and masks are real, since shapes depend on them. Counted are the bytes of
all tensors alive, the operations of every matrix product, the kernels, and the moments at which a GPU is waited for. Not
run are CUDA's own kernels: which attention PyTorch would choose is written down here, and so is what bitsandbytes
allocates to dequantise a layer. Nothing here says how fast a kernel is, or what a memory allocator wastes.
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
from pathlib import Path
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", PYTHONWARNINGS="ignore")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
logging.disable(logging.WARNING)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers as hf  # noqa: E402
from bitsandbytes.functional import QuantState  # noqa: E402
from bitsandbytes.nn import Linear4bit  # noqa: E402
from datasets import Dataset  # noqa: E402
from notebook import alone, run_cell  # noqa: E402
from peft import LoraConfig  # noqa: E402
from speed import SHAPES, draw_lengths, table  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # noqa: E402
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

CARDS = {  # bytes of memory, compute capability
    "T4, 16 GB": (15.8e9, (7, 5)),
    "L4 or RTX 4090, 24 GB": (23.6e9, (8, 9)),
    "A100, 40 GB": (42.3e9, (8, 0)),
    "A100 or H100, 80 GB": (84.9e9, (8, 0)),
    "H200, 141 GB": (150.0e9, (9, 0)),
}
SHAPE = dict(SHAPES["cuda"], num_key_value_heads=8, sliding_window=4096)
CONFIG, LAYERS = hf.MistralConfig(**SHAPE), SHAPES["cuda"]["num_hidden_layers"]
MAX_LENGTH, PER_STEP, STEPS = 1536, 16, 200
aten, bnb = torch.ops.aten, torch.ops.bitsandbytes
fake = FakeTensorMode(allow_non_fake_inputs=True)


class Machine(TorchDispatchMode):
    """Computes what is made of integers alone, imagines the rest, and counts bytes alive, operations, kernels, waits."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak, self.operations = {}, 0, 0, Counter()

    def hold(self, x):
        """Counts the storage of a tensor until nothing needs it any more."""
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self.alive or size == 0:
            return

        def gone(_):
            del self.alive[key]
            self.now -= size

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def new(self, *size, dtype):
        x = torch.empty(*size, dtype=dtype)
        self.hold(x)
        return x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        imagined = any(isinstance(x, FakeTensor) for x in tensors)
        masked = func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.operations["waits"] += masked or func in (aten._local_scalar_dense.default, aten.nonzero.default)
        if imagined and func is aten._local_scalar_dense.default:
            return 1.0  # a metric for the log
        if not imagined and (tensors or kwargs.get("dtype", torch.int64) in (torch.int64, torch.bool)):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            if masked:  # a mask that is known becomes places that are known
                with unset_fake_temporarily():
                    places = [p for x in args[1] for p in (x.nonzero().unbind(1) if x.dtype == torch.bool else [x])]
                args = (args[0], places)
            out = self.gemm_4bit(*args, **kwargs) if func is bnb.gemm_4bit.default else func(*args, **kwargs)
            self.operations["kernels"] += not (func.is_view or func.__name__.startswith(("_unsafe_view", "empty")))
            if count := flop_registry.get(func._overloadpacket):
                factors = {x.dtype for x in tensors if x.is_floating_point() and x.dim() > 1 and x.shape[-1] > 1}
                factors -= {torch.float32} if "attention" in func.__name__ else set()  # its softmax statistics
                assert len(factors) == 1, f"{func} of {factors}, which FakeTensorMode does not mind and CUDA refuses."
                # Causal: half of the scores are never computed.
                half = "flash" in func.__name__ or ("efficient" in func.__name__ and any(x is True for x in args[5:]))
                self.operations["products"] += count(*args, **kwargs, out_val=out) // (2 if half else 1)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.hold(x)
        return out

    def gemm_4bit(self, x, packed, shape, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, *_):
        """What bitsandbytes does on CUDA with many tokens: the layer in 16 bits, then an ordinary product."""
        scales = [self.new(absmax_8bit.shape, dtype=torch.float32) for _ in range(2)]  # noqa: F841
        weight = self.new(shape, dtype=x.dtype)
        self.operations.update(products=2 * x.numel() * shape[0], kernels=4)
        return torch.nn.functional.linear(x, weight)

    def attention(self, capability, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        """scaled_dot_product_attention as PyTorch chooses it on CUDA for 16-bit tensors."""
        if attn_mask is None and capability >= (8, 0):
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=options["scale"])[
                0
            ]
        assert not options.get("enable_gqa"), "The slow kernel that keeps all scores."
        if attn_mask is not None:
            known = attn_mask if isinstance(attn_mask, FakeTensor) else fake.from_tensor(attn_mask)
            bias = torch.zeros_like(known, dtype=query.dtype).masked_fill(~known, -torch.inf)
            attn_mask = bias.expand(*query.shape[:3], key.shape[2])
        keep = torch.is_grad_enabled() and query.requires_grad
        options = dict(scale=options["scale"])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keep, 0.0, is_causal, **options
        )[0]

    def fold(self, *_, **__):  # TRL's Triton kernels work in place
        self.operations["kernels"] += 1

    def add_product(self, total, a, b):  # 16-bit factors, summed in float32 in place
        self.operations.update(products=2 * a.shape[0] * a.shape[1] * b.shape[1], kernels=1)

    @contextlib.contextmanager
    def running(self, capability):
        """Inside, PyTorch seems to have a GPU of this capability, TRL seems to have Triton, and autocast is on."""
        kernel = type("Kernel", (), {"__getitem__": lambda _, grid: self.fold})()
        chunked = "trl.kernels.chunked_logprob."
        patches = {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.get_device_capability": lambda *_: capability,
            "torch.nn.functional.scaled_dot_product_attention": lambda *a, **k: self.attention(capability, *a, **k),
            "torch.Tensor.cpu": lambda x: self.operations.update(waits=1) or x,
            "trl.trainer.utils._use_triton": lambda device: True,
            chunked + "_use_triton": lambda device: True,
            chunked + "_forward_kernel": kernel,
            chunked + "_backward_kernel": kernel,
            chunked + "_addmm_fp32": self.add_product,
        }
        with contextlib.ExitStack() as stack:
            for name, stand_in in patches.items():
                stack.enter_context(mock.patch(name, stand_in))
            cdiv = types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))
            stack.enter_context(mock.patch(chunked + "triton", cdiv, create=True))
            stack.enter_context(fake)
            stack.enter_context(self)
            torch.set_autocast_enabled("cuda", True)  # PEFT asks for it by that name
            try:
                yield
            finally:
                torch.set_autocast_enabled("cuda", False)


def imagine(model, machine, dtype):
    """Gives a model on the meta device imagined weights: NF4 with double quantisation, the adapter in float32.

    Returns AdamW's moments, which only have to stay alive.
    """
    with fake:
        new, f32 = machine.new, torch.float32
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is not None and isinstance(module, Linear4bit):
                    n = old.numel()
                    second = QuantState(new(n // 2**14, dtype=f32), blocksize=256, code=new(256, dtype=f32), dtype=f32)
                    scale = new(n // 64, dtype=torch.uint8)
                    state = QuantState(
                        scale, old.shape, new(16, dtype=f32), 64, "nf4", dtype, new((), dtype=f32), second
                    )
                    weight = torch.nn.Parameter(new(n // 2, 1, dtype=torch.uint8), requires_grad=False)
                    weight.quant_state = module.quant_state = state
                    module._parameters[name], module.support_avx512bf16_for_cpu = weight, False
                elif old is not None:
                    kind = f32 if old.requires_grad else old.dtype
                    module._parameters[name] = torch.nn.Parameter(new(old.shape, dtype=kind), old.requires_grad)
            module._buffers.update({name: new(x.shape, dtype=x.dtype) for name, x in module._buffers.items()})
        return [new(x.shape, dtype=f32) for x in model.parameters() if x.requires_grad for _ in range(2)]


def make_trainer(shape, dtype, checkpointing):
    """TRL's trainer for a Mistral of this shape, in 4 bits, on the meta device."""
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    nf4 = hf.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.MistralConfig(**shape), dtype=dtype).requires_grad_(False)
    model = replace_with_bnb_linear(model, ["lm_head"], nf4)
    model.is_loaded_in_4bit, model.is_quantized, model.quantization_method = True, True, "bitsandbytes"
    model.hf_quantizer, model.config.quantization_config = Bnb4BitHfQuantizer(nf4), nf4
    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    precision = dict(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=True)
    kept = dict(output_dir=tempfile.mkdtemp(), max_length=None, report_to="none", gradient_checkpointing=checkpointing)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**kept, **precision),
        train_dataset=Dataset.from_list([dict(prompt="a", chosen="a", rejected="a")]),
        processing_class=hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>"),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    return trainer


def step(trainer, lengths, dtype):
    """Loss, forward and backward, of one batch of (prompt, chosen, rejected) lengths."""
    ids = [dict(prompt_ids=[1] * p, chosen_ids=[2] * c, rejected_ids=[3] * r) for p, c, r in lengths]
    with torch.autocast("cpu", dtype=dtype):
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(ids))
    loss.backward()


def simulate(batches, layers, dtype, capability, checkpointed, share_prompt):
    """The machine after batches in turn. checkpointed: how many layers, of each batch; None is stock TRL's way, all."""
    machine, trainer = Machine(), make_trainer(dict(SHAPE, num_hidden_layers=layers), dtype, checkpointed != 0)
    moments = imagine(trainer.model, machine, dtype)  # noqa: F841
    with machine.running(capability):
        if share_prompt:
            once = alone("run-prompts-once")["run_prompts_once"]
            once(trainer.model.get_base_model(), lambda tokens, cells: checkpointed)
        trainer.model.train()
        for lengths in batches:
            step(trainer, lengths, dtype)
    return machine


def operations(batches, checkpointed, dtype, capability, share_prompt):
    """Counts for the 32 layers, from one layer and two: what each further layer adds, and a checkpointed one."""
    how = dtype, capability
    one, two = (simulate(batches, n, *how, None if checkpointed is None else 0, share_prompt) for n in (1, 2))
    found = Counter(
        {
            key: one.operations[key] + (LAYERS - 1) * (two.operations[key] - one.operations[key])
            for key in one.operations
        }
    )
    again = 0
    if checkpointed:
        again = simulate(batches, 2, *how, 1, share_prompt).operations["products"] - two.operations["products"]
    return found, again


def draw_run():
    """(prompt, chosen, rejected) lengths of the orca pairs of a whole run, in steps, the longest pair of each first."""
    pairs = [pair for pair in draw_lengths("orca", 2 * STEPS * PER_STEP, 0) if pair[0] + max(pair[1:]) <= MAX_LENGTH]
    steps = [pairs[i : i + PER_STEP] for i in range(0, STEPS * PER_STEP, PER_STEP)]
    return [sorted(step, key=sum, reverse=True) for step in steps]


def plan_for(memory, dtype, run):
    """The namespace of the notebook's own plan for a card and the pairs of a run."""
    pairs = np.array([pair for step in run for pair in step])
    with torch.device("meta"):
        skeleton = hf.AutoModelForCausalLM.from_config(CONFIG)
    head = skeleton.get_output_embeddings()
    linear = [x for x in skeleton.modules() if isinstance(x, torch.nn.Linear) and x is not head]
    nb = dict(alone("memory"), torch=torch, config=CONFIG, dtype=dtype, linear=linear, trained=False, sharded=False)
    nb.update(pairs_per_step=PER_STEP, processes=types.SimpleNamespace(num_processes=1), share_prompt=True, on_gpu=True)
    nb["gather_object"] = list
    nb.update(parameter_count=skeleton.num_parameters(), load_in_4bit=True, memory=memory, order=np.arange(len(pairs)))
    nb["adapter_size"] = sum(16 * (layer.in_features + layer.out_features) for layer in linear)
    nb["once"], nb["longest"] = pairs.sum(axis=1) - 1, pairs[:, 0] + pairs[:, 1:].max(axis=1)
    with contextlib.redirect_stdout(None):
        return run_cell("split-of-a-step", nb)


def least(pairs):
    """Operations that DPO cannot do without: each distinct token once, forward and backward, and the reference's forward.

    Backward passes through frozen weights, so each pass costs as much as the forward one. The head only sees answers.
    """
    hidden, heads = SHAPE["hidden_size"], SHAPE["num_attention_heads"]
    head_size = hidden // heads
    layer = 2 * hidden * (2 * hidden + 2 * SHAPE["num_key_value_heads"] * head_size + 3 * SHAPE["intermediate_size"])
    total = 0
    for prompt, *answers in pairs:
        tokens = prompt + sum(answers) - 1
        causal = prompt**2 / 2 + sum(answer * (prompt + answer / 2) for answer in answers)
        attention = 4 * causal * heads * head_size * (1 + 2.5 + 1)  # backward: five products for two
        total += LAYERS * (3 * layer * tokens + attention) + 3 * 2 * SHAPE["vocab_size"] * hidden * sum(answers)
    return total


def cards(run, sampled):
    """Of each card: the notebook's plan, memory predicted and simulated, operations over the least there are."""
    rows = []
    for name, (memory, capability) in CARDS.items():
        dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
        nb = plan_for(memory, dtype, run)
        size, (tokens, cells, again) = nb["at_once"], nb["batches"]
        batches = [step[i : i + size] for step in run for i in range(0, PER_STEP, size)]
        worst = {int(values.argmax()) for values in (nb["needs"], tokens, cells)}
        peaks = [simulate([batches[i]] * 2, LAYERS, dtype, capability, int(again[i]), True).peak + 1.5e9 for i in worst]
        some = [batches[i] for step in sampled for i in range(step * PER_STEP // size, (step + 1) * PER_STEP // size)]
        found, layer_again = operations(some, 1, dtype, capability, True)
        pairs = [pair for batch in some for pair in batch]
        # What one layer costs again, by tokens, and what the plan of the whole run does again.
        layer_again /= sum(sum(pair) - 1 for pair in pairs)
        bound = least(pair for step in run for pair in step)
        over = found["products"] / least(pairs) + (again * tokens).sum() * layer_again / bound
        passes = (3 + again / LAYERS).sum()
        dequantising = over + 130 * passes * 2 * 218103808 * LAYERS / bound
        rows.append(
            dict(
                name=name,
                split=f"{size} × {PER_STEP // size}",
                layers_checkpointed=float(again.mean()),
                predicted_gb=float(nb["needs"].max() / 1e9),
                simulated_gb=max(peaks) / 1e9,
                of_the_card=max(peaks) / memory,
                operations_over_bound=float(over),
                with_dequantising_over_bound=float(dequantising),
                batches_per_step=PER_STEP // size,
                kernels_per_step=found["kernels"] / len(sampled),
                waits_per_step=found["waits"] / len(sampled),
            )
        )
        print(name, rows[-1], flush=True)
    return rows


def ways(run, sampled):
    """Of each way to train without the notebook: operations over the least there are, on the same sampled steps."""
    rows = []
    for name, checkpointed in {
        "recipe of 2024, stock TRL": None,
        "stock TRL without checkpointing": 0,
    }.items():
        shuffled = [random.Random(i).sample(run[i], PER_STEP) for i in sampled]
        batches = [step[i : i + 4] for step in shuffled for i in range(0, PER_STEP, 4)]
        found, _ = operations(batches, checkpointed, torch.bfloat16, (8, 0), False)
        over = found["products"] / least(pair for step in shuffled for pair in step)
        counts = {f"{key}_per_step": found[key] / len(sampled) for key in ("kernels", "waits")}
        rows.append(dict(name=name, operations_over_bound=over, batches_per_step=PER_STEP // 4, **counts))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="where to write what was found, as JSON")
    parser.add_argument("--sampled", type=int, default=2, help="steps of the run whose operations are counted")
    arguments = parser.parse_args()
    run = draw_run()
    sampled = range(0, STEPS, STEPS // arguments.sampled)
    found = dict(cards=cards(run, sampled), ways=ways(run, sampled))
    for rows in found.values():
        header = list(rows[0])
        print(table(header, [[f"{x:.3g}" if isinstance(x, float) else x for x in row.values()] for row in rows]), "\n")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
