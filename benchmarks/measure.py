"""各个测速脚本共用：同一只表、同样的行、同样的表格。自己不能运行。

每个被测的程序都是一个子进程，每做完一个优化步就在 metrics.jsonl 里写一行。计时的是这边，所以对谁都一样。
"""

import csv
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import encode, fail, load_rows, load_tokenizer


def run_timed(command: list, log: Path, metrics: Path | None = None, threads: int = 2, cwd: Path | None = None, timeout: float = 7200) -> dict:
    """Run `command` to its end: {"code", "seconds", "peak_gb", "steps"}; its words go to `log`. `steps` are the lines of `metrics` that
    report a training step, each with "at", the seconds since the command was typed (± 0.01). `peak_gb` is the largest resident size."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
                   "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    steps, unread = [], 0
    with open(log, "wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=cwd)
        ended = 0
        while not ended:
            time.sleep(0.01)
            now = time.perf_counter() - began
            if now > timeout:
                process.kill()
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if metrics and metrics.is_file() and metrics.stat().st_size > unread:
                with open(metrics, "rb") as file:
                    file.seek(unread)
                    lines = file.read().rpartition(b"\n")[0]
                unread += len(lines) + 1 if lines else 0
                steps += [{**metric, "at": now} for metric in map(json.loads, lines.splitlines()) if "loss" in metric]
        process.returncode = os.waitstatus_to_exitcode(status)
    # Linux counts in KiB, macOS in bytes
    peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return {"code": process.returncode, "seconds": now, "peak_gb": peak, "steps": steps}


def training_figures(run: dict, tokens: int, rows: int) -> dict:
    """Start-up and speed of a training run of `tokens` useful tokens: from the beginning of its first step to the end of its last."""
    steps = run["steps"]
    if steps[0]["loss"] is None:  # a peer writes a line when its first step begins
        begin, steps = steps[0]["at"], steps[1:]
    else:  # train.py: the tokens that the later steps did not do, the first one did, at the speed that it reports
        later = sum(b["tokens_per_second"] * (b["at"] - a["at"]) for a, b in itertools.pairwise(steps))
        begin = steps[0]["at"] - (tokens - later) / steps[0]["tokens_per_second"]
    seconds = steps[-1]["at"] - begin
    return {"tokens_per_second": tokens / seconds, "rows_per_second": rows / seconds, "startup_seconds": begin, "train_seconds": seconds,
            "total_seconds": run["seconds"], "peak_gb": run["peak_gb"], "losses": [round(step["loss"], 5) for step in steps]}


def tail(log: Path, lines: int = 8) -> str:
    """The last words of a run that failed."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def write_rows(data: str, count: int, model: str, max_length: int, folder: Path) -> tuple[Path, list]:
    """The first `count` rows of `data`: as a CSV for train.py, and as [(input_ids, labels)], which is what train.py makes of them and
    what every peer is given, so that all train on the same ids and the same tokens are counted for all."""
    with open(data, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        records = [record for _, record in zip(range(count), reader)]
    if len(records) < count:
        fail(3, f"{data} 只有 {len(records)} 行，不够 {count} 行")
    path = folder / "rows.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames)
        writer.writeheader()
        writer.writerows(records)
    tokenizer = load_tokenizer(model)
    return path, [encode(tokenizer, row["messages"], max_length) for row in load_rows(str(path))[0]]


def machine(threads: int) -> dict:
    """What a reader must know to judge a figure: when, on what, with which versions, and what else was running."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    git = shutil.which("git")
    commit = subprocess.run([git, "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() if git else ""
    return {"date": datetime.datetime.now().isoformat(" ", "minutes"), "cpu": cpu, "cores": os.cpu_count(), "threads": threads,
            "load_before": round(os.getloadavg()[0], 2), "commit": commit, "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}}


def spread(values: list, digits: int = 1) -> str:
    """“中位（最小–最大）”, the form of every figure here."""
    if not values:
        return "—"
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle}（{low}–{high}）"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table on stdout whose columns line up in a terminal, where Chinese is two columns wide."""
    def width(text: str) -> int:
        return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)

    widths = [max(width(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(cell + " " * (w - width(cell)) for cell, w in zip(row, widths)) + " |")


def save(path: str, results: dict) -> None:
    """Write the raw figures of every run."""
    results["machine"]["load_after"] = round(os.getloadavg()[0], 2)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
