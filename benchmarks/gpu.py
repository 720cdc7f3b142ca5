"""Checks in a quarter of an hour what only a GPU can tell of the notebook. Needs no internet.

    python benchmarks/gpu.py                # on one GPU, at most 14 minutes
    python benchmarks/gpu.py --rehearse     # all of it with small shapes on a CPU

The checks come in the order of their worth, and each runs in a process of its own, so that one that
crashes, or that hangs, costs itself alone. After each of them gpu.json and gpu.md are written anew
in the folder --output, and what each process printed is beside them. A check says in sentences what
is wrong, if anything is; what could not be measured without a GPU stays empty.
"""

import argparse
import contextlib
import datetime
import gc
import hashlib
import json
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_TOKEN": "",
    "HF_TOKEN_PATH": os.devnull,
    "WANDB_API_KEY": "",
    "MPLBACKEND": "Agg",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# GB of memory of the cards in simulated.json, by their names there.
SIMULATED_CARDS = {
    "T4, 16 GB": 15.8,
    "L4 or RTX 4090, 24 GB": 23.6,
    "A100, 40 GB": 42.3,
    "A100 or H100, 80 GB": 84.9,
    "H200, 141 GB": 150.0,
}
CONTEXT_BYTES = 0.5e9  # of a card, what CUDA itself takes before PyTorch gets any
SMALL_SHAPE = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=256,
)
HALVES = (torch.bfloat16, torch.float16)


@dataclass
class Place:
    """What a check works with."""

    work: Path  # models, pairs and runs; what is made there once is used by later checks
    rehearse: bool  # small shapes, on a CPU

    @property
    def device(self):
        return "cpu" if self.rehearse else "cuda"


@dataclass
class Check:
    """A check: function(place) returns what it found, a dict; "wrong" is a list of sentences."""

    name: str
    function: Callable
    seconds: int  # the most that it may take on a GPU


# What the checks share


def gigabytes(number):
    return round(number / 1e9, 3)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def wait_for_gpu():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function):
    """How long a call takes, with what it makes the GPU do."""
    wait_for_gpu()
    start = time.perf_counter()
    function()
    wait_for_gpu()
    return time.perf_counter() - start


def relative_error(found, expected):
    """The largest difference of two tensors, relative to the largest number expected."""
    difference = (found.detach().double() - expected.detach().double()).abs().max()
    return (difference / expected.detach().abs().max().double()).item()


def allocated_gb():
    """GB that tensors take on the GPU, but for cuBLAS' workspace; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):  # else some 60 MB more
        torch._C._cuda_clearCublasWorkspaces()
    return gigabytes(torch.cuda.memory_allocated())


def reset_peaks():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    """The most that tensors took and PyTorch reserved, and what else is taken on the card."""
    if not torch.cuda.is_available():
        return {"allocated_gb": None, "reserved_gb": None, "outside_pytorch_gb": None}
    stats = torch.cuda.memory_stats()
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_gb": gigabytes(torch.cuda.max_memory_allocated()),
        "reserved_gb": gigabytes(torch.cuda.max_memory_reserved()),
        "outside_pytorch_gb": gigabytes(total - free - torch.cuda.memory_reserved()),
        "allocations_tried_again": stats.get("num_alloc_retries", 0),
    }


def run_after(cell, last, namespace):
    """Runs the notebook's cells behind `cell`, up to `last`."""
    from rehearsal.notebook import CELLS, run_cells

    names = list(CELLS)
    return run_cells(names[names.index(cell) + 1], last, namespace)


def hash_by_name(opened, kind):
    """In place of hashlib.file_digest: reading 14.5 GB for it is not what is measured."""
    return hashlib.new(kind, opened.name.encode())


def prepare(parameters, precision=None):
    """The notebook's namespace after its cell `questions`: pairs read, split planned, model loaded.

    precision: in place of what the machine would choose.
    """
    from rehearsal.notebook import run_cells

    with mock.patch("hashlib.file_digest", hash_by_name):
        notebook = run_cells("install", "machine", **parameters)
        if precision is not None:
            notebook["dtype"] = precision
        return run_after("machine", "questions", notebook)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class StepClock:
    """Measures the steps of a trainer, and ends its training after some of them.

    The first step is not measured: kernels are compiled and memory is found in it.
    """

    def __init__(self, trainer, stop_after):
        self.trainer = trainer
        self.stop_after = stop_after
        self.seconds = []
        self.skipped_steps = 0
        self.tokens = {"with gradients": 0, "without": 0}
        self.measuring = False
        embeddings = trainer.model.get_input_embeddings()
        self.hook = embeddings.register_forward_pre_hook(self.count_tokens)

    def count_tokens(self, module, inputs):
        if self.measuring:
            kind = "with gradients" if torch.is_grad_enabled() else "without"
            self.tokens[kind] += inputs[0].numel()

    def begin(self, steps_done):
        """To be called before a step."""
        self.measuring = steps_done > 0
        wait_for_gpu()
        self.start = time.perf_counter()

    def end(self, steps_done):
        """To be called after a step. Returns whether it was the last one."""
        wait_for_gpu()
        if self.measuring:
            self.seconds.append(time.perf_counter() - self.start)
        self.measuring = False
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self.skipped_steps += 1
        return steps_done >= self.stop_after

    def operations_per_second(self, linear_weights):
        """Of linear layers: forward, backward through frozen weights, the reference's forward."""
        passes = 2 * self.tokens["with gradients"] + self.tokens["without"]
        return 2 * linear_weights * passes / sum(self.seconds)


def add_clock(trainer, stop_after):
    """The `StepClock` of a trainer."""
    from transformers import TrainerCallback  # seconds, which most checks can do without

    clock = StepClock(trainer, stop_after)

    class CallClock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            clock.begin(state.global_step)

        def on_step_end(self, args, state, control, **_):
            if clock.end(state.global_step):
                control.should_training_stop = True

    trainer.add_callback(CallClock())
    return clock


# 1. Kernels


def check_addmm(place):
    """TRL's products of 16 bits that are added up in float32."""
    from trl.kernels.chunked_logprob import _addmm_fp32

    found = {"wrong": []}
    inner = 64 if place.rehearse else 4096
    for dtype in HALVES:
        torch.manual_seed(0)
        first = torch.randn(512, inner, device=place.device, dtype=dtype)
        second = torch.randn(inner, 256, device=place.device, dtype=dtype)
        exact = first.double() @ second.double()
        total = torch.zeros(exact.shape, device=place.device)
        _addmm_fp32(total, first, second)
        error = relative_error(total, exact)
        found[name_of(dtype)] = {
            "relative error": error,
            "of a product in 16 bits": relative_error(first @ second, exact),
        }
        if not error < 1e-4:
            found["wrong"].append(f"{name_of(dtype)}: the sum in float32 is off by {error:.0e}.")
    return found


def head_log_probs(hidden, weight, targets, triton):
    """Log-probabilities of TRL's fused head, and their gradient for the hidden states."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden = hidden.detach().requires_grad_()
    chunk = min(4096, len(weight))
    with mock.patch("trl.kernels.chunked_logprob._use_triton", return_value=triton):
        arguments = (hidden, weight, None, targets, 1.0, chunk, None, 1.0, ())
        log_probs = ChunkedLogProbFunction.apply(*arguments)[0]
        log_probs.sum().backward()
    return log_probs, hidden.grad


def check_head(place):
    """TRL's fused head by its Triton kernels and by its tiles of torch, against float32."""
    found = {"wrong": []}
    tokens, width, words = 4096, 4096, 32002
    if place.rehearse:
        tokens, width, words = 64, 32, 300
    for dtype in HALVES:
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width, device=place.device, dtype=dtype)
        weight = torch.randn(words, width, device=place.device, dtype=dtype) * width**-0.5
        targets = torch.randint(words, (tokens,), device=place.device)
        exact_hidden = hidden.float().requires_grad_()
        logits = exact_hidden @ weight.float().T
        exact = logits.log_softmax(dim=-1).gather(dim=1, index=targets[:, None])[:, 0]
        exact.sum().backward()
        ways = {"torch tiles": False}
        if not place.rehearse:
            ways["triton"] = True
        errors = {}
        for way, triton in ways.items():
            log_probs, gradient = head_log_probs(hidden, weight, targets, triton)
            again = partial(head_log_probs, hidden, weight, targets, triton)
            errors[way] = (log_probs - exact).abs().max().item()
            found[f"{name_of(dtype)}, {way}"] = {
                "nats off": errors[way],
                "gradient off": relative_error(gradient, exact_hidden.grad),
                "ms": round(1000 * seconds_of(again), 2),
            }
        if "triton" in errors and not errors["triton"] <= 2 * errors["torch tiles"] + 1e-3:
            found["wrong"].append(f"{name_of(dtype)}: Triton's head is off by {errors}.")
    return found


def attention_inputs(place, width, dtype, length):
    """Queries of 32 heads, keys and values of 8, as the 7B has them."""
    heads = (8, 2) if place.rehearse else (32, 8)
    options = dict(device=place.device, dtype=dtype, requires_grad=True)
    query = torch.randn(1, heads[0], length, width, **options)
    key = torch.randn(1, heads[1], length, width, **options)
    value = torch.randn(1, heads[1], length, width, **options)
    return query, key, value


def attend(query, key, value, options):
    """Forward and backward of attention."""
    attention = torch.nn.functional.scaled_dot_product_attention
    attention(query, key, value, **options).sum().backward()


def accepting_kernels(inputs, options):
    """The names of PyTorch's attention kernels that run forward and backward of this."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    accepting = []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        try:
            with sdpa_kernel([getattr(SDPBackend, name)]):
                attend(*inputs, options)
            accepting.append(name)
        except RuntimeError:
            pass
    return accepting


def chosen_kernel(inputs, options):
    """The name of the kernel that PyTorch chooses by itself."""
    from torch.nn.attention import SDPBackend

    number = torch._fused_sdp_choice(*inputs, **options)
    return SDPBackend(number).name


def check_attention(place):
    """Which kernel of PyTorch's attention each width of a head takes, as the notebook sets it."""
    found = {"wrong": [], "kernels": []}
    length = 32 if place.rehearse else 2048
    mask = torch.ones(length, length, device=place.device, dtype=torch.bool).tril()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the cell `machine` does
    for dtype in HALVES:
        for width in (64, 80, 96, 128, 192, 256):
            grouped = attention_inputs(place, width, dtype, length)
            query, key, value = grouped
            groups = query.shape[1] // key.shape[1]
            repeated = [x.detach().repeat_interleave(groups, dim=1) for x in (key, value)]
            repeated = [query, *[x.requires_grad_() for x in repeated]]
            cases = {
                "causal, grouped": (grouped, {"is_causal": True, "enable_gqa": True}),
                "causal, repeated": (repeated, {"is_causal": True}),
                "mask, grouped": (grouped, {"attn_mask": mask, "enable_gqa": True}),
                "mask, repeated": (repeated, {"attn_mask": mask}),
            }
            for name, (inputs, options) in cases.items():
                chosen = chosen_kernel(inputs, options)
                reset_peaks()
                seconds_of(partial(attend, *inputs, options))
                row = {"precision": name_of(dtype), "head width": width, "case": name}
                row["chosen"] = chosen
                row["accepting"] = ", ".join(accepting_kernels(inputs, options))
                row["peak GB"] = peak_memory()["allocated_gb"]
                row["ms"] = round(1000 * seconds_of(partial(attend, *inputs, options)), 2)
                found["kernels"].append(row)
                # A window's mask is the only one that the notebook makes, and a T4 never groups.
                if chosen == "MATH" and name == "causal, grouped" and not place.rehearse:
                    found["wrong"].append(
                        f"Heads of width {width} in {name_of(dtype)}: all scores are kept."
                    )
    found["ms at a length"] = new_lengths(place)
    return found


def times_at_lengths(place, kernel, lengths):
    """Mean seconds of forward and backward by one kernel: at lengths not met before, and again."""
    from torch.nn.attention import sdpa_kernel

    first = []
    again = []
    for length in lengths:
        inputs = attention_inputs(place, 128, torch.bfloat16, length)
        call = partial(attend, *inputs, {"is_causal": True, "enable_gqa": True})
        with sdpa_kernel([kernel]):
            first.append(seconds_of(call))
            again.append(seconds_of(call))
    # The very first call is left out, which loads libraries.
    return sum(first[1:]) / len(first[1:]), sum(again[1:]) / len(again[1:])


def new_lengths(place):
    """What a length costs that was not met before: cuDNN is said to plan for each."""
    from torch.nn.attention import SDPBackend

    names = ["FLASH_ATTENTION"] if place.rehearse else ["FLASH_ATTENTION", "CUDNN_ATTENTION"]
    lengths = range(31, 61, 7) if place.rehearse else range(301, 421, 7)
    found = {}
    for name in names:
        try:
            first, again = times_at_lengths(place, getattr(SDPBackend, name), lengths)
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
            continue
        found[name] = {"new": round(1000 * first, 2), "again": round(1000 * again, 2)}
    return found


# 2. The rehearsal, in the precision that the card chooses


def make_tiny_world(place):
    """The rehearsal's model and pairs, made once."""
    from rehearsal.world import make_model, make_pairs

    model, pairs = place.work / "tiny", place.work / "tiny.jsonl"
    if not (model / "tokenizer_config.json").exists():  # which is written last but two
        make_model(model, steps=4 if place.rehearse else 240)
    if not pairs.exists():
        lines = [json.dumps(pair) + "\n" for pair in make_pairs(count=360)]
        pairs.write_text("".join(lines), encoding="utf-8")
    return model, pairs


def tiny_parameters(place, output, **changes):
    """The parameters of a run on the rehearsal's model."""
    model, pairs = make_tiny_world(place)
    parameters = dict(
        base_model=str(model),
        dataset_id=str(pairs),
        output_dir=str(place.work / output),
        push_to_hub=False,
        eval_pairs=64,
        learning_rate=5e-4,
        max_steps=50,
        warmup_steps=5,
        max_length=256,
    )
    if place.rehearse:
        parameters.update(eval_pairs=8, max_steps=4, warmup_steps=1, pairs_per_step=4)
    parameters.update(changes)
    return parameters


def check_rehearsal(place):
    """The notebook's cells with the rehearsal's model, from the first to the last."""
    from rehearsal.notebook import CELLS, run_cells

    parameters = tiny_parameters(place, "rehearsal")
    reset_peaks()
    notebook = run_cells("install", "save", **parameters)
    found = {"wrong": []}
    free_model(found, notebook)
    losses = [entry["loss"] for entry in notebook["run"]["history"] if "loss" in entry]
    off = abs(losses[0] - math.log(2))
    found["machine"] = notebook["machine"]
    found["precision"] = name_of(notebook["dtype"])
    found["first loss"] = losses[0]
    found["last loss"] = losses[-1]
    found["off ln 2"] = off
    found.update(peak_memory())
    if "error" in notebook:
        found["prompts run once, nats"] = {
            "moved": notebook["error"].moved,
            "by rounding": notebook["error"].rounding,
            "of the rejected by the chosen": notebook["error"].seen,
        }
    if not off < 1e-4:
        found["wrong"].append(f"The first loss is {losses[0]:.5f} and not ln 2.")
    run_after("free", list(CELLS)[-1], notebook)
    likelier = {}
    for name, scores in notebook["run"]["scores"].items():
        likelier[name] = scores["chosen likelier per token"]
    found["chosen likelier per token"] = likelier
    return found


def free_model(found, notebook):
    """Runs the cell `free` and adds to what was found whether the model is gone after it."""
    from rehearsal.notebook import run_cell

    model = weakref.ref(notebook["model"])
    run_cell("free", notebook)
    gc.collect()
    found["model gone after `free`"] = model() is None
    found["GB left after `free`"] = allocated_gb()
    if model() is not None:
        found["wrong"].append("The model is still in memory after the cell `free`.")


# 3. A model of 7B with random weights, and 4. a T4


def write_7b(place):
    """The 7B's shape with random weights, and as many pairs as a whole run takes, made once."""
    from benchmarks import speed

    # So that a rehearsal, too, goes through the function that writes the large one.
    shape = SMALL_SHAPE if place.rehearse else speed.SHAPES["cuda"]
    with mock.patch.dict(speed.SHAPES, {place.device: shape}):
        speed.write_model(place.work / "writing", place.device)
    mix, count = ("all short", 60) if place.rehearse else ("orca", 3500)
    speed.write_pairs(place.work / "7b.jsonl", mix, count, shape["vocab_size"])
    (place.work / "writing").rename(place.work / "7b")
    sizes = [path.stat().st_size for path in (place.work / "7b").glob("*.safetensors")]
    return {"wrong": [], "GB written": gigabytes(sum(sizes))}


def make_7b(place):
    """Writes the 7B unless it is there."""
    if (place.work / "7b").exists():
        return {"wrong": [], "GB written": 0}
    return write_7b(place)


def parameters_7b(place, output, **changes):
    """The notebook's own parameters, on the 7B, with fewer held-out pairs."""
    if not (place.work / "7b").exists():
        raise FileNotFoundError("There is no 7B to train: writing it did not end well.")
    parameters = dict(
        base_model=str(place.work / "7b"),
        dataset_id=str(place.work / "7b.jsonl"),
        output_dir=str(place.work / output),
        push_to_hub=False,
        eval_pairs=32,
    )
    if place.rehearse:
        parameters.update(eval_pairs=8, max_steps=6, warmup_steps=1, pairs_per_step=4)
    parameters.update(changes)
    return parameters


def simulated_gb(memory_gb):
    """What simulated.json has for a card of this memory, or None. Reads the committed file."""
    found = json.loads((ROOT / "benchmarks" / "simulated.json").read_text(encoding="utf-8"))
    for card in found["cards"]:
        size = SIMULATED_CARDS.get(card["name"])
        if size and abs(size - memory_gb) < 0.05 * size:
            return round(card["simulated_gb"], 2)
    return None


def speed_of(clock, notebook, pairs):
    """Seconds a step, and the share of what the card does in one large product of matrices."""
    from benchmarks.speed import matmul_rate

    if not clock.seconds:
        return {}
    layers = notebook["linear_layers"](notebook["skeleton"])
    rate = clock.operations_per_second(sum(layer.weight.numel() for layer in layers))
    device = "cuda" if notebook["on_gpu"] else "cpu"
    limit = matmul_rate(device) if torch.cuda.is_available() else rate
    return {
        "seconds a step": [round(seconds, 3) for seconds in clock.seconds],
        "pairs a second": round(pairs / sum(clock.seconds) * len(clock.seconds), 3),
        "TFLOP/s of the linear layers": round(rate / 1e12, 2),
        "share of the matmul rate": round(rate / limit, 3) if torch.cuda.is_available() else None,
    }


def plan_of(notebook):
    """What the notebook planned with, and what it predicts."""
    split = notebook["split"]
    memory = notebook["memory"]
    return {
        "precision": name_of(notebook["dtype"]),
        "GB to plan with": gigabytes(memory) if memory else None,
        "pairs at once": split.pairs_at_once,
        "layers checkpointed": round(float(split.checkpointed_layers.mean()), 2),
        "predicted_gb": gigabytes(float(notebook["fixed_bytes"] + split.most_bytes)),
        "simulated_gb": simulated_gb(memory / 1e9) if memory else None,
    }


def cap_memory(memory_bytes):
    """Lets PyTorch have no more than a card of this memory would."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties().total_memory
        share = min(1.0, (memory_bytes - CONTEXT_BYTES) / total)
        torch.cuda.set_per_process_memory_fraction(share)


def train_7b(place, output, steps=3, **changes):
    """Some steps of a whole run on the 7B, and the batch of that run that needs most memory."""
    notebook = prepare(parameters_7b(place, output, **changes))
    # Generating is no part of training: the questions count as asked.
    notebook["run"]["before"] = dict.fromkeys(notebook["questions"], "")
    found = {"wrong": [], **plan_of(notebook)}
    run_after("questions", "share-prompts", notebook)
    found["weights_gb"] = allocated_gb()
    clock = add_clock(notebook["trainer"], stop_after=steps)
    reset_peaks()
    try:
        run_after("share-prompts", "train", notebook)
    except MemoryError as error:
        found["wrong"].append(f"Memory ran out: {error}")
    found.update(peak_memory())
    found["losses"] = losses_of(notebook["trainer"])
    found["skipped steps"] = clock.skipped_steps
    if found["losses"] and not abs(found["losses"][0] - math.log(2)) < 1e-4:
        found["wrong"].append(f"The first loss is {found['losses'][0]:.5f} and not ln 2.")
    if found["reserved_gb"] is not None:
        taken = found["reserved_gb"] + found["outside_pytorch_gb"]
        if taken > found["GB to plan with"]:
            found["wrong"].append(f"{taken:.1f} GB were taken: more than was planned with.")
        needed = found["allocated_gb"] + found["outside_pytorch_gb"]
        if needed > 1.03 * found["predicted_gb"]:
            found["wrong"].append(f"{needed:.1f} GB were needed: more than was predicted.")
    found.update(speed_of(clock, notebook, notebook["pairs_per_step"]))
    del clock  # which holds the trainer
    free_model(found, notebook)
    return found


def check_7b(place):
    """The notebook's plan with all memory of this card."""
    return train_7b(place, "run-7b")


def check_7b_40(place):
    """The plan of a card of 40 GB, with no more memory than that."""
    cap_memory(42.3e9)
    return train_7b(place, "run-7b-40", gpu_memory=42.3)


def check_7b_24(place):
    """The plan of a card of 24 GB, with no more memory than that."""
    cap_memory(23.6e9)
    return train_7b(place, "run-7b-24", gpu_memory=23.6)


def check_7b_stock(place, steps=3):
    """Stock TRL on the same pairs in the same steps: 4 at once, all layers checkpointed."""
    from peft import LoraConfig
    from trl import DPOConfig

    notebook = prepare(parameters_7b(place, "run-7b-stock"))
    notebook["run"]["before"] = dict.fromkeys(notebook["questions"], "")
    run_after("questions", "trainer", notebook)
    dtype, size = notebook["dtype"], notebook["pairs_per_step"]
    arguments = DPOConfig(
        output_dir=notebook["output_dir"],
        max_length=notebook["max_length"],
        max_steps=steps,
        learning_rate=notebook["learning_rate"],
        per_device_train_batch_size=4,
        gradient_accumulation_steps=size // 4,
        activation_checkpointing=True,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=place.rehearse,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    order = []
    for step in range(steps):  # TRL draws at random, so inside a step the lengths are mixed
        pairs = notebook["order"][step * size : (step + 1) * size]
        order += random.Random(step).sample(pairs, size)
    trainer = notebook["LastingTrainer"](  # TRL's own, for rows that are token ids already
        model=notebook["model"],
        args=arguments,
        train_dataset=notebook["rows"].select(order),
        processing_class=notebook["tokenizer"],
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    clock = add_clock(trainer, stop_after=steps)
    reset_peaks()
    trainer.train()
    found = {"wrong": [], "losses": losses_of(trainer), **peak_memory()}
    found.update(speed_of(clock, notebook, size))
    return found


class OlderCard:
    """The properties of the card in use, but for name, memory and compute capability."""

    name, major, minor = "an imitated T4", 7, 5

    def __init__(self, real, memory_bytes):
        self.real, self.total_memory = real, int(memory_bytes)

    def __getattr__(self, name):
        return getattr(self.real, name)


@contextlib.contextmanager
def imitated_t4(memory_bytes=15.8e9):
    """Makes PyTorch say that the card is of compute capability 7.5 and of this memory.

    Attention keeps to the kernels that such a card has, and PyTorch gets no more memory than there.
    Kernels are still those of the real card. Without a GPU nothing is changed.
    """
    if not torch.cuda.is_available():
        yield
        return
    from triton.runtime import driver

    # Triton keeps the function that it asks for the capability, and needs the true answer.
    driver.active.get_current_target()
    card = OlderCard(torch.cuda.get_device_properties(), memory_bytes)
    architectures = [*torch.cuda.get_arch_list(), "sm_75"]
    cap_memory(memory_bytes)

    def memory_info(device=None):
        free = memory_bytes - CONTEXT_BYTES - torch.cuda.memory_reserved()
        return int(free), int(memory_bytes)

    flash = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    with (
        mock.patch("torch.cuda.get_device_properties", return_value=card),
        mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)),
        mock.patch("torch.cuda.get_arch_list", return_value=architectures),
        mock.patch("torch.cuda.is_bf16_supported", return_value=False),
        mock.patch("torch.cuda.mem_get_info", memory_info),
    ):
        yield
    torch.backends.cuda.enable_flash_sdp(flash)


def check_t4(place):
    """The plan of a T4: fp16, its memory, and attention without the kernels that it has not."""
    with imitated_t4():
        found = train_7b(place, "run-t4")
    if found["precision"] != "float16" and not place.rehearse:
        found["wrong"].append(f"A T4 trains in float16, not in {found['precision']}.")
    if found["skipped steps"] > 1:
        found["wrong"].append(
            f"{found['skipped steps']} of 3 steps were skipped: gradients overflow."
        )
    return found


# 5. Interrupted, and run again


class Interrupted(Exception):
    """A cell of the shell ended with an error; its text stays, the error itself is let go."""


def new_shell():
    """IPython without a screen, which keeps of a failed cell what a notebook keeps."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    quiet = Config()
    quiet.HistoryManager.enabled = False
    return InteractiveShell.instance(config=quiet)


def run_in_shell(shell, first, last, **parameters):
    """Runs the cells from `first` to `last` in IPython. Raises Interrupted if one fails."""
    from rehearsal.notebook import CELLS

    names = list(CELLS)
    for name in names[names.index(first) : names.index(last) + 1]:
        done = shell.run_cell(CELLS[name])
        error = done.error_before_exec or done.error_in_exec
        if error is not None:
            text = f"{name}: {type(error).__name__} {error}"
            done = error = None  # or the frames of the cell would be kept alive from here
            raise Interrupted(text)
        if name == "parameters":
            shell.user_ns.update(parameters)
        if name == "questions":  # to generate answers is no part of this: they count as asked
            shell.user_ns["run"]["before"] = dict.fromkeys(shell.user_ns["questions"], "")


def interrupt_once(trainer, step):
    """Stops a trainer as Ctrl-C does, inside the step after `step`, with most memory in use."""
    plain_compute_loss = trainer.compute_loss

    def compute_loss(model, inputs, *arguments, **options):
        loss = plain_compute_loss(model, inputs, *arguments, **options)
        if trainer.state.global_step == step and torch.is_grad_enabled():
            trainer.compute_loss = plain_compute_loss
            raise KeyboardInterrupt
        return loss  # which the frame of this function keeps, with all that backward needs

    trainer.compute_loss = compute_loss


def check_interrupt(place):
    """Interrupted inside a step; the cell `train` is run again, and then the cell `load`."""
    steps = 4 if place.rehearse else 8
    changes = dict(max_steps=steps, warmup_steps=1)
    shell = new_shell()
    found = {"wrong": []}

    run_in_shell(shell, "install", "load", **tiny_parameters(place, "uncut", **changes))
    found["GB after `load`"] = {"first": allocated_gb()}
    run_after_in_shell(shell, "load", "train")
    losses = losses_of(shell.user_ns["trainer"])

    model = weakref.ref(shell.user_ns["model"])
    run_in_shell(shell, "parameters", "load", **tiny_parameters(place, "cut", **changes))
    say_if_alive(found, model, "The model of an earlier run is in memory after `load`.")
    found["GB after `load`"]["with an earlier run in memory"] = allocated_gb()
    run_after_in_shell(shell, "load", "share-prompts")
    found["GB before `train`"] = {"first": allocated_gb()}
    interrupt_once(shell.user_ns["trainer"], step=steps // 2)
    try:
        run_after_in_shell(shell, "share-prompts", "train")
        found["wrong"].append("The training was not interrupted.")
    except Interrupted as error:
        found["interrupted by"] = str(error)
    found["GB before `train`"]["interrupted"] = allocated_gb()

    try_largest_batch = shell.user_ns["try_largest_batch"]

    def measure_first(*arguments):
        found["GB before `train`"]["again"] = allocated_gb()
        try_largest_batch(*arguments)

    shell.user_ns["try_largest_batch"] = measure_first
    run_in_shell(shell, "train", "train")
    cut = losses_of(shell.user_ns["trainer"])
    found["losses"] = {"uncut": losses, "interrupted": cut}
    if len(cut) == len(losses):
        difference = max(abs(x - y) for x, y in zip(losses, cut, strict=True))
        found["losses differ by"] = difference
        if difference > 0.02:
            found["wrong"].append(f"The losses differ by {difference:.3f} from an uncut run's.")
    else:
        found["wrong"].append(f"{len(cut)} steps were logged, not {len(losses)}.")

    model = weakref.ref(shell.user_ns["model"])
    run_in_shell(shell, "load", "load")
    say_if_alive(found, model, "The trained model is in memory after `load` was run again.")
    found["GB after `load`"]["again"] = allocated_gb()
    find_what_is_left(found, shell.user_ns["adapter_size"])
    return found


def say_if_alive(found, reference, sentence):
    """Adds a sentence to "wrong" if what a weak reference points to is still in memory."""
    gc.collect()
    if reference() is not None:
        found["wrong"].append(sentence)


def run_after_in_shell(shell, cell, last):
    from rehearsal.notebook import CELLS

    names = list(CELLS)
    run_in_shell(shell, names[names.index(cell) + 1], last)


def find_what_is_left(found, adapter_size):
    """Adds to "wrong" if the memory of an interrupted step was not given back."""
    before = found["GB before `train`"]
    if before["first"] is None:  # no GPU
        return
    # Gradients and the optimizer's two moments may stay until the training begins anew.
    if before["again"] > before["first"] + gigabytes(12 * adapter_size) + 0.01:
        found["wrong"].append("An interrupted step is still in memory when `train` begins again.")


# 6. A base that overflows in fp16


def make_overflowing(source, folder):
    """A copy of a model whose first layer gives numbers above 65,504, and is sound in bfloat16."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"] *= 1000
    weights["model.layers.0.mlp.down_proj.weight"] *= 10000
    save_file(weights, path, metadata={"format": "pt"})


def check_overflow(place):
    """On a card without bfloat16, a base that overflows ends in a sentence before training."""
    from rehearsal.notebook import run_cell

    parameters = tiny_parameters(place, "run-overflow")
    overflowing = place.work / "overflowing"
    make_overflowing(parameters["base_model"], overflowing)
    parameters["base_model"] = str(overflowing)
    found = {"wrong": []}
    with imitated_t4():
        # Without a GPU float16 is not what the notebook would choose.
        notebook = prepare(parameters, precision=torch.float16)
        try:
            run_cell("before", notebook)
            found["wrong"].append("The cell `before` found nothing wrong with it.")
        except ValueError as error:
            found["said"] = str(error)
            if "gives no numbers in torch.float16" not in str(error):
                found["wrong"].append("Another sentence was expected.")
    if not place.rehearse:
        torch.cuda.synchronize()  # where an assertion on the device would show
    return found


CHECKS = (
    Check("addmm", check_addmm, 60),
    Check("head", check_head, 90),
    Check("attention", check_attention, 120),
    Check("rehearsal", check_rehearsal, 240),
    Check("write-7b", make_7b, 120),
    Check("7b", check_7b, 180),
    Check("7b-stock", check_7b_stock, 150),
    Check("7b-40", check_7b_40, 150),
    Check("7b-24", check_7b_24, 150),
    Check("t4", check_t4, 180),
    Check("interrupt", check_interrupt, 120),
    Check("overflow", check_overflow, 90),
)


# Running the checks, and writing down what they found


def last_line(path):
    """The last line that a process wrote, or a word that it wrote none."""
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


def child(function, place, result, log):
    """What a check's process does: what it prints goes to one file, what it finds to another."""
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(place.work)
    try:
        found = function(place)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # threads of a library that failed could keep the process from ending
    result.write_text(json.dumps(found), encoding="utf-8")


def run_check(check, place, output, seconds):
    """Runs a check in a process of its own, for so many seconds at most.

    Returns what it found with its "seconds", or {"error": sentence, "seconds": ...}.
    """
    start = time.monotonic()
    result, log = place.work / f"{check.name}.found.json", output / f"{check.name}.log"
    result.unlink(missing_ok=True)
    # A process that was forked could not use a GPU; a rehearsal saves importing everything anew.
    context = multiprocessing.get_context("forkserver" if place.rehearse else "spawn")
    process = context.Process(target=child, args=(check.function, place, result, log), daemon=True)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        found = {"error": f"stopped after {seconds:.0f} s. {last_line(log)}"}
    elif process.exitcode != 0 or not result.exists():
        found = {"error": f"died (exit status {process.exitcode}). {last_line(log)}"}
    else:
        found = json.loads(result.read_text(encoding="utf-8"))
    found["seconds"] = round(time.monotonic() - start, 1)
    return found


def run_checks(checks, place, output, minutes, about=None):
    """Runs checks one after the other and writes gpu.json and gpu.md after each.

    minutes: of all of them. What would begin later is left out, what still runs then is stopped.
    about: what stands above the results. Returns {name of the check: what it found}.
    """
    deadline = time.monotonic() + 60 * minutes
    found = {}
    for check in checks:
        left = deadline - time.monotonic()
        if left < 1:
            found[check.name] = {"error": "not run: no time was left", "seconds": 0}
        else:
            patience = 4 if place.rehearse else 1  # a CPU may be slow, and shared
            seconds = min(patience * check.seconds, left)
            found[check.name] = run_check(check, place, output, seconds)
        print(f"{check.name}: {in_short(found[check.name])}", flush=True)
        content = {**(about or {}), "checks": found}
        (output / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (output / "gpu.md").write_text(in_markdown(about or {}, found), encoding="utf-8")
    return found


def in_short(found):
    """A check's outcome in one line."""
    if "error" in found:
        outcome = found["error"]
    elif found["wrong"]:
        outcome = "WRONG: " + " ".join(found["wrong"])
    else:
        outcome = "nothing wrong"
    return f"{outcome} ({found['seconds']} s)"


def shown(value):
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(shown(part) for part in value)
    if isinstance(value, dict):
        return "; ".join(f"{name}: {shown(part)}" for name, part in value.items())
    return str(value).replace("|", "/").replace("\n", " ")


def table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def in_markdown(about, checks):
    """All results as Markdown: one line for each check, then each with what it measured."""
    overview = [[name, in_short(found)] for name, found in checks.items()]
    parts = ["# What a GPU tells", shown(about), table(["check", "outcome"], overview)]
    for name, found in checks.items():
        single = []
        tables = []
        for key, value in found.items():
            if key in ("wrong", "error", "seconds"):
                continue
            if isinstance(value, list) and value and isinstance(value[0], dict):
                cells = [[shown(cell) for cell in row.values()] for row in value]
                tables.append(table(list(value[0]), cells))
            else:
                single.append([key, shown(value)])
        if single or tables:
            parts.append(f"## {name}")
        if single:
            parts.append(table(["measured", "found"], single))
        parts += tables
    return "\n\n".join(parts) + "\n"


def describe_machine(rehearse):
    """The date, the card as nvidia-smi knows it, and the versions of the libraries."""
    card = "a CPU, with small shapes"
    if not rehearse:
        # In a process of its own, so that this one takes no memory of the card.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            card = pool.apply(describe_card)
    versions = {name: version(name) for name in LIBRARIES}
    return {"date": datetime.date.today().isoformat(), "machine": card, "versions": versions}


def describe_card():
    card = torch.cuda.get_device_properties()
    memory = gigabytes(card.total_memory)
    return f"{card.name}, compute capability {card.major}.{card.minor}, {memory} GB"


def main(arguments=None):
    names = [check.name for check in CHECKS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=14, help="minutes that all checks may take, 14 by default"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-checks"), help="folder for gpu.json and gpu.md"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder for models and runs, 35 GB, kept for another time; else a temporary one",
    )
    parser.add_argument("--checks", nargs="+", choices=names, help="only these, in their order")
    parser.add_argument("--rehearse", action="store_true", help="small shapes, on a CPU")
    options = parser.parse_args(arguments)

    os.environ.update(ENVIRONMENT)
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        multiprocessing.set_forkserver_preload(["trl.trainer.dpo_trainer", "bitsandbytes", "peft"])
    elif not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here: add --rehearse to try the checks on a CPU.")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    chosen = [check for check in CHECKS if check.name in (options.checks or names)]
    with contextlib.ExitStack() as stack:
        folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-"))
        work = Path(folder).resolve()
        work.mkdir(parents=True, exist_ok=True)
        about = describe_machine(options.rehearse)
        run_checks(chosen, Place(work, options.rehearse), output, options.minutes, about)
    print(f"{output / 'gpu.md'} has it all.")


if __name__ == "__main__":
    main()
