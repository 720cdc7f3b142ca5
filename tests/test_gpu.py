"""The checks for a GPU: rehearsed on a CPU, none takes the others down, all know the notebook."""

import ast
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from unittest.mock import MagicMock

import pytest

from benchmarks import gpu
from rehearsal.notebook import CELLS, ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"


def test_rehearsed_on_a_cpu(tmp_path):
    """Kernels, and a small model in the 7B's place by the notebook's own cells."""
    names = ["addmm", "head", "attention", "write-7b", "7b"]
    folders = ["--folder", tmp_path / "work", "--output", tmp_path / "found"]
    command = [sys.executable, SCRIPT, "--rehearse", *folders, "--checks", *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found" / "gpu.json").read_text())
    assert list(found["checks"]) == names
    for name, check in found["checks"].items():
        assert "error" not in check, f"{name}: {check['error']}"
        assert check["wrong"] == [], name
    assert found["checks"]["addmm"]["bfloat16"]["relative error"] < 1e-5
    small = found["checks"]["7b"]
    assert len(small["losses"]) == 3 and len(small["seconds a step"]) == 2
    assert small["allocated_gb"] is None  # no GPU, and not 0
    report = (tmp_path / "found" / "gpu.md").read_text()
    assert "| 7b | nothing wrong" in report and "## attention" in report


def fine(place):
    return {"wrong": [], "measured": 1.5, "only on a GPU": None}


def dies(place):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(place):
    time.sleep(3600)


def test_a_check_that_dies_or_hangs_leaves_the_others(tmp_path):
    """In processes as a GPU needs them, under the limit of one check and under that of all."""
    checks = [
        gpu.Check("dies", dies, 300),
        gpu.Check("hangs", hangs, 1),
        gpu.Check("fine", fine, 300),
    ]
    place = gpu.Place(tmp_path, rehearse=False)
    found = gpu.run_checks(checks, place, tmp_path, minutes=10)
    written = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert written == found
    assert "died (exit status -11)" in found["dies"]["error"]
    assert "stopped after 1 s" in found["hangs"]["error"]
    assert found["fine"]["measured"] == 1.5 and found["fine"]["only on a GPU"] is None
    assert "| only on a GPU | – |" in (tmp_path / "gpu.md").read_text()


def test_the_limit_of_all_checks_holds(tmp_path):
    checks = [gpu.Check("hangs", hangs, 300), gpu.Check("late", fine, 300)]
    start = time.monotonic()
    found = gpu.run_checks(checks, gpu.Place(tmp_path, rehearse=False), tmp_path, minutes=0.05)
    assert time.monotonic() - start < 30
    assert "stopped after 3 s" in found["hangs"]["error"]
    assert found["late"]["error"] == "not run: no time was left"
    assert multiprocessing.active_children() == []  # a GPU's memory would stay taken


def test_the_checks_name_what_the_notebook_has():
    """Cells by their ids, and names that the cells define: no CPU reaches all of these lines."""
    source = SCRIPT.read_text()
    called = ("run_cell", "run_cells", "run_after", "run_in_shell", "run_after_in_shell")
    cells = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in called:
            cells += [
                argument.value for argument in node.args if isinstance(argument, ast.Constant)
            ]
    assert len(cells) > 15
    assert [cell for cell in cells if cell not in CELLS] == []
    names = re.findall(r'(?:notebook|user_ns)\["(\w+)"\]', source)
    notebook = "\n".join(CELLS.values())
    assert len(names) > 15
    assert [name for name in names if not re.search(rf"\b{name}\b", notebook)] == []


def test_a_card_that_says_it_is_older(monkeypatch):
    """What the cell `machine` is told of an imitated T4; the card beneath is made up as well."""

    class Card:
        name, major, minor, total_memory = "a large card", 9, 0, 150e9
        multi_processor_count = 132

    driver = MagicMock()
    monkeypatch.setitem(sys.modules, "triton", driver)
    monkeypatch.setitem(sys.modules, "triton.runtime", driver)
    shares = []
    for name, answer in {
        "is_available": lambda: True,
        "get_device_properties": lambda: Card(),
        "get_arch_list": lambda: ["sm_90"],
        "memory_reserved": lambda: 1e9,
        "set_per_process_memory_fraction": shares.append,
    }.items():
        monkeypatch.setattr(gpu.torch.cuda, name, answer)
    with gpu.imitated_t4():
        card = gpu.torch.cuda.get_device_properties()
        assert (card.major, card.minor, card.total_memory) == (7, 5, 15.8e9)
        assert card.multi_processor_count == 132  # the rest is the real card's
        assert gpu.torch.cuda.mem_get_info()[0] == 15.8e9 - 0.5e9 - 1e9
        assert not gpu.torch.backends.cuda.flash_sdp_enabled()
    assert gpu.torch.backends.cuda.flash_sdp_enabled()
    assert shares == [pytest.approx(0.102)]  # of the real card: what a T4 leaves to PyTorch
