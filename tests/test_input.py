"""What users get wrong ends in one sentence before the weights are loaded, and harms nothing that is on disk."""

import ast
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
from notebook import CELLS, run_cells
from safetensors.torch import load_file
from trainers import SMALL
from transformers import AutoTokenizer, GPT2Config, MistralConfig

PAIRS = some_pairs(40)


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def case(name, cell, says, text=None, ending="jsonl", model=(), **parameters):
    """The cell that stops (None: whichever), words of its sentence (None: the library's), and a file, a changed model
    or parameters that are to bring it about."""
    return pytest.param(cell, says, text, ending, model, parameters, id=name)


def edit(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))

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


ADAPTER = edit("adapter_config.json", peft_type="LORA", base_model_name_or_path="some/model", target_modules=["q_proj"])
CASES = [
    case("file missing", "sources", "no.jsonl.*no path", dataset_id="no.jsonl"),
    case("data not on the Hub", "sources", "some/pears.*dataset on the Hub", dataset_id="some/pears"),
    case("no name at all", "sources", "orca pairs!.*dataset on the Hub", dataset_id="orca pairs!"),
    case("model not on the Hub", "sources", "some/muddle.*model on the Hub", base_model="some/muddle"),
    case("unknown revision", "sources", "some/model v9", base_model="some/model", base_revision="v9"),
    case("blank lines", "first-row", "pairs.jsonl is empty", "\n\n"),
    case("header only", "first-row", "pairs.csv is empty", "question,chosen,rejected\n", "csv"),
    case("unknown ending", "first-row", "jsonl.*parquet", "nope", "xlsx"),
    case("malformed line", "first-row", "line 4 .*what", lines(*PAIRS[:3], '{"question": what', *PAIRS[3:])),
    case("line that is a number", "first-row", "line 2 .*'7'", lines(PAIRS[0], "7")),
    case(
        "not in UTF-8",
        "first-row",
        "pairs.jsonl is not UTF-8.*save it again in UTF-8",
        lines(*PAIRS, '{"question": "é"}'),
    ),
    case(
        "column missing",
        "find-markup",
        "rejected answer.*'question', 'chosen'",
        lines({"question": "a", "chosen": "b"}),
    ),
    case("rows inside an object", "find-markup", "'data'", lines({"data": PAIRS}), "json"),
    case(
        "few questions", "split", "All 40 pairs have the same question", lines(*({**p, "question": "a"} for p in PAIRS))
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
    case("quantised", "base", "quantised", model=[edit("config.json", quantization_config={"quant_method": "gptq"})]),
    case("adapter", "base", "adapter", model=[ADAPTER, remove("config.json")]),
    case("code of its own", "base", None, model=[edit("config.json", model_type="o", auto_map={"AutoConfig": "o.C"})]),
    case("GPT-2", "base", "no linear layers", model=[GPT2Config(n_embd=64, n_layer=2, n_head=4).save_pretrained]),
    case("7B on a CPU", "base", "too large for a CPU", model=[MistralConfig(vocab_size=32002).save_pretrained]),
    case("no chat template", "tokenizer", "no chat template", model=[remove("chat_template.jinja")]),
    case("pad", "check-rows", "no embedding", model=[add(pad_token="<pad>")]),
    case("any token", "check-rows", "no embedding", model=[add(additional_special_tokens=["Licensor"])]),
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
        assert not Path(path).is_relative_to("/content"), f"{path} is made though no Drive is mounted"
        make_folder(path, *args, **options)

    monkeypatch.setattr("os.mkdir", mkdir)
    monkeypatch.setattr(Path, "is_mount", lambda path: not path.is_relative_to("/content") and is_mount(path))
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(lines(*PAIRS))


def what_is_left():
    record = json.loads(Path("run/run.json").read_text())
    kept = {path: path.read_bytes() for path in Path("run").glob("*/*") if path.parent.name != "curves"}
    return kept | {name: record.get(name) for name in ("trained", "history", "day")}


def seal_a_run():
    """Makes the folder of a run that got as far as step 2; returns what is to stay of it."""
    nb = run_cells("install", "run-folder", output_dir="run")
    for name in ("checkpoint-2", "adapter", "merged"):
        Path("run", name).mkdir(parents=True)
        Path("run", name, "weights.safetensors").write_text("weights")
        nb["seal"](Path("run", name))
    nb["write_json"](
        Path("run/run.json"), {"trained": 2, "history": [1], "day": "2026-01-01", "parameters": {"seed": 42}}
    )
    return what_is_left()


def stop(models, **changes):
    """The exception that stops the cells before the weights are loaded, and the cell that it comes from."""
    parameters = {**SMALL, "base_model": models["qwen"], "dataset_id": "good.jsonl", "output_dir": "run", **changes}
    with pytest.raises(Exception) as found:
        run_cells("install", list(CELLS)[list(CELLS).index("train") - 1], **parameters)
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
    with pytest.raises(AssertionError, match="/content.* is made though"):
        run_cells("install", "state", output_dir="/content/drive/of-nobody")


PARAMETERS = {  # a parameter's kind, what a YAML file, a form or a command line makes of it, and what is meant
    "rate": (float, ["5e-5", 5e-5, " 0.00005 "], 5e-5),
    "steps": (int, [200, "200", 200.0, "2e2"], 200),
    "beta": (float, [1, "1", 1.0], 1.0),
    "off": (bool, [False, "false", "False", 0, "0"], False),
    "on": (bool, [True, "true", "TRUE", 1], True),
    "revision": (str, ["1234567", 1234567], "1234567"),
    "empty": (str, ["", None, " "], ""),
}
NO_PARAMETERS = {  # a kind, and what cannot be meant
    float: ["five", "0,1", "", None, True, [1]],
    int: ["4.5", 4.5, float("inf"), float("nan"), "1,000", False, None],
    bool: ["maybe", 2, None, ""],
    str: [1e5, True, ["a"]],
}
wired = pytest.mark.skipif("read_parameters" not in CELLS["machine"], reason="the notebook has no read_parameters")


def read_parameters():
    """The function of the notebook that reads parameters, alone."""
    found = [node for node in ast.parse(CELLS["machine"]).body if isinstance(node, ast.FunctionDef)]
    namespace = {}
    exec(compile(ast.Module(found, []), "machine", "exec"), namespace)
    return namespace["read_parameters"]


@wired
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_is_the_number_that_is_meant(name):
    kind, values, meant = PARAMETERS[name]
    for value in values:
        (read,) = read_parameters()({"p": value}, {"p": kind}).values()
        assert read == meant and type(read) is kind


@wired
@pytest.mark.parametrize("kind", NO_PARAMETERS, ids=str)
def test_a_parameter_that_is_none_is_refused_in_a_sentence(kind):
    for value in NO_PARAMETERS[kind]:
        with pytest.raises(ValueError, match=re.escape(f"some_rate = {value!r} has to be ")):
            read_parameters()({"some_rate": value}, {"some_rate": kind})


@wired
def test_parameters_of_a_yaml_file():
    """YAML 1.1 reads text where the point is missing, and papermill passes it on."""
    given = yaml.safe_load("{learning_rate: 5e-5, max_steps: '4', warmup_steps: 1.0, push_to_hub: 'false', beta: 1}")
    nb = run_cells("install", "machine", **SMALL | given)
    read = {name: nb[name] for name in given}
    assert read == dict(learning_rate=5e-5, max_steps=4, warmup_steps=1, push_to_hub=False, beta=1.0)
    assert [type(value) for value in read.values()] == [float, int, int, bool, float]


def test_run_of_the_earlier_version(models):
    seal_a_run()
    Path("run/run.json").write_text('{"parameters": {}}')
    before = what_is_left()
    error, cell = stop(models)
    assert cell == "state" and "output_dir" in str(error) and what_is_left() == before


ROOM = {  # what is asked for it, what that says, the cell that stops, its sentence
    "disk": ("shutil.disk_usage", SimpleNamespace(free=1e5), "base", "needs .* GB and has .* GB"),
    "memory": ("psutil.virtual_memory", SimpleNamespace(available=1e5), "split-of-a-step", "GB: lower max_length"),
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
        run_cells("install", "train", **SMALL, base_model="model", dataset_id="good.jsonl")
    assert not Path("attacked").exists()


def test_a_run_keeps_to_the_commits_that_it_began_with(hub, models):
    """Of base and data, told by what is read of them; unless another is asked for."""
    Path("set").mkdir()

    def publish(commit, family):
        Path("set/train.jsonl").write_text(lines(*PAIRS, {**PAIRS[0], "question": commit}))
        hub.add("some/moving", models[family], oid=commit * 40)
        hub.add("some/set", "set", "dataset", oid=commit * 40)

    def commits(**changes):
        nb = run_cells("install", "rows", **SMALL, base_model="some/moving", dataset_id="some/set", **changes)
        return ("a" if "<|im_start|>" in nb["tokenizer"].chat_template else "b") + nb["raw"][40]["question"]

    publish("a", "qwen")
    assert commits(output_dir="run") == "aa"
    Path("run/run.json").write_text(json.dumps({**json.loads(Path("run/run.json").read_text()), "trained": 2}))
    publish("b", "llama3")
    assert commits(output_dir="run") == "aa" and commits(output_dir="new") == "bb"
    assert commits(output_dir="pinned", base_revision="a" * 40) == "ab"
    with pytest.raises(AssertionError, match="dataset_revision.*another output_dir"):
        commits(output_dir="run", dataset_revision="b" * 40)
