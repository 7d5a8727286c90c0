#!/usr/bin/env bash
# 一条命令：准备环境 → 准备模型 → 训练。所有参数原样交给 train.py。
#
#   ./train_csv.sh                                  # 没有大模型时，用演示模型做一次几分钟的真实训练
#   ./train_csv.sh --dataset_name 我的数据.csv
#   ./train_csv.sh --num_epochs 3                   # 写了任何参数就按 train.py 的默认值完整训练
#   ./train_csv.sh --setup_only                     # 只准备环境，打印要用的 python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
say() { echo "$@" >&2; }

# ---- 1. Environment: the active one if it has everything, else ./.venv ----
satisfied() {
    "$1" - <<'PY' 2>/dev/null
import re, sys
from importlib.metadata import version
least = {"torch": (2, 11), "transformers": (5, 17), "peft": (0, 19)}
for line in open("requirements.txt"):
    name = re.match(r"[A-Za-z]\w*", line)
    if name:
        numbers = tuple(int(n) for n in re.findall(r"\d+", version(name[0]))[:2])
        if numbers < least.get(name[0], (0,)):
            sys.exit(1)
PY
}
active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
if [ -n "$active" ] && [ -x "$active/bin/python" ] && satisfied "$active/bin/python"; then
    python="$active/bin/python"
else
    [ -n "$active" ] && [ "$active" != "$PWD/.venv" ] && say "当前环境 $active 缺少需要的包，改用 .venv（不会改动当前环境）"
    python="$PWD/.venv/bin/python"
    if [ ! -x "$python" ]; then
        for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found="$candidate"; break; fi
        done
        [ -n "${found:-}" ] || { say "错误：需要 Python 3.10 或更新的版本。安装后再运行 ./train_csv.sh"; exit 2; }
        say "建立 .venv（$("$found" --version)）…"
        "$found" -m venv --clear .venv || { say "错误：不能建立 .venv。Debian/Ubuntu 先运行：apt install python3-venv"; rm -rf .venv; exit 6; }
    fi
    if ! cmp -s requirements.txt .venv/.installed || ! satisfied "$python"; then
        say "安装 requirements.txt（只在第一次和它改动之后，需要几分钟）…"
        "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt >&2 \
            || { say "错误：安装没有完成。检查网络或 pip 镜像后再运行 ./train_csv.sh；还不行就删掉 .venv 再试"; exit 6; }
        cp requirements.txt .venv/.installed
    fi
fi
if [[ "${1:-}" = --setup[_-]only ]]; then echo "$python"; exit 0; fi

# ---- 2. Model: the one asked for, Llama-3.2-3B if it is there, else the demo model ----
llama=./models/LLM-Research/Llama-3.2-3B-Instruct
extra=()
case " $* " in
*" --model"[_-]name* | *" --base"[_-]model* | *" --resume"[_-]from* | *" --help "* | *" -h "*) ;;
*" --config"[\ =]*) [ -d models ] || "$python" download_model.py --demo >/dev/null || true ;;  # it may name a model or leave it to the demo
*)
    if [ -f "$llama/config.json" ]; then
        say "基础模型：$llama"
    else
        "$python" download_model.py --demo >/dev/null
        say "基础模型：./models/SmolLM2-135M-Instruct（演示用的小模型，只为看清流程；中文能力很弱）"
        say "换成 Llama-3.2-3B-Instruct：$python download_model.py，下载完再运行 ./train_csv.sh"
        if [ $# -eq 0 ] && ! "$python" -c 'import sys, torch; sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))'; then
            extra=(--max_samples 72 --num_epochs 1 --gradient_accumulation_steps 2 --val_ratio 0.16 --learning_rate 3e-4)
            say "没有显卡：只用 72 行数据训练一轮，几分钟就好。完整训练（全部数据，三轮）：./train_csv.sh --num_epochs 3"
        fi
    fi
    ;;
esac

# ---- 3. Training, a process for each card, and what to type next ----
result="$(mktemp)"
trap 'rm -f "$result"' EXIT
run=("$python")
cards=1
case " $* " in
*" --device"[\ =]* | *" --dry"[_-]run* | *" --help "* | *" -h "*) ;;
*)
    if [ "$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')" -gt 1 ]; then
        cards="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
    fi
    ;;
esac
if [ "$cards" -gt 1 ]; then
    # torchrun has one exit code for all, and says a refusal once a process: see first whether there is one
    "$python" train.py ${extra[@]+"${extra[@]}"} "$@" --dry_run >/dev/null 2>"$result" || { code=$?; cat "$result" >&2; exit $code; }
    say "$cards 张显卡一起训练，每张一个进程（只用一张：--device cuda:0）"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"                                # torchrun sets it too, with a warning
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"  # seconds to finish a step and save after Ctrl-C
    run+=(-m torch.distributed.run --standalone --nproc_per_node "$cards")
fi
"${run[@]}" train.py ${extra[@]+"${extra[@]}"} "$@" >"$result" || exit $?
adapter="$(tail -n 1 "$result")"
[ -d "$adapter" ] || { cat "$result"; exit 0; }
say ""
say "接下来可以："
[ "$python" = "$active/bin/python" ] || say "  source .venv/bin/activate        # 每开一个新终端先运行一次"
cat <<EOF
  python inference.py --lora_weights "$adapter" --interactive
  python compare_models.py --lora_weights "$adapter" --test_file test_questions.txt
  tensorboard --logdir "$(dirname "$adapter")/logs"
EOF
