"""Makes a folder for llama.cpp's converter: the merged model, with the tokenizer files of the base it was made of.

python recipes/gguf/prepare.py [MERGED [FOLDER]] [--base BASE]
"""

import argparse
import json
from pathlib import Path

from transformers.utils import cached_file

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("merged", nargs="?", type=Path, default=Path("dpo_run/merged"))
parser.add_argument(
    "folder", nargs="?", type=Path, default=Path("dpo_run/for_gguf"), help="it is made"
)
parser.add_argument("--base", help="if it was a local folder; else it stands in MERGED/run.json")
options = parser.parse_args()

made_of = json.loads((options.merged / "run.json").read_text(encoding="utf-8"))["parameters"]
base, revision = options.base or made_of["base_model"], made_of["base_revision"]
options.folder.mkdir()


def from_base(name):
    """Where a file of the base is, or None if the base has none of this name."""
    return cached_file(base, name, revision=revision, _raise_exceptions_for_missing_entries=False)


def link(path):
    (options.folder / path.name).symlink_to(path.resolve())


for path in [*options.merged.glob("*.safetensors*"), options.merged / "config.json"]:
    link(path)
link(options.merged / "chat_template.jinja")
model = from_base("tokenizer.model")
if model:
    # transformers does not save this file, and without it the converter splits text into other tokens.
    link(Path(model))
    settings = json.loads(Path(from_base("tokenizer_config.json")).read_text(encoding="utf-8"))
    settings.pop("chat_template", None)  # the result's own stands in chat_template.jinja
    settings.update(
        json.loads((options.merged / "tokenizer_config.json").read_text(encoding="utf-8"))
    )
    (options.folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
else:
    link(options.merged / "tokenizer.json")
    link(options.merged / "tokenizer_config.json")
