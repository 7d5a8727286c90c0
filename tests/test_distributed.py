"""Several processes share a run: the same data and seed give the same losses and adapter, and losing one of them loses nothing.

Most runs here are children of the fork server of test_resume.py with the variables that torchrun sets; one is started by torchrun itself.
"""

# ruff: noqa: F811 - test_resume.py's fixtures are imported, and are arguments here
import functools
import json
import os
import re
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


def join(rank, world, port, seen=None, threads=1):
    """What torchrun tells a process; the places of the rows that it learns from go to the file `seen`, a line a micro-batch."""
    import torch

    import train

    torch.set_num_threads(threads)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    loss_sum = train.loss_sum

    def written_down(model, rows, *arguments, **options):
        if model.training:
            with open(seen, "a", encoding="utf-8") as file:
                file.write(json.dumps([where for _, _, where in rows]) + "\n")
        return loss_sum(model, rows, *arguments, **options)

    train.loss_sum = written_down if seen else loss_sum


def start_shared(folder, world, *arguments, seen=False, threads=1, of_the_last=(), prepare=join):
    """`world` children that share one run, each after `prepare`; their words go to FOLDER.RANK.log. The last one is typed the arguments `of_the_last` too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(f"{folder}.{rank}.log", *arguments, "--output_dir", folder, *(of_the_last if rank == world - 1 else ()), fault=functools.partial(prepare, rank, world, port, f"{folder}.{rank}.seen" if seen else None, threads))
            for rank in range(world)]


def wait_for_checkpoint(folder, is_alive):
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoint-[1-9]*")) and is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_alive()


def words(folder, rank):
    return Path(f"{folder}.{rank}.log").read_text(encoding="utf-8")


def assert_same(folder, other, tolerance=1e-5):
    """The two runs' metrics and adapters are equal but for rounding."""
    from safetensors.torch import load_file

    assert len(metrics(folder)) == len(metrics(other))
    for mine, theirs in zip(metrics(folder), metrics(other)):
        assert mine.pop("tokens_per_second", None) is None or theirs.pop("tokens_per_second")
        assert mine.pop("grad_norm", 0) == pytest.approx(theirs.pop("grad_norm", 0), rel=tolerance, abs=1e-4)  # written with four places
        assert mine == pytest.approx(theirs, rel=tolerance, abs=1e-6)
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


def in_pieces(rank, world, port, seen, threads):
    """`join`, with the share of the frozen layers that this process holds written to the file `seen`."""
    import torch

    join(rank, world, port, threads=threads)
    import train

    loss_sum = train.loss_sum

    def weighed(model, *arguments, **options):
        frozen = [p for name, p in model.named_parameters() if ".layers." in name and not p.requires_grad]
        held = sum((p.to_local() if isinstance(p, torch.distributed.tensor.DTensor) else p).numel() for p in frozen)
        Path(seen).write_text(f"{held / sum(p.numel() for p in frozen)}", encoding="utf-8")
        return loss_sum(model, *arguments, **options)

    train.loss_sum = weighed


@pytest.mark.parametrize("world", [2, 3])
def test_a_base_in_pieces_teaches_what_a_whole_one_teaches(shared, alone, tmp_path, world):
    """Three processes: one has no row in the short step, and must put the layers together for the others all the same."""
    folder = tmp_path / "run"
    options = ["--fsdp", *(["--gradient_checkpointing"] if world == 2 else [])]
    children = start_shared(folder, world, *shared, *options, seen=True, prepare=in_pieces)
    assert [finish(child) for child in children] == [0] * world, words(folder, 0)
    assert_same(folder, alone)
    held = [float(Path(f"{folder}.{rank}.seen").read_text(encoding="utf-8")) for rank in range(world)]
    assert sum(held) == pytest.approx(1) and max(held) < 1.2 / world
    go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto", "--no-fsdp", "--num_epochs", 4)  # one process, with a whole base


def test_a_lost_process_is_said_where_the_base_is_in_pieces(shared, tmp_path):
    """The others notice in the middle of a layer, not where they sum."""
    folder = tmp_path / "run"
    children = start_shared(folder, 2, *shared, "--fsdp", "--num_epochs", 2000, "--save_every", 2)
    wait_for_checkpoint(folder, children[0].is_alive)
    children[1].kill()
    assert finish(children[0], 60) == 6
    assert "断了联系" in words(folder, 0) and "Traceback" not in words(folder, 0)
    assert sound(folder)


def test_pieces_need_processes_and_a_base_that_is_not_quantised(shared, tmp_path):
    for wrong in ([], ["--use_4bit"]):
        assert "--fsdp" in go(tmp_path / "run", *shared, "--fsdp", *wrong, "--output_dir", tmp_path / "run", code=2)


def test_dropout_masks_differ_from_process_to_process(shared, tmp_path):
    """Twice the same row, one for each process: with one mask for both the gradient would be that of the row alone."""
    data = write_csv(tmp_path / "two.csv", [(QUESTIONS[0], "一般不超过六个月。")] * 2)
    run = [*shared, "--dataset_name", data, "--val_ratio", 0, "--lora_dropout", 0.5, "--batch_size", 2, "--gradient_accumulation_steps", 1, "--max_steps", 3]
    assert [finish(child) for child in start_shared(tmp_path / "both", 2, *run)] == [0, 0]
    one = write_csv(tmp_path / "one.csv", [(QUESTIONS[0], "一般不超过六个月。")])
    go(tmp_path / "one", *run, "--dataset_name", one, "--output_dir", tmp_path / "one")
    assert metrics(tmp_path / "both")[0]["grad_norm"] != pytest.approx(metrics(tmp_path / "one")[0]["grad_norm"], rel=0.01)


def test_one_process_told_to_stop_stops_all_after_a_save(shared, tmp_path):
    folder = tmp_path / "run"
    children = start_shared(folder, 2, *shared, "--num_epochs", 500, threads=2)
    wait_for_checkpoint(folder, children[0].is_alive)
    os.kill(children[1].pid, signal.SIGTERM)
    with trial("几个进程中的一个收到 SIGTERM：全部存好再停", 143):
        assert [finish(child) for child in children] == [143, 143]
        assert f"checkpoint-{sound(folder)[0]}" in words(folder, 0)
    go(folder, "--output_dir", folder, "--resume_from_checkpoint", "auto", "--max_steps", sound(folder)[0] + 1)
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["threads"] == 1  # its own: those of two processes may be too few, or too many


def test_processes_that_see_other_data_refuse_to_start(shared, tmp_path):
    other = write_csv(tmp_path / "other.csv", [("问", "答"), ("再问", "再答"), ("三问", "三答")])
    children = start_shared(tmp_path / "run", 2, *shared, of_the_last=["--dataset_name", other])
    with trial("几个进程看到的数据不同：不开始", 4):
        assert [finish(child) for child in children] == [4, 4]
        assert "各个训练进程看到的数据" in words(tmp_path / "run", 0)


def test_numbers_are_summed_on_the_cpu_and_gradients_on_the_card():
    """Without a name init_process_group makes the card's backend alone, and the first sum of numbers would fail; here there is no card to see it on."""
    from torch.distributed.distributed_c10d import Backend, BackendConfig

    name = re.search(r'init_process_group\("(.+?)" if torch.cuda.is_available', (ROOT / "train.py").read_text(encoding="utf-8"))[1]
    assert BackendConfig(Backend(name)).get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}


def test_each_process_takes_its_own_card(monkeypatch):
    """Two cards are played: the rules for picking one can be checked where there is none."""
    import torch

    from common import pick_device

    taken = []
    for name, value in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": taken.append, "is_bf16_supported": lambda **_: True}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert [pick_device(name) for name in ("auto", "cuda", "cuda:1")] == [("cuda:0", torch.bfloat16), ("cuda:0", torch.bfloat16), ("cuda:1", torch.bfloat16)]
    with pytest.raises(SystemExit, match="2"):
        pick_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [pick_device(name)[0] for name in ("auto", "cuda:0")] == ["cuda:1", "cuda:1"]  # a device kept in a checkpoint would put all on one card
    assert taken == [0, 0, 1, 1, 1]


def start_torchrun(log, *arguments):
    """torchrun with two processes, as typed; its words go to the file `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", *map(str, arguments)]
    with open(log, "w", encoding="utf-8") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)


def test_torchrun_told_to_stop_lets_its_processes_save(shared, tmp_path):
    folder = tmp_path / "run"
    torchrun = start_torchrun(tmp_path / "log", *shared, "--save_every", 50, "--val_ratio", 0, "--num_epochs", 20000, "--output_dir", folder)
    wait_for_checkpoint(folder, lambda: torchrun.poll() is None)
    for worker in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGTERM)  # as one who signals every process of a job
    torchrun.terminate()
    with trial("torchrun 和它的进程都收到 SIGTERM：存好再停", 1):
        assert torchrun.wait(60) != 0
        step = sound(folder)[0]
        assert f"已保存到 {folder}/checkpoint-{step}" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_process_of_torchrun_that_dies_ends_the_others_and_loses_nothing(shared, tmp_path):
    folder = tmp_path / "run"
    torchrun = start_torchrun(tmp_path / "log", *shared, "--save_every", 2, "--num_epochs", 2000, "--output_dir", folder)
    wait_for_checkpoint(folder, lambda: torchrun.poll() is None)
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
    """An environment where nvidia-smi lists two cards, and torch does when it is asked how many; the two processes find none and train on the CPU."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sitecustomize.py").write_text("import os, sys\nif any('device_count' in word for word in sys.orig_argv):\n    os.write(1, b'2\\n')\n    os._exit(0)\n")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: a card\\nGPU 1: a card\\n'\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path / "bin")}


def test_train_csv_starts_a_process_for_each_card(shared, two_cards, tmp_path):
    command = ["./train_csv.sh", *map(str, shared), "--output_dir", str(tmp_path / "run"), "--num_epochs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=two_cards, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 个进程" in done.stderr and (tmp_path / "run" / "final_model" / "adapter_model.safetensors").is_file()
    assert f'--lora_weights "{tmp_path / "run" / "final_model"}"' in done.stdout

    missing = subprocess.run([*command, "--dataset_name", "没有.csv"], cwd=ROOT, env=two_cards, capture_output=True, text=True, encoding="utf-8", check=False)
    assert missing.returncode == 3 and missing.stderr.count("错误：") == 1 and "Traceback" not in missing.stderr
