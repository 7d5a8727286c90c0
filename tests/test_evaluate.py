"""evaluate_model.py: the metrics are the reference packages', the intervals cover what they say, and a stopped run goes on where it was."""

import csv
import json
import math
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from conftest import ANSWERS, QUESTIONS, ROOT, call, make_model, make_tokenizer, run, train, write_csv

MIXED = list("的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长知民法典第条《》，。；：“”！？、（）")
MIXED += [" ", "\n", "a", "b", "The ", "contract ", "is ", "not.", "3.14", "1,000", "2-3", "x_y", "don't", "％", "ＡＢ", "—", "…", "€", "😀", "é", "ﾊ", "한", "п"]


def random_pairs(count, seed=7):
    """Answers that share stretches with their references, of 0 to 120 pieces, some alike, some empty."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        reference = draw.choices(MIXED, k=draw.randrange(1, 120))
        answer = [piece for piece in reference if draw.random() < draw.choice((0.2, 0.7, 0.95))] + draw.choices(MIXED, k=draw.randrange(30))
        if draw.random() < 0.3:
            draw.shuffle(answer)
        pairs.append(("".join(answer if draw.random() > 0.02 else []), "".join(reference)))
    return pairs


@pytest.fixture(scope="module")
def learned(tiny, data, tmp_path_factory):
    """A run folder of a tiny model that knows the eight answers by heart."""
    return train(tiny, data, tmp_path_factory.mktemp("learned") / "run", "--num_epochs", 100, "--learning_rate", 5e-3, "--lr_scheduler", "constant", "--val_ratio", 0,
                 "--lora_dropout", 0, "--save_every", -1)


def evaluate(folder, *args, code=0):
    call("evaluate_model.py", "--output", folder / "evaluation_results.csv", "--max_new_tokens", 80, *args, code=code)
    return json.loads((folder / "eval_results.json").read_text(encoding="utf-8")) if code == 0 else None


def scores_of(results):
    return {entry["key"]: entry["scores"] for entry in results["metrics"]}


# ---- The metrics ----

def test_tokens_are_those_of_sacrebleu_zh_for_every_character():
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    from evaluate_model import tokenize

    theirs = TokenizerZh()
    for code in [*range(0x20, 0xd800), *range(0xe000, 0x10000), *range(0x1f300, 0x1f700), *range(0x20000, 0x20100)]:
        text = f"a{chr(code)}b 1{chr(code)}2{chr(code)}"
        assert tokenize(text) == theirs(text).split(), hex(code)


def test_bleu_and_chrf_are_sacrebleus_on_200_pairs():
    import sacrebleu

    from evaluate_model import score, text_stats

    pairs = random_pairs(200)
    vectors = [text_stats(*pair) for pair in pairs]
    sums = {key: np.array([v[key] for v in vectors], dtype=float) for key in ("bleu4", "chrf")}
    answers, references = zip(*pairs)
    assert score("bleu4", sums["bleu4"].sum(0)) == pytest.approx(sacrebleu.corpus_bleu(answers, [references], tokenize="zh").score, abs=1e-6)
    assert score("chrf", sums["chrf"].sum(0)) == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score, abs=1e-6)
    sentence = sacrebleu.metrics.BLEU(tokenize="zh", effective_order=True)
    for (answer, reference), bleu, chrf in zip(pairs, score("bleu4", sums["bleu4"]), score("chrf", sums["chrf"])):
        assert bleu == pytest.approx(sentence.sentence_score(answer, [reference]).score, abs=1e-6)
        assert chrf == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score, abs=1e-6)


def test_rouge_is_the_reference_implementations_on_the_same_tokens():
    from rouge_score.rouge_scorer import RougeScorer

    from evaluate_model import text_stats, tokenize

    class Tokens:
        def tokenize(self, text):
            return tokenize(text)

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Tokens())
    for answer, reference in random_pairs(200):
        theirs, ours = scorer.score(reference, answer), text_stats(answer, reference)
        for key in ("rouge1", "rouge2", "rougeL"):
            assert ours[key][0] == pytest.approx(100 * theirs[key].fmeasure, abs=1e-6), (key, answer, reference)


def test_small_metrics_by_hand():
    from evaluate_model import score, text_stats

    stats = text_stats("可以可以可以", "可以。")
    assert stats["length"] == [6, 1]
    assert stats["distinct2"] == [200, 5]  # 可以 以可, of five pairs
    assert stats["repetition"] == [100, 3]  # 可以可以 a second time, of three
    assert text_stats(" ＰＡＲＩＳ。", "paris")["exact_match"] == [100, 1]
    assert text_stats("违法", "不违法")["exact_match"] == [0, 1]
    empty = text_stats("", "可以。")
    assert all(np.nan_to_num(score(key, np.array(vector, dtype=float))) == 0 for key, vector in empty.items())
    vectors = np.array([[1, 0, 1, 1, 2, 0], [0, 0, 0, 0, 0, 1]], dtype=float).sum(0)  # hits, guesses, true ones of two classes
    assert score("macro_f1", vectors) == pytest.approx(100 * (2 / 3 + 0) / 2)


def test_citations_are_found_and_checked():
    from common import read_table
    from compare_models import find_citations, read_number

    laws = {row["law"]: set(row["articles"].split()) for _, row in read_table(str(ROOT / "datasets" / "laws_index.csv"))}
    text = "依《中华人民共和国民法典》第五百七十七条和第1300条、刑法第一百三十三条之一第二款，《仲裁法》第 五 条；该法第六条不算。《劳动合同法》第十四条之后再说"
    found = find_citations(text, laws)
    assert [(text[a:b], cited, status) for a, b, cited, status in found] == [
        ("《中华人民共和国民法典》第五百七十七条", "民法典 577", "real"), ("第1300条", "民法典 1300", "missing"), ("刑法第一百三十三条之一", "刑法 133-1", "real"),
        ("《仲裁法》第 五 条", "仲裁法 5", "unknown"), ("《劳动合同法》第十四条", "劳动合同法 14", "real")]
    numbers = {"一": 1, "十": 10, "十五": 15, "二十": 20, "一百零五": 105, "一百一十": 110, "一千零七十九": 1079, "一千二百六十": 1260, "二〇": 20, "五七七": 577, "1260": 1260, "５７": 57}
    assert {text: read_number(text) for text in numbers} == numbers


def test_labels_are_recognised_as_wholes():
    from evaluate_model import mentioned

    assert mentioned("这是不违法的。", ["违法", "不违法"]) == {"不违法"}
    assert mentioned("答案是 112", ["12"]) == set()
    assert mentioned("约12条", ["12"]) == {"12"}
    assert mentioned("Positive, not NEGATIVE", ["positive", "negative"]) == {"positive", "negative"}
    assert mentioned("C++ 语言", ["C++", "C"]) == {"C++"}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
def test_the_loss_of_an_answer_is_that_of_the_whole_forward_pass(tmp_path, architecture):
    from common import encode, load_base, load_tokenizer
    from evaluate_model import answer_loss

    path = make_model(tmp_path / architecture, architecture)
    model, tokenizer = load_base(path, "cpu", torch.float32), load_tokenizer(path)
    for question, answer in zip(QUESTIONS[:3], ANSWERS):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, labels = encode(tokenizer, messages)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=-100, reduction="sum").item()
        loss, tokens = answer_loss(model, tokenizer, messages)
        assert loss == pytest.approx(expected, rel=1e-5) and tokens == sum(label != -100 for label in labels)


# ---- The statistics ----

@pytest.mark.parametrize("rows,kind", [(20, "normal"), (40, "ratio"), (120, "skewed"), (120, "yes or no"), (60, "bleu4"), (60, "chrf")])
def test_intervals_cover_the_true_difference_in_93_to_97_of_100_worlds(rows, kind):
    """The tuned model's rows depend on the base's, as they do for the same questions. Corpus scores: rows are drawn from 400, whose own
    difference is the true one."""
    from compare_models import bootstrap
    from evaluate_model import score, text_stats

    draw, worlds = np.random.default_rng(5), 2500
    if kind in ("bleu4", "chrf"):
        pairs = random_pairs(400)
        shorter = [(answer[: len(answer) * 2 // 3], reference) for answer, reference in pairs]
        pools = [np.array([text_stats(*pair)[kind] for pair in pool], dtype=float) for pool in (shorter, pairs)]
        truth = score(kind, pools[1].sum(0)) - score(kind, pools[0].sum(0))
        picked = draw.integers(400, size=(worlds, rows))
        low, high = bootstrap(lambda s: score(kind, s), pools[0][picked], pools[1][picked], 3, resamples=1000)
    elif kind == "yes or no":
        easy = draw.random((worlds, rows))
        base, tuned, truth = 100.0 * (easy < 0.5), 100.0 * (easy + 0.4 * (draw.random((worlds, rows)) - 0.5) < 0.6), 10.0
    else:
        base = draw.normal(size=(worlds, rows))
        tuned, truth = base + 0.3 + (draw.exponential(size=(worlds, rows)) - 1 if kind == "skewed" else draw.normal(size=(worlds, rows))), 0.3
    if kind not in ("bleu4", "chrf"):
        weights = draw.integers(20, 200, size=(worlds, rows)).astype(float) if kind == "ratio" else np.ones((worlds, rows))
        low, high = bootstrap(lambda s: s[..., 0] / s[..., 1], np.stack([base * weights, weights], -1), np.stack([tuned * weights, weights], -1), 3, resamples=1000)
    covered = ((low <= truth) & (truth <= high)).mean()
    assert 0.93 <= covered <= 0.97, covered


def test_the_word_follows_from_the_interval_and_never_from_the_mean():
    from compare_models import versus

    draw = np.random.default_rng(1)

    def pair(shift, better, rows=60):
        base = draw.normal(size=(rows, 1))
        both = [np.concatenate([x, np.ones((rows, 1))], -1) for x in (base, base + shift + 0.5 * draw.normal(size=(rows, 1)))]
        return versus(lambda s: s[..., 0] / s[..., 1], *both, better, 42)

    assert [pair(shift, better)["verdict"] for shift, better in ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0))] == [
        "better", "worse", "worse", "better", "higher", "lower"]
    for shift in (0.0, 0.1, -0.1, 0.3):
        result = pair(shift, 1)
        low, high = result["interval"]
        assert result["verdict"] == ("better" if low > 0 else "worse" if high < 0 else "no difference shown")
        assert low <= result["difference"] <= high and result["wins"] + result["ties"] + result["losses"] == 60


def test_five_wins_in_a_row_are_not_called_better_and_six_may_be():
    from compare_models import versus

    for wins, verdict in ((5, "no difference shown"), (6, "better")):
        base = np.array([[0.0, 1.0]] * wins)
        result = versus(lambda s: s[..., 0] / s[..., 1], base, base + [1.0, 0.0], 1, 42)
        assert (result["verdict"], result["wins"]) == (verdict, wins)


def test_few_scored_rows_give_no_interval():
    from compare_models import versus
    from evaluate_model import score

    base = np.array([[0.0, 1.0], *[[0.0, 0.0]] * 30])  # one answer in 31 cites anything: a third of the resamples have none
    result = versus(partial(score, "citation_f1"), base, base + [[1.0, 0.0]], 1, 42)
    assert result["interval"] is None and result["verdict"] == "no difference shown"


# ---- The script ----

def test_a_model_that_knows_the_answers_is_better_and_all_files_say_so(learned, data, tmp_path, capsys):
    results = evaluate(tmp_path, "--lora_weights", learned, "--test_data", data)
    scores = scores_of(results)
    for key in ("bleu4", "rouge1", "rouge2", "rougeL", "chrf", "exact_match", "stop_rate"):
        assert scores[key][1] == pytest.approx(100), key
    by_key = {entry["key"]: entry for entry in results["metrics"]}
    assert by_key["rougeL"]["versus"][0]["verdict"] == by_key["nll"]["versus"][0]["verdict"] == "better"
    assert scores["perplexity"] == pytest.approx([math.exp(x) for x in scores["nll"]]) and scores["nll"][1] < 0.1
    assert "probe_correct" in scores and "citation_f1" not in scores and len(scores) == len(results["metrics"])
    assert results["probe"][0]["question"].startswith("What is the capital") and len(results["probe"]) == 20
    printed = capsys.readouterr().out
    assert "ROUGE-L" in printed and "更好" in printed and "8/0/0" in printed
    assert (tmp_path / "evaluation_results.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    with open(tmp_path / "evaluation_results.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["问题"], row["参考回答"], row["微调：回答"]) for row in rows] == list(zip(QUESTIONS, ANSWERS, ANSWERS))
    assert float(rows[0]["微调：ROUGE-L"]) == pytest.approx(100)


def without_times(results):
    for row in results["rows"] + results["probe"]:
        for answer in row["answers"]:
            answer.pop("seconds"), answer["scores"].pop("tokens_per_second", None)
    return {**results, "metrics": [entry for entry in results["metrics"] if entry["key"] != "tokens_per_second"]}


def test_a_stopped_evaluation_goes_on_where_it_was_and_ends_the_same(learned, data, tmp_path, capsys):
    flags = ("--lora_weights", learned, "--test_data", data, "--answer_batch_size", 3)
    whole = without_times(evaluate(tmp_path, *flags))
    log = tmp_path / "evaluation_results.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    kept = json.loads(lines[1])
    kept["tokens"] = 12345  # marks an answer that was not made again
    log.write_text("\n".join([lines[0], json.dumps(kept), *lines[2:15], lines[15][:20]]), encoding="utf-8")
    resumed = evaluate(tmp_path, *flags, "--resume")
    assert "已有 14 个回答" in capsys.readouterr().err
    assert resumed["rows"][kept["row"]]["answers"][0]["tokens"] == 12345
    resumed["rows"][kept["row"]]["answers"][0]["tokens"] = json.loads(lines[1])["tokens"]
    assert without_times(resumed) == whole
    assert len(log.read_text(encoding="utf-8").splitlines()) >= 1 + 2 * (8 + 20)
    assert without_times(evaluate(tmp_path, *flags)) == whole  # and the same again from the start
    evaluate(tmp_path, *flags, "--resume", "--max_new_tokens", 9, code=2)
    assert "生成参数" in capsys.readouterr().err
    log.write_text("\n".join(lines[:9]), encoding="utf-8")  # the memory was full: the cure that is told must not cost the answers
    assert without_times(evaluate(tmp_path, *flags[:-1], 2, "--resume"))["rows"] == whole["rows"]
    assert "已有 8 个回答" in capsys.readouterr().err
    log.write_text(lines[0][:50], encoding="utf-8")
    evaluate(tmp_path, *flags, "--resume", code=2)
    assert "另一次评估" in capsys.readouterr().err


def test_batched_answers_of_the_adapter_are_the_single_ones_on_50_prompts(tiny, learned, tmp_path):
    from inference import generate, load_model

    questions = [f"{QUESTIONS[n % 8]}{'请详细说明。' * (n % 5)}{n}" for n in range(50)]
    path = write_csv(tmp_path / "fifty.csv", [(question, "不知道。") for question in questions])
    results = evaluate(tmp_path, "--lora_weights", learned, "--test_data", path, "--metrics", "length", "--max_new_tokens", 24)
    for m, adapter in enumerate((None, str(learned / "final_model"))):
        model = load_model(tiny, adapter)
        alone = [generate(*model, [[{"role": "user", "content": q}]], max_new_tokens=24)[0]["text"] for q in questions]
        assert [row["answers"][m]["text"] for row in results["rows"]] == alone


def test_the_base_alone_has_scores_and_no_comparison(tiny, data, tmp_path, capsys):
    results = evaluate(tmp_path, "--use_original_model", "--base_model", tiny, "--test_data", data, "--metrics", "rouge", "perplexity", "--limit", 3)
    assert [entry["key"] for entry in results["metrics"]] == ["rouge1", "rouge2", "rougeL", "nll", "perplexity"]
    assert all(len(entry["scores"]) == 1 and entry["versus"] == [] for entry in results["metrics"]) and len(results["rows"]) == 3
    assert "胜/平/负" not in capsys.readouterr().out


def test_trained_test_rows_are_warned_of_and_refused_when_strict(learned, data, tmp_path, capsys):
    import hashlib

    folder = shutil.copytree(learned, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    # train.py writes the digests: those of the questions, in which NFKC turns ？ into ?
    assert record["row_sha256"] and set(record.pop("row_sha256")) <= {hashlib.sha256(q.replace("？", "?").encode()).hexdigest()[:16] for q in QUESTIONS}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    flags = ("--lora_weights", folder, "--test_data", data, "--metrics", "perplexity", "--limit", 4)
    assert any("没法查" in line for line in evaluate(tmp_path, *flags)["warnings"])
    record["row_sha256"] = [hashlib.sha256(q.encode()).hexdigest()[:16] for q in ("试用期最长多久?", QUESTIONS[5])]
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    warnings = evaluate(tmp_path, *flags)["warnings"]
    assert "4 道测试题里有 1 道训练过" in warnings[0] and "qa.csv:2" in warnings[0]
    capsys.readouterr()
    evaluate(tmp_path, *flags, "--strict", code=2)
    assert "有 1 道训练过" in capsys.readouterr().err
    (tmp_path / "one.json").write_text(json.dumps([{"问": q, "答": "a"} for q in QUESTIONS]), encoding="utf-8")
    evaluate(tmp_path, "--lora_weights", folder, "--test_data", tmp_path / "one.json", "--columns", "instruction=问,output=答", "--strict", code=2)
    assert "有 1 道训练过" in capsys.readouterr().err


def test_classes_by_generation_and_by_likelihood(tiny, tmp_path, capsys):
    kinds = ["违法", "不违法", "看情况"]
    rows = [(question, kinds[n % 3]) for n, question in enumerate(QUESTIONS)]
    path = write_csv(tmp_path / "kinds.csv", rows)
    adapter = train(tiny, path, tmp_path / "run", "--num_epochs", 60, "--learning_rate", 5e-3, "--lr_scheduler", "constant", "--val_ratio", 0, "--lora_dropout", 0, "--save_every", -1)
    asked = write_csv(tmp_path / "asked.csv", [*rows[:7], (rows[7][0], "违法")])  # the last one it learned as 不违法
    for flags in (["--metrics", "accuracy", "f1"], ["--metrics", "accuracy", "f1", "--label_scoring"]):
        results = evaluate(tmp_path, "--lora_weights", adapter, "--test_data", asked, *flags)
        scores = scores_of(results)
        assert scores["accuracy"][1] == pytest.approx(100 * 7 / 8) and scores["micro_f1"][1] == pytest.approx(100 * 7 / 8)
        assert scores["macro_f1"][1] == pytest.approx(100 * (6 / 7 + 4 / 5 + 1) / 3)  # 违法 3 of 4, 不违法 2 of 2 and one too many, 看情况 2 of 2
        title, (header, *lines) = results["tables"][1]
        assert title == "分类：微调" and header[1:4] == sorted(kinds)
        confusion = {line[0]: dict(zip(header[1:5], line[1:5])) for line in lines}
        assert confusion["违法"] == {"违法": 3, "不违法": 1, "看情况": 0, "没认出": 0}
        assert "实际" in capsys.readouterr().out


def test_a_spreadsheet_takes_no_cell_for_a_formula():
    from evaluate_model import safe_cell

    for text in ("=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "＝1", "\n=1"):
        assert safe_cell(text).startswith("'"), text
    assert safe_cell(-1.5) == -1.5 and safe_cell("可以。") == "可以。" and safe_cell("") == "" and safe_cell(None) is None
    assert "\x1b" not in safe_cell("\x1b[31m")


def test_what_cannot_be_evaluated_exits_with_the_way_out(learned, data, tmp_path):
    (tmp_path / "text.csv").write_text("text\n整段文字\n", encoding="utf-8")
    run("evaluate_model.py", "--lora_weights", learned, "--test_data", tmp_path / "text.csv", cwd=tmp_path, code=3)
    assert "compare_models.py" in run("evaluate_model.py", "--lora_weights", learned, "--lora_weights", learned, cwd=tmp_path, code=2).stderr
    assert "是目录" in run("evaluate_model.py", "--lora_weights", learned, "--test_data", tmp_path, cwd=tmp_path, code=2).stderr  # its training part would be taken
    assert "bleu" in run("evaluate_model.py", "--metrics", "blue", cwd=tmp_path, code=2).stderr


def test_the_probe_has_20_questions_with_short_answers_that_no_question_gives_away():
    from common import load_rows
    from evaluate_model import mentioned

    rows = [[m["content"] for m in row["messages"]] for row in load_rows(str(ROOT / "datasets" / "general_probe.csv"))[0]]
    assert len(rows) == len({question for question, _ in rows}) == 20
    for question, answers in rows:
        assert not mentioned(question, answers.split("|")), question
        assert len(answers.split("|")[0]) <= 8 and len(make_tokenizer("qwen")(question).input_ids) < 200


def test_the_test_data_are_never_overwritten(tiny, data, tmp_path, capsys):
    table = tmp_path / "客服.jsonl"
    table.write_text(json.dumps({"instruction": QUESTIONS[0], "output": ANSWERS[0]}), encoding="utf-8")
    before = table.read_bytes()
    for output in ("客服.csv", "results.jsonl"):
        call("evaluate_model.py", "--base_model", tiny, "--use_original_model", "--test_data", table, "--output", tmp_path / output, code=2)
        assert "--output" in capsys.readouterr().err
    call("evaluate_model.py", "--base_model", tiny, "--use_original_model", "--test_data", table, "--report", table, code=2)
    for flag in ("--json", "--report"):
        call("compare_models.py", "--test_file", table, flag, table, code=2)
        assert "盖掉" in capsys.readouterr().err
    assert table.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["客服.jsonl"]


def test_labels_are_those_of_the_whole_table_and_another_way_to_score_is_another_evaluation(tiny, tmp_path, capsys):
    table = write_csv(tmp_path / "classes.csv", [("甲", "合法"), ("乙", "合法"), ("丙", "违法"), ("丁", "违法")])
    flags = ["--base_model", tiny, "--use_original_model", "--test_data", table, "--metrics", "accuracy", "--limit", 2]
    results = evaluate(tmp_path, *flags, "--label_scoring")
    text = json.dumps(results, ensure_ascii=False)
    assert "违法" in text
    evaluate(tmp_path, *flags, "--resume", code=2)
    assert "标签不同" in capsys.readouterr().err
    evaluate(tmp_path, *flags, "--label_scoring", "--resume")
