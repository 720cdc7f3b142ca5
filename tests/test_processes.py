"""The notebook as a script on several processes, with the README's own commands: as if there were one, and survived."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from notebook import ROOT
from safetensors.torch import load_file
from trainers import SMALL

from rehearsal.hub import Hub

PARAMETERS = {**SMALL, "eval_pairs": 12, "pairs_per_step": 12, "max_steps": 6, "load_in_4bit": False}
# float32 sums in another order; the largest differences seen are 3e-7 in losses, margins and adapter.
BOUND = 5e-6


def readme_command(start):
    """The README's line that starts so, less what it is set in."""
    return re.search(rf"^ *({re.escape(start)}.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)[1]


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

    def start(name, processes, **changes):
        parameters = {"output_dir": name, "new_model": name, "push_to_hub": False, **changes}
        options = " ".join(f"-p {key} {value}" for key, value in parameters.items())
        prepare = readme_command("papermill --prepare-only").replace("run.ipynb", f"{name}.ipynb") + f" {options}"
        convert = readme_command("jupyter nbconvert --to script run.ipynb").replace("run.ipynb", f"{name}.ipynb")
        launch = readme_command("accelerate launch run.py").replace("run.py", f"{name}.py")
        # What `accelerate launch` finds out by itself where there are GPUs.
        several = f"accelerate launch --multi_gpu --num_processes {processes} --main_process_port 0"
        launch = launch.replace("accelerate launch", several if processes > 1 else "python")
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
