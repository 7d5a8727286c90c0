"""把各种来源的数据整理成训练、验证、测试三个文件；同一个问题，包括换了几个字的，只进其中一个，测试题就不会在训练时见过。

  python prepare_data.py --create_sample 100                   # 先写一份示例数据试一试
  python prepare_data.py --input 我的数据.xlsx --output_dir datasets/我的数据
  python prepare_data.py --input 评论.csv --task_type classification --text_column 评论 --label_column 类别

读：CSV/TSV/JSON/JSONL/XLSX/Parquet，它们的目录，hf:ORG/NAME 或 ms:ORG/NAME（只有写了才联网下载）；列名和 train.py 一样认。空的、
太长太短的、和前面某行完全相同的去掉。写：输出目录里的 train、validation、test（.jsonl 或 .csv）和 data_report.md，报告也打印出来。
"""

import csv
import functools
import json
import os
import random
import re
import sys
import tempfile
import unicodedata
from array import array
from collections import Counter, defaultdict
from itertools import groupby, islice
from pathlib import Path

from common import fail, make_parser, number, parse_args, run_script, say, sha256, stream_rows, visible
from download_model import fetch

SPLITS = {"train": "训练", "validation": "验证", "test": "测试"}
FORMATS = {"alpaca": ("instruction", "input", "output", "system", "image"), "qa": ("question", "answer", "system", "image"),
           "messages": ("messages", "image"), "text": ("text",)}  # columns; system and image only where there are some
HASHES = 128  # in bands of 4: two questions that share 60 % of their trigrams are found with 1 - (1 - 0.6 ** 4) ** 32 = 98.8 %; 70 %: 99.98 %

# ---- 1. Rows ----

def ask_and_answer(row: dict) -> tuple[str, str]:
    """What is asked in a row and what is answered, all turns of a conversation; of a text learned whole, the text and nothing."""
    turns = row.get("messages") or [{"role": "user", "content": row["text"]}]
    return tuple("\n".join(m["content"] for m in turns if m["role"] == role) for role in ("user", "assistant"))

def make_record(row: dict, columns: list[str], instruction: str) -> dict:
    """The row's cells under `columns`, without a system or image that it lacks; `instruction` (of a classification) comes before the question."""
    if "text" in row:
        return {"text": row["text"]}
    turns = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    question, answer = turns[-2]["content"], turns[-1]["content"]
    turns[-2]["content"] = asked = f"{instruction}\n{question}" if instruction else question
    images = [os.path.abspath(path) for m in row["messages"] for path in m.get("images", ())]
    cells = {"messages": turns, "text": "\n".join(m["content"] for m in turns), "question": asked, "answer": answer,
             "instruction": instruction or question, "input": question if instruction else "", "output": answer,
             "system": turns[0]["content"] if turns[0]["role"] == "system" else None, "image": ";".join(images) or None}
    return {name: cells[name] for name in columns if cells[name] is not None}

def write_records(path: Path, records, columns: list[str]) -> None:
    """JSON Lines, or a CSV that Excel opens, by the name of `path`; in one stroke."""
    from tqdm import tqdm
    staging, records = path.with_name(f".tmp-{path.name}"), tqdm(records, desc=f"写 {path.name}", unit="行")
    with open(staging, "w", newline="", encoding="utf-8-sig" if path.suffix == ".csv" else "utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows({name: cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False) for name, cell in r.items()} for r in records)
        else:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    os.replace(staging, path)

# ---- 2. Images ----

def open_image(path: str):
    """The image in a file, upright and in RGB; ValueError with a sentence where there is none, a broken one, or one too large or too long."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path, formats=("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")) as image:  # other formats start other programs
            if image.width * image.height <= 50_000_000 and max(image.size) < 200 * min(image.size):  # Qwen-VL takes none that is longer
                return ImageOps.exif_transpose(image).convert("RGB")
        problem = f"有 {image.width} × {image.height} 像素，要在 5000 万以内，长不到宽的 200 倍"
    except Exception as error:  # noqa: BLE001 - broken and hostile files raise a dozen unrelated types
        problem = "不存在" if isinstance(error, FileNotFoundError) else f"打不开：{visible(str(error))[:100]}"
    raise ValueError(f"图片 {visible(path)} {problem}")

@functools.lru_cache(maxsize=2)
def image_processor(path: str):
    """The library's processor for the images of the vision-language model in `path`: Qwen-VL's own wants torchvision, for videos."""
    import transformers
    try:
        kind = transformers.models.auto.processing_auto.PROCESSOR_MAPPING[type(transformers.AutoConfig.from_pretrained(path))]
        return type("ImageProcessor", (kind,), {"get_attributes": staticmethod(lambda: ["image_processor", "tokenizer"])}).from_pretrained(path)
    except Exception as error:  # noqa: BLE001 - no processor, no files, broken ones: a dozen unrelated types
        fail(4, f"数据里有图片，模型 {path} 看不了（{visible(str(error))[:150]}）。换 Qwen3-VL、Qwen2.5-VL 这样的模型；只学文字就去掉 image 列")

def see(tokenizer, messages: list[dict]) -> tuple:
    """(what a model takes for the images of `messages`, its processor, for each of them the ids that its token in the chat template becomes)."""
    processor, paths = image_processor(tokenizer.name_or_path), [path for m in messages for path in m.get("images", ())]
    try:
        inputs = processor.image_processor([open_image(path) for path in paths], return_tensors="pt")
    except ValueError as error:
        fail(3, f"{visible(str(error))[:200]}（图片：{visible('、'.join(paths))[:200]}）")
    return inputs, processor, tokenizer([processor.replace_image_token(inputs, k) for k in range(len(paths))], add_special_tokens=False).input_ids

# ---- 3. Rows that ask the same stay together ----

def sketch(texts: list[str]):
    """MinHash signatures, numpy bytes (texts, HASHES): two texts agree in that share of bytes in which their character trigrams overlap."""
    import numpy as np
    codes, ends = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32), np.cumsum([len(text) for text in texts])
    cuts = np.append(0, np.stack([ends - 2, ends], axis=1))[:-2]  # every second piece runs over into the next text
    mixed = codes[:-2] * np.uint32(0x9E3779B1) + codes[1:-1] * np.uint32(0x85EBCA77) + codes[2:] * np.uint32(0xC2B2AE3D)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ mixed >> shift) * np.uint32(factor)
    draws = np.random.RandomState(0).randint(0, 2**32, (HASHES, 2), dtype=np.uint32)  # the same in every numpy
    lowest = [np.minimum.reduceat((mixed ^ mixed >> 16 ^ salt) * (factor | np.uint32(1)), cuts)[::2] for salt, factor in draws]
    return (np.stack(lowest, axis=1) * np.uint32(0x9E3779B1) >> 24).astype(np.uint8)

def find_groups(read, total: int, similarity: float):
    """For each of the rows read(0) … read(total - 1) the first row of its group, and the first with the same question (numpy integers).
    A group is what hangs together by pairs of questions whose trigrams overlap by `similarity` (1 = only the same). Likely
    pairs come from sorting the signatures by four bytes at a time; whether they are alike is decided on the questions."""
    import numpy as np
    from tqdm import tqdm
    sample = range(0, total, total // 5000 + 1)
    lines = Counter(line for i in sample for line in set(ask_and_answer(read(i))[0].split("\n")))
    shared = {line for line, n in lines.items() if n >= max(5, len(sample) / 100)}  # an instruction over many inputs would make all alike
    def key(i: int) -> str:
        row = read(i)  # an image is asked about in the same words as the others: it is what tells rows apart
        question = "".join(sha256(Path(path).read_bytes()) for m in row.get("messages", ()) for path in m.get("images", ())) or ask_and_answer(row)[0]
        text = "\n".join(line for line in question.split("\n") if line not in shared) or question
        text = unicodedata.normalize("NFKC", text).casefold()
        return (re.sub(r"[\W_]+", "", text) or "".join(text.split())).ljust(3)
    @functools.lru_cache(maxsize=20_000)
    def trigrams(i: int) -> frozenset:
        return frozenset(re.findall("(?=(...))", key(i)))
    def root(i: int) -> int:
        while groups[i] != i:
            i = groups[i]
        return int(i)
    hashes, signatures = array("q"), np.empty((total, HASHES), np.uint8)
    questions = iter(tqdm(map(key, range(total)), desc="比较问题", unit="行", total=total))
    while texts := list(islice(questions, 512)):
        signatures[len(hashes):len(hashes) + 512] = sketch(texts)
        hashes.extend(map(hash, texts))
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    groups, same, first = first[inverse], first[inverse], np.sort(first)
    for band in tqdm(signatures.view(np.uint32).T if similarity < 1 else (), desc="找相近的", unit="遍"):
        order = first[np.argsort(band[first], kind="stable")]
        keys = band[order]
        for gap in (1, 2, 3):  # among many equal keys not every pair is looked at; the other bands sort them otherwise
            for at in np.array_split(np.flatnonzero(keys[gap:] == keys[:-gap]), 1 + len(keys) // 50_000):
                left, right = order[at], order[at + gap]
                likely = (groups[left] != groups[right]) & ((signatures[left] == signatures[right]).mean(axis=1) > similarity - 0.15)
                for i, j in zip(left[likely].tolist(), right[likely].tolist()):
                    low, high = sorted((root(i), root(j)))
                    if low != high and len(trigrams(i) & trigrams(j)) >= similarity * len(trigrams(i) | trigrams(j)):
                        groups[high] = low
        while (groups != groups[groups]).any():
            groups = groups[groups]
    return groups[same], same

def choose_splits(groups: list[int], strata: list[str], ratios: dict[str, float], seed: int) -> list[str]:
    """The split of each row: groups stay whole, each stratum gives its share, and what rounding leaves goes to the next one."""
    sizes, chosen, owed, rng = Counter(groups), {}, dict.fromkeys(ratios, 0.0), random.Random(seed)
    shares = {split: max(1, int(ratio * len(groups) + 0.5)) / len(groups) if ratio else 0.0 for split, ratio in ratios.items()}
    for _, members in groupby(sorted(sizes, key=strata.__getitem__), strata.__getitem__):  # a group belongs to the stratum of its first row, its name
        rng.shuffle(members := list(members))
        total = left = sum(sizes[group] for group in members)
        for split, share in shares.items():
            owed[split] += share * total
            for part in (1, 0.5):  # what fits; then what is larger than the gap, but not twice as large
                for group in members:
                    if group not in chosen and part * sizes[group] <= int(owed[split] + 0.5) and sizes[group] < left:  # one row stays for training
                        chosen[group], owed[split], left = split, owed[split] - sizes[group], left - sizes[group]
    return [chosen.get(group, "train") for group in groups]

# ---- 4. Something to try ----

def sample_row(rng: random.Random) -> dict:
    """A made-up row in Chinese, whose answer follows from its question."""
    who, city, thing = (rng.choice(words.split()) for words in ("小明 小红 王芳 李强 张伟 刘洋", "北京 上海 成都 西安 武汉", "台灯 水壶 背包 耳机 雨伞 键盘"))
    a, b, n = rng.randint(2, 9), rng.randint(3, 30), rng.randint(8, 300)
    return dict(zip(("instruction", "input", "output"), rng.choice((
        (f"{who}买了{a}个{thing}，每个{b}元，付了{a * b + n}元，应该找回多少？", "", f"一共是{a}×{b}={a * b}元，应该找回{n}元。"),
        (f"今天是星期一，再过{n}天是星期几？", "", f"{n}除以7余{n % 7}，所以是星期{'一二三四五六日'[n % 7]}。"),
        ("从通知里找出时间和地点。", f"{thing}的使用培训改到{b}日{a}点，在{city}分店，请{who}转告大家。", f"时间：{b}日{a}点；地点：{city}分店。")))))

def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("读和写").add_argument
    add("--input", "--input_file", nargs="+", help="数据文件、目录、hf:ORG/NAME 或 ms:ORG/NAME，可以几个")
    add("--columns", help="哪列是什么，如 instruction=问题,output=回答")
    add("--encoding", help="文件的编码；默认自己认")
    add("--skip_bad_rows", action="store_true", help="跳过有错的行并列出来，而不是停下")
    add("--output_dir", default="./datasets/prepared", help="输出目录")
    add("--overwrite", action="store_true", help="替换输出目录里原有的结果")
    add("--format", choices=("jsonl", "csv"), default="jsonl", help="文件格式：jsonl、csv")
    add("--format_type", choices=tuple(FORMATS), help="列：alpaca、qa、messages、text；默认按内容选")
    add("--create_sample", type=number(int, 1, 10_000), metavar="N", help="只写 N 行示例数据")
    add = parser.add_argument_group("筛选和划分").add_argument
    add("--val_ratio", type=number(float, 0, 0.9), default=0.1, help="分作验证的比例（0 = 不分）")
    add("--test_ratio", type=number(float, 0, 0.9), default=0.1, help="分作测试的比例（0 = 不分）")
    add("--seed", type=number(int, 0, 2**31), default=42, help="随机种子")
    add("--similarity", type=number(float, 0.5, 1), default=0.6, help="三字片段重合多少算相近（1 = 只看相同）")
    add("--min_chars", type=number(int, 0), default=0, help="问题加回答至少多少字")
    add("--max_chars", type=number(int, 0), default=0, help="问题加回答至多多少字（0 = 不限）")
    add = parser.add_argument_group("分类").add_argument
    add("--task_type", choices=("generation", "classification"), default="generation", help="任务：generation、classification")
    add("--text_column", help="文本的列名；分类默认 text")
    add("--label_column", help="标签的列名；默认 label")
    args = parse_args(parser)
    classify, folder = args.task_type == "classification" or bool(args.label_column), Path(args.output_dir)
    if args.val_ratio + args.test_ratio >= 1:
        fail(2, f"--val_ratio {args.val_ratio:g} 加 --test_ratio {args.test_ratio:g} 要小于 1，给训练留一些")
    if not args.input and not args.create_sample:
        fail(2, "用 --input 写出数据文件；还没有数据，先写一份示例：python prepare_data.py --create_sample 100")
    files = {name: folder / f"{name}.{args.format}" for name in (["sample"] if args.create_sample else SPLITS)}
    old = [path for file in files.values() for suffix in (".jsonl", ".csv") if (path := file.with_suffix(suffix)).exists()]
    if hit := [name for path in old for name in args.input or [] if os.path.exists(name) and (path.samefile(name) or path.parent.samefile(name))]:
        fail(2, f"{hit[0]} 就在输出的位置上，会被覆盖。换一个 --output_dir")
    if old and not args.overwrite:
        fail(2, f"{old[0]} 已经有了。要替换就加 --overwrite，或者换一个 --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    if args.create_sample:
        rng, sample = random.Random(args.seed), {}
        while len(sample) < args.create_sample:
            sample |= {(row := sample_row(rng))["instruction"] + row["input"]: row}
        write_records(files["sample"], sample.values(), list(row))
        say(f"写了 {len(sample)} 行示例数据。接着划分：python prepare_data.py --input {files['sample']}")
        return print(files["sample"])

    # ---- Read and drop; the rows wait in a temporary file, so that a million of them fit ----
    from tqdm import tqdm
    text = f"text={args.text_column}" if args.text_column else args.columns
    columns = f"instruction={args.text_column or 'text'},output={args.label_column or 'label'}" + f",{args.columns}" * bool(args.columns) if classify else text
    spool, starts, lengths, labels, seen = tempfile.TemporaryFile(dir=folder), array("q"), array("q"), [], set()  # noqa: SIM115
    drops, kinds = defaultdict(list), {}
    sources = (row for source in args.input for path in fetch(source) for row in stream_rows(path, args.encoding, columns, args.skip_bad_rows))
    for row in tqdm(sources, desc="读数据", unit="行"):
        if isinstance(row, str):
            drops[(parts := re.match(r"(?s)(.*?:[\d:]+)：([^：]*)", row))[2]].append(parts[1])
            continue
        where, question, answer = row["where"], *ask_and_answer(row)
        length, whole = len(question) + len(answer), hash(json.dumps({**row, "where": ""}))
        if reason := "和前面的某行完全相同" if whole in seen else "太短" if length < args.min_chars else "太长" if 0 < args.max_chars < length else "":
            drops[reason].append(where)
            continue
        seen.add(whole)
        starts.append(spool.tell())
        spool.write(json.dumps(row).encode() + b"\n")
        lengths.append(length)
        labels.append(sys.intern(" ".join(answer.split())) if classify else "")
        roles = "".join(m["role"][0] for m in row.get("messages", []))
        kinds.setdefault("text" if not roles else "alpaca" if roles in ("ua", "sua") else "messages", where)
        kinds |= ({"system": where} if roles[:1] == "s" else {}) | ({"image": where} if any("images" in m for m in row.get("messages", ())) else {})
    total, n, names = len(starts) + sum(map(len, drops.values())), len(starts), Counter(labels)
    if not n:
        fail(3, f"{args.input[0]} 的 {total} 行全被去掉了：{'，'.join(f'{reason} {len(where)} 行' for reason, where in drops.items())}")
    if classify and not 2 <= len(names) <= max(2, min(200, n // 2)):
        fail(3, f"{args.label_column or 'label'} 列有 {len(names)} 种值（共 {n} 行），不像标签。用 --label_column 写出标签的列名")
    format_type = args.format_type or next(kind for kind in ("text", "messages", "alpaca") if kind in kinds)
    misfits = {"text": () if args.format_type else ("messages", "alpaca"), "messages": ("text",)}.get(format_type, ("text", "messages"))
    for kind in set(misfits) & set(kinds):
        fail(2, f"{kinds[kind]} 是{'整段文字' if kind == 'text' else '对话'}，{format_type} 放不下。用 --format_type {'text' if 'text' in kinds else 'messages'}")

    def read(i: int) -> dict:
        spool.seek(starts[i])
        return json.loads(spool.readline())
    # ---- Group, split, write ----
    groups, same = find_groups(read, n, args.similarity)
    splits = choose_splits(groups.tolist(), labels, {"test": args.test_ratio, "validation": args.val_ratio}, args.seed)
    count = Counter(zip(splits, labels))
    instruction = f"判断下面的文本属于哪一类，只回答类别。类别：{'、'.join(sorted(names))}" if classify else ""
    header = [name for name in FORMATS[format_type] if name in kinds or name not in ("system", "image")]
    written = [split for split in SPLITS if split in splits]
    for split in written:
        write_records(files[split], (make_record(read(i), header, instruction) for i in range(n) if splits[i] == split), header)
    for path in set(old) - {files[split] for split in written}:  # only now that the new ones are whole
        path.unlink()

    # ---- Report ----
    lengths, by_group = sorted(lengths), groupby(groups.argsort(kind="stable"), groups.__getitem__)
    alike = sorted((rows for _, members in by_group if len(rows := list(members)) > 1), key=len, reverse=True)
    def listed(wheres: list[str], limit: int) -> str:
        return "、".join(wheres[:limit]) + (" 等" if len(wheres) > limit else "")
    def report(limit: int) -> str:
        lines = ["# 数据报告", "", f"{'、'.join(args.input)}：读入 {total} 行，去掉 {total - n} 行，写出 {n} 行（{format_type}）", "", "## 划分", ""]
        lines += [f"- {files[split]}（{name}）：{splits.count(split)} 行，{splits.count(split) / n:.1%}" for split, name in SPLITS.items() if split in splits]
        lines += ["", "## 去掉的行", "", *([f"- {reason}：{len(wheres)} 行（{listed(wheres, limit)}）" for reason, wheres in drops.items()] or ["没有"])]
        lines += ["", "## 相近的问题", "", f"{len(alike)} 组，共 {sum(map(len, alike))} 行，每组都在同一个文件里；其中 {int((same != range(n)).sum())} 行的问题和前面某行相同、回答不同"]
        lines += [f"- {len(rows)} 行：{listed([read(i)['where'] for i in rows[:limit + 1]], limit)}" for rows in alike[:limit]]
        lines += ["", "## 长度（问题加回答的字数）", "", f"最短 {lengths[0]}，中位 {lengths[n // 2]}，95% 不超过 {lengths[int(n * 0.95)]}，最长 {lengths[-1]}"]
        if classify:
            lines += ["", "## 标签", "", "| 标签 | 全部 | 训练 | 验证 | 测试 |", "|---|---|---|---|---|"]
            lines += [f"| {label} | {some} | {' | '.join(str(count[split, label]) for split in SPLITS)} |" for label, some in names.most_common()]
            ratio = max(names.values()) / min(names.values())
            lines += ["", f"最多的标签是最少的 {ratio:.1f} 倍" + ("：很不均衡，给少的补一些，评估时看每一类的召回率" if ratio > 5 else "")]
        return "\n".join(lines)

    (folder / "data_report.md").write_text(report(1000) + "\n", encoding="utf-8")
    print(report(5))
    say(f"报告在 {folder / 'data_report.md'}。接着训练：python train.py --dataset_name {files['train']}" + f" --val_data {files['validation']}" * ("validation" in splits))

if __name__ == "__main__":
    run_script(main)
