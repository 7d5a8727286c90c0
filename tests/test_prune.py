"""What does nothing is what goes; the rest answers as before and is an ordinary, really smaller model."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers as t
from torch.nn.functional import cross_entropy

from common import encode, load_base, load_rows, load_tokenizer
from conftest import call, make_model, make_tokenizer, train


def model_with(folder, architecture="llama", layers=4, idle_layers=(), idle_neurons=()):
    """A tiny random model at `folder` of which some layers, and some FFN neurons, do nothing."""
    tokenizer = make_tokenizer("llama3" if architecture == "llama" else "qwen")
    small = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "eos_token_id": tokenizer.eos_token_id}
    config = {"llama": lambda: t.LlamaConfig(**small, mlp_bias=True), "qwen3": lambda: t.Qwen3Config(**small, head_dim=16)}[architecture]()
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj) if i in idle_layers else ():
                projection.weight.zero_()
            layer.mlp.up_proj.weight[list(idle_neurons)] = 0  # large weights elsewhere: only what flows shows that they are idle
            layer.mlp.down_proj.weight[:, list(idle_neurons)] *= 5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prune(base, data, folder, *args, code=0):
    call("prune_model.py", "--model_name", base, "--calibration_data", data, "--test_data", data, "--calibration_rows", 4, "--output_dir", folder, *args, code=code)
    return Path(folder)


def logits_of(folder, data):
    ids = encode(load_tokenizer(str(folder)), load_rows(data)[0][0]["messages"])[0]
    with torch.inference_mode():
        return load_base(str(folder), "cpu", torch.float32)(input_ids=torch.tensor([ids])).logits


def table(text):
    """The numbers of the two rows that are printed."""
    return [[float(x) for x in re.findall(r"[\d.]+", line)] for line in text.splitlines() if line.startswith("| 剪")]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_layers_that_do_nothing_go_and_the_answers_stay(data, tmp_path, architecture, capsys):
    base = model_with(tmp_path / "base", architecture, idle_layers=(1, 2))
    folder = prune(base, data, tmp_path / "small", "--method", "layers", "--keep_layers", 2)
    assert "第 2、3 层" in capsys.readouterr().out
    model = t.AutoModelForCausalLM.from_pretrained(folder)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert architecture == "llama" or len(model.config.layer_types) == 2
    assert torch.allclose(logits_of(folder, data), logits_of(base, data), atol=1e-4)
    ids = torch.tensor([[1, 2, 3]])  # generation uses the layers' numbers, of which the cache has one place each
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).shape[1] > 3


def test_every_list_with_an_entry_for_each_layer_loses_those_of_the_layers_that_go(data, tmp_path):
    """SmolLM3 has layers without rotary positions, in a list of its own: one entry too many and the saved model is another than the measured one."""
    folder, tokenizer = tmp_path / "base", make_tokenizer("qwen")
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(t.SmolLM3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        max_position_embeddings=512, no_rope_layers=[1, 1, 0, 1, 1, 0], eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None))
    with torch.no_grad():
        for i in (0, 1):
            for projection in (model.model.layers[i].self_attn.o_proj, model.model.layers[i].mlp.down_proj):
                projection.weight.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pruned = prune(folder, data, tmp_path / "small", "--keep_layers", 4)
    config = json.loads((pruned / "config.json").read_text(encoding="utf-8"))
    assert config["no_rope_layers"] == [0, 1, 1, 0] and len(config["layer_types"]) == 4
    assert torch.allclose(logits_of(pruned, data), logits_of(folder, data), atol=1e-4)


def test_the_neurons_that_do_nothing_go_though_their_weights_are_large(data, tmp_path):
    base = model_with(tmp_path / "base", idle_neurons=range(10, 74))
    folder = prune(base, data, tmp_path / "small", "--method", "ffn", "--ratio", "0.5")
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] == 64 and config["num_hidden_layers"] == 4
    assert torch.allclose(logits_of(folder, data), logits_of(base, data), atol=1e-4)


def test_the_printed_figures_are_those_of_the_models(data, tmp_path, capsys):
    base = model_with(tmp_path / "base")
    folder = prune(base, data, tmp_path / "small", "--method", "ffn")
    for (parameters, megabytes, _, value), path in zip(table(capsys.readouterr().out), (base, folder)):
        model, total, count = load_base(str(path), "cpu", torch.float32), 0.0, 0
        assert abs(parameters - sum(p.numel() for p in model.parameters()) / 1e6) <= 0.05
        assert abs(megabytes - (Path(path) / "model.safetensors").stat().st_size / 1e6) <= 0.05
        for row in load_rows(data)[0][:4]:
            ids, labels = encode(load_tokenizer(str(path)), row["messages"])
            learned = [n for n in range(1, len(ids)) if labels[n] != -100]
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0]
            total += sum(cross_entropy(logits[n - 1], torch.tensor(ids[n])).item() for n in learned)
            count += len(learned)
        assert abs(value - math.exp(total / count)) < 0.01 * value
    assert (folder / "model.safetensors").stat().st_size < (Path(base) / "model.safetensors").stat().st_size


@pytest.mark.parametrize("scope", ["layer", "global", "2:4"])
def test_magnitude_zeroes_the_smallest_weights_and_saves_no_byte(data, tmp_path, capsys, scope):
    base = model_with(tmp_path / "base")
    folder = prune(base, data, tmp_path / "same", "--method", "magnitude", "--ratio", "0.5", "--scope", scope)
    assert "一个字节也没有省" in capsys.readouterr().out
    assert abs((folder / "model.safetensors").stat().st_size - (Path(base) / "model.safetensors").stat().st_size) < 100
    pairs = [(a.weight, b.weight) for a, b in zip(*(t.AutoModelForCausalLM.from_pretrained(f).model.layers.modules() for f in (base, folder))) if isinstance(a, torch.nn.Linear)]
    assert abs(sum(int((b == 0).sum()) for _, b in pairs) / sum(b.numel() for _, b in pairs) - 0.5) < 0.001
    for before, after in pairs:
        assert torch.equal(after[after != 0], before[after != 0])
        if scope == "2:4":
            assert ((after.reshape(-1, 4) == 0).sum(1) == 2).all()
        else:
            assert before[after == 0].abs().max() <= before[after != 0].abs().min()
    largest_zero, smallest_left = max(a[b == 0].abs().max() for a, b in pairs), min(b[b != 0].abs().min() for _, b in pairs)
    assert (largest_zero <= smallest_left) == (scope == "global")


def test_a_pruned_model_can_be_trained_on(data, tmp_path):
    folder = prune(model_with(tmp_path / "base"), data, tmp_path / "small", "--method", "layers", "--ratio", "0.5")
    assert (train(folder, data, tmp_path / "run", "--max_steps", 1) / "final_model" / "adapter_model.safetensors").is_file()


def test_slips_and_other_kinds_of_model_are_refused_and_leave_nothing(data, tmp_path, capsys):
    base, other = model_with(tmp_path / "base"), make_model(tmp_path / "other", "gpt2")
    (tmp_path / "text.csv").write_text("text\n只有文字\n", encoding="utf-8")
    for words, code, model, file, args in (("4 层", 2, base, data, ["--method", "layers", "--keep_layers", 4]), ("4 层", 2, base, data, ["--method", "layers", "--ratio", "0.01"]),
                                           ("GPT2LMHeadModel", 4, other, data, []), ("问答", 3, base, tmp_path / "text.csv", [])):
        prune(model, file, tmp_path / "out", *args, code=code)
        assert words in capsys.readouterr().err
    prune(base, data, tmp_path / "other", code=2)
    assert "已经存在" in capsys.readouterr().err
    (Path(base) / "config.json").write_text('{"num_hidden', encoding="utf-8")
    prune(base, data, tmp_path / "out", code=4)
    assert "读不出来" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other", "text.csv"]


def test_an_interrupted_save_leaves_no_half_model(data, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    base = model_with(tmp_path / "base")
    monkeypatch.setattr(t.PreTrainedTokenizerBase, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        prune(base, data, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_number_of_layers_to_keep_is_the_method_layers(data, tmp_path):
    base = model_with(tmp_path / "base")
    pruned = prune(base, data, tmp_path / "out", "--keep_layers", 3)
    assert json.loads((pruned / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 3
