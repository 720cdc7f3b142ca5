"""Measures how long a file of preference pairs takes to become a built trainer, by the notebook and by stock TRL.

    python benchmarks/prepare.py [--rows 12859]      # a GPU is of no use here

Both ways run one after the other, each in a process of its own on one core, on the same rows: pieces of Python's own
documentation in the token lengths of Intel/orca_dpo_pairs, for SmolLM2's tokenizer. The model is tiny, so that only the
pairs take time. Loading the model is left out, and so are the imports.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
SYSTEM = "You are a helpful assistant, who always provides explanation."
os.environ |= dict(
    TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", TQDM_DISABLE="1", MPLBACKEND="Agg"
)


def make(folder, count):
    """A tiny model with SmolLM2's tokenizer, and `count` rows with the columns of Intel/orca_dpo_pairs."""
    from speed import draw_lengths
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from rehearsal.real import make_real_model

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
        for lengths in draw_lengths("orca", count, 0):
            row = dict(
                zip(("question", "chosen", "rejected"), map(text, lengths), strict=True),
                system=SYSTEM,
            )
            file.write(json.dumps(row) + "\n")


def by_notebook(folder):
    """Seconds from the file to the built trainer, and the rows that are left."""
    import bitsandbytes  # noqa: F401
    import trl  # noqa: F401

    from rehearsal.notebook import run_cells

    parameters = dict(
        base_model=str(folder / "tiny"), dataset_id=str(folder / "pairs.jsonl"), load_in_4bit=False
    )
    nb = run_cells(
        "install", "base", **parameters, output_dir=str(folder / "run"), push_to_hub=False
    )
    start = time.perf_counter()
    run_cells("load-pairs", "score", nb)
    stop = time.perf_counter()
    model = nb["load_4bit"](nb["base_model"], nb["dtype"], quantise=False)
    go_on = time.perf_counter()
    nb["make_trainer"](model)
    return time.perf_counter() - go_on + stop - start, len(nb["rows"])


def by_stock(folder):
    """The same with datasets and TRL alone, as their documentation has it."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    def messages(row):
        turns = [
            {"role": "system", "content": row["system"]},
            {"role": "user", "content": row["question"]},
        ]
        answers = {
            name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")
        }
        return {"prompt": turns, **answers}

    model, tokenizer = (
        load.from_pretrained(folder / "tiny") for load in (AutoModelForCausalLM, AutoTokenizer)
    )
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
    pairs = pairs.map(messages, remove_columns=["question", "system"]).train_test_split(
        128, seed=42
    )
    data = dict(
        train_dataset=pairs["train"], eval_dataset=pairs["test"], processing_class=tokenizer
    )
    DPOTrainer(model, args=settings, peft_config=LoraConfig(target_modules="all-linear"), **data)
    return time.perf_counter() - start, len(pairs["train"]) + len(pairs["test"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=12859)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, folder = arguments.child
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        with contextlib.redirect_stdout(io.StringIO()):
            seconds, kept = dict(notebook=by_notebook, stock=by_stock)[way](Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        each = 1e3 * seconds / arguments.rows
        print(
            f"{way}: {seconds:.1f} s, {each:.2f} ms a row, {kept} rows of {arguments.rows}, {peak:.2f} GB at most"
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), arguments.rows)
            for way in ("stock", "notebook"):
                command = [
                    sys.executable,
                    __file__,
                    "--rows",
                    str(arguments.rows),
                    "--child",
                    way,
                    folder,
                ]
                subprocess.run(command, check=True)
