"""数据变多、行变长时，train.py 的时间和内存怎么增长：100 → 10,000 行，128 → 2,048 token。

  python benchmarks/growth.py                                  # 3 轮
  python benchmarks/growth.py --rounds 1 --rows 100 1000 --lengths 128 512      # 先试一下

读：模型和数据。写：两张表到标准输出，每次运行的原始数字到 --out。
每格只训练 2 步。行数那张表看启动（读表、编码都在里面）、每步和内存会不会随行数变；长度那张表看每个 token 的代价和内存。
行由数据里的问答接成，每一行都恰好截到要的长度；每轮的行都不同，所以编码的缓存帮不上忙。
"""

import csv
import itertools
import sys
import tempfile
from pathlib import Path

from measure import ROOT, machine, print_table, run_timed, save, spread, tail, training_figures
from common import DEMO_MODEL, fail, load_rows, make_parser, number, parse_args, run_script, say

STEPS = 2


def write_long_rows(pairs: list[tuple[str, str]], count: int, length: int, turn: int, path: Path) -> None:
    """`count` rows of more than `length` tokens: a Chinese character is at least half a token in any tokenizer in use."""
    source = itertools.cycle(pairs)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("instruction", "output"))
        for n in range(count):
            question, answer = next(source)
            while len(answer) < 2 * length:
                answer += next(source)[1]
            writer.writerow((f"{question}（{turn}-{n}）", answer))


def measure(pairs: list, count: int, length: int, accumulation: int, turn: int, args) -> dict:
    """The figures of two steps on `count` rows of `length` tokens."""
    with tempfile.TemporaryDirectory(prefix="growth-") as work_name:
        work = Path(work_name)
        write_long_rows(pairs, count, length, turn, work / "rows.csv")
        command = [sys.executable, Path(args.repo, "train.py").resolve(), "--model_name", Path(args.model).resolve(), "--dataset_name", work / "rows.csv",
                   "--output_dir", work / "run", "--val_ratio", 0, "--max_steps", STEPS, "--batch_size", 2, "--gradient_accumulation_steps", accumulation,
                   "--max_length", length, "--device", "cpu"]
        run = run_timed(command, work / "log", work / "run" / "metrics.jsonl", args.threads, cwd=work)
        if run["code"]:
            fail(1, f"{count} 行、每行 {length} token 失败：\n{tail(work / 'log')}")
        rows = 2 * accumulation * STEPS
        found = training_figures(run, rows * length, rows)
    say(f"第 {turn + 1}/{args.rounds} 轮，{count} 行，每行 {length} token：启动 {found['startup_seconds']:.1f} 秒，"
        f"{found['tokens_per_second']:.1f} token/s，{found['peak_gb']:.2f} GB")
    return {"rows": count, "length": length, "accumulation": accumulation, "round": turn, **found}


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("增长").add_argument
    add("--rows", nargs="*", type=number(int, 32), default=[100, 1000, 10000], help="几种行数，每行 128 token，每步 2 × 8 行")
    add("--lengths", nargs="*", type=number(int, 32), default=[128, 256, 512, 1024, 2048], help="几种长度，每步 2 × 2 行")
    add("--rounds", type=number(int, 1), default=3, help="每格量几遍")
    add("--repo", default=str(ROOT), metavar="DIR", help="量哪份 train.py")
    add("--model", default=str(ROOT / DEMO_MODEL), help="模型目录")
    add("--data", default=str(ROOT / "datasets/legal_qa.csv"), help="行从这里接成")
    add("--threads", type=number(int, 1), default=2, help="线程数")
    add("--out", default="output/benchmarks/growth.json", help="原始数字写到这个文件")
    args = parse_args(parser)
    pairs = [tuple(m["content"] for m in row["messages"][-2:]) for row in load_rows(args.data)[0]]
    results = {"machine": machine(args.threads), "settings": vars(args), "by_rows": [], "by_length": []}
    for turn in range(args.rounds):
        for name, cells in (("by_rows", [(count, 128, 8) for count in args.rows]), ("by_length", [(8, length, 2) for length in args.lengths])):
            for count, length, accumulation in cells:
                results[name].append(measure(pairs, count, length, accumulation, turn, args))
                save(args.out, results)
    for name, key, title in (("by_rows", "rows", "行数"), ("by_length", "length", "每行 token")):
        table = []
        for value in dict.fromkeys(run[key] for run in results[name]):
            runs = [run for run in results[name] if run[key] == value]
            table.append([f"{value:,}", spread([r["startup_seconds"] for r in runs]), spread([r["train_seconds"] / STEPS for r in runs], 2),
                          spread([r["tokens_per_second"] for r in runs]), spread([r["peak_gb"] for r in runs], 2)])
        print_table([title, "启动 s", "每步 s", "token/s", "内存峰值 GB"], table)
        print()
    print(f"格式是 中位（最小–最大），{args.rounds} 轮；{results['machine']['cpu']}，{args.threads} 线程，{results['machine']['date']}")


if __name__ == "__main__":
    run_script(main)
