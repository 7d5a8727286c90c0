"""inference.py and compare_models.py: batches answer like single questions, chats remember, adapters that do not fit are refused."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ANSWERS, QUESTIONS, ROOT, call, make_model, run, train, write_csv


@pytest.fixture(scope="module")
def learned(tiny, data, tmp_path_factory):
    """A run folder of a tiny model that knows the eight answers by heart."""
    return train(tiny, data, tmp_path_factory.mktemp("learned") / "run", "--num_epochs", 100, "--learning_rate", 5e-3, "--lr_scheduler", "constant", "--val_ratio", 0,
                 "--lora_dropout", 0, "--save_every", -1)


@pytest.fixture(scope="module")
def loaded(tiny, learned):
    from inference import load_model

    return load_model(tiny, str(learned / "final_model"))


def chats(questions):
    return [[{"role": "user", "content": q}] for q in questions]


def test_batched_answers_are_the_single_ones(loaded):
    from inference import generate

    questions = QUESTIONS + [q + "请详细说明。" * n for n, q in enumerate(QUESTIONS)]
    alone = [generate(*loaded, chats([q]), max_new_tokens=80)[0]["text"] for q in questions]
    for batch_size in (3, 16):
        together = generate(*loaded, chats(questions), max_new_tokens=80, answer_batch_size=batch_size)
        assert [a["text"] for a in together] == alone
    assert alone[:8] == ANSWERS


def test_batched_answers_of_the_demo_model_are_the_single_ones(demo):
    from inference import generate, load_model

    model = load_model(demo)
    questions = ["What is a contract?", "试用期最长多久？", "Name three colours of the rainbow, please.", "Who pays if my dog bites a neighbour in the park?"]
    alone = [generate(*model, chats([q]), max_new_tokens=24)[0]["text"] for q in questions]
    assert [a["text"] for a in generate(*model, chats(questions), max_new_tokens=24)] == alone
    assert all(alone)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mistral"])
def test_the_roomy_cache_gives_the_librarys_tokens(architecture, tmp_path):
    from inference import roomy_cache
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / architecture, architecture)).eval()
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill_(1, torch.tensor([0, 1]), 0), "max_new_tokens": 300, "min_new_tokens": 300,
               "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    cache = roomy_cache(model)
    ours, theirs = model.generate(**options, past_key_values=cache), model.generate(**options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.allclose(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-5)
    assert all(hasattr(layer, "rooms") == (architecture != "mistral") for layer in cache.layers)  # a window of 8 tokens slides: the library's own layers
    if architecture != "mistral":  # 9 tokens of prompt and 256 more filled the first room, and the keys lie in the second one, not in a copy of it
        assert cache.layers[0].keys.data_ptr() == cache.layers[0].rooms[0].data_ptr() and cache.layers[0].rooms[0].shape[-2] == 9 + 256 + 1 + 256


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mistral"])
def test_an_answer_made_alone_looks_ahead_and_stays_the_same(architecture, tmp_path):
    from common import encode
    from inference import generate, load_model

    model, tokenizer = load_model(make_model(tmp_path / architecture, architecture))
    asked = chats(["试用期最长多久？"])
    prompt = torch.tensor([encode(tokenizer, asked[0])[0]])
    wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=120, do_sample=False, pad_token_id=0)[0, prompt.shape[1]:]
    widths = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    answer = generate(model, tokenizer, asked, max_new_tokens=120)[0]
    assert answer["text"] == tokenizer.decode(wanted, skip_special_tokens=True).strip() and answer["tokens"] > 20
    if architecture == "mistral":  # its window of 8 tokens slides, and cannot slide back
        assert widths[1:] == [1] * (answer["tokens"] - 1)
    else:
        assert max(widths[1:]) == 4 and len(widths) <= answer["tokens"] - (architecture != "llama")  # that one hardly repeats itself: its guesses are all wrong
    for options in ({"temperature": 1.0}, {"repetition_penalty": 1.2}):
        widths.clear()
        generate(model, tokenizer, asked, max_new_tokens=12, **options)
        assert set(widths[1:]) == {1}


def test_a_batch_is_one_product_with_the_output_head(demo):
    from inference import generate, load_model

    model, tokenizer = load_model(demo)
    given = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: given.append((inputs[0].shape[:2], inputs[0].is_contiguous())))
    generate(model, tokenizer, chats(["短", "长一些的问题"]), max_new_tokens=3)
    assert given == [((2, 1), True)] * 3  # a slice of it would be multiplied row by row, with a copy of 50,000 x 576 numbers for each


def test_the_same_seed_draws_the_same_answer_in_a_batch_and_alone(loaded):
    from inference import generate

    drawn = [generate(*loaded, chats(["随便说点什么"]), max_new_tokens=12, temperature=3.0, seed=seed, top_k=0, top_p=1.0)[0]["text"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    batch = generate(*loaded, chats(["短", "随便说点什么"]), max_new_tokens=12, temperature=3.0, seed=1, top_k=0, top_p=1.0)
    assert batch[1]["text"] == drawn[0]


def test_the_readmes_python_lines_work(tiny, learned):
    from types import SimpleNamespace

    from inference import generate_response, load_model

    model, tokenizer = load_model(tiny, str(learned / "final_model"))
    assert generate_response(model, tokenizer, QUESTIONS[0]) == ANSWERS[0]
    assert generate_response(model, tokenizer, QUESTIONS[0], SimpleNamespace(max_new_tokens=3)) == generate_response(model, tokenizer, QUESTIONS[0], SimpleNamespace(max_new_tokens=3))
    assert len(tokenizer(generate_response(model, tokenizer, QUESTIONS[1], SimpleNamespace(max_new_tokens=3))).input_ids) < 6


def test_merged_answers_are_the_adapters(tiny, learned):
    from inference import generate, load_model

    merged = load_model(tiny, str(learned / "final_model"), merge=True)
    assert not hasattr(merged[0], "peft_config")
    assert [a["text"] for a in generate(*merged, chats(QUESTIONS), max_new_tokens=80)] == ANSWERS


def test_one_prompt_prints_only_the_answer(learned):
    result = run("inference.py", "--lora_weights", learned, "--prompt", QUESTIONS[0])
    assert result.stdout == ANSWERS[0] + "\n"


def test_the_newest_adapter_is_found_and_named(tiny, learned, tmp_path):
    shutil.copytree(learned, tmp_path / "output" / "run1")
    result = run("inference.py", "--prompt", QUESTIONS[2], cwd=tmp_path)
    assert result.stdout.strip() == ANSWERS[2] and "run1" in result.stderr
    assert "先训练" in run("inference.py", "--prompt", "x", cwd=tmp_path / "output", code=4).stderr
    assert run("inference.py", "--prompt", "x", "--use_original_model", "--base_model", tiny, "--max_new_tokens", 2, cwd=tmp_path).returncode == 0


def test_a_file_of_prompts_is_answered_in_its_order(learned, tmp_path):
    (tmp_path / "q.txt").write_text("# 注释\n\n" + "\n".join(QUESTIONS) + "\n", encoding="utf-8")
    run("inference.py", "--lora_weights", learned / "final_model", "--prompt_file", tmp_path / "q.txt", "--output", tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["question"], r["answer"], r["stopped"]) for r in rows] == [(q, a, True) for q, a in zip(QUESTIONS, ANSWERS)]
    asked = (tmp_path / "q.txt").read_bytes()
    run("inference.py", "--lora_weights", learned / "final_model", "--prompt_file", tmp_path / "q.txt", "--output", f"{tmp_path}/./q.txt", code=2)
    assert (tmp_path / "q.txt").read_bytes() == asked
    printed = run("inference.py", "--lora_weights", learned / "final_model", "--prompt_file", tmp_path / "q.txt").stdout
    assert printed.count("问：") == 8 and all(a in printed for a in ANSWERS)


def test_an_interrupted_file_of_prompts_keeps_the_answers_made(learned, tmp_path):
    (tmp_path / "q.txt").write_text("\n".join(QUESTIONS * 100) + "\n", encoding="utf-8")
    flags = ["--lora_weights", str(learned), "--prompt_file", str(tmp_path / "q.txt"), "--output", str(tmp_path / "a.jsonl"), "--answer_batch_size", "2"]
    typed = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_path('inference.py', run_name='__main__')"  # a script's background is deaf
    process = subprocess.Popen([sys.executable, "-c", typed, *flags], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "a.jsonl").exists() and (tmp_path / "a.jsonl").stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "已停止" in process.communicate(timeout=30)[1].decode() and process.returncode == 130
    answers = [json.loads(line)["answer"] for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 2 <= len(answers) < 800 and answers == (ANSWERS * 100)[:len(answers)]


def test_a_chat_streams_remembers_and_obeys_its_commands(learned, tmp_path):
    talk = [QUESTIONS[0], "/save first.json", "/undo", "/save empty.json", "/system 你是律师", QUESTIONS[1], "/save second.json", "/nonsense", "/help", "/save", "/reset", "退出"]
    result = run("inference.py", "--lora_weights", learned.resolve(), "--interactive", "--max_new_tokens", 80, cwd=tmp_path, stdin="\n".join(talk) + "\n")
    assert ANSWERS[0] in result.stdout and "没有 /nonsense" in result.stdout and "/reset" in result.stdout and "没有写文件名" in result.stdout
    saved = {name: json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("first", "empty", "second")}
    assert saved["first"] == [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": ANSWERS[0]}]
    assert saved["empty"] == []
    assert [m["role"] for m in saved["second"]] == ["system", "user", "assistant"]


def test_a_long_chat_is_cut_from_the_front(learned):
    questions = [q * 6 for q in QUESTIONS * 2]
    result = run("inference.py", "--lora_weights", learned, "--interactive", "--max_new_tokens", 60, stdin="\n".join(questions) + "\n")
    assert "Traceback" not in result.stderr


def test_a_question_longer_than_the_model_is_refused(learned):
    assert "上限 512" in run("inference.py", "--lora_weights", learned, "--prompt", "长" * 2000, code=2).stderr


def test_terminal_control_characters_are_shown_and_not_obeyed():
    from common import visible

    hostile = "a\x1b[31mb\x9b1mc\rd\x07e\u202ef\x1b]8;;http://x\x07g\u2028h\x00i"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029]", visible(hostile))
    assert visible("正常\n文字\t👨\u200d👩") == "正常\n文字\t👨\u200d👩"


def test_repeated_tails_are_removed_and_ordinary_text_is_not():
    from inference import clean_repeats

    assert clean_repeats("可以起诉。" + "请注意。" * 9) == "可以起诉。请注意。"
    assert clean_repeats("可以起诉。" + "请注意保留证据。" * 5 + "请注意保") == "可以起诉。请注意保留证据。"
    for answer in ANSWERS:
        assert clean_repeats(answer) == answer


def test_every_end_token_stops_an_answer(loaded):
    from common import end_token_ids
    from inference import generate

    model, tokenizer = loaded
    other = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    assert set(end_token_ids(model, tokenizer)) == {tokenizer.eos_token_id, other}
    model.generation_config.eos_token_id = before
    assert generate(model, tokenizer, chats(QUESTIONS[:1]), max_new_tokens=80)[0]["stopped"]


def test_adapters_that_do_not_belong_are_refused(tiny, learned, tmp_path):
    """PEFT loads a base of the same shape, missing keys, NaN and a changed alpha without an error."""
    from safetensors.torch import load_file, save_file

    other = make_model(tmp_path / "other", seed=1)
    assert "基础模型" in run("inference.py", "--lora_weights", learned, "--base_model", other, "--prompt", "x", code=4).stderr
    run("inference.py", "--lora_weights", learned, "--base_model", other, "--prompt", "x", "--force", "--max_new_tokens", 2)
    weights = load_file(learned / "final_model" / "adapter_model.safetensors")
    key = next(k for k in weights if "lora_B" in k)

    def damaged(name, change=None, config=None):
        folder = tmp_path / name
        shutil.copytree(learned, folder)
        if change is not None:
            save_file(change, folder / "final_model" / "adapter_model.safetensors")
        if config:
            path = folder / "final_model" / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **config}), encoding="utf-8")
        return folder

    cases = {
        "nan": damaged("nan", {**weights, key: weights[key] * float("nan")}),
        "missing": damaged("missing", {k: v for k, v in weights.items() if k != key}),
        "empty": damaged("empty", {"x": torch.zeros(1)}),
        "zero": damaged("zero", {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in weights.items()}),
        "alpha": damaged("alpha", config={"lora_alpha": 9999}),
        "rank": damaged("rank", config={"r": 4}),
        "targets": damaged("targets", config={"target_modules": ["q_proj"]}),
    }
    truncated = damaged("truncated")
    file = truncated / "final_model" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    from inference import load_model

    shutil.copytree(learned, tmp_path / "list")
    (tmp_path / "list" / "final_model" / "manifest.json").write_text("[1]", encoding="utf-8")
    shutil.copytree(learned, tmp_path / "foreign")
    (tmp_path / "foreign" / "run.json").write_text('{"args": {}}', encoding="utf-8")
    load_model(tiny, str(tmp_path / "foreign" / "final_model"))  # another tool's run.json says nothing
    for name, folder in {**cases, "truncated": truncated, "list": tmp_path / "list"}.items():
        with pytest.raises(SystemExit) as stop:
            load_model(tiny, str(folder / "final_model"))
        assert stop.value.code == 4, name


def test_compare_prints_both_answers_and_one_length_per_question(learned, tmp_path):
    (tmp_path / "q.txt").write_text("\n".join(QUESTIONS[:5]), encoding="utf-8")
    result = run("compare_models.py", "--lora_weights", learned, "--test_file", tmp_path / "q.txt", "--max_new_tokens", 80)
    lengths = [line.split()[1] for line in result.stdout.splitlines() if "微调回答长度" in line]
    assert lengths == [str(len(a)) for a in ANSWERS[:5]]
    assert result.stdout.count("原始回答长度: ") == result.stdout.count("用时: ") == 5
    assert all(f"微调回答: {a}" in result.stdout for a in ANSWERS[:5])
    assert "5/5 个自己结束" in result.stdout


def test_compare_takes_several_adapters_with_one_model_in_memory(tiny, data, learned, tmp_path):
    other = train(tiny, data, tmp_path / "other", "--max_steps", 1)
    result = run("compare_models.py", "--lora_weights", learned, "--lora_weights", other, "--prompt", QUESTIONS[3], "--max_new_tokens", 80)
    assert len(re.findall(r"微调回答长度: \d+ 字（(?:run|other)）", result.stdout)) == 2
    assert result.stdout.count(ANSWERS[3]) == 1


def test_the_answers_of_compare_are_those_of_inference(tiny, learned):
    compared = run("compare_models.py", "--lora_weights", learned, "--prompt", QUESTIONS[4], "--max_new_tokens", 20).stdout
    base = run("inference.py", "--use_original_model", "--base_model", tiny, "--prompt", QUESTIONS[4], "--max_new_tokens", 20).stdout
    assert f"原始回答: {base.strip()}" in compared


def test_no_script_of_ours_reads_pickles_or_remote_code():
    for path in [*ROOT.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "pickle.load" not in text and "torch.load" not in text and "trust_remote_code=True" not in text, Path(path).name


def test_questions_come_from_any_table(learned, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": QUESTIONS[0]}, ensure_ascii=False), encoding="utf-8")
    shutil.copy(write_csv(tmp_path / "qa.csv", zip(QUESTIONS[:1], ANSWERS)), tmp_path / "QA.CSV")
    for name in ("texts.jsonl", "QA.CSV"):
        said = run("inference.py", "--lora_weights", learned, "--prompt_file", tmp_path / name, "--max_new_tokens", 80).stdout
        assert said == f"问：{QUESTIONS[0]}\n答：{ANSWERS[0]}\n\n"


def test_a_conversation_in_a_file_is_answered_whole(tiny, data, learned, tmp_path):
    from inference import generate, load_model

    talk = [{"role": "system", "content": "你是律师"}, *chats([QUESTIONS[1]])[0], {"role": "assistant", "content": ANSWERS[1]}, *chats([QUESTIONS[0]])[0]]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": [*talk, {"role": "assistant", "content": ANSWERS[0]}]}, ensure_ascii=False), encoding="utf-8")
    model = load_model(tiny, str(learned / "final_model"), merge=True)
    wanted, alone = (generate(*model, [asked], max_new_tokens=40)[0]["text"] for asked in (talk, talk[-1:]))
    run("inference.py", "--lora_weights", learned, "--prompt_file", tmp_path / "talks.jsonl", "--max_new_tokens", 40, "--output", tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["answer"] == wanted != alone


def test_a_lora_is_not_folded_into_a_base_that_is_stored_in_4_bits(tiny, data, tmp_path):
    from common import load_base, load_tokenizer
    from inference import can_fold, load_model

    load_base(tiny, "cpu", torch.float32, "4bit").save_pretrained(tmp_path / "base")
    load_tokenizer(tiny).save_pretrained(tmp_path / "base")
    adapter = str(train(tmp_path / "base", data, tmp_path / "run", "--max_steps", 20, "--learning_rate", 0.01) / "final_model")
    (plain, _), (merged, _) = (load_model(None, adapter, merge=merge) for merge in (False, True))
    ids = torch.tensor([[5, 6, 7]])
    assert plain.is_quantized and not can_fold(plain) and torch.equal(plain(input_ids=ids).logits, merged(input_ids=ids).logits)


def test_a_models_own_settings_do_not_change_greedy_answers(tiny, tmp_path):
    from inference import generate, load_model

    base = shutil.copytree(tiny, tmp_path / "beams")
    settings = base / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text(encoding="utf-8")), "num_beams": 4, "cache_implementation": "static"}), encoding="utf-8")
    models = [load_model(str(base)), load_model(tiny)]
    assert models[0][0].generation_config.num_beams == 4
    beams, greedy = ([a["text"] for a in generate(*model, chats(QUESTIONS[:3]), max_new_tokens=40)] for model in models)
    assert beams == greedy and all(greedy)


def test_a_chat_remembers_though_an_answer_may_be_as_long_as_the_window(learned):
    typed = "".join(f"{q}\n" for q in QUESTIONS[:2]) + "/undo\n/exit\n"
    said = [run("inference.py", "--lora_weights", learned, "--interactive", "--max_new_tokens", n, stdin=typed).stdout for n in (60, 512)]
    assert said[0] == said[1] and "还剩 1 轮" in said[1]


def test_compare_says_when_adapters_were_trained_with_other_system_prompts(tiny, data, learned, tmp_path):
    other = train(tiny, data, tmp_path / "other", "--max_steps", 1, "--system", "你是律师")
    config = json.loads((other / "final_model" / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] += "/."  # the same folder, typed otherwise
    (other / "final_model" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (other / "final_model" / "manifest.json").unlink()
    both = ["compare_models.py", "--lora_weights", learned, "--lora_weights", other, "--prompt", QUESTIONS[3], "--max_new_tokens", 2]
    assert "系统提示词不同" in run(*both).stderr
    assert "系统提示词不同" not in run(*both, "--system", "").stderr


def test_a_lora_on_a_head_that_is_the_embedding_is_not_folded(tmp_path, data):
    base = Path(make_model(tmp_path / "tied", "qwen3"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}), encoding="utf-8")
    from safetensors.torch import load_file, save_file
    save_file({key: x for key, x in load_file(base / "model.safetensors").items() if key != "lm_head.weight"}, base / "model.safetensors", {"format": "pt"})
    from inference import can_fold, load_model
    for layer in ("lm_head", "embed_tokens"):
        adapter = str(train(base, data, tmp_path / layer, "--max_steps", 20, "--learning_rate", 0.01, "--target_modules", "q_proj", layer) / "final_model")
        (plain, _), (merged, _) = (load_model(str(base), adapter, merge=merge) for merge in (False, True))
        ids = torch.tensor([[5, 6, 7]])
        assert not can_fold(plain) and torch.equal(plain(input_ids=ids).logits, merged(input_ids=ids).logits)
    assert can_fold(load_model(str(base), str(train(base, data, tmp_path / "q", "--max_steps", 2, "--target_modules", "q_proj") / "final_model"))[0])


@pytest.mark.parametrize(("script", "flag"), [("inference.py", "--output"), ("compare_models.py", "--json"), ("compare_models.py", "--report"), ("evaluate_model.py", "--report")])
def test_a_file_that_cannot_be_written_is_said_before_the_first_answer(learned, data, tmp_path, script, flag, monkeypatch):
    monkeypatch.setattr(importlib.import_module(Path(script).stem), "generate", lambda *_, **__: pytest.fail("answered first"))
    monkeypatch.chdir(tmp_path)
    source = {"inference.py": "--prompt_file", "compare_models.py": "--test_file", "evaluate_model.py": "--test_data"}[script]
    with pytest.raises(FileNotFoundError):
        call(script, "--lora_weights", learned, source, data, flag, tmp_path / "missing" / "file.out")


def test_an_answer_does_not_depend_on_penalised_padding_or_a_long_neighbour(tiny):
    from inference import generate, load_model

    base = load_model(tiny)  # which never ends by itself
    base[1].pad_token = "<|end_of_text|>"
    questions = [QUESTIONS[0], QUESTIONS[1] * 8]
    for options in ({"repetition_penalty": 1.3, "max_new_tokens": 40}, {"max_new_tokens": 400}):
        alone = [generate(*base, chats([q]), **options)[0]["text"] for q in questions]
        assert [a["text"] for a in generate(*base, chats(questions), **options)] == alone


def test_a_base_that_was_saved_without_a_cache_answers_the_same(tiny, learned, tmp_path):
    from inference import generate, load_model

    base = shutil.copytree(tiny, tmp_path / "base")
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"use_cache": False}), encoding="utf-8")
    model, tokenizer = load_model(str(base), str(learned / "final_model"))
    assert model.generation_config.use_cache is False
    assert [a["text"] for a in generate(model, tokenizer, chats(QUESTIONS), max_new_tokens=80)] == ANSWERS


def test_amounts_and_blanks_to_fill_in_are_no_repeats():
    from inference import clean_repeats

    for text in ("注册资本为 1000000 元。", "签名：__________ 日期：______", "第一……………………第二"):
        assert clean_repeats(text) == text
    assert clean_repeats("答案。" + "你好吗" * 20) == "答案。你好吗"
    assert clean_repeats("赔偿2000元2000元2000元2000元") == "赔偿2000元"


def test_half_a_character_and_a_question_too_long_do_not_end_the_chat(learned):
    import subprocess
    import sys

    lines = "借".encode("gbk") + b"\n" + (QUESTIONS[0] * 300).encode() + f"\n{QUESTIONS[0]}\n".encode()
    done = subprocess.run([sys.executable, ROOT / "inference.py", "--interactive", "--lora_weights", learned, "--max_new_tokens", "80"], input=lines, capture_output=True, check=False)
    assert done.returncode == 0 and "缩短问题" in done.stderr.decode()
    assert ANSWERS[0] in done.stdout.decode()
