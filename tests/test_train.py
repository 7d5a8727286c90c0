"""train.py: the numbers are a plain loop's, every row is learned once an epoch, and what is saved is an ordinary adapter."""

import argparse
import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ANSWERS, QUESTIONS, ROOT, call, make_model, metrics, run, train, write_csv

ARCHITECTURES = {"llama": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", "qwen3": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
                 "gpt2": "c_attn c_fc c_proj", "opt": "fc1 fc2 k_proj out_proj q_proj v_proj"}


def reference_encode(tokenizer, question, answer):
    """Ids and labels by the tokenizer's own template, the ordinary way."""
    user = [{"role": "user", "content": question}]
    both = [*user, {"role": "assistant", "content": answer}]
    prompt = tokenizer(tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"), add_special_tokens=False).input_ids
    ids = tokenizer(tokenizer.apply_chat_template(both, tokenize=False, date_string="26 Jul 2024"), add_special_tokens=False).input_ids
    return ids, [-100] * len(prompt) + ids[len(prompt):]


def test_losses_equal_a_plain_padded_reference_loop(tiny, data, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from train import step_rows

    steps = 4
    folder = train(tiny, data, tmp_path / "run", "--val_ratio", 0, "--lora_dropout", 0, "--learning_rate", 5e-3, "--lr_scheduler", "constant",
                   "--warmup_ratio", 0, "--batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", steps, "--lora_r", 4, "--lora_alpha", 8)
    ours = [m["loss"] for m in metrics(folder)]

    import random

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [reference_encode(tokenizer, q, a) for q, a in random.Random(42).sample(list(zip(QUESTIONS, ANSWERS)), len(QUESTIONS))]
    torch.manual_seed(42)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, lora_alpha=8, target_modules=ARCHITECTURES["llama"].split()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    theirs = []
    for step in range(steps):
        batch = [rows[i] for i in step_rows(len(rows), 4, 42, step)]
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([t + [-100] * (width - len(t)) for _, t in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
        logits = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / (labels[:, 1:] != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert theirs[-1] < theirs[0]


@pytest.mark.parametrize("packed", [True, False])
def test_any_split_of_a_step_gives_the_same_gradient(tiny, packed):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from common import encode, load_tokenizer
    from train import can_pack, deal, loss_sum

    tokenizer = load_tokenizer(tiny)
    rows = [(*encode(tokenizer, [{"role": "user", "content": q}, {"role": "assistant", "content": a * n}]), "")
            for n in (1, 3) for q, a in zip(QUESTIONS, ANSWERS)]
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False))
    model.eval()
    if packed:
        assert can_pack(model, rows)
    tokens = sum(t != -100 for _, labels, _ in rows for t in labels[1:])
    gradients, counts = [], []
    for batch_size in (1, 2, 16):
        batches = [batch for batch, _ in deal(rows, 0, 1, batch_size * 128, packed, False)]
        assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
        model.zero_grad()
        for batch in batches:
            (loss_sum(model, batch, packed)[0] / tokens).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        counts.append(len(batches))
    assert not packed or counts[0] > counts[1] > counts[2]
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() / gradients[0].norm() < 1e-6


def test_packed_rows_do_not_see_each_other(tiny):
    from transformers import AutoModelForCausalLM

    from train import can_pack, loss_sum

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    rows = [(list(range(300, 330)), list(range(300, 330)), ""), (list(range(200, 240)), list(range(200, 240)), "")]
    assert can_pack(model, rows * 2)
    with torch.no_grad():
        together = loss_sum(model, rows, packed=True)[0].item()
        changed = loss_sum(model, [rows[0], ([5] * 40, [-100] * 40, "")], packed=True)[0].item()
        alone = loss_sum(model, rows[:1], packed=True)[0].item()
    assert changed == pytest.approx(alone, rel=1e-6)
    assert together > alone


def test_a_model_that_mixes_packed_rows_is_not_packed(tiny):
    from transformers import AutoModelForCausalLM

    from train import can_pack

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    forward = model.model.forward
    model.model.forward = lambda *args, row_lengths=None, **kwargs: forward(*args, row_lengths=[sum(row_lengths)] if row_lengths else None, **kwargs)
    rows = [(list(range(100 + 50 * n, 160 + 50 * n)), [], "") for n in range(3)]
    assert not can_pack(model, rows)
    assert model.config._attn_implementation != "packed"


@pytest.mark.parametrize("n_rows,rows_per_step", [(1, 1), (7, 3), (16, 16), (33, 16), (100, 7)])
def test_every_row_comes_once_per_epoch(n_rows, rows_per_step):
    from train import step_rows

    steps = math.ceil(n_rows / rows_per_step)
    epochs = [[i for step in range(steps) for i in step_rows(n_rows, rows_per_step, 42, epoch * steps + step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n_rows)) for epoch in epochs)
    assert n_rows < 7 or epochs[0] != epochs[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_trains_reloads_and_generates(architecture, data, tmp_path, capfd):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from inference import generate_response, load_model

    base = make_model(tmp_path / "base", architecture)
    folder = train(base, data, tmp_path / "run", "--num_epochs", 3, "--learning_rate", 1e-2, "--val_ratio", 0.25, "--lora_dropout", 0)
    log = capfd.readouterr().err
    assert f"加在 {ARCHITECTURES[architecture].replace(' ', '、')}" in log
    assert "按行打包" in log
    val = [m["val_loss"] for m in metrics(folder) if "val_loss" in m]
    assert min(val) < val[0]
    ours, tokenizer = load_model(base, str(folder / "final_model"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "final_model").eval()
    ids = tokenizer(QUESTIONS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert (ours(ids).logits - plain(ids).logits).abs().max() < 1e-5
        with plain.disable_adapter():
            assert (ours(ids).logits - plain(ids).logits).abs().max() > 1e-3
    assert isinstance(generate_response(ours, tokenizer, QUESTIONS[0], None), str)


@pytest.mark.parametrize("flags", ["--peft_method rslora", "--peft_method dora", "--peft_method ia3", "--peft_method pissa", "--init_lora_weights pissa_niter_4",
                                   "--peft_method rslora --init_lora_weights olora", "--peft_method dora --init_lora_weights pissa", "--init_lora_weights gaussian",
                                   "--lora_plus_ratio 16", "--layers_to_transform 1", "--modules_to_save lm_head"])
def test_each_method_trains_reloads_merges_and_resumes(flags, tiny, data, tmp_path, capfd):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from evaluate_model import answer_loss
    from inference import conversation, load_model

    flags = flags.split()
    folder = train(tiny, data, tmp_path / "run", *flags, "--val_data", data, "--num_epochs", 3, "--learning_rate", 1e-3 if "olora" in flags else 1e-2, "--save_every", 1, "--save_total_limit", 9)
    assert ("逐行算" if "lm_head" in flags else "按行打包") in capfd.readouterr().err
    config = json.loads((folder / "final_model" / "adapter_config.json").read_text(encoding="utf-8"))
    kinds = ("IA3", None, None) if "ia3" in flags else ("LORA", "rslora" in flags, "dora" in flags)
    assert (config["peft_type"], config.get("use_rslora"), config.get("use_dora")) == kinds
    saved = load_file(folder / "final_model" / "adapter_model.safetensors")
    assert {int(key.split(".layers.")[1].split(".")[0]) for key in saved if ".layers." in key} == ({1} if "--layers_to_transform" in flags else {0, 1})
    assert any("lm_head" in key for key in saved) == ("lm_head" in flags)
    ours, tokenizer = load_model(tiny, str(folder / "final_model"))
    merged, _ = load_model(tiny, str(folder / "final_model"), merge=True)
    base = AutoModelForCausalLM.from_pretrained(tiny).eval()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder / "final_model").eval()
    ids = tokenizer(QUESTIONS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert (ours(ids).logits - plain(ids).logits).abs().max() < 1e-5
        assert (ours(ids).logits - merged(ids).logits).abs().max() < (1e-3 if "olora" in flags else 1e-4)  # what olora takes out and puts back is large
        with ours.disable_adapter():  # before/after compares with the base as it was
            assert (ours(ids).logits - base(ids).logits).abs().max() < 1e-6
        assert (ours(ids).logits - base(ids).logits).abs().max() > 1e-3
        with plain.disable_adapter():
            assert (ours(ids).logits - plain(ids).logits).abs().max() > 1e-3
    losses = [m["val_loss"] for m in metrics(folder) if "val_loss" in m]  # of the model in training: what is loaded is that one
    sums = [answer_loss(ours, tokenizer, [*conversation(q), {"role": "assistant", "content": a}]) for q, a in zip(QUESTIONS, ANSWERS)]
    assert min(losses) < losses[0] and sum(loss for loss, _ in sums) / sum(n for _, n in sums) == pytest.approx(min(losses[1:]), rel=1e-5)
    assert sum(loss for loss, _ in (answer_loss(base, tokenizer, [*conversation(q), {"role": "assistant", "content": a}]) for q, a in zip(QUESTIONS, ANSWERS))) / sum(
        n for _, n in sums) == pytest.approx(losses[0], rel=1e-5)
    weights = (folder / "final_model" / "adapter_model.safetensors").read_bytes()
    for name in ("final_model", "checkpoint-3"):
        shutil.rmtree(folder / name)
    train(tiny, data, folder, "--resume_from_checkpoint", "auto")
    assert weights == (folder / "final_model" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method,architecture", [("ptuning", "qwen3"), ("prefix", "llama"), ("prompt", "opt"), ("prefix", "gpt2"), ("ptuning", "gpt2")])
def test_virtual_tokens_learn_reload_answer_one_by_one_and_resume(method, architecture, data, tmp_path, capfd):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from common import encode, end_token_ids
    from evaluate_model import answer_loss
    from inference import conversation, generate, load_model

    base = make_model(tmp_path / "base", architecture)
    settings = ["--peft_method", method, "--num_virtual_tokens", 5, "--prompt_encoder_hidden", 16, "--learning_rate", 2e-2, "--val_data", data]
    folder = train(base, data, tmp_path / "run", *settings, "--num_epochs", 4, "--save_every", 1, "--save_total_limit", 9)
    said = capfd.readouterr().err
    assert "逐行算" in said and "5 个虚拟 token" in said
    ours, tokenizer = load_model(base, str(folder / "final_model"), merge=True)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "final_model").eval()
    ids = tokenizer(QUESTIONS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert (ours(ids).logits - plain(ids).logits).abs().max() < 1e-5

    # the loss is that of the answers, not of tokens moved by the virtual ones in front
    losses = [m["val_loss"] for m in metrics(folder) if "val_loss" in m]
    sums = [answer_loss(ours, tokenizer, [*conversation(q), {"role": "assistant", "content": a}]) for q, a in zip(QUESTIONS, ANSWERS)]
    assert min(losses) < losses[0] and sum(loss for loss, _ in sums) / sum(n for _, n in sums) == pytest.approx(min(losses[1:]), rel=1e-5)

    talks = [conversation(question) for question in QUESTIONS[:3]]
    tuned = [answer["text"] for answer in generate(ours, tokenizer, talks, max_new_tokens=12)]
    for talk, answer in zip(talks, tuned):
        ids = encode(tokenizer, talk)[0]
        said = []
        while len(said) < 12 and (said[-1:] or [None])[0] not in end_token_ids(ours, tokenizer):
            with torch.no_grad():
                said.append(ours(input_ids=torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax().item())
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == answer
    alone = [answer["text"] for answer in generate(load_model(base)[0], tokenizer, talks, max_new_tokens=12)]
    with ours.disable_adapter():
        assert [answer["text"] for answer in generate(ours, tokenizer, talks, max_new_tokens=12)] == alone != tuned

    weights = (folder / "final_model" / "adapter_model.safetensors").read_bytes()
    for name in ("final_model", "checkpoint-3", "checkpoint-4"):
        shutil.rmtree(folder / name)
    train(base, data, folder, "--resume_from_checkpoint", "auto")
    assert weights == (folder / "final_model" / "adapter_model.safetensors").read_bytes()


def test_lora_plus_lets_b_learn_faster_from_the_first_step(tiny, data, tmp_path):
    """After one step of Adam every number has moved by its learning rate: A by the rate, B by 16 times it."""
    from safetensors.torch import load_file

    settings = ["--max_steps", 1, "--learning_rate", 1e-4, "--warmup_ratio", 0, "--lr_scheduler", "constant", "--lora_dropout", 0, "--val_ratio", 0]
    plain, plus = (load_file(train(tiny, data, tmp_path / str(ratio), *settings, "--lora_plus_ratio", ratio) / "final_model" / "adapter_model.safetensors") for ratio in (1, 16))
    for key, value in plain.items():
        moved = value[value != 0], plus[key][value != 0]
        assert torch.allclose(moved[0] * (16 if "lora_B" in key else 1), moved[1], rtol=1e-4, atol=1e-8), key


@pytest.mark.parametrize("flags", ["--peft_method ia3 --lora_plus_ratio 16", "--peft_method prompt --init_lora_weights olora", "--peft_method pissa --use_4bit",
                                   "--peft_method prefix --modules_to_save lm_head", "--layers_to_transform 99", "--modules_to_save nothing_like_it"])
def test_options_that_do_not_fit_the_method_are_refused(flags, tiny, data, tmp_path, capfd):
    train(tiny, data, tmp_path / "run", *flags.split(), code=2)
    name = "pissa" if "pissa" in flags else flags.split()[-2]
    assert name in capfd.readouterr().err.rpartition("错误：")[2]
    assert not (tmp_path / "run" / "final_model").exists()


def test_auto_quantization_takes_4_bit_where_the_card_lacks_room(tiny, data, tmp_path, capsys, monkeypatch):
    from common import pick_quantization
    from transformers import AutoModelForCausalLM

    need = 2 * AutoModelForCausalLM.from_pretrained(tiny).num_parameters()
    for free, taken in ((need / 0.69, "none"), (need / 0.71, "4bit")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80e9))
        assert pick_quantization("auto", tiny, "cuda:0") == taken
        assert "GB" in capsys.readouterr().err
    assert [pick_quantization("auto", tiny, "cpu"), pick_quantization("8bit", tiny, "cuda:0"), pick_quantization("4bit", tiny, "mps")] == ["none", "8bit", "4bit"]
    assert "MPS" in capsys.readouterr().err
    train(tiny, data, tmp_path / "run", "--quantization", "auto", "--device", "cpu", "--max_steps", 1)
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["args"]["quantization"] == "none"
    train(tiny, data, tmp_path / "run", "--quantization", "auto", "--device", "cpu", "--max_steps", 2, "--resume_from_checkpoint", "auto")


@pytest.mark.parametrize("flags", [("prefix", "--gradient_checkpointing"), ("prompt", "--teacher_model", "TINY"), ("ptuning", "--num_virtual_tokens", 500)])
def test_what_virtual_tokens_cannot_do_is_refused(flags, tiny, data, tmp_path, capfd):
    train(tiny, data, tmp_path / "run", "--peft_method", *(tiny if flag == "TINY" else flag for flag in flags), code=2)
    error = capfd.readouterr().err.rpartition("错误：")[2]
    assert flags[0] in error or "--max_length 12" in error
    assert not (tmp_path / "run" / "final_model").exists()


def test_a_dry_run_shows_the_rows_and_the_cost_and_writes_nothing(tiny, tmp_path):
    rows = write_csv(tmp_path / "rows.csv", [(f"第{n}问", "短。" * (n + 1)) for n in range(19)] + [("最长的", "长" * 400)])
    said = run("train.py", "--model_name", tiny, "--dataset_name", rows, "--dry_run", "--max_length", 96, "--val_ratio", 0, "--output_dir", tmp_path / "run").stderr
    assert not (tmp_path / "run").exists()
    counts = [int(n) for n in re.findall(r"^ +\d+–\d+ +(\d+) 行 █+$", said, re.MULTILINE)]
    assert sum(counts) == 20 and len(counts) > 1
    longest, most_cut = (re.search(rf"{title}，(\S+)（", said)[1] for title in ("最长的一行", "截得最多的一行"))
    assert most_cut == f"{rows}:21" and "打乱后的第一行，" in said and longest
    assert "每步 16 行，每轮 2 步，共 6 步" in said and "--max_length" in said.partition("要全部放下")[2]
    gigabytes, hours = map(float, re.search(r"大约要 (\S+) GB 内存、(\S+) 小时", said).groups())
    assert 0.6 <= gigabytes < 2 and 0 <= hours < 0.1


def test_the_dry_runs_estimate_is_within_a_factor_of_two_of_what_was_measured(demo):
    import prune_model

    def gigabytes(**flags):
        args = argparse.Namespace(**{"device": "cpu", "dtype": "auto", "model_name": demo, "batch_size": 2, "max_length": 512, "gradient_checkpointing": False,
                                     "quantization": "none", "teacher_model": None, **flags})
        return float(re.search(r"大约要 (\S+) GB", prune_model.estimate(args, [250] * 4000, 16, 250))[1])

    assert 2 < gigabytes() < 8  # 4.0 GB on the machine where this was written
    assert gigabytes(batch_size=4) > gigabytes() + 1
    assert gigabytes(gradient_checkpointing=True) < gigabytes() - 1
    assert gigabytes(quantization="4bit") < gigabytes()


def test_a_models_own_code_runs_only_when_it_is_typed(tiny, data, tmp_path, monkeypatch, capfd):
    base, folder = tmp_path / "own", tmp_path / "run"
    shutil.copytree(tiny, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"], "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (base / "own.py").write_text(f"from transformers import LlamaConfig, LlamaForCausalLM\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
                                 "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\nclass OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
                                 encoding="utf-8")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    flags = ("--model_name", base, "--dataset_name", data, "--output_dir", folder, "--max_steps", 1, "--val_ratio", 0)
    call("train.py", *flags, code=4)
    assert "--trust_remote_code" in capfd.readouterr().err and not (tmp_path / "ran").exists()
    run("train.py", *flags, "--trust_remote_code")
    assert (tmp_path / "ran").exists()
    again = ("train.py", "--resume_from_checkpoint", folder / "checkpoint-1", "--max_steps", 2)
    (tmp_path / "ran").unlink()
    call(*again, code=4)  # the word of a checkpoint is not taken for it
    assert "--trust_remote_code" in capfd.readouterr().err and not (tmp_path / "ran").exists()
    run(*again, "--trust_remote_code")
    ask = ("inference.py", "--lora_weights", folder, "--prompt", "试用期？", "--max_new_tokens", 2)
    call(*ask, code=4)
    assert "--trust_remote_code" in capfd.readouterr().err
    run(*ask, "--trust_remote_code")


def test_a_run_leaves_the_promised_files(tiny, data, tmp_path):
    folder = tmp_path / "run"
    result = run("train.py", "--model_name", tiny, "--dataset_name", data, "--output_dir", folder, "--num_epochs", 2, "--val_ratio", 0.25, "--batch_size", 1,
                 "--gradient_accumulation_steps", 2, "--save_every", 2)
    assert result.stdout.strip() == str(folder / "final_model")
    assert "\r" not in result.stderr
    assert "{'loss': " in result.stderr and "'tokens_per_second'" in result.stderr
    assert "【" in result.stderr
    expected = {"final_model", "logs", "run.json", "metrics.jsonl", "training_report.md"}
    assert expected <= {p.name for p in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "manifest.json"} <= {p.name for p in (folder / "final_model").iterdir()}
    assert list((folder / "logs").glob("events.out.tfevents*"))
    assert "| 验证损失 | " in (folder / "training_report.md").read_text(encoding="utf-8")
    run_json = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run_json["args"]["num_epochs"] == 2 and run_json["base_fingerprint"] and run_json["template_date"]
    assert [m["step"] for m in metrics(folder) if "loss" in m] == list(range(1, 7))
    assert not list(folder.glob(".tmp-*"))


def test_the_best_checkpoint_is_kept_and_becomes_the_final_model(tiny, data, tmp_path):
    other = write_csv(tmp_path / "val.csv", zip(QUESTIONS, reversed(ANSWERS)))  # learned by heart, the training rows make these worse
    folder = train(tiny, data, tmp_path / "run", "--num_epochs", 40, "--learning_rate", 5e-3, "--lr_scheduler", "constant", "--val_data", other, "--eval_every", 4,
                   "--save_every", 4)
    val = {m["step"]: m["val_loss"] for m in metrics(folder) if "val_loss" in m}
    best = min((step for step in val if step), key=val.get)
    assert best < 40, val  # else this test says nothing
    kept = {p.name for p in folder.glob("checkpoint-*")}
    assert f"checkpoint-{best}" in kept and len(kept) <= 3
    assert (folder / "final_model" / "adapter_model.safetensors").read_bytes() == (folder / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()


def test_early_stopping_ends_the_run(tiny, data, tmp_path):
    folder = train(tiny, data, tmp_path / "run", "--num_epochs", 20, "--learning_rate", 0.5, "--lr_scheduler", "constant", "--val_ratio", 0.25, "--eval_every", 1,
                   "--early_stopping_patience", 2)
    assert max(m["step"] for m in metrics(folder)) < 20
    assert (folder / "final_model").is_dir()


def test_the_naive_run_too_resumes_from_every_step_bit_for_bit(tiny, data, tmp_path):
    flags = ["--num_epochs", 2, "--batch_size", 1, "--gradient_accumulation_steps", 2, "--val_ratio", 0.15, "--save_every", 1, "--save_total_limit", 20,
             "--no_fast", "--gradient_checkpointing"]
    whole = train(tiny, data, tmp_path / "whole", *flags)
    expected = (whole / "final_model" / "adapter_model.safetensors").read_bytes()
    losses = [(m["step"], m.get("loss"), m.get("grad_norm"), m.get("val_loss")) for m in metrics(whole)]
    assert max(step for step, *_ in losses) == 6
    for step in range(1, 6):
        part = tmp_path / f"part{step}"
        shutil.copytree(whole, part)
        shutil.rmtree(part / "final_model")
        for later in range(step + 1, 7):
            shutil.rmtree(part / f"checkpoint-{later}")
        call("train.py", "--resume_from_checkpoint", part / f"checkpoint-{step}")
        assert (part / "final_model" / "adapter_model.safetensors").read_bytes() == expected
        assert (part / "checkpoint-6" / "optimizer.safetensors").read_bytes() == (whole / "checkpoint-6" / "optimizer.safetensors").read_bytes()
        assert [(m["step"], m.get("loss"), m.get("grad_norm"), m.get("val_loss")) for m in metrics(part)] == losses


def test_going_on_from_an_older_checkpoint_keeps_what_it_saves(tiny, data, tmp_path):
    folder = train(tiny, data, tmp_path / "run", "--num_epochs", 2, "--batch_size", 1, "--gradient_accumulation_steps", 2, "--save_every", 1, "--save_total_limit", 8,
                   "--val_ratio", 0)
    before = (folder / "final_model" / "adapter_model.safetensors").read_bytes()
    call("train.py", "--resume_from_checkpoint", folder / "checkpoint-2", "--save_total_limit", 2, "--max_steps", 4)
    assert sorted(p.name for p in folder.glob("checkpoint-[1-4]")) == ["checkpoint-3", "checkpoint-4"]
    assert (folder / "final_model" / "adapter_model.safetensors").read_bytes() != before


def test_auto_resume_skips_a_damaged_checkpoint_and_a_named_one_is_refused(tiny, data, tmp_path, capfd):
    folder = train(tiny, data, tmp_path / "run", "--num_epochs", 2, "--batch_size", 1, "--gradient_accumulation_steps", 2, "--save_every", 1, "--val_ratio", 0)
    newest = folder / "checkpoint-8"
    weights = bytearray((newest / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "adapter_model.safetensors").write_bytes(weights)
    call("train.py", "--resume_from_checkpoint", newest, code=4)
    assert "adapter_model.safetensors" in capfd.readouterr().err
    call("train.py", "--output_dir", folder, "--resume_from_checkpoint", "auto")
    assert "checkpoint-7 接着训练" in capfd.readouterr().err
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "manifest.json").write_text("{}", encoding="utf-8")
    call("train.py", "--output_dir", folder, "--resume_from_checkpoint", "auto", code=4)
    assert "全部损坏" in capfd.readouterr().err


def test_a_finished_run_says_so_and_more_epochs_go_on(tiny, data, tmp_path, capfd):
    folder = train(tiny, data, tmp_path / "run", "--num_epochs", 1)
    before = (folder / "final_model" / "adapter_model.safetensors").read_bytes()
    call("train.py", "--output_dir", folder, "--resume_from_checkpoint", "auto")
    assert "已完成" in capfd.readouterr().err
    assert (folder / "final_model" / "adapter_model.safetensors").read_bytes() == before
    call("train.py", "--output_dir", folder, "--resume_from_checkpoint", "auto", "--num_epochs", 2)
    assert max(m["step"] for m in metrics(folder)) == 2
    assert (folder / "final_model" / "adapter_model.safetensors").read_bytes() != before


def test_resuming_with_other_settings_or_data_is_refused_with_old_and_new(tiny, tmp_path, capfd):
    data = write_csv(tmp_path / "qa.csv", zip(QUESTIONS, ANSWERS))
    folder = train(tiny, data, tmp_path / "run", "--max_steps", 1)
    call("train.py", "--output_dir", folder, "--resume_from_checkpoint", "auto", "--learning_rate", 5e-4, "--num_epochs", 9, code=2)
    assert "learning_rate：0.0001 → 0.0005" in capfd.readouterr().err
    write_csv(tmp_path / "qa.csv", zip(QUESTIONS, reversed(ANSWERS)))
    call("train.py", "--output_dir", folder, "--resume_from_checkpoint", "auto", "--max_steps", 2, code=4)
    assert "训练数据" in capfd.readouterr().err


def test_a_folder_with_results_is_not_overwritten(tiny, data, tmp_path):
    folder = train(tiny, data, tmp_path / "run", "--max_steps", 1)
    train(tiny, data, folder, code=2)


@pytest.mark.parametrize("number,expected", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(tiny, data, tmp_path, number, expected):
    flags = ["--num_epochs", 300, "--batch_size", 1, "--gradient_accumulation_steps", 1, "--val_ratio", 0, "--save_every", -1, "--report_to", "none"]
    child = subprocess.Popen([sys.executable, ROOT / "train.py", "--model_name", tiny, "--dataset_name", data, "--output_dir", tmp_path / "run", *map(str, flags)],
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, encoding="utf-8")
    for line in child.stderr:
        if "{'loss'" in line:
            break
    child.send_signal(number)
    tail = child.stderr.read()
    assert child.wait(60) == expected
    assert "--resume_from_checkpoint auto" in tail and "Traceback" not in tail
    stopped = max(int(p.name[11:]) for p in (tmp_path / "run").glob("checkpoint-*"))
    total = stopped + 3
    call("train.py", "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "auto", "--max_steps", total)
    whole = train(tiny, data, tmp_path / "whole", *flags, "--max_steps", total)
    assert [m["step"] for m in metrics(tmp_path / "run")] == [m["step"] for m in metrics(whole)]


def test_a_loss_that_is_not_a_number_stops_before_the_update(data, tmp_path, capfd):
    base = make_model(tmp_path / "base")
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(base) / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, Path(base) / "model.safetensors", metadata={"format": "pt"})
    folder = train(base, data, tmp_path / "run", "--val_ratio", 0, code=5)
    error = capfd.readouterr().err
    assert "第 1 步" in error and "qa.csv:" in error
    assert not list(folder.glob("checkpoint-*")) and not (folder / "final_model").exists()


def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_ones_lock_is_not_minded(tiny, data, tmp_path, capfd):
    fcntl = pytest.importorskip("fcntl", reason="Windows has no fcntl")
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        train(tiny, data, folder, "--max_steps", 1, code=2)
        assert "另一个训练正在用" in capfd.readouterr().err and not list(folder.glob("checkpoint-*"))
    train(tiny, data, folder, "--max_steps", 1)


def test_an_adapter_that_learned_nothing_does_not_become_the_final_model(tiny, data, tmp_path, capfd):
    folder = train(tiny, data, tmp_path / "run", "--max_steps", 1, "--learning_rate", 1e-60, "--val_ratio", 0, code=5)
    assert "全是零" in capfd.readouterr().err and not (folder / "final_model").exists()


def test_one_poisoned_row_gives_one_warning_with_its_place(tiny, tmp_path, capfd):
    import random

    from train import step_rows

    rows = [(QUESTIONS[0], ANSWERS[0])] * 159 + [(QUESTIONS[0], "".join(map(chr, range(0x7000, 0x7040))))]
    seed = next(s for s in range(1000) if random.Random(s).sample(range(160), 160).index(159) == step_rows(160, 1, s, 150)[0])
    data = write_csv(tmp_path / "qa.csv", rows)
    train(tiny, data, tmp_path / "run", "--seed", seed, "--num_epochs", 1, "--batch_size", 1, "--gradient_accumulation_steps", 1, "--val_ratio", 0, "--save_every", -1,
          "--learning_rate", 5e-3)
    warnings = [line for line in capfd.readouterr().err.splitlines() if "个标准差" in line]
    assert len(warnings) == 1 and "第 151 步" in warnings[0] and "qa.csv:161" in warnings[0]


def test_eight_rows_are_learned_by_heart_and_the_answers_stop(tiny, data, tmp_path):
    from inference import generate, load_model

    folder = train(tiny, data, tmp_path / "run", "--num_epochs", 100, "--learning_rate", 5e-3, "--lr_scheduler", "constant", "--val_ratio", 0,
                   "--lora_dropout", 0, "--save_every", -1)
    assert metrics(folder)[-1]["loss"] < 0.05
    model, tokenizer = load_model(tiny, str(folder / "final_model"))
    answers = generate(model, tokenizer, [[{"role": "user", "content": q}] for q in QUESTIONS], max_new_tokens=100)
    assert [a["text"] for a in answers] == ANSWERS
    assert all(a["stopped"] for a in answers)


def test_the_demo_model_learns_eight_rows_by_heart_and_stops(demo, data, tmp_path):
    from inference import generate, load_model

    folder = train(demo, data, tmp_path / "run", "--num_epochs", 20, "--learning_rate", 2e-3, "--lr_scheduler", "constant", "--val_ratio", 0, "--lora_dropout", 0,
                   "--save_every", -1, "--batch_size", 8, "--gradient_accumulation_steps", 1)
    assert metrics(folder)[-1]["loss"] < 0.05
    model, tokenizer = load_model(demo, str(folder / "final_model"))
    answers = generate(model, tokenizer, [[{"role": "user", "content": q}] for q in QUESTIONS], max_new_tokens=80)
    assert [a["text"] for a in answers] == ANSWERS
    assert all(a["stopped"] for a in answers)


def test_two_files_alone_train_in_an_empty_folder(tiny, data, tmp_path):
    for name in ("common.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run([sys.executable, "train.py", "--model_name", tiny, "--dataset_name", data, "--max_steps", "1"], cwd=tmp_path, capture_output=True,
                            text=True, encoding="utf-8", check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / result.stdout.strip() / "adapter_model.safetensors").is_file()


def test_too_small_a_max_length_is_refused_with_the_row(tiny, data, tmp_path, capfd):
    train(tiny, data, tmp_path / "run", "--max_length", 16, code=3)
    assert "max_length 16" in capfd.readouterr().err


def test_cut_rows_are_counted(tiny, data, tmp_path, capfd):
    train(tiny, data, tmp_path / "run", "--max_length", 80, "--max_steps", 1)
    error = capfd.readouterr().err
    assert "行超过 max_length 80" in error and "qa.csv:" in error and "--max_length" in error


def test_messages_text_and_system_rows_are_learned(tiny, tmp_path, capfd):
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "system", "content": "你是律师"}, {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好，请说。"}]}] * 4
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    train(tiny, path, tmp_path / "run", "--max_steps", 1, "--val_ratio", 0)
    assert "你是律师" in capfd.readouterr().err
    path = write_csv(tmp_path / "text.csv", [[a] for a in ANSWERS], header=["text"])
    train(tiny, path, tmp_path / "run2", "--max_steps", 1, "--val_ratio", 0)
    assert "text" in capfd.readouterr().err


def test_the_projects_own_data_fits_a_llama_kind_of_tokenizer():
    """At about 1.3 characters a token, as Llama-3.2's vocabulary has it for Chinese, every row stays below 512 tokens."""
    for name in ("legal_qa.csv", "legal_qa_test.csv"):
        with open(ROOT / "datasets" / name, encoding="utf-8-sig", newline="") as file:
            assert max(sum(map(len, row.values())) / 1.3 + 40 for row in csv.DictReader(file)) < 512


def test_quantised_training_works_on_a_cpu(tiny, data, tmp_path):
    folder = train(tiny, data, tmp_path / "run", "--use_4bit", "--max_steps", 2, "--val_ratio", 0)
    assert all(math.isfinite(m["loss"]) for m in metrics(folder))
    call("inference.py", "--lora_weights", folder, "--prompt", "你好", "--use_4bit", "--max_new_tokens", 3)


def test_training_from_the_command_line_takes_the_flags_of_other_tutorials(tiny, data, tmp_path):
    result = run("train.py", "--model_name_or_path", tiny, "--dataset-path", data, "--num_train_epochs", 1, "--per-device-train-batch-size", 4, "--max_seq_length", 200,
                 "--lora-rank", 4, "--output-dir", tmp_path / "run")
    assert "Traceback" not in result.stderr
    settings = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["args"]
    assert (settings["num_epochs"], settings["batch_size"], settings["max_length"], settings["lora_r"]) == (1, 4, 200, 4)


def test_the_states_of_an_8_bit_optimizer_are_saved_and_resumed(tiny, data, tmp_path, monkeypatch):
    from bitsandbytes.optim import AdamW8bit
    from safetensors.torch import load_file

    monkeypatch.setattr(torch.optim, "AdamW", AdamW8bit)  # on a card it is chosen with 4 bit; its code for the CPU keeps the same states
    flags = ["--lora_r", 64, "--val_ratio", 0, "--batch_size", 2, "--gradient_accumulation_steps", 1, "--num_epochs", 1, "--save_every", 2, "--save_total_limit", 4]
    whole = train(tiny, data, tmp_path / "whole", *flags)
    kinds = {v.dtype for v in load_file(whole / "checkpoint-2" / "optimizer.safetensors").values()}
    assert torch.uint8 in kinds and torch.float32 in kinds
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for later in ("final_model", "checkpoint-4"):
        shutil.rmtree(part / later)
    call("train.py", "--resume_from_checkpoint", part / "checkpoint-2")
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (part / "checkpoint-4" / name).read_bytes() == (whole / "checkpoint-4" / name).read_bytes()


def test_a_resumed_run_keeps_what_was_typed_over_its_config_file(tiny, data, tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(f"dataset_name: 别的.csv\nnum_epochs: 5\nmodel_name: {tiny}\nval_ratio: 0\nreport_to: none\n", encoding="utf-8")
    folder = tmp_path / "run"
    call("train.py", "--config", config, "--dataset_name", data, "--num_epochs", 2, "--output_dir", folder, "--save_every", 1, "--save_total_limit", 4)
    shutil.rmtree(folder / "final_model")
    shutil.rmtree(folder / "checkpoint-2")
    config.unlink()
    capsys.readouterr()
    call("train.py", "--output_dir", folder, "--resume_from_checkpoint", "auto")
    assert "→" not in capsys.readouterr().err and (folder / "checkpoint-2").is_dir() and (folder / "final_model").is_dir()


def test_a_named_checkpoint_is_not_continued_in_another_folder(tiny, data, tmp_path, capsys):
    folder = train(tiny, data, tmp_path / "run", "--num_epochs", 1, "--val_ratio", 0)
    call("train.py", "--resume_from_checkpoint", folder / "checkpoint-1", "--output_dir", tmp_path / "other", code=2)
    assert "去掉 --output_dir" in capsys.readouterr().err and not (tmp_path / "other").exists()
    call("train.py", "--resume_from_checkpoint", folder / "checkpoint-1", "--output_dir", f"{folder}/../run")


def test_no_copy_of_a_validation_row_is_learned(tiny, data, tmp_path):
    folder = train(tiny, f"{data}:2.0", tmp_path / "run", "--num_epochs", 1, "--val_ratio", 0.25)
    learned = set(json.loads((folder / "run.json").read_text(encoding="utf-8"))["row_sha256"])
    assert 4 <= len(learned) <= 6  # 4 of the 16 rows are held out: 2 to 4 of the 8 questions


def test_rows_of_one_long_line_are_not_copies_of_each_other(tiny, data, tmp_path, capsys):
    path = tmp_path / "array.json"
    path.write_text(json.dumps([{"instruction": q, "output": a} for q, a in zip(QUESTIONS, ANSWERS)], ensure_ascii=False), encoding="utf-8")
    call("train.py", "--model_name", tiny, "--dataset_name", path, data, "--val_ratio", 0.25, "--dry_run")
    assert "训练 12 行，验证 4 行" in capsys.readouterr().err


def test_a_share_that_rounds_to_no_row_is_one_row(tiny, data, tmp_path):
    folder = train(tiny, f"{data}:0.001", tmp_path / "run", "--max_steps", 1)
    assert len(json.loads((folder / "run.json").read_text(encoding="utf-8"))["row_sha256"]) == 1


def test_the_best_trained_step_is_kept_where_none_is_better_than_the_base(tiny, data, tmp_path, monkeypatch, capsys):
    import train as script

    loss_sum, trained = script.loss_sum, []

    def base_knows_it_all(model, *arguments, **options):
        loss, distance = loss_sum(model, *arguments, **options)
        trained.extend([True] * loss.requires_grad)
        return loss if trained else loss * 0.01, distance

    monkeypatch.setattr(script, "loss_sum", base_knows_it_all)
    other = write_csv(tmp_path / "val.csv", zip(QUESTIONS, reversed(ANSWERS)))
    folder = train(tiny, data, tmp_path / "run", "--num_epochs", 40, "--learning_rate", 5e-3, "--lr_scheduler", "constant", "--val_data", other, "--eval_every", 4,
                   "--save_every", 4)
    val = {m["step"]: m["val_loss"] for m in metrics(folder) if "val_loss" in m}
    best = min((step for step in val if step), key=val.get)
    assert val[best] > val[0] and best < 40, val  # else this test says nothing
    assert (folder / "final_model" / "adapter_model.safetensors").read_bytes() == (folder / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
    assert f"→ {val[best]:.4f}（第 {best} 步）" in capsys.readouterr().err


def test_rows_longer_than_a_sliding_window_are_learned_through_it(data, tmp_path):
    base = Path(make_model(tmp_path / "base", "mistral"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"sliding_window": 40}), encoding="utf-8")
    flags = ["--lora_dropout", 0, "--val_ratio", 0, "--num_epochs", 1, "--batch_size", 2, "--gradient_accumulation_steps", 2]
    long = write_csv(tmp_path / "long.csv", [(q, a * 8) for q, a in zip(QUESTIONS, ANSWERS)])
    fast, naive = ([m["loss"] for m in metrics(train(base, long, tmp_path / flag, *flags, f"--{flag}"))] for flag in ("fast", "no_fast"))
    assert fast == pytest.approx(naive, rel=1e-5)


def test_text_learned_whole_begins_like_a_prompt(tmp_path, capsys):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    base = make_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    begin = [("<|begin_of_text|>", tokenizer.bos_token_id)]  # as the real Llama's tokenizer does
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=begin)
    tokenizer.save_pretrained(base)
    texts = write_csv(tmp_path / "text.csv", [("第一条 为了保护民事主体的合法权益。",), ("<|begin_of_text|>第二条 调整平等主体。",)], header=("text",))
    call("train.py", "--model_name", base, "--dataset_name", texts, "--val_ratio", 0, "--dry_run")
    rows = re.findall("^【(.*)】$", capsys.readouterr().err, re.MULTILINE)
    assert len(rows) == 3 and all(row.startswith("<|begin_of_text|>第") and row.count("<|begin_of_text|>") == 1 for row in rows)


def test_the_default_one_of_several_chat_templates_is_used(tmp_path, data, capsys):
    from transformers import AutoTokenizer

    base = make_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "tool_use": "{{ raise_exception('no') }}"}
    tokenizer.save_pretrained(base)
    call("train.py", "--model_name", base, "--dataset_name", data, "--dry_run")
    assert re.search(r"\[试用期最长多久？\]|\[\S+？\]", capsys.readouterr().err)


def test_a_dry_run_names_weights_that_are_cut_short(tmp_path, data, capsys):
    base = Path(make_model(tmp_path / "base"))
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    call("train.py", "--model_name", base, "--dataset_name", data, "--dry_run", code=4)
    assert "--verify" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["MPS backend out of memory (MPS allocated: 9.05 GB)", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"])
def test_too_little_memory_is_known_by_the_words_of_every_device(words, capsys):
    from common import run_script

    def main():
        raise RuntimeError(words)

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 6 and "--batch_size" in capsys.readouterr().err


def test_layers_to_train_may_be_a_broken_pattern_or_the_embedding(tiny, data, tmp_path, capsys):
    from inference import load_model

    train(tiny, data, tmp_path / "glob", "--target_modules", "*_proj", code=2)
    assert "--target_modules" in capsys.readouterr().err
    model, _ = load_model(tiny, str(train(tiny, data, tmp_path / "run", "--max_steps", 2, "--target_modules", "embed_tokens") / "final_model"))
    assert model.get_base_model().get_input_embeddings().lora_embedding_A["default"].any()
