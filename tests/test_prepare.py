"""prepare_data.py: any source in, a clean split out; what asks the same is on one side of it, and nothing changes on the way."""

import csv
import json
import random
import sys
import types
from pathlib import Path

import pytest

from common import load_rows
from conftest import ANSWERS, QUESTIONS, run, write_csv
from prepare_data import choose_splits, fetch, find_groups

CHARS = "合同劳动离婚房屋租赁借款赔偿起诉公司员工工资押金股东债务抵押担保继承遗嘱财产抚养交通事故保险医疗消费退货违约仲裁法院判决执行"


def question(rng, length=24):
    return "".join(rng.choice(CHARS) for _ in range(length))


def prepare(source, folder, *flags, code=0):
    return run("prepare_data.py", "--input", *([source] if isinstance(source, (str, Path)) else source), "--output_dir", folder, *flags, code=code)


def read(folder, split, suffix=".jsonl"):
    path = Path(folder) / f"{split}{suffix}"
    if not path.exists():
        return []
    if suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """400 rows: of each four, one question, the same with other punctuation and width, a near one, and an unrelated one."""
    rng, rows = random.Random(0), []
    for n in range(100):
        asked = question(rng) + "ab12"
        near = asked[:12] + "呢" + asked[13:]
        rows += [(f"{asked}？", f"甲{n}"), (f" {asked[:8]}， {asked[8:-4]}ＡＢ１２ ? ", f"乙{n}"), (near, f"丙{n}"), (question(rng), f"丁{n}")]
    order = list(range(400))
    rng.shuffle(order)
    path = tmp_path_factory.mktemp("prepare") / "表.csv"
    return write_csv(path, [rows[i] for i in order], header=("问题", "回答"))


def test_a_question_and_its_likes_are_on_one_side_and_no_row_is_lost(table, tmp_path):
    prepare(table, tmp_path)
    sides = {split: {row["output"] for row in read(tmp_path, split)} for split in ("train", "validation", "test")}
    assert [len(side) for side in sides.values()] == [320, 40, 40]
    assert set.union(*sides.values()) == {f"{kind}{n}" for kind in "甲乙丙丁" for n in range(100)}
    for n in range(100):
        where = {split for kind in "甲乙丙" for split, side in sides.items() if f"{kind}{n}" in side}
        assert len(where) == 1, n
    assert "100 组，共 300 行" in (tmp_path / "data_report.md").read_text(encoding="utf-8")


def test_only_equal_questions_are_grouped_where_similarity_is_1(table, tmp_path):
    prepare(table, tmp_path, "--similarity", 1)
    assert "100 组，共 200 行" in (tmp_path / "data_report.md").read_text(encoding="utf-8")


def test_pairs_that_share_seven_tenths_of_their_trigrams_are_found():
    rng, rows = random.Random(1), []
    for _ in range(300):
        asked = question(rng, 30)
        at = rng.randrange(10, 20)
        rows += [asked, asked[:at] + "呢呢" + asked[at + 1:]]  # 25 of 31 trigrams
    groups, same = find_groups(lambda i: {"messages": [{"role": "user", "content": rows[i]}]}, len(rows), 0.7)
    assert sum(groups[i] == groups[i + 1] == i for i in range(0, len(rows), 2)) >= 297
    assert list(same) == list(range(600))
    assert all(groups[i] in (i, i - 1) for i in range(600))  # and nothing else hangs together


def test_the_same_seed_gives_the_same_files_and_another_seed_others(table, tmp_path):
    for name, seed, env in (("a", 1, "1"), ("b", 1, "2"), ("c", 2, "1")):
        run("prepare_data.py", "--input", table, "--output_dir", tmp_path / name, "--seed", seed, env={"PYTHONHASHSEED": env})
    a, b, c = ((tmp_path / name / "test.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_equal_empty_short_and_long_rows_are_dropped_and_named(tmp_path):
    rows = [("问题一是什么", "答一"), ("问题一是什么", "答一"), ("问题二是什么", " "), ("三", "三"), ("四" * 300, "答"), ("问题五是什么", "NA"), ("问题六是什么", "007")]
    path = write_csv(tmp_path / "t.csv", rows, header=("问题", "回答"))
    result = prepare(path, tmp_path / "out", "--min_chars", 4, "--max_chars", 100, "--val_ratio", 0, "--test_ratio", 0)
    assert [row["output"] for row in read(tmp_path / "out", "train")] == ["答一", "NA", "007"]
    for words in ("完全相同：1 行（" + path + ":3）", "空的：1 行（" + path + ":4）", "太短：1 行（" + path + ":5）", "太长：1 行（" + path + ":6）", "读入 7 行，去掉 4 行，写出 3 行"):
        assert words in result.stdout
    assert not (tmp_path / "out" / "test.jsonl").exists()


NASTY = ["=1+1", 'a,b"c"', "一\n二\r\n三", "\tx", "NA", "null", "1e5", "007", "<|im_end|>", "😀𠮷", "a\u2028b", "nbsp\u00a0x", "，；|"]


@pytest.mark.parametrize("format_type", ["alpaca", "qa", "messages"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_what_is_written_is_what_was_read_in_every_format(tmp_path, format_type, suffix):
    rows = [{"system": f"系{n}", "instruction": f"{text}问{n}", "output": f"{text}答{n}"} for n, text in enumerate(NASTY)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    prepare(tmp_path / "t.jsonl", tmp_path / "out", "--format", suffix, "--format_type", format_type, "--val_ratio", 0, "--test_ratio", 0)
    said = [[m["content"] for m in row["messages"]] for row in load_rows(str(tmp_path / "out" / f"train.{suffix}"))[0]]
    assert said == [[part.strip() for part in row.values()] for row in rows]


def test_conversations_and_texts_keep_their_form_and_are_refused_where_they_do_not_fit(tmp_path):
    chat = [{"messages": [{"role": role, "content": f"{n}{role}{turn}"} for turn in (1, 2) for role in ("user", "assistant")]} for n in range(20)]
    (tmp_path / "chat.json").write_text(json.dumps(chat), encoding="utf-8")
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"第{n}段文字"}) for n in range(20)), encoding="utf-8")
    prepare(tmp_path / "chat.json", tmp_path / "a")
    assert sorted(map(str, read(tmp_path / "a", "train") + read(tmp_path / "a", "validation") + read(tmp_path / "a", "test"))) == sorted(map(str, chat))
    prepare(tmp_path / "text.jsonl", tmp_path / "b")
    assert list(read(tmp_path / "b", "train")[0]) == ["text"]
    assert "chat.json:1" in prepare(tmp_path / "chat.json", tmp_path / "c", "--format_type", "qa", code=2).stderr
    assert "text.jsonl:1" in prepare(tmp_path / "text.jsonl", tmp_path / "c", "--format_type", "messages", code=2).stderr
    assert "--format_type text" in prepare([tmp_path / "chat.json", tmp_path / "text.jsonl"], tmp_path / "c", code=2).stderr


def test_labels_become_answers_every_split_has_its_share_and_imbalance_is_told(tmp_path):
    rng = random.Random(0)
    rows = [(question(rng, 40), label) for label, n in (("好评", 100), ("中评", 40), ("差评", 10)) for _ in range(n)]
    rng.shuffle(rows)
    path = write_csv(tmp_path / "t.csv", rows, header=("评论", "类别"))
    result = prepare(path, tmp_path / "out", "--task_type", "classification", "--text_column", "评论", "--label_column", "类别")
    for label, counts in (("好评", (80, 10, 10)), ("中评", (32, 4, 4)), ("差评", (8, 1, 1))):
        assert f"| {label} | {sum(counts)} | {' | '.join(map(str, counts))} |" in result.stdout
    assert "10.0 倍：很不均衡" in result.stdout
    row = read(tmp_path / "out", "test")[0]
    assert row["instruction"] == "判断下面的文本属于哪一类，只回答类别。类别：中评、好评、差评"
    assert (row["input"], row["output"]) in rows
    error = prepare(path, tmp_path / "out2", "--task_type", "classification", "--text_column", "评论", code=3).stderr
    assert "label" in error and "评论、类别" in error
    assert "不像标签" in prepare(path, tmp_path / "out2", "--text_column", "类别", "--label_column", "评论", code=3).stderr


def test_groups_stay_whole_and_shares_are_met_for_any_sizes():
    rng = random.Random(0)
    for _ in range(200):
        groups, n = [], rng.randint(1, 300)
        while len(groups) < n:
            groups += [len(groups)] * min(rng.choice((1, 1, 1, 2, 5)), n - len(groups))
        strata = [rng.choice("ab") for _ in groups]
        splits = choose_splits(groups, strata, {"test": 0.1, "validation": 0.2}, rng.randint(0, 9))
        assert all(splits[i] == splits[group] for i, group in enumerate(groups))
        assert "train" in splits
        if n > 100:
            assert abs(splits.count("test") - n * 0.1) <= 4 and abs(splits.count("validation") - n * 0.2) <= 4


def test_excel_parquet_and_folders_go_in(tmp_path):
    import pandas

    frame = pandas.DataFrame({"问题": QUESTIONS, "回答": ANSWERS})
    (tmp_path / "in").mkdir()
    frame.to_excel(tmp_path / "in" / "a.xlsx", index=False)
    frame.assign(问题=[f"再问：{q}还有呢" for q in QUESTIONS]).to_parquet(tmp_path / "in" / "b.parquet")
    prepare(tmp_path / "in", tmp_path / "out", "--val_ratio", 0, "--test_ratio", 0)
    assert [row["output"] for row in read(tmp_path / "out", "train")] == ANSWERS * 2


def test_bad_rows_stop_or_are_skipped_and_listed(tmp_path):
    (tmp_path / "t.csv").write_text("问题,回答\n问一,答一\n合同,法,多\n问二,答二\n", encoding="utf-8")
    assert "t.csv:3" in prepare(tmp_path / "t.csv", tmp_path / "out", code=3).stderr
    result = prepare(tmp_path / "t.csv", tmp_path / "out", "--skip_bad_rows", "--val_ratio", 0, "--test_ratio", 0)
    assert "有 3 个单元格，表头有 2 个：1 行（" in result.stdout and "t.csv:3" in result.stdout


def test_results_are_replaced_only_when_asked_and_the_input_never(tmp_path, table):
    prepare(table, tmp_path)
    before = (tmp_path / "train.jsonl").read_bytes()
    assert "--overwrite" in prepare(table, tmp_path, "--seed", 7, code=2).stderr
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert "会被覆盖" in prepare(tmp_path / "train.jsonl", tmp_path, "--overwrite", code=2).stderr
    prepare(table, tmp_path, "--seed", 7, "--overwrite", "--format", "csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data_report.md", "test.csv", "train.csv", "validation.csv"]


def test_sample_data_goes_straight_through(tmp_path):
    sample = run("prepare_data.py", "--create_sample", 50, "--output_dir", tmp_path).stdout.strip()
    assert len(load_rows(sample)[0]) == 50
    prepare(sample, tmp_path / "out")
    assert sum(len(read(tmp_path / "out", split)) for split in ("train", "validation", "test")) == 50


@pytest.mark.parametrize("flags,words", [((), "--create_sample"), (("--val_ratio", 0.6, "--test_ratio", 0.4), "小于 1"), (("--similarity", 0.1), "similarity")])
def test_usage_mistakes_exit_2(flags, words):
    assert words in run("prepare_data.py", *flags, code=2).stderr


@pytest.mark.parametrize("hub,module", [("hf", "huggingface_hub"), ("ms", "modelscope_hub.compat.snapshot_download")])
def test_a_data_set_of_a_hub_is_downloaded_only_when_named_so(tmp_path, monkeypatch, capsys, hub, module):
    """The hubs are not reachable in the tests: a module that writes what they would stands in for their clients."""
    asked = []

    def snapshot_download(name, repo_type, allow_patterns):
        asked.append((name, repo_type))
        if name == "ORG/none":
            raise OSError("404 Not Found")
        (tmp_path / "data").mkdir(exist_ok=True)
        for file in ("data/train-00000.parquet", "data/validation-00000.parquet", "data/latest.csv"):
            (tmp_path / file).write_text("x", encoding="utf-8")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(snapshot_download=snapshot_download))
    assert [Path(p).name for p in fetch(f"{hub}:ORG/NAME")] == ["train-00000.parquet"]
    assert [Path(p).name for p in fetch(f"{hub}:ORG/NAME:validation")] == ["validation-00000.parquet"]
    assert asked == [("ORG/NAME", "dataset")] * 2
    assert fetch("ORG/NAME") == ["ORG/NAME"] and len(asked) == 2
    for name, code in ((f"{hub}:ORG/NAME:test", 3), (f"{hub}:ORG/none", 6)):
        with pytest.raises(SystemExit) as stop:
            fetch(name)
        assert stop.value.code == code
        assert name in capsys.readouterr().err
    (tmp_path / "data" / "train-00000.parquet").write_text("instruction,output\n问,答\n又问,又答\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(snapshot_download=lambda name, **options: str(tmp_path)))
    assert len(load_rows(f"{hub}:ORG/NAME:train")[0]) == 2 and len(load_rows(f"{hub}:ORG/NAME:1")[0]) == 1


def test_a_folder_is_never_written_over_by_a_part_of_itself(tmp_path):
    prepare(write_csv(tmp_path / "qa.csv", zip(QUESTIONS, ANSWERS)), tmp_path / "out", "--val_ratio", 0.25, "--test_ratio", 0.25)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert "会被覆盖" in prepare(tmp_path / "out", tmp_path / "out", "--overwrite", code=2).stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_what_is_replaced_goes_only_when_the_new_files_are_whole(tmp_path, monkeypatch):
    import prepare_data

    source = write_csv(tmp_path / "qa.csv", zip(QUESTIONS, ANSWERS))
    prepare(source, tmp_path / "out", "--val_ratio", 0.25, "--format", "csv")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.csv")}
    assert before

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_data, "write_records", broken)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--input", source, "--output_dir", str(tmp_path / "out"), "--overwrite"])
    with pytest.raises(OSError, match="No space"):
        prepare_data.main()
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.csv")} == before
    monkeypatch.undo()
    prepare(source, tmp_path / "out", "--val_ratio", 0.25, "--overwrite")
    assert not list((tmp_path / "out").glob("*.csv"))


def test_a_full_width_colon_in_a_file_name_does_not_garble_the_report(tmp_path):
    source = write_csv(tmp_path / "客服：问答.csv", [("问一", "答一"), ("问二", ""), ("问三", "答三"), ("问四", "")])
    prepare(source, tmp_path / "out", "--val_ratio", 0, "--test_ratio", 0)
    report = (tmp_path / "out" / "data_report.md").read_text(encoding="utf-8")
    assert "问题或回答是空的：2 行" in report and "客服：问答.csv:3" in report


def test_classification_takes_its_columns_from_columns_too(tmp_path):
    source = write_csv(tmp_path / "c.csv", [(f"评论{n}", "好" if n % 2 else "坏", f"备注{n}") for n in range(20)], ("评论", "类别", "备注"))
    prepare(source, tmp_path / "out", "--task_type", "classification", "--columns", "instruction=评论,output=类别,input=备注", "--val_ratio", 0, "--test_ratio", 0)
    rows = read(tmp_path / "out", "train")
    assert len(rows) == 20 and all("备注" in json.dumps(row, ensure_ascii=False) for row in rows)
