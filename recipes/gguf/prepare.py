"""Makes a folder for llama.cpp's converter: the merged model with the tokenizer files of its base.

python recipes/gguf/prepare.py [BASE [MERGED [FOLDER]]]
"""

import argparse
import json
from pathlib import Path

from transformers.utils import cached_file

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("base", nargs="?", default="teknium/OpenHermes-2.5-Mistral-7B")
parser.add_argument("merged", nargs="?", type=Path, default=Path("dpo_run/merged"))
parser.add_argument(
    "folder", nargs="?", type=Path, default=Path("dpo_run/for_gguf"), help="it is made"
)
arguments = parser.parse_args()
base, merged, folder = arguments.base, arguments.merged, arguments.folder

revision = json.loads((merged / "run.json").read_text())["parameters"]["base_revision"]
model, settings = (
    cached_file(base, f"tokenizer{end}", revision=revision) for end in (".model", "_config.json")
)
config = json.loads(Path(settings).read_text())
config.pop("chat_template", None)  # the result's own stands in chat_template.jinja
config.update(json.loads((merged / "tokenizer_config.json").read_text()))  # bos and eos as well
folder.mkdir()
for path in [
    *merged.glob("*.safetensors*"),
    merged / "config.json",
    merged / "chat_template.jinja",
]:
    (folder / path.name).symlink_to(path.resolve())
(folder / "tokenizer.model").symlink_to(Path(model).resolve())
(folder / "tokenizer_config.json").write_text(json.dumps(config))
