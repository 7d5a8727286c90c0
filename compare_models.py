"""微调前后对比：同样的问题，原模型和微调后的模型各答一遍，并排打印，也可以写成一个能发给同事的网页。

  python compare_models.py --test_file test_questions.txt      # 用 output/ 里最新的 LoRA
  python compare_models.py --test_file datasets/legal_qa_test.csv --report report.html --json report.json
  python compare_models.py --prompt "劳动合同纠纷如何处理？" --lora_weights A/final_model --lora_weights B/final_model

读：LoRA（可以写几个，一起比较）、它的基础模型、问题文件（一行一个；数据表里的回答当作参考）。写：对比到标准输出，--report 的网页，
--json 的全部数字。内存里只有一个模型：关掉 LoRA 是微调前，打开是微调后。
"""

import base64
import contextlib
import difflib
import hashlib
import html
import itertools
import json
import math
import re
import statistics
import time
import unicodedata
from pathlib import Path

from common import fail, parse_args, run_script, say, visible
from inference import can_fold, conversation, find_adapter, generate, generation_options, keep_questions, load_adapter, load_model, make_inference_parser, read_questions, run_record

VERDICTS = {"better": "更好", "worse": "更差", "higher": "更高", "lower": "更低", "no difference shown": "看不出差别"}

NUMERAL = r"[零〇一二三四五六七八九十百千\d]{1,12}"
ARTICLE = rf"第\s*({NUMERAL})\s*条(?:\s*之\s*({NUMERAL})(?!\s*[条款项]))?"

# ---- 1. Citations ----

def read_number(text: str) -> int:
    """一百三十三 → 133, 十五 → 15, 577 → 577."""
    if not set("十百千") & set(text):
        return int("".join(str(int(unicodedata.numeric(char))) for char in text))
    pairs = re.findall(r"([一二三四五六七八九\d]?)([十百千]?)", text)
    return sum(int(unicodedata.numeric(digit or "一") * unicodedata.numeric(unit or "一")) for digit, unit in pairs if digit or unit)

def find_citations(text: str, laws: dict[str, set]):
    """(start, end, citation, status) of each article cited: 《刑法》第一百三十三条之一 is "刑法 133-1"; a law in `laws` needs no 《》.
    Status: "real"; "missing" where the law has no such article; "unknown" where `laws` lacks the law, which may exist all the same."""
    names = "|".join(map(re.escape, sorted(laws, key=len, reverse=True))) or "(?!)"
    clause = rf"(?:\s*第\s*{NUMERAL}\s*款)?(?:\s*第?\s*[（(]?{NUMERAL}[）)]?\s*项)?"
    articles = re.sub(r"\((?!\?)", "(?:", ARTICLE)
    pattern = rf"(?:《([^《》]{{1,80}})》|({names}))(?:[（(][^（）()]{{0,20}}[）)])?((?:\s*[、，,和及与或者以]{{0,2}}\s*{articles}{clause})+)"
    for match in re.finditer(pattern, text):
        law = (match[1] or match[2]).strip().removeprefix("中华人民共和国")
        for n, article in enumerate(re.finditer(ARTICLE, match[3])):
            number = "-".join(str(read_number(part)) for part in article.groups() if part)
            status = "unknown" if law not in laws else "real" if number in laws[law] else "missing"
            yield match.start(3) + article.start() if n else match.start(), match.start(3) + article.end(), f"{law} {number}", status

# ---- 2. One model against the other ----

def bootstrap(statistic, base, tuned, seed: int, resamples: int = 10_000):
    """95 % interval of statistic(tuned) − statistic(base), for vectors (…, rows, k): rows are drawn with replacement, the same for both.
    `statistic` takes sums (…, k) over rows. The percentiles are widened as Student's t widens the normal interval, for with few rows they
    cover too little (Hesterberg 2015, "expanded percentile"). nan where one resample in twenty has nothing to score."""
    import numpy as np
    draw, rows = np.random.default_rng(seed), base.shape[-2]
    draws = (draw.multinomial(rows, np.full(rows, 1 / rows), 500).astype(float) for _ in range(resamples // 500))
    differences = np.concatenate([statistic(times @ tuned) - statistic(times @ base) for times in draws], -1)
    z, free = 1.959964, max(1, rows - 1)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)  # Student's quantile
    tail = statistics.NormalDist().cdf(-t * math.sqrt(rows / free))
    scored = np.isnan(differences).mean(-1) < 0.05
    return np.where(scored, np.nanquantile(np.where(scored[..., None], differences, 0), [tail, 1 - tail], axis=-1), np.nan)

def versus(statistic, base, tuned, better: int, seed: int) -> dict | None:
    """tuned − base with its interval, in how many rows which is ahead, and the word that follows from the interval alone.
    `better`: 1 where more is better, -1 where less is, 0 where neither is. None where one of them has no score."""
    difference, by_row = float(statistic(tuned.sum(0)) - statistic(base.sum(0))), statistic(tuned) - statistic(base)
    if not math.isfinite(difference):
        return None
    low, high = map(float, bootstrap(statistic, base, tuned, seed))
    wins, losses, ties = (int(n.sum()) for n in (by_row * (better or 1) > 1e-9, by_row * (better or 1) < -1e-9, abs(by_row) <= 1e-9))
    if wins + losses < 6:  # five heads in five throws can be chance, and resampling so few does not show it
        low, high = min(low, 0.0), max(high, 0.0)
    up, down = {1: ("better", "worse"), -1: ("worse", "better"), 0: ("higher", "lower")}[better]
    return {"difference": difference, "interval": [low, high] if math.isfinite(low + high) else None, "wins": wins, "ties": ties, "losses": losses,
            "verdict": up if low > 0 else down if high < 0 else "no difference shown"}

def metric_table(metrics: list[dict], models: list[str]) -> list[list[str]]:
    """A header, and a line per metric and tuned model, as text."""
    lines = [["指标", models[0], *(["微调", "差值", "95% 区间", "胜/平/负", "结论"] if models[1:] else [])]]
    for entry in metrics:
        base, *tuned = ("—" if x is None else f"{x:.2f}" for x in entry["scores"])
        for name, value, pair in zip(models[1:], tuned, entry["versus"]):
            words = ["—"] * 4 if pair is None else [
                f"{pair['difference']:+.2f}", "{:+.2f} … {:+.2f}".format(*pair["interval"]) if pair["interval"] else "—",
                f"{pair['wins']}/{pair['ties']}/{pair['losses']}", VERDICTS[pair["verdict"]]]
            lines.append([entry["title"] + name.removeprefix("微调"), base, value, *words])
        lines += [] if tuned else [[entry["title"], base]]
    return lines

def print_table(lines: list[list]) -> None:
    """Columns as wide as their widest cell, a Chinese character being two wide; the first to the left, the others to the right."""
    lines = [[visible(str(cell)) for cell in line] for line in lines]
    wide = [[sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in cell) for cell in line] for line in lines]
    for line, have in zip(lines, wide):
        gaps = [" " * (max(column) - width) for column, width in zip(zip(*wide), have)]
        print("  ".join(gap + cell if n else cell + gap for n, (cell, gap) in enumerate(zip(line, gaps))).rstrip())

# ---- 3. The page ----

STYLE = """
:root { color-scheme: light dark; --good: light-dark(#14773c, #5fd38a); --bad: light-dark(#b3261e, #ff8a80); --unsure: light-dark(#8a5a00, #f0b84a) }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; overflow-wrap: anywhere; font: 16px/1.65 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem } h3 { font-size: 1rem; margin: 0 0 .5rem } p { margin: .5rem 0 } [hidden] { display: none }
.quiet, th, summary { opacity: .7; font-weight: normal; font-size: .88rem } .wide { overflow-x: auto } input, select { font: inherit; margin-right: .5rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } td, th { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #8884; overflow-wrap: break-word }
:is(td, th):first-child, :is(td, th):nth-child(2):last-child { text-align: left; min-width: 4em } .bar { display: block; width: 8rem; margin-left: auto } .changed { background: #fc03 }
.better, .real { color: var(--good) } .worse, .missing { color: var(--bad) } .unknown, .warn { color: var(--unsure) } .missing { text-decoration: underline wavy }
article { padding: .9rem; margin: .8rem 0; border-radius: .6rem; background: #8881 } .text { white-space: pre-wrap } .curve { width: 40rem; max-width: 100%; border-radius: .6rem }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.2rem; margin-top: .5rem }
.figures td:not(:first-child) { white-space: nowrap }
@media (max-width: 44rem) { .figures :is(th, td):is(:nth-child(4), :nth-child(5), :nth-child(6)) { display: none } .figures { font-size: .85rem } .bar { width: 4.5rem } td, th { padding: .25rem } }
"""

FORM = """<form hidden><input name="words" type="search" placeholder="找题目或回答里的字" aria-label="搜索"><select name="kind" aria-label="筛选"><option value="">全部</option>
<option value="win">变好的</option><option value="loss">变差的</option><option value="missing">引了没有的条文</option><option value="endless">没自己说完</option></select>
<output name="count" class="quiet"></output></form>"""

SCRIPT = """
const form = document.forms[0], cards = [...document.querySelectorAll("article")], { words, kind, count } = form.elements;
const has = card => card.textContent.toLowerCase().includes(words.value.trim().toLowerCase()) && card.dataset.kinds.includes(kind.value);
form.oninput = () => { for (const card of cards) card.hidden = !has(card); count.value = cards.filter(has).length + " / " + cards.length };
form.onsubmit = () => false; form.hidden = false; form.oninput();
"""

def escape(value) -> str:
    """Anything from a model, a file or a path as HTML text: no tags, and no invisible characters that turn the text around."""
    return html.escape(visible(str(value)))

def tag(name: str, *inside: str, **attributes) -> str:
    """An HTML element. `inside` is HTML already; attributes (class_ is class, data_x is data-x) are plain text."""
    words = "".join(f' {key.strip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{words}>{''.join(inside)}</{name}>"

def marked(text: str, citations: list, other: str | None = None) -> str:
    """`text` as HTML: its citations coloured, and marked what `other` does not say in runs of four characters or more."""
    classes = ["" if other is None else "changed"] * len(text)
    for block in difflib.SequenceMatcher(None, text, other or "", autojunk=False).get_matching_blocks() if len(text) < 2000 else []:
        if block.size > 3:
            classes[block.a:block.a + block.size] = [""] * block.size
    if classes.count("") < 0.2 * len(text):  # next to nothing in common: marks everywhere would say nothing
        classes = [""] * len(text)
    for start, end, _, status in citations:
        classes[start:end] = [status] * (end - start)
    runs = [(name, escape("".join(char for char, _ in run))) for name, run in itertools.groupby(zip(text, classes), key=lambda item: item[1])]
    return "".join(tag("span", words, class_=name) if name else words for name, words in runs)

def draw_interval(pair: dict) -> str:
    """The interval as a bar with a dot for the difference and a line where zero is, scaled to the larger end."""
    low, high = pair["interval"]
    left, right, dot = (60 + 55 * value / (max(abs(low), abs(high)) or 1) for value in (low, high, pair["difference"]))
    return (f'<svg class="bar {pair["verdict"].split()[0]}" viewBox="0 0 120 18" role="img" aria-label="{low:.2f} … {high:.2f}"><path d="M60 0V18" stroke="#888"/>'
            f'<path d="M{left:.1f} 9H{right:.1f}" stroke="currentColor" stroke-width="7" opacity=".4"/><circle cx="{dot:.1f}" cy="9" r="4" fill="currentColor"/></svg>')

def draw_curves(adapter: str) -> str:
    """The losses of the run that made the adapter, step by step, as an SVG; "" where the run left none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        metrics = [json.loads(line) for line in (Path(adapter).resolve().parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curves = {key: [(int(m["step"]), float(m[key])) for m in metrics if key in m] for key in ("loss", "val_loss")}
        xs, ys = zip(*itertools.chain(*curves.values()))
        x, y, width, height = min(xs), max(ys), max(xs) - min(xs) or 1, max(ys) - min(ys) or 1
        lines = [f'<polyline points="{" ".join(f"{40 + 590 * (a - x) / width:.1f},{10 + 200 * (y - b) / height:.1f}" for a, b in curves[key])}" fill="none" '
                 f'stroke="{colour}" stroke-width="2"/>' for key, colour in (("loss", "#4a90d9"), ("val_loss", "#d9534f"))]
        labels = [f'<text x="{a}" y="{b}" fill="currentColor" font-size="12">{word:.4g}</text>' for a, b, word in ((0, 18, y), (0, 212, min(ys)), (40, 228, x), (600, 228, max(xs)))]
        return f'<svg class="curve" viewBox="0 0 640 232" role="img" aria-label="损失曲线">{"".join(lines + labels)}</svg>'
    return ""

def draw_card(number: int, row: dict, models: list[str], ranked: dict) -> tuple[float, str]:
    """(how much the last model gains on the first by the metric `ranked`, the question with all its answers as HTML)."""
    first, last = (row["answers"][k]["scores"].get(ranked["key"]) for k in (0, -1))
    change = 0.0 if first is None or last is None else (last - first) * ranked["better"]
    kinds, answers = "win" if change > 0 else "loss" if change < 0 else "", []
    for n, (name, answer) in enumerate(zip(models, row["answers"])):
        facts = [f"{len(answer['text'])} 字", f"{answer['seconds']:.1f} 秒", *([] if answer["stopped"] else ["到长度上限还没说完"]),
                 *(f"{title} {answer['scores'][key]:.2f}" for key, title in (("rougeL", "ROUGE-L"), ("nll", "NLL")) if answer["scores"].get(key) is not None)]
        kinds += "".join(f" {status}" for *_, status in answer["citations"] if n) + (" endless" if n and not answer["stopped"] else "")
        answers.append(tag("div", tag("h3", escape(name)), tag("div", marked(answer["text"], answer["citations"], row["answers"][0]["text"] if n else None), class_="text"), tag("p", "，".join(facts), class_="quiet")))
    reference = tag("details", tag("summary", "参考回答"), tag("div", escape(row["reference"]), class_="text")) if row["reference"] else ""
    return change, tag("article", tag("h3", f"{number}. ", escape(row["question"])), reference, tag("div", *answers, class_="answers"), data_kinds=kinds)

def html_table(lines: list[list], more=(), **attributes) -> str:
    """A table with a header; `more` is one cell of HTML for the end of each line."""
    body = [tag("tr", *(tag("td", escape(cell)) for cell in line), last) for line, last in itertools.zip_longest(lines[1:], more, fillvalue="")]
    head = tag("thead", tag("tr", *(tag("th", escape(name)) for name in lines[0]), "<th></th>" if more else ""))
    return tag("div", tag("table", head, tag("tbody", *body), **attributes), class_="wide")

def write_page(path: str, results: dict) -> None:
    """One HTML file that needs nothing else: no network, and no script to be read. No script but its own may run in it."""
    models, metrics = results["models"], results["metrics"]
    ranked = next((e for e in metrics if e["key"] in ("rougeL", "nll", "accuracy")), {"key": "", "better": 0})
    cards = sorted((draw_card(n, row, models, ranked) for n, row in enumerate(results["rows"], 1)), key=lambda card: -abs(card[0]))
    page = "\n".join([
        tag("h1", escape(results["title"])), tag("p", escape(results["subtitle"]), class_="quiet"), *(tag("p", escape(line), class_="warn") for line in results["warnings"]),
        *(tag("p", tag("b", f"{title} {len(names)} 项", class_=word), "：", escape("、".join(names))) for word, title in VERDICTS.items()
          if (names := [entry["title"] for entry in metrics for pair in entry["versus"][-1:] if pair and pair["verdict"] == word])),
        tag("h2", "指标"), html_table(metric_table(metrics, models), [
            tag("td", draw_interval(pair) if pair and pair["interval"] else "") for entry in metrics for pair in entry["versus"]], class_="figures"),
        tag("p", "区间由配对自助法得出（重抽样 10,000 次）。整个区间在 0 的一边才说更好或更差，有差别的不到六题就不下结论。横条里竖线是 0，圆点是差值，每条各自缩放。"
            "指标多，平均每二十个其实没有差别的，会有一个碰巧显得有。回答里的引用：绿色有这一条，红色波浪线没有，黄色是索引里没有这部法；底色是两边不同的话。", class_="quiet"),
        *(tag("h2", escape(title)) + html_table(lines) for title, lines in results["tables"] if lines[1:]),
        *(tag("h2", "训练损失") + curve + tag("p", "蓝：训练，红：验证；横轴是步数", class_="quiet") for curve in map(draw_curves, results["adapters"]) if curve),
        tag("h2", "逐题", *([f"（按 {escape(ranked['title'])} 的变化，大的在前）"] if ranked["key"] else [])), FORM, *(card for _, card in cards),
        tag("h2", "设置"), tag("details", tag("summary", "展开"), html_table([["项目", "值"], *results["settings"].items()]))])
    own = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    Path(path).write_text(f"""<!doctype html><html lang="zh-CN"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{own}'">
<title>{escape(results["title"])}</title><style>{STYLE}</style></head><body>{page}<script>{SCRIPT}</script></body></html>""", encoding="utf-8")

def describe_run(model, adapters: list[str], args, questions: str) -> dict:
    """What the page says of where its figures come from: the models, the questions, every setting, the adapters."""
    return {"subtitle": f"{Path(model.name_or_path).name}，{Path(questions).name}，{time.strftime('%Y-%m-%d')}",
            "adapters": adapters, "settings": {
                "基础模型": model.name_or_path, "LoRA": "、".join(adapters), "题目": questions, "系统提示词": args.system, **generation_options(args),
                **{f"训练 {name}": value for adapter in adapters[:1] for name, value in run_record(adapter).get("args", {}).items()}}}

def main() -> None:
    parser = make_inference_parser(__doc__)
    add = parser.add_argument_group("问题").add_argument
    add("--prompt", help="一个问题")
    add("--test_file", "--prompt_file", default="test_questions.txt", help="问题文件，一行一个；数据表里的回答当作参考")
    add("--report", help="写一个网页，例如 report.html")
    add("--json", help="全部数字和回答写到这个 JSON 文件")
    args = parse_args(parser)
    keep_questions(args.test_file, args.json, args.report)
    for path in filter(None, (args.json, args.report)):
        open(path, "a", encoding="utf-8").close()  # what cannot be written shows now, not after the answers
    rows = [{"messages": talk} for talk in ([conversation(args.prompt)] if args.prompt else read_questions(args.test_file, answers=True))]
    adapters = [find_adapter(path) for path in args.lora_weights or [None]]
    systems = [run_record(adapter).get("args", {}).get("system") or "" for adapter in adapters]
    if args.system is None and len(set(systems)) > 1:
        say(f"警告：这些 LoRA 训练时的系统提示词不同，这里都用第一个的：{visible(systems[0]) or '（没有）'}。要换就写 --system")
    args.system = systems[0] if args.system is None else args.system
    model, tokenizer = load_model(args.base_model, adapters[0], args.device, False, args.force, args.quantization, args.trust_remote_code)
    for n, adapter in enumerate(adapters[1:], 2):
        model = load_adapter(model, tokenizer, adapter, f"adapter{n}", args.force)
        if args.base_model is None and len({Path(config.base_model_name_or_path).resolve() for config in model.peft_config.values()}) > 1:
            fail(4, f"{adapter} 的基础模型和 {adapters[0]} 的不同，请分开比较")

    # ---- Every question by the base, then by each adapter ----
    from evaluate_model import answer_loss, collect
    from tqdm import tqdm
    talks, answers = [conversation(row["messages"], args.system) for row in rows], []
    asked = [talk[:-1] if talk[-1]["role"] == "assistant" else talk for talk in talks]
    with tqdm(total=len(rows) * (1 + len(adapters)), desc="回答", disable=None) as bar:
        for name in [None, *model.peft_config]:
            model.set_adapter(name or "default")
            if name == [*model.peft_config][-1] and can_fold(model):
                model.merge_adapter([name])  # folded into the weights, a layer is one product instead of three
            with contextlib.nullcontext() if name else model.disable_adapter():
                answers.append(generate(model, tokenizer, asked, **generation_options(args), progress=bar.update))
                if bar.disable:  # a log shows no bar, and minutes without a word look like a hang
                    say(f"{'微调' if name else '原始'}模型答完了 {len(rows)} 个问题")
                for answer, talk in zip(answers[-1], talks if all(talk[-1]["role"] == "assistant" for talk in talks) else ()):
                    answer["nll"], answer["nll_tokens"] = answer_loss(model, tokenizer, talk)

    # ---- Side by side; "微调回答长度: N" is what people grep for ----
    heads = [("原始", ""), *(("微调", "（" + "/".join(Path(adapter).parts[-2:]).removesuffix("/final_model") + "）" if len(adapters) > 1 else "") for adapter in adapters)]
    for i, talk in enumerate(asked):
        print(f"{'=' * 78}\n[{i + 1}/{len(rows)}] 问题: {visible(talk[-1]['content'])}\n")
        for (title, note), own in zip(heads, answers):
            print(f"{title}回答{note}: {visible(own[i]['text'])}" + ("\n" if own[i]["stopped"] else " ……（到长度上限还没说完）\n"))
        for (title, note), own in zip(heads, answers):
            print(f"{title}回答长度: {len(own[i]['text'])} 字{note}")
        print("用时: " + "，".join(f"{title} {own[i]['seconds']:.2f} 秒" for (title, _), own in zip(heads, answers)))
    print("=" * 78)
    for (title, note), own in zip(heads, answers):
        print(f"{title}{note}：平均 {statistics.fmean(len(a['text']) for a in own):.0f} 字，{sum(a['stopped'] for a in own)}/{len(own)} 个自己结束，"
              f"{sum(a['tokens'] for a in own) / sum(a['seconds'] for a in own):.1f} token/s")

    # ---- Figures: those that need a reference where there is one ----
    if asked != talks or args.report or args.json:
        results = {"title": "微调前后对比", "warnings": [], **collect(rows, answers, ["".join(head) for head in heads], args.seed),
                   **describe_run(model, adapters, args, args.prompt or args.test_file)}
        print_table(metric_table(results["metrics"], results["models"]))
        if args.json:
            Path(args.json).write_text(json.dumps(results, ensure_ascii=False, indent=1), encoding="utf-8")
        if args.report:
            write_page(args.report, results)

if __name__ == "__main__":
    run_script(main)
