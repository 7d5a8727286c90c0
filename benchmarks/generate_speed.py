"""生成速度：微调前后各答 20 个问题，和一个聊天回答；本项目的脚本对普通的 transformers 写法，轮流运行。

  python benchmarks/generate_speed.py                          # 5 轮，每个回答最多 64 token，最新的 LoRA
  python benchmarks/generate_speed.py --rounds 1 --questions 4 --max_new_tokens 16        # 先试一下
  python benchmarks/generate_speed.py --repo ../改动之前 --adapter output/某次训练/final_model

读：test_questions.txt、LoRA、基础模型。写：表格到标准输出，每次运行的原始数字到 --out。
对比：compare_models.py 对“两个模型都装进内存，一个一个地答”。聊天：inference.py --interactive 对“LoRA 不合并的 generate”，每个问题都是新对话。
两边都是 fp32、同样的线程数、贪心；回答应当逐字相同，表里写着几个相同。本项目的两个脚本按用户的样子运行。
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, machine, print_table, run_timed, save, spread, tail
from common import DEMO_MODEL, fail, make_parser, number, parse_args, run_script, say, visible
from inference import find_adapter, read_questions

HERE = Path(__file__).resolve().parent


def plain(repo: Path, job: dict, folder: Path, threads: int) -> dict:
    """The usual way: {"seconds" of answering, "total_seconds" of the command, "peak_gb", "answers", "tokens"}."""
    file, out = folder / "job.json", folder / "answers.json"
    file.write_text(json.dumps({**job, "out": str(out)}), encoding="utf-8")
    run = run_timed([sys.executable, HERE / "peer_generate.py", file], folder / "plain.log", threads=threads, cwd=folder)
    if run["code"]:
        fail(1, f"普通写法失败：\n{tail(folder / 'plain.log')}")
    answers = json.loads(out.read_text(encoding="utf-8"))
    return {"seconds": sum(a["seconds"] for a in answers), "total_seconds": run["seconds"], "peak_gb": run["peak_gb"],
            "answers": [visible(a["text"]) for a in answers], "tokens": sum(a["tokens"] for a in answers)}


def compare(repo: Path, job: dict, folder: Path, threads: int) -> dict:
    """compare_models.py on the same questions; the seconds of answering are those that it prints."""
    questions, log = folder / "questions.txt", folder / "compare.log"
    questions.write_text("\n".join(job["questions"]), encoding="utf-8")
    run = run_timed([sys.executable, repo / "compare_models.py", "--lora_weights", job["adapter"], "--base_model", job["model"], "--test_file", questions,
                     "--max_new_tokens", job["max_new_tokens"], "--device", "cpu"], log, threads=threads, cwd=folder)
    if run["code"]:
        fail(1, f"compare_models.py 失败：\n{tail(log)}")
    text = log.read_text(encoding="utf-8").replace(" ……（到长度上限还没说完）", "")
    pairs = re.findall(r"^原始回答: (.*?)\n\n微调回答: (.*?)\n\n原始回答长度", text, re.DOTALL | re.MULTILINE)
    seconds = [float(s) for line in re.findall(r"^用时: (.*)", text, re.MULTILINE) for s in re.findall(r"([\d.]+) 秒", line)]
    return {"seconds": sum(seconds), "total_seconds": run["seconds"], "peak_gb": run["peak_gb"], "answers": [a for pair in pairs for a in pair]}


def chat(repo: Path, job: dict, folder: Path, threads: int) -> dict:
    """A real chat through a pipe: /save after each question tells when its answer has ended."""
    log = folder / "chat.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, repo / "inference.py", "--interactive", "--lora_weights", job["adapter"], "--base_model", job["model"],
               "--max_new_tokens", job["max_new_tokens"], "--device", "cpu"]
    answers, seconds = [], 0.0

    def wait_for(file: Path, text: str) -> None:
        while not file.is_file() or text not in file.read_text(encoding="utf-8", errors="replace"):
            time.sleep(0.005)
            if process.poll() is not None:
                fail(1, f"inference.py 失败：\n{tail(log)}")

    with open(log, "wb") as output:
        process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        wait_for(log, "开始聊天")
        for n, question in enumerate(job["questions"]):
            saved = folder / f"chat-{n}.json"
            began = time.perf_counter()
            process.stdin.write(f"{question}\n/save {saved}\n/reset\n".encode())
            process.stdin.flush()
            wait_for(saved, "\n]")
            seconds += time.perf_counter() - began
            answers.append(visible(json.loads(saved.read_text(encoding="utf-8"))[-1]["content"]))
        process.communicate(b"/exit\n")
    return {"seconds": seconds, "answers": answers}


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("测速").add_argument
    add("--rounds", type=number(int, 1), default=5, help="轮流几轮")
    add("--questions", type=number(int, 1), default=20, help="对比用前几个问题")
    add("--chat_questions", type=number(int, 1), default=5, help="聊天用前几个问题")
    add("--max_new_tokens", type=number(int, 1), default=64, help="回答最多多少 token")
    add("--test_file", default=str(ROOT / "test_questions.txt"), help="问题文件")
    add("--repo", default=str(ROOT), metavar="DIR", help="量哪份 compare_models.py 和 inference.py")
    add("--model", default=str(ROOT / DEMO_MODEL), help="模型目录")
    add("--adapter", help="LoRA 目录；默认 output/ 里最新的")
    add("--threads", type=number(int, 1), default=2, help="线程数")
    add("--out", default="output/benchmarks/generate_speed.json", help="原始数字写到这个文件")
    args = parse_args(parser)
    questions, repo = [asked[-1]["content"] for asked in read_questions(args.test_file)], Path(args.repo).resolve()
    if len(questions) < max(args.questions, args.chat_questions):
        fail(2, f"{args.test_file} 里只有 {len(questions)} 个问题")
    job = {"model": str(Path(args.model).resolve()), "adapter": str(Path(find_adapter(args.adapter)).resolve()), "max_new_tokens": args.max_new_tokens}
    jobs = {"compare": {**job, "mode": "compare", "questions": questions[:args.questions]},
            "chat": {**job, "mode": "chat", "questions": questions[:args.chat_questions]}}
    results = {"machine": machine(args.threads), "settings": vars(args), "rounds": []}
    for turn in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="generate_speed-") as work:
            found = {}
            for kind, ours in (("compare", compare), ("chat", chat)):
                sides = [("plain", plain), ("ours", ours)]
                for side, answer in sides[::-1] if turn % 2 else sides:
                    found[f"{kind}_{side}"] = answer(repo, jobs[kind], Path(work), args.threads)
                    say(f"第 {turn + 1}/{args.rounds} 轮 {kind} {side}：{found[f'{kind}_{side}']['seconds']:.1f} 秒")
            results["rounds"].append(found)
            save(args.out, results)

    table = []
    for title, kind, key in ((f"对比 {args.questions} 个问题，只算回答", "compare", "seconds"), ("同上，从输入命令到结束", "compare", "total_seconds"),
                             (f"聊天 {args.chat_questions} 个回答", "chat", "seconds")):
        pairs = [(r[f"{kind}_plain"], r[f"{kind}_ours"]) for r in results["rounds"]]
        same = [sum(a == b for a, b in zip(theirs["answers"], ours["answers"])) for theirs, ours in pairs]
        table.append([title, spread([theirs[key] for theirs, _ in pairs]), spread([ours[key] for _, ours in pairs]),
                      spread([theirs[key] / ours[key] for theirs, ours in pairs], 2), f"{min(same)}/{len(pairs[0][0]['answers'])}",
                      *(spread([side["peak_gb"] for side in sides if "peak_gb" in side], 2) for sides in zip(*pairs))])
    print_table(["做什么", "普通写法 s", "本项目 s", "快几倍", "相同的回答", "普通写法 GB", "本项目 GB"], table)
    print(f"格式是 中位（最小–最大），{args.rounds} 轮；每个回答最多 {args.max_new_tokens} token；{results['machine']['cpu']}，{args.threads} 线程，{results['machine']['date']}")


if __name__ == "__main__":
    run_script(main)
