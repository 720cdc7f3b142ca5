"""The unchanged notebook among the packages of Colab and of Kaggle, with a base that has no tokenizer.json.

`pytest -m colab -s` builds an environment of each place's list, with uv beside it and without, presses *Run all* twice in one
kernel, and tells what was installed, what was written to stderr, and how long it took. It takes several GB of packages,
removes them again, and keeps uv's downloads if UV_CACHE_DIR names a folder for them. What once broke on both places is tried
every time by itself, in a minute.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import papermill
import pytest
from nbclient import NotebookClient

from rehearsal.__main__ import BASE, DATASET, PARAMETERS
from rehearsal.hub import Hub
from rehearsal.notebook import PATH, ROOT
from rehearsal.world import make_model, make_pairs

TESTS = Path(__file__).parent
SMALL = PARAMETERS | dict(max_steps=8, warmup_steps=2, eval_pairs=16, output_dir="dpo_run")

# A stand-in of what the place puts into every Python process, by which the notebook knows where it is.
COLAB = {
    "sitecustomize.py": "import google.colab\n",
    "google/colab/__init__.py": "",
    "google/colab/errors.py": "class Error(Exception):\n    pass\n",
    "google/colab/userdata.py": """
from google.colab import errors


class NotebookAccessError(Exception):
    pass


class SecretNotFoundError(errors.Error):
    pass


def get(name):
    raise SecretNotFoundError(name)
""",
}
KAGGLE = {
    "kaggle_secrets.py": """
class BackendError(Exception):
    pass


class UserSecretsClient:
    def get_secret(self, label):
        raise BackendError(f"No user secrets exist for kernel id 1 and label {label}.")
""",
}
PLACES = {  # its Python, what it puts into every process, and its environment
    "colab": ("3.13", COLAB, {"UV_SYSTEM_PYTHON": "true"}),
    "kaggle": ("3.12", KAGGLE, {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}),
}
KEPT = ("torch", "torchvision", "numpy", "pandas", "protobuf", "ipython", "ipykernel", "ipywidgets")


def python_of(release):
    """The interpreter of a release such as "3.13": on PATH, or pyenv's; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [
        shutil.which(f"python{release}"),
        *sorted(pyenv.glob(f"versions/{release}.*/bin/python{release}")),
    ]
    for python in filter(None, found):
        if (
            subprocess.run([python, "--version"], capture_output=True).returncode == 0
        ):  # a shim may lead nowhere
            return python
    return None


def versions(python):
    """The packages that an environment has: name -> version."""
    listed = subprocess.check_output([python, "-m", "pip", "list", "--format", "json"], text=True)
    return {
        package["name"].lower().replace("_", "-"): package["version"]
        for package in json.loads(listed)
    }


def pin(name, place="colab"):
    """The line of a place's list that names a package."""
    return re.search(rf"^{name}==.*", (TESTS / f"{place}.txt").read_text(), re.MULTILINE)[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the rehearsal's model, of which the tokenizer is a tokenizer.model alone, and its pairs."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    assert (folder / "model" / "tokenizer.model").exists() and not (
        folder / "model" / "tokenizer.json"
    ).exists()
    (folder / "pairs").mkdir()
    (folder / "pairs" / "train.jsonl").write_text(
        "".join(json.dumps(pair) + "\n" for pair in make_pairs())
    )
    return folder


@pytest.fixture(scope="module")
def uv(tmp_path_factory):
    """A folder that holds uv and nothing else, as it is on Colab's and Kaggle's PATH; and where it keeps downloads."""
    folder = tmp_path_factory.mktemp("uv")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run(
        [folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"], check=True
    )
    (folder / "bin").mkdir()
    (folder / "bin" / "uv").symlink_to(folder / "venv" / "bin" / "uv")
    kept = os.environ.get("UV_CACHE_DIR")
    yield folder / "bin", kept or str(folder / "downloads")
    shutil.rmtree(folder)


@pytest.fixture
def replica(request, tmp_path, uv, monkeypatch):
    """(place, installer) -> the Python of an environment like the place's, which is also the kernel "python3"."""
    place, installer = request.param
    release, modules, environment = PLACES[place]
    theirs = python_of(release)
    if theirs is None:
        pytest.skip(
            f"{place} has Python {release}, and there is no python{release} here, on PATH or in pyenv."
        )
    binaries, downloads = uv
    environment = environment | {"UV_CACHE_DIR": downloads}
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([theirs, "-m", "venv", tmp_path / "venv"], check=True)
    install = [
        binaries / "uv",
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "-r",
        TESTS / f"{place}.txt",
    ]
    subprocess.run(install, env=os.environ | {"UV_CACHE_DIR": downloads}, check=True)

    for name, text in modules.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    path = [python.parent, "/usr/bin", "/bin"]
    assert not any((Path(folder) / "uv").exists() for folder in path)
    if installer == "uv":
        path.append(binaries)
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "PATH": ":".join(map(str, path))}
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    start = dict(argv=command, display_name=place, language="python", env=environment)
    (kernel / "kernel.json").write_text(json.dumps(start))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    yield python
    shutil.rmtree(tmp_path / "venv")


def run_all(client, cells):
    """Executes the cells in the kernel that runs. Returns cell id -> seconds since the start, and the lines of stderr."""
    start = time.time()
    ended = {}
    lines = []
    for number, cell in enumerate(cells):
        client.execute_cell(cell, number)
        ended[cell.get("id")] = time.time() - start
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                lines += [f"{cell.id}: {line}" for line in output.text.splitlines() if line.strip()]
    return ended, lines


def in_seconds(ended):
    """The time of a run in words: in all, and of each cell that takes half a second."""
    slow = []
    before = 0
    for cell, after in ended.items():
        if after - before >= 0.5:
            slow.append(f"{cell} {after - before:.1f}")
        before = after
    return f"{before:.0f} s ({', '.join(slow)})"


@pytest.mark.colab
@pytest.mark.parametrize(
    "replica",
    [(place, how) for place in PLACES for how in ("uv", "pip")],
    indirect=True,
    ids="-".join,
)
def test_run_all_twice(replica, world, tmp_path, monkeypatch, request):
    before = versions(replica)
    notebook = papermill.parameterize.parameterize_notebook(
        papermill.iorw.load_notebook_node(str(PATH)), SMALL
    )
    with Hub(tmp_path / "hub") as hub:
        hub.add(BASE, world / "model")
        hub.add(DATASET, world / "pairs", repo_type="dataset")
        for name, value in hub.environment(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MPLBACKEND", raising=False)
        monkeypatch.delenv("PYTHONWARNINGS", raising=False)
        place = {"metadata": {"path": str(tmp_path)}}
        client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources=place)
        with client.setup_kernel():
            runs = [run_all(client, notebook.cells) for _ in range(2)]
        first_pair = [cell.get("id") for cell in notebook.cells].index("first-pair")
        fresh = NotebookClient(notebook, timeout=None, kernel_name="python3", resources=place)
        with fresh.setup_kernel():
            installed, _ = run_all(fresh, notebook.cells[: first_pair + 1])

    after = versions(replica)
    changed = {name: (before.get(name), after.get(name)) for name in {*before, *after}}
    print(f"\n{request.node.callspec.id}. Installed, removed or replaced:")
    for name, (old, new) in sorted(changed.items()):
        if old != new:
            print(f"  {name}: {old} -> {new}")
    for which, (ended, lines) in zip(("first", "second"), runs, strict=True):
        last = max(ended.values())
        print(
            f"{which} run: installed after {ended['install']:.0f} s, rows read after {ended['rows']:.0f} s, all {last:.0f} s"
        )
        for line in dict.fromkeys(lines):
            print(f"  {line[:200]} ({lines.count(line)} times)")
    print("with everything installed, to the first pair in a new kernel:", in_seconds(installed))

    run = json.loads((tmp_path / "dpo_run" / "run.json").read_text())
    assert run["merged"] == SMALL["max_steps"]
    assert {name: before.get(name) for name in KEPT} == {name: after.get(name) for name in KEPT}
    assert "torchao" in before and "torchao" not in after
    subprocess.run([replica, "-c", "import torchvision; torchvision.ops.nms"], check=True)


# The cells from the first to the pairs, on the base of which the folder is given; prints which protobuf read it.
CELLS = """
import sys
import google.protobuf
from rehearsal.notebook import run_cells
base, pairs, output = sys.argv[1:]
sizes = dict(eval_pairs=8, max_steps=4, warmup_steps=1, max_length=512)
nb = run_cells("install", "rows", base_model=base, dataset_id=pairs, output_dir=output, **sizes)
assert nb["tokenizer"].encode("<|im_start|>", add_special_tokens=False) == [601]
print(google.protobuf.__version__)
"""


def test_a_tokenizer_model_is_read_with_the_protobuf_of_colab(models, pairs_file, tmp_path):
    """sentencepiece 0.2.3 refused it, and the notebook ended in "Error parsing line b'\\x0e' in …/tokenizer.model"."""
    base = Path(models["chatml"])
    assert (base / "tokenizer.model").exists() and not (base / "tokenizer.json").exists()
    required = (ROOT / "requirements.txt").read_text()
    ours = re.search(r"^sentencepiece.*", required, re.MULTILINE)[0]
    theirs = [pin(name) for name in ("protobuf", "googleapis-common-protos", "tiktoken", "regex")]
    layer = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        tmp_path / "layer",
    ]
    subprocess.run([*layer, ours, *theirs], check=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path / "layer", TESTS, ROOT)))
    }
    command = [sys.executable, "-c", CELLS, base, pairs_file, tmp_path / "run"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == pin("protobuf").partition("==")[2]
