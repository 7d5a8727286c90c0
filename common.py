"""What two or more of the scripts need: flags, rows, encoding, loading. Nothing happens at import, and each function imports the heavy
libraries that it uses, so that it can be pasted elsewhere alone. train.py needs this one file and nothing else of the project."""

import argparse
import contextlib
import csv
import datetime
import difflib
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import random
import re
import sys
import threading
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

DEFAULT_MODEL, DEMO_MODEL = "./models/LLM-Research/Llama-3.2-3B-Instruct", "./models/SmolLM2-135M-Instruct"
TEMPLATE_DATE = datetime.date(2024, 7, 26)  # for a template that prints today's, as Llama-3.2's: training and chatting must see the same prompt
PLAIN_TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"  # where a tokenizer has none (GPT-2, OPT …); saved with the adapter
                  "{% elif m['role'] == 'user' %}### 问题：\n{{ m['content'] }}\n\n### 回答：\n{% else %}{{ m['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}")
COLUMNS = {  # names that people use for the same thing; the canonical one wins where several are there
    "instruction": ("instruction", "question", "query", "prompt", "text", "问题", "問題", "提问", "指令", "题目"),
    "input": ("input", "context", "输入", "背景", "补充信息"),
    "output": ("output", "answer", "response", "completion", "target", "回答", "答案", "输出", "回复"),
    "system": ("system", "system_prompt", "系统提示"), "history": ("history", "历史"),
    "messages": ("messages", "conversations", "conversation", "对话"), "image": ("image", "images", "图片", "图像")}
ROLES = dict.fromkeys(("human", "用户", "observation", "tool"), "user") | dict.fromkeys(("gpt", "bing", "bot", "助手", "function_call"), "assistant")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx")
FOREIGN = {rb"\x1f\x8b|BZh|\xfd7zXZ|Rar!|7z\xbc": "压缩包，请先解压", rb"\xd0\xcf\x11\xe0": "旧版 Excel（.xls）或加了密码的表，请去掉密码、另存为 .xlsx", rb"%PDF": "PDF，请把内容放进表格",
           rb"\s*<(?i:!doctype|html|\?xml|table)": "网页（HTML），请在 Excel 里打开后另存为 .xlsx"}
OUT_OF_MEMORY = "out of memory|can't allocate memory"  # in the words of CUDA, MPS and the CPU, whose errors have no type in common

# ---- 1. Words to the user ----

def say(*parts: Any, sep: str = " ") -> None:
    """Print progress to stderr; stdout is for results."""
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first one talks
        print(*parts, sep=sep, file=sys.stderr, flush=True)

def fail(code: int, message: str) -> NoReturn:
    """End the program with one clear sentence. Codes: 2 usage, 3 data, 4 model or adapter, 5 numeric, 6 resources."""
    print(f"错误：{message}", file=sys.stderr, flush=True)
    raise SystemExit(code)

def visible(text: str) -> str:
    """`text` with terminal control characters shown instead of obeyed (newline and tab stay)."""
    keep, bad = "\n\t\u200d", {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # U+200D joins emoji
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
            if math.isfinite(value := kind(text)) and (low < value if above else low <= value) and value <= high:
                return value
        raise argparse.ArgumentTypeError(f"“{text}”不行，应为{'大于' if above else '不小于'} {low:g}{f'、不大于 {high:g}' * (high < math.inf)}的{'整数' if kind is int else '数'}")
    return parse

def nearest(name: str, names) -> str:
    """“，你是不是想写 X？” for the closest of `names`, or nothing."""
    return "".join(f"，你是不是想写 {close}？" for close in difflib.get_close_matches(name, list(names), 1, 0.5)) or "。"

def make_parser(doc: str) -> argparse.ArgumentParser:
    """An ArgumentParser with `doc` as its help and --config; a mistake is one Chinese sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=OneNameHelp, allow_abbrev=False, usage="%(prog)s [参数 …]", add_help=False)
    words = {"argument ": "参数 ", "expected one argument": "后面缺少一个值", "expected at least one argument": "后面至少要有一个值",
             "invalid choice: ": "没有这个选项 ", "choose from": "可选", "not allowed with": "不能同时用"}
    parser.error = lambda message: fail(2, re.sub("|".join(words), lambda match: words[match[0]], message)
                                        + f"\n全部参数：python {Path(sys.argv[0]).name} --help")
    add = parser.add_argument_group("通用").add_argument
    add("--help", "-h", action="help", help="显示这份说明")
    add("--config", metavar="FILE", help="YAML 或 JSON 配置文件；命令行上写的参数优先")
    return parser

def add_loading_flags(add) -> None:
    """The flags of `pick_device`, `pick_quantization` and `load_base`; `add` is the add_argument of a parser's group."""
    add("--device", default="auto", help="auto、cuda、mps 或 cpu")
    add("--quantization", choices=("auto", "none", "4bit", "8bit"), default="none", help="量化加载基础模型：none、4bit、8bit，auto = 显存放不下才用 4bit")
    add("--use_4bit", "--use_quantization", "--load_in_4bit", dest="quantization", action="store_const", const="4bit", help="即 --quantization 4bit")
    add("--use_8bit", "--load_in_8bit", dest="quantization", action="store_const", const="8bit", help="即 --quantization 8bit")
    add("--trust_remote_code", action="store_true", help="允许运行模型目录里的代码（危险）")

def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse what was typed, hyphens and underscores alike, with the entries of a --config file as flags before the typed ones: argparse checks them
    too. A key that only a sibling script knows is skipped; one that none knows, like a mistyped flag, is exit 2 with the nearest name."""
    actions = parser._option_string_actions
    flags = {name.replace("-", "_"): name for name in actions if name.startswith("--")}
    typed = [re.sub("^--[^=]+", lambda match: flags.get(match[0].replace("-", "_"), match[0]), word) for word in sys.argv[1:]]
    words, config = [], parser.parse_known_args(typed)[0].config  # --help ends here
    yaml = importlib.import_module("yaml") if config else None
    try:
        entries = yaml.safe_load(Path(config).read_text(encoding="utf-8-sig")) if config else {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        place = f" 第 {error.problem_mark.line + 1} 行" if getattr(error, "problem_mark", None) else ""
        fail(2, f"配置文件 {config}{place} 读不出来：{getattr(error, 'problem', None) or getattr(error, 'strerror', None) or error}")
    isinstance(entries, dict) or fail(2, f"配置文件 {config} 里应该是“名字: 值”，每行一个")
    for key, value in entries.items():
        if (flag := flags.get("__" + (key := str(key).replace("-", "_")))) is None:
            if key not in (siblings := {n for p in Path(__file__).parent.glob("*.py") for n in re.findall(r'"--(\w+)"', p.read_text("utf-8"))}):
                fail(2, f"{config} 里的 {key} 不是任何脚本的参数{nearest(key, siblings)}")
        elif isinstance(value, bool) and actions[flag].nargs == 0:
            words += [flag] if value else [f"--no-{flag[2:]}"] if f"--no-{flag[2:]}" in actions else []
        elif isinstance(value, list) and actions[flag].nargs == "+":
            words += [flag, *map(str, value)]
        elif value is not None:
            words += [f"{flag}={v}" for v in (value if isinstance(value, list) and isinstance(actions[flag], argparse._AppendAction) else [value])]
    args, unknown = parser.parse_known_args(words + typed)
    unknown and fail(2, f"不认识的参数 {unknown[0]}{nearest(unknown[0].partition('=')[0], actions)}\n全部参数：python {Path(sys.argv[0]).name} --help")
    return args

# ---- 3. Rows ----

def decode(data: bytes, path: str, encoding: str | None = None) -> tuple[str, str]:
    """Text and encoding of `data`: `encoding`, or what a BOM says, or UTF-8, or GB18030, strictly; never a guess that garbles."""
    known = re.sub("(?i)^utf-?8$", "utf-8-sig", encoding or "") or {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}.get(data[:2])
    try:
        return data.decode(known or "utf-8-sig"), known or "utf-8-sig"
    except (UnicodeDecodeError, LookupError) as error:
        start, text = getattr(error, "start", 0), data.decode("gb18030", "replace")
    wide = re.sub("[\0-\x7f]+", "", text[:500_000])  # nearly any bytes are valid GB18030, so it must look like Chinese:
    usual = len(wide.encode("gb2312", "ignore")) / 2 >= 0.8 * len(wide)  # Big5, Shift-JIS and cp1252 fall outside of GB2312, EUC-KR inside,
    common = sum(map(wide.count, "的一是不了在有人我他这中大来上个国到说们为和你地出也时年要以会可能法问答，")) >= 0.05 * len(wide)
    utf8_line = rb"(?m)^[\0-\x09\x0b-\x7f]*(?:[\xe4-\xe9][\x80-\xbf]{2}[\0-\x09\x0b-\x7f]*){3,}$"
    if not known and usual and (common or len(wide) < 30) and text.encode("gb18030") == data and not re.search(utf8_line, data):
        return text, "gb18030"
    fail(3, f"{path}:{data.count(10, 0, start) + 1} 第 {start} 字节不是有效的 {(known or 'utf-8').upper()}"
            f"{'，整个文件也不像 GB18030 的中文' * (not known)}。\n在 Excel 里另存为“CSV UTF-8”后再试；知道编码就写出来，例如 --encoding big5、utf-16-le")

def read_table(path: str, encoding: str | None = None, known: frozenset = frozenset()):
    """(line, record) of each row of a CSV, TSV, JSON, JSONL, XLSX or Parquet file, whatever its name; (line, sentence) of a bad row.
    No cell moves, no text changes. `known` names of columns tell the delimiter. Exit 3 where the whole file is broken."""
    if not os.path.isfile(path):
        fail(3, f"{path} {'里没有数据文件（' + '、'.join(SUFFIXES) + '）' if os.path.isdir(path) else '不是普通文件'}" if os.path.exists(path) else f"没有数据文件 {path}{nearest(path, (str(p) for p in Path(path).parent.glob('*') if p.suffix in SUFFIXES))}")
    with open(path, "rb") as file:
        start = file.read(1000)
    if kind := next((kind for magic, kind in FOREIGN.items() if re.match(magic, start)), None):
        fail(3, f"{path} 其实是{kind}")
    try:
        if start[:4] == b"PAR1":
            batches = importlib.import_module("pyarrow.parquet").ParquetFile(path).iter_batches(1000)
            return (yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1))
        if start[:4] == b"PK\3\4":
            (title, cells), *others = importlib.import_module("pandas").read_excel(path, sheet_name=None, header=None, dtype=str, na_filter=False).items()
            if unread := "、".join(name for name, sheet in others if not sheet.empty):
                say(f"警告：{path} 只读第一张工作表“{visible(title)}”，没有读 {visible(unread)[:100]}。要用就把每张另存成一个文件")
            rows = cells.fillna("").replace({"_x000D_\n?": "\n", r"^([\d-]{10}) 00:00:00$": r"\1"}, regex=True).values.tolist()  # Excel's end of a line; a day without a time
    except Exception as error:  # noqa: BLE001 - broken files raise a dozen unrelated types
        fail(3, f"{path} 是 Excel、Parquet 或压缩包，但读不出来：{visible(str(error))[:100]}")
    if start[:4] != b"PK\3\4":
        text, name = decode(Path(path).read_bytes(), path, encoding)
        name == "utf-8-sig" or say(f"{path} 的编码是 {name.upper()}")
        if (head := text[:4000].lstrip("\ufeff \t\r\n"))[:1] in ("[", "{"):
            return (yield from read_json(path, text, head[0] == "["))
        titles, text = re.split("[\r\n]", head.lower())[0], ""
        delimiter = max(",\t;|，", key=lambda d: len(known & {title.strip(' "') for title in titles.split(d)}))  # the comma where none is known
        csv.field_size_limit(2**31 - 1)
        rows = csv.reader(open(path, encoding=name, newline=""), strict=True, delimiter=delimiter)  # noqa: SIM115
    header, end = [], 0
    try:
        for cells in rows:
            line, end = end + 1, getattr(rows, "line_num", end + 1)  # a row of a CSV may go over several lines
            if not any(header):
                header = [name.strip("\ufeff \t") for name in cells]
                if doubled := {name for name in header if name and header.count(name) > 1}:
                    fail(3, f"{path}:{line} 表头有重复的列名：{'、'.join(doubled)}。改成不同的名字再试")
            elif cells and len(cells) != len(header):
                yield line, f'有 {len(cells)} 个单元格，表头有 {len(header)} 个：{visible(",".join(cells))[:60]}\n单元格里的逗号要放进双引号，例如 "合同,法"'
            elif any(cells):
                yield line, dict(zip(header, cells))
    except csv.Error as error:  # nobody knows where the next row begins, so this one cannot be skipped
        fail(3, f"{path}:{end + 1} 从这一行开始的引号没有配对（{error}）。\n单元格里的双引号要写成两个，整个单元格放进双引号")

def read_json(path: str, text: str, array: bool):
    """Like read_table, of the text of a JSON array or of JSON Lines; numbers stay as they are written."""
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: dict(pairs) if len(dict(pairs)) == len(pairs) else int("重复的键"),
                               parse_int=str, parse_float=str, parse_constant=int)  # int() refuses NaN as well
    first, between = (r"\ufeff?\s*\[\s*", r"\s*,\s*") if array else (r"\ufeff?\s*", r"[ \t\r]*\n\s*")
    line, start, at = 1, 0, 0
    while (gap := re.compile(between if at else first).match(text, at)) and gap.end() < len(text):
        line, start = line + text.count("\n", start, gap.end()), gap.end()
        try:
            record, at = decoder.raw_decode(text, start)
            record = record if isinstance(record, dict) else f"应该是 {{…}} 对象，得到 {visible(str(record))[:40]}"
        except (ValueError, RecursionError) as error:
            record = f"不是有效的 JSON：{getattr(error, 'msg', str(error).rpartition(': ')[2])}"
            at = text.find("\n", start) % (len(text) + 1)  # -1, nowhere, becomes the end
            if array:
                fail(3, f"{path}:{getattr(error, 'lineno', line)} {record}")
        yield line if "\n" in gap[0] or not gap.start() else f"{line}:{start - text.rfind(chr(10), 0, start)}", record
    if text[at:].strip() != ("]" if array else ""):
        fail(3, f"{path}:{line + text.count(chr(10), start, at)} 不是有效的 JSON：{visible(text[at:].strip())[:40] or '没有用 ] 结束'}")

def find_columns(names: tuple, wanted: dict) -> dict:
    """{field: name of its column}, `wanted` being what the user says of it; ValueError with a sentence where it cannot be told."""
    known = {str(name).strip().lower(): name for name in names if name not in wanted.values()}
    listed = f"现有的列是：{visible('、'.join(map(str, names)))[:200]}"
    if missing := [f"{name} 列" for name in wanted.values() if name not in names] + [f"{field}= 这种写法" for field in wanted if field not in {*COLUMNS, "text"}]:
        raise ValueError(f"没有 {missing[0]}，{listed}；--columns 里左边写 {'、'.join(COLUMNS)} 或 text")
    settled = {*wanted, *(COLUMNS if "text" in wanted else ("history", "messages") if {"instruction", "output"} <= set(wanted) else ())}
    found = {field: [known[alias] for alias in aliases if alias in known] for field, aliases in COLUMNS.items() if field not in settled}
    if unclear := next((field for field, several in found.items() if len(several) > 1 and field not in known), None):
        raise ValueError(f"列 {'、'.join(found[unclear])} 都可以当作 {unclear}。只留一列，或写明 --columns {unclear}={found[unclear][0]}")
    columns = wanted | {field: several[0] for field, several in found.items() if several}
    if "text" in columns or "text" in known and not {"output", "messages"} & set(columns):
        return {"text": columns.get("text") or known["text"]}
    if "messages" in columns or not (missing := "、".join(sorted({"instruction", "output"} - set(columns)))):
        return columns
    raise ValueError(f"找不到 {missing} 列，{listed}。\n写明哪列是问题、哪列是回答：--columns instruction=列名,output=列名（列名要在第一行，上面的标题请删掉；没有这个参数的脚本，请改表头）")

def make_row(cells: dict, folder: Path) -> dict:
    """The row of {field: value}; {} where the question or an answer is empty, ValueError with a sentence where a cell is odd. The images of a
    row go with its first question: {"role": "user", "content", "images": [path, …]}, paths from `folder` on."""
    def text(*values) -> str:
        if odd := [cell for cell in values if isinstance(cell, (list, dict, bytes)) or re.search("[\0\ud800-\udfff]", str(cell))]:
            raise ValueError(f"应该是文字，得到 {visible(str(odd[0]))[:60]}")
        return "\n".join(filter(None, ("" if cell is None or isinstance(cell, float) and math.isnan(cell) else str(cell).strip() for cell in values)))
    if "text" in cells:
        return {"text": text(cells["text"])} if text(cells["text"]) else {}
    cells = {f: json.loads(cell) if f in ("messages", "history") and isinstance(cell, str) and cell else cell for f, cell in cells.items()}
    asked, told, past = map(cells.get, ("instruction", "output", "history"))  # TRL's prompt and completion may be messages
    turns = cells.get("messages") or [*(past or []), *(asked + told if isinstance(asked, list) else [[text(asked, cells.get("input")), told]])]
    said = [pair for turn in turns for pair in (
            [(turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value"))] if isinstance(turn, dict)
            else zip(("user", "assistant"), list.copy(turn), strict=True))]
    if text(cells.get("system")) and said[0][0] != "system":
        said.insert(0, ("system", cells["system"]))
    messages = [{"role": ROLES.get(role, role), "content": text(content)} for role, content in said]
    if images := cells.get("image") if isinstance(cells.get("image"), list) else re.findall(r"[^;；\n]*[^;；\s]", text(cells.get("image"))):
        asked, paths = next((m for m in messages if m["role"] == "user"), {"content": ""}), [str(folder / text(image)) for image in images]
        asked |= {"images": paths, "content": asked["content"].replace("<image>", "").strip()}  # where LLaMA-Factory marks its place, which is always in front here
        [importlib.import_module("prepare_data").open_image(path) for path in paths]
    if bad := {m["role"] for m in messages} - {"system", "user", "assistant"}:
        raise ValueError(f"的角色 {bad.pop()} 不认识，应为 system、user 或 assistant")
    messages = messages[:max((n for n, m in enumerate(messages, 1) if m["role"] == "assistant"), default=0)]  # up to the last answer
    return {"messages": messages} if any(m["role"] == "user" for m in messages) and all(m["content"] for m in messages) else {}

def stream_rows(path: str, encoding: str | None = None, columns: str | None = None, skip_bad_rows: bool = False):
    """One by one the rows that load_rows gives, and a sentence in the place of each that is dropped."""
    wanted = {field.strip(): name.strip() for field, _, name in (pair.partition("=") for pair in re.split("[,，]", columns or "")) if field.strip()}
    files = sorted(str(p) for p in Path(path).iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] not in ".~") if os.path.isdir(path) else [path]
    for file in [file for file in files if re.search("(?i)(?<![a-z])train|train(?![a-z])|训练", Path(file).name)] or files or [path]:  # of a folder that is split already, the part to learn
        mapped: dict = {}
        for line, record in read_table(file, encoding, frozenset(name.lower() for names in (wanted.values(), *COLUMNS.values()) for name in names)):
            where = f"{file}:{line}"
            try:
                if isinstance(record, str):
                    raise ValueError(record)  # noqa: TRY004 - it is a sentence
                if (names := tuple(record)) not in mapped:
                    mapped[names] = find_columns(names, wanted)
                    used = "，".join(name if name == field else f"{name} → {field}" for field, name in mapped[names].items())
                    say(f"数据 {file}：列 {used}（没有用到：{'、'.join(str(name) for name in names if name not in mapped[names].values()) or '无'}）")
                row = make_row({field: record[name] for field, name in mapped[names].items()}, Path(file).parent)
                yield {**row, "where": where} if row else f"{where}：问题或回答是空的"
            except (ValueError, TypeError, AttributeError) as error:
                problem = str(error) if type(error) is ValueError and not str(error).isascii() else '的对话应该是 [{"role": "user", "content": "…"}, …]'
                if not skip_bad_rows:
                    fail(3, f"{where} {problem}" + "\n跳过这样的行：train.py 和 prepare_data.py 加 --skip_bad_rows" * bool(mapped))
                yield f"{where}：{problem.splitlines()[0]}"

def load_rows(paths: str | list[str], encoding: str | None = None, columns: str | None = None, skip_bad_rows: bool = False, seed: int = 42):
    """(rows, a sentence for each one dropped) of files or folders; exit 3 where there is no row, or a bad one without `skip_bad_rows`.
    A row is {"messages": [{"role", "content"}, …], "where": "file:line"}, or {"text": …, "where": …} for text learned whole.
    `path:200` takes that many rows at random, `path:0.5` that share of them (2.0: each twice); hf:ORG/NAME and ms:ORG/NAME are downloaded."""
    rows, dropped = [], []
    for path in [paths] if isinstance(paths, str) else paths:
        name, amount = (path, "1.0") if os.path.exists(path) else re.fullmatch(r"(.*?)(?::(\d+(?:\.\d+)?))?", path).groups("1.0")
        files = importlib.import_module("download_model").fetch(name) if name[:3] in ("hf:", "ms:") else [name]  # nothing else goes to the network
        found = [row for file in files for row in stream_rows(file, encoding, columns, skip_bad_rows)]
        dropped += [row for row in found if isinstance(row, str)]
        found = [row for row in found if isinstance(row, dict)] or fail(3, f"{name} 里没有可以学的行{'（只读第一张工作表）' * name.endswith('.xlsx')}。{''.join(dropped[:1])}")
        n = max(1, round(float(amount) * (len(found) if "." in amount else 1)))
        rows += found * (n // len(found)) + random.Random(f"{seed} {name}").sample(found, n % len(found))
    if odd := [row["where"] for row in rows if re.search("[\0-\x08\v\f\x0e-\x1f\x7f\ufffd]", row.get("text") or "".join(m["content"] for m in row["messages"]))]:
        say(f"警告：{len(odd)} 行里有乱码（�）或控制字符，会照样学：{'、'.join(odd[:5])}{' 等' if odd[5:] else ''}")
    return rows, dropped

# ---- 4. Encoding: the same for training, chatting, comparing and evaluating ----

@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer) -> tuple[frozenset, re.Pattern]:
    """Ids of the added tokens (<|eot_id|> and its like, not runs of blanks), and a pattern that matches behind the first character of their texts."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip(" \t\r\n▁")}
    return frozenset(added.values()), re.compile(f"(?s)(?<=(?={'|'.join(re.escape(text) for text in added if len(text) > 1) or '(?!)'}).)")

def text_ids(tokenizer, text: str, first: bool = False) -> list[int]:
    """Ids of a piece of text that stands inside a longer one (`first`: at its start), with no BOS added. SentencePiece tokenizers put a
    space before whatever they are given; a character that no word has in front, cut off again, keeps it away."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if first or not ids or not tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁"):
        return ids
    mark, joined = tokenizer(["\ue000", "\ue000" + text], add_special_tokens=False).input_ids
    return joined[len(mark):]

def content_ids(tokenizer, text: str) -> list[int]:
    """Ids of what a person wrote: the text is cut after the first character of every control token typed in it, and stays ordinary text."""
    control, behind_first = control_tokens(tokenizer)
    ids = [i for piece in behind_first.split(text) for i in text_ids(tokenizer, piece)]
    return ids if control.isdisjoint(ids) else [i for char in text for i in text_ids(tokenizer, char) if i not in control]

@functools.lru_cache(maxsize=256)
def template_parts(tokenizer, template: str, roles: tuple[str, ...], images: tuple[int, ...], prompt: bool) -> tuple[list, list]:
    """(the chat template's own text as lists of ids; for each gap between two of them the number of the message whose content goes there and the
    space before it, one token with its first word). Rendered once per sequence of roles, with marks, so no content passes through the template."""
    watchdog = threading.Timer(10, lambda: (say(f"错误：模型的对话模板 10 秒还没有写完 {' → '.join(roles)} 这样的对话，没有用它"), os._exit(4)))
    watchdog.start()  # a template may loop without end
    try:
        dated = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda match: repr(TEMPLATE_DATE.strftime(match[2])), template)
        marks = [f"\ue000{role}{i}\ue001" for i, role in enumerate(roles)]
        text = tokenizer.apply_chat_template([{"role": role, "content": [*[{"type": "image"}] * n, {"type": "text", "text": mark}] if n else mark}
                                              for role, mark, n in zip(roles, marks, images)], chat_template=dated, tokenize=False, add_generation_prompt=prompt, enable_thinking=False)
    except Exception as error:  # noqa: BLE001 - a template is a program: it can fail in any way
        fail(4, f"模型的对话模板不接受 {' → '.join(roles)} 这样的对话：{visible(str(error))[:200]}")
    finally:
        watchdog.cancel()
    pieces = re.split("( (?=\ue000(?!assistant)))?\ue000\\D+(\\d+)\ue001", text[:1_000_000])  # before an answer the space is the prompt's
    if lost := [role for i, role in enumerate(roles) if str(i) not in pieces[2::3]]:
        fail(4, f"模型的对话模板丢掉了 {lost[0]} 的内容，这样的对话不能用来训练")
    texts = [text_ids(tokenizer, piece, first=n == 0) for n, piece in enumerate(pieces[::3])]
    return texts, [(int(i), space or "") for space, i in zip(pieces[1::3], pieces[2::3])]

def encode(tokenizer, messages: list[dict], max_length: int = sys.maxsize) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a conversation; labels are -100 but for the assistant's answers and their end tokens. Ending with an assistant turn
    it is a training row: exactly the inference prompt's ids, the answer, one end token. Otherwise it is that prompt. Over `max_length` the
    questions are cut first (from the oldest one's end, keeping a quarter of it for the prompt), then the answer, which then has no end token."""
    roles, images = tuple(m["role"] for m in messages), tuple(len(m.get("images", ())) for m in messages)
    _, processor, spans = importlib.import_module("prepare_data").see(tokenizer, messages) if any(images) else (None, None, [])
    answered = roles[-1] == "assistant"
    texts, gaps = template_parts(tokenizer, tokenizer.chat_template, roles[:-1] if answered else roles, images, True)
    texts = [*texts, template_parts(tokenizer, tokenizer.chat_template, roles, images, False)[0][-1]] if answered else texts
    if any(images):  # where the template has a token for an image, as many as the model makes of it
        texts = [[i for token in text for i in (spans.pop(0) if token == processor.image_token_id else [token])] for text in texts]
    pieces = [(texts[0], "")]  # (ids, whose they are): the assistant's are learned, the user's may be cut
    for (i, space), text in zip([*gaps, (len(roles) - 1, "")], texts[1:]):  # the last gap is the answer's, if there is a text behind it
        end = next((k + 1 for k, token in enumerate(text) if roles[i] == "assistant" and token in control_tokens(tokenizer)[0]), 0)
        pieces += [(content_ids(tokenizer, space + messages[i]["content"]), roles[i]), (text[:end], "assistant"), (text[end:], "")]
    if answered:  # one end token, and nothing after it
        pieces[-2:] = [(pieces[-2][0] or [tokenizer.eos_token_id], "assistant")]
    lengths = [len(ids) for ids, _ in pieces]
    over = max(0, min(sum(lengths) - max_length, sum(lengths[:-2] if answered else lengths) - max_length // 4))
    for question in (ids for ids, role in pieces if role == "user"):
        over -= (cut := min(over, len(question)))
        del question[len(question) - cut:]
    tokens = [(i, i if role == "assistant" else -100) for ids, role in pieces for i in ids][:max_length]
    return [i for i, _ in tokens], [label for _, label in tokens]

def image_inputs(model, tokenizer, messages: list[dict], input_ids) -> dict:
    """What a vision-language model takes beside `input_ids`, a tensor (rows, tokens), for the images of `messages`; {} where they have none."""
    if not any("images" in m for m in messages):
        return {}
    inputs, processor, _ = importlib.import_module("prepare_data").see(tokenizer, messages)
    shown = {name: x for name, x in inputs.to(model.device, model.dtype).items() if name not in getattr(processor, "unused_input_names", ())}
    return shown | {name: (input_ids == model.config.image_token_id).long() for name in ("mm_token_type_ids", "token_type_ids") if name in processor.model_input_names}

def end_token_ids(model, tokenizer) -> list[int]:
    """Every id that ends an answer: the model's, the tokenizer's, and the one that the template puts after an answer."""
    template_end = encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}])[0][-1]
    listed = [getattr(config, "eos_token_id", None) for config in (model.generation_config, model.config)]
    return sorted({tokenizer.eos_token_id, template_end, *(i for ids in listed for i in (ids if isinstance(ids, list) else [ids]))} - {None})

# ---- 5. Loading ----

def fast_products() -> None:
    """Let oneDNN multiply fp32 matrices, twice as fast on an AMD with AVX-512: MKL, which PyTorch takes, has only AVX2 for it. The setting lets oneDNN
    round to bf16, too, which it does where there is AMX: so it is tried on two matrices, and stays only where the product does."""
    import torch
    matmul, x = torch.backends.mkldnn.matmul, torch.linspace(0, 1, 2**14).view(128, 128)
    exact, matmul.fp32_precision = x @ x, "bf16" if "AMD" in torch.cpu.get_capabilities().get("cpu_name", "") else "ieee"
    matmul.fp32_precision = matmul.fp32_precision if torch.allclose(x @ x, exact, rtol=1e-5) else "ieee"

def pick_device(name: str = "auto", dtype: str = "auto", fast: bool = True) -> tuple:
    """(device, torch dtype): the best device there is, or `name`; bf16 on CUDA (fp16 on cards without it), fp32 elsewhere, where half
    precision is tens of times slower (CPU) or overflows (MPS). torchrun's LOCAL_RANK says which card. Exit 2 where the device is missing."""
    import torch
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(d for d, found in there.items() if found) if name == "auto" else name
    kind, card = device.partition(":")[0], os.environ.get("LOCAL_RANK") or device.partition(":")[2] or "0"
    if not there.get(kind) or kind == "cuda" and card not in map(str, range(torch.cuda.device_count())):
        fail(2, f"这台机器没有 {kind}:{card} 设备，可用的是 {'、'.join(d for d, found in there.items() if found)}")
    if kind == "cuda":
        torch.cuda.set_device(int(card))
        best = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return f"cuda:{card}", getattr(torch, best if dtype == "auto" else dtype)
    dtype in ("auto", "float32") or say(f"{device.upper()} 上改用 float32：{dtype} 在这里更慢或会溢出")
    fast and device == "cpu" and fast_products()
    return device, torch.float32

def pick_quantization(name: str, path: str, device: str) -> str:
    """`name`; for "auto" 4bit where the weights in `path`, two bytes each, leave activations and optimizer under 30 % of a card's free memory, else none."""
    device == "mps" and name in ("4bit", "8bit") and say("警告：MPS 上的量化又新又慢，不量化装得下就不要用")
    if name != "auto" or not device.startswith("cuda"):
        return name.replace("auto", "none")
    import torch
    need = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / (2 if '"float32"' in Path(path, "config.json").read_text(encoding="utf-8") else 1)
    free = torch.cuda.mem_get_info(device)[0]
    say(f"基础模型的半精度权重要 {need / 1e9:.1f} GB，显存空闲 {free / 1e9:.1f} GB：{'用 4bit' if need > 0.7 * free else '不量化'}")
    return "4bit" if need > 0.7 * free else "none"

def find_model(path: str | None) -> str:
    """The folder of a model: `path`, or of ORG/NAME in the local Hugging Face cache; for None the default, or the demo if only it is there. Else exit 4."""
    path = path or (DEMO_MODEL if Path(DEMO_MODEL).is_dir() and not Path(DEFAULT_MODEL).is_dir() else DEFAULT_MODEL)
    if Path(path, "config.json").is_file():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        from huggingface_hub import snapshot_download
        with contextlib.suppress(Exception):  # no cache, half a cache: the cure is the same
            return snapshot_download(path, local_files_only=True)
        fail(4, f"本机没有模型 {path}。下载：python download_model.py --model {path}，再用 --model_name ./models/{path}")
    fail(4, f"{path} 不是模型目录（里面没有 config.json）。\n下载默认模型：python download_model.py；小的演示模型：python download_model.py --demo")

def load_tokenizer(path: str, trust_remote_code: bool = False):
    """The tokenizer in `path`, with a pad token, padding on the left, and a chat template in any case."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        plain = "{{ bos_token }}" * (tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]) + PLAIN_TEMPLATE
        tokenizer.chat_template = tokenizer.get_chat_template() if tokenizer.chat_template else plain  # the default one of several
    except Exception as error:  # noqa: BLE001 - broken files raise a dozen unrelated types
        fail(4, f"{path} 里的 tokenizer 读不出来：{str(error).splitlines()[0][:200]}")
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    return tokenizer

def load_base(path: str, device: str, dtype, quantization: str = "none", trust_remote_code: bool = False):
    """The causal language model in `path` on `device`, in eval mode; safetensors only, no code from the model's folder unless trusted."""
    import transformers
    from safetensors import safe_open
    transformers.utils.logging.disable_progress_bar()
    bits = {} if quantization == "none" else {"device_map": {"": device}, "quantization_config": transformers.BitsAndBytesConfig(
        **{f"load_in_{quantization}": True}, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)}
    texts = "".join(p.read_text(encoding="utf-8") for p in Path(path).glob("*.json") if p.name in ("config.json", "model.safetensors.index.json"))
    if (key := re.search(r'"(auto_map|_attn_implementation_internal|(?:/|\w:|[^"]*(?:\.\.|\\))[^"]*\.safetensors)"', texts)) and not trust_remote_code:
        fail(4, f"{path} 里的 {visible(key[1])} 会运行模型自带的代码，或指向目录以外，没有加载。换一个模型；信任它就加 --trust_remote_code")
    try:
        for broken in sorted(Path(path).glob("*.safetensors")):  # the libraries do not say which file is cut short, or a pointer to it
            safe_open(broken, "pt")
        broken = path
        kind = transformers.AutoModelForImageTextToText if '"vision_config"' in texts else transformers.AutoModelForCausalLM
        model, info = kind.from_pretrained(path, output_loading_info=True, dtype=dtype, local_files_only=True, use_safetensors=True,
                                           trust_remote_code=trust_remote_code, **bits)
        if info["missing_keys"]:
            raise ValueError(f"缺少权重 {min(info['missing_keys'])}")  # the library would draw it at random
        return model.to(device).eval() if quantization == "none" else model.eval()
    except Exception as error:  # noqa: BLE001 - broken files raise a dozen unrelated types
        if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
            fail(6, f"内存不够，装不下模型 {path}。换小一些的模型，或在 CUDA 上加 --use_4bit，或加 --device cpu")
        fail(4, f"模型 {broken} 读不出来：{str(error).splitlines()[0][:200]}\n检查文件：python download_model.py --verify {path}")

def sha256(data: str | bytes) -> str:
    """Hex digest of a text or of bytes."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()

def question_digest(asked: dict) -> str:
    """What tells a question that was trained on, {"role", "content", maybe "images"}: 64 bits of a sha256, whatever the blanks and widths of its letters."""
    return sha256("".join([*unicodedata.normalize("NFKC", asked["content"]).split(), *(sha256(Path(path).read_bytes()) for path in asked.get("images", ()))]))[:16]

def fingerprint(path: str) -> str:
    """sha256 over the name, the size and 64 sampled blocks of each weight file in `path`: a moment for 6 GB, not minutes."""
    import numpy
    files = [(file.name, numpy.memmap(file, mode="r")) for file in sorted(Path(path).glob("*.safetensors"))]
    return sha256(b"".join(f"{name} {data.size}".encode() + b"".join(data[data.size * block // 64:][:4096] for block in range(64)) for name, data in files))

def run_script(main) -> None:
    """Call `main`; Ctrl-C, a closed pipe, a full disk or memory end in a sentence and an exit code, not in a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 gets escapes, not a crash
    logging.captureWarnings(True)  # the libraries' talk among themselves, into a log that nobody reads
    logging.getLogger("bitsandbytes").setLevel("ERROR")
    os.environ |= {} if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" else {"TQDM_DISABLE": "1"}  # bars would fill a log with carriage returns
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("\n已停止")
        sys.exit(130)
    except BrokenPipeError:  # | head: what was asked for has been printed
        os._exit(141)
    except ModuleNotFoundError as error:
        fail(2, f"缺少 {error.name}。项目自己的：把 {error.name}.py 放在脚本旁边；别的：{sys.executable} -m pip install {error.name}")
    except Exception as error:  # on a full disk safetensors and tokenizers raise types of their own
        if isinstance(error, OSError) and error.filename:
            fail(6, f"不能读写 {error.filename}：{error.strerror}。已完成的 checkpoint 没有受影响")
        if re.search(r"No space left|(?i:errno|os error) (27|28|69|122)\b|requested and \d+ written", str(error)):  # EFBIG, ENOSPC, EDQUOT
            fail(6, "磁盘满了。腾出空间后再运行同样的命令；已完成的 checkpoint 没有受影响")
        if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
            fail(6, "内存不够。训练：--batch_size 减半、--gradient_accumulation_steps 加倍（结果一样），或加 --gradient_checkpointing；回答：减小 --answer_batch_size")
        if "RANK" in os.environ and isinstance(error, RuntimeError) and re.search("(?i)gloo|nccl|connection|peer", str(error)):
            fail(6, f"和别的训练进程断了联系（{str(error).splitlines()[0][:150]}）。已有的 checkpoint 完好：同样的命令加 --resume_from_checkpoint auto 接着训练")
        raise
