"""Distillation: the loss is the formula, whatever the chunk; a student of its own teacher learns nothing; the parts are logged apart."""

import json
import math
import shutil

import pytest
import torch

from conftest import make_model, metrics, train


def by_hand(logits, teacher_logits, kind, temperature, top_k):
    """The formula on probabilities, token by token, without a logarithm of a sum."""
    total = 0.0
    for a, b in zip(logits.double(), teacher_logits.double()):
        p, q = torch.softmax(b / temperature, -1), torch.softmax(a / temperature, -1)  # teacher, student
        if top_k:
            best = p.topk(top_k).indices
            p, q = (torch.cat((x[best], 1 - x[best].sum()[None])) for x in (p, q))
        m = (p + q) / 2
        kl = {"forward_kl": (p, q, 1), "reverse_kl": (q, p, 1)}.get(kind)
        total += (kl[0] * (kl[0] / kl[1]).log()).sum() if kl else (p * (p / m).log()).sum() / 2 + (q * (q / m).log()).sum() / 2
    return total * temperature**2


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature,top_k", [(1.0, 0), (2.5, 0), (1.0, 7)])
def test_the_distance_and_its_gradient_are_the_formulas_whatever_the_chunk(kind, temperature, top_k):
    from prune_model import teacher_distance

    torch.manual_seed(0)
    hidden, head, taught, taught_head = torch.randn(11, 6, requires_grad=True), torch.randn(40, 6), torch.randn(11, 8), torch.randn(40, 8)
    wanted = by_hand(hidden @ head.T, taught @ taught_head.T, kind, temperature, top_k)
    slope = torch.autograd.grad(wanted, hidden)[0]
    for chunk in (1, 4, 64):
        found = teacher_distance(hidden, head, taught, taught_head, kind, temperature, top_k, chunk)
        assert math.isclose(found.item(), wanted.item(), rel_tol=1e-4)
        assert torch.allclose(torch.autograd.grad(found, hidden)[0], slope, rtol=1e-3, atol=1e-4)
    assert teacher_distance(taught, taught_head, taught, taught_head, kind, temperature, top_k).abs() < 1e-3


def test_nothing_as_wide_as_the_vocabulary_waits_for_the_backward_pass():
    from prune_model import teacher_distance

    sizes, hidden = [], torch.randn(100, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        distance = teacher_distance(hidden, torch.randn(1000, 4), torch.randn(100, 4), torch.randn(1000, 4), chunk=10)
    assert distance.requires_grad and max(sizes, default=0) <= 100 * 4


def test_a_padded_vocabulary_is_compared_on_the_common_words():
    from prune_model import teacher_distance

    hidden, head, taught_head = torch.randn(3, 4), torch.randn(10, 4), torch.randn(12, 4)
    found = teacher_distance(hidden, head, hidden, taught_head).item()
    assert math.isclose(found, by_hand(hidden @ head.T, (hidden @ taught_head.T)[:, :10], "forward_kl", 1.0, 0).item(), rel_tol=1e-4)


@pytest.mark.parametrize("flags", [[], ["--kd_loss", "jsd", "--kd_top_k", 5, "--kd_temperature", 2], ["--kd_loss", "reverse_kl", "--neftune_alpha", 0.01]])
def test_a_student_that_is_its_teacher_starts_at_no_distance_and_the_parts_are_logged_apart(tiny, data, tmp_path, flags):
    folder = train(tiny, data, tmp_path / "run", "--teacher_model", tiny, "--max_steps", 3, "--lora_dropout", 0, "--learning_rate", "1e-2", *flags)
    steps = [m for m in metrics(folder) if "teacher_loss" in m]
    assert len(steps) == 3 and abs(steps[0]["teacher_loss"]) < 1e-3 < steps[2]["teacher_loss"]
    assert all(math.isclose(m["loss"], (m["answer_loss"] + m["teacher_loss"]) / 2, abs_tol=1e-4) for m in steps)
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["args"]["teacher_model"] == tiny


def test_the_teacher_pulls_the_student_and_a_split_of_the_rows_changes_nothing(tiny, data, tmp_path):
    teacher = make_model(tmp_path / "teacher", seed=5)
    flags = ["--teacher_model", teacher, "--kd_ratio", 1, "--max_steps", 6, "--lora_dropout", 0, "--learning_rate", "2e-2"]
    wide, narrow = ([m["teacher_loss"] for m in metrics(train(tiny, data, tmp_path / name, *flags, *more)) if "teacher_loss" in m]
                    for name, more in (("a", ["--batch_size", 4, "--gradient_accumulation_steps", 2]), ("b", ["--batch_size", 1, "--gradient_accumulation_steps", 8])))
    assert wide[-1] < 0.9 * wide[0]
    assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(wide, narrow))


def test_distilling_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tiny, data, tmp_path):
    teacher = make_model(tmp_path / "teacher", seed=5)
    folder = train(tiny, data, tmp_path / "run", "--teacher_model", teacher, "--save_every", 1, "--save_total_limit", 9, "--learning_rate", "1e-2", "--num_epochs", 4)
    whole, adapter = metrics(folder), (folder / "final_model" / "adapter_model.safetensors").read_bytes()
    assert len([m for m in whole if "teacher_loss" in m]) == 4
    for name in ("final_model", "checkpoint-3", "checkpoint-4"):
        shutil.rmtree(folder / name)
    train(tiny, data, folder, "--resume_from_checkpoint", "auto")
    timeless = [[{key: value for key, value in m.items() if key != "tokens_per_second"} for m in run] for run in (whole, metrics(folder))]
    assert timeless[0] == timeless[1] and adapter == (folder / "final_model" / "adapter_model.safetensors").read_bytes()


def test_a_teacher_that_cannot_be_compared_is_refused(tiny, data, tmp_path, capsys):
    train(tiny, data, tmp_path / "run", "--teacher_model", make_model(tmp_path / "teacher", "qwen3"), code=4)
    assert "tokenizer" in capsys.readouterr().err
    train(tiny, data, tmp_path / "run2", "--teacher_model", tiny, "--no_fast", code=2)
    assert "--no_fast" in capsys.readouterr().err
