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
from trainers import SMALL
from transformers import MistralConfig

from rehearsal.hub import Hub
from rehearsal.notebook import CELLS, alone, run_cell, run_cells


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """The default output_dir lies in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def installs(monkeypatch):
    """The commands that the install cell runs, or would; those whose second word is in `refused` fail."""
    commands = []
    refused = []

    def run(command, **options):
        commands.append(command)
        failed = command[2] in refused or command[0] in refused
        return subprocess.CompletedProcess(
            command, int(failed), "", "Downloading\nERROR: no route to host\n"
        )

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    return SimpleNamespace(commands=commands, refused=refused)


@pytest.mark.parametrize(
    "place, uv", [("Colab", True), ("Colab", False), ("Kaggle", True), ("elsewhere", True)]
)
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
    assert {"transformers", "trl", "bitsandbytes"} <= packages and not {
        "torch",
        "torchvision",
        "numpy",
    } & packages


def test_torchao_goes_where_it_is(monkeypatch, installs):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "torchao")
    run_cell("install", {})
    assert [command[-1] for command in installs.commands][1:] == ["torchao"]


def test_pip_does_what_uv_cannot(monkeypatch, installs):
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    installs.refused.append("uv")
    run_cell("install", {})
    assert [command[:4] for command in installs.commands][1:] == [
        [sys.executable, "-m", "pip", "install"]
    ]


@pytest.mark.parametrize("place", ["Colab", "Kaggle"])
def test_packages_that_cannot_be_had_end_in_one_sentence(monkeypatch, installs, place):
    """Which on Kaggle names its switch for the Internet, off by default."""
    if place == "Colab":
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    else:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    installs.refused.extend(["uv", "pip"])
    with pytest.raises(
        RuntimeError, match=r"could not be installed \(ERROR: no route to host\)"
    ) as failure:
        run_cell("install", {})
    assert ("Settings > Internet" in str(failure.value)) == (place == "Kaggle")


def test_a_library_that_was_imported_before_it_was_replaced_ends_in_one_sentence(
    monkeypatch, installs
):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr("datasets.__version__", "4.0.0")
    with pytest.raises(AssertionError, match="datasets.*restart"):
        run_cell("install", {})


HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture
def card(monkeypatch):
    """A GPU of 15.8 GB that nothing else uses: its properties, which a test may change."""
    PartialState(cpu=True)  # once for the process, before there is a card to be taken
    card = SimpleNamespace(name="a card", major=8, minor=0, free=15.8e9, reserved=0)
    card.error = None  # what the first kernel on it ends in
    card.others = []  # the major number and the memory of the cards of other processes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (card.free, 16e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: card.reserved)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, *card.others])
    on_the_cpu = torch.arange

    def arange(*arguments, device=None, **options):
        if device == "cuda" and card.error:
            raise card.error
        return on_the_cpu(*arguments, **options)

    monkeypatch.setattr(torch, "arange", arange)
    yield card
    torch.backends.cuda.enable_cudnn_sdp(True)


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
def test_precision_and_memory_of_gpus(card, major, others, gpu_memory, dtype, planned):
    """All processes plan with the least memory that one of them has, and in a precision that all have."""
    card.major, card.minor, card.others = major, 5 if major == 7 else 0, others
    nb = run_cells("install", "machine", gpu_memory=gpu_memory)
    assert nb["dtype"] == dtype and nb["memory"] == planned


def test_memory_that_something_else_holds_is_not_planned_with(card):
    """What this notebook itself holds is, since it gives that back before it loads a model."""
    card.free, card.reserved = 9e9, 3e9
    assert run_cells("install", "machine")["memory"] == 12e9


def test_attention_that_plans_for_every_new_length_is_switched_off(card):
    run_cells("install", "machine")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_card_without_code_is_refused_before_anything_is_downloaded(card):
    """Kaggle's P100 under a PyTorch that has dropped it."""
    card.name = "Tesla P100"
    card.error = AcceleratorError("CUDA error: no kernel image is available for execution")
    with pytest.raises(ValueError, match="Tesla P100.* choose another GPU.*no kernel image"):
        run_cells("install", "machine")
    assert list(CELLS).index("machine") < min(
        list(CELLS).index(cell) for cell in ("sources", "first-row", "tokenizer", "base", "load")
    )


@pytest.mark.parametrize(
    "visible, rank, used", [(None, None, "0"), ("2,3", None, "2"), ("2,3", "1", "2,3")]
)
def test_a_bare_notebook_takes_one_gpu_and_a_launched_process_what_it_is_given(
    monkeypatch, visible, rank, used
):
    for name, value in {"CUDA_VISIBLE_DEVICES": visible, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    run_cells("install", "machine")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == used


V1, V2 = "memory/memory.limit_in_bytes", "memory.max"


@pytest.mark.parametrize("file, limit", [(V2, 3e9), (V2, "max"), (V1, 3e9), (V1, 2**63 - 4096)])
def test_free_memory_knows_its_container(tmp_path, file, limit):
    nb = alone("run-folder")
    (tmp_path / "memory").mkdir()
    (tmp_path / file).write_text("max\n" if limit == "max" else f"{limit:.0f}\n")
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1e9))
    host = SimpleNamespace(available=8e9)
    nb["psutil"] = SimpleNamespace(virtual_memory=lambda: host, Process=lambda: process)
    nb["Path"] = lambda root, name: tmp_path / name
    assert nb["free_memory"]() == (2e9 if limit == 3e9 else 8e9)


@pytest.fixture
def planned(models, pairs_file, tmp_path):
    """The namespace of a small run that has planned its steps."""
    sources = dict(base_model=models["qwen"], dataset_id=pairs_file)
    folder = str(tmp_path / "run")
    return run_cells("install", "split-of-a-step", **{**SMALL, **sources, "output_dir": folder})


def plan_with(nb, free, others=()):
    """The split of a step on a machine with this much free memory, and with processes on others."""
    nb.update(free_memory=lambda: free, gather_object=lambda found: [*found, *others])
    split = run_cells("room", "split-of-a-step", nb)["split"]
    return split.pairs_at_once, split.checkpointed_layers.tolist()


def some_but_not_all_fit(nb):
    """Bytes of free memory with which the split for much memory is no longer possible."""
    return (nb["fixed_bytes"] + 0.6 * nb["split"].most_bytes) / 0.65


def test_the_plan_on_a_cpu_is_of_the_free_memory(planned):
    """A third of it is left to everything else that runs there."""
    roomy = plan_with(planned, 64e9)
    tight = plan_with(planned, some_but_not_all_fit(planned))
    assert planned["room_bytes"] == pytest.approx(
        0.6 * max(planned["splits"][-1].most_bytes, 0), rel=1
    )
    assert planned["split"].most_bytes <= planned["room_bytes"]
    assert tight != roomy


def test_the_plan_is_of_the_least_free_memory_of_all_processes(planned):
    few = some_but_not_all_fit(planned)
    assert plan_with(planned, 64e9, others=[few]) == plan_with(planned, few)


def test_a_run_that_not_even_one_pair_fits_is_refused_unless_it_was_trained_elsewhere(planned):
    with pytest.raises(ValueError, match="Not even one pair fits"):
        plan_with(planned, 1e6)
    planned["trained"] = True
    plan_with(planned, 1e6)


def test_a_model_that_was_trained_elsewhere_may_be_too_large_to_train_here(planned, tmp_path):
    MistralConfig(vocab_size=32002).save_pretrained(tmp_path / "base")  # the 7B shape, no weights
    planned.update(base=str(tmp_path / "base"), base_commit=None)
    with pytest.raises(ValueError, match="too large for a CPU"):
        run_cell("base", planned)
    planned["trained"] = True
    run_cell("base", planned)


# Out of memory, in its guises.


class AcceleratorError(RuntimeError):
    """Of the driver, as in torch.AcceleratorError."""


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("Tried to allocate 2.00 GiB"),
    AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
OTHER_ERRORS = [
    ValueError("The first loss is 0.7"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"),
    OSError("No space left on device"),
    ValueError("out of memory"),  # a library's word on something else
    KeyboardInterrupt(),
]


@pytest.fixture(scope="module")
def memory_guard():
    nb = run_cells("install", "machine") | dict(memory=16e9)
    return run_cell("memory-guard", nb)["memory_guard"]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory_in_any_guise_is_one_sentence(memory_guard, error):
    with pytest.raises(MemoryError, match="^Set gpu_memory$") as told:
        with memory_guard("Set gpu_memory"):
            raise error
    # No traceback of the library stands before it.
    assert told.value.__suppress_context__ and told.value.__cause__ is None


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=repr)
def test_nothing_else_is_taken_for_out_of_memory(memory_guard, error):
    with pytest.raises(type(error)) as told:
        with memory_guard("Set gpu_memory"):
            raise error
    assert told.value is error


def test_the_advice_is_a_tenth_less_than_was_planned_with():
    nb = run_cells("install", "machine") | dict(memory=16.5e9)
    assert run_cell("memory-guard", nb)["planning_advice"].startswith("Set gpu_memory to 15.0 and")


# The run folder.


def run_folder(path):
    return run_cells("install", "state", output_dir=str(path), max_steps=4, warmup_steps=1)


def make_whole(nb, name):
    """A whole folder of the run."""
    place = nb["folder"] / name
    place.mkdir()
    for file in ("weights", "state", "trainer_state.json"):
        (place / file).write_text('{"global_step": 1}')
    nb["seal"](place)
    return place


def cut(path):
    """Leaves the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_state(place):
    """A state that is cut, and was so when the folder was sealed."""
    cut(place / "trainer_state.json")
    sealed = json.loads((place / "whole.json").read_text())
    sealed["trainer_state.json"] = (place / "trainer_state.json").stat().st_size
    (place / "whole.json").write_text(json.dumps(sealed))


DAMAGES = {
    "cut": lambda place: cut(place / "weights"),
    "missing": lambda place: (place / "state").unlink(),
    "never sealed": lambda place: (place / "whole.json").unlink(),
    "seal cut": lambda place: cut(place / "whole.json"),
    "seal empty": lambda place: (place / "whole.json").write_text(""),
    "seal of another kind": lambda place: (place / "whole.json").write_text("[]"),
}


@pytest.fixture
def full_folder(tmp_path):
    """The namespace of a run with two checkpoints that was trained and merged."""
    nb = run_folder(tmp_path)
    for name in ("checkpoint-2", "checkpoint-10", "merged", "adapter"):
        make_whole(nb, name)
    (tmp_path / "merged" / "README.md").write_text("added later")
    (tmp_path / "checkpoint-old").mkdir()
    nb["write_json"](tmp_path / "run.json", dict(trained=4, merged=4, day="2026-01-01"))
    return tmp_path


def test_a_folder_tells_how_far_its_run_came(full_folder):
    nb = run_folder(full_folder)
    assert nb["trained"] and nb["merged"]
    assert nb["checkpoint"] == full_folder / "checkpoint-10"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(full_folder, damage, capsys):
    DAMAGES[damage](full_folder / "checkpoint-10")
    assert run_folder(full_folder)["checkpoint"] == full_folder / "checkpoint-2"
    assert "checkpoint-10 is passed over" in capsys.readouterr().out


def test_a_checkpoint_whose_state_is_cut_is_passed_over(full_folder):
    """It was sealed so, as by a file system that loses what it has not yet written."""
    cut_state(full_folder / "checkpoint-10")
    assert run_folder(full_folder)["checkpoint"] == full_folder / "checkpoint-2"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_merge_is_done_again_and_a_damaged_adapter_trained_again(full_folder, damage):
    DAMAGES[damage](full_folder / "merged")
    nb = run_folder(full_folder)
    assert nb["trained"] and not nb["merged"]
    DAMAGES[damage](full_folder / "adapter")
    assert not run_folder(full_folder)["trained"]


@pytest.mark.parametrize("content", ['{"day": "2026-01-', "", "[]", "null"])
def test_a_record_that_cannot_be_read_is_said_and_not_overwritten(full_folder, content):
    (full_folder / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json cannot be read: move it away, or choose"):
        run_folder(full_folder)
    assert (full_folder / "run.json").read_text() == content
    assert len(list(full_folder.glob("checkpoint-*"))) == 3


def test_checkpoints_without_a_record_are_not_gone_on_with(full_folder):
    (full_folder / "run.json").unlink()
    with pytest.raises(ValueError, match="holds a run without its record"):
        run_folder(full_folder)


def test_the_record_is_written_by_one_process(tmp_path):
    nb = run_folder(tmp_path)
    path = tmp_path / "run.json"
    nb["Run"]({}, path).write(trained=1)
    other = nb["Run"]({}, path, writes=False)
    other.write(trained=2)
    assert other["trained"] == 2
    assert json.loads(path.read_text()) == {"trained": 1}


def test_the_record_is_written_in_one_go(tmp_path):
    """On a disk that is full in the middle of it the old one stays."""
    run = run_folder(tmp_path)["Run"]({}, tmp_path / "run.json")
    run.write(trained=1)
    free, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        with pytest.raises(OSError):
            run.write(history="long" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, most))
    assert json.loads((tmp_path / "run.json").read_text()) == {"trained": 1}


def test_who_reads_the_record_while_it_is_written_finds_the_old_one_whole(tmp_path):
    run = run_folder(tmp_path)["Run"]({}, tmp_path / "run.json")
    run.write(trained=1)
    with (tmp_path / "run.json").open() as reader:
        run.write(trained=2)
        assert json.load(reader) == {"trained": 1}


@pytest.fixture
def sources(tmp_path):
    """Runs the cells up to the sources, a base and a file of pairs with the run among the base's files."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "data.txt").write_text("1")
    same = dict(base_model=str(source), dataset_id=str(source / "data.txt"))
    same |= dict(output_dir=str(source / "run"), max_steps=4, warmup_steps=1)

    def run(**parameters):
        return run_cells("install", "sources", **{**same, **parameters})

    run.folder = source
    return run


def test_a_folder_of_which_nothing_was_trained_takes_other_parameters(sources):
    sources(beta=0.1)
    assert sources(beta=0.7)["run"]["parameters"]["beta"] == 0.7


@pytest.mark.parametrize("changes", [dict(seed=1), dict(load_in_4bit=False), dict(max_steps=4)])
def test_a_folder_holds_the_run_of_one_set_of_parameters(sources, changes):
    make_whole(sources(beta=0.7, max_steps=6), "checkpoint-2")
    (name,) = changes
    with pytest.raises(ValueError, match=f"holds a run with {name} = .*another output_dir"):
        sources(**{"beta": 0.7, "max_steps": 6, **changes})


def test_a_run_goes_on_with_more_steps_and_with_what_changes_no_result(sources):
    make_whole(sources(beta=0.7), "checkpoint-2")
    nb = sources(beta=0.7, max_steps=6, gpu_memory=8, private=False, share_prompt=False)
    assert nb["run"]["parameters"]["max_steps"] == 6


@pytest.mark.parametrize("file", ["data.txt", "deep/more.txt"])
def test_a_folder_holds_a_run_of_sources_that_stay_as_they_were(sources, file):
    """Told by their content: of the same length here."""
    (sources.folder / "deep").mkdir()
    (sources.folder / "deep" / "more.txt").write_text("2")
    make_whole(sources(), "checkpoint-2")
    (sources.folder / file).write_text("3")
    with pytest.raises(ValueError, match="base_revision"):
        sources()


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
        yield (
            lambda nb=None: (
                run_cell("accounts", nb)
                if nb
                else run_cells("install", "accounts", new_model="tuned")
            )
        )


NEW, OLD = ("HF_TOKEN", "WANDB_API_KEY"), ("huggingface", "wandb")  # the article's names
REASONS = {  # why there is no secret: (where, what is said, how often it is asked)
    "SecretNotFoundError": ("Colab", "HF_TOKEN, WANDB_API_KEY.", 4),
    "NotebookAccessError": (
        "Colab",
        "Not granted to this notebook: HF_TOKEN, huggingface, WANDB_API_KEY, wandb",
        4,
    ),
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
def test_secrets_are_asked_for_until_they_are_found_and_never_printed(
    accounts, vault, capfd, problem, names
):
    """What is missing is said in one line; a page that has not answered is asked no more, not by the Hub's library either."""
    place, said, times = REASONS[problem]
    secrets = vault(place, problem)
    nb = accounts()
    assert nb["hub_id"] is None and nb["report_to"] == "none" and len(secrets.asked) == times
    lines = capfd.readouterr().out.splitlines()
    (line,) = [line for line in lines if "among the secrets" in line]
    assert said in line
    secrets.problem = "SecretNotFoundError" if place == "Colab" else "BackendError"
    secrets.secrets = dict(zip(names, (" hf_canary\n", "wandb-canary\n"), strict=True))
    accounts(nb)
    assert nb["hub_id"] == "rehearsal/tuned" and nb["report_to"] == "wandb"
    assert os.environ["WANDB_API_KEY"] == "wandb-canary"  # without what was pasted with it
    assert "canary" not in "".join(capfd.readouterr())


def test_a_token_with_a_letter_that_no_token_has_does_not_stop_the_run(
    accounts, monkeypatch, capfd
):
    monkeypatch.setenv("HF_TOKEN", "hf_pasted\u200b")
    assert accounts()["hub_id"] is None and "hf_pasted" not in "".join(capfd.readouterr())
