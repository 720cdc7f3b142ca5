"""Runs of the converted notebook, each in a process of its own that need not import the libraries again.

A process of Python's own fork server has them loaded; the notebook's code is the same as ever and can be killed.
"""

import json
import multiprocessing
import os
import runpy
import sys

LIBRARIES = [
    *("torch", "bitsandbytes", "datasets", "peft", "trl.trainer.dpo_trainer", "wandb", "sentencepiece", "pandas"),
    *("matplotlib.pyplot", "IPython.display", "transformers.pipelines", "transformers.models.auto.modeling_auto"),
]


def run(script, folder, environment):
    """What a process does: its output is added to log.txt in the folder."""
    os.chdir(folder)
    os.environ.update(environment)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)
    runpy.run_path(str(script), run_name="__main__")


def start(script, folder, parameters, **environment):
    """Starts the script in a folder. The environment that the libraries read when imported is the first call's."""
    folder.mkdir(exist_ok=True, parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    process = context.Process(
        target=run, args=(script, folder, {"PARAMETERS": json.dumps(parameters), **environment}), daemon=True
    )
    process.start()
    return process
