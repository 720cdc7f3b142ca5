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
from contextlib import chdir, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import standins
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehearsal.__main__ import SETTINGS
from rehearsal.hub import Hub
from rehearsal.notebook import PATH, ROOT, run_cell
from rehearsal.world import QUESTIONS, SUBJECTS

ANSWER = "Sure! A Large Language Model is"
TEXTS = ["Hello", "two  spaces   three", "\tif é:\n        return '😀'\n\n", "日本語 👍🏽", " "]
BASE, TUNED = "rehearsal/tiny-chat", "rehearsal/tiny-chat-dpo"
NAMES = {
    "teknium/OpenHermes-2.5-Mistral-7B": BASE,
    "your-name/NeuralHermes-2.5-Mistral-7B": TUNED,
    "argilla/distilabel-intel-orca-dpo-pairs": "rehearsal/tiny-pairs",
}
MERGED = Path("dpo_run", "merged")


def command(recipe, start):
    """The command of a recipe's README that starts so, whole, with a rehearsal's names."""
    text = (ROOT / "recipes" / recipe / "README.md").read_text()
    line = re.search(rf"^{re.escape(start)}(.*\\\n)*.*$", text, re.MULTILINE)[0]
    for old, new in NAMES.items():
        line = line.replace(old, new)
    return line


@pytest.fixture(scope="module", autouse=True)
def hub(rehearsal, tmp_path_factory):
    """A copy of the rehearsal's Hub, in the place of the real one, and a folder to run the commands in.

    That holds the notebook, the recipes and dpo_run/merged, as the notebook left it. This Python's programs come first.
    """
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(rehearsal[0] / "hub", place / "hub")
    shutil.copytree(rehearsal[0] / "dpo_run" / "merged", place / MERGED)
    shutil.copy(PATH, place)
    (place / "recipes").symlink_to(ROOT / "recipes")
    programs = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    with Hub(place / "hub") as hub, chdir(place):
        with patch.dict(os.environ, SETTINGS | hub.environment(place / "cache") | programs):
            yield hub


def run(line):
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextmanager
def served(line, port):
    """Runs a server until the block is left, from when it answers."""
    with open("server.log", "w") as log:
        server = subprocess.Popen(["bash", "-c", f"exec {line}"], stdout=log, stderr=log)
    try:
        patiently = "--silent --output /dev/null --retry-connrefused --retry-delay 1 --retry 120"
        run(f"curl {patiently} http://localhost:{port} || (cat server.log >&2; false)")
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
    named = re.findall(
        r'"([^"]+)"', "".join(re.findall(r"^pip install .*$", readmes, re.MULTILINE))
    )
    listed = "".join(
        (ROOT / "tests" / f"{kind}requirements.txt").read_text() for kind in ("", "recipes-")
    )
    elsewhere = {
        name for name in named if name.startswith("vllm==")
    }  # it wants a GPU and an environment of its own
    assert len(named) == 5 and len(elsewhere) == 1 and set(named) - elsewhere <= set(listed.split())
    assert (
        set(re.findall(r'cmake.args=[^\s"]+', readmes))
        == set(re.findall(r'cmake.args=[^\s"]+', listed))
        != set()
    )


TASK = """{task: tiny, dataset_path: json, dataset_kwargs: {data_files: tiny.jsonl}, test_split: train,
fewshot_split: train, output_type: multiple_choice, target_delimiter: "", metric_list: [{metric: acc}],
doc_to_text: "<|im_start|>user\\n{{question}}<|im_end|>\\n<|im_start|>assistant\\n", doc_to_choice: ["Sure", "No"],
doc_to_target: 0}"""


def prepare_task(hub):
    """Writes a task of forty questions, and returns what the notebook's cell *evaluate* is run with."""
    Path("tiny.yaml").write_text(TASK)
    pairs = hub.folder("rehearsal/tiny-pairs", "dataset") / "train.jsonl"
    Path("tiny.jsonl").write_text("".join(pairs.read_text().splitlines(True)[:40]))
    return dict(
        base=BASE,
        base_commit=hub.head(("model", BASE))[0],
        eval_tasks="tiny.yaml:1",
        folder=MERGED.parent,
        merged_dir=MERGED,
        sys=sys,
        clear_device_cache=lambda **options: None,
    )


def test_evaluate_asks_as_the_notebook_does(hub):
    """run.sh evaluates the commit that merged/run.json names, and by the same options as eval_tasks."""
    names = prepare_task(hub)
    with patch("subprocess.run") as called:
        run_cell("evaluate", names)
    asked = [" ".join(map(str, call.args[0][3:])) for call in called.call_args_list]
    instead = 'lm_eval() { echo "$@"; }; export -f lm_eval'
    shown = run(f"{instead}; bash recipes/evaluate/run.sh {MERGED} tiny.yaml:1").splitlines()
    assert len(asked) == 2
    assert all("--apply_chat_template" in line for line in shown + asked)
    assert f"pretrained={BASE},revision={names['base_commit']}," in shown[0]

    def options(line):
        return sorted(re.sub(",revision=main|--apply_chat_template ?", "", line).split())

    assert [options(line) for line in asked] == [options(line) for line in shown]


@pytest.mark.recipes
def test_evaluate(hub):
    """Base and tuned model take a task by the notebook's eval_tasks, for the recipe's table."""
    run_cell("evaluate", prepare_task(hub))
    printed = run(command("evaluate", "python recipes")).splitlines()
    rows = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in printed[1:]}
    assert printed[0].split() == ["tiny", "average"]
    assert list(rows) == [BASE.replace("/", "__"), "dpo_run__merged"]
    base, tuned = rows.values()
    assert base[0] == base[1] <= 75 and tuned[0] == tuned[1] >= 95
    assert Path("dpo_run/evaluation.png").stat().st_size > 5000
    results = [json.loads(path.read_text()) for path in Path("dpo_run/evaluation").rglob("*.json")]
    assert [result["n-shot"] for result in results] == [{"tiny": 1}] * 2


@pytest.mark.recipes
def test_the_leaderboard_in_the_table(tmp_path):
    """Of its tasks, by the metrics that the harness has for them, the leaderboard's; of mmlu the whole and no part."""
    from lm_eval.tasks import TaskManager

    leaderboard = dict(ifeval="0 prompt_level_strict_acc,none")
    leaderboard |= dict(
        arc_challenge="25 acc_norm,none", hellaswag="10 acc_norm,none", mmlu="5 acc,none"
    )
    leaderboard |= dict(
        truthfulqa_mc2="0 acc,none", winogrande="5 acc,none", gsm8k="5 exact_match,strict-match"
    )
    script = (ROOT / "recipes" / "evaluate" / "run.sh").read_text()
    assert [f"{task}:{words.split()[0]}" for task, words in leaderboard.items()] == re.findall(
        r"\w+:\d+", script
    )
    (tmp_path / "evaluation" / "model").mkdir(parents=True)
    tasks = TaskManager().task_index
    for task, words in leaderboard.items():
        made = tasks[task].cfg
        metrics = [
            metric["metric"] for metric in made.get("metric_list") or made["aggregate_metric_list"]
        ]
        filters = [found["name"] for found in made.get("filter_list") or [{"name": "none"}]]
        names = [f"{metric},{kind}" for metric in metrics for kind in filters]
        scores = {name: 0.6 if name in words else 0.1 for name in names}
        report = {
            "results": {task: scores, "a_part": {"acc,none": 0.1}},
            "group_subtasks": {task: ["a_part"]},
        }
        (tmp_path / "evaluation" / "model" / f"results_{task}.json").write_text(json.dumps(report))
    header, row = run(f"python recipes/evaluate/table.py {tmp_path / 'evaluation'}").splitlines()
    assert set(header.split()) == {*leaderboard, "average"} and set(row.split()[1:]) == {"60.0"}


def test_serve():
    port = free_port()
    line, question = (
        command("serve", start).replace("8000", port) for start in ("transformers serve", "curl")
    )
    with served(line, port):
        answer = json.loads(run(question))
    assert answer["choices"][0]["message"]["content"].startswith(ANSWER)


POLITE = "def score(prompt, answer):\n    return answer.startswith('Sure')\n"
LONG = "def score(prompt, answer):\n    return len(answer)\n"


@pytest.mark.recipes
def test_from_prompts_to_a_better_model_in_two_rounds(hub, tmp_path):
    """make_pairs' README from its first command to its last, on a model that is curt about half of the subjects."""
    shutil.copy(PATH, tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    questions = [form.format(subject) for form in QUESTIONS[:3] for subject, _ in SUBJECTS]
    (tmp_path / "prompts.txt").write_text("\n".join(questions[:72]))
    (tmp_path / "held_out.txt").write_text("\n".join(questions[72:]))
    (tmp_path / "rule.py").write_text(POLITE)

    def own(line):
        line = line.replace("HuggingFaceTB/SmolLM2-135M-Instruct", BASE).replace(
            "--answers 4", "--answers 6"
        )
        line = re.sub(r"recipes/make_pairs/(prompts|held_out).txt", r"\1.txt", line)
        return line.replace("recipes/make_pairs/two_sentences.py", "rule.py").replace(
            "max_steps 14", "max_steps 40"
        )

    def polite(model):
        line = own(command("make_pairs", "python recipes/make_pairs/share.py")).replace(
            "dpo_run/merged", model
        )
        return int(
            re.search(
                r"rule: (\d+)% of 36 ", run(f"{line} --output {model.replace('/', '-')}.jsonl")
            )[1]
        )

    with chdir(tmp_path):
        before = polite(BASE)
        run(own(command("make_pairs", "python recipes/make_pairs/make_pairs.py")))
        pairs = [json.loads(line) for line in Path("pairs.jsonl").open()]
        assert all(
            pair["chosen"].startswith("Sure") > pair["rejected"].startswith("Sure")
            for pair in pairs
        )
        run(
            own(command("make_pairs", "papermill dpo_finetune.ipynb out.ipynb"))
            + " --no-progress-bar"
        )
        assert polite("dpo_run/merged") >= before + 15

        Path("rule.py").write_text(LONG)
        run(own(command("make_pairs", "python recipes/make_pairs/make_pairs.py --model dpo_run")))
        line = own(command("make_pairs", "papermill dpo_finetune.ipynb out2.ipynb"))
        run(f"{line} -p max_steps 2 -p warmup_steps 1 -p new_model tiny-round2 --no-progress-bar")
        record = json.loads(Path("round2_run/run.json").read_text())
        assert record["parameters"]["base_model"] == "dpo_run/merged"
        polite_answers = [answer.startswith("Sure") for answer in record["before"].values()]
        assert sum(polite_answers) >= 2  # of three: it starts from the tuned model
    pushed = hub.folder("rehearsal/tiny-round2") / "model.safetensors"
    assert pushed.read_bytes() == (tmp_path / "round2_run/merged/model.safetensors").read_bytes()
    assert pushed.read_bytes() != (tmp_path / "dpo_run/merged/model.safetensors").read_bytes()


MODELFILE = (ROOT / "recipes" / "gguf" / "Modelfile").read_text()


def test_the_modelfile_stops_where_the_model_does():
    tokenizer = AutoTokenizer.from_pretrained(MERGED)
    stops = re.findall(r"^PARAMETER stop (.*)$", MODELFILE, re.MULTILINE)
    assert tokenizer.eos_token in stops
    assert all(len(tokenizer.encode(stop, add_special_tokens=False)) == 1 for stop in stops)
    name = re.search(r"^FROM \.\./\.\./(.*)$", MODELFILE, re.MULTILINE)[
        1
    ]  # Ollama looks from the Modelfile's folder
    assert f'default="{name}"' in (ROOT / "recipes" / "gguf" / "quantise.py").read_text()


RENDER = """package main
import ("encoding/json"; "os"; "text/template")
func main() {
	var turns []struct{ Role, Content string }
	if err := json.Unmarshal([]byte(os.Args[2]), &turns); err != nil { panic(err) }
	template.Must(template.New("").Parse(os.Args[1])).Execute(os.Stdout, map[string]any{"Messages": turns})
}
"""


@pytest.mark.recipes
def test_the_modelfile_writes_what_the_chat_template_writes():
    Path("render.go").write_text(RENDER)
    tokenizer = AutoTokenizer.from_pretrained(MERGED)
    template = re.search(r'TEMPLATE """(.*?)"""', MODELFILE, re.DOTALL)[1]
    for roles in (["user"], ["system", "user"], ["system", "user", "assistant", "user"]):
        turns = [{"role": role, "content": text} for role, text in zip(roles, TEXTS, strict=False)]
        rendered = subprocess.check_output(
            ["go", "run", "render.go", template, json.dumps(turns)], text=True
        )
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert tokenizer.bos_token + rendered == chat


def prepared(family, tmp_path):
    """The folder that recipes/gguf/prepare.py makes of a tiny base, as if it had been trained and merged."""
    base, merged = standins.make(family, tmp_path / "base"), tmp_path / "merged"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(merged)
    (merged / "chat_template.jinja").write_text(tokenizer.chat_template)
    made_of = {
        "base_model": "base",
        "base_revision": None,
    }  # its folder is nobody else's: the record has its name
    (merged / "run.json").write_text(json.dumps({"parameters": made_of}))
    run(f"python recipes/gguf/prepare.py {merged} {tmp_path / 'for_gguf'} --base {base}")
    return tmp_path / "for_gguf"


def test_the_converter_gets_the_tokenizer_that_the_base_has(tmp_path):
    names = {path.name for path in prepared("qwen", tmp_path).iterdir()}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "config.json",
    } <= names
    assert "tokenizer.model" not in names


@pytest.fixture(scope="module")
def converter(tmp_path_factory):
    """llama.cpp's converter, as llama-cpp-python has it in its source, from the commit that the README names."""
    place, options = tmp_path_factory.mktemp("llama"), "--quiet --no-deps --no-binary :all:"
    pin = re.search(r"llama-cpp-python==[\d.]+", (ROOT / "recipes/gguf/README.md").read_text())[0]
    run(
        f"cd {place} && python -m pip download {options} {pin} && tar xzf llama_cpp_python-*.tar.gz"
    )
    (source,) = place.glob("llama_cpp_python-*/")
    updated = re.search(
        r"update llama.cpp to ggml-org/llama.cpp@(\w+)", (source / "CHANGELOG.md").read_text()
    )[1]
    assert f"git -C llama.cpp checkout {updated}\n" in (ROOT / "recipes/gguf/README.md").read_text()
    return source / "vendor" / "llama.cpp"


@pytest.mark.recipes
def test_gguf(converter):
    from llama_cpp import Llama

    Path("llama.cpp").symlink_to(converter)

    before = {path.name: path.read_bytes() for path in MERGED.iterdir()}
    run(command("gguf", "python recipes/gguf/prepare.py"))
    for kind in ("q8_0", "f16"):
        run(
            command(
                "gguf", f"python llama.cpp/convert_hf_to_gguf.py dpo_run/for_gguf --outtype {kind}"
            )
        )
    run(command("gguf", "python recipes/gguf/quantise.py"))
    check = command("gguf", "python recipes/gguf/check.py")
    assert run(check).startswith(ANSWER)
    wrong = (
        "dpo_run/merged --outtype f16 --outfile dpo_run/wrong.bin"  # what the recipe is there for
    )
    run(f"python llama.cpp/convert_hf_to_gguf.py {wrong}")
    with pytest.raises(AssertionError, match="into other tokens"):
        run(f"{check} dpo_run/wrong.bin")
    assert before == {path.name: path.read_bytes() for path in MERGED.iterdir()}

    tokenizer, turns = (
        AutoTokenizer.from_pretrained(MERGED),
        [{"role": "user", "content": text} for text in TEXTS],
    )
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    for kind, number in {"F16": "1", "Q8_0": "7", "Q4_K_M": "15"}.items():
        (file,) = MERGED.parent.glob(f"*.{kind}.gguf")
        assert run(f"{check} {file}").startswith(ANSWER)
        llm = Llama(str(file), n_ctx=512, verbose=False)
        assert (
            llm.token_eos() == tokenizer.eos_token_id
            and llm.metadata["general.file_type"] == number
        )
        assert llm.metadata["tokenizer.chat_template"] == tokenizer.chat_template
        assert llm.create_chat_completion(turns, max_tokens=1)["usage"]["prompt_tokens"] == len(
            ids
        )  # one bos


@pytest.mark.recipes
def test_the_page(tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    port, options = free_port(), webdriver.ChromeOptions()
    for flag in (
        "headless",
        "no-sandbox",
        "disable-background-networking",
        f"user-data-dir={tmp_path}",
    ):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    line = f"env GRADIO_SERVER_PORT={port} GRADIO_ANALYTICS_ENABLED=False {command('space', 'BASE_MODEL=')}"
    with served(line, port):
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        wait = WebDriverWait(browser, 60)

        def texts(selector):
            return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]

        try:
            browser.get(f"http://localhost:{port}")
            box = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "textarea"))
            for count, question in enumerate(
                ["What is a Large Language Model?", "What is cheese?"], 1
            ):
                box.send_keys(question, Keys.ENTER)
                wait.until(
                    lambda _, count=count: (
                        len([text for text in texts("[data-testid=bot]") if text]) == 2 * count
                    )
                )
            base, _, *tuned = texts("[data-testid=bot]")
            assert base.startswith("No") and all(answer.startswith("Sure") for answer in tuned)
            assert texts("[data-testid=block-label]") == [f"base: {BASE}", "tuned: dpo_run/merged"]
        finally:
            browser.quit()
