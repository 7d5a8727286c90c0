"""在真正的显卡上把只有 CUDA 才有的路走一遍：精度、量化、打包、续训、编译、显存、速度。没有显卡就说明跳过了什么，退出码 0。

  python benchmarks/gpu_check.py                               # 全部，大约十几分钟
  python benchmarks/gpu_check.py --only bf16 4bit resume       # 只做这几项
  python benchmarks/gpu_check.py --device cpu --max_length 64 --only pack resume      # 没有显卡时，看看脚本自己好不好

读：演示模型、法律问答（3b 那几项用随机权重的 Llama-3.2-3B 形状，要 7 GB 磁盘）。写：表格到标准输出，JSON 到 --out。
每一项都按用户的样子运行 train.py 或 inference.py，每步 2 × 8 行，8 步；token/s 是第 3 步以后的中位，显存是 train.py 自己记的峰值。
退出码：0 = 没有失败（跳过不算），1 = 有失败。
"""

import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from measure import ROOT, machine, print_table, run_timed, save, tail
from common import DEMO_MODEL, make_parser, number, parse_args, run_script, say, sha256

THREADS = min(8, os.cpu_count() or 1)
CHECKS = ("fp32", "bf16", "fp16", "4bit", "8bit", "pack", "checkpointing", "resume", "compile", "generate", "3b", "3b-checkpointing", "3b-4bit")
QUANTIZED, HALF = ("4bit", "8bit", "3b-4bit"), ("bf16", "fp16", "3b", "3b-checkpointing", "3b-4bit")


def why_skip(name: str, device: str) -> str:
    """Why a check cannot be done on this machine, or ""."""
    import torch
    if device == "cuda" and not torch.cuda.is_available():
        return "这台机器没有 CUDA 显卡"
    if name in HALF and device != "cuda":
        return "半精度只在 CUDA 上用"
    if name in HALF and name != "fp16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "这块显卡不支持 bfloat16"
    if name in QUANTIZED and not importlib.util.find_spec("bitsandbytes"):
        return "没有装 bitsandbytes"
    if name == "compile" and '"--compile"' not in (ROOT / "train.py").read_text(encoding="utf-8"):
        return "train.py 还没有 --compile"
    if name.startswith("3b"):
        need, free = {"3b": 24, "3b-checkpointing": 16, "3b-4bit": 16}[name], torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"要 {need} GB 显存，这块卡有 {free:.0f} GB" if free < need else ""
    return ""


def demo_model(work: Path) -> str:
    """The demo model, or one of its shape with random weights where only its config and tokenizer have been brought along."""
    from transformers import AutoConfig, AutoModelForCausalLM
    folder = ROOT / DEMO_MODEL
    if (folder / "model.safetensors").is_file():
        return str(folder)
    made = work / "random-demo"
    if not made.is_dir():
        shutil.copytree(folder, made)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(made)
    return str(made)


def train(work: Path, name: str, common: list, *flags, model: str = "") -> dict:
    """One short training: {"seconds", "losses", "tokens_per_second", "peak_memory_gb", "log", "folder"}; `common` are the flags of all."""
    folder, log = work / name, work / f"{name}.log"
    command = [sys.executable, ROOT / "train.py", "--model_name", model or demo_model(work), "--dataset_name", ROOT / "datasets/legal_qa.csv", "--output_dir", folder,
               "--val_ratio", 0, "--max_samples", 128, "--max_steps", 8, "--report_to", "none", *common, *flags]
    run = run_timed(command, log, folder / "metrics.jsonl", threads=THREADS, cwd=ROOT, timeout=1800)
    assert run["code"] == 0, f"退出码 {run['code']}：{tail(log, 3)}"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(math.isfinite(step["loss"]) for step in steps), "损失不是有限的数"
    return {"seconds": run["seconds"], "losses": [step["loss"] for step in steps], "tokens_per_second": statistics.median(s["tokens_per_second"] for s in steps[2:]),
            "peak_memory_gb": max(step.get("peak_memory_gb", 0) for step in steps), "log": log.read_text(encoding="utf-8", errors="replace"), "folder": folder}


def make_3b(work: Path) -> str:
    """A model of Llama-3.2-3B's shape with random weights, made once; the demo model's tokenizer fits into its vocabulary."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    folder = work / "random-3b"
    if not folder.is_dir():
        config = LlamaConfig(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
                             vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=True, rms_norm_eps=1e-5, dtype="bfloat16")
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(ROOT / DEMO_MODEL).save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
    return str(folder)


def check(name: str, work: Path, device: str, max_length: int) -> dict:
    """Do one check; an AssertionError says what is wrong, else its figures with a "note"."""
    common = ["--device", device, "--max_length", max_length]
    if name in ("fp32", "bf16", "fp16"):
        run = train(work, name, common, "--dtype", {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[name])
        assert "按行打包" in run["log"], "没有按行打包"
        return {**run, "note": "GradScaler 开着" if name == "fp16" else ""}
    if name in ("4bit", "8bit"):
        run = train(work, name, common, "--quantization", name)
        assert device != "cuda" or "paged_adamw_8bit" in run["log"], "没有用 paged_adamw_8bit"
        return {**run, "note": "paged_adamw_8bit" if device == "cuda" else ""}
    if name in ("pack", "compile"):
        fast, plain = {"pack": (["--fast"], ["--no_fast"]), "compile": (["--compile", "on"], ["--compile", "off"])}[name]
        on, off = (train(work, f"{name}-{n}", common, "--dtype", "float32", "--lora_dropout", 0, *flags) for n, flags in enumerate((fast, plain)))
        worst = max(abs(a - b) / abs(b) for a, b in zip(on["losses"], off["losses"]))
        assert worst < 1e-3, f"损失和 {' '.join(plain)} 的差到 {worst:.1e}"
        return {**on, "note": f"比 {' '.join(plain)} 快 {on['tokens_per_second'] / off['tokens_per_second']:.2f} 倍，损失最多差 {worst:.0e}"}
    if name == "checkpointing":
        on, off = (train(work, f"{name}-{n}", common, flag) for n, flag in enumerate(("--gradient_checkpointing", "--no_gradient_checkpointing")))
        return {**on, "note": f"不加时 {off['peak_memory_gb']:.2f} GB，{off['tokens_per_second']:.0f} token/s"}
    if name == "resume":
        whole = train(work, name, common, "--dtype", "float32", "--save_every", 4)  # half-precision attention adds up in no fixed order
        (work / "resumed").mkdir()
        shutil.copytree(whole["folder"] / "checkpoint-4", work / "resumed" / "checkpoint-4")
        command = [sys.executable, ROOT / "train.py", "--output_dir", work / "resumed", "--resume_from_checkpoint", "auto"]
        assert run_timed(command, work / "resumed.log", threads=THREADS, cwd=ROOT)["code"] == 0, f"续训失败：{tail(work / 'resumed.log', 3)}"
        first, second = (sha256((folder / "final_model/adapter_model.safetensors").read_bytes()) for folder in (whole["folder"], work / "resumed"))
        assert first == second, "续训的权重和没有中断的不逐位相同"
        return {**whole, "note": "第 4 步续训，权重逐位相同"}
    if name == "generate":
        run = train(work, name, common)
        log = work / "generate-answer.log"
        command = [sys.executable, ROOT / "inference.py", "--lora_weights", run["folder"] / "final_model", "--prompt", "劳动合同试用期最长多久？", "--max_new_tokens", 64,
                   "--device", device]
        answer = run_timed(command, log, threads=THREADS, cwd=ROOT)
        assert answer["code"] == 0 and log.read_text(encoding="utf-8").strip(), f"inference.py 退出码 {answer['code']}：{tail(log, 3)}"
        return {**run, "note": f"inference.py 从输入命令到结束 {answer['seconds']:.1f} 秒"}
    flags = {"3b": [], "3b-checkpointing": ["--gradient_checkpointing"], "3b-4bit": ["--quantization", "4bit"]}[name]
    return {**train(work, name, common, *flags, model=make_3b(work)), "note": "随机权重，Llama-3.2-3B 的形状"}


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("检查").add_argument
    add("--only", nargs="+", choices=CHECKS, default=CHECKS, help=f"做哪几项：{'、'.join(CHECKS)}")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cuda；cpu 只用来试这个脚本")
    add("--max_length", type=number(int, 16), default=512, help="每行最多多少 token")
    add("--out", default="output/benchmarks/gpu_check.json", help="结果写到这个文件")
    args = parse_args(parser)
    import torch
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "没有显卡"
    results = {"machine": {**machine(THREADS), "card": card, "cuda": torch.version.cuda, "cards": torch.cuda.device_count()}, "checks": []}
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as work:
        for name in args.only:
            found = {"status": "跳过", "note": why_skip(name, args.device)}
            if not found["note"]:
                try:
                    found = {"status": "通过", **check(name, Path(work), args.device, args.max_length)}
                except Exception as problem:  # noqa: BLE001 - one that fails must not end the others
                    found = {"status": "失败", "note": str(problem) or type(problem).__name__}
            results["checks"].append({"check": name, **{k: v for k, v in found.items() if k not in ("log", "folder")}})
            say(f"{name}：{found['status']}。{found['note']}")
            save(args.out, results)
    print_table(["检查", "结果", "token/s", "显存峰值 GB", "损失 首 → 末", "说明"],
                [[c["check"], c["status"], f"{c['tokens_per_second']:.0f}" if "losses" in c else "—", f"{c['peak_memory_gb']:.2f}" if c.get("peak_memory_gb") else "—",
                  f"{c['losses'][0]:.3f} → {c['losses'][-1]:.3f}" if "losses" in c else "—", " ".join(c["note"].split())] for c in results["checks"]])
    print(f"{card}，CUDA {torch.version.cuda or '无'}，torch {torch.__version__}，{results['machine']['date']}；JSON：{args.out}")
    sys.exit(any(c["status"] == "失败" for c in results["checks"]))


if __name__ == "__main__":
    run_script(main)
