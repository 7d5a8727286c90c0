"""Flags, config files and help: answered at once, and a slip of the pen gets the nearest name."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from conftest import ROOT, run

SCRIPTS = sorted(p.name for p in ROOT.glob("*.py") if p.name != "common.py")


def help_of(script):
    return run(script, "--help").stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_importing_torch(script):
    code = (f"import sys, runpy; sys.argv = [{script!r}, '--help']\n"
            f"try: runpy.run_path({script!r}, run_name='__main__')\n"
            "except SystemExit as stop: assert not stop.code\n"
            "heavy = {'torch', 'transformers', 'peft', 'pandas', 'numpy'} & set(sys.modules); assert not heavy, heavy")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stderr
    assert "--config" in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistyped_flag_exits_2_with_the_nearest_name(script):
    first = re.search(r'add\("(--\w+)"', (ROOT / script).read_text(encoding="utf-8"))[1]
    error = run(script, first[:-2] + first[-1] + first[-2], "x", code=2).stderr
    assert f"你是不是想写 {first}" in error


@pytest.mark.parametrize("flags,name", [
    (["--learning_rate", "0"], "learning_rate"), (["--learning_rate", "nan"], "learning_rate"), (["--learning_rate", "1e20"], "learning_rate"),
    (["--lora_r", "0"], "lora_r"), (["--lora_dropout", "1.0"], "lora_dropout"), (["--num_epochs", "0"], "num_epochs"), (["--max_length", "1"], "max_length"),
    (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps"), (["--batch_size", "2.5"], "batch_size"), (["--lr_scheduler", "cosin"], "lr_scheduler"),
    (["--batch_size"], "batch_size")])
def test_absurd_values_exit_2_before_anything_is_loaded(flags, name):
    error = run("train.py", *flags, "--model_name", "nowhere", code=2).stderr
    assert name in error and "--help" in error


def test_a_misspelt_key_in_a_config_exits_2_with_the_nearest_name(tmp_path):
    (tmp_path / "c.yaml").write_text("lora_rnk: 8\n", encoding="utf-8")
    assert "lora_rank" in run("train.py", "--config", tmp_path / "c.yaml", code=2).stderr


@pytest.mark.parametrize("text,words", [("a: [1\nb", "第 2 行"), ("- 1\n", "名字: 值"), ("num_epochs: many\n", "num_epochs")])
def test_a_broken_config_exits_2_with_the_place(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert words in run("train.py", "--config", tmp_path / "c.yaml", code=2).stderr


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_typed_flags_win_over_the_config_and_the_config_over_defaults(tiny, data, tmp_path, name):
    values = {"lora_r": 4, "learning-rate": "1e-3", "target_modules": ["q_proj", "v_proj"], "gradient_checkpointing": True, "fast": False, "temperature": 0.5}
    text = json.dumps(values) if name.endswith("json") else yaml.safe_dump(values).replace("'1e-3'", "1e-3")
    (tmp_path / name).write_text(text, encoding="utf-8")
    run("train.py", "--config", tmp_path / name, "--model_name", tiny, "--dataset_name", data, "--lora_r", 6, "--max_steps", 1, "--output_dir", tmp_path / "run")
    used = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["args"]
    assert (used["lora_r"], used["learning_rate"], used["target_modules"]) == (6, 1e-3, ["q_proj", "v_proj"])
    assert (used["gradient_checkpointing"], used["fast"], used["lora_alpha"]) == (True, False, 64)


def test_config_yaml_holds_every_flag_of_train_with_its_default():
    import train

    values = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    argv, sys.argv = sys.argv, ["train.py"]
    defaults = vars(train.arguments())
    sys.argv = argv
    flags = set(defaults) - {"config", "resume_from_checkpoint", "dry_run"}
    assert flags <= set(values), flags - set(values)
    for name in flags:
        expected = defaults[name]
        assert type(expected)(values[name]) == expected if expected is not None else values[name] is None, name


def test_a_missing_model_exits_4_with_the_download_command(data):
    assert "python download_model.py" in run("train.py", "--model_name", "./models/none", "--dataset_name", data, code=4).stderr
    assert "python download_model.py --model Qwen/Qwen3-4B" in run("train.py", "--model_name", "Qwen/Qwen3-4B", "--dataset_name", data, code=4).stderr


def test_a_device_that_is_not_there_exits_2(tiny, data):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA card")
    assert "cuda" in run("train.py", "--model_name", tiny, "--dataset_name", data, "--device", "cuda", code=2).stderr


def test_wandb_that_is_not_installed_exits_2(tiny, data):
    import importlib.util

    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    assert "pip install wandb" in run("train.py", "--model_name", tiny, "--dataset_name", data, "--report_to", "wandb", code=2).stderr


def test_transformers_and_peft_import_from_the_repository_root():
    """A top-level datasets/ folder answers `import datasets`; with an __init__.py in it the libraries would take it for the package."""
    assert not (ROOT / "datasets" / "__init__.py").exists()
    subprocess.run([sys.executable, "-c", "import transformers.trainer_utils, peft"], cwd=ROOT, check=True, capture_output=True)


def test_line_budgets_hold():
    budgets = {"train.py": 550, "inference.py": 300, "compare_models.py": 300, "evaluate_model.py": 300, "prepare_data.py": 300, "export_model.py": 300,
               "prune_model.py": 250, "download_model.py": 200, "common.py": 500}
    for script in [*SCRIPTS, "common.py"]:
        assert (ROOT / script).read_text(encoding="utf-8").count("\n") <= budgets[script], script


def test_closed_pipes_and_ascii_terminals_end_quietly():
    command = f"{sys.executable} train.py --help | head -n 1"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert "Traceback" not in result.stderr and result.stdout
    assert "\\u" in run("train.py", "--help", env={"PYTHONIOENCODING": "ascii"}).stdout


@pytest.mark.parametrize("readme", ["README.md", "README.en.md"])
def test_every_command_in_the_readme_has_real_flags_and_files(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    flags = {script: set(re.findall(r'"(--\w+)"', (ROOT / script).read_text(encoding="utf-8"))) for script in SCRIPTS}
    shared = set(re.findall(r'"(--\w+)"', (ROOT / "common.py").read_text(encoding="utf-8"))) | {"--no_fast", "--no_gradient_checkpointing"}
    for script in ("compare_models.py", "evaluate_model.py", "export_model.py"):  # make_inference_parser's
        flags[script] |= flags["inference.py"] - {"--prompt_file", "--interactive", "--output", "--merge", "--use_original_model", "--clean_repeats"}
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = 0
    for line in commands:
        for script, rest in re.findall(r"(?:python |\./)(\w+\.(?:py|sh))([^|>#]*)", line):
            assert (ROOT / script).exists() or script == "run.sh", line
            known = flags.get(script, flags["train.py"] | {"--setup_only"}) | shared
            typed = {flag.replace("-", "_").replace("__", "--", 1) for flag in re.findall(r"--[\w-]+", rest)}
            assert typed <= known, (line, typed - known)
            found += 1
    assert found > 20
    for path in re.findall(r"(?<![\w./])(?:\./)?(datasets/[\w.-]+|test_questions\.txt|config\.yaml|requirements\.txt|tests/run\.sh)", text):
        assert (ROOT / path).exists(), path
