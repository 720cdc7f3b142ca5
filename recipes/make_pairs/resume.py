"""A file of JSON lines that a run fills as it goes, and goes on with if it was cut off."""

import hashlib
import json


def begin_or_resume(path, made_with):
    """The rows that the file holds already, behind a first line that says what they were made with.

    Raises SystemExit if the file was made with something else.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # the last line was not written to its end
        path.write_text(whole, encoding="utf-8")
    if not whole:
        append(path, [made_with])
        return []
    first, *rows = [json.loads(line) for line in whole.rstrip("\n").split("\n")]
    changed = [name for name in made_with if first.get(name) != made_with[name]]
    if changed:
        what = f"{path} was made with another {', '.join(changed)}"
        raise SystemExit(f"{what}: delete it, or choose another --output.")
    return rows


def append(path, rows):
    """Writes rows to the end of the file."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fingerprint(content):
    """A short name for a list of prompts or answers, which another list does not share."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
