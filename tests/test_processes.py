"""The notebook as a script on several processes, with the README's own commands: as if there were one, and survived."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from notebook import ROOT
from safetensors.torch import load_file
from trainers import SMALL

from rehearsal.hub import Hub

PARAMETERS = {**SMALL, "eval_pairs": 12, "pairs_per_step": 12, "max_steps": 6, "load_in_4bit": False}
# float32 sums in another order; the largest differences seen are 3e-7 in losses, margins and adapter.
BOUND = 5e-6
PORT = str(random.randrange(20000, 60000))


README = (ROOT / "README.md").read_text()
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


def readme_command(start):
    """The README's line that starts so, less what it is set in."""
    return re.search(rf"^ *({re.escape(start)}.*)$", README, re.MULTILINE)[1]


def readme_block(part):
    """The README's one code block with this in it."""
    (text,) = [text for text in re.findall(r"^```\w+\n(.*?)^```$", README, re.M | re.S) if part in text]
    return text


@pytest.fixture(scope="module")
def place(models, pairs_file, tmp_path_factory):
    """A folder with the notebook and the file of parameters that the README's commands name."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "dpo_finetune.ipynb").symlink_to(ROOT / "dpo_finetune.ipynb")
    parameters = {**PARAMETERS, "base_model": models["qwen"], "dataset_id": pairs_file}
    (folder / "parameters.yaml").write_text(json.dumps(parameters))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def start(place, hub, tmp_path_factory):
    """Starts a run on so many processes, by the README's commands, and returns the launcher's process and its log."""
    tools = Path(sys.executable).parent
    environment = os.environ | hub.environment(tmp_path_factory.mktemp("cache"))
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(FSDP_ON_CPU)
    environment["PYTHONPATH"] = str(place / "site")

    def start(name, processes, launcher=None, **changes):
        parameters = {"output_dir": name, "new_model": name, "push_to_hub": False, **changes}
        options = " ".join(f"-p {key} {value}" for key, value in parameters.items())
        prepare = readme_command("papermill --prepare-only").replace("run.ipynb", f"{name}.ipynb") + f" {options}"
        convert = readme_command("jupyter nbconvert --to script run.ipynb").replace("run.ipynb", f"{name}.ipynb")
        launch = readme_command("accelerate launch run.py").replace("run.py", f"{name}.py")
        # What `accelerate launch` finds out by itself where there are GPUs.
        several = f"accelerate launch --multi_gpu --num_processes {processes} --main_process_port 0"
        launch = launch.replace("accelerate launch", launcher or (several if processes > 1 else "python"))
        for command in (prepare, convert):
            subprocess.run(command, shell=True, cwd=place, env=environment, check=True, capture_output=True)
        log = place / f"{name}-{processes}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                launch.split(), cwd=place, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        return process, log

    return start


def finish(process, log):
    assert process.wait(timeout=240) == 0, log.read_text(errors="replace")[-3000:]
    return log.read_text(errors="replace")


def outcome(folder):
    """What a run came to: its numbers that do not depend on the split of a step, and its adapter."""
    run = json.loads((folder / "run.json").read_text())
    names = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "eval_loss", "eval_rewards/margins")
    history = [[entry.get(name) for name in names] for entry in run["history"]]
    return history, run["scores"], load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_close(one, other):
    for entry, same in zip(one[0], other[0], strict=True):
        assert entry == pytest.approx(same, abs=BOUND)
    assert one[1].keys() == other[1].keys()
    for name, score in one[1].items():
        assert other[1][name] == pytest.approx(score, abs=BOUND)
    assert one[2].keys() == other[2].keys()
    assert all((one[2][name] - weight).abs().max() < BOUND for name, weight in other[2].items())


@pytest.fixture(scope="module")
def one(start, place):
    finish(*start("one", 1))
    return outcome(place / "one")


@pytest.mark.parametrize("processes", [2, 3])
def test_as_on_one_process(start, place, hub, one, processes):
    log = finish(*start(f"on-{processes}", processes, push_to_hub=processes == 2))
    assert f"Processes:  {processes}, each with its own" in log and f"accumulation steps × {processes} processes" in log
    assert max(abs(margin) for *_, margin in one[0] if margin) > 100 * BOUND  # something was learnt
    assert_close(outcome(place / f"on-{processes}"), one)
    for said in (
        "Run folder",
        "Batch: ",
        "Trained to step 6",
        "merged/model.safetensors",
        "BEFORE  ",
    ):  # by the first alone
        assert len(re.findall(f"^.*{said}", log, re.MULTILINE)) == (3 if said == "BEFORE  " else 1), said
    if processes == 2:
        pushed = hub.folder(f"{hub.user}/on-2")
        uploads = [path for method, path in hub.requests if method == "PUT"]
        assert len(uploads) == len(set(uploads)) and len([path for _, path in hub.requests if "create" in path]) <= 3
        merged = place / "on-2" / "merged" / "model.safetensors"
        assert (pushed / "model.safetensors").read_bytes() == merged.read_bytes()


def test_held_out_pairs_that_do_not_divide(start, place, one):
    """Eleven on two processes: ten along the way, in equal batches, and all eleven in the scores."""
    log = finish(*start("uneven", 2, eval_pairs=11))
    assert "1 held-out pairs are left out along the way" in log
    assert "Held out: 11" in log
    assert json.loads((place / "uneven" / "run.json").read_text())["rows"]["held out"] == 11


@pytest.fixture
def fsdp(place):
    """The launcher with the README's file for FSDP, on two processes, and exact as CPUs are."""
    config = readme_block("distributed_type: FSDP").replace("num_processes: 8", "num_processes: 2")
    (place / "fsdp.yaml").write_text(config.replace("mixed_precision: bf16", "mixed_precision: 'no'"))
    command = re.search("`(accelerate launch --config_file fsdp.yaml) run.py`", README)[1]
    return f"{command} --main_process_port 0"


def test_fsdp_as_on_one_process(start, place, fsdp):
    """A 4-bit base, split over two processes, killed and gone on with."""
    finish(*start("one-in-4-bits", 1, load_in_4bit=True))
    process, log = start("fsdp", 2, fsdp, load_in_4bit=True)
    while not list((place / "fsdp").glob("checkpoint-[2-4]/trainer_state.json")):
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        time.sleep(0.01)
    process.terminate()
    process.wait(60)
    assert list((place / "fsdp").glob("checkpoint-*/pytorch_model_fsdp.bin"))  # it was FSDP
    log = finish(*start("fsdp", 2, fsdp, load_in_4bit=True))
    assert re.search(r"Going on from fsdp/checkpoint-[2-5]", log) and "of the adapter" not in log
    assert_close(outcome(place / "fsdp"), outcome(place / "one-in-4-bits"))


def test_the_slurm_job(start, place, one, tmp_path):
    """Two machines on one: srun runs the command as two tasks, as on two nodes."""
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nSLURM_PROCID=1 "$@" & other=$!\nSLURM_PROCID=0 "$@" && wait $other\n',
    )
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho localhost\necho elsewhere\n")
    for stand_in in tmp_path.iterdir():
        stand_in.chmod(0o755)
    job = readme_block("#SBATCH")
    directives = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", job, re.MULTILINE)
    assert job.startswith("#!/bin/bash\n") and len(directives) == job.count("#SBATCH")
    asked = dict(directives)
    assert asked["nodes"] == "2" and f"GPUS={asked['gpus-per-node']} " in job and asked["ntasks-per-node"] == "1"
    (place / "job.sh").write_text(job.replace("GPUS=8", "GPUS=1").replace("run.py", "slurm.py").replace("29500", PORT))
    nodes = f"env SLURM_NNODES=2 SLURM_JOB_NODELIST=n[1-2] PATH={tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    process, log = start("slurm", 2, f"{nodes} bash job.sh")
    finish(process, log)
    assert_close(outcome(place / "slurm"), one)


@pytest.mark.recipes
def test_the_skypilot_job(tmp_path):
    """Read by SkyPilot's own parser, in an environment of its own: it wants an older click than huggingface_hub does."""
    job = yaml.safe_load(readme_block("accelerators:"))
    job.pop("file_mounts")  # a bucket wants an account
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "skypilot>=0.14.1,<0.15"], check=True)
    source = (
        "import sky; task = sky.Task.from_yaml('job.yaml'); print(task.name, *(r.accelerators for r in task.resources))"
    )
    environment = os.environ | {"HOME": str(tmp_path)}
    printed = subprocess.check_output([python, "-c", source], cwd=tmp_path, env=environment, text=True)
    assert printed.splitlines()[-1] == "dpo-finetune {'H100': 8}"


def test_a_process_that_is_killed_ends_the_launch_and_the_run_goes_on(start, place, one):
    """No hang: the launcher ends with an error; on another number of processes the run ends as if it had not been cut."""
    process, log = start("cut", 2)
    while not list((place / "cut").glob("checkpoint-[2-4]/trainer_state.json")):
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        time.sleep(0.01)
    workers = [child for child in psutil.Process(process.pid).children() if "cut.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    killed = time.time()
    assert process.wait(timeout=60) != 0 and time.time() - killed < 60
    assert "Trained to step" not in log.read_text(errors="replace")
    again = finish(*start("cut", 3))
    assert re.search(r"Going on from cut/checkpoint-[2-5]", again)
    assert_close(outcome(place / "cut"), one)
