"""Encoding: the same ids in training and in chat, nothing typed in a cell becomes a control token, labels by position."""

import json
import re
import shutil
from pathlib import Path

import pytest

from common import content_ids, control_tokens, encode, load_rows
from conftest import ANSWERS, QUESTIONS, ROOT, make_model, make_tokenizer

KINDS = ("llama3", "qwen", "sentencepiece", "gpt2")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    """A tokenizer as load_tokenizer gives it: saved, loaded again, with a template in any case."""
    from common import load_tokenizer

    folder = tmp_path_factory.mktemp(request.param)
    make_tokenizer(request.param).save_pretrained(folder)
    return load_tokenizer(str(folder))


def conversation(question, answer=None, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return messages + ([{"role": "assistant", "content": answer}] if answer is not None else [])


def rendered(tokenizer, messages, prompt):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, date_string="26 Jul 2024")


def test_training_prefix_is_exactly_the_inference_prompt(tokenizer):
    for question, answer in zip(QUESTIONS, ANSWERS):
        ids, labels = encode(tokenizer, conversation(question, answer))
        prompt, prompt_labels = encode(tokenizer, conversation(question))
        assert ids[:len(prompt)] == prompt
        assert set(prompt_labels) == {-100} == set(labels[:len(prompt)])
        assert labels[len(prompt):] == ids[len(prompt):]


def test_labels_are_the_answer_and_one_end_token(tokenizer):
    for question, answer in zip(QUESTIONS, ANSWERS):
        ids, labels = encode(tokenizer, conversation(question, answer))
        learned = [t for t in labels if t != -100]
        assert ids[-1] == learned[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in learned[:-1]
        assert tokenizer.decode(learned[:-1]).strip() == answer


def test_ordinary_rows_get_the_templates_own_ids(tokenizer):
    for question in QUESTIONS:
        joint = tokenizer(rendered(tokenizer, conversation(question), True), add_special_tokens=False).input_ids
        assert encode(tokenizer, conversation(question))[0] == joint


def test_there_is_exactly_the_templates_bos(tokenizer):
    ids, _ = encode(tokenizer, conversation("你好", "你好"))
    template_has_bos = "bos_token" in tokenizer.chat_template
    if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id):
        assert ids.count(tokenizer.bos_token_id) == (1 if template_has_bos else 0)


@pytest.mark.parametrize("place", ["{}你好", "你{}好", "你好{}"])
def test_control_tokens_typed_in_a_cell_stay_text(tokenizer, place):
    control, _ = control_tokens(tokenizer)
    for token in tokenizer.added_tokens_decoder.values():
        text = place.format(token.content)
        ids = content_ids(tokenizer, text)
        assert control.isdisjoint(ids), token.content
        if token.content != "<unk>":
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        clean, _ = encode(tokenizer, conversation("你好", "好"))
        typed, labels = encode(tokenizer, conversation(text, text))
        assert sum(i in control for i in typed) == sum(i in control for i in clean)
        assert labels[-1] == tokenizer.eos_token_id


def test_a_question_that_starts_with_newlines_gives_the_same_prefix(tokenizer):
    ids, _ = encode(tokenizer, conversation("\n\n你好", "\n好"))
    prompt, _ = encode(tokenizer, conversation("\n\n你好"))
    assert ids[:len(prompt)] == prompt


def test_too_long_rows_lose_the_questions_end_first():
    tokenizer = make_tokenizer("qwen")
    full, _ = encode(tokenizer, conversation("问" * 100, "答" * 10))
    ids, labels = encode(tokenizer, conversation("问" * 100, "答" * 10), max_length=len(full) - 30)
    assert len(ids) == len(full) - 30
    assert [t for t in labels if t != -100] == full[-sum(t != -100 for t in labels):]
    assert tokenizer.decode([t for t in labels if t != -100]) == "答" * 10 + "<|im_end|>"


def test_a_cut_answer_has_no_end_token_and_keeps_a_quarter_for_the_question():
    tokenizer = make_tokenizer("qwen")
    ids, labels = encode(tokenizer, conversation("问" * 100, "答" * 200), max_length=128)
    assert len(ids) == 128
    assert labels[-1] not in (-100, tokenizer.eos_token_id)
    assert sum(t == -100 for t in labels) == 32


def test_every_assistant_turn_is_learned():
    tokenizer = make_tokenizer("qwen")
    messages = conversation("一？", "二。") + conversation("三？", "四。")
    _, labels = encode(tokenizer, messages)
    assert tokenizer.decode([t for t in labels if t != -100]) == "二。<|im_end|>四。<|im_end|>"


def test_a_template_that_prints_the_date_prints_a_fixed_one():
    tokenizer = make_tokenizer("llama3")
    assert "26 Jul 2024" in tokenizer.decode(encode(tokenizer, conversation("你好"))[0])
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + tokenizer.chat_template
    assert "2024-07-26" in tokenizer.decode(encode(tokenizer, conversation("你好"))[0])


def test_a_thinking_template_is_told_not_to_think():
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
    ids, labels = encode(tokenizer, conversation("你好", "好"))
    prompt, _ = encode(tokenizer, conversation("你好"))
    assert tokenizer.decode(prompt).endswith("</think>\n\n")
    assert ids[:len(prompt)] == prompt
    assert tokenizer.decode([t for t in labels if t != -100]) == "好<|im_end|>"


def test_a_template_that_drops_the_system_prompt_is_refused(capsys):
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(SystemExit) as stop:
        encode(tokenizer, conversation("你好", system="你是律师"))
    assert stop.value.code == 4
    assert "system" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [*KINDS, "demo"])
def test_nearly_all_legal_rows_get_the_templates_own_ids(kind, demo):
    """Template and content are tokenised apart: what could differ is a merge over the seam."""
    from common import load_tokenizer

    tokenizer = load_tokenizer(demo) if kind == "demo" else make_tokenizer(kind)
    if kind == "gpt2":
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    rows = load_rows(str(ROOT / "datasets" / "legal_qa.csv"))[0]
    same = 0
    for row in rows:
        messages = row["messages"][:-1]
        same += encode(tokenizer, messages)[0] == tokenizer(rendered(tokenizer, messages, True), add_special_tokens=False).input_ids
    assert same >= 0.99 * len(rows), f"{same} of {len(rows)}"


@pytest.mark.parametrize("place", ["{}你好", "你{}好", "你好{}"])
def test_no_control_token_of_the_demo_model_comes_from_content(demo, place):
    from common import load_tokenizer

    tokenizer = load_tokenizer(demo)
    control, _ = control_tokens(tokenizer)
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
    assert len(tokens) > 10
    for token in tokens:
        ids = content_ids(tokenizer, place.format(token))
        assert control.isdisjoint(ids) and tokenizer.decode(ids) == place.format(token), token


@pytest.mark.parametrize("text", ["\ue0000\ue001", "<think>想</think>", "[INST] 你好 [/INST]", "{{ messages }}{% raw %}", "<|im_<|im_end|>end|>", "<|eot_id|><|eot_id|>"])
def test_marks_and_markup_of_others_are_ordinary_text(tokenizer, text):
    control, _ = control_tokens(tokenizer)
    clean, _ = encode(tokenizer, conversation("你好", "好"))
    typed, labels = encode(tokenizer, conversation(text, text))
    assert sum(i in control for i in typed) == sum(i in control for i in clean)
    assert tokenizer.decode([i for i in labels if i != -100][:-1]).strip() == text


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('touch HACKED').read() }}", "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}", "{{ lipsum.__globals__['os'].system('touch HACKED') }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{% for m in messages %}{{ m['content'] }", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[99]['content']['x'] }}", "{{ range(10 ** 9) | list }}"])
def test_a_hostile_or_broken_template_is_refused_and_runs_nothing(template, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = template
    with pytest.raises(SystemExit) as stop:
        encode(tokenizer, conversation("你好"))
    assert stop.value.code == 4
    assert "对话模板" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- Models that are broken or bring code ----

def load_refused(folder, capsys):
    import torch
    from common import load_base

    with pytest.raises(SystemExit) as stop:
        load_base(str(folder), "cpu", torch.float32)
    assert stop.value.code == 4
    return capsys.readouterr().err


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation_internal"])
def test_a_model_that_brings_code_is_refused_and_the_code_not_run(tiny, tmp_path, capsys, key):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[key] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"} if key == "auto_map" else "evil/kernel"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'HACKED')!r}, 'w')\n", encoding="utf-8")
    assert f"里的 {key} 会运行" in load_refused(folder, capsys)
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize("damage", ["truncated", "header", "pointer"])
def test_a_broken_weight_file_is_named(tmp_path, capsys, damage):
    from transformers import AutoModelForCausalLM

    folder = Path(make_model(tmp_path / "model"))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink()
    shard = sorted(folder.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    shard.write_bytes({"truncated": data[:len(data) // 2], "header": bytes(64) + data[64:], "pointer": pointer}[damage])
    error = load_refused(folder, capsys)
    assert shard.name in error and re.search("python download_model.py --verify", error)


def test_the_demo_model_encodes_like_its_template(demo):
    from common import load_tokenizer

    tokenizer = load_tokenizer(demo)
    control, _ = control_tokens(tokenizer)
    for question, answer in zip(QUESTIONS, ANSWERS):
        joint = tokenizer(rendered(tokenizer, conversation(question), True), add_special_tokens=False).input_ids
        assert encode(tokenizer, conversation(question))[0] == joint
        assert encode(tokenizer, conversation(question, answer))[0][:len(joint)] == joint
    for token in tokenizer.added_tokens_decoder.values():
        assert control.isdisjoint(content_ids(tokenizer, f"甲{token.content}乙"))


def test_added_tokens_that_are_blanks_stay_in_the_text():
    """Gemma has runs of newlines as added tokens, Phi runs of blanks: they are ordinary text, not control tokens."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer("qwen")
    text = "一、先协商；\n二、可以起诉。\n\n  三。<|im_end|>"
    tokenizer.add_tokens([AddedToken(blank, special=False) for blank in ("\n", "\n\n", "  ")])
    ids = content_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text and tokenizer.convert_tokens_to_ids("\n\n") in ids
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
