"""Runs of the converted notebook, each in a process of its own that need not import the libraries again.

A process of Python's own fork server has them loaded; the notebook's code is the same as ever and can be killed.
"""

import json
import multiprocessing
import os
import runpy
import sys
from multiprocessing import forkserver
from unittest.mock import patch

LIBRARIES = """torch bitsandbytes datasets peft trl.trainer.dpo_trainer wandb sentencepiece pandas matplotlib.pyplot
transformers.models.auto.modeling_auto transformers.integrations.sdpa_attention""".split()


def run(script, folder, environment):
    """What a process does: its output is added to log.txt in the folder."""
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)
    runpy.run_path(str(script), run_name="__main__")


def serve(environment):
    """Starts the fork server with what the libraries read of the environment when they are imported."""
    multiprocessing.set_forkserver_preload(LIBRARIES)
    with patch.dict(os.environ, environment):
        forkserver.ensure_running()


def start(script, folder, parameters, **environment):
    """Starts the script in a folder and returns its process."""
    folder.mkdir(exist_ok=True, parents=True)
    settings = {"PARAMETERS": json.dumps(parameters), **environment}
    process = multiprocessing.get_context("forkserver").Process(
        target=run, args=(script, folder, settings), daemon=True
    )
    process.start()
    return process
