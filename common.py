"""What two or more of the scripts need: flags, rows, encoding, loading.

Plain values in, plain values out. Nothing happens at import, and each function imports the heavy libraries that
it uses, so that it can be pasted elsewhere alone. train.py needs this one file and nothing else of the project.
"""

import argparse
import contextlib
import csv
import datetime
import difflib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

DEFAULT_MODEL = "./models/LLM-Research/Llama-3.2-3B-Instruct"
DEMO_MODEL = "./models/SmolLM2-135M-Instruct"

# Llama-3.2's template prints today's date, so training and chatting would see different prompts: every template is given this day.
TEMPLATE_DATE = datetime.date(2024, 7, 26)

# for tokenizers without a template of their own (GPT-2, OPT …); saved with the adapter
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}### 问题：\n{{ m['content'] }}\n\n### 回答：\n"
    "{% else %}{{ m['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
)

# Column names that people use for the same thing. The canonical name wins where several are there.
COLUMNS = {
    "instruction": ("instruction", "question", "query", "prompt", "text", "问题", "提问", "指令", "题目"),
    "input": ("input", "context", "输入", "背景", "补充信息"),
    "output": ("output", "answer", "response", "completion", "target", "回答", "答案", "输出", "回复"),
    "system": ("system", "system_prompt", "系统提示"),
    "messages": ("messages", "conversations", "conversation", "对话"),
}
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "bot": "assistant", "用户": "user", "助手": "assistant"}


# ---- 1. Words to the user ----

def say(*parts: Any, sep: str = " ") -> None:
    """Print progress to stderr; stdout is for results."""
    print(*parts, sep=sep, file=sys.stderr, flush=True)


def fail(code: int, message: str) -> NoReturn:
    """End the program with one clear sentence. Codes: 2 usage, 3 data, 4 model or adapter, 5 numeric, 6 resources."""
    say(f"错误：{message}")
    raise SystemExit(code)


def visible(text: str) -> str:
    """`text` with terminal control characters shown instead of obeyed (newline and tab stay)."""
    bad = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    keep = "\n\t\u200d"  # U+200D joins emoji
    return "".join(c if c in keep or unicodedata.category(c) not in bad else f"\\x{ord(c):02x}" for c in text)


# ---- 2. Flags ----

class OneNameHelp(argparse.RawDescriptionHelpFormatter):
    """Help that shows a flag's first name and not its aliases."""

    def _format_action_invocation(self, action):
        return action.option_strings[0] + ("" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}")


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An argparse type: a finite `kind` from `low` (`above`: more than it) to `high`."""

    def parse(text: str):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and (low < value if above else low <= value) and value <= high:
                return value
        limits = f"{'大于' if above else '不小于'} {low:g}" + (f"、不大于 {high:g}" if high < math.inf else "")
        raise argparse.ArgumentTypeError(f"“{text}”不行，应为{limits}的{'整数' if kind is int else '数'}")

    return parse


def nearest(name: str, names) -> str:
    """“，你是不是想写 X？” for the closest of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f"，你是不是想写 {close[0]}？" if close else "。"


def make_parser(doc: str) -> argparse.ArgumentParser:
    """An ArgumentParser with `doc` as its help and --config; a mistake is one Chinese sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=OneNameHelp, allow_abbrev=False, usage="%(prog)s [参数 …]", add_help=False)
    words = {"argument ": "参数 ", "expected one argument": "后面缺少一个值", "expected at least one argument": "后面至少要有一个值",
             "invalid choice: ": "没有这个选项 ", "choose from": "可选"}

    def error(message: str) -> NoReturn:
        for english, chinese in words.items():
            message = message.replace(english, chinese)
        fail(2, f"{message}\n全部参数：python {Path(sys.argv[0]).name} --help")

    parser.error = error
    add = parser.add_argument_group("通用").add_argument
    add("--help", "-h", action="help", help="显示这份说明")
    add("--config", metavar="FILE", help="YAML 或 JSON 配置文件；命令行上写的参数优先")
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse `argv`, hyphens and underscores alike, with the entries of a --config file put before the typed flags.

    Being flags, they are checked by argparse itself. A key that only a sibling script knows is skipped; one that none
    knows, like a mistyped flag, is exit code 2 with the nearest name.
    """
    actions = parser._option_string_actions
    flags = {name.replace("-", "_"): name for name in actions if name.startswith("--")}
    typed = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        typed.append(flags.get(name.replace("-", "_"), name) + equals + value)
    config = parser.parse_known_args(typed)[0].config
    words = []
    for key, value in (read_config(config) if config else {}).items():
        key = str(key).replace("-", "_")
        flag = flags.get(f"__{key}")
        if flag is None:
            siblings = {n for p in Path(__file__).parent.glob("*.py") for n in re.findall(r'"--(\w+)"', p.read_text("utf-8"))}
            if key not in siblings:
                fail(2, f"{config} 里的 {key} 不是任何脚本的参数{nearest(key, siblings)}")
        elif isinstance(value, bool) and actions[flag].nargs == 0:
            words += [flag] if value else [f"--no-{flag[2:]}"] if f"--no-{flag[2:]}" in actions else []
        elif isinstance(value, list) and actions[flag].nargs == "+":
            words += [flag, *map(str, value)]
        elif value is not None:
            words += [f"{flag}={v}" for v in (value if isinstance(value, list) else [value])]
    args, unknown = parser.parse_known_args(words + typed)
    if unknown:
        fail(2, f"不认识的参数 {unknown[0]}{nearest(unknown[0].partition('=')[0], actions)}\n全部参数：python {Path(sys.argv[0]).name} --help")
    return args


def read_config(path: str) -> dict:
    """The mapping in a YAML or JSON file; exit 2 where there is none."""
    import yaml
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        place = f" 第 {error.problem_mark.line + 1} 行" if getattr(error, "problem_mark", None) else ""
        fail(2, f"配置文件 {path}{place} 读不出来：{getattr(error, 'problem', None) or getattr(error, 'strerror', None) or error}")
    return values if isinstance(values, dict) else fail(2, f"配置文件 {path} 里应该是“名字: 值”，每行一个")


# ---- 3. Rows ----

def decode(data: bytes, path: str) -> tuple[str, str]:
    """Text and encoding of `data`: a BOM decides, else strict UTF-8, else strict GB18030. Never a guess that garbles."""
    encoding = {b"\xef\xbb": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}.get(data[:2], "utf-8")
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError as error:
        first = error
    with contextlib.suppress(UnicodeDecodeError):
        # UTF-8 Chinese happens to be valid GB18030, as other characters: a line of it means that the file is a mixture
        mixed = re.search(rb"(?m)^[\x00-\x7f]*(?:[\xe4-\xe9][\x80-\xbf]{2}[\x00-\x7f]*){3,}$", data)
        if encoding == "utf-8" and not mixed:
            return data.decode("gb18030"), "gb18030"
    line = data.count(b"\n", 0, first.start) + 1
    fail(3, f"{path}:{line} 第 {first.start} 字节不是有效的 {encoding.upper()}，整个文件也不是 GB18030。在 Excel 里另存为“CSV UTF-8”后再试")


def read_table(path: str) -> list[tuple[int, dict]]:
    """(line, record) pairs of a CSV, TSV, JSON or JSONL file, read strictly: no shifted column, no changed text.

    Raises SystemExit(3) with file and line where a row has too many or too few cells, a quote is never closed, or JSON
    is broken.
    """
    try:
        text, encoding = decode(Path(path).read_bytes(), path)
    except OSError as error:
        fail(3, f"读不到数据文件 {path}：{error.strerror}")
    if encoding not in ("utf-8", "utf-8-sig"):
        say(f"{path} 的编码是 {encoding.upper()}")
    if "\0" in text:
        fail(3, f"{path}:{text.count(chr(10), 0, text.index(chr(0))) + 1} 含有 NUL 字符，文件可能已损坏或不是文本")
    if text.lstrip()[:1] in ("[", "{"):
        return read_json(path, text)
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    records, start, header = [], 1, None
    try:
        for cells in reader:
            if header is None:
                header = [name.strip() for name in cells]
                if len(set(header)) < len(header):
                    fail(3, f"{path}:1 表头有重复的列名：{', '.join(header)}")
            elif cells and len(cells) != len(header):
                fail(3, f"{path}:{start} 有 {len(cells)} 个单元格，表头有 {len(header)} 个：{visible(','.join(cells))[:60]}\n"
                        '单元格里的逗号要放进双引号，例如 "合同,法"')
            elif cells:
                records.append((start, dict(zip(header, cells))))
            start = reader.line_num + 1
    except csv.Error as error:
        fail(3, f"{path}:{start} 从这一行开始的引号没有配对（{error}）。单元格里的双引号要写成两个")
    return records


def read_json(path: str, text: str) -> list[tuple[int, dict]]:
    """(line, record) pairs of a JSON array or of JSON Lines, whatever the file is called."""
    array = text.lstrip().startswith("[")
    between, records, at = re.compile(r"[\s,\[\]]*" if array else r"\s*"), [], 0
    try:
        if array:
            json.loads(text)  # the loop below would not see a missing bracket
        while (at := between.match(text, at).end()) < len(text):
            record, end = json.JSONDecoder().raw_decode(text, at)
            line = text.count("\n", 0, at) + 1
            if not isinstance(record, dict):
                fail(3, f"{path}:{line} 应该是 {{…}} 对象，得到 {visible(text[at:end])[:40]}")
            records.append((line, record))
            at = end
    except (json.JSONDecodeError, RecursionError) as error:
        fail(3, f"{path}:{getattr(error, 'lineno', 1)} 不是有效的 JSON：{getattr(error, 'msg', '嵌套太深')}")
    return records


def load_rows(path: str) -> tuple[list[dict], list[str]]:
    """Rows ready to encode, and a sentence for each one dropped; the mapping of columns is printed. Exit 3 where there is none.

    A row is {"messages": [{"role", "content"}, …], "where": "file:line"}, or {"text": …, "where": …} for text learned whole.
    """
    records = read_table(path) or fail(3, f"{path} 里没有数据行")
    names = {str(name).strip().lower(): name for _, record in records for name in record}
    columns = {}
    for field, aliases in COLUMNS.items():
        found = [names[alias] for alias in aliases if alias in names]
        if len(found) > 1 and field not in names:
            fail(3, f"{path}:1 列 {'、'.join(found)} 都可以当作 {field}，请只留一列")
        columns |= {field: found[0]} if found else {}
    if "text" in names and not {"output", "messages"} & set(columns):
        columns = {"text": names["text"]}
    if not ({"text", "messages"} & set(columns) or {"instruction", "output"} <= set(columns)):
        odd = next((c for c in ";，；|" if len(names) == 1 and c in "".join(names)), "")
        fail(3, f"{path}:1 找不到 {'、'.join({'instruction', 'output'} - set(columns))} 列，现有的列是：{'、'.join(map(str, names.values()))}。\n"
                + (f"分隔符好像是“{odd}”，请换成英文逗号" if odd else "把问题列改名为 instruction（或 问题），回答列改名为 output（或 回答）"))
    unused = "、".join(str(name) for name in names.values() if name not in columns.values())
    say(f"数据 {path}：{len(records)} 行，列 " + "，".join(n if n == f else f"{n} → {f}" for f, n in columns.items()) + (f"（没有用到：{unused}）" if unused else ""))
    rows, dropped = [], []
    for line, record in records:
        where = f"{path}:{line}"
        cell = {field: record[name] if record.get(name) is not None else "" for field, name in columns.items()}
        if cell.get("messages"):
            row = {"messages": read_messages(cell["messages"], where)}
        elif "text" in cell:
            row = {"text": str(cell["text"]).strip()}
        else:
            texts = {field: str(value).strip() for field, value in cell.items()}
            turns = (("system", texts.get("system")), ("user", "\n".join(filter(None, (texts.get("instruction"), texts.get("input"))))), ("assistant", texts.get("output")))
            row = {"messages": [{"role": role, "content": text} for role, text in turns if text] if turns[1][1] and turns[2][1] else []}
        if row.get("text") or row.get("messages"):
            rows.append({**row, "where": where})
        else:
            dropped.append(f"{where}：问题或回答是空的")
    return rows or fail(3, f"{path} 里没有一行同时有问题和回答"), dropped


def read_messages(cell: Any, where: str) -> list[dict]:
    """OpenAI messages or ShareGPT conversations as [{"role", "content"}], up to the last assistant turn; [] where one is empty."""
    try:
        turns = json.loads(cell) if isinstance(cell, str) else cell
        roles = [ROLES.get(role, role) for role in (turn.get("role") or turn.get("from") for turn in turns)]
        messages = [{"role": role, "content": (turn.get("content") or turn.get("value") or "").strip()} for role, turn in zip(roles, turns)]
    except (ValueError, AttributeError, TypeError):
        fail(3, f'{where} 的对话应该是 [{{"role": "user", "content": "…"}}, …]')
    if bad := set(roles) - {"system", "user", "assistant"}:
        fail(3, f"{where} 的角色 {bad.pop()} 不认识，应为 system、user 或 assistant")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages if all(m["content"] for m in messages) else []


# ---- 4. Encoding: the same for training, chatting, comparing and evaluating ----

@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer) -> tuple[frozenset, re.Pattern]:
    """Ids of the added tokens (<|eot_id|> and its like), and a pattern that finds their texts."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    longest_first = sorted((re.escape(text) for text in added if len(text) > 1), key=len, reverse=True)
    return frozenset(added.values()), re.compile("|".join(longest_first) or r"(?!)")


def text_ids(tokenizer, text: str, first: bool = False) -> list[int]:
    """Ids of a piece of text that stands inside a longer one (`first`: at its start), with no BOS added.

    SentencePiece tokenizers put a space before whatever they are given; a newline in front, cut off again, keeps it away.
    """
    ids, newline, joined = tokenizer([text, "\n", "\n" + text], add_special_tokens=False).input_ids
    adds_space = joined != newline + ids and joined[:len(newline)] == newline
    return joined[len(newline):] if adds_space and not first else ids


def content_ids(tokenizer, text: str) -> list[int]:
    """Ids of what a person wrote: a control token typed in a cell stays ordinary text.

    The text is cut after the first character of every such token, and the pieces are tokenised apart.
    """
    control, pattern = control_tokens(tokenizer)
    cuts = [0, *(match.start() + 1 for match in pattern.finditer(text)), len(text)]
    ids = [i for a, b in itertools.pairwise(cuts) for i in text_ids(tokenizer, text[a:b])]
    if control.isdisjoint(ids):
        return ids
    return [i for char in text for i in text_ids(tokenizer, char) if i not in control]


@functools.lru_cache(maxsize=256)
def template_parts(tokenizer, template: str, roles: tuple[str, ...], prompt: bool) -> list:
    """The chat template's own text as lists of ids, with the number of a message where its content goes.

    Rendered once per sequence of roles, with marks for the contents, so that no content ever passes through the template.
    """
    from jinja2 import TemplateError
    marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
    try:
        dated = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda match: repr(TEMPLATE_DATE.strftime(match[2])), template)
        text = tokenizer.apply_chat_template([{"role": role, "content": mark} for role, mark in zip(roles, marks)], chat_template=dated,
                                             tokenize=False, add_generation_prompt=prompt, enable_thinking=False)
    except TemplateError as error:
        fail(4, f"模型的对话模板不接受 {' → '.join(roles)} 这样的对话：{error}")
    pieces = re.split("\ue000(\\d+)\ue001", text)
    if lost := [role for i, role in enumerate(roles) if str(i) not in pieces[1::2]]:
        fail(4, f"模型的对话模板丢掉了 {lost[0]} 的内容，这样的对话不能用来训练")
    return [int(piece) if n % 2 else text_ids(tokenizer, piece, first=n == 0) for n, piece in enumerate(pieces)]


def encode(tokenizer, messages: list[dict], max_length: int | None = None) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a conversation; labels are -100 but for the assistant's answers and their end tokens.

    Ending with an assistant turn it is a training row: exactly the inference prompt's ids, the answer, one end token.
    Otherwise it is the inference prompt. Where it is longer than `max_length`, the questions are cut first (from the
    oldest one's end, keeping a quarter of `max_length` for the prompt), then the answer, which then has no end token.
    """
    roles = tuple(m["role"] for m in messages)
    answered = roles[-1] == "assistant"
    parts = list(template_parts(tokenizer, tokenizer.chat_template, roles[:-1] if answered else roles, True))
    if answered:
        whole = template_parts(tokenizer, tokenizer.chat_template, roles, False)
        parts += whole[whole.index(len(roles) - 1):]
    control, _ = control_tokens(tokenizer)
    pieces = []  # [ids, learned, may be cut]
    for n, part in enumerate(parts):
        if isinstance(part, int):
            pieces.append([content_ids(tokenizer, messages[part]["content"]), roles[part] == "assistant", roles[part] == "user"])
            continue
        after_answer = n > 0 and roles[parts[n - 1]] == "assistant"
        end = next((k + 1 for k, i in enumerate(part) if i in control), 0) if after_answer else 0
        if answered and n == len(parts) - 1:
            pieces.append([part[:end] or [tokenizer.eos_token_id], True, False])
        else:
            pieces += [[part[:end], True, False], [part[end:], False, False]]
    if max_length:
        prompt = sum(len(ids) for ids, _, _ in (pieces[:-2] if answered else pieces))
        answer = sum(len(ids) for ids, _, _ in pieces[-2:]) if answered else 0
        over = prompt - max(max_length - answer, min(max_length // 4, prompt))
        for piece in pieces:
            if piece[2] and over > 0:
                over -= (cut := min(over, len(piece[0])))
                piece[0] = piece[0][:len(piece[0]) - cut]
    input_ids = [i for ids, _, _ in pieces for i in ids]
    labels = [i if learned else -100 for ids, learned, _ in pieces for i in ids]
    return input_ids[:max_length], labels[:max_length]


def end_token_ids(model, tokenizer) -> list[int]:
    """Every id that ends an answer: the model's, the tokenizer's, and the one that the template puts after an answer."""
    ends = {tokenizer.eos_token_id}
    for config in (model.generation_config, model.config):
        listed = getattr(config, "eos_token_id", None)
        ends |= set(listed if isinstance(listed, list) else [listed])
    ends.add(encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}])[0][-1])
    return sorted(ends - {None})


# ---- 5. Loading ----

def pick_device(name: str = "auto", dtype: str = "auto") -> tuple:
    """(device, torch dtype): the best device there is, or `name`; bf16 on CUDA (fp16 on cards without it), fp32 elsewhere,
    where half precision is tens of times slower (CPU) or overflows (MPS). Exit 2 where the device is missing.
    """
    import torch
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(d for d, found in there.items() if found) if name == "auto" else name
    if not there.get(device.partition(":")[0]):
        fail(2, f"这台机器没有 {device} 设备，可用的是 {'、'.join(d for d, found in there.items() if found)}")
    if device.startswith("cuda"):
        best = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return device, getattr(torch, best if dtype == "auto" else dtype)
    if dtype not in ("auto", "float32"):
        say(f"{device.upper()} 上改用 float32：{dtype} 在这里更慢或会溢出")
    return device, torch.float32


def find_model(path: str | None) -> str:
    """`path` if it is a model directory, or the folder of ORG/NAME in the local Hugging Face cache; else exit 4.

    None is the default model, or the demo model where only that has been downloaded.
    """
    path = path or (DEMO_MODEL if Path(DEMO_MODEL).is_dir() and not Path(DEFAULT_MODEL).is_dir() else DEFAULT_MODEL)
    if Path(path, "config.json").is_file():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        from huggingface_hub import snapshot_download

        with contextlib.suppress(Exception):  # no cache, half a cache: the cure is the same
            return snapshot_download(path, local_files_only=True)
        fail(4, f"本机没有模型 {path}。下载：python download_model.py --model {path}，再用 --model_name ./models/{path}")
    fail(4, f"{path} 不是模型目录（里面没有 config.json）。\n下载默认模型：python download_model.py；小的演示模型：python download_model.py --demo")


def load_tokenizer(path: str):
    """The tokenizer in `path`, with a pad token, padding on the left, and a chat template in any case."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - broken files raise a dozen unrelated types
        fail(4, f"{path} 里的 tokenizer 读不出来：{str(error).splitlines()[0][:200]}")
    if not tokenizer.chat_template:
        starts_with_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + PLAIN_TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_base(path: str, device: str, dtype, quantization: str = "none"):
    """The causal language model in `path` on `device`, in eval mode; safetensors only, no remote code."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging
    logging.disable_progress_bar()
    options = {}
    if quantization != "none":
        options = {"quantization_config": BitsAndBytesConfig(
            load_in_4bit=quantization == "4bit", load_in_8bit=quantization == "8bit", bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype), "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, use_safetensors=True, **options)
        return model.to(device).eval() if quantization == "none" else model.eval()
    except (torch.OutOfMemoryError, MemoryError):
        fail(6, f"内存不够，装不下模型 {path}。换小一些的模型，或在 CUDA 上加 --use_4bit")
    except Exception as error:  # noqa: BLE001 - broken files raise a dozen unrelated types
        fail(4, f"模型 {path} 读不出来：{str(error).splitlines()[0][:200]}\n检查文件：python download_model.py --verify {path}")


def sha256(data: str | bytes) -> str:
    """Hex digest of a text or of bytes."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def fingerprint(path: str) -> str:
    """sha256 over the name, the size and 64 sampled blocks of each weight file in `path`: a moment for 6 GB, not minutes."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as handle:
            for block in range(64):
                handle.seek(size * block // 64)
                digest.update(handle.read(4096))
    return digest.hexdigest()


def run_script(main) -> None:
    """Call `main`; Ctrl-C, a closed pipe, a full disk or memory end in a sentence and an exit code, not in a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 gets escapes, not a crash
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would fill a log with carriage returns
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("\n已停止")
        sys.exit(130)
    except BrokenPipeError:  # | head: what was asked for has been printed
        os._exit(141)
    except (MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename:
            fail(6, f"不能读写 {error.filename}：{error.strerror}。已完成的 checkpoint 没有受影响")
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
            fail(6, "磁盘满了。腾出空间后再运行同样的命令；已完成的 checkpoint 没有受影响")
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            fail(6, "内存不够。--batch_size 减半、--gradient_accumulation_steps 加倍（结果一样），或减小 --max_length，或加 --gradient_checkpointing")
        raise
