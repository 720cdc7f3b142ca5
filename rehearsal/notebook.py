"""Takes cells out of the notebook and runs them, so that the tests hold the notebook itself and
never a copy of it.
"""

from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
PATH = ROOT / "dpo_finetune.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CELLS = {cell.id: cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"}


def run_cell(name, namespace):
    """Runs one cell in a namespace, and returns that."""
    exec(compile(TransformerManager().transform_cell(CELLS[name]), name, "exec"), namespace)
    return namespace


def alone(name):
    """What a cell defines when it is copied out of the notebook and run by itself: its
    namespace.
    """
    return run_cell(name, {"__name__": "copied"})


def run_cells(first, last, namespace=None, **parameters):
    """Runs the cells from `first` to `last`; parameters take the place of the parameters cell's, as
    papermill does it.
    """
    names = list(CELLS)
    namespace = {} if namespace is None else namespace
    for name in names[names.index(first) : names.index(last) + 1]:
        run_cell(name, namespace)
        if name == "parameters":
            namespace.update(parameters)
    return namespace
