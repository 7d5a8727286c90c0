"""训练速度：train.py 和几个对手轮流训练同样的行，比每秒多少有用的 token、内存、启动时间。

  python benchmarks/train_speed.py                             # 32 行，5 轮，dropout 0.1，装好了的对手都比
  python benchmarks/train_speed.py --dropout 0 --peers hf-group litgpt limit
  python benchmarks/train_speed.py --rows 16 --rounds 1 --peers hf-group        # 先试一下
  python benchmarks/train_speed.py --repo . --repo ../改动之前 --peers limit    # 比较两份代码

读：模型、数据、各个对手的虚拟环境（安装见 benchmarks/README.md）。写：表格到标准输出，每次运行的原始数字到 --out。
对谁都一样：同样的行、同样的 token 和标签、LoRA 秩 32 alpha 64 全部投影、dropout、每步 2 × 8 行、fp32、同样的线程数；token 不算填充，由同一个函数数。
train.py 按用户的样子运行：记录开着，验证关着，checkpoint 用默认间隔。对手不存 checkpoint、不写曲线，这对它们有利。
“检查点”在表里指梯度检查点（省内存，慢）。启动 = 从输入命令到第一个优化步开始；速度从那时算到最后一个优化步做完。
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, machine, print_table, run_timed, save, spread, tail, training_figures, write_rows
from common import DEMO_MODEL, fail, make_parser, number, parse_args, run_script, say

HERE = Path(__file__).resolve().parent
BATCH_SIZE, ACCUMULATION = 2, 8
LORA = {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
PEERS = {
    "limit": "只做躲不开的矩阵乘法",
    "limit-usual": "同上，用 PyTorch 平常的乘法库",
    "hf-group": "HF Trainer，按长度分组，无检查点",
    "hf-dynamic": "HF Trainer，填充到最长的一行，无检查点",
    "hf-padded": "HF Trainer，填充到 max_length，无检查点",
    "trl-default": "TRL SFTTrainer，默认，有检查点",
    "trl-nockpt": "TRL SFTTrainer，无检查点",
    "trl-padfree": "TRL SFTTrainer，padding_free，无检查点",
    "litgpt": "LitGPT，无检查点",
}


def train_command(repo: str, job: dict, data: Path) -> list:
    """train.py in `repo`, typed as a user does."""
    lora = job["lora"]
    return [sys.executable, Path(repo, "train.py"), "--model_name", job["model"], "--dataset_name", data, "--output_dir", job["folder"], "--val_ratio", 0,
            "--num_epochs", 1, "--batch_size", BATCH_SIZE, "--gradient_accumulation_steps", ACCUMULATION, "--max_length", job["max_length"],
            "--lora_r", lora["r"], "--lora_alpha", lora["lora_alpha"], "--lora_dropout", lora["lora_dropout"], "--device", "cpu", "--seed", job["seed"]]


def peer_command(name: str, job: dict, args, label_share: float) -> list:
    """The command of a peer; its settings go into a file in the run's folder."""
    kind, _, mode = name.partition("-")
    if kind == "limit":
        return [sys.executable, HERE / "limit.py", "--model", args.model, "--label_share", label_share, "--threads", args.threads,
                "--json", Path(job["folder"], "limit.json"), *["--usual"] * (mode == "usual")]
    file = Path(job["folder"], "job.json")
    file.write_text(json.dumps({**job, "mode": mode}), encoding="utf-8")
    return [{"hf": sys.executable, "trl": args.peers_python, "litgpt": args.litgpt_python}[kind], HERE / f"peer_{kind}.py", file]


def missing(name: str, args) -> str:
    """Why a peer cannot run here, or ""."""
    python, package = {"trl": (args.peers_python, "trl"), "litgpt": (args.litgpt_python, "litgpt")}.get(name.partition("-")[0], (sys.executable, "peft"))
    check = [python, "-c", f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({package!r}))"]
    return "" if Path(python).is_file() and not subprocess.run(check, check=False, cwd="/").returncode else f"{python} 没有或里面没有 {package}"


def convert_for_litgpt(model: str, python: str, folder: Path) -> str:
    """A copy of `model` in LitGPT's own format; it knows models by the name of their folder."""
    target = folder / "litgpt" / Path(model).name
    target.mkdir(parents=True)
    for file in Path(model).iterdir():
        (target / file.name).symlink_to(file)
    log = folder / "convert.log"
    if run_timed([python, "-m", "litgpt", "convert_to_litgpt", target, "--model_name", target.name, "--dtype", "float32"], log)["code"]:
        fail(4, f"LitGPT 转换 {model} 失败：\n{tail(log)}")
    return str(target)


def run_one(name: str, command: list, job: dict, args) -> dict | None:
    """The figures of one run, or None with a word on what went wrong."""
    folder, rows = Path(job["folder"]), job["rows"]
    log = folder.with_suffix(".log")
    run = run_timed(command, log, folder / "metrics.jsonl", args.threads, cwd=folder.parent)
    if run["code"] == 0 and name.startswith("limit"):
        return {"tokens_per_second": json.loads((folder / "limit.json").read_text())["tokens_per_second"]}
    if run["code"] or not run["steps"]:
        return say(f"  {name} 失败，退出码 {run['code']}：\n{tail(log)}")
    found = training_figures(run, sum(len(ids) for ids, _ in rows), len(rows))
    if len(found["losses"]) != len(rows) // (BATCH_SIZE * ACCUMULATION):
        return say(f"  {name} 做了 {len(found['losses'])} 步，和别人的不是同一件事，不计")
    return found


def report(results: dict, titles: dict) -> None:
    """The table: medians, and ratios of the first system to each other one within the same round."""
    rounds: dict[int, dict] = {}
    for run in results["runs"]:
        rounds.setdefault(run["round"], {})[run["system"]] = run
    ours = next(iter(titles))

    def column(name: str, key: str, digits: int, over: str | None = None, scale: float = 1) -> str:
        """Values of `key`, or those of `over` divided by those of `name`."""
        there = [r for r in rounds.values() if {name, over or name} <= set(r) and key in r[name]]
        return spread([scale * (r[over][key] / r[name][key] if over else r[name][key]) for r in there if key in r[over or name]], digits)

    table = []
    for name, title in titles.items():
        share = [100 * r[name]["tokens_per_second"] / r["limit"]["tokens_per_second"] for r in rounds.values() if {name, "limit"} <= set(r)]
        table.append([title, column(name, "tokens_per_second", 1), column(name, "rows_per_second", 3), column(name, "peak_gb", 2), column(name, "startup_seconds", 1),
                      column(name, "tokens_per_second", 2, ours), column(name, "peak_gb", 2, ours), column(name, "startup_seconds", 2, ours), spread(share, 0)])
    about = results["machine"]
    print(f"\n{results['rows']} 行 × {len(rounds)} 轮，dropout {results['dropout']}，{results['tokens']} token（要学的占 {results['label_share']:.2f}），"
          f"{about['cpu']}，{about['threads']} 线程，开始时负载 {about['load_before']}，{about['date']}")
    print_table(["系统", "token/s", "行/s", "内存峰值 GB", "启动 s", "速度比", "内存比", "启动比", "占上限 %"], table)
    print(f"格式是 中位（最小–最大）。比 = {titles[ours]} ÷ 这一行，在同一轮里算；速度比越大越好，内存比、启动比越小越好。")


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("测速").add_argument
    add("--rows", type=number(int, 16), default=32, help="训练几行，16 的倍数（每步 16 行）")
    add("--rounds", type=number(int, 1), default=5, help="轮流几轮")
    add("--dropout", type=number(float, 0, 0.99), default=0.1, help="LoRA dropout，对谁都一样")
    add("--peers", nargs="+", choices=list(PEERS), default=["limit", "limit-usual", "hf-group", "hf-padded", "trl-default", "trl-nockpt", "litgpt"],
        help=f"和谁比：{'、'.join(PEERS)}")
    add("--repo", action="append", metavar="DIR", help="量哪份 train.py；可以写几次，第一个是被比的")
    add("--model", default=str(ROOT / DEMO_MODEL), help="模型目录")
    add("--data", default=str(ROOT / "datasets/legal_qa.csv"), help="数据，取前 --rows 行")
    add("--max_length", type=number(int, 16), default=512, help="每行最多多少 token")
    add("--threads", type=number(int, 1), default=2, help="线程数")
    add("--peers_python", default="/tmp/peers/bin/python", help="装了 TRL 的 python")
    add("--litgpt_python", default="/tmp/peers-litgpt/bin/python", help="装了 LitGPT 的 python")
    add("--out", default="output/benchmarks/train_speed.json", help="原始数字写到这个文件")
    args = parse_args(parser)
    if args.rows % (BATCH_SIZE * ACCUMULATION):
        fail(2, f"--rows {args.rows} 不是 {BATCH_SIZE * ACCUMULATION} 的倍数：最后一步不满时，各家的做法不同，没法比")
    repos = [str(Path(folder).resolve()) for folder in args.repo or [ROOT]]
    args.model = str(Path(args.model).resolve())
    titles = {repo: f"train.py（{repo}）" if len(repos) > 1 else "train.py" for repo in repos}
    for name in args.peers:
        if problem := missing(name, args):
            say(f"跳过 {name}：{problem}。安装见 benchmarks/README.md")
        else:
            titles[name] = PEERS[name]

    with tempfile.TemporaryDirectory(prefix="train_speed-") as work_name:
        work = Path(work_name)
        data, rows = write_rows(args.data, args.rows, args.model, args.max_length, work)
        tokens, labels = sum(len(ids) for ids, _ in rows), sum(t != -100 for _, row_labels in rows for t in row_labels)
        base = {"model": args.model, "rows": rows, "lora": {**LORA, "lora_dropout": args.dropout}, "max_length": args.max_length, "batch_size": BATCH_SIZE,
                "accumulation": ACCUMULATION, "learning_rate": 1e-4, "seed": 42}
        if "litgpt" in titles:
            base["litgpt_model"] = convert_for_litgpt(args.model, args.litgpt_python, work)
        results = {"machine": machine(args.threads), "rows": args.rows, "dropout": args.dropout, "tokens": tokens, "label_share": labels / tokens, "runs": []}
        for turn in range(args.rounds):
            # forwards, then backwards: what warms up or slows down during a round does not always hit the same one
            for n, name in enumerate(list(titles)[::-1] if turn % 2 else titles):
                job = {**base, "folder": str(work / f"{turn}-{n}")}
                Path(job["folder"]).mkdir()
                command = train_command(name, job, data) if name in repos else peer_command(name, job, args, labels / tokens)
                if found := run_one(name, command, job, args):
                    results["runs"].append({"system": name, "round": turn, **found})
                    say(f"第 {turn + 1}/{args.rounds} 轮 {titles[name]}：" + "，".join(f"{key} {value if isinstance(value, list) else round(value, 2)}" for key, value in found.items()))
                    save(args.out, results)
    report(results, titles)
    say(f"每一次的原始数字：{args.out}")


if __name__ == "__main__":
    run_script(main)
