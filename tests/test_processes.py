"""The notebook as a script on several processes, by the recipe's own commands: as if there were one, and survived."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch
import yaml
from forked import read
from safetensors.torch import load_file
from test_recipes import command
from trainers import SMALL
from transformers import LlamaConfig
from transformers.integrations import sdpa_attention

from rehearsal.hub import Hub
from rehearsal.notebook import ROOT, alone, run_cell

PARAMETERS = {**SMALL, "eval_pairs": 12, "pairs_per_step": 12, "max_steps": 6}
# float32 sums in another order; the largest differences seen are 3e-7 in losses, margins and adapter.
BOUND = 5e-6
# On CPUs Accelerate takes no notice of FSDP and runs plain data parallelism: this makes it go on as on GPUs.
FSDP_ON_CPU = """
import os

if os.environ.get("ACCELERATE_USE_FSDP") == "true" and "LOCAL_RANK" in os.environ:
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    plain = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **options):
        plain(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
"""


@pytest.fixture(scope="module")
def place(models, pairs_file, tmp_path_factory):
    """A folder with the notebook, the recipes, and the file of parameters that the recipe's commands name."""
    folder = tmp_path_factory.mktemp("processes")
    for name in ("dpo_finetune.ipynb", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    parameters = {**PARAMETERS, "base_model": models["qwen"], "dataset_id": pairs_file}
    (folder / "parameters.yaml").write_text(json.dumps(parameters))  # JSON is YAML
    (folder / "sitecustomize.py").write_text(FSDP_ON_CPU)
    return folder


@pytest.fixture(scope="module")
def start(place):
    """start(name, launcher) launches a script, made by the recipe's commands, and returns the process and its log."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(place),
    }
    environment["ACCELERATE_USE_CPU"] = "true"

    def start(name, launcher, **changes):
        log, parameters = place / f"{name}.log", {"output_dir": name, "new_model": name, **changes}
        options = " ".join(f"-p {key} {value}" for key, value in parameters.items())
        prepare = command("more_gpus", "papermill --prepare-only") + f" {options}"
        for line in (prepare, command("more_gpus", "jupyter nbconvert")):
            if not (place / f"{name}.py").exists():
                line = line.replace("run.ipynb", f"{name}.ipynb")
                subprocess.run(
                    line, shell=True, cwd=place, env=environment, check=True, capture_output=True
                )
        words = [*launcher.split(), f"{name}.py"]
        with log.open("w") as output:
            return subprocess.Popen(
                words, cwd=place, env=environment, stdout=output, stderr=subprocess.STDOUT
            ), log

    with Hub(place / "hub") as start.hub:
        environment |= start.hub.environment(place / "cache")
        yield start


def finish(process, log):
    assert process.wait(timeout=900) == 0, read(log)[-3000:]
    return read(log)


def wait_for_a_checkpoint(folder, process, log):
    while not list(folder.glob("checkpoint-[2-4]/whole.json")):
        assert process.poll() is None, read(log)[-3000:]
        time.sleep(0.01)


def outcome(folder):
    """What a run came to: its numbers that do not depend on the split of a step, and its adapter."""
    run = json.loads((folder / "run.json").read_text())
    names = (
        "loss",
        "grad_norm",
        "rewards/margins",
        "rewards/accuracies",
        "eval_loss",
        "eval_rewards/margins",
    )
    history = [[entry.get(name) for name in names] for entry in run["history"]]
    return history, run["logps"], load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_close(one, other):
    for entry, same in zip(one[0], other[0], strict=True):
        assert entry == pytest.approx(same, abs=BOUND)
    assert one[1].keys() == other[1].keys() == {"base", "trained", "base unquantised", "merged"}
    for name, logps in one[1].items():  # sums of up to a hundred tokens
        assert np.allclose(other[1][name], logps, rtol=0, atol=100 * BOUND)
    assert one[2].keys() == other[2].keys()
    assert all((one[2][name] - weight).abs().max() < BOUND for name, weight in other[2].items())


@pytest.fixture(scope="module")
def one(start, place):
    """The outcome of a run on one process, in which something is learnt."""
    finish(*start("one", "python", push_to_hub=False))
    found = outcome(place / "one")
    assert max(abs(margin) for *_, margin in found[0] if margin) > 100 * BOUND
    return found


def test_a_run_that_lost_a_process_goes_on_as_a_slurm_job(start, place, one, tmp_path):
    """The launcher ends with an error, no hang; two machines on one, as srun has them, end the run as on one process."""
    # What `accelerate launch` finds out by itself where there are GPUs.
    process, log = start(
        "several", "accelerate launch --multi_gpu --num_processes 3 --main_process_port 0"
    )
    wait_for_a_checkpoint(place / "several", process, log)
    workers = [
        child for child in psutil.Process(process.pid).children() if "several.py" in child.cmdline()
    ]
    assert len(workers) == 3
    workers[1].send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) != 0 and "Trained to step" not in read(log)
    assert read(log).count("a new run") == 1

    (tmp_path / "srun").write_text(
        '#!/bin/bash\nSLURM_PROCID=1 "$@" & other=$!\nSLURM_PROCID=0 "$@" && wait $other\n'
    )
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho localhost\necho elsewhere\n")
    for stand_in in tmp_path.iterdir():
        stand_in.chmod(0o755)
    job = (ROOT / "recipes/more_gpus/job.sh").read_text()
    asked = re.findall(
        r"^#SBATCH (--\S+)",
        job.removeprefix("#!/bin/bash\n").partition("\nexport")[0],
        re.MULTILINE,
    )
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8"} <= {
        *asked
    }  # Slurm tells of them in variables
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    nodes = f"env SLURM_NNODES=2 SLURM_GPUS_PER_NODE=1 SLURM_JOB_NODELIST=n[1-2] PORT={random.randrange(20000, 60000)}"
    said = finish(*start("several", f"{nodes} PATH={path} bash recipes/more_gpus/job.sh"))
    assert_close(outcome(place / "several"), one)
    for once in (
        "2 × CPU",
        "Going on from checkpoint-[2-5]",
        "Trained to step 6",
        "after the merge",
        "a neural network",
    ):
        assert len(re.findall(f"^.*{once}", said, re.MULTILINE)) == 1, once  # by the first alone
    uploads = [path for method, path in start.hub.requests if method == "PUT"]
    assert (
        len(uploads) == len(set(uploads))
        and len([path for _, path in start.hub.requests if "create" in path]) == 2
    )
    pushed, merged = start.hub.folder("rehearsal/several"), place / "several" / "merged"
    assert (pushed / "model.safetensors").read_bytes() == (
        merged / "model.safetensors"
    ).read_bytes()


def test_fsdp_as_on_one_process(start, place, one):
    """The 4-bit base, split over two processes by the recipe's file, exact as CPUs are, killed and gone on with."""
    fsdp = command("more_gpus", "accelerate launch --config_file").removesuffix(" run.py")
    fsdp += " --num_processes 2 --mixed_precision no --main_process_port 0"
    process, log = start("fsdp", fsdp, push_to_hub=False)
    wait_for_a_checkpoint(place / "fsdp", process, log)
    process.terminate()
    process.wait(60)
    assert list((place / "fsdp").glob("checkpoint-*/pytorch_model_fsdp.bin"))  # it was FSDP
    assert re.search(r"Going on from checkpoint-[2-5]", finish(*start("fsdp", fsdp)))
    assert_close(outcome(place / "fsdp"), one)


@pytest.mark.parametrize("asked, processes, found", [(12, 3, 12), (11, 2, 10), (11, 3, 9)])
def test_each_process_evaluates_as_many_pairs(asked, processes, found):
    split_by_question = alone("split-by-question")["split_by_question"]
    train, held_out = split_by_question(range(60), asked, seed=0, multiple_of=processes)
    assert len(held_out) == found and len(train) == 60 - asked


@pytest.mark.recipes
def test_the_skypilot_job(tmp_path):
    """Read by SkyPilot's own parser, in an environment of its own: it wants an older click than huggingface_hub does."""
    job = yaml.safe_load((ROOT / "recipes/more_gpus/job.yaml").read_text())
    job.pop("file_mounts")  # a bucket wants an account
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "skypilot>=0.14.1,<0.15"], check=True
    )
    source = "import sky; task = sky.Task.from_yaml('job.yaml'); print(task.name, *[r.accelerators for r in task.resources])"
    environment = os.environ | {"HOME": str(tmp_path)}
    printed = subprocess.check_output(
        [python, "-c", source], cwd=tmp_path, env=environment, text=True
    )
    assert printed.splitlines()[-1] == "dpo-finetune {'H100': 8}"


SHAPE = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
num_key_value_heads""".split()
SHAPES = {
    "7B": (32002, 4096, 14336, 32, 32, 8),
    "32B": (152064, 5120, 27648, 64, 40, 8),
    "70B": (128256, 8192, 28672, 80, 64, 8),
}
MEMORY = {"16": 15.8e9, "24": 23.7e9, "48": 47.7e9, "80": 85.0e9}  # as torch reports it


@pytest.fixture
def plan_for(tmp_path, monkeypatch):
    """plan_for(model, gpus, memory, engine): the namespace of a run on such a machine, once it has planned.

    Its pairs are all as long as max_length.
    """
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    given = dict(
        base=str(tmp_path), base_model="", base_commit=None, folder=tmp_path, trained=False,
        merged=True, on_gpu=True, load_in_4bit=True, lora_rank=16, lora_targets="all-linear",
        max_length=1536, pairs_per_step=16, rows=[{"prompt_ids": [1]}], sharing=True,
        tokenizer=types.SimpleNamespace(pad_token_id=0), run=types.SimpleNamespace(stage=Mock()),
        gather_object=list, np=np, torch=torch, shutil=shutil, order=np.arange(64),
        shared_tokens=np.full(64, 2 * 1536 - 21), longest_tokens=np.full(64, 1536),
    )  # fmt: skip

    def plan(model, gpus, memory, engine):
        LlamaConfig(**dict(zip(SHAPE, SHAPES[model], strict=True))).save_pretrained(tmp_path)
        nb = dict(given, processes=types.SimpleNamespace(num_processes=gpus))
        nb.update(sharded=engine == "FSDP", memory=MEMORY[memory])
        nb["dtype"] = torch.float16 if memory == "16" else torch.bfloat16
        for cell in ("base", "skeleton", "memory", "memory-budget", "room", "split-of-a-step"):
            run_cell(cell, nb)
        return nb

    return plan


def test_the_table_is_the_plan(plan_for):
    readme = (ROOT / "recipes/more_gpus/README.md").read_text()
    planned = []
    machines = re.findall(r"^\| (\d+B) \| (\d) × (\d+) GB \| (\w+) ", readme, re.MULTILINE)
    for model, gpus, memory, engine in machines:
        nb = plan_for(model, int(gpus), memory, engine)
        split = nb["split"]
        accumulated = nb["pairs_per_process"] // split.pairs_at_once
        planned.append(
            f"| {model} | {gpus} × {memory} GB | {engine} | {split.pairs_at_once} × {accumulated} "
            f"× {gpus} | {split.checkpointed_layers.mean():.0f} | "
            f"{(nb['fixed_bytes'] + split.most_bytes) / 1e9:.1f} GB |"
        )
    rows = [line for line in readme.splitlines() if line.startswith("|") and " × " in line]
    assert rows[1:] == planned
