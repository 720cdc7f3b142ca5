"""The unchanged notebook in an environment of Colab's versions, as Colab's kernel would run it: pytest -m colab -s."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rehearsal.__main__ import PARAMETERS, rehearse

LIST = Path(__file__).with_name("colab.txt")
SECRETS = """
class SecretNotFoundError(Exception):
    pass


def get(name):
    raise SecretNotFoundError(name)
"""


@pytest.mark.colab
def test_run_all_in_colab(tmp_path, monkeypatch):
    python = tmp_path / "venv" / "bin" / "python"
    theirs = shutil.which("python3.13") and not subprocess.call(["python3.13", "--version"])  # a shim may lead nowhere
    subprocess.run(["python3.13" if theirs else sys.executable, "-m", "venv", python.parents[1]], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", LIST], check=True)
    before = subprocess.check_output([python, "-m", "pip", "freeze"], text=True).splitlines()
    colab = tmp_path / "site" / "google" / "colab"  # imported when the kernel starts, as theirs is
    colab.mkdir(parents=True)
    (colab / "__init__.py").touch()
    (colab / "userdata.py").write_text(SECRETS)
    (tmp_path / "site" / "sitecustomize.py").write_text("import google.colab\n")
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    start = dict(argv=command, display_name="Colab", language="python", env={"PYTHONPATH": str(tmp_path / "site")})
    (kernel / "kernel.json").write_text(json.dumps(start))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    rehearse(tmp_path / "output", **PARAMETERS | dict(max_steps=8, warmup_steps=2, eval_pairs=16))

    run = json.loads((tmp_path / "output" / "dpo_run" / "run.json").read_text())
    after = subprocess.check_output([python, "-m", "pip", "freeze"], text=True).splitlines()
    kept = ("torch==", "torchvision==", "numpy==", "ipython==", "ipykernel==")
    assert [line for line in before if line.startswith(kept)] == [line for line in after if line.startswith(kept)]
    assert run["merged"] == 8 and run["how"]["torch"].startswith(dict(map(split, before))["torch"])
    assert not any(line.startswith("torchao==") for line in after)
    subprocess.run([python, "-c", "import torchvision; torchvision.ops.nms"], check=True)
    print(subprocess.check_output([python, "--version"], text=True), *after, sep="\n")


def split(line):
    return line.partition("==")[::2]
