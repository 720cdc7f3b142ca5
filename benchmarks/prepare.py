"""Measures how long a file of preference pairs takes to become a built trainer, by the notebook and
by stock TRL.

    python benchmarks/prepare.py [--rows 12859]      # a GPU is of no use here

Both ways run one after the other, each in a process of its own on one core, on the same rows:
pieces of Python's own documentation in the token lengths of Intel/orca_dpo_pairs, for SmolLM2's
tokenizer. The model is tiny, so that only the pairs take time. Loading the model is left out, and
so are the imports.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.speed import draw_lengths, in_own_process  # noqa: E402
from rehearsal.notebook import run_cells  # noqa: E402
from rehearsal.real import make_real_model  # noqa: E402

SYSTEM = "You are a helpful assistant, who always provides explanation."
ENVIRONMENT = dict(
    TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", TQDM_DISABLE="1", MPLBACKEND="Agg"
)


def make(folder, count):
    """A tiny model with SmolLM2's tokenizer, and `count` rows with the columns of
    Intel/orca_dpo_pairs.
    """
    make_real_model(folder / "real")
    tokenizer = AutoTokenizer.from_pretrained(folder / "real")
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    prose = tokenizer("\n\n".join(topics.values()), add_special_tokens=False).input_ids
    rng = random.Random(0)

    def text(length):
        start = rng.randrange(len(prose) - length)
        return tokenizer.decode(prose[start : start + length])

    with open(folder / "pairs.jsonl", "w") as file:
        for prompt, chosen, rejected in draw_lengths("orca", count, 0):
            row = dict(
                system=SYSTEM, question=text(prompt), chosen=text(chosen), rejected=text(rejected)
            )
            file.write(json.dumps(row) + "\n")


def by_notebook(folder):
    """Seconds from the file to the built trainer, and the rows that are left."""
    nb = run_cells(
        "install",
        "sources",
        base_model=str(folder / "tiny"),
        dataset_id=str(folder / "pairs.jsonl"),
        output_dir=str(folder / "run"),
        load_in_4bit=False,
        push_to_hub=False,
    )
    start = time.perf_counter()
    run_cells("load-pairs", "memory-guard", nb)
    planned = time.perf_counter()
    run_cells("load", "questions", nb)
    nb["before"] = {}
    go_on = time.perf_counter()
    run_cells("training-args", "make-trainer", nb)
    return planned - start + time.perf_counter() - go_on, len(nb["rows"])


def messages(row):
    """A row in the conversational layout that TRL's documentation has."""
    answers = {}
    for name in ("chosen", "rejected"):
        answers[name] = [{"role": "assistant", "content": row[name]}]
    system = {"role": "system", "content": row["system"]}
    return {"prompt": [system, {"role": "user", "content": row["question"]}], **answers}


def by_stock(folder):
    """The same with datasets and TRL alone, as their documentation has it."""
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    settings = DPOConfig(
        output_dir=str(folder / "stock"),
        max_length=1536,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    start = time.perf_counter()
    pairs = load_dataset(
        "json",
        data_files=str(folder / "pairs.jsonl"),
        split="train",
        cache_dir=str(folder / "cache"),
    )
    pairs = pairs.map(messages, remove_columns=["question", "system"])
    pairs = pairs.train_test_split(128, seed=42)
    DPOTrainer(
        model,
        args=settings,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    return time.perf_counter() - start, len(pairs["train"]) + len(pairs["test"])


def measure(way, folder):
    """(seconds, rows that are left, peak memory of the process in GB) of one way, on one core, in
    this process.
    """
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        seconds, kept = way(folder)
    return seconds, kept, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=12859)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        in_own_process(make, folder, arguments.rows, environment=ENVIRONMENT)
        for name, way in (("stock", by_stock), ("notebook", by_notebook)):
            seconds, kept, peak = in_own_process(measure, way, folder, environment=ENVIRONMENT)
            each = 1e3 * seconds / arguments.rows
            print(
                f"{name}: {seconds:.1f} s, {each:.2f} ms a row, "
                f"{kept} rows of {arguments.rows}, {peak:.2f} GB at most"
            )
