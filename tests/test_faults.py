"""Broken inputs to a run: each is refused with its exit code, a sentence and no traceback, and nothing that was saved is touched.

Runs are children of the fork server of test_resume.py; `fault` functions make the trouble inside a child before main() starts.
"""

# ruff: noqa: F811 - test_resume.py's fixtures are imported, and are arguments here
import functools
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path

import pytest

from conftest import ANSWERS, QUESTIONS, ROOT, byte_level_tokenizer, make_model, make_tokenizer, metrics, write_csv
from test_resume import SEED, at_io, bits, digest, fault_table, finish, flags, go, server, sound, start, trial, two_at_once  # noqa: F401


# ---- 1. Numbers ----

def at_loss(call, action):
    """At the `call`-th loss of a training step `action(loss)` gives the loss instead."""
    import train

    loss_sum, calls = train.loss_sum, 0

    def patched(model, *arguments, **options):
        nonlocal calls
        loss, distance = loss_sum(model, *arguments, **options)
        if model.training and loss.requires_grad:
            calls += 1
            loss = action(loss) if calls == call else loss
        return loss, distance

    train.loss_sum = patched


def at_clip(call, action):
    """At the `call`-th clipping of gradients, `action(parameters)` first."""
    import torch

    clip, calls = torch.nn.utils.clip_grad_norm_, 0

    def patched(parameters, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            action(parameters)
        return clip(parameters, *arguments, **options)

    torch.nn.utils.clip_grad_norm_ = patched


def times_nan(loss):
    return loss * math.nan


def infinite_gradient(parameters):
    parameters[1].grad[0, 0] = math.inf


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run of 4 steps, each of one micro-batch, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(folder, *flags, "--max_steps", 4, "--save_total_limit", 9, "--max_length", 500, "--output_dir", folder)
    return folder


@pytest.mark.parametrize("name,fault", [("损失", functools.partial(at_loss, 4, times_nan)), ("梯度", functools.partial(at_clip, 3, infinite_gradient))])
def test_a_number_that_is_none_stops_before_the_update(flags, whole, tmp_path, name, fault):
    folder = tmp_path / "run"
    with trial("损失或梯度变成 NaN、无穷大：在更新之前停下", 5):
        words = go(folder, *flags, "--max_steps", 4, "--save_total_limit", 9, "--max_length", 500, "--output_dir", folder, fault=fault, code=5)
        assert f"的{name}不是有限的数" in words and "qa.csv:" in words and str(folder) in words
        stopped = max(m["step"] for m in metrics(folder))
        bad = next(m for m in metrics(folder) if m["step"] == stopped and "loss" in m)
        assert not (math.isfinite(bad["loss"]) and math.isfinite(bad["grad_norm"])) and f"第 {stopped} 步" in words
        assert sound(folder)[0] == stopped - 1 and not (folder / "final_model").exists()
        for step in sound(folder):
            assert digest(folder / f"checkpoint-{step}" / "adapter_model.safetensors") == digest(whole / f"checkpoint-{step}" / "adapter_model.safetensors")


def spoil_weights(step, value):
    """At optimizer step `step` a LoRA matrix becomes full of `value`."""
    import torch

    update, calls = torch.optim.AdamW.step, 0

    def patched(self, *arguments, **options):
        nonlocal calls
        result, calls = update(self, *arguments, **options), calls + 1
        if calls >= step:
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"][:2] if math.isnan(value) else self.param_groups[0]["params"]:
                    parameter.fill_(value)
        return result

    torch.optim.AdamW.step = patched


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_an_adapter_of_nan_or_of_zeros_is_never_saved_as_final(flags, tmp_path, value):
    folder = tmp_path / "run"
    with trial("权重是 NaN 或全零：不保存为最终模型", 5):
        go(folder, *flags, "--val_ratio", 0, "--max_steps", 3, "--output_dir", folder, fault=functools.partial(spoil_weights, 3, value), code=5)
        assert not (folder / "final_model").exists() and not list(folder.glob(".tmp-*"))
        assert 2 in sound(folder)


def times_twenty(loss):
    return loss * 20


def test_a_loss_unlike_those_before_it_is_a_warning_with_the_rows(flags, tmp_path):
    with trial("损失突然变大：警告，写明行号，训练继续", 0):
        words = go(tmp_path / "run", *flags, "--num_epochs", 30, "--learning_rate", 1e-5, "--val_ratio", 0, "--save_every", -1, "--output_dir", tmp_path / "run",
                   fault=functools.partial(at_loss, 50, times_twenty))
        warnings = [line for line in words.splitlines() if "警告" in line]
        spike = max(metrics(tmp_path / "run"), key=lambda m: m["loss"])["step"]
        assert len(warnings) == 1 and f"第 {spike} 步" in warnings[0] and "qa.csv:" in warnings[0], warnings


def test_every_row_comes_once_an_epoch_for_200_random_sizes():
    from train import step_rows

    dice = random.Random(SEED)
    for _ in range(200):
        rows, rows_per_step, seed = dice.randint(1, 60), dice.randint(1, 8) * dice.randint(1, 8), dice.randint(0, 9)
        steps = math.ceil(rows / rows_per_step)
        with trial("任意 (行数, batch, 累积)：每轮每行恰好一次", 0):
            for epoch in range(2):
                seen = [i for step in range(steps) for i in step_rows(rows, rows_per_step, seed, epoch * steps + step)]
                assert sorted(seen) == list(range(rows)), (rows, rows_per_step, seed)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_base_is_trained_in_fp32_on_a_cpu_and_so_is_its_adapter(tiny, flags, tmp_path, dtype):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(tiny, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(tiny, dtype=getattr(torch, dtype)).save_pretrained(base)
    with trial("半精度的基础模型：LoRA 仍是 float32", 0):
        words = go(tmp_path / "run", *flags, "--model_name", base, "--dtype", dtype, "--max_steps", 1, "--output_dir", tmp_path / "run")
        assert "改用 float32" in words
        assert {w.dtype for w in load_file(tmp_path / "run" / "final_model" / "adapter_model.safetensors").values()} == {torch.float32}


# ---- 2. Memory, disk, folders ----

def no_memory(kind, loss):
    import torch

    if kind == "real":
        torch.empty(2**50)  # what a CPU says when it has no more
    raise {"cuda": torch.OutOfMemoryError("CUDA out of memory"), "python": MemoryError()}[kind]


@pytest.mark.parametrize("kind", ["real", "cuda", "python"])
def test_too_little_memory_in_a_step_exits_6_with_the_flags_that_help(flags, tmp_path, kind):
    folder = tmp_path / "run"
    with trial("第 k 步内存不够", 6):
        words = go(folder, *flags, "--max_steps", 4, "--save_total_limit", 9, "--output_dir", folder,
                   fault=functools.partial(at_loss, 4, functools.partial(no_memory, kind)), code=6)
        assert "--batch_size" in words and "--gradient_accumulation_steps" in words
        assert sound(folder)
        go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto")


def no_memory_at_load():
    import transformers

    def from_pretrained(*arguments, **options):
        raise MemoryError

    transformers.AutoModelForCausalLM.from_pretrained = from_pretrained


def test_too_little_memory_for_the_model_exits_6(flags, tmp_path):
    with trial("装不下模型", 6):
        assert "内存不够" in go(tmp_path / "run", *flags, "--output_dir", tmp_path / "run", fault=no_memory_at_load, code=6)


def little_room():
    import collections
    import shutil

    calls = iter([2**40] * 3)  # at the start, and at two checkpoints
    shutil.disk_usage = lambda path: collections.namedtuple("usage", "total used free")(2**40, 0, next(calls, 20_000))


def test_too_little_room_for_a_checkpoint_is_said_in_bytes_before_it_is_written(flags, tmp_path):
    folder = tmp_path / "run"
    with trial("磁盘剩下的不够：说出要多少、还剩多少", 6):
        words = go(folder, *flags, "--max_steps", 4, "--save_every", 1, "--save_total_limit", 9, "--output_dir", folder, fault=little_room, code=6)
        assert "要 0.1 MB" in words and "还剩 0.0 MB" in words and "--resume_from_checkpoint auto" in words
        assert sound(folder) == [2, 1]
        go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto")


def no_room():
    import collections
    import shutil

    shutil.disk_usage = lambda path: collections.namedtuple("usage", "total used free")(2**40, 2**40, 0)


def test_too_little_room_at_the_start_is_said_before_the_first_step(flags, tmp_path):
    with trial("磁盘剩下的不够：说出要多少、还剩多少", 6):
        words = go(tmp_path / "run", *flags, "--output_dir", tmp_path / "run", fault=no_room, code=6)
        assert "还剩 0.0 MB" in words and "'loss'" not in words


def no_loading():
    import train

    train.load_base = lambda *arguments, **options: os._exit(99)


@pytest.mark.parametrize("kind", ["a file", "below a file", "too long", "a device"])
def test_an_output_folder_that_cannot_be_made_is_refused_before_the_model_is_loaded(flags, tmp_path, kind):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "too long": tmp_path / ("x" * 300), "a device": "/dev/null/run"}[kind]
    with trial("输出目录建不了：在装模型之前拒绝", 6):
        go(tmp_path / "log", *flags, "--output_dir", folder, fault=no_loading, code=6)
        assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def remove_folder(folder, name, path):
    if name == "fsync" and (Path(folder) / "checkpoint-2").exists():
        shutil.rmtree(folder, ignore_errors=True)


def test_an_output_folder_that_vanishes_exits_6(flags, tmp_path):
    with trial("训练中输出目录消失", 6):
        go(tmp_path / "run", *flags, "--max_steps", 6, "--output_dir", tmp_path / "run",
           fault=functools.partial(at_io, 1, functools.partial(remove_folder, str(tmp_path / "run"))), code=6)


def test_the_second_of_two_runs_in_one_folder_is_refused_and_a_dead_one_does_not_block(flags, tmp_path):
    folder = tmp_path / "run"
    first = start(tmp_path / "first.log", *flags, "--num_epochs", 200, "--output_dir", folder)
    while not (folder / "checkpoint-1").exists():
        assert not connection.wait([first.sentinel], 0.02)
    with trial("同一目录里的第二个训练", 2):
        go(tmp_path / "second", *flags, "--output_dir", folder, "--resume_from_checkpoint", "auto", code=2)
        assert not connection.wait([first.sentinel], 0), "the first run must go on"
    os.kill(first.pid, signal.SIGKILL)
    finish(first)
    with trial("死掉的训练留下的锁不挡路", 0):
        go(tmp_path / "third", "--output_dir", folder, "--resume_from_checkpoint", "auto", "--max_steps", sound(folder)[0] + 1)


def test_a_checkpoint_is_at_most_three_adapters(flags, tmp_path):
    go(tmp_path / "run", *flags, "--lora_r", 32, "--max_steps", 1, "--output_dir", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-1"
    with trial("checkpoint 不大于 3.2 个 LoRA", 0):
        assert sum(p.stat().st_size for p in checkpoint.iterdir()) <= 3.2 * (checkpoint / "adapter_model.safetensors").stat().st_size


# ---- 3. Settings and data that changed ----

@pytest.mark.parametrize("name,value", [("learning_rate", 5e-4), ("batch_size", 2), ("gradient_accumulation_steps", 2), ("max_length", 100), ("seed", 7), ("lora_r", 8),
                                        ("lora_dropout", 0.3), ("neftune_alpha", 5), ("val_ratio", 0.3), ("optim", "adamw_torch")])
def test_a_changed_setting_is_refused_with_old_and_new(whole, name, value):
    with trial("接着训练时参数变了", 2):
        words = go(whole, "--resume_from_checkpoint", whole / "checkpoint-2", f"--{name}", value, code=2)
        assert f"{name}：" in words and f"→ {value}" in words


def test_settings_that_may_change_are_listed_and_fewer_steps_than_done_are_refused(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    with trial("接着训练时可以变的参数：列出", 0):
        words = go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto", "--max_steps", 5, "--save_every", 3, "--logging_steps", 2)
        assert "max_steps：4 → 5" in words and "save_every：1 → 3" in words and "logging_steps：1 → 2" in words
    shutil.rmtree(folder / "final_model")
    with trial("接着训练时步数少于已做的", 2):
        go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto", "--max_steps", 2, code=2)


@pytest.mark.parametrize("what", ["data", "base", "template"])
def test_changed_data_weights_or_template_are_refused(tiny, flags, tmp_path, what):
    from safetensors.torch import load_file, save_file

    data, base = write_csv(tmp_path / "qa.csv", zip(QUESTIONS, ANSWERS)), shutil.copytree(tiny, tmp_path / "base")
    folder = tmp_path / "run"
    go(folder, *flags, "--model_name", base, "--dataset_name", data, "--max_steps", 1, "--output_dir", folder)
    if what == "data":
        write_csv(data, zip(QUESTIONS, [*ANSWERS[:-1], "退一赔三，最低六百元。"]))
    elif what == "base":
        weights = load_file(base / "model.safetensors")
        weights["model.embed_tokens.weight"] += 1
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    else:
        (base / "chat_template.jinja").write_text((base / "chat_template.jinja").read_text(encoding="utf-8") + " ", encoding="utf-8")
    with trial("接着训练时数据、基础模型或模板变了", 4):
        assert "→" in go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto", "--max_steps", 2, code=4)


@pytest.mark.parametrize("what", ["no optimizer", "newer format"])
def test_a_checkpoint_that_lacks_a_part_or_is_newer_is_refused_though_its_manifest_agrees(whole, tmp_path, what):
    from train import describe

    folder = shutil.copytree(whole, tmp_path / "run")
    checkpoint = folder / "checkpoint-2"
    if what == "no optimizer":
        (checkpoint / "optimizer.safetensors").unlink()
    manifest = describe(checkpoint) | ({"format": 2} if what == "newer format" else {})
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with trial("checkpoint 缺一部分、是新格式，清单却一致", 4):
        words = go(folder, "--resume_from_checkpoint", checkpoint, code=4)
        assert what == "newer format" or "optimizer.safetensors" in words


# ---- 4. Broken adapters ----

def resized(base, folder, **changes):
    """A random model like `base` but for `changes` of its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base, folder)
    config = AutoConfig.from_pretrained(base)
    for name, value in changes.items():
        setattr(config, name, value)
    config.layer_types = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_weights(adapter, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(change(weights), adapter / "adapter_model.safetensors")


def edit_bytes(path, change):
    path.write_bytes(change(path.read_bytes()))


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5000000\n"

# the 13 adapters of which PEFT itself loads 8
BROKEN_ADAPTERS = {
    "another base of the same shape": lambda adapter, base, tmp: make_model(tmp / "base", seed=5),
    "a wider base": lambda adapter, base, tmp: resized(base, tmp / "base", hidden_size=128, head_dim=32),
    "a deeper base": lambda adapter, base, tmp: resized(base, tmp / "base", num_hidden_layers=4),
    "a shallower base": lambda adapter, base, tmp: resized(base, tmp / "base", num_hidden_layers=1),
    "a missing key": lambda adapter, base, tmp: edit_weights(adapter, lambda w: {k: v for k, v in w.items() if k != min(w)}),
    "NaN": lambda adapter, base, tmp: edit_weights(adapter, lambda w: w | {min(w): w[min(w)] * math.nan}),
    "no weights": lambda adapter, base, tmp: edit_weights(adapter, lambda w: {}),
    "another alpha": lambda adapter, base, tmp: edit_config(adapter, lora_alpha=9999),
    "another rank": lambda adapter, base, tmp: edit_config(adapter, r=8),
    "other target modules": lambda adapter, base, tmp: edit_config(adapter, target_modules=["k_proj", "o_proj"]),
    "no adapter_config.json": lambda adapter, base, tmp: (adapter / "adapter_config.json").unlink(),
    "a broken adapter_config.json": lambda adapter, base, tmp: (adapter / "adapter_config.json").write_text("{", encoding="utf-8"),
    "no folder": lambda adapter, base, tmp: shutil.rmtree(adapter),
}
MORE_BROKEN_ADAPTERS = {
    "all zero": lambda adapter, base, tmp: edit_weights(adapter, lambda w: {k: v * 0 for k, v in w.items()}),
    "a flipped bit": lambda adapter, base, tmp: edit_bytes(adapter / "adapter_model.safetensors", lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:]),
    "a cut file": lambda adapter, base, tmp: edit_bytes(adapter / "adapter_model.safetensors", lambda b: b[:-1]),
    "a pointer of Git LFS": lambda adapter, base, tmp: edit_bytes(adapter / "adapter_model.safetensors", lambda b: LFS_POINTER),
    "pickled weights": lambda adapter, base, tmp: ((adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp / "pwned"))),
                                                   (adapter / "adapter_model.safetensors").unlink()),
    "another template": lambda adapter, base, tmp: edit_bytes(adapter / "chat_template.jinja", lambda b: b + b" "),
    "a broken run.json": lambda adapter, base, tmp: (adapter.parent / "run.json").write_text("{", encoding="utf-8"),
}


@pytest.mark.parametrize("name", [*BROKEN_ADAPTERS, *MORE_BROKEN_ADAPTERS])
def test_a_broken_adapter_is_refused(tiny, whole, tmp_path, name):
    folder = shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    base = (BROKEN_ADAPTERS | MORE_BROKEN_ADAPTERS)[name](folder / "final_model", tiny, tmp_path)
    given = ["--base_model", base] if isinstance(base, str) else []
    row = "13 种坏的 LoRA（PEFT 会装上 8 种）" if name in BROKEN_ADAPTERS else "另外几种坏的 LoRA"
    with trial(row, 4):
        words = go(tmp_path / "ask", "--lora_weights", folder / "final_model", *given, "--prompt", "你好", "--max_new_tokens", 2, script="inference", code=4)
        assert "final_model" in words or "run.json" in words
        assert not (tmp_path / "pwned").exists()


def test_the_same_adapter_unbroken_is_taken(whole, tmp_path):
    with trial("完好的 LoRA：照常使用", 0):
        go(tmp_path / "ask", "--lora_weights", whole / "final_model", "--prompt", "你好", "--max_new_tokens", 2, script="inference")


# ---- 5. Broken bases ----

EVIL = "from pathlib import Path\nPath({path!r}).write_text('ran')\nclass EvilConfig: pass\nclass EvilModel: pass\n"


def lie_about_code(base, tmp):
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "evil", "architectures": ["EvilModel"], "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (base / "evil.py").write_text(EVIL.format(path=str(tmp / "pwned")), encoding="utf-8")


def map_outside(base, tmp):
    shutil.move(base / "model-00001-of-00002.safetensors", tmp / "outside.safetensors")
    edit_bytes(base / "model.safetensors.index.json", lambda b: b.replace(b"model-00001-of-00002.safetensors", b"../outside.safetensors"))


def drop_a_tensor(base, tmp):
    from safetensors.torch import load_file, save_file

    path = max(base.glob("*.safetensors"))
    weights = load_file(path)
    name = min(k for k in weights if "layers" in k)
    index = json.loads((base / "model.safetensors.index.json").read_text(encoding="utf-8"))
    del index["weight_map"][name]
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    save_file({k: v for k, v in weights.items() if k != name}, path, metadata={"format": "pt"})


BROKEN_BASES = {
    "a cut shard": lambda base, tmp: edit_bytes(base / "model-00002-of-00002.safetensors", lambda b: b[:-100]),
    "an empty shard": lambda base, tmp: edit_bytes(base / "model-00002-of-00002.safetensors", lambda b: b""),
    "a zeroed header": lambda base, tmp: edit_bytes(base / "model-00002-of-00002.safetensors", lambda b: bytes(64) + b[64:]),
    "a pointer of Git LFS": lambda base, tmp: edit_bytes(base / "model-00001-of-00002.safetensors", lambda b: LFS_POINTER),
    "a missing shard": lambda base, tmp: (base / "model-00001-of-00002.safetensors").unlink(),
    "a missing tensor": drop_a_tensor,
    "an index that leads outside": map_outside,
    "remote code": lie_about_code,
    "pickled weights": lambda base, tmp: ([p.unlink() for p in base.glob("model*")],
                                          (base / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp / "pwned")))),
    "a broken config.json": lambda base, tmp: (base / "config.json").write_text("{", encoding="utf-8"),
    "a broken tokenizer.json": lambda base, tmp: edit_bytes(base / "tokenizer.json", lambda b: b[:100]),
    "a tokenizer larger than the vocabulary": lambda base, tmp: (shutil.rmtree(base), resized(tmp / "tiny", base, vocab_size=300)),
}


@pytest.mark.parametrize("name", BROKEN_BASES)
def test_a_broken_base_is_refused(tiny, flags, tmp_path, name):
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny, tmp_path / "tiny")
    base = shutil.copytree(tiny, tmp_path / "base", ignore=shutil.ignore_patterns("model.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(base, max_shard_size="300KB")
    assert len(list(base.glob("model-*.safetensors"))) == 2
    BROKEN_BASES[name](base, tmp_path)
    with trial("坏的基础模型：断片、LFS 指针、缺文件、要求运行代码……", 4):
        began = time.perf_counter()
        words = go(tmp_path / "run", *flags, "--model_name", base, "--output_dir", tmp_path / "run", code=4)
        assert time.perf_counter() - began < 10, "it must not wait for an answer"
        assert not (tmp_path / "pwned").exists() and not (tmp_path / "run" / "final_model").exists()
        assert len(words[words.index("错误："):].splitlines()) <= 6


TEMPLATES = {
    "globals": "{{ lipsum.__globals__['os'].popen('touch pwned').read() }}", "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute filter": "{{ ''|attr('__class__') }}{{ [].append.__globals__ }}", "syntax": "{% for %}", "include": "{% include '/etc/passwd' %}",
    "huge range": "{% for i in range(10**9) %}x{% endfor %}", "type": "{{ messages + 1 }}", "zero": "{{ 1 // 0 }}",
    "raise": "{{ raise_exception('no') }}", "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "power": "{{ 'x' * 10**12 }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "ten million letters": "{{ 'x' * 10**7 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_evil_or_broken_template_is_refused(tiny, flags, tmp_path, name):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATES[name] + "{% for m in messages %}{{ m['content'] }}{% endfor %}", encoding="utf-8")
    with trial("恶意、写坏或写不完的对话模板", 4):
        go(tmp_path / "run", *flags, "--model_name", base, "--max_steps", 1, "--output_dir", tmp_path / "run", code=4)
        assert not Path("pwned").exists()


# ---- 6. Nothing is unpickled ----

def watch_unpickling(log):
    """Notes every class that a pickle asks for; what the script itself imports lies before its main()."""
    def hook(event, arguments):
        if event == "pickle.find_class":
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{arguments}\n")

    sys.addaudithook(hook)


def test_no_script_unpickles_anything_though_pickles_lie_about(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    for place in (folder, folder / "checkpoint-4", folder / "final_model"):
        for name in ("adapter_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin", "scheduler.pt", "pytorch_model.bin"):
            if not name.startswith("p") or place != folder / "checkpoint-4":
                (place / name).write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    shutil.rmtree(folder / "checkpoint-4")
    commands = {"train": ["--output_dir", folder, "--resume_from_checkpoint", "auto", "--max_steps", 5],
                "inference": ["--lora_weights", folder / "final_model", "--prompt", "你好", "--max_new_tokens", 2],
                "compare_models": ["--lora_weights", folder / "final_model", "--prompt", "你好", "--max_new_tokens", 2]}
    for script, arguments in commands.items():
        with trial("任何脚本都不反序列化 pickle", 0):
            go(tmp_path / script, *arguments, script=script, fault=functools.partial(watch_unpickling, str(tmp_path / "events")))
            assert not (tmp_path / "events").exists(), (tmp_path / "events").read_text(encoding="utf-8")
            assert not (tmp_path / "pwned").exists()


def unpickle_at_load():
    import train

    load_base = train.load_base
    train.load_base = lambda *arguments, **options: (pickle.loads(pickle.dumps(Path("x"))), load_base(*arguments, **options))[1]


def test_the_watch_for_unpickling_sees_one(flags, tmp_path):
    log = str(tmp_path / "events")
    go(tmp_path / "run", *flags, "--max_steps", 1, "--output_dir", tmp_path / "run", fault=functools.partial(both, functools.partial(watch_unpickling, log), unpickle_at_load))
    assert "Path" in Path(log).read_text(encoding="utf-8")


def both(first, second):
    first()
    second()


# ---- 7. Signals in awkward moments ----

def slowly(loss):
    time.sleep(20)
    return loss


def interrupt(number, *ignored):
    os.kill(os.getpid(), number)
    return ignored[0] if ignored else None


def wait_for(process, log, words):
    while words not in (log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""):
        assert not connection.wait([process.sentinel], 0.02), log.read_text(encoding="utf-8")


def test_a_second_ctrl_c_leaves_at_once_with_everything_saved_intact(flags, whole, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "run.log"
    process = start(log, *flags, "--max_steps", 4, "--save_total_limit", 9, "--max_length", 500, "--output_dir", folder, fault=functools.partial(at_loss, 4, slowly))
    wait_for(process, log, "第 2/4 步")
    time.sleep(0.3)
    with trial("Ctrl-C 两次：立即退出，存好的都在", 130):
        os.kill(process.pid, signal.SIGINT)
        wait_for(process, log, "停止信号")
        os.kill(process.pid, signal.SIGINT)
        assert finish(process, 3) == 130
        assert sound(folder)[0] >= 2
        go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto")
        assert bits(folder)["final"] == bits(whole)["final"]


def interrupted_loading(number):
    import train

    train.load_base = lambda *arguments, **options: (print("loading", file=sys.stderr, flush=True), time.sleep(20))


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_model_loads_ends_without_a_traceback(flags, tmp_path, number, code):
    log = tmp_path / "run.log"
    process = start(log, *flags, "--output_dir", tmp_path / "run", fault=functools.partial(interrupted_loading, number))
    wait_for(process, log, "loading")
    with trial("装模型时停止", code):
        os.kill(process.pid, number)
        assert finish(process, 5) == code
        assert "Traceback" not in log.read_text(encoding="utf-8")


def test_a_signal_before_the_first_step_is_done_promises_no_checkpoint_that_is_not_there(flags, tmp_path):
    with trial("第一步之前停止：不说没有存过的 checkpoint", 130):
        words = go(tmp_path / "run", *flags, "--max_steps", 4, "--output_dir", tmp_path / "run", fault=functools.partial(at_loss, 1, functools.partial(interrupt, signal.SIGINT)), code=130)
        assert "checkpoint-0" not in words
        go(tmp_path / "run", *flags, "--max_steps", 4, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "auto")


def interrupt_once(k):
    """SIGINT at the k-th file operation."""
    at_io(k, functools.partial(interrupt_first, []))


def interrupt_first(done, name, path):
    if not done:
        done.append(name)
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_the_middle_of_a_save_lets_it_end(flags, whole, tmp_path):
    def stop_at(k):
        folder = tmp_path / str(k)
        with trial("保存当中 Ctrl-C", 130):
            go(folder, *flags, "--max_steps", 4, "--save_total_limit", 9, "--max_length", 500, "--output_dir", folder, fault=functools.partial(interrupt_once, k), code=130)
            sound(folder)
            go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto")
            assert bits(folder) == bits(whole)

    two_at_once(stop_at, range(14, 50, 6))


def test_ctrl_c_reaches_a_run_whose_terminal_is_stuck(flags, tmp_path):
    import fcntl

    pipe = tmp_path / "run.log"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, 1031, 4096)  # F_SETPIPE_SZ: a page, soon full
    process = start(pipe, *flags, "--num_epochs", 200, "--save_every", -1, "--output_dir", tmp_path / "run")
    with trial("终端堵住时 Ctrl-C", 130):
        time.sleep(3)
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)
        words = b""
        while not connection.wait([process.sentinel], 0.01):
            try:
                words += os.read(reader, 65536)
            except BlockingIOError:
                continue
        assert finish(process) == 130, words.decode(errors="replace")[-2000:]
        assert sound(tmp_path / "run")
    os.close(reader)


# ---- 8. Terminals, paths, no network ----

def ascii_terminal():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def closed_terminal():
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer, "w", encoding="utf-8")


@pytest.mark.parametrize("fault,code", [(ascii_terminal, 0), (closed_terminal, 141)])
def test_a_terminal_that_is_ascii_or_closed_gets_no_traceback(whole, tmp_path, fault, code):
    with trial("终端不是 UTF-8，或已关闭", code):
        words = go(tmp_path / "ask", "--lora_weights", whole / "final_model", "--prompt", "你好", "--max_new_tokens", 5, script="inference", fault=fault, code=code)
        assert "Traceback" not in words


@pytest.mark.parametrize("name", ["a b", "中文 目录", "🙂", "-dash", "quote's \"x\"", "%s {x} [y]"])
def test_folders_with_odd_names_work(tiny, flags, tmp_path, name):
    place = tmp_path / name
    place.mkdir()
    base, data = shutil.copytree(tiny, place / "base"), write_csv(place / "问答 表.csv", zip(QUESTIONS, ANSWERS))
    with trial("路径里有空格、中文、表情、- 开头", 0):
        go(tmp_path / "log", *flags, "--model_name", f"{base}/", "--dataset_name", data, "--max_steps", 1, f"--output_dir={place}/run/")
        go(tmp_path / "log", "--resume_from_checkpoint", f"{place}/run/checkpoint-1/", "--max_steps", 2)
        go(tmp_path / "log", f"--lora_weights={place}/run/", "--prompt", "你好", "--max_new_tokens", 2, script="inference")


OFFLINE = """
import socket, sys
def refuse(*arguments, **options): raise AssertionError(f"network: {arguments}")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import train, inference
sys.argv = ["train.py", *sys.argv[1:]]
train.main()
sys.argv = ["inference.py", "--lora_weights", sys.argv[-1], "--prompt", "a", "--max_new_tokens", "2"]
inference.main()
"""


def test_no_script_opens_a_socket(flags, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", OFFLINE, *map(str, flags), "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    with trial("没有网络：从不连接", 0):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)
        assert result.returncode == 0 and "network:" not in result.stderr, result.stderr[-3000:]


def test_a_row_learned_by_heart_ends_by_itself_with_any_seed(flags, tmp_path):
    def learn(seed):
        folder, row = tmp_path / str(seed), seed % len(QUESTIONS)
        data = write_csv(tmp_path / f"{seed}.csv", [(QUESTIONS[row], ANSWERS[row])])
        with trial("背下一行再问：自己停下", 0):
            go(folder, *flags, "--dataset_name", data, "--val_ratio", 0, "--seed", seed, "--num_epochs", 60, "--learning_rate", 5e-3, "--lr_scheduler", "constant", "--lora_dropout", 0,
               "--lora_r", 32, "--save_every", -1, "--output_dir", folder)
            go(folder, "--lora_weights", folder / "final_model", "--prompt", QUESTIONS[row], "--max_new_tokens", 60, "--output", tmp_path / f"{seed}.jsonl", script="inference")
            answer = json.loads((tmp_path / f"{seed}.jsonl").read_text(encoding="utf-8"))
            assert answer["stopped"] and answer["answer"] == ANSWERS[row], (seed, answer)

    two_at_once(learn, range(20))


def test_a_model_without_a_template_gets_one_that_is_saved_with_the_adapter(flags, tmp_path):
    base = make_model(tmp_path / "base", tokenizer=make_tokenizer("gpt2"))
    with trial("没有对话模板：用内置的，随 LoRA 保存", 0):
        go(tmp_path / "run", *flags, "--model_name", base, "--max_steps", 1, "--output_dir", tmp_path / "run")
        assert "问题" in (tmp_path / "run" / "final_model" / "chat_template.jinja").read_text(encoding="utf-8")
        go(tmp_path / "ask", "--lora_weights", tmp_path / "run", "--prompt", "你好", "--max_new_tokens", 2, script="inference")


def test_a_tokenizer_without_an_end_token_is_refused(flags, tmp_path):
    base = make_model(tmp_path / "base", tokenizer=byte_level_tokenizer([], None))
    with trial("tokenizer 没有结束符", 4):
        assert "没有结束符" in go(tmp_path / "run", *flags, "--model_name", base, "--max_steps", 1, "--output_dir", tmp_path / "run", code=4)


def test_an_optimizer_that_needs_a_card_is_refused_on_a_cpu(flags, tmp_path):
    with trial("没有显卡却要 paged_adamw_8bit", 2):
        assert "adamw_torch" in go(tmp_path / "run", *flags, "--optim", "paged_adamw_8bit", "--device", "cpu", "--output_dir", tmp_path / "run", code=2)
