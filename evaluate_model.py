"""微调有没有用：原模型和微调后的模型各答一遍测试题，逐项给出分数、差值、95% 区间和结论。

  python evaluate_model.py                                     # 最新的 LoRA，datasets/ 里的 120 道测试题
  python evaluate_model.py --test_data 我的测试.csv --limit 50 --report report.html
  python evaluate_model.py --test_data 分类.csv --metrics accuracy f1 --label_scoring

读：LoRA、它的基础模型、测试表（问题和参考回答）、datasets/ 里的 laws_index.csv 和 general_probe.csv。写：表到标准输出；
evaluation_results.csv（逐题）、旁边的 eval_results.json（全部数字）和 evaluation_results.jsonl（做完一批写一批，--resume 接着它做）。
内存里只有一个模型：关掉 LoRA 是微调前，打开是微调后。
"""

import contextlib
import csv
import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

from common import encode, fail, fingerprint, image_inputs, load_rows, number, parse_args, question_digest, read_table, run_script, say, sha256, visible
from compare_models import describe_run, find_citations, metric_table, print_table, versus, write_page
from inference import can_fold, conversation, find_adapter, generate, generation_options, keep_questions, load_model, make_inference_parser, run_record

# key: (its name for --metrics, title, 1 = more is better, -1 = less is, 0 = neither)
METRICS = {
    "bleu4": ("bleu", "BLEU-4", 1), "rouge1": ("rouge", "ROUGE-1", 1), "rouge2": ("rouge", "ROUGE-2", 1), "rougeL": ("rouge", "ROUGE-L", 1),
    "chrf": ("chrf", "chrF", 1), "exact_match": ("exact", "完全一致 %", 1),
    "nll": ("perplexity", "参考回答的 NLL/token", -1), "perplexity": ("perplexity", "参考回答的困惑度", -1),
    "length": ("length", "回答字数", 0), "distinct2": ("distinct", "distinct-2 %", 0), "repetition": ("repetition", "重复率 %", -1),
    "stop_rate": ("stop", "自己结束 %", 1), "tokens_per_second": ("speed", "速度 token/s", 0),
    "citation_precision": ("citations", "引用精确率 %", 1), "citation_recall": ("citations", "引用召回率 %", 1),
    "citation_f1": ("citations", "引用 F1 %", 1), "citation_exists": ("citations", "引用查得到 %", 1),
    "accuracy": ("accuracy", "分类准确率 %", 1), "macro_f1": ("f1", "宏平均 F1 %", 1), "micro_f1": ("f1", "微平均 F1 %", 1),
    "probe_correct": ("probe", "常识题答对 %", 1), "probe_nll": ("probe", "常识题答案的 NLL/token", -1),
}
GROUPS = tuple(dict.fromkeys(group for group, _, _ in METRICS.values()))
CLASSIFICATION = {"accuracy", "f1"}

# What sacrebleu's `zh` takes for Chinese, with the signs from U+2001 on that it takes by a slip; then the rules of mteval-v13a
CHINESE = re.compile("([\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u4db5\u4e00-\u9fbb"
                     "\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef])")
WESTERN = (r"([!-&(-+/:-@\[-`{-~])", r" \1 "), (r"([^0-9])([.,])", r"\1 \2 "), (r"([.,])([^0-9])", r" \1 \2"), (r"([0-9])(-)", r"\1 \2 ")

# ---- 1. One answer against its reference, as vectors that add up over rows ----

def tokenize(text: str) -> list[str]:
    """The tokens of sacrebleu's `zh`: each Chinese character and full-width sign alone, the rest by word and punctuation."""
    text = CHINESE.sub(r" \1 ", text.strip())
    for pattern, spaced in WESTERN:
        text = re.sub(pattern, spaced, text)
    return text.split()

def ngrams(items, n: int) -> Counter:
    """How often each run of `n` neighbours occurs in a list or a text."""
    return Counter(zip(*(items[k:] for k in range(n))))

def common_subsequence(a: list, b: list) -> int:
    """Length of the longest common subsequence; a row of its table is one whole number, 0 bits where the values rise (Hyyrö 2004)."""
    places: dict = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    row = full = (1 << len(a)) - 1
    for item in b:
        hits = row & places.get(item, 0)
        row = (row + hits | row - hits) & full
    return len(a) - row.bit_count()

def plain(text: str) -> str:
    """`text` in one width and one case, without the punctuation around it."""
    return unicodedata.normalize("NFKC", text).casefold().strip(" \n。.,!?、;:…\"'“”")

def text_stats(text: str, reference: str | None) -> dict[str, list[float]]:
    """Vectors of the free-text metrics, [numerator, denominator] but for BLEU and chrF. Repetition: 4-grams that stood there before."""
    hyp, ref = tokenize(text), tokenize(reference or "")
    grams = [(ngrams(hyp, n), ngrams(ref, n)) for n in range(1, 5)]
    totals, matches = [h.total() for h, _ in grams], [(h & r).total() for h, r in grams]
    stats = {"length": [len(text), 1], "distinct2": [100 * len(grams[1][0]), totals[1]], "repetition": [100 * (totals[3] - len(grams[3][0])), totals[3]]}
    if reference is None:
        return stats
    common = {"rouge1": (matches[0], 1), "rouge2": (matches[1], 2), "rougeL": (common_subsequence(hyp, ref), 1)}
    letters = [[ngrams("".join(side.split()), n) for side in (text, reference)] for n in range(1, 7)]
    return stats | {key: [200 * n / max(1, sum(x.total() for x in grams[order - 1])), 1] for key, (n, order) in common.items()} | {
        "bleu4": [len(hyp), len(ref), *matches, *totals], "exact_match": [100 * (plain(text) == plain(reference)), 1],
        "chrf": [x for h, r in letters for x in (h.total() if r else 0, r.total(), (h & r).total())]}

def mentioned(text: str, phrases) -> set[str]:
    """Which of `phrases` stand in `text`, longer ones first: 违法 is not in 不违法 if that is one of them too, nor 12 in 112."""
    plains = {plain(phrase): phrase for phrase in phrases}
    whole = "|".join(rf"(?<![0-9a-z]){re.escape(p)}(?![0-9a-z])" if p.isascii() else re.escape(p) for p in sorted(plains, key=len, reverse=True))
    return {plains[found] for found in re.findall(whole, plain(text))}

def answer_loss(model, tokenizer, messages: list[dict]) -> tuple[float, int]:
    """(negative log-likelihood, tokens) of the last answer with its end token. One at a time: the logits of a batch may outweigh the model."""
    import torch
    ids, labels = encode(tokenizer, messages, getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)
    start = max(k for k, label in enumerate(labels) if label == -100) + 1
    input_ids = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=input_ids, **image_inputs(model, tokenizer, messages, input_ids), use_cache=False, logits_to_keep=len(ids) - start + 1).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), input_ids[0, start:], reduction="sum")
    return loss.item(), len(ids) - start

def row_stats(answer: dict, reference: str | None, laws: dict, labels) -> dict[str, list[float]]:
    """All the vectors of one answer; what cannot be known without a reference is left out."""
    said, due = ({(cited, status) for _, _, cited, status in find_citations(text, laws)} for text in (answer["text"], reference or ""))
    hits, real = 100 * len(said & due), 100 * sum(status == "real" for _, status in said)
    stats = text_stats(answer["text"], reference) | {"stop_rate": [100 * answer["stopped"], 1], "tokens_per_second": [answer["tokens"], answer["seconds"]],
                                                     "citation_exists": [real, len(said)]}
    if reference is not None:
        stats |= {"citation_precision": [hits, len(said)], "citation_recall": [hits, len(due)], "citation_f1": [2 * hits, len(said) + len(due)],
                  "probe_correct": [100 * bool(mentioned(answer["text"], reference.split("|"))), 1]}
    if "nll" in answer:
        stats |= {key: [answer["nll"], answer["nll_tokens"]] for key in ("nll", "perplexity", "probe_nll")}
    if labels:
        hit = [answer["label"] == reference == label for label in labels]
        guessed, expected = ([text == label for label in labels] for text in (answer["label"], reference))
        stats |= {"accuracy": [100 * any(hit), 1], "micro_f1": [200 * any(hit), any(guessed) + 1], "macro_f1": [*hit, *guessed, *expected]}
    return stats

# ---- 2. From sums to scores ----

def score(key: str, sums):
    """(…, k) sums of a metric's vectors → (…) scores, nan where there is nothing to score. BLEU and chrF are sacrebleu's, of the whole corpus."""
    import numpy as np
    with np.errstate(divide="ignore", invalid="ignore"):
        if key == "bleu4":  # smoothing "exp"; orders that no answer is long enough for do not count
            hyp, ref, match, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
            none = (match == 0) & (total > 0)
            logs = np.where(total > 0, np.log(np.where(none, 0.5 ** np.cumsum(none, -1), match) / total), 0)
            return np.where(match.any(-1), 100 * np.exp(logs.sum(-1) / (total > 0).sum(-1) + np.minimum(0, 1 - ref / hyp)), 0)
        if key == "chrf":
            hyp, ref, match = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
            orders = np.maximum(1, ((hyp > 0) & (ref > 0)).sum(-1))
            precision, recall = (np.nan_to_num(match / x).sum(-1) / orders for x in (hyp, ref))
            return np.nan_to_num(500 * precision * recall / (4 * precision + recall))
        if key == "macro_f1":  # over the classes that occur
            hit, guessed, expected = np.split(sums, 3, -1)
            return np.nan_to_num(200 * hit / (guessed + expected)).sum(-1) / (guessed + expected > 0).sum(-1)
        ratio = sums[..., 0] / sums[..., 1]
        return np.exp(ratio) if key == "perplexity" else ratio

def collect(rows: list[dict], models: list[list[dict]], names: list[str], seed: int, groups=GROUPS[:-1], labels=()) -> dict:
    """What the tables, the files and the page show: the metrics of all models, each later one against the first, and row by row the answers.
    A metric is left out where the rows lack what it needs, or where no model has anything to score (the last group is the general probe's)."""
    import numpy as np
    laws = {law["law"]: set(law["articles"].split()) for _, law in read_table(str(Path(__file__).with_name("datasets") / "laws_index.csv"))}
    references = [row["messages"][-1]["content"] if row["messages"][-1]["role"] == "assistant" else None for row in rows]
    stats = [[row_stats(answer, reference, laws, labels) for answer, reference in zip(answers, references)] for answers in models]
    metrics, by_row = [], {}
    for key in (key for key in METRICS if METRICS[key][0] in groups and all(key in vectors for own in stats for vectors in own)):
        vectors = [np.array([vectors[key] for vectors in own], dtype=float) for own in stats]
        by_model = [score(key, np.vstack([own.sum(0), own])) for own in vectors]  # of all the rows, then of each
        scores, *row_scores = np.where(np.isfinite(by_model), by_model, None).T.tolist()
        if set(scores) != {None}:
            # the rows of a batch share one clock, so their speeds are no sample
            pairs = [None if key == "tokens_per_second" else versus(lambda sums, key=key: score(key, sums), vectors[0], own, METRICS[key][2], seed) for own in vectors[1:]]
            metrics.append({"key": key, "title": METRICS[key][1], "better": METRICS[key][2], "scores": scores, "versus": pairs})
            by_row[key] = row_scores
    described = [{"question": row["messages"][-1 if reference is None else -2]["content"], "reference": reference, "answers": [
        {**own[i], "citations": [*find_citations(own[i]["text"], laws)], "scores": {key: by_row[key][i][m] for key in by_row}} for m, own in enumerate(models)]}
        for i, (row, reference) in enumerate(zip(rows, references))]
    tables = [(f"分类：{name}", count_classes(references, [answer["label"] for answer in own], labels)) for name, own in zip(names, models) if labels]
    invented = [Counter(cited for row in described for _, _, cited, status in row["answers"][m]["citations"] if status != "real") for m in range(len(names))]
    lines = [[name, "、".join(f"{cited}（{n}）" for cited, n in counts.most_common())] for name, counts in zip(names, invented) if counts]
    return {"models": names, "metrics": metrics, "rows": described, "tables": [*tables, *([("查不到的引用", [["模型", "引用（次数）"], *lines])] if lines else [])]}

def count_classes(expected: list[str], guessed: list[str], labels) -> list[list]:
    """The confusion matrix as a table: a line per label with how often it was taken for each, and its precision, recall and F1."""
    counts, lines = Counter(zip(expected, guessed)), [["实际 ＼ 判为", *labels, "没认出", "精确率 %", "召回率 %", "F1 %"]]
    for label in labels:
        hit, said, due = counts[label, label], guessed.count(label), expected.count(label)
        shares = (f"{100 * n / of:.1f}" if of else "—" for n, of in ((hit, said), (hit, due), (2 * hit, said + due)))
        lines.append([label, *(counts[label, other] for other in (*labels, "")), *shares])
    return lines

def safe_cell(value):
    """A CSV cell that no spreadsheet takes for a formula; numbers stay numbers."""
    text = visible(value) if isinstance(value, str) else ""
    return "'" + text if re.match(r"\s*[=+\-@＝＋－＠]|[\t\n]", text) else text or value

def main() -> None:
    parser = make_inference_parser(__doc__)
    add = parser.add_argument_group("评估").add_argument
    add("--test_data", "--test_dataset", default="./datasets/legal_qa_test.csv", help="测试表：问题和参考回答")
    add("--columns", help="哪列是什么，例如 instruction=问题,output=回答")
    add("--encoding", help="测试表的编码；默认自己认")
    add("--metrics", nargs="+", choices=GROUPS, metavar="NAME", help=f"算哪些，默认除 accuracy f1 外全部：{' '.join(GROUPS)}")
    add("--label_scoring", action="store_true", help="取似然最大的标签，不看生成的回答")
    add("--limit", type=number(int, 1), help="只用测试表的前几行")
    add("--output", default="evaluation_results.csv", help="逐题结果；其他文件放在它旁边")
    add("--report", help="写一个网页，例如 report.html")
    add("--use_original_model", action="store_true", help="只评估基础模型，不加 LoRA")
    add("--resume", action="store_true", help="接着上次没做完的做")
    add("--strict", action="store_true", help="测试题里有训练过的就停下")
    args = parse_args(parser)
    if len(args.lora_weights or []) > 1:
        fail(2, "一次评估一个 LoRA；几个一起比：python compare_models.py --lora_weights A --lora_weights B --test_file 测试表.csv")
    log_path, results_path = Path(args.output).with_suffix(".jsonl"), Path(args.output).with_name("eval_results.json")
    if Path(args.output).suffix != ".csv":
        fail(2, f"--output 应是一个 .csv 文件，不是 {args.output}，例如 --output evaluation_results.csv")
    keep_questions(args.test_data, args.output, log_path, results_path, args.report)
    if Path(args.test_data).is_dir():  # of a folder that is split, the loader takes the part to learn
        fail(2, f"--test_data {args.test_data} 是目录。写明里面的测试文件，例如 --test_data {args.test_data}/test.jsonl")
    if args.report:
        open(args.report, "a", encoding="utf-8").close()  # what cannot be written shows now, not after the answers

    # ---- 1. The questions, and whether they were trained on ----
    groups = set(args.metrics or set(GROUPS) - CLASSIFICATION) | (CLASSIFICATION if args.label_scoring else set())
    rows, dropped = load_rows(args.test_data, args.encoding, args.columns)
    rows = [row for row in rows if len(row.get("messages", ())) > 1] or fail(3, f"{args.test_data} 里没有问题和参考回答两列")
    probe = load_rows(str(Path(__file__).with_name("datasets") / "general_probe.csv"))[0] if "probe" in groups else []
    labels, rows = sorted({row["messages"][-1]["content"] for row in rows}) if groups & CLASSIFICATION else [], rows[:args.limit]
    if len(labels) > 100:
        fail(3, f"{args.test_data} 有 {len(labels)} 种参考回答，不像分类数据。去掉 --metrics 和 --label_scoring，按文字评估")
    adapter = None if args.use_original_model else find_adapter(args.lora_weights and args.lora_weights[0])
    run, warnings = run_record(adapter), [f"跳过 {line}" for line in dropped]
    trained = set(run.get("row_sha256", ()))
    if adapter and "row_sha256" not in run:
        warnings.append("训练记录 run.json 里没有训练行的指纹 row_sha256，没法查测试题是不是训练过")
    if seen := [row["where"] for row in rows if question_digest(row["messages"][-2]) in trained]:
        warnings.append(f"{len(rows)} 道测试题里有 {len(seen)} 道训练过，分数不能当真：{'、'.join(seen[:5])}{' 等' if seen[5:] else ''}")
        if args.strict:
            fail(2, f"{warnings[-1]}。换一份测试表，或从训练数据里去掉这些行再训练；去掉 --strict 就只警告")
    for line in warnings:
        say(f"警告：{line}")

    # ---- 2. The model, the batches, and what is there of a former try ----
    model, tokenizer = load_model(args.base_model, adapter, args.device, False, args.force, args.quantization, args.trust_remote_code)
    args.system = run.get("args", {}).get("system") if args.system is None else args.system
    talks = [conversation(row["messages"], args.system) for row in rows + probe]
    for talk in talks[len(rows):]:  # 巴黎|Paris: either will do; the likelihood is that of the first
        talk[-1] = {"role": "assistant", "content": talk[-1]["content"].split("|")[0]}
    parts = [sorted(part, key=lambda i: -len(encode(tokenizer, talks[i][:-1])[0])) for part in (range(len(rows)), range(len(rows), len(talks)))]
    batches = [part[k:k + args.answer_batch_size] for part in parts for k in range(0, len(part), args.answer_batch_size)]
    job = {"基础模型": fingerprint(model.name_or_path), "题目": sha256(json.dumps(talks)), "指标": sorted(groups),
           "LoRA": adapter and sha256(Path(adapter, "adapter_model.safetensors").read_bytes()), "生成参数": {**generation_options(args), "answer_batch_size": 0}, "标签": [labels, args.label_scoring], "量化": args.quantization}
    former: list[dict] = []
    if args.resume and log_path.is_file():
        with contextlib.suppress(ValueError):  # a crash may leave half a last line
            former.extend(map(json.loads, log_path.read_text(encoding="utf-8").splitlines()))
        if changed := [name for name, value in job.items() if not former or former[0].get(name) != value]:
            fail(2, f"{log_path} 是另一次评估的：{'、'.join(changed)}不同。去掉 --resume 重新做，或换一个 --output")
        say(f"接着 {log_path}：已有 {len(former) - 1} 个回答")
    done = {(line["model"], line["row"]): line for line in former[1:]}

    # ---- 3. Every batch by the base, then by the tuned model ----
    from tqdm import tqdm
    names = ["原始", "微调"] if adapter else ["原始"]
    writes = groups - {"perplexity"} - (CLASSIFICATION if args.label_scoring else set())
    todo = [(m, batch) for m in range(len(names)) for batch in batches if any((m, i) not in done for i in batch)]
    fresh = log_path.with_name(f".new-{log_path.name}")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in (job, *done.values())), encoding="utf-8")
    fresh.replace(log_path)  # a crash or a full disk leaves the answers of before
    with open(log_path, "a", encoding="utf-8", buffering=1) as log, tqdm(total=sum(len(batch) for _, batch in todo), desc="评估", disable=None) as bar:
        for m, batch in todo:
            if m == 1 and can_fold(model):
                model.merge_adapter()  # folded into the weights, a layer is one product instead of three
            is_probe = batch[0] >= len(rows)
            options = generation_options(args) | ({"max_new_tokens": 48} if is_probe else {})  # general questions have answers of a word or two
            with model.disable_adapter() if adapter and m == 0 else contextlib.nullcontext():
                answers = generate(model, tokenizer, [talks[i][:-1] for i in batch], **options) if writes else [
                    {"text": "", "tokens": 0, "stopped": True, "seconds": 0.0} for _ in batch]
                for i, answer in zip(batch, answers):
                    if is_probe or "perplexity" in groups:
                        answer["nll"], answer["nll_tokens"] = answer_loss(model, tokenizer, talks[i])
                    if labels and not is_probe:
                        found = [min(labels, key=lambda label: answer_loss(model, tokenizer, [*talks[i][:-1], {"role": "assistant", "content": label}]))
                                 ] if args.label_scoring else [*mentioned(answer["text"], labels)]
                        answer["label"] = found[0] if len(found) == 1 else ""
                    done[m, i] = {"model": m, "row": i, **answer}
            print(*(json.dumps(done[m, i]) for i in batch), sep="\n", file=log)
            bar.update(len(batch))
            if bar.disable:  # a log shows no bar, and minutes without a word look like a hang
                say(f"{names[m]}：已有 {len(done)} 个回答，共 {len(names) * len(talks)} 个")

    # ---- 4. Figures and files ----
    answers = [[done[m, i] for i in range(len(talks))] for m in range(len(names))]
    results = {"title": "微调前后评估", "warnings": warnings, **describe_run(model, [adapter] if adapter else [], args, args.test_data),
               **collect(rows, [own[:len(rows)] for own in answers], names, args.seed, groups - {"probe"}, labels)}
    if probe:
        general = collect(probe, [own[len(rows):] for own in answers], names, args.seed, {"probe"})
        results |= {"metrics": results["metrics"] + general["metrics"], "probe": general["rows"]}
    titles = ["回答", *(METRICS[key][1] for key in results["rows"][0]["answers"][0]["scores"])]
    lines = [["问题", "参考回答", *(f"{name}：{title}" for name in names for title in titles)], *([row["question"], row["reference"], *(
        cell for answer in row["answers"] for cell in (answer["text"], *answer["scores"].values()))] for row in results["rows"])]
    with open(args.output, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(map(safe_cell, line) for line in lines)
    results_path.write_text(json.dumps(results, ensure_ascii=False, indent=1), encoding="utf-8")
    if args.report:
        write_page(args.report, results)
    print_table(metric_table(results["metrics"], names))
    for title, lines in results["tables"]:
        print(f"\n{title}")
        print_table(lines)
    say(f"写好了 {args.output}、旁边的 eval_results.json" + (f"、{args.report}" if args.report else ""))

if __name__ == "__main__":
    run_script(main)
