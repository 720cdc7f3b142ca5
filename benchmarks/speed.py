"""Measures the notebook against the recipe of January 2024 and against stock TRL, side by side.

    python benchmarks/speed.py --device cpu                  # a small model, large enough for matrix products to dominate
    python benchmarks/speed.py --device cuda                 # the 7B shape of OpenHermes-2.5, random weights, 4 bits
    python benchmarks/speed.py --device cuda --caps          # the notebook's plan under the memory of smaller cards

Four variants train on the same pairs in the same steps, each in a process of its own, one after the other, in rounds:
    recipe      the recipe of January 2024 in today's TRL: batch 4, gradient checkpointing, a second model as reference
    stock       TRL with its defaults: batch 4, gradient checkpointing, the adapter switched off for the reference
    stock-kept  the same without gradient checkpointing, where memory allows that
    notebook    the cells of dpo_finetune.ipynb, from its parameters to its training
and, on a GPU, notebook-tight: the same planned with no more memory than the recipe took.
Weights are random and texts are random words: speed and memory do not depend on what a model has learnt. Step times leave
out the first step, evaluation and saving. On a CPU, glibc is told to keep the memory that it has. Nothing is downloaded.
A cap tests memory and, at 16 GB, fp16; which kernels PyTorch takes on such a card it cannot show.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIANTS = ("recipe", "stock", "stock-kept", "notebook", "notebook-tight")
# Tokens of 80 pairs of Intel/orca_dpo_pairs, ChatML included: shares of the pairs, and the length each stays under.
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
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def draw_lengths(mix, count, seed):
    """`count` triples of token counts (prompt, chosen, rejected), each drawn between the quantiles of a mix."""
    rng = random.Random(seed)

    def draw(quantiles):
        u = rng.random()
        i = next(i for i in range(1, len(SHARES)) if u <= SHARES[i])
        part = (u - SHARES[i - 1]) / (SHARES[i] - SHARES[i - 1])
        return max(1, round(quantiles[i - 1] + part * (quantiles[i] - quantiles[i - 1])))

    return [tuple(draw(quantiles) for quantiles in MIXES[mix]) for _ in range(count)]


def write_pairs(path, mix, count, vocabulary, seed=0):
    """Pairs of random words whose token counts are those of a mix. A word is a token; the template adds five to a prompt."""
    rng = random.Random(seed)
    words = lambda n: " ".join(f"w{rng.randrange(vocabulary - 9)}" for _ in range(max(1, n)))  # noqa: E731
    with open(path, "w") as file:
        for prompt, chosen, rejected in draw_lengths(mix, count, seed):
            pair = dict(
                question=words(prompt - 5), chosen=words(chosen - 1), rejected=words(rejected - 1)
            )
            file.write(json.dumps(pair) + "\n")


def write_model(folder, device):
    """A Mistral of the shape for this device with random weights, and a tokenizer whose tokens are words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

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
    """The measured ceiling: operations per second of one large matrix product, in the precision that is trained in."""
    import torch

    size, dtype, repeats = 3072, torch.float32, 5
    if device == "cuda":
        size, repeats = 8192, 50
        dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        a @ b
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    wait()
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def run_variant(variant, parameters, cap):
    """Trains one variant in this process. Returns what was measured."""
    import gc

    import nbformat
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    cuda = torch.cuda.is_available()
    source = nbformat.read(ROOT / "dpo_finetune.ipynb", as_version=4)
    cells = {cell.id: cell.source for cell in source.cells if cell.cell_type == "code"}
    notebook = {"__name__": "notebook"}

    def run(first, last):
        for name in list(cells)[list(cells).index(first) : list(cells).index(last) + 1]:
            exec(compile(cells[name], name, "exec"), notebook)
            if name == "parameters":
                notebook.update(parameters)
            if name == "machine" and cap and cap <= 16:
                notebook["dtype"] = torch.float16  # cards of this size cannot compute in bf16

    if cap:
        torch.cuda.set_per_process_memory_fraction(
            cap * 1e9 / torch.cuda.get_device_properties(0).total_memory
        )
    run("install", "score")
    computed, times = (
        [0, 0],
        [],
    )  # tokens with and without gradients; (seconds, tokens with, tokens without) of each step

    def count(module, inputs):
        computed[0 if torch.is_grad_enabled() else 1] += inputs[0].numel()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            self.started = time.perf_counter()

        def on_step_begin(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            self.start, self.before = time.perf_counter(), tuple(computed)

        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            grown = [now - before for now, before in zip(computed, self.before, strict=True)]
            times.append((time.perf_counter() - self.start, *grown))

        def on_train_end(self, *_, **__):
            self.total = time.perf_counter() - self.started
            self.peak = torch.cuda.max_memory_allocated() if cuda else None

    clock = Clock()

    def timed(trainer):
        for model in filter(None, (trainer.model, trainer.ref_model)):
            model.get_input_embeddings().register_forward_pre_hook(count)
        trainer.add_callback(clock)
        return trainer

    if variant.startswith("notebook"):
        make_trainer = notebook["make_trainer"]
        notebook["make_trainer"] = lambda model: timed(make_trainer(model))
        notebook["run"]["before"] = {"": ""}  # generating is no part of training
        run("train", "train")
        trainer = notebook["trainer"]
    else:

        class Tokenized(DPOTrainer):
            def _prepare_dataset(self, dataset, *_):
                return dataset

        name, dtype, in_4bit = (notebook[key] for key in ("base_model", "dtype", "load_in_4bit"))
        device_map, reference = {"": 0} if cuda else None, None
        if variant == "recipe":
            fp4 = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=dtype
            )
            settings = dict(
                dtype=dtype, quantization_config=fp4 if in_4bit else None, device_map=device_map
            )
            model, reference = (
                notebook["AutoModelForCausalLM"].from_pretrained(name, **settings) for _ in range(2)
            )
        else:
            model = notebook["load_4bit"](name, dtype, in_4bit, device_map=device_map)
        arguments = DPOConfig(
            output_dir=notebook["output_dir"],
            beta=notebook["beta"],
            max_length=notebook["max_length"],
            max_steps=notebook["max_steps"],
            learning_rate=notebook["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=notebook["warmup_steps"],
            per_device_train_batch_size=4,
            gradient_accumulation_steps=notebook["pairs_per_step"] // 4,
            gradient_checkpointing=variant != "stock-kept",
            optim="paged_adamw_32bit" if cuda else "adamw_torch",
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=not cuda,
            train_sampling_strategy="sequential",  # in the order that is made below
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=notebook["seed"],
        )
        # The notebook's pairs in the notebook's steps, in random order inside each.
        size, rng = notebook["pairs_per_step"], random.Random(1)
        steps = [notebook["order"][i : i + size] for i in range(0, len(notebook["order"]), size)]
        rank, alpha = notebook["lora_rank"], notebook["lora_alpha"]
        trainer = Tokenized(
            model=model,
            ref_model=reference,
            args=arguments,
            train_dataset=notebook["rows"].select(
                [i for step in steps for i in rng.sample(step, size)]
            ),
            processing_class=notebook["tokenizer"],
            peft_config=LoraConfig(
                r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        if variant != "recipe":  # as in the notebook, or the losses could not be compared
            for parameter in trainer.model.parameters():
                parameter.data = (
                    parameter.data.float() if parameter.requires_grad else parameter.data
                )
        gc.collect()
        timed(trainer).train()

    rows = [
        trainer.train_dataset[i]
        for i in range(notebook["pairs_per_step"], len(trainer.train_dataset))
    ]
    real = sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in rows
    )
    seconds, with_gradient, without = (sum(column) for column in zip(*times[1:], strict=True))
    head = trainer.model.get_output_embeddings()
    weights = sum(
        module.in_features * module.out_features
        for name, module in trainer.model.named_modules()
        if name.endswith("_proj.base_layer") and module is not head
    )
    peak = clock.peak
    if not cuda:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return dict(
        step_seconds=[step[0] for step in times],
        pairs_per_second=len(rows) / seconds,
        tokens_per_real_token=with_gradient / real,
        # Forward and backward through frozen weights, and the forward pass of the reference. What checkpointing
        # computes again, attention and the LM head are not counted.
        operations_per_second=2 * weights * (2 * with_gradient + without) / seconds,
        peak_bytes=peak,
        train_seconds=clock.total,
        batch=trainer.args.per_device_train_batch_size,
        checkpointing=trainer.args.gradient_checkpointing,
        layers_checkpointed=float(notebook["again"]) if variant.startswith("notebook") else None,
        predicted_bytes=float(notebook["needs"].max()),
        losses=[entry["loss"] for entry in history],
        margins=[entry["rewards/margins"] for entry in history],
        grad_norms=[entry["grad_norm"] for entry in history],
        eval_losses=[
            entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
        ],
    )


def start_child(job, environment=None, **options):
    """Runs a part of this script in a process of its own. Raises CalledProcessError if it fails."""
    subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(job)],
        env=environment,
        check=True,
        **options,
    )


def measure(variant, folder, parameters, device, cap=None):
    """What a variant measured in a process of its own, or {"error": str}."""
    environment = dict(
        os.environ, HF_HUB_OFFLINE="1", HF_TOKEN="", HF_TOKEN_PATH=os.devnull, WANDB_API_KEY=""
    )
    environment.update(
        MPLBACKEND="Agg", TQDM_DISABLE="1", PYTHONWARNINGS="ignore", TOKENIZERS_PARALLELISM="false"
    )
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # glibc gives large blocks back at once and asks for them again, which would be much of what is measured here.
        environment.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40))
    else:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(
            ","
        )[0]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        settings, result = (
            dict(parameters, output_dir=str(Path(place, "run"))),
            Path(place, "result"),
        )
        job = dict(variant=variant, parameters=settings, cap=cap, result=str(result))
        try:
            start_child(job, environment, cwd=place, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            return dict(error=(error.stderr.strip().splitlines() or ["no message"])[-1])
        return json.loads(result.read_text())


def difference(a, b, name):
    """The largest difference of a metric between two runs, relative to its largest value."""
    return max(abs(x - y) for x, y in zip(a[name], b[name], strict=True)) / max(
        map(abs, [*a[name], 1e-30])
    )


def table(header, rows):
    return "\n".join(
        "| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)
    )


def report(results, rate):
    """The Markdown tables of all that was measured."""
    parts = []
    for mix, variants in results.items():
        rows = []
        for name, runs in variants.items():
            best = max(runs, key=lambda run: run["pairs_per_second"])
            steps = sorted(best["step_seconds"][1:])
            rows.append(
                [
                    name,
                    " / ".join(f"{run['pairs_per_second']:.3f}" for run in runs),
                    f"{best['tokens_per_real_token']:.2f}",
                    f"{steps[len(steps) // 2]:.2f}",
                    f"{max(run['peak_bytes'] for run in runs) / 1e9:.2f}",
                    f"{best['operations_per_second'] / rate:.0%}",
                    f"{best['batch']}, {'on' if best['checkpointing'] else 'off'}",
                ]
            )
        header = [
            "variant",
            "pairs/s, each round",
            "tokens per real token",
            "s per step",
            "peak GB",
            "of matmul rate",
        ]
        lines = [table([*header, "batch, checkpointing"], rows), ""]
        parts.append(f"### {mix}\n\n" + "\n".join(lines))
        if not (ours := variants.get("notebook")):
            continue
        speed = lambda runs: sum(run["pairs_per_second"] for run in runs) / len(runs)  # noqa: E731
        for name in variants:
            if name != "notebook":
                lines.append(
                    f"- notebook / {name}: {speed(ours) / speed(variants[name]):.2f} times the pairs per second"
                )
        stock = [runs[0] for name, runs in variants.items() if name.startswith("stock")]
        for metric in ("losses", "margins", "grad_norms") if stock else ():
            largest = max(difference(run, ours[0], metric) for run in stock)
            lines.append(
                f"- largest difference to stock in {metric}, relative to the largest value: {largest:.1e}"
            )
        parts[-1] = f"### {mix}\n\n" + "\n".join(lines)
    return "\n\n".join(parts)


def draw(results, path):
    """Bars of pairs per second, one group for each mix, relative to stock TRL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.5))
    mean = lambda runs: sum(run["pairs_per_second"] for run in runs) / len(runs)  # noqa: E731
    names = [name for name in VARIANTS if any(name in variants for variants in results.values())]
    for i, name in enumerate(names):
        bars = {
            x + (i - (len(names) - 1) / 2) * 0.8 / len(names): mean(variants[name])
            / mean(variants["stock"])
            for x, variants in enumerate(results.values())
            if name in variants
        }
        axes.bar(bars.keys(), bars.values(), width=0.75 / len(names), label=name)
    axes.set_xticks(range(len(results)), list(results))
    axes.set(
        ylabel="pairs per second, stock TRL = 1", title="Training speed by lengths of the pairs"
    )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(arguments, folder):
    import psutil
    import torch

    device, base = arguments.device, folder / f"model-{arguments.device}"
    output, stem = (
        Path(arguments.output).resolve(),
        f"speed-{device}" + ("-caps" if arguments.caps else ""),
    )
    output.mkdir(parents=True, exist_ok=True)
    # In processes of their own, so that the memory of the GPU is given back.
    if not (base / "config.json").exists():
        print(f"writing a model with random weights to {base}", flush=True)
        start_child(dict(model=str(base), device=device))
    rate = start_child(dict(rate=str(folder / "rate"), device=device)) or json.loads(
        (folder / "rate").read_text()
    )
    card = (
        torch.cuda.get_device_name(0)
        if device == "cuda"
        else platform.processor() or platform.machine()
    )
    found = dict(
        date=datetime.date.today().isoformat(),
        machine=f"{card}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB",
        command=shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        python=platform.python_version(),
        versions={
            name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")
        },
        matmul_operations_per_second=rate,
        results={},
        errors={},
    )
    steps = arguments.steps or (12 if device == "cuda" else 3)
    jobs = []  # (mix, round, name, variant, changed parameters, cap)
    for mix in ["orca"] if arguments.caps else arguments.mixes:
        if arguments.caps:
            whole = torch.cuda.get_device_properties(0).total_memory / 1e9
            caps = [cap for cap in (16, 24, 40, 80) if cap <= whole]
            jobs += [(mix, 0, f"{cap} GB", "notebook", dict(gpu_memory=cap), cap) for cap in caps]
            continue
        variants = arguments.variants or [
            # On a mix that nobody trains on, stock TRL and ours say what there is to say.
            name
            for name in VARIANTS
            if mix == "orca" or name not in ("recipe", "notebook-tight")
        ]
        for number in range(arguments.rounds if mix == "orca" else 1):
            jobs += [(mix, number, name, name, {}, None) for name in variants]

    for mix, number, name, variant, changes, cap in jobs:
        pairs, per_step = folder / f"{mix.replace(' ', '-')}.jsonl", 16 if mix == "orca" else 4
        write_pairs(pairs, mix, 2 * (steps * per_step + 16), SHAPES[device]["vocab_size"])
        runs = found["results"].setdefault(mix, {})
        if name == "notebook-tight":
            if device == "cpu" or not runs.get("recipe"):
                continue  # no memory to be held to
            changes = dict(gpu_memory=runs["recipe"][-1]["peak_bytes"] / 1e9)
        parameters = dict(
            base_model=str(base),
            dataset_id=str(pairs),
            eval_pairs=16,
            load_in_4bit=device == "cuda",
            max_steps=steps,
            # So that losses and margins move, and have something to differ in, from the second step on.
            learning_rate=2e-3,
            warmup_steps=1,
            pairs_per_step=per_step,
            push_to_hub=False,
        )
        start = time.time()
        run = measure(variant, folder, parameters | changes, device, cap)
        if "error" in run:
            found["errors"][f"{mix}, {name}"] = line = run["error"]
        else:
            runs.setdefault(name, []).append(run)
            line = f"{run['pairs_per_second']:.3f} pairs/s, {run['train_seconds']:.0f} s of training and evaluation"
        print(
            f"{mix}, round {number + 1}, {name}: {line}, {time.time() - start:.0f} s in all",
            flush=True,
        )
        (output / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")

    print("\n" + report(found["results"], rate))
    if all("stock" in runs for runs in found["results"].values()):
        draw(found["results"], output / f"{stem}.png")
    print(
        f"\n{found['date']}, {found['machine']}, matmul {rate / 1e12:.3g} TFLOP/s; {found['versions']}"
    )
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
        help="of a run, the first not timed; 3 on a CPU and 12 on a GPU by default",
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
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        job = json.loads(arguments.child)
        if "model" in job:
            write_model(job["model"], job["device"])
        elif "rate" in job:
            Path(job["rate"]).write_text(json.dumps(matmul_rate(job["device"])))
        else:
            found = run_variant(job["variant"], job["parameters"], job["cap"])
            Path(job["result"]).write_text(json.dumps(found))
    elif arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
        main(arguments, Path(arguments.folder).resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="speed-") as temporary:
            main(arguments, Path(temporary))
