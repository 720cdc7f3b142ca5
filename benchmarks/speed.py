"""Measures the notebook against the recipe of January 2024 and against stock TRL, side by side.

    python benchmarks/speed.py --device cpu            # a small model, on which products dominate
    python benchmarks/speed.py --device cuda           # the shape of OpenHermes-2.5 7B, 4 bits
    python benchmarks/speed.py --device cuda --caps    # the notebook in the memory of smaller cards

Variants train on the same pairs in the same steps, each in a process of its own, one after the
other, in rounds:
    recipe      the recipe of January 2024 in today's TRL: batch 4, gradient checkpointing, and a
                second model as reference
    stock       TRL with its defaults: batch 4, gradient checkpointing, the adapter switched off
                for the reference
    stock-kept  the same without gradient checkpointing, where memory allows that
    stock-precomputed  as stock, with precompute_ref_log_probs: of the small set
    notebook    the cells of dpo_finetune.ipynb, from its parameters to its training
and, on a GPU, notebook-tight: the same planned with no more memory than the recipe took. Weights
are random and texts are random words: speed and memory do not depend on what a model has learnt.
Step times leave out the first step, evaluation and saving; of the small set the first step is
timed too, as is what is computed before it, since that is where references are computed. On a
CPU, glibc is told to keep the memory that it has. Nothing is downloaded. A cap tests memory and,
at 16 GB, fp16; which kernels PyTorch takes on such a card it cannot show.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import random
import resource
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from rehearsal.notebook import run_cells  # noqa: E402

VARIANTS = ("recipe", "stock", "stock-kept", "stock-precomputed", "notebook", "notebook-tight")
STOCK_BATCH = 4
# Tokens of 80 pairs of Intel/orca_dpo_pairs, ChatML included: shares of the pairs, and the length
# each stays under.
SHARES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
MIXES = {  # prompt, chosen, rejected
    "orca": (
        (40, 53, 91, 121, 199, 602, 1317),
        (5, 12, 67, 193, 332, 578, 1022),
        (30, 47, 152, 288, 426, 558, 822),
    ),
    "all short": (
        (15, 16, 18, 22, 26, 29, 30),
        (5, 6, 8, 12, 16, 19, 20),
        (5, 6, 8, 12, 16, 19, 20),
    ),
    "all long": ((380, 382, 390, 400, 410, 418, 420),) + ((580, 582, 590, 600, 610, 618, 620),) * 2,
    "long prompts": ((800, 810, 850, 900, 950, 990, 1000),) + ((10, 11, 17, 25, 32, 38, 40),) * 2,
    "long answers": ((20, 21, 25, 30, 35, 39, 40),) + ((780, 781, 785, 790, 795, 799, 800),) * 2,
}
SMALL_SET = "small set"  # few pairs of the lengths of orca, that come back: all steps are timed
MIXES[SMALL_SET] = MIXES["orca"]
SMALL_SET_PAIRS, SMALL_SET_STEPS = 10, 16
SHAPES = {
    "cpu": dict(
        hidden_size=768,
        intermediate_size=2688,
        num_hidden_layers=3,
        num_attention_heads=12,
        vocab_size=1024,
    ),
    "cuda": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32002,
    ),
}
CHATML = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }}"
    " <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def draw_lengths(mix, count, seed):
    """`count` triples of token counts (prompt, chosen, rejected), each drawn between the quantiles
    of a mix.
    """
    rng = random.Random(seed)

    def draw(quantiles):
        u = rng.random()
        i = next(i for i in range(1, len(SHARES)) if u <= SHARES[i])
        part = (u - SHARES[i - 1]) / (SHARES[i] - SHARES[i - 1])
        return max(1, round(quantiles[i - 1] + part * (quantiles[i] - quantiles[i - 1])))

    return [tuple(draw(quantiles) for quantiles in MIXES[mix]) for _ in range(count)]


def write_pairs(path, mix, count, vocabulary, seed=0):
    """Pairs of random words whose token counts are those of a mix. A word is a token; the template
    adds five to a prompt.
    """
    rng = random.Random(seed)

    def words(count):
        return " ".join(f"w{rng.randrange(vocabulary - 9)}" for _ in range(max(1, count)))

    with open(path, "w") as file:
        for prompt, chosen, rejected in draw_lengths(mix, count, seed):
            pair = dict(
                question=words(prompt - 5), chosen=words(chosen - 1), rejected=words(rejected - 1)
            )
            file.write(json.dumps(pair) + "\n")


def write_model(folder, device):
    """A Mistral of the shape for this device with random weights, and a tokenizer whose tokens are
    words.
    """
    shape = SHAPES[device]
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant"]
    words = special + [f"w{i}" for i in range(shape["vocab_size"] - len(special))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        **shape, num_key_value_heads=shape["num_attention_heads"] // 4, sliding_window=4096
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        )
    model.save_pretrained(folder)


def matmul_rate(device):
    """The measured ceiling: operations per second of one large matrix product, in the precision
    that
    is trained in.
    """
    size, dtype, repeats = 3072, torch.float32, 5
    if device == "cuda":
        size, repeats = 8192, 50
        dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    wait_for_gpu()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    wait_for_gpu()
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def wait_for_gpu():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# One variant, in a process of its own.


class Clock(TrainerCallback):
    """Times the steps of a trainer, and counts the tokens that its models compute in them."""

    def __init__(self):
        self.with_gradient = self.without = 0  # tokens, from the beginning
        self.steps = []  # (seconds, tokens with gradients, tokens without) of each step
        self.total_seconds = self.peak_bytes = None

    def watch(self, trainer):
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                model.get_input_embeddings().register_forward_pre_hook(self.count)
        trainer.add_callback(self)

    def count(self, module, inputs):
        if torch.is_grad_enabled():
            self.with_gradient += inputs[0].numel()
        else:
            self.without += inputs[0].numel()

    def now(self):
        wait_for_gpu()
        return time.perf_counter(), self.with_gradient, self.without

    def on_train_begin(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def on_step_begin(self, *_, **__):
        self.begun = self.now()

    def on_step_end(self, *_, **__):
        grown = [now - before for now, before in zip(self.now(), self.begun, strict=True)]
        self.steps.append(tuple(grown))

    def on_train_end(self, *_, **__):
        self.total_seconds = time.perf_counter() - self.started
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()
        else:  # of the whole process
            self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class TokenizedTrainer(DPOTrainer):
    """TRL's trainer for rows that are token ids already; it knows how long its references took
    beforehand.
    """

    precompute_seconds = 0.0

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _precompute_ref_logps(self, *arguments):
        start = time.perf_counter()
        dataset = super()._precompute_ref_logps(*arguments)
        wait_for_gpu()
        self.precompute_seconds += time.perf_counter() - start
        return dataset


def plan_notebook(parameters, cap):
    """The notebook's namespace after its plan, before a model is loaded. cap: GB of a smaller card,
    or None.
    """
    nb = run_cells("install", "machine", **parameters)
    if cap and cap <= 16:
        nb["dtype"] = torch.float16  # cards of this size cannot compute in bf16
    return run_cells("run-folder", "memory-guard", nb)


def train_notebook(nb, clock):
    """Trains by the notebook's cells; returns the trainer. The base is not asked anything: that is
    no training.
    """
    run_cells("load", "questions", nb)
    nb["before"] = {}
    run_cells("training-args", "make-trainer", nb)
    clock.watch(nb["trainer"])
    run_cells("run-prompts-once", "train", nb)
    return nb["trainer"]


def load_models(variant, nb):
    """(model, reference or None) of a variant of TRL."""
    device_map = {"": 0} if torch.cuda.is_available() else None
    if variant != "recipe":
        load_4bit, quantise = nb["load_4bit"], nb["load_in_4bit"]
        return load_4bit(nb["base"], nb["dtype"], quantise, device_map=device_map), None
    fp4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_compute_dtype=nb["dtype"],
    )

    def load():
        return AutoModelForCausalLM.from_pretrained(
            nb["base"],
            dtype=nb["dtype"],
            quantization_config=fp4 if nb["load_in_4bit"] else None,
            device_map=device_map,
        )

    return load(), load()


def mixed_inside_steps(nb):
    """The notebook's pairs in the notebook's steps, in random order inside each."""
    size, order, rng = nb["pairs_per_step"], nb["order"], random.Random(1)
    mixed = []
    for start in range(0, len(order), size):
        mixed += rng.sample(order[start : start + size], size)
    return mixed


def stock_arguments(variant, nb):
    """TRL's settings for a variant, as the notebook's parameters have them."""
    on_gpu = torch.cuda.is_available()
    return DPOConfig(
        output_dir=nb["output_dir"],
        beta=nb["beta"],
        max_length=nb["max_length"],
        max_steps=nb["max_steps"],
        learning_rate=nb["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=nb["warmup_steps"],
        per_device_train_batch_size=STOCK_BATCH,
        gradient_accumulation_steps=nb["pairs_per_step"] // STOCK_BATCH,
        activation_checkpointing=variant != "stock-kept",
        precompute_ref_log_probs=variant == "stock-precomputed",
        precompute_ref_batch_size=STOCK_BATCH,
        optim="paged_adamw_32bit" if on_gpu else "adamw_torch",
        bf16=nb["dtype"] == torch.bfloat16,
        fp16=nb["dtype"] == torch.float16,
        use_cpu=not on_gpu,
        train_sampling_strategy="sequential",  # in the order that is made above
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=nb["seed"],
    )


def train_stock(variant, nb, clock):
    """Trains by TRL on the notebook's rows; returns the trainer."""
    model, reference = load_models(variant, nb)
    lora = LoraConfig(
        r=nb["lora_rank"],
        lora_alpha=nb["lora_alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    # References are computed of each pair that is trained on, and not each time that it is.
    order = mixed_inside_steps(nb)
    precomputed = variant == "stock-precomputed"
    places = sorted(set(order)) if precomputed else order
    trainer = TokenizedTrainer(
        model=model,
        ref_model=reference,
        args=stock_arguments(variant, nb),
        train_dataset=nb["rows"].select(places),
        processing_class=nb["tokenizer"],
        peft_config=lora,
    )
    if precomputed:
        place_of = {pair: place for place, pair in enumerate(places)}
        trainer.train_dataset = trainer.train_dataset.select([place_of[pair] for pair in order])
    if variant != "recipe":  # as in the notebook, or the losses could not be compared
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    gc.collect()
    clock.watch(trainer)
    trainer.train()
    return trainer


def frozen_weights(model):
    """How many numbers the linear layers have beside which there is an adapter."""
    head, count = model.get_output_embeddings(), 0
    for name, module in model.named_modules():
        if name.endswith("_proj.base_layer") and module is not head:
            count += module.in_features * module.out_features
    return count


def sequence_tokens(row):
    """Tokens of both sequences of a pair."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def run_variant(variant, parameters, cap=None, untimed_steps=1):
    """Trains one variant in this process. Returns what was measured.

    cap: GB of GPU memory to stay in, or None. untimed_steps: how many of the first are left out.
    """
    if cap:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / whole)
    nb, clock = plan_notebook(parameters, cap), Clock()
    by_notebook = variant.startswith("notebook")
    trainer = train_notebook(nb, clock) if by_notebook else train_stock(variant, nb, clock)

    split = nb["split"]
    timed = range(untimed_steps * nb["pairs_per_step"], len(trainer.train_dataset))
    rows = [trainer.train_dataset[place] for place in timed]
    columns = zip(*clock.steps[untimed_steps:], strict=True)
    seconds, with_gradient, without = [sum(column) for column in columns]
    seconds += getattr(trainer, "precompute_seconds", 0.0)
    # Forward and backward through frozen weights, and the forward pass of the reference. What
    # checkpointing computes again, attention and the LM head are not counted.
    operations = 2 * frozen_weights(trainer.model) * (2 * with_gradient + without)
    return dict(
        step_seconds=[step[0] for step in clock.steps],
        pairs_per_second=len(rows) / seconds,
        tokens_per_real_token=with_gradient / sum(map(sequence_tokens, rows)),
        operations_per_second=operations / seconds,
        peak_bytes=clock.peak_bytes,
        train_seconds=clock.total_seconds,
        batch=trainer.args.per_device_train_batch_size,
        checkpointing=bool(trainer.args.activation_checkpointing),
        layers_checkpointed=float(split.checkpointed_layers.mean()) if by_notebook else None,
        predicted_bytes=float(nb["fixed_bytes"] + split.most_bytes),
        losses=logged(trainer, "loss"),
        margins=logged(trainer, "rewards/margins"),
        grad_norms=logged(trainer, "grad_norm"),
        eval_losses=logged(trainer, "eval_loss"),
    )


def in_own_process(function, *arguments, environment=None):
    """What a function of this module returns in a process of its own, with these environment
    variables.
    """
    with mock.patch.dict(os.environ, environment or {}):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()


def environment_for(device):
    """The environment of a measurement: no account, no network, nothing shown."""
    environment = dict(
        HF_HUB_OFFLINE="1",
        HF_TOKEN="",
        HF_TOKEN_PATH=os.devnull,
        WANDB_API_KEY="",
        MPLBACKEND="Agg",
        TQDM_DISABLE="1",
        PYTHONWARNINGS="ignore",
        TOKENIZERS_PARALLELISM="false",
    )
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
        return dict(environment, CUDA_VISIBLE_DEVICES=visible[0])
    # glibc gives large blocks back at once and asks for them again, which would be much of what is
    # measured here.
    keep = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40))
    return dict(environment, CUDA_VISIBLE_DEVICES="", **keep)


def run_quietly(place, variant, parameters, cap, untimed_steps):
    """`run_variant` in a folder, without what its cells print."""
    os.chdir(place)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return run_variant(variant, parameters, cap, untimed_steps)


def measure(job, folder, parameters, device):
    """What a variant measured in a process of its own, or {"error": str}."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        settings = dict(parameters, output_dir=str(Path(place, "run")))
        untimed_steps = 0 if job.mix == SMALL_SET else 1
        arguments = place, job.variant, settings, job.cap, untimed_steps
        try:
            return in_own_process(run_quietly, *arguments, environment=environment_for(device))
        except Exception as error:  # whatever a variant ends in, the others are measured
            return dict(error=f"{type(error).__name__}: {error}".strip().splitlines()[0])


def difference(first, second, name):
    """The largest difference of a metric between two runs, relative to its largest value."""
    largest = max([1e-30, *map(abs, first[name]), *map(abs, second[name])])
    return max(abs(a - b) for a, b in zip(first[name], second[name], strict=True)) / largest


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean_speed(runs):
    return sum(run["pairs_per_second"] for run in runs) / len(runs)


def row_of(name, runs, rate):
    """What is told of a variant: all rounds' speed, and the best one's details."""
    best = max(runs, key=lambda run: run["pairs_per_second"])
    steps = sorted(best["step_seconds"][1:])
    return [
        name,
        " / ".join(f"{run['pairs_per_second']:.3f}" for run in runs),
        f"{best['tokens_per_real_token']:.2f}",
        f"{steps[len(steps) // 2]:.2f}",
        f"{max(run['peak_bytes'] for run in runs) / 1e9:.2f}",
        f"{best['operations_per_second'] / rate:.0%}",
        f"{best['batch']}, {'on' if best['checkpointing'] else 'off'}",
    ]


HEADER = [
    "variant",
    "pairs/s, each round",
    "tokens per real token",
    "s per step",
    "peak GB",
    "of matmul rate",
    "batch, checkpointing",
]


def comparisons(variants):
    """Sentences on the notebook beside the others."""
    ours, lines = variants["notebook"], []
    for name, runs in variants.items():
        if name != "notebook":
            times = mean_speed(ours) / mean_speed(runs)
            lines.append(f"- notebook / {name}: {times:.2f} times the pairs per second")
    stock = [runs[0] for name, runs in variants.items() if name.startswith("stock")]
    for metric in ("losses", "margins", "grad_norms") if stock else ():
        largest = max(difference(run, ours[0], metric) for run in stock)
        what = f"largest difference to stock in {metric}, relative to the largest value"
        lines.append(f"- {what}: {largest:.1e}")
    return lines


def report(results, rate):
    """The Markdown tables of all that was measured."""
    parts = []
    for mix, variants in results.items():
        rows = [row_of(name, runs, rate) for name, runs in variants.items()]
        lines = [f"### {mix}", "", table(HEADER, rows), ""]
        if "notebook" in variants:
            lines += comparisons(variants)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(results, path):
    """Bars of pairs per second, one group for each mix, relative to stock TRL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.5))
    names = [name for name in VARIANTS if any(name in variants for variants in results.values())]
    middle = (len(names) - 1) / 2
    for bar, name in enumerate(names):
        places, heights = [], []
        for group, variants in enumerate(results.values()):
            if name in variants:
                places.append(group + (bar - middle) * 0.8 / len(names))
                heights.append(mean_speed(variants[name]) / mean_speed(variants["stock"]))
        axes.bar(places, heights, width=0.75 / len(names), label=name)
    axes.set_xticks(range(len(results)), list(results))
    axes.set_ylabel("pairs per second, stock TRL = 1")
    axes.set_title("Training speed by lengths of the pairs")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")


# All measurements, one after the other.


@dataclass
class Job:
    """One measurement."""

    mix: str
    round: int
    name: str  # in the tables
    variant: str
    changes: dict = field(default_factory=dict)  # of parameters
    cap: float = None  # GB of GPU memory

    @property
    def pairs_per_step(self):
        return 16 if self.mix == "orca" else 4


def variants_of(mix):
    """On a mix that nobody trains on, stock TRL and ours say what there is to say."""
    if mix == "orca":
        return ["recipe", "stock", "stock-kept", "notebook", "notebook-tight"]
    if mix == SMALL_SET:
        return ["stock", "stock-precomputed", "notebook"]
    return ["stock", "stock-kept", "notebook"]


def jobs_of(arguments):
    """The measurements that were asked for, in their order."""
    jobs = []
    if arguments.caps:
        whole = torch.cuda.get_device_properties(0).total_memory / 1e9
        for cap in (16, 24, 40, 80):
            if cap <= whole:
                changes = dict(gpu_memory=cap)
                jobs.append(Job("orca", 0, f"{cap} GB", "notebook", changes, cap))
        return jobs
    for mix in arguments.mixes:
        for number in range(arguments.rounds if mix == "orca" else 1):
            for variant in arguments.variants or variants_of(mix):
                jobs.append(Job(mix, number, variant, variant))
    return jobs


def steps_of(mix, arguments):
    if arguments.steps:
        return arguments.steps
    if mix == SMALL_SET:
        return SMALL_SET_STEPS
    return 12 if arguments.device == "cuda" else 3


def write_pairs_of(job, folder, steps, vocabulary):
    """The file of pairs for a measurement: 16 are held out, and some may be too long."""
    path = folder / f"{job.mix.replace(' ', '-')}.jsonl"
    count = 2 * (steps * job.pairs_per_step + 16)
    if job.mix == SMALL_SET:
        count = SMALL_SET_PAIRS + 16
    write_pairs(path, job.mix, count, vocabulary)
    return path


def parameters_of(job, base, pairs, steps, on_gpu):
    """The notebook's parameters for a measurement."""
    parameters = dict(
        base_model=str(base),
        dataset_id=str(pairs),
        eval_pairs=16,
        load_in_4bit=on_gpu,
        max_steps=steps,
        # So that losses and margins move, and have something to differ in, from the second step on.
        learning_rate=2e-3,
        warmup_steps=1,
        pairs_per_step=job.pairs_per_step,
        push_to_hub=False,
    )
    return {**parameters, **job.changes}


def describe_machine(arguments, rate):
    """When, where and with what was measured."""
    import psutil

    card = platform.processor() or platform.machine()
    if arguments.device == "cuda":
        card = torch.cuda.get_device_name(0)
    memory = psutil.virtual_memory().total / 1e9
    libraries = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    return dict(
        date=datetime.date.today().isoformat(),
        machine=f"{card}, {os.cpu_count()} cores, {memory:.0f} GB",
        command=shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        python=platform.python_version(),
        versions={name: version(name) for name in libraries},
        matmul_operations_per_second=rate,
    )


def held_to_the_recipe(job, runs):
    """A job of notebook-tight with as much memory as the recipe took; None if there is none to be
    held to.
    """
    if not runs.get("recipe"):
        return None
    gpu_memory = runs["recipe"][-1]["peak_bytes"] / 1e9
    return Job(job.mix, job.round, job.name, job.variant, dict(gpu_memory=gpu_memory))


def main(arguments, folder):
    on_gpu = arguments.device == "cuda"
    base, vocabulary = folder / f"model-{arguments.device}", SHAPES[arguments.device]["vocab_size"]
    output = Path(arguments.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    stem = f"speed-{arguments.device}" + ("-caps" if arguments.caps else "")
    # In processes of their own, so that the memory of the GPU is given back.
    if not (base / "config.json").exists():
        print(f"writing a model with random weights to {base}", flush=True)
        in_own_process(write_model, str(base), arguments.device)
    rate = in_own_process(matmul_rate, arguments.device)
    found = {**describe_machine(arguments, rate), "results": {}, "errors": {}}

    for job in jobs_of(arguments):
        runs = found["results"].setdefault(job.mix, {})
        if job.variant == "notebook-tight":
            job = held_to_the_recipe(job, runs) if on_gpu else None
            if job is None:
                continue
        steps = steps_of(job.mix, arguments)
        pairs = write_pairs_of(job, folder, steps, vocabulary)
        parameters = parameters_of(job, base, pairs, steps, on_gpu)
        start = time.time()
        run = measure(job, folder, parameters, arguments.device)
        if "error" in run:
            line = run["error"]
            found["errors"][f"{job.mix}, {job.name}"] = line
        else:
            runs.setdefault(job.name, []).append(run)
            speed, seconds = run["pairs_per_second"], run["train_seconds"]
            line = f"{speed:.3f} pairs/s, {seconds:.0f} s of training and evaluation"
        whole = time.time() - start
        which = f"{job.mix}, round {job.round + 1}, {job.name}"
        print(f"{which}: {line}, {whole:.0f} s in all", flush=True)
        (output / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")

    print("\n" + report(found["results"], rate))
    if all("stock" in runs for runs in found["results"].values()):
        draw(found["results"], output / f"{stem}.png")
    print(f"\n{found['date']}, {found['machine']}, matmul {rate / 1e12:.3g} TFLOP/s;", end=" ")
    print(found["versions"])
    print(found["command"])
    if found["errors"]:
        raise SystemExit(f"failed: {found['errors']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often each variant runs on the orca lengths"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="of a run; by default 3 on a CPU, 12 on a GPU, and 16 of the small set",
    )
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument(
        "--caps", action="store_true", help="the notebook under 16, 24, 40 and 80 GB of GPU memory"
    )
    parser.add_argument(
        "--folder", help="where model and pairs are made and kept; a temporary one by default"
    )
    parser.add_argument(
        "--output", default=str(Path(__file__).parent), help="where JSON and figure go"
    )
    arguments = parser.parse_args()
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
        main(arguments, Path(arguments.folder).resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="speed-") as temporary:
            main(arguments, Path(temporary))
