"""What users get wrong ends in one sentence before the weights are loaded, and harms nothing that
is on disk.
"""

import json
import os
import pickle
import re
import shutil
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import standins
import torch
import yaml
from conftest import some_pairs
from safetensors.torch import load_file
from trainers import SMALL
from transformers import AutoTokenizer, GPT2Config, MistralConfig

from rehearsal.notebook import CELLS, alone, run_cell, run_cells

PAIRS = some_pairs(40)


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def case(name, cell, says, text=None, ending="jsonl", model=(), **parameters):
    """The cell that stops (None: whichever), words of its sentence (None: the library's), and a
    file, a changed model or parameters that are to bring it about."""
    return pytest.param(cell, says, text, ending, model, parameters, id=name)


def edit(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(
            json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes)
        )

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


def add(**special):
    """Tokens that the model has no embedding for."""

    def change(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens(special)
        tokenizer.save_pretrained(folder)

    return change


ADAPTER = edit(
    "adapter_config.json",
    peft_type="LORA",
    base_model_name_or_path="some/model",
    target_modules=["q_proj"],
)
CASES = [
    case("file missing", "sources", "no.jsonl.*no path", dataset_id="no.jsonl"),
    case(
        "data not on the Hub", "sources", "some/pears.*dataset on the Hub", dataset_id="some/pears"
    ),
    case("no name at all", "sources", "orca pairs!.*dataset on the Hub", dataset_id="orca pairs!"),
    case(
        "model not on the Hub", "sources", "some/muddle.*model on the Hub", base_model="some/muddle"
    ),
    case(
        "unknown revision", "sources", "some/model v9", base_model="some/model", base_revision="v9"
    ),
    case("blank lines", "first-row", "pairs.jsonl is empty", "\n\n"),
    case("header only", "first-row", "pairs.csv is empty", "question,chosen,rejected\n", "csv"),
    case("unknown ending", "first-row", "jsonl.*parquet", "nope", "xlsx"),
    case(
        "malformed line",
        "first-row",
        "row 4 .*what",
        lines(*PAIRS[:3], '{"question": what', *PAIRS[3:]),
    ),
    case("line that is a number", "first-row", "row 2 .*'7'", lines(PAIRS[0], "7")),
    case(
        "not in UTF-8",
        "first-row",
        "pairs.jsonl cannot be read.*Text has to be UTF-8.*",
        lines(*PAIRS, '{"question": "é"}'),
    ),
    case(
        "column missing",
        "find-markup",
        "a rejected answer.*'question', 'chosen'",
        lines({"question": "a", "chosen": "b"}),
    ),
    case("rows inside an object", "find-markup", "'data'", lines({"data": PAIRS}), "json"),
    case(
        "few questions",
        "split",
        "All 40 pairs have the same question",
        lines(*({**p, "question": "a"} for p in PAIRS)),
    ),
    case(
        "comparisons",
        "find-markup",
        "from_comparisons.py",
        lines({"prompt": "a", "response_a": "b", "response_b": "c"}),
    ),
    case("all too long", "rows", "No row", max_length=4),
    case("fewer rows than eval_pairs", "split", "40 pairs.*eval_pairs", eval_pairs=40),
    case("fewer rows than a step", "split", "40 pairs.*pairs_per_step", pairs_per_step=64),
    case("zero pairs", None, "eval_pairs", eval_pairs=0),
    case("negative rank", None, "lora_rank", lora_rank=-16),
    case("negative beta", None, "beta", beta=-0.1),
    case("rate of nan", None, "learning_rate", learning_rate=float("nan")),
    case("warm-up to the end", None, "warmup_steps.*max_steps", warmup_steps=4),
    case("beyond the model's length", "base", r"reads \d+ tokens.*max_length", max_length=99999),
    case(
        "quantised",
        "base",
        "quantised",
        model=[edit("config.json", quantization_config={"quant_method": "gptq"})],
    ),
    case("adapter", "base", "adapter", model=[ADAPTER, remove("config.json")]),
    case(
        "code of its own",
        "base",
        None,
        model=[edit("config.json", model_type="o", auto_map={"AutoConfig": "o.C"})],
    ),
    case(
        "GPT-2",
        "base",
        "no linear layers",
        model=[GPT2Config(n_embd=64, n_layer=2, n_head=4).save_pretrained],
    ),
    case(
        "7B on a CPU",
        "base",
        "too large for a CPU",
        model=[MistralConfig(vocab_size=32002).save_pretrained],
    ),
    case(
        "no chat template", "tokenizer", "no chat template", model=[remove("chat_template.jinja")]
    ),
    case("pad", "base", "no embedding", model=[add(pad_token="<pad>")]),
    case(
        "any token",
        "base",
        "no embedding",
        model=[add(additional_special_tokens=["Licensor"])],
    ),
    case("another run", "sources", "seed = 42.*output_dir", seed=1),
    case("Drive not mounted", "state", "drive.mount", output_dir="/content/drive/of-nobody"),
]


@pytest.fixture(scope="module")
def hub(models, tmp_path_factory):
    """A local Hub with a model."""
    with standins.local_hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add("some/model", models["qwen"])
        yield hub


@pytest.fixture(autouse=True)
def pairs_in_the_working_folder(hub, tmp_path, monkeypatch):
    """There is no Drive on this machine, and no folder is made where it would be."""
    make_folder, is_mount = os.mkdir, Path.is_mount

    def mkdir(path, *args, **options):
        assert not Path(path).is_relative_to("/content"), (
            f"{path} is made though no Drive is mounted"
        )
        make_folder(path, *args, **options)

    monkeypatch.setattr("os.mkdir", mkdir)
    monkeypatch.setattr(
        Path, "is_mount", lambda path: not path.is_relative_to("/content") and is_mount(path)
    )
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(lines(*PAIRS))


def what_is_left():
    record = json.loads(Path("run/run.json").read_text())
    kept = {
        path: path.read_bytes() for path in Path("run").glob("*/*") if path.parent.name != "curves"
    }
    return kept | {name: record.get(name) for name in ("trained", "history", "day")}


def seal_a_run():
    """Makes the folder of a run that got as far as step 2; returns what is to stay of it."""
    nb = run_cells("install", "run-folder", output_dir="run")
    for name in ("checkpoint-2", "adapter", "merged"):
        Path("run", name).mkdir(parents=True)
        Path("run", name, "weights.safetensors").write_text("weights")
    Path("run/checkpoint-2/trainer_state.json").write_text('{"global_step": 2}')
    for name in ("checkpoint-2", "adapter", "merged"):
        nb["seal"](Path("run", name))
    nb["write_json"](
        Path("run/run.json"),
        {"trained": 2, "history": [1], "day": "2026-01-01", "parameters": {"seed": 42}},
    )
    return what_is_left()


def stop(models, **changes):
    """The exception that stops the cells before the weights are loaded, and the cell that it comes
    from.
    """
    parameters = {
        **SMALL,
        "base_model": models["qwen"],
        "dataset_id": "good.jsonl",
        "output_dir": "run",
        **changes,
    }
    with pytest.raises(Exception) as found:
        run_cells("install", list(CELLS)[list(CELLS).index("load") - 1], **parameters)
    frames = traceback.extract_tb(found.value.__traceback__)
    return found.value, next(frame.filename for frame in frames if frame.filename in CELLS)


@pytest.mark.parametrize("cell, says, text, ending, model, parameters", CASES)
def test_one_sentence(cell, says, text, ending, model, parameters, models):
    if text is not None:
        Path(f"pairs.{ending}").write_text(text, "latin-1")
        parameters = {"dataset_id": f"pairs.{ending}"}
    if model:
        shutil.copytree(models["qwen"], "model")
        parameters = {"base_model": "model"}
    for change in model:
        change(Path("model"))
    before = seal_a_run()
    error, stopped = stop(models, **parameters)
    assert cell in (None, stopped) and what_is_left() == before
    assert not isinstance(error, KeyError | TypeError | AttributeError)
    assert says is None or re.fullmatch(f".*{says}.*", str(error)), error


def test_a_mounted_drive_is_written_to(monkeypatch):
    """As far as to make the folder there, which no test does."""
    monkeypatch.setattr(Path, "is_mount", lambda path: path == Path("/content/drive"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=107e9))
    with pytest.raises(AssertionError, match="/content.* is made though"):
        run_cells("install", "state", output_dir="/content/drive/of-nobody")


MEANT = {  # a parameter, what a YAML file, a form or a command line makes of it, and what is meant
    "rate": ("learning_rate", ["5e-5", 5e-5, " 0.00005 "], 5e-5),
    "steps": ("max_steps", [200, "200", 200.0, "2e2"], 200),
    "whole number for a number": ("beta", [1, "1", 1.0], 1.0),
    "off": ("push_to_hub", [False, "false", "False"], False),
    "on": ("push_to_hub", [True, "true", "TRUE"], True),
    "digits of a commit": ("base_revision", ["1234567", 1234567], "1234567"),
    "nothing": ("base_revision", ["", None], ""),
}
NOT_MEANT = {  # a parameter, and values that it cannot have
    "learning_rate": ["five", "0,1", "", None, [1]],
    "max_steps": ["4.5", 4.5, float("inf"), float("nan"), "1,000", None],
    "push_to_hub": ["maybe", 2, None, ""],
}


@pytest.fixture(scope="module")
def machine():
    """The namespace of the machine's cell, on the defaults."""
    return run_cells("parameters", "machine")


def read_parameters(machine, **values):
    return machine["read_parameters"](machine | values)


@pytest.mark.parametrize("kind", MEANT)
def test_a_parameter_is_read_as_what_is_meant(kind, machine):
    name, values, meant = MEANT[kind]
    for value in values:
        read = read_parameters(machine, **{name: value})[name]
        assert read == meant and type(read) is type(meant)


@pytest.mark.parametrize("name", NOT_MEANT)
def test_a_parameter_that_cannot_be_read_is_refused_in_a_sentence(name, machine):
    for value in NOT_MEANT[name]:
        with pytest.raises(ValueError, match=re.escape(f"{name} = {value!r} has to be ")):
            read_parameters(machine, **{name: value})


def test_parameters_of_a_yaml_file():
    """YAML 1.1 reads text where the point is missing, and papermill passes it on."""
    given = yaml.safe_load(
        "{learning_rate: 5e-5, max_steps: '4', warmup_steps: 1.0, push_to_hub: 'false', beta: 1}"
    )
    nb = run_cells("install", "machine", **SMALL | given)
    read = {name: nb[name] for name in given}
    assert read == dict(
        learning_rate=5e-5, max_steps=4, warmup_steps=1, push_to_hub=False, beta=1.0
    )
    assert [type(value) for value in read.values()] == [float, int, int, bool, float]


def test_run_of_the_earlier_version(models):
    seal_a_run()
    Path("run/run.json").write_text('{"parameters": {}}')
    before = what_is_left()
    error, cell = stop(models)
    assert cell == "state" and "output_dir" in str(error) and what_is_left() == before


ROOM = {  # what is asked for it, what that says, the cell that stops, its sentence
    "disk": ("shutil.disk_usage", SimpleNamespace(free=1e5), "base", "needs .* GB and has .* GB"),
    "memory": (
        "psutil.virtual_memory",
        SimpleNamespace(available=1e5),
        "split-of-a-step",
        "Not even one pair fits: lower max_length",
    ),
}


@pytest.mark.parametrize("room", ROOM)
def test_too_little_room(room, hub, models, monkeypatch):
    """Nothing is downloaded then."""
    asked, answer, cell, says = ROOM[room]
    monkeypatch.setattr(asked, lambda *path: answer)
    before = seal_a_run()
    error, stopped = stop(models, base_model="some/model")
    assert stopped == cell and re.search(says, str(error)) and what_is_left() == before
    assert not [path for _, path in hub.requests if "safetensors" in path]


def test_the_disk_has_room_for_the_merged_model_and_three_checkpoints(models, monkeypatch):
    """In FP16, and of adapter and two moments in float32."""
    sources = dict(base_model=models["qwen"], dataset_id="good.jsonl", output_dir="run")
    nb = run_cells("install", "base", **SMALL, **sources)
    needed = 2 * nb["parameter_count"] + 3 * 3 * 4 * nb["adapter_size"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    run_cell("base", nb)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(ValueError, match="needs .* GB and has"):
        run_cell("base", nb)
    nb["merged_dir"] = Path("elsewhere", "merged")  # where the checkpoints are not
    of_merged = 2 * nb["parameter_count"]
    room = {nb["folder"]: needed - of_merged, Path("elsewhere"): of_merged}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=room[path]))
    run_cell("base", nb)


@pytest.mark.parametrize(
    "gigabytes, place", [(16.1, "MyDrive-mine-run"), (107, "drive/MyDrive/mine/run")]
)
def test_a_free_drive_is_not_filled_with_the_merged_model(tmp_path, monkeypatch, gigabytes, place):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=gigabytes * 1e9))
    folder = tmp_path / "drive" / "MyDrive" / "mine" / "run"
    found = alone("run-folder")["place_of_merged"](folder, tmp_path / "drive")
    assert found == tmp_path / place / "merged"


class Attack:
    """Unpickled freely, it makes a folder."""

    def __reduce__(self):
        return os.makedirs, ("attacked",)


def test_a_program_in_a_pickle_is_not_run(models):
    pickle.loads(pickle.dumps(Attack()))
    Path("attacked").rmdir()
    shutil.copytree(models["qwen"], "model")
    weights = load_file("model/model.safetensors")
    Path("model/model.safetensors").unlink()
    torch.save({**weights, "attack": Attack()}, "model/pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights"):
        run_cells("install", "load", **SMALL, base_model="model", dataset_id="good.jsonl")
    assert not Path("attacked").exists()


def test_a_run_keeps_to_the_commits_that_it_began_with(hub, models):
    """Of base and data, told by what is read of them; unless another is asked for."""
    Path("set").mkdir()

    def publish(commit, family):
        Path("set/train.jsonl").write_text(lines(*PAIRS, {**PAIRS[0], "question": commit}))
        hub.add("some/moving", models[family], oid=commit * 40)
        hub.add("some/set", "set", "dataset", oid=commit * 40)

    def commits(**changes):
        nb = run_cells(
            "install", "rows", **SMALL, base_model="some/moving", dataset_id="some/set", **changes
        )
        return ("a" if "<|im_start|>" in nb["tokenizer"].chat_template else "b") + nb["raw"][40][
            "question"
        ]

    publish("a", "qwen")
    assert commits(output_dir="run") == "aa"
    Path("run/run.json").write_text(
        json.dumps({**json.loads(Path("run/run.json").read_text()), "trained": 2})
    )
    publish("b", "llama3")
    assert commits(output_dir="run") == "aa" and commits(output_dir="new") == "bb"
    assert commits(output_dir="pinned", base_revision="a" * 40) == "ab"
    with pytest.raises(ValueError, match="dataset_revision.*another output_dir"):
        commits(output_dir="run", dataset_revision="b" * 40)


@pytest.fixture
def digest():
    """The function of the notebook that names a local file or folder by what is in it."""
    nb = run_cells("install", "sources", **SMALL, dataset_id="good.jsonl", base_model="good.jsonl")
    return nb["digest"]


def test_a_local_file_is_known_by_its_content_and_not_by_its_size(digest):
    before = digest(Path("good.jsonl"), Path("run"))
    text = Path("good.jsonl").read_text()
    Path("good.jsonl").write_text(text.replace("Question 1:", "Question 7:"))
    assert digest(Path("good.jsonl"), Path("run")) != before
    Path("good.jsonl").write_text(text)
    assert digest(Path("good.jsonl"), Path("run")) == before


def test_a_local_folder_is_known_by_its_content_without_the_run_in_it(digest):
    Path("set/run").mkdir(parents=True)
    Path("set/train.jsonl").write_text("a")
    before = digest(Path("set"), Path("set/run"))
    Path("set/run/run.json").write_text("{}")
    assert digest(Path("set"), Path("set/run")) == before
    Path("set/train.jsonl").write_text("b")
    assert digest(Path("set"), Path("set/run")) != before


def test_a_run_does_not_go_on_with_a_file_that_has_changed(models):
    """Another file with the same name and as many bytes."""
    Path("run").mkdir()
    parameters = {**SMALL, "dataset_id": "good.jsonl", "base_model": models["qwen"]}
    nb = run_cells("install", "sources", **parameters, output_dir="run")
    nb["run"].write(trained=2)
    text = Path("good.jsonl").read_text()
    Path("good.jsonl").write_text(text.replace("Question 1:", "Question 7:"))
    error, cell = stop(models)
    assert cell == "sources" and "dataset_revision" in str(error)
