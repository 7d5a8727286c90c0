"""The speed path gives the naive path's numbers: each trick by itself, and all of them in a run."""

import math

import pytest
import torch

from conftest import ANSWERS, QUESTIONS, make_model, metrics, train


def close(ours, theirs, tolerance=1e-5):
    return (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("n", [1, 255, 256, 300, 777])
def test_the_chunked_loss_and_its_gradient_are_cross_entropys(n):
    from train import chunked_loss

    torch.manual_seed(n)
    hidden, weight, targets = torch.randn(n, 48, requires_grad=True), torch.randn(500, 48), torch.randint(0, 500, (n,))
    loss = chunked_loss(hidden, weight, targets) / 7
    loss.backward()
    ours, hidden.grad = hidden.grad, None
    naive = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum") / 7
    naive.backward()
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    assert close(ours, hidden.grad)
    with torch.no_grad():
        assert chunked_loss(hidden, weight, targets).item() == pytest.approx(7 * naive.item(), rel=1e-5)


def test_a_hidden_state_that_is_not_finite_gives_a_loss_that_is_not():
    from train import chunked_loss

    hidden = torch.randn(5, 8, requires_grad=True)
    poisoned = hidden * torch.tensor([1, 1, math.inf, 1, 1])[:, None]
    assert not math.isfinite(chunked_loss(poisoned, torch.randn(9, 8), torch.tensor([1, 2, 3, 4, 5])).item())


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_packed_rows_give_the_loss_and_gradients_of_the_rows_apart(architecture, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from common import encode, load_tokenizer
    from train import can_pack, loss_sum

    path = make_model(tmp_path, architecture)
    tokenizer = load_tokenizer(path)
    rows = [(*encode(tokenizer, [{"role": "user", "content": q}, {"role": "assistant", "content": a}]), "") for q, a in zip(QUESTIONS, ANSWERS)]
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    apart = sum(loss_sum(model, [row], packed=False)[0] for row in rows)
    apart.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert can_pack(model, rows)
    together = loss_sum(model, rows, packed=True)[0]
    together.backward()
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    assert gradients and all(close(p.grad, gradients[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("lengths", [(5, 128, 129, 300), (1025, 30)])
def test_long_rows_in_a_pack_have_the_attention_of_the_rows_apart(tiny, lengths):
    from transformers import AutoModelForCausalLM

    from train import can_pack, loss_sum

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    torch.manual_seed(0)
    rows = [(ids, ids, "") for ids in (torch.randint(5, 200, (n,)).tolist() for n in lengths)]
    model.requires_grad_(False)
    weights = [p.requires_grad_() for layer in model.model.layers for p in layer.self_attn.parameters()]
    apart = sum(loss_sum(model, [row], packed=False)[0] for row in rows)
    gradients = torch.autograd.grad(apart, weights)
    assert can_pack(model, rows)
    together = loss_sum(model, rows, packed=True)[0]
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    assert gradients and all(map(close, torch.autograd.grad(together, weights), gradients))


@pytest.fixture
def products():
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    yield setting
    setting.fp32_precision = before


@pytest.mark.parametrize("shape", [(1, 576, 1536), (200, 576, 192), (32, 1000, 576)])
def test_the_fast_products_are_fp32_whatever_makes_them(products, shape):
    from common import fast_products

    fast_products()
    rows, width, out = shape
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(out, width)
    y = torch.nn.functional.linear(x, weight)
    y.square().sum().backward()
    exact = x.detach().double() @ weight.double().T
    assert close(y.double(), exact, 1e-6)
    assert close(x.grad.double(), 2 * exact @ weight.double(), 1e-6)
    assert close((x @ weight.T[None]).double(), exact, 1e-6)  # as batches are multiplied


@pytest.mark.parametrize("name,same,expected", [("AMD EPYC 9B45", True, "bf16"), ("AMD EPYC 9B45", False, "ieee"), ("Intel(R) Xeon(R)", True, "ieee"), ("", True, "ieee")])
def test_products_are_left_to_the_usual_library_where_the_other_is_not_faster_or_not_exact(products, monkeypatch, name, same, expected):
    from common import fast_products, pick_device

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name} if name else {})
    monkeypatch.setattr(torch, "allclose", lambda *args, **kwargs: same)
    fast_products()
    assert products.fp32_precision == expected
    products.fp32_precision = "ieee"
    pick_device("cpu", fast=False)
    assert products.fp32_precision == "ieee"


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_fast_dropout_mask_has_dropouts_statistics(p):
    from train import fast_dropout

    n, k = 1_000_000, round(256 * p)
    dropout = torch.nn.Dropout(p)
    torch.manual_seed(3)
    x = torch.ones(n, requires_grad=True)
    y = fast_dropout(dropout, x)
    kept = (y != 0).double()
    rate = (256 - k) / 256
    deviation = math.sqrt(rate * (1 - rate) / n)
    assert abs(rate - (1 - p)) <= 1 / 512
    assert abs(kept.mean().item() - rate) < 5 * deviation
    assert y[kept.bool()].unique().tolist() == pytest.approx([1 / rate])
    # neighbours, and the bytes of one drawn integer, are independent of each other
    for lag in (1, 2, 7, 8, 64):
        both = (kept[:-lag] * kept[lag:]).mean().item()
        assert abs(both - rate**2) < 5 * math.sqrt(rate**2 * (1 - rate**2) / n) + 2 * deviation
    by_byte = kept[:n // 8 * 8].view(-1, 8).mean(0)
    assert (by_byte - rate).abs().max().item() < 6 * deviation * math.sqrt(8)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(3)
    assert torch.equal(fast_dropout(dropout, x), y)
    assert not torch.equal(fast_dropout(dropout, x), y)
    assert fast_dropout(dropout.eval(), x) is x


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_fast_lora_layer_gives_pefts_outputs_and_gradients(architecture, tmp_path):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear
    from transformers import AutoModelForCausalLM

    from train import fast_lora

    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(make_model(tmp_path, architecture)),
                           LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules="all-linear", init_lora_weights=False))
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        x = torch.randn(2, 5, layer.in_features, requires_grad=True)
        weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        usual, fast = layer(x), fast_lora(layer, x)
        direction = torch.randn_like(usual)
        assert close(fast, usual) and not close(fast, layer.base_layer(x))
        for theirs, ours in zip(*(torch.autograd.grad(y, weights, direction) for y in (usual, fast))):
            assert close(ours, theirs)
    assert len(layers) == {"llama": 14, "gpt2": 8}[architecture]


def test_a_run_without_dropout_is_the_naive_run(tiny, data, tmp_path):
    flags = ["--lora_dropout", 0, "--val_ratio", 0.25, "--num_epochs", 3, "--batch_size", 2, "--gradient_accumulation_steps", 2, "--learning_rate", 5e-3]
    runs = [metrics(train(tiny, data, tmp_path / flag, *flags, f"--{flag}")) for flag in ("fast", "no_fast")]
    for key in ("loss", "grad_norm", "val_loss"):
        fast, naive = ([m[key] for m in run if key in m] for run in runs)
        assert len(fast) > 3
        assert fast == pytest.approx(naive, rel=1e-4)


def test_a_run_with_dropout_learns_as_much_as_the_naive_one(tiny, data, tmp_path):
    flags = ["--lora_dropout", 0.1, "--val_ratio", 0, "--num_epochs", 40, "--batch_size", 8, "--gradient_accumulation_steps", 1, "--learning_rate", 5e-3,
             "--save_every", -1]
    fast, naive = (metrics(train(tiny, data, tmp_path / flag, *flags, f"--{flag}"))[-1]["loss"] for flag in ("fast", "no_fast"))
    assert fast < 1 and naive < 1
    assert abs(fast - naive) < 0.5 * naive + 0.05
