import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"  # models as small as these run faster on one thread than on two
# No account and no network, whatever the machine has: set before any of the libraries is imported.
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
    os.environ.pop(name, None)
os.environ["HF_TOKEN_PATH"] = os.devnull
os.environ["WANDB_MODE"] = "offline"

import standins  # noqa: E402
from trainers import build_trainer  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, default=4, help="how many kill points tests/test_survival.py tries"
    )


def pytest_configure(config):
    # pytest-xdist would begin with the files that have most tests.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The files that take longest go first, so that no process is left alone with one of them."""
    slow = """real_model rehearsal processes recipes survival training any_order reference speed
    plan simulate merge copyable""".split()
    place = {f"test_{name}.py": i for i, name in enumerate(slow)}
    items.sort(key=lambda item: place.get(item.path.name, len(slow)))


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory):
    """The folder of one rehearsal, and what the command printed: made once, however many processes run the tests."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    output, printed = shared / "rehearsal" / "output", shared / "rehearsal" / "printed.txt"
    with FileLock(shared / "rehearsal.lock"):
        if not printed.exists():
            picture = output.parent / "curves.png"
            command = [sys.executable, "-m", "rehearsal", "--output", output, "--picture", picture]
            shown = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
            done = subprocess.run(command, cwd=ROOT, env=shown, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            printed.write_text(done.stdout)
    return output, printed.read_text()


FAMILIES = ("chatml", "llama3", "qwen", "mistral-instruct")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """family -> folder of its tiny model"""
    return {
        family: str(standins.make(family, tmp_path_factory.mktemp(family))) for family in FAMILIES
    }


def some_pairs(count, seed=0):
    """Pairs in the columns of Intel/orca_dpo_pairs whose chosen answers share a word that the rejected ones lack."""
    rng = random.Random(seed)
    words = standins.TEXT.split()
    systems = ["", "You are an AI assistant."]
    return [
        {
            "system": rng.choice(systems),
            "question": f"Question {i}: " + " ".join(rng.choices(words, k=8)) + "?",
            "chosen": "Licensor " + " ".join(rng.choices(words, k=rng.randint(1, 6))),
            "rejected": " ".join(rng.choices(words, k=rng.randint(1, 6))),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in some_pairs(60)))
    return str(path)


@pytest.fixture
def prepare(models, pairs_file, tmp_path):
    """Runs the notebook's cells until its trainer is built; the base is not asked anything."""

    def run(family="qwen", precision=torch.float32, **changes):
        sources = dict(base_model=models.get(family, family), dataset_id=pairs_file)
        sources["output_dir"] = str(tmp_path / "run")
        return build_trainer(precision, **{**sources, **changes})

    return run
