"""把模型剪小：去掉最不起作用的层，或把 FFN 变窄；在自己的数据上量重要性，打印前后的参数、文件、速度和困惑度。

  python prune_model.py --method ffn --ratio 0.25              # FFN 变窄四分之一，存成普通的小模型
  python prune_model.py --method layers --keep_layers 24 --output_dir models/small
  python train.py --model_name output/pruned-ffn               # 剪过的模型要再训练才好用；--teacher_model 原模型 = 让它也教

读：基础模型（默认同 train.py）和 --calibration_data 里的问答。写：--output_dir，普通模型目录，后面的脚本都能直接用。
--method magnitude 只把小的权重变成 0，文件不会变小，也不会变快，留着作对比。
"""

import itertools
import math
import re
import shutil
import timeit
from pathlib import Path

from common import encode, fail, find_model, load_base, load_rows, load_tokenizer, make_parser, number, parse_args, pick_device, run_script, say

# ---- 1. What a model does on the user's rows ----

def perplexity(model, rows: list[tuple]) -> float:
    """exp of the mean loss over the label tokens of `rows`, (input_ids, labels) each."""
    import torch
    counts = [sum(label != -100 for label in labels[1:]) for _, labels in rows]
    with torch.inference_mode():
        means = [model(**{name: torch.tensor([ids], device=model.device) for name, ids in zip(("input_ids", "labels"), row)}).loss.item() for row in rows]
    return math.exp(sum(mean * n for mean, n in zip(means, counts)) / sum(counts))

def tokens_per_second(model, rows: list[tuple]) -> float:
    """Tokens that the model reads in a second, from each row's best time of five: other programs only make it longer."""
    import torch
    def seconds(ids: list[int]) -> float:  # .item() waits for the device
        return min(timeit.repeat(lambda: model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].argmax().item(), number=1, repeat=5))
    with torch.inference_mode():
        return sum(len(ids) for ids, _ in rows) / sum(seconds(ids) for ids, _ in rows)

def run_with_hooks(model, rows: list[tuple], modules: list, hook) -> None:
    """Run `model` over `rows` with `hook(index, inputs, output)`, which returns nothing, called after each of `modules`."""
    import torch
    handles = [m.register_forward_hook(lambda _, inputs, kwargs, output, i=i: hook(i, inputs or tuple(kwargs.values()), output), with_kwargs=True)
               for i, m in enumerate(modules)]
    with torch.inference_mode():
        for ids, _ in rows:
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    for handle in handles:
        handle.remove()

# ---- 2. Structured: the model becomes smaller ----

def drop_layers(model, rows: list[tuple], n_keep: int) -> list[int]:
    """Take away the decoder layers whose output is most like their input (https://arxiv.org/abs/2403.03853); returns their numbers."""
    import torch
    layers = model.model.layers
    change = [0.0] * len(layers)
    def measure(i, inputs, output):
        after = output[0] if isinstance(output, tuple) else output
        change[i] += float((1 - torch.cosine_similarity(inputs[0].float(), after.float(), dim=-1)).sum())
    run_with_hooks(model, rows, layers, measure)
    dropped = sorted(sorted(range(len(layers)), key=change.__getitem__)[:len(layers) - n_keep])
    kept = [i for i in range(len(layers)) if i not in dropped]
    model.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
    for number_now, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number_now
    model.config.num_hidden_layers = n_keep
    for key in [key for key, value in vars(model.config).items() if isinstance(value, list) and len(value) == len(layers)]:  # layer_types and the like
        setattr(model.config, key, [getattr(model.config, key)[i] for i in kept])
    if getattr(model.config, "max_window_layers", None):
        model.config.max_window_layers = min(model.config.max_window_layers, n_keep)
    return dropped

def narrow_ffn(model, rows: list[tuple], n_keep: int) -> None:
    """Keep in each FFN the `n_keep` neurons that move its output most: activation on `rows` times the length of its column in down_proj."""
    import torch
    blocks = [layer.mlp for layer in model.model.layers]
    squares = [torch.zeros(block.down_proj.in_features, device=model.device) for block in blocks]
    def measure(i, inputs, output):
        squares[i] += inputs[0].float().pow(2).sum((0, 1))
    run_with_hooks(model, rows, [block.down_proj for block in blocks], measure)
    for block, square in zip(blocks, squares):
        importance = square.sqrt() * block.down_proj.weight.float().norm(dim=0)
        keep = importance.topk(n_keep).indices.sort().values
        for projection in (block.gate_proj, block.up_proj):
            projection.weight = torch.nn.Parameter(projection.weight[keep].clone())
            projection.bias = None if projection.bias is None else torch.nn.Parameter(projection.bias[keep].clone())
            projection.out_features = n_keep
        block.down_proj.weight = torch.nn.Parameter(block.down_proj.weight[:, keep].clone())
        block.down_proj.in_features = block.intermediate_size = n_keep
    model.config.intermediate_size = n_keep

# ---- 3. Unstructured: zeros in a model of the same size ----

def zero_small_weights(model, ratio: float, scope: str) -> float:
    """Set the smallest weights of the decoder layers to zero; returns the share of zeros in them. `scope`: the smallest of all layers
    (global), of each matrix (layer), or two of every four in a row (2:4, the pattern that sparse tensor cores know)."""
    import torch
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        if scope == "global":
            # in bins, as the numbers of all matrices together are too many to sort
            top = max(float(w.abs().max()) for w in weights)
            sizes = sum(torch.histc(w.abs().float().cpu(), 100_000, 0, top).double() for w in weights)
            threshold = top * int(torch.searchsorted(sizes.cumsum(0), ratio * float(sizes.sum()))) / len(sizes)
        for weight in weights:
            size = weight.abs().float()
            if scope == "2:4":
                groups = size.reshape(-1, 4)
                mask = torch.zeros_like(groups).scatter_(1, groups.topk(2).indices, 1.0).view_as(size)
            else:
                mask = size > (threshold if scope == "global" else size.flatten().kthvalue(max(1, int(size.numel() * ratio))).values)
            weight.mul_(mask)
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)

# ---- 4. For train.py: what a run costs, a model in pieces, and what a teacher adds ----

def estimate(args, lengths: list[int], rows_per_step: int, total_steps: int) -> str:
    """The rows' `lengths` (tokens, sorted), and about what train.py with `args` takes for them: from the weights' shapes and the time of a product."""
    import torch
    from safetensors import SafetensorError, safe_open
    device, dtype = pick_device(args.device, args.dtype)
    x, shapes = torch.rand(2048, 2048, device=device, dtype=dtype), {}
    for path in filter(None, (args.teacher_model, args.model_name)):
        try:
            files = [safe_open(file, "pt") for file in Path(find_model(path)).glob("*.safetensors")]
        except SafetensorError as error:
            fail(4, f"模型 {path} 的权重读不出来：{error}\n检查文件：python download_model.py --verify {path}")
        shapes[path] = [(name, file.get_slice(name).get_shape()) for file in files for name in file.keys()]  # noqa: SIM118 - not a dict
    sizes = [sum(math.prod(shape) for _, shape in own) for own in shapes.values()]
    widths = sum(sum(shape) for name, shape in shapes[args.model_name] if re.search(r"(layers|h)\.\d+\..*weight$", name))
    kept = args.batch_size * args.max_length * widths * (0.5 if args.gradient_checkpointing else 2.5)  # numbers that wait for the backward pass
    gigabytes = (sum(sizes) * {"none": x.element_size(), "8bit": 1, "4bit": 0.6}[args.quantization] + kept * x.element_size()) / 2**30 + 0.6
    width, epoch = -(-lengths[-1] // 10), math.ceil(len(lengths) / rows_per_step)  # tokens of a bar, steps of an epoch
    # four products for each weight of the student and two for one of the teacher, at half of the speed of one large product
    seconds = min(timeit.repeat(lambda: (x @ x).sum().item(), number=1, repeat=5)) * 2 * (sum(sizes) + sizes[-1]) * sum(lengths) * total_steps / epoch / (2 * 2048**3) / 0.5
    bars = [f"{k * width + 1:6}–{(k + 1) * width:<6}{(n := len([*group])):6} 行 {'█' * math.ceil(40 * n / len(lengths))}"
            for k, group in itertools.groupby(lengths, key=lambda n: (n - 1) // width)]
    costs = f"{device} 上大约要 {gigabytes:.1f} GB 内存、{seconds / 3600:.1f} 小时（都可能差一倍）。什么也没有写"
    return "\n".join(["每行的 token 数：", *bars, f"每步 {rows_per_step} 行，每轮 {epoch} 步，共 {total_steps} 步；{costs}"])

def shard(model, device: str, world: int) -> None:
    """Move `model` to `device`, a part of each layer's frozen weights to each process, put together while it runs; what is trained is whole in each of them."""
    import torch.distributed.fsdp
    decoder, mesh = model.get_decoder(), torch.distributed.init_device_mesh(device.partition(":")[0], (world,))
    trained, layers = {p for p in model.parameters() if p.requires_grad}, next(m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList))
    for module, ignored in (*((layer, trained) for layer in layers), (decoder, set(model.parameters()))):
        torch.distributed.fsdp.fully_shard(module, ignored_params=ignored, mesh=mesh)
    model.to(device)

def load_teacher(args, tokenizer, student, can_pack):
    """What gives `student`'s distance in a step to the teacher of train.py's `args`; exit 4 where their tokenizers differ, 2 where not `can_pack`(teacher)."""
    import torch
    if load_tokenizer(path := find_model(args.teacher_model), args.trust_remote_code).get_vocab() != tokenizer.get_vocab():
        fail(4, f"老师 {path} 的 tokenizer 和学生的不同，不能逐词比较。换一个同系列的老师")
    teacher = load_base(path, str(student.device), student.dtype, args.quantization, args.trust_remote_code).requires_grad_(False)
    if not can_pack(teacher):
        fail(2, "蒸馏要用快的算法（去掉 --no_fast），不能和 ptuning、prefix、prompt 一起用，老师和学生都要是能打包的模型（Llama、Qwen、Mistral 等）")
    taught_head = teacher.get_output_embeddings().weight
    def teach(hidden, head, keep, **inputs):
        with torch.no_grad():
            taught = teacher.base_model(**inputs).last_hidden_state[0, keep]
        return teacher_distance(hidden, head, taught, taught_head, args.kd_loss, args.kd_temperature, args.kd_top_k)
    return teach

def teacher_distance(hidden, head, taught, taught_head, kind: str = "forward_kl", temperature: float = 1.0, top_k: int = 0, chunk: int = 64):
    """Sum over tokens of the divergence between the words that `head` (vocabulary, width) makes of the student's `hidden` (tokens, width) and
    `taught_head` of the teacher's `taught`, times temperature² (https://arxiv.org/abs/1503.02531). `top_k`: on the teacher's likeliest words,
    and one for all the rest. What is as wide as the vocabulary is made for `chunk` tokens at a time, on the way back too."""
    import torch
    from torch.utils.checkpoint import checkpoint
    words = min(len(head), len(taught_head))  # two sizes of a family may be padded differently
    def part(hidden, taught):
        s, t = (((x @ weight.T)[:, :words].float() / temperature).log_softmax(1) for x, weight in ((hidden, head), (taught, taught_head)))
        if 0 < top_k < words:
            t, best = t.topk(top_k)
            s, t = (torch.cat((x, torch.log1p(-x.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))), 1) for x in (s.gather(1, best), t))
        middle = torch.logaddexp(s, t) - math.log(2)
        return {"forward_kl": lambda: t.exp() * (t - s), "reverse_kl": lambda: s.exp() * (s - t),
                "jsd": lambda: (t.exp() * (t - middle) + s.exp() * (s - middle)) / 2}[kind]().sum() * temperature**2
    return sum(checkpoint(part, *pair, use_reentrant=False) for pair in zip(hidden.split(chunk), taught.split(chunk)))

def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("模型和数据").add_argument
    add("--model_name", "--model_name_or_path", "--base_model", help="要剪的模型目录")
    add("--calibration_data", "--dataset_name", default="./datasets/legal_qa.csv", help="量重要性用的数据文件")
    add("--test_data", default="./datasets/legal_qa_test.csv", help="量困惑度用的数据文件")
    add("--calibration_rows", type=number(int, 1), default=32, help="量重要性用几行，量困惑度也用这么多")
    add("--max_length", type=number(int, 16), default=512, help="每行最多多少 token")
    add("--device", default="auto", help="auto、cuda、mps 或 cpu")
    add("--trust_remote_code", action="store_true", help="允许运行模型目录里的代码（危险）")
    add = parser.add_argument_group("剪法").add_argument
    add("--method", choices=("layers", "ffn", "magnitude"), default="ffn", help="layers 去掉层，ffn 变窄，magnitude 只置零")
    add("--ratio", type=number(float, 0, 0.95, above=True), default=0.25, help="去掉的比例：层、FFN 宽度或权重")
    add("--keep_layers", type=number(int, 1), help="留几层，即 --method layers；给了就不看 ratio")
    add("--scope", choices=("layer", "global", "2:4"), default="layer", help="magnitude：在每个矩阵里比、全部一起比、每四个留两个")
    add("--output_dir", help="写到这个新目录；默认 output/pruned-METHOD")
    args = parse_args(parser)
    path = find_model(args.model_name)
    args.method = "layers" if args.keep_layers else args.method
    output = Path(args.output_dir or f"output/pruned-{args.method}")
    if output.exists():
        fail(2, f"{output} 已经存在。换一个 --output_dir，或先移走它")

    import torch
    tokenizer = load_tokenizer(path, args.trust_remote_code)
    tables = [[row for row in load_rows(file)[0] if "messages" in row] for file in (args.calibration_data, args.test_data)]
    calibration, test = ([encode(tokenizer, row["messages"], args.max_length) for row in table[:args.calibration_rows]] for table in tables)
    if not calibration or not test:
        fail(3, "--calibration_data 和 --test_data 要有问答行（只有 text 列的文件不行）")
    stored = (re.findall(r'"(?:torch_)?dtype": *"(\w+)"', Path(path, "config.json").read_text(encoding="utf-8")) or ["float32"])[0]
    model = load_base(path, *pick_device(args.device, "float32" if stored == "float32" else "auto"), trust_remote_code=args.trust_remote_code)
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not layers or not all(hasattr(getattr(layer, "mlp", None), name) for layer in layers for name in ("gate_proj", "up_proj", "down_proj")):
        fail(4, f"{(model.config.architectures or ['这种模型'])[0]} 的层不是 Llama 那样的（gate_proj、up_proj、down_proj），还不会剪")
    n_layers, width = len(layers), model.config.intermediate_size
    n_keep = args.keep_layers or max(1, n_layers - round(n_layers * args.ratio))
    if args.method == "layers" and not 0 < n_keep < n_layers:
        fail(2, f"这个模型有 {n_layers} 层，留下 {n_keep} 层不行。用 --keep_layers 给一个更小的数，或加大 --ratio")
    def figures() -> tuple[float, float, float]:
        say("量速度和困惑度 ……")
        return sum(p.numel() for p in model.parameters()) / 1e6, tokens_per_second(model, test[:4]), perplexity(model, test)
    before = figures()
    say(f"在 {len(calibration)} 行 {args.calibration_data} 上量重要性 ……" if args.method != "magnitude" else "置零 ……")
    if args.method == "layers":
        note = f"去掉第 {'、'.join(str(i + 1) for i in drop_layers(model, calibration, n_keep))} 层，剩 {n_keep} 层"
    elif args.method == "ffn":
        n_keep = max(1, round(width * (1 - args.ratio) / 32)) * 32 if width >= 64 else max(1, round(width * (1 - args.ratio)))  # GGUF wants 32s
        narrow_ffn(model, calibration, n_keep)
        note = f"FFN 宽度 {width} → {n_keep}"
    else:
        note = f"{zero_small_weights(model, args.ratio, args.scope):.1%} 的权重成了 0；文件一个字节也没有省，不用专门的稀疏计算也不会变快"
    after = figures()

    # ---- An ordinary smaller model, that gets its name when it is whole ----
    staging = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.to(getattr(torch, stored)).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{note}\n\n| | 参数（百万） | 文件（MB） | 速度（token/s） | 困惑度（{len(test)} 行） |\n|---|---|---|---|---|")
    for name, folder, (parameters, speed, value) in (("剪之前", path, before), ("剪之后", output, after)):
        megabytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6
        print(f"| {name} | {parameters:.1f} | {megabytes:.1f} | {speed:.0f} | {value:.2f} |")
    print(f"\n{output}")

if __name__ == "__main__":
    run_script(main)
