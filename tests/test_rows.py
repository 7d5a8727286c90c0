"""Reading tables: what cannot be understood is refused with its line; no cell moves and no character changes."""

import csv
import io
import json
import random
import time

import pytest

from common import load_rows
from conftest import ANSWERS, QUESTIONS, ROOT, run, write_csv

ROWS = list(zip(QUESTIONS, ANSWERS))


def pairs(rows):
    return [(row["messages"][-2]["content"], row["messages"][-1]["content"]) for row in rows]


def refused(path, capsys, code=3):
    with pytest.raises(SystemExit) as stop:
        load_rows(str(path))
    assert stop.value.code == code
    message = capsys.readouterr().err
    assert str(path.name) in message and len(message.strip().splitlines()) <= 6
    return message


def test_a_comma_outside_quotes_never_shifts_a_column(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("instruction,output\n问一,答一\n合同,法,多\n", encoding="utf-8")
    assert ":3" in refused(path, capsys)
    path.write_text("instruction,output\n合同,法,多\n合同,法,多\n", encoding="utf-8")
    assert ":2" in refused(path, capsys)


def test_a_short_row_is_refused_and_an_empty_answer_is_dropped_and_named(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("instruction,output\n问一,答一\n问二\n", encoding="utf-8")
    assert ":3" in refused(path, capsys)
    path.write_text("instruction,output\n问一,答一\n问二,  \n", encoding="utf-8")
    rows, dropped = load_rows(str(path))
    assert len(rows) == 1 and f"{path}:3" in dropped[0]


def test_words_and_numbers_stay_as_they_were(tmp_path):
    words = ["NA", "null", "None", "nan", "007", "1e5", "TRUE", '他说"好"', "一\n二", "a,b"]
    rows = [(f"问{n}", word) for n, word in enumerate(words)]
    assert pairs(load_rows(write_csv(tmp_path / "t.csv", rows))[0]) == rows


def test_garbled_and_control_characters_are_learned_and_said(tmp_path, capsys):
    pairs = [("好的", "行"), ("坏的\ufffd", "行"), ("响铃", "a\x07b"), ("制表\t换行", "a\nb"), ("整段", "\x1b[31m红")]
    rows, dropped = load_rows(write_csv(tmp_path / "a.csv", pairs))
    assert [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows] == pairs and not dropped
    said = capsys.readouterr().err
    assert "3 行" in said and all(f"a.csv:{line}" in said for line in (3, 4, 7)) and "a.csv:5" not in said


def test_lines_are_counted_in_the_file_not_in_records(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text('instruction,output\n"问\n一",答一\n问二,答二,多\n', encoding="utf-8")
    assert ":4" in refused(path, capsys)


@pytest.mark.parametrize("header", [("问题", "回答"), ("question", "answer"), ("Prompt", "Response"), ("text", "target"), ("prompt", "completion"), ("提问", "答案")])
def test_columns_are_recognised_by_their_usual_names(tmp_path, header, capsys):
    assert pairs(load_rows(write_csv(tmp_path / "t.csv", ROWS, header=header))[0]) == ROWS
    assert f"{header[0]} → instruction" in capsys.readouterr().err


def test_unknown_doubled_and_ambiguous_columns_are_refused(tmp_path, capsys):
    for header in (("甲", "乙"), ("问题", "问题"), ("question", "prompt")):
        write_csv(tmp_path / "t.csv", ROWS, header=header)
        assert header[0] in refused(tmp_path / "t.csv", capsys)


def test_input_and_system_columns_join_the_conversation(tmp_path):
    path = write_csv(tmp_path / "t.csv", [("能要求赔偿吗？", "案情", "能。", "你是律师")], header=("instruction", "input", "output", "system"))
    assert [m["content"] for m in load_rows(path)[0][0]["messages"]] == ["你是律师", "能要求赔偿吗？\n案情", "能。"]


def test_json_arrays_lines_and_chats_load_whatever_the_file_is_called(tmp_path):
    records = [{"instruction": q, "output": a} for q, a in ROWS]
    for name, text in (("a.jsonl", json.dumps(records)), ("b.json", "\n".join(json.dumps(r, ensure_ascii=False) for r in records)), ("c.json", "\ufeff" + json.dumps(records, indent=2))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert pairs(load_rows(str(tmp_path / name))[0]) == ROWS
    chat = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in ROWS]
    (tmp_path / "d.json").write_text(json.dumps(chat), encoding="utf-8")
    assert pairs(load_rows(str(tmp_path / "d.json"))[0]) == ROWS


# ---- Files that are not what they seem; every case through the command line ----

def utf8(text):
    return text.encode()


GOOD = "instruction,output\n" + "".join(f"{q},{a}\n" for q, a in zip(QUESTIONS, ANSWERS))
BIG5 = "問題,回答\n什麼是合同？,合同是當事人之間設立的協議。\n試用期有多久,一般不超過六個月\n".encode("big5")
REFUSED = {  # name: (file name, bytes, words that must be in the message)
    "a GBK row in UTF-8": ("t.csv", utf8(GOOD) + "加班费怎么算,一点五倍\n".encode("gbk"), ["t.csv:10", "UTF-8", "--encoding"]),
    "Big5": ("t.csv", BIG5, ["t.csv:1", "--encoding big5"]),
    "Korean": ("t.csv", "question,answer\n안녕하세요 계약이란 무엇입니까,계약은 당사자 사이의 합의입니다 감사합니다\n".encode("euc-kr"), ["t.csv:2", "--encoding"]),
    "Japanese EUC": ("t.csv", "question,answer\n契約とは何ですか教えてください,契約は当事者間の合意ですよろしくお願いします\n".encode("euc-jp"), ["t.csv:2", "--encoding"]),
    "Japanese SJIS": ("t.csv", "question,answer\n契約とは何ですか,契約は当事者間の合意です\n".encode("shift-jis"), ["t.csv:2", "--encoding"]),
    "Western": ("t.csv", "question,answer\nWhat’s that?,It’s a naïve café\n".encode("cp1252"), ["t.csv:2", "--encoding"]),
    "Russian": ("t.csv", "question,answer\nЧто такое договор между сторонами?,Это соглашение сторон\n".encode("koi8-r"), ["t.csv:2", "--encoding"]),
    "UTF-16 without BOM": ("t.csv", GOOD.encode("utf-16-le"), ["t.csv:2", "--encoding", "utf-16-le"]),
    "a broken UTF-16": ("t.csv", GOOD.encode("utf-16")[:-1], ["t.csv", "UTF-16"]),
    "a comma too many": ("t.csv", utf8("instruction,output\n问一,答一\n合同,法,多\n"), ["t.csv:3", "双引号", "--skip_bad_rows"]),
    "a cell too few": ("t.csv", utf8("instruction,output\n问一,答一\n问二\n"), ["t.csv:3", "1 个单元格"]),
    "an open quote": ("t.csv", utf8('instruction,output\n问一,答一\n"问二,答二\n问三,答三\n'), ["t.csv:3", "引号"]),
    "text behind a quote": ("t.csv", utf8('instruction,output\n问一,答一\n"问"二,答二\n'), ["t.csv:3", "引号"]),
    "a full-width comma in some rows": ("t.csv", utf8("问题,回答\n问一,答一\n问二，答二\n"), ["t.csv:3"]),
    "unknown columns": ("t.csv", utf8("甲,乙\na,b\n"), ["t.csv", "甲、乙", "--columns"]),
    "one column twice": ("t.csv", utf8("问题,问题,回答\na,b,c\n"), ["t.csv:1", "重复"]),
    "two columns for the question": ("t.csv", utf8("question,prompt,answer\na,b,c\n"), ["t.csv", "question、prompt", "--columns instruction=question"]),
    "NUL": ("t.csv", utf8("instruction,output\n问一,答一\nab\0c,d\n"), ["t.csv:3", "\\x00"]),
    "half a character": ("t.json", utf8('[{"instruction": "a", "output": "\\ud83d"}]'), ["t.json:1", "\\xd83d"]),
    "nothing": ("t.csv", b"", ["t.csv"]),
    "a header alone": ("t.csv", utf8("instruction,output\n"), ["t.csv"]),
    "empty answers": ("t.csv", utf8("instruction,output\na,\nb, \n"), ["t.csv:2", "空的"]),
    "a trailing comma": ("t.json", utf8('[{"instruction": "a", "output": "b"},\n]'), ["t.json:2"]),
    "an open array": ("t.json", utf8('[{"instruction": "a", "output": "b"}\n'), ["t.json:1", "]"]),
    "text behind an array": ("t.json", utf8('[{"instruction": "a", "output": "b"}] x'), ["t.json:1"]),
    "an open object": ("t.jsonl", utf8('{"instruction": "a", "output": "b"}\n{"instruction": "a"\n'), ["t.jsonl:2", "--skip_bad_rows"]),
    "NaN": ("t.jsonl", utf8('{"instruction": "a", "output": NaN}\n'), ["t.jsonl:1", "NaN"]),
    "a key twice": ("t.jsonl", utf8('{"instruction": "a", "output": "b", "output": "c"}\n'), ["t.jsonl:1", "重复"]),
    "two objects on a line": ("t.jsonl", utf8('{"instruction": "a", "output": "b"} {"instruction": "a", "output": "b"}\n'), ["t.jsonl:1"]),
    "numbers for rows": ("t.json", utf8('["a", "b"]'), ["t.json:1", "{…}"]),
    "a deep nest": ("t.json", b"[" * 100_000, ["t.json:1"]),
    "a deep object": ("t.jsonl", b'{"a":' * 100_000, ["t.jsonl:1"]),
    "a list for an answer": ("t.json", utf8('[{"instruction": "a", "output": ["b"]}]'), ["t.json:1", "应该是文字"]),
    "a role nobody knows": ("t.json", utf8('[{"messages": [{"role": "boss", "content": "a"}]}]'), ["t.json:1", "boss"]),
    "no messages": ("t.json", utf8('[{"messages": [1]}]'), ["t.json:1", "role"]),
    "messages that are no JSON": ("t.csv", utf8("messages\nabc\n"), ["t.csv:2", "role"]),
    "gzip": ("t.csv", b"\x1f\x8b\x08\0\0\0", ["t.csv", "压缩包"]),
    "zip": ("t.csv", b"PK\3\4\x14\0\0\0\0\0", ["t.csv", "压缩包"]),
    "old Excel": ("t.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ["t.csv", ".xls"]),
    "a web page": ("t.csv", b"\n<!DOCTYPE html><html><table><tr><td>a</td></tr></table>", ["t.csv", "HTML"]),
    "PDF": ("t.csv", b"%PDF-1.7\n%\xb5\xb5", ["t.csv", "PDF"]),
    "half a Parquet file": ("t.parquet", b"PAR1\x15\x04", ["t.parquet", "Parquet"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_with_its_place_and_the_cure(tmp_path, capsys, case):
    name, data, words = REFUSED[case]
    (tmp_path / name).write_bytes(data)
    message = refused(tmp_path / name, capsys)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("case", ["Big5", "a comma too many", "an open quote", "NUL", "a deep nest", "gzip", "nothing"])
def test_the_command_line_refuses_bad_data_with_exit_3_and_no_traceback(tmp_path, case):
    name, data, words = REFUSED[case]
    (tmp_path / name).write_bytes(data)
    error = run("prepare_data.py", "--input", tmp_path / name, "--output_dir", tmp_path / "out", code=3).stderr
    assert all(word in error for word in words), error
    assert len(error[error.index("错误："):].strip().splitlines()) <= 6


def test_train_refuses_bad_data_before_the_model_is_loaded(tiny, tmp_path):
    (tmp_path / "t.csv").write_text("instruction,output\n合同,法,多\n", encoding="utf-8")
    assert "t.csv:2" in run("train.py", "--model_name", tiny, "--dataset_name", tmp_path / "t.csv", code=3).stderr


def test_what_is_no_file_is_refused_and_nothing_hangs(tmp_path, capsys):
    import os

    os.mkfifo(tmp_path / "pipe.csv")
    refused(tmp_path / "pipe.csv", capsys)
    with pytest.raises(SystemExit):
        load_rows("/dev/null")
    write_csv(tmp_path / "数据.csv", ROWS)
    assert "你是不是想写" in refused(tmp_path / "数椐.csv", capsys)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", capsys)


# ---- What is understood ----

ENCODINGS = ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16-le", "utf-16-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_twenty_files_in_each_encoding_give_the_same_text(tmp_path, encoding):
    rng = random.Random(encoding)
    legal = load_rows(str(ROOT / "datasets" / "legal_qa.csv"))[0]
    for n in range(20):
        rows = pairs(rng.sample(legal, rng.randint(1, 30)))
        if encoding != "gbk":
            rows = [(q + rng.choice(["", "𠮷", "€", "🙂", "é"]), a) for q, a in rows]
        header, newline = rng.choice([("问题", "回答"), ("instruction", "output")]), rng.choice(["\n", "\r\n"])
        text = io.StringIO()
        writer = csv.writer(text, delimiter=rng.choice(",\t"), lineterminator=newline)
        writer.writerow(header)
        writer.writerows(rows)
        bom = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
        (tmp_path / f"{n}.csv").write_bytes(bom + text.getvalue().encode(encoding))
        assert pairs(load_rows(str(tmp_path / f"{n}.csv"))[0]) == rows


def test_an_encoding_that_is_named_is_used(tmp_path):
    (tmp_path / "t.csv").write_bytes(BIG5)
    assert pairs(load_rows(str(tmp_path / "t.csv"), encoding="big5")[0])[0] == ("什麼是合同？", "合同是當事人之間設立的協議。")
    (tmp_path / "u.csv").write_bytes(GOOD.encode("utf-16-le"))
    assert pairs(load_rows(str(tmp_path / "u.csv"), encoding="utf-16-le")[0]) == ROWS
    (tmp_path / "v.csv").write_bytes(("\ufeff" + GOOD).encode())
    assert pairs(load_rows(str(tmp_path / "v.csv"), encoding="UTF-8")[0]) == ROWS
    with pytest.raises(SystemExit):
        load_rows(str(tmp_path / "v.csv"), encoding="utf-9")


@pytest.mark.parametrize("delimiter", [";", "\t", "|", "，"])
def test_another_delimiter_is_taken_where_the_header_then_fits(tmp_path, delimiter):
    (tmp_path / "t.csv").write_text(f"问题{delimiter}回答\n问一,二{delimiter}答一\n", encoding="utf-8")
    assert pairs(load_rows(str(tmp_path / "t.csv"))[0]) == [("问一,二", "答一")]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_cells_come_back_exactly_whatever_they_hold(tmp_path, newline):
    rng = random.Random(newline)
    pieces = ["合", "a", '"', '""', ",", ";", "\t", "\n", "\r\n", "\u2028", "\u00a0", "\x0b", "\x1c", "\ufffd", "😀", "'", "\\", "=", "<|eot_id|>", "0", "NA"]
    rows = [(f"问{n}" + "".join(rng.choices(pieces, k=8)) + "。", "答" + "".join(rng.choices(pieces, k=8)) + "。") for n in range(200)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([("问题", "回答"), *rows])
    (tmp_path / "t.csv").write_bytes(text.getvalue().encode())
    assert pairs(load_rows(str(tmp_path / "t.csv"))[0]) == rows
    (tmp_path / "t.json").write_text(json.dumps([{"问题": q, "回答": a} for q, a in rows], ensure_ascii=False, indent=rng.choice([None, 1])), encoding="utf-8")
    assert pairs(load_rows(str(tmp_path / "t.json"))[0]) == rows


def test_a_cell_of_a_million_characters_is_read_whole(tmp_path):
    path = write_csv(tmp_path / "t.csv", [("问", "答" * 1_000_000)])
    assert len(pairs(load_rows(path)[0])[0][1]) == 1_000_000


def test_numbers_in_json_stay_as_they_are_written(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"instruction": "a", "output": 1e5}\n{"instruction": "b", "output": 0.10}\n', encoding="utf-8")
    assert pairs(load_rows(str(tmp_path / "t.jsonl"))[0]) == [("a", "1e5"), ("b", "0.10")]


def test_excel_and_parquet_load_whatever_they_are_called(tmp_path):
    import pandas

    table = pandas.DataFrame({"问题": [*QUESTIONS, "NA", "编号", "空"], "回答": [*ANSWERS, "null", "007", ""]})
    expected = [*ROWS, ("NA", "null"), ("编号", "007")]
    table.to_excel(tmp_path / "t.xlsx", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    for name in ("t.xlsx", "t.parquet"):
        (tmp_path / f"{name}.csv").write_bytes((tmp_path / name).read_bytes())
        for path in (tmp_path / name, tmp_path / f"{name}.csv"):
            rows, dropped = load_rows(str(path))
            assert pairs(rows) == expected
            assert len(dropped) == 1 and f"{path.name}:{12 if 'xlsx' in name else 11}：" in dropped[0]


def test_empty_rows_and_columns_around_a_sheet_do_no_harm(tmp_path):
    import openpyxl

    book = openpyxl.Workbook()
    for line, (question, answer) in enumerate([("问题", "回答"), *ROWS], 3):
        book.active.cell(line * 2, 2, question)
        book.active.cell(line * 2, 4, answer)
    book.save(tmp_path / "t.xlsx")
    rows = load_rows(str(tmp_path / "t.xlsx"))[0]
    assert pairs(rows) == ROWS and rows[0]["where"].endswith(":8")
    (tmp_path / "t.csv").write_text("\n,,\n问题,回答,,\n问一,答一,,\n,,,\n", encoding="utf-8")
    assert pairs(load_rows(str(tmp_path / "t.csv"))[0]) == [("问一", "答一")]


def test_lines_are_those_of_the_file_in_every_format(tmp_path):
    (tmp_path / "t.json").write_text('[\n {"instruction": "a",\n  "output": "b"},\n\n {"instruction": "c", "output": "d"}\n]', encoding="utf-8")
    (tmp_path / "t.jsonl").write_text('\n{"instruction": "a", "output": "b"}\n\n{"instruction": "c", "output": "d"}', encoding="utf-8")
    (tmp_path / "t.csv").write_text('\ninstruction,output\n"a\na",b\n\nc,d\n', encoding="utf-8")
    for name, lines in (("t.json", [2, 5]), ("t.jsonl", [2, 4]), ("t.csv", [3, 6])):
        assert [row["where"] for row in load_rows(str(tmp_path / name))[0]] == [f"{tmp_path / name}:{line}" for line in lines]


def test_bad_rows_are_skipped_and_named_when_asked(tmp_path):
    (tmp_path / "t.csv").write_text("问题,回答\n问一,答一\n合同,法,多\n短\n问二,答二\n坏\0,答\n", encoding="utf-8")
    rows, dropped = load_rows(str(tmp_path / "t.csv"), skip_bad_rows=True)
    assert pairs(rows) == [("问一", "答一"), ("问二", "答二")]
    assert [sentence.split("：")[0][-1] for sentence in dropped] == ["3", "4", "6"]
    (tmp_path / "t.jsonl").write_text('{"问题": "a", "回答": "b"}\n{"问题": "a"\n[1]\n{"问题": "c"}\n{"问题": "c", "回答": "d"}\n', encoding="utf-8")
    rows, dropped = load_rows(str(tmp_path / "t.jsonl"), skip_bad_rows=True)
    assert pairs(rows) == [("a", "b"), ("c", "d")] and len(dropped) == 3


def test_columns_are_taken_as_the_user_names_them(tmp_path, capsys):
    path = write_csv(tmp_path / "t.csv", [("甲一", "乙一", "丙一")], header=("甲", "question", "丙"))
    assert pairs(load_rows(path, columns="instruction=甲,output=丙")[0]) == [("甲一", "丙一")]
    assert pairs(load_rows(path, columns="output=question，instruction=丙")[0]) == [("丙一", "乙一")]
    assert load_rows(path, columns="text=甲")[0][0]["text"] == "甲一"
    for columns in ("instruction=丁,output=丙", "甲=instruction", "甲"):
        with pytest.raises(SystemExit) as stop:
            load_rows(path, columns=columns)
        assert stop.value.code == 3
        assert "甲、question、丙" in capsys.readouterr().err


def test_several_files_are_mixed_by_weight_and_count(tmp_path):
    a = write_csv(tmp_path / "a.csv", [(f"甲{n}", "答") for n in range(10)], header=("问题", "回答"))
    b = write_csv(tmp_path / "b.csv", [(f"乙{n}", "答") for n in range(10)], header=("question", "answer"))
    asked = [question for question, _ in pairs(load_rows([f"{a}:4", f"{b}:2.5"])[0])]
    assert len(set(asked[:4])) == 4 and all(q[0] == "甲" for q in asked[:4])
    assert len(asked) == 29 and all(asked[4:].count(f"乙{n}") in (2, 3) for n in range(10))
    assert asked == [question for question, _ in pairs(load_rows([f"{a}:4", f"{b}:2.5"])[0])]
    assert asked[:4] != [question for question, _ in pairs(load_rows([f"{a}:4"], seed=1)[0])]
    assert len(load_rows([a, f"{b}:0.5"])[0]) == 15


def test_a_folder_is_read_whole_or_its_training_part(tmp_path):
    write_csv(tmp_path / "a.csv", ROWS[:4])
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"问题": q, "回答": a}) for q, a in ROWS[4:]), encoding="utf-8")
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    assert pairs(load_rows(str(tmp_path))[0]) == ROWS
    write_csv(tmp_path / "train.csv", ROWS[:2])
    assert pairs(load_rows(str(tmp_path))[0]) == ROWS[:2]


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FORMATS = {  # as their documentation shows them: LLaMA-Factory, TRL, mlx-lm
    "LLaMA-Factory alpaca": ({"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]}, ["s", "q1", "a1", "q2", "a2", "q\ni", "a"]),
    "LLaMA-Factory pretrain": ({"text": "document"}, "document"),
    "LLaMA-Factory sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"}, {"from": "observation", "value": "o"},
                                                  {"from": "gpt", "value": "a"}], "system": "s", "tools": "t"}, ["s", "q", "f", "o", "a"]),
    "LLaMA-Factory openai": ({"messages": [{"role": "system", "content": "s"}, U, A]}, ["s", "q", "a"]),
    "TRL text": ({"text": "The sky is blue."}, "The sky is blue."),
    "TRL messages": ({"messages": [U, A]}, ["q", "a"]),
    "TRL prompt and completion": ({"prompt": "The sky is", "completion": " blue."}, ["The sky is", "blue."]),
    "TRL conversational prompt": ({"prompt": [U], "completion": [A]}, ["q", "a"]),
    "mlx-lm chat": ({"messages": [{"role": "system", "content": "s"}, U, A]}, ["s", "q", "a"]),
    "mlx-lm completions": ({"prompt": "q", "completion": "a"}, ["q", "a"]),
    "mlx-lm text": ({"text": "This is an example for the model."}, "This is an example for the model."),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_documented_formats_of_other_tools_load_with_no_flag(tmp_path, name):
    record, expected = FORMATS[name]
    for suffix, text in (("jsonl", json.dumps(record) + "\n"), ("json", json.dumps([record], indent=2))):
        (tmp_path / f"t.{suffix}").write_text(text, encoding="utf-8")
        row = load_rows(str(tmp_path / f"t.{suffix}"))[0][0]
        assert (row["text"] if isinstance(expected, str) else [m["content"] for m in row["messages"]]) == expected


# ---- Files broken at random ----

FUZZ_SEED = 20261121


def mutate(rng, data):
    """`data` with one or two of the accidents that files meet."""
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(data) + 1)
        junk = rng.choice([b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"\xe5", "，".encode(), "合".encode("gbk"), b"{", b"[", b"]", b"\\", b"\t", b";", b":", b"NaN",
                           b"\xef\xbb\xbf", b"\x1a", bytes([rng.randrange(256)])])
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at] + junk + data[at:]
        elif kind == 1:
            data = data[:at] + data[at + rng.randint(1, 9):]
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data = data[:at] + data[rng.randrange(len(data) + 1):][:30] + data[at:]
        elif kind == 4 and data:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
        else:
            lines = data.split(b"\n")
            rng.shuffle(lines[1:])
            data = b"\n".join([lines[0], *rng.sample(lines[1:], len(lines) - 1)])
    return data


def oracle(data):
    """The rows of a table by the plainest means: strict decoding in a known order, json, and csv; None where they fail or a row is uneven."""
    for encoding in (["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "gb18030"]):
        try:
            text = data.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    else:
        return None
    try:
        if text.lstrip("\ufeff \t\r\n")[:1] == "[":
            return json.loads(text.lstrip("\ufeff"), parse_int=str, parse_float=str)
        if text.lstrip("\ufeff \t\r\n")[:1] == "{":
            return [json.loads(line.strip("\ufeff"), parse_int=str, parse_float=str) for line in text.split("\n") if line.strip("\ufeff \t\r\n")]
        header, *rows = [cells for cells in csv.reader(io.StringIO(text, newline=""), strict=True) if any(cells)]
        header = [name.strip("\ufeff \t") for name in header]
        return [dict(zip(header, row)) for row in rows] if all(len(row) == len(header) for row in rows) else None
    except (ValueError, csv.Error, RecursionError):
        return None


def test_a_thousand_broken_files_are_read_as_by_the_oracle_or_refused(tmp_path, capsys):
    """0 tracebacks, 0 hangs, 0 shifted columns, 0 garbled characters; the seed of a failing file is in its message."""
    table = [(f"{q}{n}", f"{a}，“{n}”") for n, (q, a) in enumerate(zip(QUESTIONS, ANSWERS))]
    text = io.StringIO()
    csv.writer(text).writerows([("问题", "回答"), *table])
    lines = "\n".join(json.dumps({"问题": q, "回答": a}, ensure_ascii=False) for q, a in table)
    seeds = [text.getvalue().encode(), text.getvalue().encode("gb18030"), text.getvalue().encode("utf-16"), ("\ufeff" + text.getvalue()).encode(),
             lines.encode(), lines.encode("gb18030"), ("[" + lines.replace("\n", ",\n") + "]").encode()]
    path, read, refusals, slowest = tmp_path / "t.csv", 0, 0, 0.0
    for n in range(1400):
        rng = random.Random(FUZZ_SEED + n)
        data = mutate(rng, seeds[n % len(seeds)])
        path.write_bytes(data)
        began = time.perf_counter()
        try:
            rows = [tuple(m["content"] for m in row["messages"]) for row in load_rows(str(path), skip_bad_rows=False)[0] if "messages" in row]
            read += 1
        except SystemExit as stop:
            message = capsys.readouterr().err
            assert stop.code in (2, 3) and "t.csv" in message and len(message[message.index("错误："):].strip().splitlines()) <= 6, (n, message)
            refusals += 1
            continue
        finally:
            slowest = max(slowest, time.perf_counter() - began)
        expected = oracle(data)
        assert expected is not None, (n, data)
        known = {"问题": "问题", "回答": "回答"}
        expected = [tuple(str(record[name]).strip() for name in known) for record in expected if all(str(record.get(name) or "").strip() for name in known)]
        assert rows == expected, (n, data)
        assert all("\ufffd" not in cell for row in rows for cell in row), (n, data)
    assert slowest < 2
    assert read > 250 and refusals > 500, (read, refusals)
    print(f"{read} read as by the oracle, {refusals} refused, slowest {slowest:.3f} s, seed {FUZZ_SEED}")


def test_a_tab_separated_file_is_known_by_the_columns_that_the_user_names(tmp_path):
    path = tmp_path / "qa.tsv"
    path.write_text("Q\tA\n一，二？\t三\n", encoding="utf-8")
    assert pairs(load_rows(str(path), columns="instruction=Q,output=A")[0]) == [("一，二？", "三")]


def test_a_column_called_history_is_left_alone_where_the_user_names_the_others(tmp_path, capsys):
    path = write_csv(tmp_path / "patients.csv", [("头晕怎么办？", "先量血压。", "高血压三年")], header=("问题", "回答", "历史"))
    refused(tmp_path / "patients.csv", capsys)
    assert pairs(load_rows(path, columns="instruction=问题,output=回答")[0]) == [("头晕怎么办？", "先量血压。")]


def test_a_conversation_without_a_question_is_dropped_and_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"conversations": [{"from": "gpt", "value": "你好"}]}\n{"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}\n',
                    encoding="utf-8")
    rows, dropped = load_rows(str(path))
    assert pairs(rows) == [("问", "答")] and len(dropped) == 1 and f"{path}:1" in dropped[0]


def test_leftovers_in_a_folder_are_not_data(tmp_path):
    write_csv(tmp_path / "constraints.csv", ROWS[:2])
    write_csv(tmp_path / "more.csv", ROWS[2:4])
    for name in (".tmp-train.csv", "._train.csv", "~$train.csv"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    assert pairs(load_rows(str(tmp_path))[0]) == ROWS[:4]
    write_csv(tmp_path / "legaltrain.csv", ROWS[4:5])
    assert pairs(load_rows(str(tmp_path))[0]) == ROWS[4:5]


def test_a_history_of_messages_or_of_pairs_is_the_same_conversation(tmp_path, capsys):
    roles = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]
    for n, history in enumerate((roles, [["你好", "您好"]])):
        (tmp_path / f"{n}.json").write_text(json.dumps({"instruction": "问", "output": "答", "history": history}), encoding="utf-8")
        assert [m["content"] for m in load_rows(str(tmp_path / f"{n}.json"))[0][0]["messages"]] == ["你好", "您好", "问", "答"]
    for n, history in enumerate((["你好", "您好"], [["一", "二", "三"]])):
        (tmp_path / f"bad{n}.json").write_text(json.dumps({"instruction": "问", "output": "答", "history": history}), encoding="utf-8")
        assert "的对话应该是" in refused(tmp_path / f"bad{n}.json", capsys)


def test_rows_of_a_json_array_on_one_line_have_places_of_their_own(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": q, "output": a} for q, a in ROWS], ensure_ascii=False), encoding="utf-8")
    places = [row["where"].removeprefix(f"{path}:") for row in load_rows(str(path))[0]]
    assert places[0] == "1" and len(set(places)) == len(ROWS)
    text = path.read_text(encoding="utf-8")
    assert all(text[int(place.partition(":")[2]) - 1] == "{" for place in places[1:])
    path.write_text(json.dumps([{"instruction": q, "output": a} for q, a in ROWS], ensure_ascii=False, indent=1), encoding="utf-8")
    assert [row["where"] for row in load_rows(str(path))[0]] == [f"{path}:{2 + 4 * n}" for n in range(len(ROWS))]


def test_the_sheets_that_are_not_read_are_named(tmp_path, capsys):
    import openpyxl

    book = openpyxl.Workbook()
    book.active.title = "合同"
    for title, rows in (("合同", ROWS), ("劳动", ROWS), ("Sheet3", [])):
        sheet = book[title] if title in book.sheetnames else book.create_sheet(title)
        for line in [("问题", "回答"), *rows] if rows else ():
            sheet.append(line)
    book.save(tmp_path / "t.xlsx")
    assert pairs(load_rows(str(tmp_path / "t.xlsx"))[0]) == ROWS
    said = capsys.readouterr().err
    assert "第一张工作表“合同”，没有读 劳动。" in said and "Sheet3" not in said
    book.remove(book["劳动"])
    book.save(tmp_path / "t.xlsx")
    load_rows(str(tmp_path / "t.xlsx"))
    assert "工作表" not in capsys.readouterr().err


def test_excels_own_line_ends_days_and_broken_titles(tmp_path):
    import datetime

    import openpyxl

    book = openpyxl.Workbook()
    for line in (["instruction", "output", "#REF!"], ["几号？", datetime.date(2024, 5, 1), "x"], ["两行", "一_x000D_\n二_x000D_三", None]):
        book.active.append(line)
    book.save(tmp_path / "t.xlsx")
    assert pairs(load_rows(str(tmp_path / "t.xlsx"))[0]) == [("几号？", "2024-05-01"), ("两行", "一\n二\n三")]


@pytest.mark.parametrize("names", [("Train.csv", "Test.csv"), ("训练.csv", "测试.csv"), ("TRAIN.CSV", "test.csv")])
def test_of_a_split_folder_only_the_training_part_is_learned(tmp_path, names):
    for name, row in zip(names, ROWS):
        write_csv(tmp_path / name, [row])
    assert pairs(load_rows(str(tmp_path))[0]) == ROWS[:1]


def test_columns_may_have_blanks_around_their_names_and_an_unknown_use_is_refused(tmp_path, capsys):
    path = write_csv(tmp_path / "t.csv", [("问", "答", "补充")], ("问题", "回答", "备注"))
    rows = load_rows(path, columns="output=回答, input = 备注，")[0]
    assert rows[0]["messages"][0]["content"] == "问\n补充"
    for columns, words in (("context=备注", "context= 这种写法"), ("input=没有的", "没有的 列")):
        with pytest.raises(SystemExit) as stop:
            load_rows(path, columns=columns)
        assert stop.value.code == 3 and words in capsys.readouterr().err


def test_a_folder_without_tables_and_a_title_above_the_header_are_told(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "没有数据文件" in refused(tmp_path / "empty", capsys)
    write_csv(tmp_path / "t.csv", [("instruction", "output"), ROWS[0]], ("客服问答汇总", ""))
    assert "上面的标题请删掉" in refused(tmp_path / "t.csv", capsys)
