"""Runs of the notebook, each in a process of its own that need not import the libraries again.

A process of Python's own fork server has them loaded; the notebook's code is the same as ever and can be killed.
"""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from unittest.mock import patch

LIBRARIES = """torch bitsandbytes datasets peft trl.trainer.dpo_trainer wandb sentencepiece pandas matplotlib.pyplot IPython
nbformat transformers.models.auto.modeling_auto transformers.integrations.sdpa_attention""".split()


def run(folder, parameters, environment):
    """What a process does: its output is added to log.txt in the folder."""
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)
    from rehearsal.notebook import CELLS, run_cells

    run_cells("install", list(CELLS)[-1], **parameters)


def serve(environment):
    """Starts the fork server with what the libraries read of the environment when they are imported."""
    multiprocessing.set_forkserver_preload(LIBRARIES)
    with patch.dict(os.environ, environment):
        forkserver.ensure_running()


def start(folder, parameters, environment):
    """Starts the notebook in a folder and returns its process."""
    folder.mkdir(exist_ok=True, parents=True)
    process = multiprocessing.get_context("forkserver").Process(
        target=run, args=(folder, parameters, environment), daemon=True
    )
    process.start()
    return process


def read(path):
    return path.read_text(errors="replace") if path.exists() else ""


def finish(process, folder):
    """Waits for a run to end well. Returns what all runs have printed in its folder."""
    process.join()
    assert process.exitcode == 0, read(folder / "log.txt")[-3000:]
    return read(folder / "log.txt")
