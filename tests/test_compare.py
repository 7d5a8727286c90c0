"""The page and compare_models.py's figures: nothing from a model runs in the page, and it reads well on a phone."""

import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import ANSWERS, QUESTIONS, call, train

PAYLOADS = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>", "<svg/onload=alert(1)//",
    "<iframe src=javascript:alert(1)>", "<body onload=alert(1)>", "<a href=\"javascript:alert(1)\">x</a>", "\"><script>alert(1)</script>", "'><script>alert(1)</script>",
    "\" onmouseover=\"alert(1)", "' onmouseover='alert(1)", "` onmouseover=`alert(1)", "</style><script>alert(1)</script>", "</title><script>alert(1)</script>",
    "</textarea><script>alert(1)</script>", "<!--<script>alert(1)</script>-->", "--><script>alert(1)</script>", "]]><script>alert(1)</script>", "<![CDATA[<script>alert(1)</script>]]>",
    "<math><mi//xlink:href=\"javascript:alert(1)\">", "<input autofocus onfocus=alert(1)>", "<details open ontoggle=alert(1)>", "<video><source onerror=alert(1)>", "<marquee onstart=alert(1)>",
    "<object data=javascript:alert(1)>", "<embed src=javascript:alert(1)>", "<base href=//evil.example/>", "<meta http-equiv=refresh content=0;url=//evil.example>",
    "<link rel=stylesheet href=//evil.example/x.css>", "<style>*{display:none}</style>", "<form action=//evil.example><input type=submit>", "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;", "<scr\0ipt>alert(1)</scr\0ipt>", "\u202e<script>alert(1)</script>", "＜script＞alert(1)＜/script＞", "<ScRiPt>alert(1)</sCrIpT>",
    "{{constructor.constructor('alert(1)')()}}", "${alert(1)}", "《<b>民法典</b>》第五百七十七条<script>alert(1)</script>", "%3Cscript%3Ealert(1)%3C/script%3E",
]


def page_of(tmp_path, results):
    from compare_models import write_page

    write_page(str(tmp_path / "report.html"), results)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def results_with(texts, models=("原始", "微调"), settings=None):
    """Results as the scripts make them, every text that can come from outside being one of `texts`."""
    from evaluate_model import collect

    texts = list(texts)
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text + "参考"}]} for text in texts]
    answers = [[{"text": text + "原" * n, "tokens": 9, "stopped": bool(n % 2), "seconds": 0.5} for n, text in enumerate(texts, m)] for m in range(len(models))]
    return {"title": texts[0], "subtitle": texts[-1], "warnings": texts, "adapters": [], "settings": dict(zip(texts, texts)) if settings is None else settings,
            **collect(rows, answers, list(models), 42), "tables": [(text, [[text, text], [text, text]]) for text in texts]}


class Elements(HTMLParser):
    """All tags with their attributes, and the text of script elements."""

    def __init__(self, page):
        super().__init__()
        self.found, self.scripts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script" and self.get_starttag_text().startswith("<script"):
            self.scripts.append(data)


def shape(page):
    return [(tag, tuple(attributes)) for tag, attributes in Elements(page).found]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_from_a_model_or_a_file_becomes_markup(tmp_path, payload):
    from compare_models import SCRIPT

    assert len(PAYLOADS) >= 40
    models = ("原始" + payload, "微调" + payload)
    page = page_of(tmp_path, results_with([payload, payload + "二"], models))
    # the same page with as many plain letters instead has the same elements with the same attributes
    plain = page_of(tmp_path, results_with(["字" * len(payload), "字" * len(payload) + "二"], ("原始", "微调")))
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "b", "div", "table", "thead", "tbody", "tr", "th", "td", "svg", "path", "circle",
               "form", "input", "select", "option", "output", "article", "details", "summary", "span", "script"}
    elements = Elements(page)
    assert {tag for tag, _ in elements.found} <= allowed
    assert [tag for tag, _ in elements.found if tag in ("script", "style", "meta", "title", "form", "input")] == [
        tag for tag, _ in shape(plain) if tag in ("script", "style", "meta", "title", "form", "input")]
    for tag, attributes in elements.found:
        assert not any(name.startswith("on") or name in ("href", "src", "action", "srcdoc") for name in attributes), (tag, attributes)
    assert "".join(elements.scripts) == SCRIPT
    assert "\u202e" not in page and "\0" not in page


def test_a_page_asks_the_network_for_nothing_and_runs_only_its_own_script(tmp_path):
    import base64
    import hashlib

    page = page_of(tmp_path, results_with(QUESTIONS))
    assert not re.search(r"https?:|//[a-z]", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in page and "default-src 'none'" in page


def test_the_loss_curves_are_drawn_from_numbers_only(tmp_path):
    (tmp_path / "run" / "final_model").mkdir(parents=True)
    results = {**results_with(QUESTIONS), "adapters": [str(tmp_path / "run" / "final_model")]}
    assert "polyline" not in page_of(tmp_path, results)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n, "loss": 3 - n / 4, "lr": 1}) + "\n" for n in range(1, 5)) + '{"step": 4, "val_loss": 2.5}\n', encoding="utf-8")
    page = page_of(tmp_path, results)
    first, last = re.findall(r'points="(\S+) .* (\S+)" fill="none" stroke="#4a90d9"', page)[0]
    assert (first, last) == ("40.0,10.0", "630.0,210.0") and page.count("<polyline") == 2 and ">2.75</text>" in page
    for key in ("step", "loss"):
        file.write_text(json.dumps({"step": 1, "loss": 1.0, key: '"/><script>alert(1)</script>'}), encoding="utf-8")
        assert "alert" not in page_of(tmp_path, results)


def test_citations_are_coloured_and_differences_marked():
    from compare_models import find_citations, marked

    text = "依照《民法典》第一条和第九千条，可以请求赔偿损失。"
    html = marked(text, find_citations(text, {"民法典": {"1"}}), "依照《民法典》第一条，可以请求赔偿。")
    assert '<span class="real">《民法典》第一条</span>' in html and '<span class="missing">第九千条</span>' in html
    assert re.sub(r"<[^>]*>", "", html) == text and '<span class="changed">' in html
    assert "changed" not in marked(text, [], text) and "changed" not in marked(text, []) and "changed" not in marked(text, [], "毫不相干的一句话")


def test_the_biggest_changes_come_first_and_the_words_match_the_verdicts(tmp_path):
    from evaluate_model import collect

    rows = [{"messages": [{"role": "user", "content": f"第{n}问"}, {"role": "assistant", "content": "一二三四五六七八九十"}]} for n in range(8)]
    answers = [[{"text": text, "tokens": 1, "stopped": True, "seconds": 1.0} for text in texts] for texts in (
        ["一二"] * 7 + ["一二三四五六七八九十"], ["一二三四"] * 3 + ["一二三四五六七八九十"] + ["一二三四五六"] * 3 + ["零"])]
    results = collect(rows, answers, ["原始", "微调"], 42)
    page = page_of(tmp_path, {"title": "t", "subtitle": "s", "warnings": ["小心"], "adapters": [], "settings": {}, **results})
    order = re.findall(r"<h3>(\d)\. ", page)
    assert order[:2] == ["8", "4"] and set(order[2:5]) == {"5", "6", "7"}
    assert "小心" in page and page.count("<article") == 8
    verdicts = {entry["title"]: entry["versus"][0]["verdict"] for entry in results["metrics"] if entry["versus"][0]}
    for word, title in (("better", "更好"), ("worse", "更差"), ("no difference shown", "看不出差别")):
        names = [name for name, verdict in verdicts.items() if verdict == word]
        assert not names or f"{title} {len(names)} 项</b>：{'、'.join(names)}</p>" in page


@pytest.fixture(scope="module")
def learned(tiny, data, tmp_path_factory):
    """Run folders of a tiny model that knows the eight answers by heart, and of one after a single step."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ("--learning_rate", 5e-3, "--lr_scheduler", "constant", "--val_ratio", 0, "--lora_dropout", 0, "--save_every", -1)
    return train(tiny, data, folder / "long", "--num_epochs", 100, *flags), train(tiny, data, folder / "short", "--max_steps", 1, *flags)


def test_several_adapters_are_compared_with_figures_where_there_are_references(learned, data, tmp_path, capsys):
    long, short = learned
    call("compare_models.py", "--lora_weights", short, "--lora_weights", long, "--test_file", data, "--max_new_tokens", 80,
         "--json", tmp_path / "out.json", "--report", tmp_path / "report.html")
    printed = capsys.readouterr().out
    assert len(re.findall(r"^微调回答长度: \d+ 字（(?:long|short)）$", printed, re.MULTILINE)) == 16
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert results["models"] == ["原始", "微调（short）", "微调（long）"]
    by_key = {entry["key"]: entry for entry in results["metrics"]}
    assert by_key["exact_match"]["scores"][2] == 100 and by_key["rougeL"]["versus"][1]["verdict"] == "better"
    assert by_key["nll"]["scores"][2] < 0.1 < by_key["nll"]["scores"][1]
    assert [row["answers"][2]["text"] for row in results["rows"]] == ANSWERS
    assert re.search(r"^ROUGE-L（long） .* 更好$", printed, re.MULTILINE)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == 8 and page.count("微调（long）") >= 8 and page.count("<polyline") == 4


def test_a_list_of_questions_gets_the_figures_that_need_no_reference(learned, tmp_path, capsys):
    (tmp_path / "q.txt").write_text("\n".join(QUESTIONS[:2]), encoding="utf-8")
    flags = ("--lora_weights", learned[0], "--test_file", tmp_path / "q.txt", "--max_new_tokens", 40)
    call("compare_models.py", *flags, "--json", tmp_path / "out.json")
    keys = {entry["key"] for entry in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["metrics"]}
    assert {"length", "stop_rate", "repetition"} <= keys and not {"rougeL", "nll", "probe_correct"} & keys
    capsys.readouterr()
    call("compare_models.py", *flags)
    assert "95% 区间" not in capsys.readouterr().out  # the screen without the new flags is as it was


# ---- In a browser ----

def chromium(page, width, *flags, height=900):
    """What headless Chromium prints for `page` with `flags`, at `width` pixels; fails on a console error."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no chromium on the PATH (Debian, Ubuntu: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}", f"--window-size={width},{height}",
                   "--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000", *flags, Path(page).resolve().as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    assert result.returncode == 0 and not console, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window_and_the_filter_works(tmp_path, width):
    """Chromium's window is at least 500 px wide, so the page is put in a frame of the phone's width; a copy of it, with its policy taken
    out, is measured by a script of the test's."""
    page = page_of(tmp_path, results_with([*QUESTIONS, "无空格的长串" + "x" * 400, "《民法典》第九千条"], settings={"LoRA": "/very/long/path" * 20}))
    chromium(tmp_path / "report.html", width, "--dump-dom")  # as it is: no console errors, the policy lets its own script run
    probe = """<script>{
      const form = document.forms[0], say = () => form.dispatchEvent(new Event("input"));
      const shown = () => [...document.querySelectorAll("article")].filter(card => card.offsetHeight).length;
      const out = { width: innerWidth, scroll: document.documentElement.scrollWidth, hidden: form.hidden, all: shown() };
      form.elements.words.value = "押金"; say(); out.words = shown();
      form.elements.words.value = ""; form.elements.kind.value = "missing"; say(); out.missing = shown(); out.count = form.elements.count.value;
      parent.postMessage(JSON.stringify(out), "*") }</script>"""
    (tmp_path / "measured.html").write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", probe + "</body>"), encoding="utf-8")
    (tmp_path / "frame.html").write_text(f'<iframe src="measured.html" width="{width}" height="800" style="border:0"></iframe><pre id="out"></pre>'
                                         '<script>onmessage = event => { document.getElementById("out").textContent = event.data }</script>', encoding="utf-8")
    found = re.search(r'<pre id="out">(.*?)</pre>', chromium(tmp_path / "frame.html", width + 100, "--dump-dom"))[1]
    out = json.loads(found.replace("&quot;", '"'))
    assert out["width"] == width and out["scroll"] <= width, out
    assert (out["hidden"], out["all"], out["words"], out["missing"], out["count"]) == (False, 10, 1, 1, "1 / 10"), out
