"""Nothing is lost: runs are killed, stopped and starved of disk at every point, and what goes on from there equals the uninterrupted run bit for bit.

  python -m pytest tests/test_resume.py                      # seeds and the table fault → exit code → passed N/N come at the end
  FAULT_SEED=7 FAULT_TIMES=10 python -m pytest tests/test_resume.py    # other random moments, ten times as many

A run is a child of a fork server that has imported torch, transformers, peft and train.py once, on one thread and without a tensor
operation (a thread pool would not survive the fork). It is the script itself, main() with a command line, and it may die by SIGKILL.
"""

import contextlib
import errno
import functools
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest

from conftest import ANSWERS, QUESTIONS, ROOT, metrics, write_csv

SEED, TIMES = int(os.environ.get("FAULT_SEED", "20")), int(os.environ.get("FAULT_TIMES", "1"))
TABLE = {}  # (fault, exit code) → [passed, of]
ONE_AT_A_TIME = threading.Lock()  # multiprocessing reads every child's exit code when it starts another, and reads it only once


@contextlib.contextmanager
def trial(fault, code, times=1):
    """Count `times` trials of `fault` in the table; they have passed where nothing is raised inside."""
    row = TABLE.setdefault((fault, str(code)), [0, 0])
    row[1] += times
    yield
    row[0] += times


@pytest.fixture(scope="session", autouse=True)
def fault_table(request):
    """Writes the table when the session ends; conftest.py prints it."""
    yield
    if TABLE:
        lines = [f"FAULT_SEED={SEED} FAULT_TIMES={TIMES}", "", "| 故障 | 退出码 | 通过 |", "|---|---|---|",
                 *(f"| {fault} | {code} | {passed}/{of} |" for (fault, code), (passed, of) in TABLE.items())]
        TABLE.clear()
        path = Path(request.config.cache.mkdir("faults"), f"table-{os.environ.get('PYTEST_XDIST_WORKER', 'all')}.md")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- 1. Runs in children of a fork server ----

@pytest.fixture(scope="session", autouse=True)
def server(tiny):
    """Starts the fork server: a fresh process, whatever this one has computed before."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["test_resume"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("FAULT_SERVER", tiny)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11's fork server does not pass it on
        forkserver.ensure_running()


def warm_up(model):
    """What every run would pay again: imports, compiled patterns and templates. One thread, no gradients, so that a fork is safe."""
    import warnings

    import peft
    import torch
    import torch.utils.tensorboard

    import common
    import compare_models  # noqa: F401
    import train  # noqa: F401

    warnings.simplefilter("ignore")
    tokenizer = common.load_tokenizer(model)
    common.encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    base = common.load_base(model, "cpu", torch.float32)
    adapter = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        peft.PeftModel.from_pretrained(common.load_base(model, "cpu", torch.float32), folder)


if os.environ.get("FAULT_SERVER"):
    warm_up(os.environ["FAULT_SERVER"])


def child(script, arguments, log, fault):
    """What a child does: `fault()` first, then the script as if typed, its words going to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = [f"{script}.py", *map(str, arguments)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: tests that run in the background of a script inherit a deaf one
    importlib.import_module("tqdm").tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    main = importlib.import_module(script).main
    if fault:
        fault()
    importlib.import_module("common").run_script(main)


def start(log, *arguments, fault=None, script="train"):
    """A child that runs `script` with `arguments`; `fault` is a picklable function that prepares the trouble."""
    process = multiprocessing.get_context("forkserver").Process(target=child, args=(script, arguments, str(log), fault))
    with ONE_AT_A_TIME:
        process.start()
    return process


def finish(process, seconds=120):
    """The exit code of a child, as a shell shows it: 137 for SIGKILL."""
    assert connection.wait([process.sentinel], seconds), "the child hangs"
    with ONE_AT_A_TIME:
        process.join()
    return 128 - process.exitcode if process.exitcode < 0 else process.exitcode


def go(folder, *arguments, fault=None, code=0, script="train"):
    """Run a child to its end; asserts its exit code and that no refusal shows a traceback. Returns its words."""
    log = Path(f"{folder}.log")
    log.unlink(missing_ok=True)
    ended = finish(start(log, *arguments, fault=fault, script=script))
    words = log.read_text(encoding="utf-8", errors="replace")
    assert ended == code, f"exit {ended}, expected {code}\n{words[-3000:]}"
    if code in (2, 3, 4, 5, 6):
        assert "错误：" in words and "Traceback" not in words, words[-3000:]
    return words


def two_at_once(function, items):
    """`function` of each item, on both cores; the first exception is raised here."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


# ---- 2. What must be equal ----

def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def bits(folder):
    """All that a finished run holds: adapter, optimizer, counters, metrics (but for the speed)."""
    from train import checkpoints

    last = checkpoints(Path(folder))[0]
    state = json.loads((last / "state.json").read_text(encoding="utf-8"))
    return {"final": digest(Path(folder) / "final_model" / "adapter_model.safetensors"), "last": last.name, "adapter": digest(last / "adapter_model.safetensors"),
            "moments": digest(last / "optimizer.safetensors"), **{key: state[key] for key in ("step", "best", "best_step", "bad_evals", "optimizer", "scaler", "threads")},
            "metrics": [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in metrics(folder)]}


def sound(folder):
    """The steps of the checkpoints in `folder`; asserts that each one that is to be seen is whole."""
    from train import checkpoints, damage

    found = checkpoints(Path(folder))
    assert not [f"{c.name}: {damage(c)}" for c in found if damage(c)]
    return [int(c.name[11:]) for c in found]


@pytest.fixture(scope="session")
def flags(tiny, data):
    """A run of 6 rows in uneven steps (4 rows, 2 rows), dropout on, evaluated each epoch and saved each step."""
    return ["--model_name", tiny, "--dataset_name", data, "--val_ratio", 0.15, "--batch_size", 1, "--gradient_accumulation_steps", 4, "--lora_r", 4,
            "--learning_rate", 5e-3, "--save_every", 1, "--report_to", "none"]


# ---- 3. Killed at random moments ----

def test_runs_killed_at_random_moments_end_with_the_bits_of_the_uninterrupted_run(flags, tmp_path):
    long = [*flags, "--num_epochs", 10]
    go(tmp_path / "warm", *long, "--output_dir", tmp_path / "warm")
    began = time.perf_counter()
    go(tmp_path / "whole", *long, "--output_dir", tmp_path / "whole")
    seconds = time.perf_counter() - began
    expected = bits(tmp_path / "whole")
    assert expected["step"] == 20

    def kill_again_and_again(worker):
        dice, kills, torn, steps = random.Random(SEED * 100 + worker), 0, 0, set()
        for number in itertools.count():
            folder = tmp_path / f"run-{worker}-{number}"
            kills_here = 0
            while True:
                process = start(f"{folder}.log", *long, "--output_dir", folder, "--resume_from_checkpoint", "auto")
                connection.wait([process.sentinel], dice.uniform(0, seconds * 1.1))
                with ONE_AT_A_TIME:
                    process.kill()
                code = finish(process)
                if code == 0:
                    break
                assert code == 137, Path(f"{folder}.log").read_text(encoding="utf-8")[-3000:]
                kills_here += 1
                torn += any(folder.glob(".tmp-*"))
                steps.update(sound(folder)[:1])
            with trial("随时 kill -9，再接着训练：逐位相同", 0, kills_here):
                assert bits(folder) == expected, f"FAULT_SEED={SEED} worker {worker} run {number}"
                assert not list(folder.glob(".tmp-*"))
            shutil.rmtree(folder)
            if (kills := kills + kills_here) >= 30 * TIMES:
                return kills, torn, steps

    results = two_at_once(kill_again_and_again, range(2))
    kills, torn, steps = sum(k for k, _, _ in results), sum(t for _, t, _ in results), set.union(*(s for _, _, s in results))
    print(f"FAULT_SEED={SEED}: {kills} kills, {torn} left a torn .tmp- folder, newest checkpoints then: {sorted(steps)}; a whole run takes {seconds:.2f} s")
    assert len(steps) > 5, "the kills must fall at many steps"


# ---- 4. Killed, or out of disk, at every write, fsync, rename and delete ----

WRITES = ("open", "os.mkdir", "fsync")


def at_io(first, action, operations=(*WRITES, "os.rename", "os.remove", "os.rmdir"), list_in=None):
    """Call `action(name, path)` at the `first`-th file operation of a run and at each later one (0: never); their names go to the file `list_in`."""
    done = 0

    def operation(name, path=None):
        nonlocal done
        if name in operations:
            done += 1
            if list_in:
                os.write(names, f"{name}\n".encode())
            if 0 < first <= done:
                action(name, path)

    def hook(event, arguments):
        if event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            operation(event, *arguments[:1])

    names = os.open(list_in, os.O_CREAT | os.O_WRONLY) if list_in else None
    fsync, os.fsync = os.fsync, lambda file: (operation("fsync"), fsync(file))[1]
    sys.addaudithook(hook)


def die(name, path):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(folder, name, path):
    if folder in str(path):
        die(name, path)


def die_mid_write(size, name, path):
    """From now on the system kills the process when a file of its grows over `size` bytes, libraries' files included."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_space(name, path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([path] if isinstance(path, str) else []))


def limit_files(size, name, path):
    """From now on no file can grow over `size` bytes: EFBIG, which safetensors raises as a type of its own."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture(scope="module")
def short(flags, tmp_path_factory):
    """A run of 3 steps, its bits, and the names of its file operations; the third save deletes the first."""
    folder = tmp_path_factory.mktemp("short")
    few = [*flags, "--max_steps", 3, "--val_ratio", 0]
    go(folder / "whole", *few, "--output_dir", folder / "whole", fault=functools.partial(at_io, 0, None, list_in=str(folder / "names")))
    operations = (folder / "names").read_text(encoding="utf-8").split()
    assert operations.count("open") > 20 and operations.count("fsync") > 30 and operations.count("os.remove") > 10
    return few, bits(folder / "whole"), operations


def test_killed_at_every_write_fsync_rename_and_delete(short, tmp_path):
    few, expected, operations = short

    def kill_at(k):
        folder = tmp_path / str(k)
        with trial("保存中的每个写、fsync、改名、删除处 kill -9", 0):
            go(folder, *few, "--output_dir", folder, fault=functools.partial(at_io, k, die), code=137)
            newest = (sound(folder) or [0])[0]
            go(folder, *few, "--output_dir", folder, "--resume_from_checkpoint", "auto")
            assert bits(folder) == expected
            assert not list(folder.glob(".tmp-*"))
        shutil.rmtree(folder)
        return newest

    newest = two_at_once(kill_at, range(1, len(operations) + 1))
    assert newest == sorted(newest) and set(newest) == {0, 1, 2, 3}, newest


def test_killed_at_every_write_of_a_resumed_start(short, tmp_path):
    few, expected, _ = short
    go(tmp_path / "begun", *few, "--output_dir", tmp_path / "begun", fault=functools.partial(at_io, 75, die), code=137)
    assert sound(tmp_path / "begun")[0] in (1, 2)

    def kill_at(k, fault, code):
        folder = tmp_path / f"{code}-{k}"
        shutil.copytree(tmp_path / "begun", folder)
        with trial("接着训练的开头被杀，文件写到一半", 0):
            go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto", fault=functools.partial(at_io, k, fault), code=code)
            sound(folder)
            go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto")
            assert bits(folder) == expected

    two_at_once(lambda k: kill_at(k, die, 137), range(1, 15))
    two_at_once(lambda k: kill_at(k, functools.partial(die_mid_write, 100), 128 + signal.SIGXFSZ), range(1, 15))


def test_killed_in_the_middle_of_a_write(short, tmp_path):
    few, expected, operations = short
    dice = random.Random(SEED)

    def kill_at(number, k, size):
        folder = tmp_path / str(number)
        with trial("写到文件中间时被杀", 0):
            process = start(f"{folder}.log", *few, "--output_dir", folder, fault=functools.partial(at_io, k, functools.partial(die_mid_write, size)))
            died = finish(process) == 128 + signal.SIGXFSZ
            sound(folder)
            if died:
                go(folder, *few, "--output_dir", folder, "--resume_from_checkpoint", "auto")
            assert bits(folder) == expected, f"FAULT_SEED={SEED} operation {k} size {size}"
        return died

    died = two_at_once(lambda arguments: kill_at(*arguments), [(n, dice.randint(1, len(operations)), 2 ** dice.randint(4, 16)) for n in range(12 * TIMES)])
    assert sum(died) > len(died) / 2


def test_a_full_disk_at_every_write_exits_6_and_leaves_what_was_saved(short, tmp_path):
    few, expected, operations = short

    def fill_at(k, fault, name):
        folder = tmp_path / name
        with trial("第 k 次写时磁盘满（ENOSPC、EFBIG）", 6):
            words = go(folder, *few, "--output_dir", folder, fault=functools.partial(at_io, k, fault, WRITES), code=6)
            newest = (sound(folder) or [0])[0]
            assert not list(folder.glob(".tmp-*")), "a torso still takes the space"
            assert "checkpoint" in words.splitlines()[-1]
            if k % 4 == 0:
                go(folder, *few, "--output_dir", folder, "--resume_from_checkpoint", "auto")
                assert bits(folder) == expected
        shutil.rmtree(folder, ignore_errors=True)
        return newest

    newest = two_at_once(lambda k: fill_at(k, no_space, f"full-{k}"), range(1, sum(name in WRITES for name in operations) - 2))  # the last two are the report, which no resumed run needs
    assert newest == sorted(newest) and set(newest) == {0, 1, 2, 3}, newest
    two_at_once(lambda k: fill_at(k, functools.partial(limit_files, 4000), f"limit-{k}"), range(1, 60, 6))


# ---- 5. Resumed from every step ----

CONFIGURATIONS = {
    "dropout, uneven steps": ["--num_epochs", 4],
    "eval and log across the edges of epochs": ["--num_epochs", 4, "--eval_every", 3, "--logging_steps", 3, "--lr_scheduler", "linear", "--warmup_ratio", 0.5],
    "NEFTune": ["--max_steps", 7, "--neftune_alpha", 5, "--weight_decay", 0.1],
    "padding, gradient checkpointing": ["--num_epochs", 3, "--no_fast", "--gradient_checkpointing"],
}


@pytest.fixture(scope="module")
def worsening(flags, tmp_path_factory):
    """A run that stops early, two evaluations after its best: what it learns by heart makes the validation rows worse."""
    val = write_csv(tmp_path_factory.mktemp("val") / "val.csv", zip(QUESTIONS, reversed(ANSWERS)))
    return [*flags, "--val_data", val, "--num_epochs", 20, "--eval_every", 1, "--learning_rate", 3e-2, "--lr_scheduler", "constant", "--warmup_ratio", 0,
            "--early_stopping_patience", 2, "--save_total_limit", 99]


def resume_from_every_step(whole, first=1):
    """Asserts that the run in `whole`, with all its checkpoints, comes out the same from each of them, and when it is resumed after its end."""
    expected = bits(whole)
    assert expected["step"] > first

    def resume(step):
        folder = whole.with_name(str(step))
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "final_model")
        for later in range(step + 1, expected["step"] + 1):
            shutil.rmtree(folder / f"checkpoint-{later}")
        with trial("从每一步接着训练：逐位相同", 0):
            go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto")
            assert bits(folder) == expected, step

    two_at_once(resume, range(first, expected["step"] + 1))
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != ".lock"}
    with trial("已完成的再接着训练：什么都不动", 0):
        assert "已完成" in go(whole, "--output_dir", whole, "--resume_from_checkpoint", "auto")
        assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != ".lock"} == before


@pytest.mark.parametrize("extra", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_resumed_from_every_step_it_ends_with_the_same_bits(flags, tmp_path, extra):
    go(tmp_path / "whole", *flags, "--save_total_limit", 99, *extra, "--output_dir", tmp_path / "whole")
    resume_from_every_step(tmp_path / "whole")


def test_resumed_around_its_early_stop_it_stops_at_the_same_step(worsening, tmp_path):
    go(tmp_path / "whole", *worsening, "--output_dir", tmp_path / "whole")
    end = bits(tmp_path / "whole")
    assert 2 < end["best_step"] == end["step"] - 2 < 30, "else this test says nothing"
    resume_from_every_step(tmp_path / "whole", first=end["best_step"])


def test_the_number_of_threads_is_that_of_the_first_start_however_often_it_is_resumed(flags, tmp_path):
    import torch

    go(tmp_path / "run", *flags, "--max_steps", 1, "--output_dir", tmp_path / "run")
    for steps in (2, 3):
        go(tmp_path / "run", "--max_steps", steps, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "auto", fault=functools.partial(torch.set_num_threads, 2))
    with trial("机器的线程数变了：仍用开始时的", 0):
        assert bits(tmp_path / "run")["threads"] == 1


def test_tensorboard_shows_each_step_once_after_a_crash(flags, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    typed = [*flags[:-2], "--max_steps", 4, "--save_every", 2, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "auto"]
    for name, steps in (("checkpoint-2", [1, 2]), ("checkpoint-4", [1, 2, 3, 4])):  # killed while these are written
        go(tmp_path / "run", *typed, fault=functools.partial(at_io, 1, functools.partial(die_in, name)), code=137)
        assert [m["step"] for m in metrics(tmp_path / "run") if "loss" in m] == steps
        time.sleep(1.1)  # event files are named by the second
    assert sound(tmp_path / "run") == [2]
    go(tmp_path / "run", *typed)
    with trial("崩溃后 TensorBoard 和 metrics.jsonl 每步一次", 0):
        events = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
        assert [e.step for e in events.Scalars("loss")] == [m["step"] for m in metrics(tmp_path / "run") if "loss" in m] == [1, 2, 3, 4]


# ---- 6. Damaged checkpoints ----

def test_every_flipped_bit_and_every_cut_is_noticed_and_no_sound_checkpoint_is_blamed(flags, tmp_path):
    from train import damage

    go(tmp_path / "run", *flags, "--max_steps", 1, "--output_dir", tmp_path / "run")
    checkpoint, dice = tmp_path / "run" / "checkpoint-1", random.Random(SEED)
    files = sorted(checkpoint.iterdir())
    for n in range(300 * TIMES):
        file = files[n % len(files)]
        data = file.read_bytes()
        changed = bytearray(data)
        if n % 3:
            changed[place := dice.randrange(len(data))] ^= 1 << (bit := dice.randrange(8))
        else:
            place, bit = dice.choice([0, len(data) // 2, len(data) - 1, dice.randrange(len(data))]), None
            del changed[place:]
        file.write_bytes(changed)
        with trial("checkpoint 的一位翻转或截断：发现", 4):
            assert damage(checkpoint), f"FAULT_SEED={SEED}: {file.name} byte {place} bit {bit}"
        file.write_bytes(data)
        with trial("完好的 checkpoint：不误报", 0):
            assert not damage(checkpoint)
    for file in files:
        file.rename(tmp_path / "away")
        with trial("checkpoint 少一个文件：发现", 4):
            assert damage(checkpoint), file.name
        (tmp_path / "away").rename(file)


def spoil(checkpoint, name="adapter_model.safetensors"):
    data = bytearray((checkpoint / name).read_bytes())
    data[-1] ^= 1
    (checkpoint / name).write_bytes(data)


def test_auto_falls_back_by_name_and_a_named_checkpoint_is_taken_or_refused(short, tmp_path):
    few, expected, _ = short
    go(tmp_path / "run", *few, "--output_dir", tmp_path / "run")
    auto = ["--output_dir", tmp_path / "run", "--resume_from_checkpoint", "auto"]
    spoil(tmp_path / "run" / "checkpoint-3", "optimizer.safetensors")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with trial("指定的 checkpoint 已损坏：拒绝", 4):
        assert "optimizer.safetensors" in go(tmp_path / "run", "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-3", code=4)
        assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    with trial("最新的已损坏：auto 用前一个并说明", 0):
        words = go(tmp_path / "run", *auto)
        assert "checkpoint-3" in words and "optimizer.safetensors" in words and "checkpoint-2 接着训练" in words
        assert bits(tmp_path / "run") == expected
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        spoil(checkpoint, "state.json")
    with trial("全部已损坏：拒绝，什么都不动", 4):
        assert "全部损坏" in go(tmp_path / "run", *auto, code=4)
    with trial("没有 checkpoint：从头开始", 0):
        assert "从头开始" in go(tmp_path / "new", *few, "--output_dir", tmp_path / "new", "--resume_from_checkpoint", "auto")
        assert bits(tmp_path / "new") == expected


def test_a_damaged_best_checkpoint_never_becomes_the_final_model(worsening, tmp_path):
    folder = tmp_path / "run"
    go(folder, *worsening, "--output_dir", folder)
    best = bits(folder)["best_step"]
    assert 0 < best < bits(folder)["step"], "else this test says nothing"
    shutil.rmtree(folder / "final_model")
    spoil(folder / f"checkpoint-{best}")
    with trial("最好的 checkpoint 已损坏：不会悄悄成为最终模型", 4):
        words = go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto", code=4)
        assert f"checkpoint-{best}" in words and not (folder / "final_model").exists()


def test_the_newest_are_kept_and_damaged_ones_neither_count_nor_go(flags, tmp_path):
    from train import damage

    folder = tmp_path / "run"
    go(folder, *flags, "--val_ratio", 0, "--max_steps", 3, "--output_dir", folder, "--save_total_limit", 9)
    spoil(folder / "checkpoint-3")
    go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto", "--max_steps", 4, "--save_every", 2, "--save_total_limit", 2)
    with trial("保留最近 N 个：损坏的不算数", 0):
        assert {c.name: bool(damage(c)) for c in folder.glob("checkpoint-*")} == {"checkpoint-4": False, "checkpoint-3": True, "checkpoint-2": False}


# ---- 7. Signals ----

def signalled(folder, flags, number, delay):
    """A run that gets signal `number` once it has been in its loop for `delay` seconds; returns (exit code, words, seconds from signal to end)."""
    log = Path(f"{folder}.log")
    process = start(log, *flags, "--output_dir", folder)
    while "{'loss'" not in (log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""):
        assert not connection.wait([process.sentinel], 0.01), log.read_text(encoding="utf-8")
    connection.wait([process.sentinel], delay)
    sent = time.perf_counter()
    os.kill(process.pid, number)
    return finish(process), log.read_text(encoding="utf-8"), time.perf_counter() - sent


def test_ctrl_c_and_sigterm_at_random_moments_save_and_go_on_to_the_same_bits(flags, tmp_path):
    long = [*flags[:-4], "--save_every", -1, "--report_to", "none", "--num_epochs", 12]
    go(tmp_path / "whole", *long, "--output_dir", tmp_path / "whole")
    expected, dice = bits(tmp_path / "whole"), random.Random(SEED)

    def stop(n, number, code, delay):
        folder = tmp_path / str(n)
        ended, words, seconds = signalled(folder, long, number, delay)
        with trial(f"任意时刻 {signal.Signals(number).name}：存好再停，接着训练逐位相同", ended):  # 0 where the run was over before the signal came
            assert ended in (code, 0), words[-2000:]
            if ended:
                assert "--resume_from_checkpoint auto" in words and f"checkpoint-{sound(folder)[0]}" in words and "Traceback" not in words
                go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto")
            assert bits(folder) == expected, f"FAULT_SEED={SEED} trial {n}"
            assert seconds < 5
        return bool(ended)

    stops = two_at_once(lambda arguments: stop(*arguments), [(n, *((signal.SIGINT, 130) if n % 2 else (signal.SIGTERM, 143)), dice.uniform(0, 0.3)) for n in range(20 * TIMES)])
    assert sum(stops) > len(stops) * 0.8, "most signals must fall into the run"


def test_ctrl_c_saves_though_it_has_ended_the_program_that_reads_the_log(flags, tmp_path):
    """`train.py 2>&1 | tee log`: Ctrl-C kills tee too, and what is said after it has nowhere to go."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, [*flags[:-4], "--save_every", -1, "--report_to", "none", "--num_epochs", 400, "--output_dir", tmp_path / "run"])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path)
    while b"'loss'" not in process.stderr.readline():
        assert process.poll() is None
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (130, 141)
    assert len(sound(tmp_path / "run")) == 1


def test_a_file_system_that_cannot_sync_folders_still_gets_checkpoints_and_one_that_cannot_sync_files_does_not(tmp_path, monkeypatch):
    from train import damage, staged

    def refuse(handle, of=None):
        if of(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    for of in (stat.S_ISDIR, stat.S_ISREG):
        monkeypatch.setattr(os, "fsync", functools.partial(refuse, of=of))
        with pytest.raises(OSError) if of is stat.S_ISREG else contextlib.nullcontext(), staged(tmp_path / of.__name__) as staging:
            for name in ("state.json", "optimizer.safetensors", "adapter_model.safetensors"):
                (staging / name).write_text(name, encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["S_ISDIR"] and not damage(tmp_path / "S_ISDIR")


def test_a_step_may_be_split_otherwise_when_memory_ran_out(flags, tmp_path):
    folder = tmp_path / "run"
    go(folder, *flags, "--max_steps", 2, "--output_dir", folder)
    saved = json.loads((folder / f"checkpoint-{sound(folder)[0]}" / "state.json").read_text(encoding="utf-8"))["args"]
    again = ["--output_dir", folder, "--resume_from_checkpoint", "auto", "--max_steps", 3, "--gradient_checkpointing"]
    rows = saved["batch_size"] * saved["gradient_accumulation_steps"]
    assert "batch_size" in go(folder, *again, "--batch_size", rows + 1, "--gradient_accumulation_steps", 1, code=2)
    assert f"batch_size {saved['batch_size']} → {rows}" in go(folder, *again, "--batch_size", rows, "--gradient_accumulation_steps", 1)
    assert json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] == 3
