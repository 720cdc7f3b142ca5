"""The README's recipes for after training: its own code blocks, run by the real tools on a rehearsal's model.

Only names, tasks, sizes and ports are replaced. `pytest -m recipes` runs those that need more than tests/requirements.txt.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from notebook import PATH, ROOT, functions, run_cell
from safetensors.torch import load_file
from test_tokenizer import TEXTS
from transformers import AutoTokenizer

from rehearsal.__main__ import SETTINGS
from rehearsal.hub import Hub

README = ROOT / "README.md"
QUESTION = "What is a Large Language Model?"
NAMES = {
    "teknium/OpenHermes-2.5-Mistral-7B": "rehearsal/tiny-chat",
    "your-name/NeuralHermes-2.5-Mistral-7B": "rehearsal/tiny-chat-dpo",
    "argilla/distilabel-intel-orca-dpo-pairs": "rehearsal/tiny-pairs",
}
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: tasks/tiny.jsonl}
output_type: multiple_choice
test_split: train
fewshot_split: train
doc_to_text: "<|im_start|>user\\n{{question}}<|im_end|>\\n<|im_start|>assistant\\n"
target_delimiter: ""
doc_to_choice: ["Sure", "No"]
doc_to_target: 0
metric_list:
  - metric: acc
"""
RENDER = """package main
import ("encoding/json"; "os"; "text/template")
func main() {
	var turns []struct{ Role, Content string }
	if err := json.Unmarshal([]byte(os.Args[2]), &turns); err != nil { panic(err) }
	template.Must(template.New("").Parse(os.Args[1])).Execute(os.Stdout, map[string]any{"Messages": turns})
}
"""


@pytest.fixture(scope="module")
def environment(rehearsal, tmp_path_factory):
    """For the commands: this Python's programs first, and the rehearsal's Hub, a copy of it, in the place of the real one."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(rehearsal[0] / "hub", folder / "hub")
    with Hub(folder / "hub") as hub:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        programs = {"PATH": path, "GRADIO_ANALYTICS_ENABLED": "False"}
        yield os.environ | SETTINGS | hub.environment(folder / "cache") | programs


@pytest.fixture(scope="module")
def place(rehearsal, environment, tmp_path_factory):
    """The folder that the recipes are run in, with dpo_run/merged as the notebook left it."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(rehearsal[0] / "dpo_run" / "merged", place / "dpo_run" / "merged")
    shutil.copy(PATH, place)
    return place


def section():
    return README.read_text().split("\n## After training\n")[1].split("\n## ")[0]


def recipe(part, changes=None):
    """The text of the README's one code block with `part` in it, names replaced and without its pip line."""
    (text,) = [text for text in re.findall(r"^```\w+\n(.*?)^```$", section(), re.M | re.S) if part in text]
    text = re.sub(r"^pip install .*\n", "", text, flags=re.M)
    for old, new in NAMES.items():
        text = text.replace(old, new)
    for old, new in (changes or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def run(place, environment):
    def run(program, part, changes=None):
        words = [shutil.which(program, path=environment["PATH"]), "-c", recipe(part, changes)]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@contextmanager
def served(line, place, environment, url):
    """Runs a server until the block is left, from when it answers."""
    with open(place / "server.log", "w") as log:
        server = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=place, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (place / "server.log").read_text()[-3000:]
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait(30)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_the_tests_install_what_the_readme_says():
    named = re.findall(r'"([^"]+)"', "".join(re.findall(r"^pip install .*$", section(), re.M)))
    listed = "".join((ROOT / "tests" / f"{kind}requirements.txt").read_text() for kind in ("", "recipes-"))
    assert len(named) == 5 and set(named) <= set(listed.splitlines())


def test_evaluate(rehearsal, place, run):
    pairs = (rehearsal[0] / "made" / "pairs" / "train.jsonl").read_text().splitlines()[:40]
    (place / "tasks").mkdir(exist_ok=True)
    (place / "tasks" / "tiny.yaml").write_text(TASK)
    (place / "tasks" / "tiny.jsonl").write_text("".join(line + "\n" for line in pairs))
    tasks = re.search(r"for task in (.*); do", recipe("lm_eval"))[1]
    run("bash", "lm_eval", {tasks: "tiny:1", "--batch_size auto": "--batch_size 8 --include_path tasks"})
    printed = run("python", "plot.bar", {'"arc_challenge": "acc_norm,none"': '"tiny": "acc,none"'}).splitlines()
    rows = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in printed[1:]}
    assert printed[0].split() == ["tiny", "average"] and rows.keys() == {"rehearsal__tiny-chat", "dpo_run__merged"}
    base, tuned = rows["rehearsal__tiny-chat"], rows["dpo_run__merged"]
    assert base[0] == base[1] <= 75 and tuned[0] == tuned[1] >= 95
    assert (place / "evaluation.png").stat().st_size > 5000
    for path in (place / "evaluation").rglob("*.json"):
        assert json.loads(path.read_text())["n-shot"] == {"tiny": 1}


def test_evaluate_in_the_notebook(rehearsal, place, tmp_path, monkeypatch, capsys):
    """The cell that `eval_tasks` switches on, on the rehearsal's base and result."""
    monkeypatch.chdir(place)
    (place / "tasks").mkdir(exist_ok=True)
    (place / "tasks" / "tiny.yaml").write_text(TASK)
    pairs = (rehearsal[0] / "made" / "pairs" / "train.jsonl").read_text().splitlines(True)[:40]
    (place / "tasks" / "tiny.jsonl").write_text("".join(pairs))
    base, merged = str(rehearsal[0] / "made" / "model"), place / "dpo_run" / "merged"
    nb = functions(base_model=base, output_dir=str(tmp_path), eval_tasks=f"{place}/tasks/tiny.yaml:1", max_length=256)
    nb.update(tokenizer=AutoTokenizer.from_pretrained(merged), merged_dir=merged, curves_dir=tmp_path, on_gpu=False)
    nb.update(placed=dict(dtype=torch.float32), record=tmp_path / "run.json")
    run_cell("evaluate", nb)
    scores = json.loads((tmp_path / "run.json").read_text())["evaluation"]
    assert scores["base"].keys() == scores["tuned"].keys() == {"tiny, acc"}
    assert scores["base"]["tiny, acc"] <= 0.75 and scores["tuned"]["tiny, acc"] >= 0.95
    assert (tmp_path / "evaluation.png").stat().st_size > 5000 and "tiny, acc" in capsys.readouterr().out
    assert nb["model"].num_parameters()  # the tuned one is there to be asked


def test_the_six_tasks_and_their_metrics():
    from lm_eval import tasks as harness

    shots = dict(pair.split(":") for pair in re.search(r"for task in (.*); do", recipe("lm_eval"))[1].split())
    assert list(shots.values()) == ["25", "10", "5", "0", "5", "5"]
    metrics = dict(re.findall(r'"(\w+)": "(\w+,[\w-]+)"', recipe("plot.bar")))
    assert shots.keys() == metrics.keys() and set(shots) <= set(harness.TaskManager().all_tasks)
    sources = {
        "arc_challenge": "arc/arc_easy.yaml",
        "mmlu": "mmlu/default/_mmlu.yaml",
        "winogrande": "winogrande/default.yaml",
    }
    for task, metric in metrics.items():
        folder = task.removesuffix("_mc2")
        source = (Path(harness.__file__).parent / sources.get(task, f"{folder}/{task}.yaml")).read_text()
        name, kind = metric.split(",")
        assert f"metric: {name}\n" in source and (kind == "none" or f'name: "{kind}"' in source), task


def test_serve(place, environment):
    port = free_port()
    line = recipe("transformers serve", {"8000": port})
    question = recipe("curl", {"8000": port})
    with served(line, place, environment, f"http://localhost:{port}/health"):
        answer = subprocess.check_output(["bash", "-c", question], cwd=place, env=environment, text=True)
    assert json.loads(answer)["choices"][0]["message"]["content"].startswith("Sure! A Large Language Model is")


def test_go_on(place, environment, run):
    text = recipe("papermill")
    small = " -p max_steps 4 -p warmup_steps 1 -p eval_pairs 64 -p max_length 256 --no-progress-bar"
    last = text.rstrip().splitlines()[-1]
    run("bash", "papermill", {last: last + small})
    result = place / "round2_run"
    record = json.loads((result / "run.json").read_text())["parameters"]
    assert record["base_model"] == "rehearsal/tiny-chat-dpo" and record["learning_rate"] == 5e-6
    share = dict(re.findall(r"\| (base|merged), \S+ \| (\S+)% \|", (result / "merged" / "README.md").read_text()))
    assert float(share["base"]) >= 95  # it starts from the tuned model: the first base ranks about half of them right
    hub = Path(environment["HF_HUB_CACHE"]).parents[1] / "hub" / "models" / "rehearsal"
    first, second = (
        load_file(hub / name / "model.safetensors")
        for name in ("tiny-chat-dpo", re.search(r"new_model (\S+)", text)[1])
    )
    moved = [(second[name].float() - first[name].float()).abs().max().item() for name in first]
    assert 0 < max(moved) < 0.01


def modelfile():
    text = recipe("TEMPLATE")
    return re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1], re.findall(r"^PARAMETER stop (.*)$", text, re.M), text


def test_the_modelfile_stops_where_the_model_does(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "dpo_run" / "merged")
    _, stops, text = modelfile()
    assert tokenizer.eos_token in stops and all(
        len(tokenizer.encode(stop, add_special_tokens=False)) == 1 for stop in stops
    )
    name = re.search(r"^FROM \./(.*)$", text, re.M)[1]
    kind = name.split(".")[-2]
    assert name.replace(kind, "F16") in recipe("--outtype f16") and kind in recipe("ftype")


@pytest.mark.recipes
def test_the_modelfile_writes_what_the_chat_template_writes(place):
    (place / "render.go").write_text(RENDER)
    tokenizer = AutoTokenizer.from_pretrained(place / "dpo_run" / "merged")
    for roles in (["user"], ["system", "user"], ["system", "user", "assistant", "user"]):
        turns = [{"role": role, "content": text} for role, text in zip(roles, TEXTS, strict=False)]
        words = ["go", "run", "render.go", modelfile()[0], json.dumps(turns)]
        rendered = subprocess.check_output(words, cwd=place, text=True, env=os.environ | {"GOFLAGS": "-mod=mod"})
        assert tokenizer.bos_token + rendered == tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )


@pytest.mark.recipes
def test_quantise(place, run):
    before = {path.name: path.read_bytes() for path in (place / "dpo_run" / "merged").iterdir()}
    run("python", 'for_gguf")')
    run("bash", "--outtype q8_0")
    run("python", "ftype")
    for kind in ("Q8_0", "Q4_K_M"):
        answer = run("python", "from llama_cpp import Llama", {"Q4_K_M": kind})
        assert answer.startswith("Sure! A Large Language Model is")
    assert before == {path.name: path.read_bytes() for path in (place / "dpo_run" / "merged").iterdir()}

    from llama_cpp import Llama

    tokenizer = AutoTokenizer.from_pretrained(place / "dpo_run" / "merged")
    for file in sorted((place / "dpo_run").glob("*.gguf")):
        llm = Llama(str(file), n_ctx=512, verbose=False)
        assert llm.token_eos() == tokenizer.eos_token_id and llm.token_bos() == tokenizer.bos_token_id
        assert llm.metadata["tokenizer.chat_template"] == tokenizer.chat_template
        for text in TEXTS:
            turns = [{"role": "system", "content": text}, {"role": "user", "content": text}]
            chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            assert llm.tokenize(chat.encode(), add_bos=False, special=True) == ids, (file.name, text)
            assert llm.create_chat_completion(turns, max_tokens=1)["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.recipes
def test_the_page(place, environment, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    (place / "space").mkdir()
    (place / "space" / "app.py").write_text(recipe("gr.Blocks"))
    port = free_port()
    options = webdriver.ChromeOptions()
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    for flag in [*flags.split(), "disable-sync", "window-size=1200,700", f"user-data-dir={tmp_path}"]:
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    with served(
        recipe("python space/app.py"), place, environment | {"GRADIO_SERVER_PORT": port}, f"http://localhost:{port}"
    ):
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            browser.get(f"http://localhost:{port}")
            wait = WebDriverWait(browser, 60)
            box = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "textarea"))
            for count, question in enumerate([QUESTION, "What is cheese?"], 1):
                box.send_keys(question, Keys.ENTER)

                def answers(page, count=count):
                    chats = page.find_elements(By.CSS_SELECTOR, "[aria-label='chatbot conversation']")
                    texts = [
                        [bot.text for bot in chat.find_elements(By.CSS_SELECTOR, "[data-testid=bot]")] for chat in chats
                    ]
                    return texts if [len(text) for text in texts] == [count, count] and all(map(all, texts)) else None

                base, tuned = wait.until(answers)
                if count == 1:
                    assert base[0].startswith("No")
                assert tuned[-1].startswith("Sure")
            labels = [label.text for label in browser.find_elements(By.CSS_SELECTOR, "[data-testid=block-label]")]
            assert labels == ["base: rehearsal/tiny-chat", "tuned: rehearsal/tiny-chat-dpo"]
            browser.save_screenshot(os.environ.get("SCREENSHOT", str(tmp_path / "chat.png")))
        finally:
            browser.quit()
