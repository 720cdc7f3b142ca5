"""An executed notebook as one HTML file that needs no network.

Notebooks leave their formulas to MathJax, which a page fetches from elsewhere. Here they are
written as MathML, which browsers draw by themselves.
"""

import re

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

CODE = re.compile(r"(```.*?```|`[^`]*`)", re.DOTALL)
DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
INLINE = re.compile(r"\$([^\s$](?:[^$]*[^\s$])?)\$")
# Jupyter's own page, without the scripts that it would fetch: MathJax, and those of widgets and
# diagrams; and with the folded cells folded, as they are in Colab, Jupyter and Kaggle.
TEMPLATE = """{% extends "lab/index.html.j2" %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block input_group %}
{% if cell.metadata.cellView == "form" %}
<details style="margin-left: 80px"><summary>{{ cell.source.split("\n")[0][9:] }}</summary>
{{ super() }}
</details>
{% else %}{{ super() }}{% endif %}
{% endblock input_group %}
"""
MADE_WITH = (
    "# This cell is of a rehearsal on a CPU, not of the notebook: it takes the place of the above."
)


def with_mathml(text):
    """A text in Markdown with its formulas as MathML; what stands in it as code is left alone."""

    def displayed(formula):
        return f"<div>{convert(formula[1], display='block')}</div>"

    def inline(formula):
        return convert(formula[1])

    parts = CODE.split(text)
    for place in range(0, len(parts), 2):  # code is every second part
        parts[place] = INLINE.sub(inline, DISPLAYED.sub(displayed, parts[place]))
    return "".join(parts)


def write_page(executed):
    """Writes the notebook `executed`, a Path, as HTML beside it."""
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = f"{MADE_WITH}\n{cell.source}"
    exporter = HTMLExporter()
    exporter.raw_template = TEMPLATE
    html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": executed.stem}})
    executed.with_suffix(".html").write_text(html, encoding="utf-8")
