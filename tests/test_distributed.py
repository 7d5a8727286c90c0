"""Several processes share a run: the same data and seed give the same losses and adapter, and losing one of them loses nothing.

Most runs here are children of the fork server of test_resume.py with the variables that torchrun sets; one is started by torchrun itself.
"""

# ruff: noqa: F811 - test_resume.py's fixtures are imported, and are arguments here
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import QUESTIONS, ROOT, metrics, write_csv
from test_resume import fault_table, finish, flags, go, server, sound, start, trial  # noqa: F401


def join(rank, world, port, seen=None):
    """What torchrun tells a process; the places of the rows that it learns from go to the file `seen`, a line a micro-batch."""
    import train

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    loss_sum = train.loss_sum

    def written_down(model, rows, *arguments, **options):
        if model.training:
            with open(seen, "a", encoding="utf-8") as file:
                file.write(json.dumps([where for _, _, where in rows]) + "\n")
        return loss_sum(model, rows, *arguments, **options)

    train.loss_sum = written_down if seen else loss_sum


def start_shared(folder, world, *arguments, seen=False):
    """`world` children that share one run; their words go to FOLDER.RANK.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(f"{folder}.{rank}.log", *arguments, "--output_dir", folder, fault=functools.partial(join, rank, world, port, f"{folder}.{rank}.seen" if seen else None))
            for rank in range(world)]


def words(folder, rank):
    return Path(f"{folder}.{rank}.log").read_text(encoding="utf-8")


def assert_same(folder, other, tolerance=1e-5):
    """The two runs' metrics and adapters are equal but for rounding."""
    from safetensors.torch import load_file

    assert len(metrics(folder)) == len(metrics(other))
    for mine, theirs in zip(metrics(folder), metrics(other)):
        assert {**mine, "tokens_per_second": 0} == pytest.approx({**theirs, "tokens_per_second": 0}, rel=tolerance, abs=2e-4 if "grad_norm" in mine else tolerance)
        assert mine.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=tolerance)
    mine, theirs = (load_file(Path(f) / "final_model" / "adapter_model.safetensors") for f in (folder, other))
    assert mine.keys() == theirs.keys()
    assert max((mine[key] - theirs[key]).abs().max().item() for key in mine) <= tolerance


@pytest.fixture(scope="module")
def shared(flags):
    """Steps of 4 and of 2 rows: of three processes one has no row in the short one. No dropout: its masks differ from process to process."""
    return [*flags, "--lora_dropout", 0, "--learning_rate", 3e-4]


@pytest.fixture(scope="module")
def alone(shared, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    go(folder, *shared, "--output_dir", folder)
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_share_the_rows_learn_what_one_learns(shared, alone, tmp_path, world):
    folder = tmp_path / "run"
    assert [finish(child) for child in start_shared(folder, world, *shared, seen=True)] == [0] * world
    assert_same(folder, alone)
    assert f"{world} 个进程" in words(folder, 0) and not any(words(folder, rank) for rank in range(1, world))  # one talks
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["processes"] == world
    assert {p.name for p in folder.iterdir()} == {p.name for p in alone.iterdir()}
    shares = [[where for line in Path(f"{folder}.{rank}.seen").read_text(encoding="utf-8").splitlines() for where in json.loads(line) if where] for rank in range(world)]  # can_pack's probe has no place
    learned = sorted(where for share in shares for where in share)
    assert learned == sorted([*set(learned)] * 3) and len(set(learned)) == 6  # every row once in each of three epochs, by one of them
    assert max(map(len, shares)) - min(map(len, shares)) <= 6


def test_dropout_masks_differ_from_process_to_process(shared, alone, tmp_path):
    """Twice the same row, one for each process: with one mask for both the gradient would be that of the row alone."""
    data = write_csv(tmp_path / "two.csv", [(QUESTIONS[0], "一般不超过六个月。")] * 2)
    run = [*shared, "--dataset_name", data, "--val_ratio", 0, "--lora_dropout", 0.5, "--batch_size", 2, "--gradient_accumulation_steps", 1, "--max_steps", 3]
    assert [finish(child) for child in start_shared(tmp_path / "both", 2, *run)] == [0, 0]
    one = write_csv(tmp_path / "one.csv", [(QUESTIONS[0], "一般不超过六个月。")])
    go(tmp_path / "one", *run, "--dataset_name", one, "--output_dir", tmp_path / "one")
    assert metrics(tmp_path / "both")[0]["grad_norm"] != pytest.approx(metrics(tmp_path / "one")[0]["grad_norm"], rel=0.01)


def test_one_process_told_to_stop_stops_all_after_a_save(shared, tmp_path):
    folder = tmp_path / "run"
    children = start_shared(folder, 2, *shared, "--num_epochs", 500)
    deadline = time.monotonic() + 60
    while not list(folder.glob("checkpoint-[1-9]*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(children[1].pid, signal.SIGTERM)
    with trial("几个进程中的一个收到 SIGTERM：全部存好再停", 143):
        assert [finish(child) for child in children] == [143, 143]
        assert f"checkpoint-{sound(folder)[0]}" in words(folder, 0)


def test_processes_that_see_other_data_refuse_to_start(shared, tmp_path):
    other = write_csv(tmp_path / "other.csv", [("问", "答"), ("再问", "再答"), ("三问", "三答")])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [start(tmp_path / f"{rank}.log", *shared, "--output_dir", tmp_path / "run", *(["--dataset_name", other] * (rank == 1)),
                      fault=functools.partial(join, rank, 2, port)) for rank in range(2)]
    with trial("几个进程看到的数据不同：不开始", 4):
        assert [finish(child) for child in children] == [4, 4]
        assert "各个训练进程看到的数据" in (tmp_path / "0.log").read_text(encoding="utf-8")


def test_a_process_of_torchrun_that_dies_ends_the_others_and_loses_nothing(shared, tmp_path):
    folder = tmp_path / "run"
    long = [*map(str, shared), "--save_every", "2", "--output_dir", str(folder)]
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        torchrun = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py", *long, "--num_epochs", "2000"],
                                    cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoint-[1-9]*")) and torchrun.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        assert len(workers) == 2, (tmp_path / "log").read_text(encoding="utf-8")[-2000:]
        with trial("torchrun 的一个进程被 kill -9：其余 30 秒内停下，换进程数接着训练", 1):
            os.kill(int(workers[1]), signal.SIGKILL)
            assert torchrun.wait(30) == 1
            assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
            step = sound(folder)[0]
            for name in ("one", "three"):
                shutil.copytree(folder, tmp_path / name)
            rest = [*shared, "--num_epochs", (step + 8) / 2, "--save_every", 2, "--resume_from_checkpoint", "auto"]
            go(tmp_path / "one", *rest, "--output_dir", tmp_path / "one")
            assert [finish(child) for child in start_shared(tmp_path / "three", 3, *rest)] == [0] * 3
            assert "进程数 2 → 3" in words(tmp_path / "three", 0)
            assert [m["step"] for m in metrics(tmp_path / "three") if "loss" in m] == list(range(1, step + 9))
            assert_same(tmp_path / "three", tmp_path / "one")


@pytest.fixture
def two_cards(tmp_path):
    """An environment where nvidia-smi lists two cards; torch sees none, so the two processes train on the CPU."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: a card\\nGPU 1: a card\\n'\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    return {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def test_train_csv_starts_a_process_for_each_card(shared, two_cards, tmp_path):
    command = ["./train_csv.sh", *map(str, shared), "--output_dir", str(tmp_path / "run"), "--num_epochs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=two_cards, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 个进程" in done.stderr and (tmp_path / "run" / "final_model" / "adapter_model.safetensors").is_file()
    assert f'--lora_weights "{tmp_path / "run" / "final_model"}"' in done.stdout

    missing = subprocess.run([*command, "--dataset_name", "没有.csv"], cwd=ROOT, env=two_cards, capture_output=True, text=True, encoding="utf-8", check=False)
    assert missing.returncode == 3 and missing.stderr.count("错误：") == 1 and "Traceback" not in missing.stderr
