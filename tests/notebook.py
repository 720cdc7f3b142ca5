"""Takes cells and functions out of the notebook, so that the tests hold the notebook itself and never a copy of it."""

import ast
import sys
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
PATH = ROOT / "dpo_finetune.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CELLS = {cell.id: cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"}


def run_cell(name, namespace):
    """Runs one cell, magics included, in a namespace."""
    exec(compile(TransformerManager().transform_cell(CELLS[name]), name, "exec"), namespace)


def run_cells(first, last, namespace=None, **parameters):
    """Runs the cells from `first` to `last`; parameters take the place of the parameters cell's, as papermill does it."""
    names = list(CELLS)
    namespace = {} if namespace is None else namespace
    for name in names[names.index(first) : names.index(last) + 1]:
        run_cell(name, namespace)
        if name == "parameters":
            namespace.update(parameters)
    return namespace


def functions(**parameters):
    """A namespace with the notebook's parameters, imports, functions and capitalised constants, and nothing run.

    What the cells on the run folder and the sources find is as for a new run with local sources.
    """
    found = dict(sys=sys, run={}, trained=False, merged=False, checkpoint=None, adapted=0, base_files={})
    found |= dict(base_commit=None, dataset_commit=None, use_safetensors=True)
    namespace = run_cells("parameters", "processes", found, **parameters)
    for name, source in CELLS.items():
        tree = ast.parse(TransformerManager().transform_cell(source))
        tree.body = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "lower").isupper())
        ]
        exec(compile(tree, name, "exec"), namespace)
    return namespace
