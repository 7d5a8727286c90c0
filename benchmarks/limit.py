"""这台机器的上限：训练 LoRA 躲不开的矩阵乘法，单独做要多久。

  python benchmarks/limit.py                                   # 演示模型，法律问答的标签比例
  python benchmarks/limit.py --model 模型目录 --lora_r 16 --json 上限.json

读：模型的 config.json（权重用随机数）。写：每秒最多多少 token，到标准输出；--json 再写一份文件。
只数这些：每个投影的前向 xWᵀ 和反向 dY·W，LoRA 的四个小乘法（xAᵀ、dY·B、dB、dA；其余的可以把 BA 折进 W 省掉），输出层在要学的 token 上的前向和反向。
用的是 train.py 用的乘法库（有的 CPU 上 oneDNN 比 PyTorch 平常用的 MKL 快一倍）；--usual 用平常的。
不数注意力、逐元素运算、优化器，也不数第一层 q/k/v 用不着的 dX。每层的权重各占各的内存，和真的训练一样读不进缓存。
训练脚本的 token/s 除以它，就是离上限还有多远；用 train_speed.py 可以在同一轮里量。
"""

import json
import statistics
import time
from pathlib import Path

from measure import ROOT  # puts the project on the path
from common import DEMO_MODEL, load_rows, load_tokenizer, encode, make_parser, number, parse_args, pick_device, run_script, say


def layer_shapes(model_path: str) -> tuple[list[list[tuple[str, int, int]]], tuple[int, int]]:
    """([(name, in, out) of the projections of each decoder layer], (in, out) of the head), from config.json; no weight is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    shapes = [[(name.rpartition(".")[2], m.in_features, m.out_features) for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)]
              for layer in layers]
    head = model.get_output_embeddings()
    return shapes, (head.in_features, head.out_features)


def measure_products(layers: list, head: tuple[int, int], tokens: int, label_share: float, r: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` passes over the products for `tokens` tokens at once."""
    import torch
    head_in, vocabulary = head
    weights = [[torch.randn(n_out, n_in) for _, n_in, n_out in layer] for layer in layers]
    head_weight = torch.randn(vocabulary, head_in)
    sizes = {n for layer in layers for _, n_in, n_out in layer for n in (n_in, n_out)} | {head_in}
    x = {n: torch.randn(tokens, n) for n in sizes}  # stands for the inputs and for the gradients of the outputs
    A, B = {n: torch.randn(r, n) for n in sizes}, {n: torch.randn(n, r) for n in sizes}
    labels, chunk = round(tokens * label_share), 256
    logits = torch.empty(chunk, vocabulary)

    def one_pass() -> None:
        for layer, shapes in zip(weights, layers):
            for weight, (_, n_in, _) in zip(layer, shapes):
                x[n_in] @ weight.T
        for start in range(0, labels, chunk):
            part = x[head_in][start:min(start + chunk, labels)]
            torch.mm(torch.mm(part, head_weight.T, out=logits[:len(part)]), head_weight)
        for number_, (layer, shapes) in enumerate(zip(weights, layers)):
            for weight, (name, n_in, n_out) in zip(layer, shapes):
                if number_ > 0 or not name.startswith(("q_", "k_", "v_", "qkv")):
                    x[n_out] @ weight
                xa, dyb = x[n_in] @ A[n_in].T, x[n_out] @ B[n_out]
                x[n_out].T @ xa
                dyb.T @ x[n_in]

    times = []
    with torch.inference_mode():
        one_pass()
        for _ in range(repeats):
            began = time.perf_counter()
            one_pass()
            times.append(time.perf_counter() - began)
    return times


def label_share(model: str, data: str) -> float:
    """Share of the tokens of the first 200 rows that are learned."""
    tokenizer = load_tokenizer(model)
    labels = [t for row in load_rows(data)[0][:200] for t in encode(tokenizer, row["messages"], 512)[1]]
    return sum(t != -100 for t in labels) / len(labels)


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("上限").add_argument
    add("--model", default=str(ROOT / DEMO_MODEL), help="模型目录，只用它的形状")
    add("--data", default=str(ROOT / "datasets/legal_qa.csv"), help="从它的前 200 行算标签比例")
    add("--label_share", type=number(float, 0, 1), help="要学的 token 占多少；默认从 --data 里算")
    add("--tokens", nargs="+", type=number(int, 1), default=[1024, 2048], help="一次算多少 token；取最快的")
    add("--lora_r", type=number(int, 1), default=32, help="LoRA 秩")
    add("--repeats", type=number(int, 1), default=3, help="每种大小量几遍，取中位")
    add("--threads", type=number(int, 1), default=2, help="线程数")
    add("--usual", action="store_true", help="用 PyTorch 平常的乘法库，不换成 train.py 用的")
    add("--json", metavar="FILE", help="结果再写到这个文件")
    args = parse_args(parser)
    import torch
    torch.set_num_threads(args.threads)
    pick_device("cpu", fast=not args.usual)
    layers, head = layer_shapes(args.model)
    share = label_share(args.model, args.data) if args.label_share is None else args.label_share
    rates = {}
    for tokens in args.tokens:
        times = measure_products(layers, head, tokens, share, args.lora_r, args.repeats)
        rates[tokens] = tokens / statistics.median(times)
        say(f"一次 {tokens} token：每秒 {rates[tokens]:.1f} token（{min(times):.2f}–{max(times):.2f} 秒）")
    square = torch.randn(2048, 2048)
    times = []
    for _ in range(15):
        began = time.perf_counter()
        square @ square
        times.append(time.perf_counter() - began)
    gflops = 2 * 2048**3 / 1e9 / min(times)
    base = sum(n_in * n_out for layer in layers for _, n_in, n_out in layer)
    print(f"上限：每秒 {max(rates.values()):.1f} token（{args.threads} 线程，标签占 {share:.3f}；投影 {base / 1e6:.1f} M 参数；2048³ 矩阵乘法最快 {gflops:.0f} GFLOP/s）")
    if args.json:
        result = {"tokens_per_second": max(rates.values()), "by_tokens": rates, "label_share": share, "best_gflops": gflops}
        Path(args.json).write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
