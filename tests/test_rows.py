"""Reading tables: what cannot be understood is refused with its line; no cell moves and no character changes."""

import json

import pytest

from common import load_rows, read_table
from conftest import ANSWERS, QUESTIONS, run, write_csv

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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "gbk", "utf-16", "utf-16-le"])
def test_the_encodings_of_excel_give_the_same_text(tmp_path, encoding):
    rows = [(q + "𠮷" if "gb18030" in encoding or "utf" in encoding else q, a) for q, a in ROWS]
    path = write_csv(tmp_path / "t.csv", rows, encoding="utf-8" if encoding == "utf-16-le" else encoding)
    if encoding == "utf-16-le":
        path_ = tmp_path / "t.csv"
        path_.write_bytes(b"\xff\xfe" + path_.read_text(encoding="utf-8").encode("utf-16-le"))
    assert pairs(load_rows(path)[0]) == rows


def test_a_gbk_row_in_a_utf8_file_is_refused_and_never_garbled(tmp_path, capsys):
    path = tmp_path / "t.csv"
    lines = ["instruction,output", *(f"{q},{a}" for q, a in ROWS)]
    path.write_bytes(b"\n".join(line.encode("gbk" if n == 4 else "utf-8") for n, line in enumerate(lines)))
    assert ":5" in refused(path, capsys)


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


def test_an_open_quote_is_refused_with_the_line_where_it_opened(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text('instruction,output\n问一,答一\n"问二,答二\n问三,答三\n', encoding="utf-8")
    assert ":3" in refused(path, capsys)


def test_words_and_numbers_stay_as_they_were(tmp_path):
    words = ["NA", "null", "None", "nan", "007", "1e5", "TRUE", '他说"好"', "一\n二", "a,b"]
    rows = [(f"问{n}", word) for n, word in enumerate(words)]
    assert pairs(load_rows(write_csv(tmp_path / "t.csv", rows))[0]) == rows


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


@pytest.mark.parametrize("text", ['[{"instruction": "a", "output": "b"},]', '{"instruction": "a"\n', '{"a": 1} nonsense', "[1, 2]", "[" * 100_000])
def test_broken_json_is_refused_with_its_line(tmp_path, capsys, text):
    (tmp_path / "t.json").write_text(text, encoding="utf-8")
    assert "t.json:" in refused(tmp_path / "t.json", capsys)


def test_empty_missing_and_binary_files_are_refused(tmp_path, capsys):
    for content in (b"", b"instruction,output\n", b"instruction,output\nab\0c,d\n"):
        (tmp_path / "t.csv").write_bytes(content)
        refused(tmp_path / "t.csv", capsys)
    refused(tmp_path / "none.csv", capsys)
    with pytest.raises(SystemExit):
        read_table(str(tmp_path))


def test_the_command_line_refuses_bad_data_with_exit_3(tiny, tmp_path):
    (tmp_path / "t.csv").write_text("instruction,output\n合同,法,多\n", encoding="utf-8")
    assert "t.csv:2" in run("train.py", "--model_name", tiny, "--dataset_name", tmp_path / "t.csv", code=3).stderr
