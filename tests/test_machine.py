"""What the notebook makes of the machine, the run folder, the accounts and the sources that it finds."""

import json
import os
import resource
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from notebook import run_cell, run_cells
from trainers import SMALL
from transformers import MistralConfig

from rehearsal.hub import Hub


@pytest.fixture
def installs(monkeypatch):
    """The commands that the install cell runs, or would; those whose second word is in `refused` fail."""
    commands = []
    refused = []

    def run(command, **options):
        commands.append(command)
        failed = command[2] in refused or command[0] in refused
        return subprocess.CompletedProcess(command, int(failed), "", "Downloading\nERROR: no route to host\n")

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    return SimpleNamespace(commands=commands, refused=refused)


@pytest.mark.parametrize("place, uv", [("Colab", True), ("Colab", False), ("Kaggle", True), ("elsewhere", True)])
def test_what_is_installed_where(monkeypatch, installs, place, uv):
    if place == "Colab":
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    elif place == "Kaggle":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    if not uv:
        monkeypatch.setattr("shutil.which", lambda name: None)
    run_cell("install", {})
    if place == "elsewhere":
        assert installs.commands == []
        return
    (command,) = installs.commands  # there is no torchao here that would have to go
    packages = {word.split(">=")[0] for word in command if ">=" in word}
    assert (command[:3] == ["uv", "pip", "install"]) == uv and sys.executable in command
    assert {"transformers", "trl", "bitsandbytes"} <= packages and not {"torch", "torchvision", "numpy"} & packages


def test_torchao_goes_where_it_is(monkeypatch, installs):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "torchao")
    run_cell("install", {})
    assert [command[-1] for command in installs.commands][1:] == ["torchao"]


def test_pip_does_what_uv_cannot(monkeypatch, installs):
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    installs.refused.append("uv")
    run_cell("install", {})
    assert [command[:4] for command in installs.commands][1:] == [[sys.executable, "-m", "pip", "install"]]


@pytest.mark.parametrize("place", ["Colab", "Kaggle"])
def test_packages_that_cannot_be_had_end_in_one_sentence(monkeypatch, installs, place):
    """Which on Kaggle names its switch for the Internet, off by default."""
    if place == "Colab":
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    else:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    installs.refused.extend(["uv", "pip"])
    with pytest.raises(RuntimeError, match=r"could not be installed \(ERROR: no route to host\)") as failure:
        run_cell("install", {})
    assert ("Settings > Internet" in str(failure.value)) == (place == "Kaggle")


def test_a_library_that_was_imported_before_it_was_replaced_ends_in_one_sentence(monkeypatch, installs):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr("datasets.__version__", "4.0.0")
    with pytest.raises(AssertionError, match="datasets.*restart"):
        run_cell("install", {})


HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "major, others, gpu_memory, dtype, planned",
    [
        (7, [], 0, HALF, 15.8e9),
        (8, [], 8, BRAIN, 8e9),
        (9, [], 100, BRAIN, 15.8e9),
        (8, [(7, 24e9)], 0, HALF, 15.8e9),
        (8, [(9, 8e9)], 0, BRAIN, 8e9),
    ],
)
def test_precision_and_memory_of_gpus(monkeypatch, major, others, gpu_memory, dtype, planned):
    """A card of 15.8 GB, and those of other processes: the least of them is planned with."""
    PartialState(cpu=True)  # once for the process, before there is a card to be taken
    card = SimpleNamespace(name="a card", total_memory=15.8e9, major=major)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, *others])
    nb = run_cells("install", "machine", gpu_memory=gpu_memory)
    fast = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert nb["dtype"] == dtype and nb["memory"] == planned
    assert not fast  # it makes a plan for every new length


@pytest.mark.parametrize("visible, rank, used", [(None, None, "0"), ("2,3", None, "2"), ("2,3", "1", "2,3")])
def test_a_bare_notebook_takes_one_gpu_and_a_launched_process_what_it_is_given(monkeypatch, visible, rank, used):
    for name, value in {"CUDA_VISIBLE_DEVICES": visible, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    run_cells("install", "machine")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == used


V1, V2 = "memory/memory.limit_in_bytes", "memory.max"


@pytest.mark.parametrize("file, limit", [(V2, 3e9), (V2, "max"), (V1, 3e9), (V1, 2**63 - 4096)])
def test_free_memory_knows_its_container(tmp_path, file, limit):
    nb = run_cells("install", "run-folder")
    (tmp_path / "memory").mkdir()
    (tmp_path / file).write_text("max\n" if limit == "max" else f"{limit:.0f}\n")
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1e9))
    host = SimpleNamespace(available=8e9)
    nb["psutil"] = SimpleNamespace(virtual_memory=lambda: host, Process=lambda: process)
    nb["Path"] = lambda root, name: tmp_path / name
    assert nb["free_memory"]() == (2e9 if limit == 3e9 else 8e9)


def test_the_plan_on_a_cpu_is_of_the_least_free_memory_of_all_processes(models, pairs_file, tmp_path):
    sources = dict(base_model=models["qwen"], dataset_id=pairs_file, output_dir=str(tmp_path / "run"))
    nb = run_cells("install", "memory", **{**SMALL, **sources})

    def split(mine, others=()):
        nb.update(free_memory=lambda: mine, gather_object=lambda found: [*found, *others])
        run_cell("split-of-a-step", nb)
        return nb["at_once"], nb["again"]

    roomy = split(64e9)
    free = 1.5 * (nb["fixed"] + 0.6 * (max(nb["needs"]) - nb["fixed"]))
    tight = split(free)
    assert max(nb["needs"]) < 0.9 * free and (tight[0] < roomy[0] or tight[1] > 0)
    assert split(64e9, [free]) == tight
    nb["trained"] = True  # elsewhere: it has to fit no more
    split(0.1 * free)


def test_a_model_that_was_trained_elsewhere_may_be_too_large_to_train_here(tmp_path):
    MistralConfig(vocab_size=32002).save_pretrained(tmp_path / "base")  # the 7B shape; nothing else is there
    sources = dict.fromkeys(("base_model", "dataset_id"), str(tmp_path / "base"))
    nb = run_cells("install", "sources", output_dir=str(tmp_path / "run"), **sources)
    run_cell("base", nb | {"trained": True})


# The run folder.


def run_folder(path):
    return run_cells("install", "state", output_dir=str(path), max_steps=4, warmup_steps=1)


def write(nb, name):
    """A whole folder of the run."""
    place = nb["folder"] / name
    place.mkdir()
    for file in ("weights", "state"):
        (place / file).write_text("as it was written")
    nb["seal"](place)
    return place


DAMAGES = {
    "cut": lambda place: (place / "weights").write_text("as it was"),
    "missing": lambda place: (place / "state").unlink(),
    "never sealed": lambda place: (place / "whole.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_passed_over(tmp_path, damage):
    nb = run_folder(tmp_path)
    older, newer, merged, adapter = (write(nb, name) for name in ("checkpoint-2", "checkpoint-10", "merged", "adapter"))
    (merged / "README.md").write_text("added later")
    (tmp_path / "checkpoint-old").mkdir()
    nb["write_record"](trained=4, merged=4, day="2026-01-01")
    nb = run_folder(tmp_path)
    assert nb["trained"] and nb["merged"] and nb["checkpoint"] == newer
    DAMAGES[damage](newer)
    DAMAGES[damage](merged)
    nb = run_folder(tmp_path)
    assert nb["trained"] and not nb["merged"] and nb["checkpoint"] == older
    DAMAGES[damage](adapter)
    assert not run_folder(tmp_path)["trained"]


def test_the_record_is_written_in_one_go_and_by_one_process(tmp_path):
    nb, record = run_folder(tmp_path), tmp_path / "run.json"
    nb["write_record"](trained=1)
    nb["processes"] = SimpleNamespace(is_main_process=False)
    nb["write_record"](trained=2)
    assert nb["run"]["trained"] == 2 and json.loads(record.read_text()) == {"trained": 1}
    nb["processes"], limits = PartialState(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.raises(OSError):
        nb["write_record"](history="long" * 1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert json.loads(record.read_text()) == {"trained": 1}


def test_a_folder_holds_one_run(tmp_path):
    """Of one set of parameters and of sources that stay as they were; the run itself may lie among their files."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "data.txt").write_text("1")

    def run(**parameters):
        same = dict(base_model=str(source), dataset_id=str(source / "data.txt"), output_dir=str(source / "run"))
        return run_cells("install", "sources", **{**same, "max_steps": 4, "warmup_steps": 1, **parameters})

    run()
    write(run(beta=0.7), "checkpoint-2")  # nothing was trained before that
    run(beta=0.7, max_steps=6, gpu_memory=8, private=False)
    for changes in ({"seed": 1}, {"load_in_4bit": False}, {"max_steps": 4}):
        with pytest.raises(AssertionError, match="another output_dir"):
            run(**{"beta": 0.7, "max_steps": 6, **changes})
    (source / "deep").mkdir()
    (source / "deep" / "more.txt").write_text("2")
    with pytest.raises(AssertionError, match="base_revision"):
        run(beta=0.7, max_steps=6)


# Accounts.


@pytest.fixture
def accounts(tmp_path, monkeypatch, installs):
    """Runs the cells up to the accounts, and that cell again: with a local Hub that knows one token."""
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
    for name in ("time.sleep", "wandb.init"):
        monkeypatch.setattr(name, lambda *arguments, **options: None)
    with Hub(tmp_path / "hub", token="hf_canary") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        yield lambda nb=None: run_cell("accounts", nb) if nb else run_cells("install", "accounts", new_model="tuned")


NEW, OLD = ("HF_TOKEN", "WANDB_API_KEY"), ("huggingface", "wandb")  # the article's names
REASONS = {  # why there is no secret: (where, what is said, how often it is asked)
    "SecretNotFoundError": ("Colab", "HF_TOKEN, WANDB_API_KEY.", 4),
    "NotebookAccessError": ("Colab", "Not granted to this notebook: HF_TOKEN, huggingface, WANDB_API_KEY, wandb", 4),
    "TimeoutException": ("Colab", "did not answer (TimeoutException)", 1),
    "BackendError": ("Kaggle", "HF_TOKEN, WANDB_API_KEY.", 4),
    "ConnectionError": ("Kaggle", "did not answer (ConnectionError)", 1),
}


@pytest.fixture
def vault(monkeypatch):
    """Makes this process one of Colab or of Kaggle, by stand-ins of google.colab and kaggle_secrets. Returns their vault.

    It has `secrets`, the names that were `asked` for, and the name of the `problem` with those that are no secrets.
    """

    def make(place, problem):
        vault = SimpleNamespace(secrets={}, asked=[], problem=problem)

        def get(name):
            vault.asked.append(name)
            if name not in vault.secrets:
                raise getattr(userdata, vault.problem)(name)
            return vault.secrets[name]

        modules = ("google.colab", "google.colab.errors", "google.colab.userdata", "kaggle_secrets")
        colab, errors, userdata, kaggle = (ModuleType(name) for name in modules)
        errors.Error = Exception
        for name in REASONS:
            setattr(userdata, name, type(name, (Exception,), {}))
        userdata.get = get
        kaggle.UserSecretsClient = lambda: SimpleNamespace(get_secret=get)
        if place == "Colab":
            monkeypatch.setattr("huggingface_hub.utils._auth.is_google_colab", lambda: True)
            monkeypatch.setattr("huggingface_hub.utils._auth._IS_GOOGLE_COLAB_CHECKED", False)
            for name, module in zip(modules, (colab, errors, userdata), strict=False):
                monkeypatch.setitem(sys.modules, name, module)
        else:
            monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
            monkeypatch.setitem(sys.modules, "kaggle_secrets", kaggle)
        return vault

    return make


@pytest.mark.parametrize("names", [NEW, OLD])
@pytest.mark.parametrize("problem", REASONS)
def test_secrets_are_asked_for_until_they_are_found_and_never_printed(accounts, vault, capfd, problem, names):
    """What is missing is said in one line; a page that has not answered is asked no more, not by the Hub's library either."""
    place, said, times = REASONS[problem]
    secrets = vault(place, problem)
    nb = accounts()
    assert nb["hub_id"] is None and nb["report_to"] == "none" and len(secrets.asked) == times
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "secret" in line]
    assert said in line
    secrets.problem = "SecretNotFoundError" if place == "Colab" else "BackendError"
    secrets.secrets = dict(zip(names, (" hf_canary\n", "wandb-canary\n"), strict=True))
    accounts(nb)
    assert nb["hub_id"] == "rehearsal/tuned" and nb["report_to"] == "wandb"
    assert os.environ["WANDB_API_KEY"] == "wandb-canary"  # without what was pasted with it
    assert "canary" not in "".join(capfd.readouterr())


def test_a_token_with_a_letter_that_no_token_has_does_not_stop_the_run(accounts, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_pasted\u200b")
    assert accounts()["hub_id"] is None and "hf_pasted" not in "".join(capfd.readouterr())
