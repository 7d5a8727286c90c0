"""The measuring scripts: they run as the README says, and what they compare is the same work."""

import json

import pytest

from conftest import make_model, run, train


def measured(script, folder, *args):
    run(f"benchmarks/{script}", *args, "--threads", 1, "--out", folder / "figures.json", cwd=folder)
    return json.loads((folder / "figures.json").read_text(encoding="utf-8"))


def test_train_speed_gives_a_peer_the_rows_and_labels_of_train_and_both_the_same_loss(tiny, tmp_path):
    figures = measured("train_speed.py", tmp_path, "--model", tiny, "--rows", 16, "--rounds", 1, "--dropout", 0, "--max_length", 64, "--peers", "limit", "hf-padded")
    ours, limit, peer = figures["runs"]
    assert ours["losses"] == pytest.approx(peer["losses"], rel=1e-4)
    assert 0 < ours["tokens_per_second"] < limit["tokens_per_second"]
    assert 0 < ours["startup_seconds"] < ours["startup_seconds"] + ours["train_seconds"] < ours["total_seconds"]
    assert ours["train_seconds"] * ours["tokens_per_second"] == pytest.approx(figures["tokens"])


def test_generate_speed_compares_answers_that_are_the_same(data, tmp_path):
    model = make_model(tmp_path / "model", "qwen3")  # a template without a date, so that the plain way sees the same prompt
    adapter = train(model, data, tmp_path / "run", "--max_steps", 2, "--learning_rate", 1e-2) / "final_model"
    figures = measured("generate_speed.py", tmp_path, "--model", model, "--adapter", adapter, "--rounds", 1, "--questions", 2, "--chat_questions", 2, "--max_new_tokens", 8)
    found = figures["rounds"][0]
    assert len(found["compare_plain"]["answers"]) == 4 and len(found["chat_plain"]["answers"]) == 2
    assert found["compare_plain"]["answers"] == found["compare_ours"]["answers"]
    assert found["chat_plain"]["answers"] == found["chat_ours"]["answers"]
    assert all(side["seconds"] > 0 for side in found.values())


def test_gpu_check_without_a_card_skips_with_a_reason_and_exits_0(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA card")
    run("benchmarks/gpu_check.py", "--out", tmp_path / "figures.json", cwd=tmp_path)
    checks = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["checks"]
    assert len(checks) > 10 and all(check["status"] == "跳过" and "CUDA" in check["note"] for check in checks)
