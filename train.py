"""用 LoRA 在自己的问答表上微调语言模型：读表 → 训练 → 保存。整个训练循环就在这个文件的 main() 里。

  python train.py                                              # 默认模型，datasets/ 里的法律问答
  python train.py --dataset_name 我的数据.csv --dry_run          # 先看数据，估计内存和时间
  python train.py --resume_from_checkpoint auto                # 接着上次中断的训练

读：CSV/TSV/JSON/JSONL（instruction、output 两列，可选 input）。写：output/llama-lora-日期_时间/ 下的
final_model/（LoRA 权重）、checkpoint-N/、logs/（TensorBoard）、run.json、metrics.jsonl、training_report.md。
"""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from common import (TEMPLATE_DATE, add_loading_flags, encode, fail, find_model, fingerprint, image_inputs, load_base, load_rows, load_tokenizer, make_parser,
                    number, parse_args, pick_device, pick_quantization, question_digest, run_script, say, sha256, text_ids, visible)

LORA, INITS = ("lora", "rslora", "dora", "pissa"), ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16")
MAY_CHANGE_ON_RESUME = {"num_epochs", "max_steps", "eval_every", "save_every", "save_total_limit", "logging_steps", "report_to", "early_stopping_patience", "device", "trust_remote_code", "gradient_checkpointing", "fsdp"}

def arguments(saved: dict | None = None) -> argparse.Namespace:
    """The command line; `saved` are the settings of a run to resume, taken where nothing is typed."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("模型、数据、设备").add_argument
    add("--model_name", "--model_name_or_path", "--base_model", help="基础模型目录，或本机缓存里的 ORG/NAME")
    add("--dataset_name", "--dataset_path", "--train_data", nargs="+", default=["./datasets/legal_qa.csv"], help="训练数据：文件或目录；文件:200 = 只取 200 行")
    add("--columns", help="哪列是什么，例如 instruction=问题,output=回答")
    add("--text_column", help="只有一列文本时它的列名，整段都学")
    add("--encoding", help="文件的编码；默认自己认")
    add("--skip_bad_rows", action="store_true", help="跳过坏的行（列出来），而不是停下")
    add("--val_data", help="验证数据文件；不给就从训练数据里分出 val_ratio")
    add("--val_ratio", type=number(float, 0, 0.5), default=0.05, help="分作验证的比例（0 = 不验证）")
    add("--max_samples", type=number(int, 1), help="只随机取这么多行")
    add("--max_length", "--max_seq_length", type=number(int, 16), default=512, help="每行最多多少 token，超过的先截问题")
    add("--system", help="系统提示词，每行都加上")
    add("--output_dir", help="输出目录；默认 output/llama-lora-日期_时间")
    add_loading_flags(add)
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="基础权重精度；CPU/MPS 只用 float32")
    add = parser.add_argument_group("训练和 LoRA").add_argument
    add("--num_epochs", "--num_train_epochs", "--epochs", type=number(float, 0, above=True), default=3, help="训练轮数")
    add("--max_steps", type=number(int, 0), default=0, help="最多多少优化步（0 = 由轮数决定）")
    add("--batch_size", "--per_device_train_batch_size", type=number(int, 1), default=2, help="每个微批的行数")
    add("--gradient_accumulation_steps", type=number(int, 1), default=8, help="累积几个微批更新一次")
    add("--learning_rate", type=number(float, 0, 1, above=True), default=1e-4, help="最大学习率")
    add("--lr_scheduler", choices=("cosine", "linear", "constant"), default="cosine", help="学习率曲线：cosine、linear、constant")
    add("--warmup_ratio", type=number(float, 0, 1), default=0.03, help="预热步数占总步数的比例")
    add("--weight_decay", type=number(float, 0, 1), default=0.0, help="权重衰减（0 = 不用）")
    add("--max_grad_norm", type=number(float, 0), default=1.0, help="梯度裁剪（0 = 不裁）")
    add("--neftune_alpha", type=number(float, 0), default=0.0, help="NEFTune 嵌入噪声（0 = 不用，常用 5）")
    add("--seed", type=number(int, 0, 2**31), default=42, help="随机种子")
    add("--peft_method", choices=(*LORA, "ia3", "ptuning", "prefix", "prompt"), default="lora", help="微调方法；各是什么，看 README")
    add("--lora_r", "--lora_rank", type=number(int, 1), default=32, help="LoRA 秩")
    add("--lora_alpha", type=number(float, 0, above=True), default=64, help="LoRA 缩放，通常是秩的 2 倍")
    add("--lora_dropout", type=number(float, 0, 0.99), default=0.1, help="LoRA dropout（0 = 不用，CPU 上更快）")
    add("--lora_plus_ratio", type=number(float, 1, 1000), default=1.0, help="LoRA+：B 的学习率是 A 的几倍（1 = 一样，常用 16）")
    add("--init_lora_weights", choices=INITS, help="LoRA 的初值；olora、pissa 取自基础权重，保存时换成普通的 LoRA，秩加倍")
    add("--target_modules", nargs="+", help="加 LoRA 的层名或一个正则；默认全部注意力和 FFN 投影")
    add("--layers_to_transform", nargs="+", type=number(int, 0), help="只加在这几层，从 0 数起；默认每层")
    add("--modules_to_save", nargs="+", help="另外整个训练、整个保存的层，例如 lm_head")
    add("--train_vision", action="store_true", help="视觉语言模型：看图的部分也加 LoRA，默认只加在语言部分")
    add("--num_virtual_tokens", type=number(int, 1), default=20, help="ptuning、prefix、prompt 学几个虚拟 token")
    add("--prompt_encoder_hidden", type=number(int, 1), default=512, help="ptuning、prefix 的编码器多宽")
    add("--optim", choices=("auto", "adamw_torch", "paged_adamw_8bit"), default="auto", help="优化器；auto 按设备选")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False, help="用时间换内存")
    add("--fast", action=argparse.BooleanOptionalAction, default=True, help="快的算法（--no_fast = 朴素的，逐行算）")
    add("--fsdp", action=argparse.BooleanOptionalAction, default=False, help="torchrun 时基础权重分放在各个进程里，用于一张卡装不下的模型")
    add("--teacher_model", help="蒸馏：让这个更大的模型也教，tokenizer 要相同")
    add("--kd_ratio", type=number(float, 0, 1), default=0.5, help="学老师占多少，其余学数据里的回答")
    add("--kd_temperature", type=number(float, 0, 100, above=True), default=1.0, help="蒸馏温度")
    add("--kd_loss", choices=("forward_kl", "reverse_kl", "jsd"), default="forward_kl", help="和老师的距离：forward_kl、reverse_kl、jsd")
    add("--kd_top_k", type=number(int, 0), default=0, help="只比老师最可能的 k 个词（0 = 全部）")
    add = parser.add_argument_group("验证、保存、记录").add_argument
    add("--eval_every", "--eval_steps", type=number(int, 0), default=0, help="每几步验证（0 = 每轮一次）")
    add("--save_every", "--save_steps", type=number(int, -1), default=50, help="每几步存 checkpoint（0 = 每轮，-1 = 只在结束时）")
    add("--save_total_limit", type=number(int, 2), default=2, help="保留最近几个 checkpoint，另加最好的")
    add("--logging_steps", type=number(int, 1), default=1, help="每几步记录一行")
    add("--early_stopping_patience", type=number(int, 0), default=0, help="连续几次验证没变好就停（0 = 不停）")
    add("--report_to", choices=("tensorboard", "wandb", "none"), default="tensorboard", help="曲线写到哪里")
    add("--dry_run", action="store_true", help="只看数据、估计内存和时间，不训练")
    add("--resume_from_checkpoint", metavar="auto|DIR", help="接着训练：auto 找最新的，或给 checkpoint 目录")
    parser.set_defaults(**{**(saved or {}), "trust_remote_code": False, "config": None})  # a checkpoint may come from anywhere, and has read its file
    return parse_args(parser)

# ---- The model's side of a step ----

def step_rows(n_rows: int, rows_per_step: int, seed: int, step: int) -> list[int]:
    """Indices of the rows of optimizer step `step`, a function of (seed, step): every row once per epoch, the last step takes what is left."""
    import torch
    epoch, position = divmod(step, math.ceil(n_rows / rows_per_step))
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed + epoch))[position * rows_per_step:(position + 1) * rows_per_step].tolist()

def deal(rows: list, rank: int, world: int, budget: int, packed: bool, together: bool) -> list[tuple[list, bool]]:
    """(micro-batch, 1) for each of process `rank`: of every world-th row, longest first, as few packs of at most `budget` tokens as fit, or each row alone.
    `together`: as many for each process, those that it lacks another's, with a 0 for their weight, because a model in pieces runs where all run it."""
    shares: list[list] = [[] for _ in range(world)]
    for packs, row in zip(itertools.cycle(shares), sorted(rows, key=lambda row: -len(row[0]))):
        pack = next((p for p in packs[-64:] if packed and sum(len(ids) for ids, _, _ in p) + len(row[0]) <= budget), [])
        packs += [] if pack else [pack]
        pack.append(row)
    return [(turn[rank] or next(filter(None, turn)), bool(turn[rank])) for turn in itertools.zip_longest(*shares) if together or turn[rank]]

def fast_dropout(dropout, x):
    """What the `dropout` module does to x, with a mask of bytes out of random int64s: PyTorch's own draws serially on a CPU, and takes longer
    than the product it precedes. An entry is kept with probability (256 - k) / 256, k = round(256 p), and scaled by the inverse: the mean is exact."""
    import torch
    k, n = round(256 * dropout.p), x.numel()
    if not dropout.training or k == 0:
        return x
    draws = torch.empty((n + 7) // 8, dtype=torch.int64).random_(-2**63, None).view(torch.uint8)[:n]
    return x * draws.ge_(k).view(x.shape).to(x.dtype).mul_(256 / (256 - k))  # in place: bytes compare and convert ten times faster than bools

def fast_lora(layer, x):
    """What PEFT's plain LoRA `layer` does to x, (…, in) → (…, out): scaled where it is r wide, added by the product that makes it, no pass of its own."""
    low = layer.lora_A["default"](layer.lora_dropout["default"](rows := x.flatten(0, -2))) * layer.scaling["default"]
    return layer.base_layer(rows).addmm_(low, layer.lora_B["default"].weight.T).view(*x.shape[:-1], -1)

def chunked_loss(hidden, weight, targets, chunk: int = 128):
    """Sum of cross-entropies of (n, width) `hidden` states under a (vocabulary, width) output head, n `targets`. The gradient is made in the forward
    pass, `chunk` rows at a time: for 1,000 labels of Llama-3.2 (128,256 tokens, fp32) whole logits are 0.5 GB, and their gradient as much again."""
    import torch
    total, room = 0.0, weight.new_empty(min(chunk, len(hidden)), len(weight))  # the same for every chunk: new memory costs a CPU a fifth of the time
    for rows, labels in zip(hidden.split(chunk), targets[:, None].split(chunk)):
        log_p = torch.log_softmax(logits := torch.mm(rows.detach().to(weight.dtype), weight.T, out=room[:len(rows)]).float(), 1, out=logits)
        total -= log_p.gather(1, labels).sum()
        if hidden.requires_grad:
            gradient = log_p.exp_().scatter_add_(1, labels, labels.float().fill_(-1)).to(weight.dtype) @ weight
            total += ((rows - rows.detach()) * gradient).sum()  # adds zero, with the gradient made above
    return total

def loss_sum(model, rows: list, packed: bool, pictured=(), neftune_alpha: float = 0.0, teach=None):
    """(sum of the label tokens' losses, sum of their distances to a teacher or 0) of `rows`, a list of (input_ids, labels, where): of one, or, if `packed`,
    of several in one line without padding, each with its own positions and attention, the output head only where a label is predicted: the same sum."""
    import torch
    lengths = [len(ids) for ids, _, _ in rows]
    input_ids = torch.tensor([[i for ids, _, _ in rows for i in ids]], device=model.device)
    targets = torch.tensor([t for _, labels, _ in rows for t in [*labels[1:], -100]], device=model.device)  # a row's last position predicts nothing
    keep, inputs = (targets != -100).nonzero().flatten(), {"input_ids": input_ids}
    if neftune_alpha and model.training:  # https://arxiv.org/abs/2310.05914: uniform noise of size alpha / sqrt(length * width)
        embeddings = model.get_input_embeddings()(input_ids)
        size = torch.tensor([neftune_alpha / math.sqrt(n * embeddings.shape[-1]) for n in lengths for _ in range(n)], device=model.device)
        inputs = {"inputs_embeds": embeddings + torch.empty_like(embeddings).uniform_(-1, 1) * size[:, None]}
    if not packed:
        inputs |= image_inputs(model, *pictured[rows[0][2]], input_ids) if rows[0][2] in pictured else {}  # {where: (tokenizer, messages)}
        logits = model(**inputs, use_cache=False).logits[0, -len(targets):][keep]  # virtual tokens stand before them
        return torch.nn.functional.cross_entropy(logits.float(), targets[keep], reduction="sum"), logits.new_zeros(())
    extra = {"position_ids": torch.tensor([[k for n in lengths for k in range(n)]], device=model.device), "row_lengths": lengths, "use_cache": False}
    hidden, head = model.get_decoder()(**inputs, **extra).last_hidden_state[0, keep], model.get_output_embeddings().weight
    return chunked_loss(hidden, head, targets[keep]), teach(hidden, head, keep, input_ids=input_ids, **extra) if teach else hidden.new_zeros(())

def can_pack(model, rows: list) -> bool:
    """Whether packed rows give this model the loss that they give apart (some architectures would mix them up); turns packing on if so."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, row_lengths=None, **kwargs):
        """Causal attention inside each row of a pack, (1, heads, tokens, head_dim) → (1, tokens, heads, head_dim): a call per row needs no mask."""
        attend, done, rows = ALL_ATTENTION_FUNCTIONS["sdpa"], [], zip(*(x.split(row_lengths, dim=2) for x in (query, key, value)))
        if query.device.type != "cpu" or dropout or max(row_lengths) > 1024:
            return torch.cat([attend(module, *row, None, dropout, scaling, is_causal=True)[0] for row in rows], dim=1), None
        for i, (q, k, v) in ((i, row) for row in rows for i in range(0, row[0].shape[2], 128)):  # a CPU takes longer for PyTorch's kernel, but in long rows
            q, k, v = q[0, :, i:i + 128], k[0, :, :i + 128], v[0, :, :i + 128]
            later = q.new_full((q.shape[1], k.shape[1]), -math.inf).triu_(i + 1).repeat(len(q) // len(k), 1)  # for each head that shares a key
            done.append((torch.baddbmm(later, q.reshape(len(k), -1, q.shape[2]), k.mT, alpha=scaling).softmax(-1) @ v).view(len(q), -1, v.shape[2]))
        return torch.cat(done, dim=1).transpose(0, 1)[None], None
    ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)
    probe = [(ids[:32 - 8 * n], ids[:32 - 8 * n], "") for n, (ids, _, _) in enumerate(rows[:2])]
    usual, config = model.config._attn_implementation, model.config.get_text_config()
    plain = type(model.get_output_embeddings()) is torch.nn.Linear and not getattr(config, "attn_logit_softcapping", None)
    seen_whole = max(len(ids) for ids, _, _ in rows) <= (getattr(config, "sliding_window", None) or math.inf)
    with torch.no_grad(), contextlib.suppress(TypeError, ValueError, RuntimeError, AttributeError):
        apart = sum(loss_sum(model, [row], packed=False)[0].item() for row in probe)
        model.config._attn_implementation = "packed"
        if plain and seen_whole and math.isclose(apart, loss_sum(model, probe, packed=True)[0].item(), rel_tol=1e-4 if model.dtype == torch.float32 else 1e-2):
            return True
    model.config._attn_implementation = usual
    return False

def sum_over_processes(*tensors) -> list[float]:
    """Sum each of `tensors`, in place, over the processes that torchrun has started, if it has; returns the numbers of the first one."""
    import torch
    for tensor in tensors if torch.distributed.is_available() and torch.distributed.is_initialized() else ():
        torch.distributed.all_reduce(tensor)
    return tensors[0].tolist()

# ---- Checkpoints ----

def describe(folder: Path) -> dict:
    """The manifest of a folder: size and sha256 of each file in it, and the hash of that list."""
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p.read_bytes())} for p in sorted(folder.iterdir()) if p.name != "manifest.json"}
    return {"format": 1, "files": files, "sha256": sha256(json.dumps(files))}

def synchronize(*paths: Path) -> None:
    """Force files' bytes and folders' names to the disk (Windows cannot open a folder)."""
    for path, handle in ((path, os.open(path, os.O_RDONLY)) for path in paths if os.name != "nt"):
        with contextlib.suppress(*([OSError] if path.is_dir() else [])):  # some network file systems cannot do it for folders
            os.fsync(handle)
        os.close(handle)

def discard(folder: Path) -> None:
    """Delete a folder; a crash midway leaves a `.tmp-` folder and never half of this one."""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder.rename(folder.with_name(f".tmp-old-{folder.name}")))

@contextlib.contextmanager
def staged(folder: Path):
    """Make `folder` in one stroke: what the caller writes into the folder given to it gets a manifest, is forced to the disk and renamed.
    A crash at any moment leaves a whole folder or none, and `.tmp-` folders that the next start removes."""
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:  # a full disk needs the room
        (staging := Path(temporary, folder.name)).mkdir()
        yield staging
        (staging / "manifest.json").write_text(json.dumps(describe(staging)), encoding="utf-8")
        synchronize(*staging.iterdir(), staging)
        discard(folder)
        os.rename(staging, folder)
        synchronize(folder.parent)

def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in a few words, or "" for one whose every byte is as it was written."""
    try:
        then, now = json.loads((folder / "manifest.json").read_text(encoding="utf-8")), describe(folder)
        names = [name for name in {"state.json": 0, "optimizer.safetensors": 0, "adapter_model.safetensors": 0, **now["files"], **then["files"]} if now["files"].get(name, 0) != then["files"].get(name, 1)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"读不出来（{error}）"
    return f"{names[0]} 缺失或已损坏" if names else "" if now == then else "manifest.json 被改动过，或是别的版本写的"

def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-N folders in `folder`, newest first."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal()), key=lambda p: -int(p.name[11:]))

def find_checkpoint(where: str, output_dir: str | None) -> Path | None:
    """The checkpoint to go on from: `auto` takes the newest sound one, naming those it skips, None if there are none; a named one is taken or refused."""
    runs = [Path(output_dir)] if output_dir else sorted(Path("output").glob("*/"), key=lambda p: -p.stat().st_mtime)
    found = next((c for c in map(checkpoints, runs) if c), []) if where == "auto" else [Path(where)]
    if where != "auto" and output_dir and Path(output_dir).resolve() != Path(where).resolve().parent:
        fail(2, f"{where} 只能在它自己的目录里接着训练：去掉 --output_dir {output_dir}")
    for candidate in found:
        if not (problem := damage(candidate)):
            return candidate
        say(f"{candidate} 不能用：{problem}")
    found and fail(4, "checkpoint 全部损坏，文件都没有动。从头训练：换一个 --output_dir" if where == "auto" else "自动找最新的完好的：--resume_from_checkpoint auto")
    say(f"{output_dir or 'output/'} 里没有 checkpoint，从头开始")

def main() -> None:
    args = arguments()
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))  # torchrun's; rank 0 talks and saves
    changed, start_step, resume = {}, 0, find_checkpoint(args.resume_from_checkpoint, args.output_dir) if args.resume_from_checkpoint else None
    if resume:
        start_step = (state := json.loads((resume / "state.json").read_text(encoding="utf-8")))["step"]
        args = arguments(saved=state["args"])
        args.output_dir, args.model_name, args.quantization = str(resume.parent), find_model(args.model_name), args.quantization.replace("auto", state["args"]["quantization"])
        changed = {name: f"  {name}：{old} → {getattr(args, name)}" for name, old in state["args"].items()
                   if name not in ("output_dir", "config", "resume_from_checkpoint", "dry_run") and getattr(args, name) != old}
        same_rows = state["args"]["batch_size"] * state["args"]["gradient_accumulation_steps"] == args.batch_size * args.gradient_accumulation_steps
        if forbidden := [line for name, line in changed.items() if name not in MAY_CHANGE_ON_RESUME | ({"batch_size", "gradient_accumulation_steps"} if same_rows else set())]:
            fail(2, "\n".join(["这些参数和 checkpoint 里的不同，接着训练就不是同一次训练了：", *forbidden, "去掉它们接着训练，或去掉 --resume_from_checkpoint 从头训练"]))
    model_path = args.model_name = find_model(args.model_name)

    # ---- 1. Data: a list of (input_ids, labels, where) ----
    tokenizer = load_tokenizer(model_path, args.trust_remote_code)
    reading = {"encoding": args.encoding, "columns": f"text={args.text_column}" if args.text_column else args.columns, "skip_bad_rows": args.skip_bad_rows}
    rows, dropped = load_rows(args.dataset_name, **reading, seed=args.seed)
    rows = random.Random(args.seed).sample(rows, min(len(rows), args.max_samples or len(rows)))
    n_val = 0 if args.val_data else min(math.ceil(len(rows) * args.val_ratio), len(rows) - 1)
    val_rows, val_dropped = load_rows(args.val_data, **reading) if args.val_data else (rows[:n_val], [])
    held = {str(row) for row in rows[:n_val]}  # a file that counts twice has copies of them among the rest
    rows, dropped = [row for row in rows[n_val:] if str(row) not in held] or rows[n_val:], dropped + val_dropped
    cut, bos = {}, [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]  # {where: (tokens, whether the answer lost its end)}
    def tokenize(row: dict) -> tuple[list[int], list[int], str]:
        if "text" in row:
            ids = text_ids(tokenizer, row["text"], first=True)
            full = bos * (ids[:1] != bos) + ids + [tokenizer.eos_token_id]
            ids = labels = full[:args.max_length]
        else:
            system = [{"role": "system", "content": args.system}] if args.system and row["messages"][0]["role"] != "system" else []
            full, labels = encode(tokenizer, system + row["messages"])
            ids, labels = (full, labels) if len(full) <= args.max_length else encode(tokenizer, system + row["messages"], args.max_length)
        if full[-1] is None or full[:2] == [tokenizer.bos_token_id] * 2:
            fail(4, f"{row['where']} 编码后{'没有结束符' if full[-1] is None else '有两个 BOS'}，模型的对话模板有问题：\n{visible(tokenizer.decode(full[:-1]))}")
        if len(full) > args.max_length:
            cut[row["where"]] = len(full), ids[-1] != full[-1]
        if all(t == -100 for t in labels[1:]):
            fail(3, f"{row['where']} 截断后没有剩下要学的内容：--max_length {args.max_length} 太小，这一行有 {len(full)} token")
        return ids, labels, row["where"]
    pictured = {row["where"]: (tokenizer, row["messages"]) for row in rows + val_rows if any("images" in m for m in row.get("messages", ()))}
    train_data, val_data = [tokenize(row) for row in rows], [tokenize(row) for row in val_rows]
    lengths = sorted(len(ids) for ids, _, _ in train_data)
    rows_per_step, budget = args.batch_size * args.gradient_accumulation_steps, args.batch_size * args.max_length
    steps_per_epoch = math.ceil(len(train_data) / rows_per_step)
    total_steps = min(math.ceil(steps_per_epoch * args.num_epochs), args.max_steps or sys.maxsize)
    say(*(f"  跳过 {line}\n" for line in dropped[:5]), f"训练 {len(train_data)} 行，验证 {len(val_data)} 行，跳过 {len(dropped)} 行；"
        f"每行 token：中位 {lengths[len(lengths) // 2]}，95% 不超过 {lengths[int(len(lengths) * 0.95)]}，最长 {lengths[-1]}，共 {sum(lengths):,}", sep="")
    if cut:
        say(f"有 {len(cut)} 行超过 max_length {args.max_length}，其中 {sum(lost for _, lost in cut.values())} 行的回答被截断（这些行不学结束符）："
            f"{'、'.join([*cut][:5])}{' 等' if len(cut) > 5 else ''}。要全部放下用 --max_length {max(cut.values())[0]}")
    sizes = [("打乱后的第一行", lambda row: 0), ("最长的一行", lambda row: len(row[0])), ("截得最多的一行", lambda row: cut.get(row[2], (0,))[0])]
    learned, rest, mark = ("\x1b[32m{}\x1b[0m", "\x1b[2m{}\x1b[0m", "绿色") if sys.stderr.isatty() else ("【{}】", "{}", "【】里")
    for title, (ids, labels, where) in ((title, max(train_data, key=size)) for title, size in sizes[:3 if args.dry_run else 1]):
        spans = itertools.groupby(zip(ids, labels), key=lambda pair: learned if pair[1] != -100 else rest)  # as the model sees it
        say(f"{title}，{where}（{mark}是要学的）：\n" + "".join(look.format(visible(tokenizer.decode([i for i, _ in span]))) for look, span in spans))
    if args.dry_run:
        return say(importlib.import_module("prune_model").estimate(args, lengths, rows_per_step, total_steps))

    # ---- 2. Folder, device, model, LoRA ----
    folder = Path(args.output_dir or time.strftime("output/llama-lora-%Y%m%d_%H%M%S"))
    if rank == 0:
        if not resume and ((folder / "final_model").exists() or checkpoints(folder)):
            fail(2, f"{folder} 里已经有训练结果。接着训练加 --resume_from_checkpoint auto；重新训练换一个 --output_dir")
        try:  # torch brings filelock, which makes the folder
            (lock := importlib.import_module("filelock").FileLock(folder / ".lock")).acquire(timeout=0)  # noqa: F841 - held until the process ends, however it ends
        except TimeoutError:
            fail(2, f"另一个训练正在用 {folder}。等它结束，或换一个 --output_dir")
        [shutil.rmtree(stale) for stale in folder.glob(".tmp-*")]
        args.report_to == "wandb" and importlib.import_module("wandb").init(project="lora", name=folder.name, config=vars(args), dir=folder, sync_tensorboard=True)
    if args.quantization == "none" and args.optim != "paged_adamw_8bit" and not args.teacher_model and "quantization_config" not in Path(model_path, "config.json").read_text("utf-8"):
        sys.modules.setdefault("bitsandbytes", None)  # PEFT imports it wherever it is installed: 1.4 s for nothing
    import peft
    import torch
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm
    world > 1 and torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")  # numbers are summed on the CPU
    device, dtype = pick_device(args.device, args.dtype, args.fast)
    args.quantization = pick_quantization(args.quantization, model_path, device)
    on_cuda = device.startswith("cuda")
    optim = args.optim if args.optim != "auto" else "paged_adamw_8bit" if on_cuda and args.quantization != "none" else "adamw_torch"
    virtual = args.num_virtual_tokens if args.peft_method in ("ptuning", "prefix", "prompt") else 0  # trained, in front of the row
    mutates = (args.init_lora_weights or args.peft_method)[:5] in ("pissa", "olora")  # they take what they begin with out of the base
    for wrong, why in ((start_step > total_steps, f"checkpoint 已经做了 {start_step} 步，这次一共只要 {total_steps} 步：加大 --num_epochs 或 --max_steps"),
                       (optim == "paged_adamw_8bit" and not on_cuda, f"--optim paged_adamw_8bit 只能在 CUDA 上用，这里是 {device}。改用 --optim adamw_torch"),
                       (args.peft_method not in LORA and (args.lora_plus_ratio > 1 or args.init_lora_weights), f"--lora_plus_ratio、--init_lora_weights 不能和 {args.peft_method} 一起用"),
                       (virtual and (args.modules_to_save or args.layers_to_transform), f"--modules_to_save、--layers_to_transform 不能和 {args.peft_method} 一起用"),
                       (mutates and args.quantization != "none", f"--quantization 不能和 {args.init_lora_weights or args.peft_method} 一起用"),
                       (args.fsdp and (world == 1 or args.quantization != "none"), "--fsdp 要用 torchrun 启动（--nproc_per_node 至少 2），不能和 --quantization 一起用"),
                       (pictured and (virtual or args.neftune_alpha), "图片不能和 --peft_method ptuning、prefix、prompt 或 --neftune_alpha 一起用")):
        if wrong:
            fail(2, why)
    torch.manual_seed(args.seed)
    model = load_base(model_path, "cpu" if args.fsdp else device, dtype, args.quantization, args.trust_remote_code)
    if (longest := max(len(ids) for ids, _, _ in train_data + val_data) + virtual) > (window := getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest):
        fail(2, f"最长的一行有 {longest} token，这个模型最多 {window}：用 --max_length {window - virtual}")
    if max(max(ids) for ids, _, _ in train_data + val_data) >= model.get_input_embeddings().num_embeddings:
        fail(4, f"tokenizer 的编号超出了模型的词表（{model.get_input_embeddings().num_embeddings}）：两者不是一套，请重新下载模型")
    if missing := [wanted for wanted in args.modules_to_save or () if not any(name.endswith(wanted) for name, _ in model.named_modules())]:
        fail(2, f"--modules_to_save：模型里没有 {missing[0]}")
    args.gradient_checkpointing and model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    part = next(name for name, m in model.named_modules() if m is model.get_decoder()) + r"\." if hasattr(model.config, "vision_config") and not args.train_vision else ""
    depth = rf"\D*(?<=\.)({'|'.join(map(str, args.layers_to_transform))})\." if args.layers_to_transform else ""
    kind = {"ia3": peft.IA3Config, "ptuning": peft.PromptEncoderConfig, "prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}.get(args.peft_method, peft.LoraConfig)
    options = {**vars(args), "r": args.lora_r, "use_rslora": args.peft_method == "rslora", "use_dora": args.peft_method == "dora", "encoder_hidden_size": args.prompt_encoder_hidden,
               "prefix_projection": True, "feedforward_modules": [], "target_modules": targets[0] if len(targets := args.target_modules or ["all-linear"]) == 1 and set(targets[0]) & set(".*|\\^$(-") else targets,
               "init_lora_weights": args.init_lora_weights or ("pissa" if args.peft_method == "pissa" else None), "layers_to_transform": None, "exclude_modules": rf"(?!{part}{depth}).*" if part or depth else None}  # PEFT's own wants names
    try:  # what is trained is fp32 whatever the base is; each method takes the options that it has
        model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **{name: value for name, value in options.items() if value is not None and hasattr(kind, name)})).eval()  # no dropout yet
    except (ValueError, TypeError, importlib.import_module("re").error) as error:
        fail(2, f"--peft_method {args.peft_method}、--target_modules 或 --layers_to_transform 用不到这个模型上：{str(error).splitlines()[0][:160]}")
    initial = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if mutates and ("lora_A" in name or "lora_B" in name)}  # which the base has lost
    vars(model.peft_config["default"]).update({"r": 2 * args.lora_r, "lora_alpha": args.lora_alpha * (2 ** 0.5 if args.peft_method == "rslora" else 2), "init_lora_weights": True} if mutates else {})
    args.fsdp and importlib.import_module("prune_model").shard(model, device, world)  # what is trained is whole in each process, and saved as ever
    kd_ratio, packed = args.kd_ratio if args.teacher_model else 0.0, args.fast and not virtual and not pictured and can_pack(model, train_data + val_data)
    teach = importlib.import_module("prune_model").load_teacher(args, tokenizer, model, lambda teacher: packed and can_pack(teacher, train_data)) if args.teacher_model else None
    for module in model.modules() if packed and device == "cpu" else ():
        if forward := {torch.nn.Dropout: fast_dropout, peft.tuners.lora.Linear: fast_lora if args.peft_method != "dora" else None}.get(type(module)):
            module.forward = forward.__get__(module)
    rates: dict = {}  # what learns how many times as fast (LoRA+: https://arxiv.org/abs/2402.12354)
    for name, p in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
        p.data = p.data.float()  # modules_to_save are copies of the base's
        rates.setdefault(args.lora_plus_ratio if "lora_B" in name else 1.0, []).append(p)
    parameters = [p for group in rates.values() for p in group]
    trainable, total = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    adamw = importlib.import_module("bitsandbytes.optim").PagedAdamW8bit if optim == "paged_adamw_8bit" else torch.optim.AdamW
    optimizer = adamw([{"params": group, "rate": rate} for rate, group in rates.items()], lr=args.learning_rate, weight_decay=args.weight_decay)
    amp = torch.autocast("cuda", dtype, enabled=dtype != torch.float32) if on_cuda else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(enabled=on_cuda and dtype == torch.float16)

    # ---- 3. The run's record, and a checkpoint to go on from ----
    run = {"args": vars(args), "started": time.strftime("%Y-%m-%d %H:%M:%S"), "device": device, "processes": world, "dtype": str(dtype).removeprefix("torch."),
           "versions": {"python": sys.version.split()[0], **{name: sys.modules[name].__version__ for name in ("torch", "transformers", "peft")}},
           "threads": state["threads"] if resume and state.get("processes", 1) == world else torch.get_num_threads(),
           "data_sha256": sha256(json.dumps([train_data, val_data, *(question_digest(m) for _, messages in pictured.values() for m in messages)])),
           "base_fingerprint": fingerprint(model_path), "template_sha256": sha256(tokenizer.chat_template), "template_date": TEMPLATE_DATE.isoformat(),
           "row_sha256": [question_digest(row["messages"][-2]) for row in rows if "messages" in row]}
    history, losses, best, best_step, bad_evals = [], [], math.inf, 0, 0
    here = int(sha256(f"{start_step} {total_steps} {rows_per_step} {args.seed} {args.eval_every} {args.early_stopping_patience} {run['data_sha256']} {run['base_fingerprint']}")[:8], 16)
    if sum_over_processes(torch.tensor([here]))[0] != world * here:
        fail(4, "各个训练进程看到的数据、模型、参数或 checkpoint 不同。几台机器要有同样的文件，checkpoint 放在共用的目录里")
    if resume:
        for key, name in (("data_sha256", "训练数据"), ("base_fingerprint", "基础模型的权重"), ("template_sha256", "对话模板")):
            if state[key] != run[key]:
                fail(4, f"{name}和 checkpoint 里的不同（{state[key][:12]} → {run[key][:12]}）。换回原来的，或去掉 --resume_from_checkpoint 从头训练")
        torch.set_num_threads(run["threads"])  # sums are added up in another order with another number of threads
        pairs = [("设备", state["device"], device), ("进程数", state.get("processes", 1), world), ("batch_size", state["args"]["batch_size"], args.batch_size), *((name, version, run["versions"][name]) for name, version in state["versions"].items())]
        if different := [f"{what} {then} → {now}" for what, then, now in pairs if then != now]:
            say(f"注意：{'，'.join(different)}，结果不再与不中断时逐位一致")
        best, best_step, bad_evals, losses = math.inf if state["best"] is None else state["best"], state["best_step"], state["bad_evals"], state["losses"]
        entries = {**load_file(resume / "optimizer.safetensors"), **state["optimizer"]}
        model.load_state_dict(entries, strict=False) if virtual or initial else peft.set_peft_model_state_dict(model, load_file(resume / "adapter_model.safetensors"))
        moments = {i: {key.partition(".")[2]: v for key, v in entries.items() if key.startswith(f"{i}.")} for i in range(len(parameters))}
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())  # another device may need no scaler, or a new one
        with contextlib.suppress(OSError, ValueError), open(folder / "metrics.jsonl", encoding="utf-8") as file:
            history += (metric for metric in map(json.loads, file) if metric["step"] <= start_step)  # a crash may leave half a last line
        say(f"从 {resume} 接着训练：已做 {start_step} 步，共 {total_steps} 步", *changed.values(), sep="\n")
        if (start_step >= total_steps or 0 < args.early_stopping_patience <= bad_evals) and (folder / "final_model").is_dir():
            return say(f"这次训练已完成：{folder / 'final_model'}。想再训几轮就加大 --{'num_epochs' if start_step >= total_steps else 'early_stopping_patience（0 = 不停）'}")
    for name, text in () if rank else (("run.json", json.dumps(run, ensure_ascii=False, indent=1)), ("metrics.jsonl", "".join(json.dumps(m) + "\n" for m in history))):
        (folder / f".new-{name}").write_text(text, encoding="utf-8")
        os.replace(folder / f".new-{name}", folder / name)  # a crash or a full disk leaves the old one
    board = rank == 0 and args.report_to != "none" and importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "logs"), purge_step=start_step + 1)
    def record(step: int, metrics: dict, words: str) -> None:
        history.append({"step": step, **metrics})
        with open(os.devnull if rank else folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(history[-1]) + "\n")
        for name, value in metrics.items() if board else ():
            board.add_scalar(name, value, step)
        with contextlib.suppress(OSError), tqdm.external_write_mode():  # Ctrl-C has ended `| tee` too, and the step must still be saved
            say(words)
    say(f"设备 {device}{f' 等，{world} 个进程分担每一步的行' if world > 1 else ''}（{'--device 指定' if args.device != 'auto' else '没有找到显卡' if device == 'cpu' else '自动找到'}），"
        f"基础权重 {run['dtype']}{'' if args.quantization == 'none' else '，量化 ' + args.quantization}，LoRA float32，优化器 {optim}，{'按行打包，不填充' if packed else '逐行算' if not args.fast else '逐行算（这种模型或方法不能打包）'}\n"
        f"可训练参数 {trainable:,} / {total:,}（{100 * trainable / total:.2f}%），{f'{virtual} 个虚拟 token' if virtual else '加在 ' + '、'.join(sorted({name.rpartition('.')[2] for name in model.targeted_module_names}))}\n"
        f"每步 {rows_per_step} 行，每轮 {steps_per_epoch} 步，共 {total_steps} 步；输出到 {folder}")

    # ---- 4. The loop ----
    signals, warmup = [], math.ceil(total_steps * args.warmup_ratio)
    def on_signal(number: int, frame) -> None:
        signals.append(number)
        if len(signals) > 1 and world == 1:  # torchrun passes one on, whoever else sends it too, and kills in the end
            os._exit(128 + number)
        with contextlib.suppress(OSError):  # print() may not be called while the interrupted code is printing
            os.write(2, b"" if rank else f"\n收到停止信号：做完这一步就保存并退出{'（再按一次立即退出）' * (world == 1)}\n".encode())
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    began, tokens, seconds, all_tokens, skipped = time.perf_counter(), 0, 0.0, 0, 0

    for step in (bar := tqdm(range(start_step, total_steps + 1), total=total_steps, initial=start_step)):
        # once in a while: evaluate, as the mean over all label tokens; what a checkpoint holds already is not done again
        if val_data and (step > start_step or not resume) and (step % (args.eval_every or steps_per_epoch) == 0 or step == total_steps):
            model.eval()
            with torch.no_grad(), amp:
                total_loss = sum(weight * loss_sum(model, batch, packed, pictured)[0].item() for batch, weight in deal(val_data, rank, world, budget, packed, args.fsdp))
            val_loss = sum_over_processes(torch.tensor([total_loss], dtype=torch.float64))[0] / sum(t != -100 for _, labels, _ in val_data for t in labels[1:])
            is_best = val_loss < best or best_step == 0 < step and math.isfinite(val_loss)  # of the trained ones, even if none beats the base
            best, best_step, bad_evals = (val_loss, step, 0) if is_best else (best, best_step, bad_evals + 1)
            note = "微调前" if step == 0 else "目前最好" if is_best else f"最好的是第 {best_step} 步的 {best:.4f}"
            record(step, {"val_loss": round(val_loss, 6), "epoch": round(step / steps_per_epoch, 4)},
                   f"验证：第 {step} 步，损失 {val_loss:.4f}，困惑度 {math.exp(min(val_loss, 50)):.2f}（{note}）")
        last = (stopped := sum_over_processes(torch.tensor([len(signals)]))[0] > 0) or step == total_steps or 0 < args.early_stopping_patience <= bad_evals

        # once in a while: save, then delete what is neither recent nor the best
        due = step > start_step and (best_step == step or last or (args.save_every >= 0 and step % (args.save_every or steps_per_epoch) == 0))
        if rank == 0 and (due or step == start_step) and (free := shutil.disk_usage(folder).free) < (need := (21 if initial else 13) * trainable):  # the adapter and two moments, fp32
            fail(6, f"磁盘满了：存一个 checkpoint 要 {need / 1e6:.1f} MB，{folder} 那里还剩 {free / 1e6:.1f} MB。已有的 checkpoint 完好；腾出空间后加 --resume_from_checkpoint auto 接着训练")
        if due and rank == 0:
            values = {f"{i}.{key}": v for i, entry in torch.optim.Optimizer.state_dict(optimizer)["state"].items() for key, v in entry.items()}  # unwrapped
            values |= {name: p.detach() for name, p in model.named_parameters() if (virtual or initial) and p.requires_grad}  # the adapter's file has what they compute
            state = {**run, "step": step, "losses": losses, "best": best if best < math.inf else None, "best_step": best_step, "bad_evals": bad_evals,
                     "scaler": scaler.state_dict(), "optimizer": {key: v for key, v in values.items() if not torch.is_tensor(v)}}
            if bad := next((name for name, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()), None):
                fail(5, f"权重 {bad} 里出现了 NaN 或无穷大，没有保存。之前的 checkpoint 完好；调低 --learning_rate 重新训练")
            with staged(folder / f"checkpoint-{step}") as staging:
                weights = model.state_dict()  # BA on a base without B0 A0 is [B, -B0] [A; A0] on the whole one: an ordinary LoRA of twice the rank
                weights |= {name: torch.cat([weights[name].cpu(), -v if "lora_B" in name else v], int("lora_B" in name)) for name, v in initial.items()}
                model.save_pretrained(staging, save_embedding_layers=False, state_dict=weights)
                tokenizer.save_pretrained(staging)
                (staging / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
                save_file({key: v.clone() if "qmap" in key else v.contiguous() for key, v in values.items() if torch.is_tensor(v)}, staging / "optimizer.safetensors")
                (staging / "state.json").write_text(json.dumps(state, ensure_ascii=False, indent=1), encoding="utf-8")
            for old in [p for p in checkpoints(folder) if int(p.name[11:]) <= step and p.name != f"checkpoint-{best_step}" and not damage(p)][args.save_total_limit:]:
                discard(old)
        if last:
            break

        # micro-steps: the rows of a step, and every random number drawn in it, follow from (seed, step)
        bar.set_description(f"Epoch {step // steps_per_epoch + 1}/{math.ceil(args.num_epochs)}")
        batch_rows = [train_data[i] for i in step_rows(len(train_data), rows_per_step, args.seed, step)]
        label_tokens, sums = sum(t != -100 for _, labels, _ in batch_rows for t in labels[1:]), [0.0, 0.0, 0.0]  # of the loss, and of its two parts
        since = time.perf_counter()
        model.training or model.train()  # which walks through every module
        torch.manual_seed(args.seed * 1_000_003 + step + (rank << 22))  # a CPU takes the lower 32 bits
        for p in parameters:
            p.grad = scaler.scale(torch.zeros_like(p))  # a process may get none of a short step's rows
        for batch, weight in deal(batch_rows, rank, world, budget, packed, args.fsdp):
            with amp:
                # sums, divided by the label tokens of the whole step: any split of the rows gives the same gradient
                parts = loss_sum(model, batch, packed, pictured, args.neftune_alpha, teach)
                loss = weight * ((1 - kd_ratio) * parts[0] + kd_ratio * parts[1]) / label_tokens
            scaler.scale(loss).backward()
            sums = [total + x.item() for total, x in zip(sums, (loss, *(weight * part / label_tokens for part in parts)))]
        step_loss, *step_parts = sum_over_processes(torch.tensor(sums, dtype=torch.float64), *(p.grad for p in parameters))

        # clip; what is not a number never reaches the weights
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf).item()
        skipped = skipped + 1 if scaler.is_enabled() and not math.isfinite(grad_norm) else 0  # GradScaler drops such an update and halves its scale
        if not math.isfinite(step_loss) or skipped > 8 or not (math.isfinite(grad_norm) or skipped):
            record(step + 1, broken := {"loss": step_loss, "grad_norm": grad_norm}, str(broken))
            fail(5, f"第 {step + 1} 步的{'梯度' if math.isfinite(step_loss) else '损失'}不是有限的数，在更新权重之前停下了。这一步的数据：\n  {'、'.join(where for _, _, where in batch_rows)}\n"
                    f"检查这些行，或调低 --learning_rate 重新训练；之前的 checkpoint 完好，在 {folder}")

        # optimizer
        left = (total_steps - step) / max(1, total_steps - warmup)
        scale = (step + 1) / (warmup + 1) if step < warmup else {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[args.lr_scheduler]
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * scale * group["rate"]
        scaler.step(optimizer)
        scaler.update()

        # log, and warn of a step unlike those before it
        recent = torch.tensor([m["loss"] for m in history[-160:] if "loss" in m][-128:])
        if len(recent) >= 32 and (z := ((step_loss - recent.mean()) / (recent.std() * args.logging_steps ** 0.5 + 1e-6)).item()) > 6:
            say(f"警告：第 {step + 1} 步的损失 {step_loss:.3f} 比前面 {len(recent)} 步高 {z:.1f} 个标准差：{'、'.join(where for _, _, where in batch_rows)}")
        losses.append(step_loss)
        tokens, seconds = tokens + sum(len(ids) for ids, _, _ in batch_rows), seconds + time.perf_counter() - since
        if (step + 1) % args.logging_steps == 0 or step + 1 == total_steps:
            metrics = {"loss": round(sum(losses) / len(losses), 6), "learning_rate": float(f"{args.learning_rate * scale:.4g}"), "grad_norm": round(grad_norm, 4),
                       "tokens_per_second": round(tokens / seconds, 1), "epoch": round((step + 1) / steps_per_epoch, 4),
                       **({"peak_memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2), "skipped_updates": skipped} if on_cuda else {})}
            metrics |= {"answer_loss": round(step_parts[0], 6), "teacher_loss": round(step_parts[1], 6)} if teach else {}  # of this step
            record(step + 1, metrics, f"{metrics} 第 {step + 1}/{total_steps} 步，还要 {tqdm.format_interval(seconds / min(len(losses), step + 1 - start_step) * (total_steps - step - 1))}")
            losses, tokens, seconds, all_tokens = [], 0, 0.0, all_tokens + tokens

    if stopped or rank:
        say(f"已保存到 {folder}/checkpoint-{step}。继续：{'python' if world == 1 else 'torchrun …'} train.py --output_dir {folder} --resume_from_checkpoint auto" if step else "还没有做完一步，什么也没有存。重新运行同样的命令")
        sys.exit(128 + (signals or [signal.SIGTERM])[0] if stopped else 0)

    # ---- 5. The best adapter becomes final_model ----
    if problem := damage(source := folder / f"checkpoint-{best_step or step}"):
        fail(4, f"最好的 {source} 不能用：{problem}，没有写 final_model。可以直接用另一个：python inference.py --interactive --lora_weights {folder}/checkpoint-N")
    if not any(v.any() for key, v in load_file(source / "adapter_model.safetensors").items() if not any(part in key for part in ("lora_A", "lora_embedding_B", "lora_magnitude"))):
        fail(5, f"LoRA 的权重还全是零，等于没有训练，没有写 final_model。检查 --learning_rate（现在是 {args.learning_rate}）")
    with staged(folder / "final_model") as staging:
        shutil.copytree(source, staging, ignore=shutil.ignore_patterns("optimizer.safetensors", "state.json", "manifest.json"), dirs_exist_ok=True)
    summary = {"步数": f"{step}（{step / steps_per_epoch:g} 轮）", "训练行数": len(train_data), "可训练参数": f"{trainable:,}（{100 * trainable / total:.2f}%）",
               "用时": f"{(minutes := (time.perf_counter() - began) / 60):.1f} 分钟", "速度": f"{all_tokens / minutes / 60:.0f} token/s（含验证和保存）",
               **({"验证损失": f"{next((m['val_loss'] for m in history if 'val_loss' in m), best):.4f} → {best:.4f}（第 {best_step} 步）"} if val_data else {})}
    report = f"# 训练报告\n\n{run['started']} 开始，{run['device']}，{run['dtype']}，torch {run['versions']['torch']}\n\n| 项目 | 值 |\n|---|---|\n"
    (folder / "training_report.md").write_text(report + "".join(f"| {name} | {value} |\n" for name, value in [*summary.items(), *run["args"].items()]), encoding="utf-8")
    say("\n".join(f"{name}：{value}" for name, value in summary.items()) + f"\n训练完成，报告在 {folder / 'training_report.md'}")
    print(folder / "final_model")

if __name__ == "__main__":
    run_script(main)
