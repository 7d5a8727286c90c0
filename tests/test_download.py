"""download_model.py against a small hub of our own on this machine: resumes, verifies, and says quickly when nothing answers."""

import hashlib
import http.server
import json
import threading
import time
import urllib.parse
from pathlib import Path
from typing import ClassVar

import pytest

from conftest import make_model, run


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of ModelScope's interface that a download uses; `cut` breaks off the first answers for a file half-way."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    cut: ClassVar[dict[str, int]] = {}
    ranges: ClassVar[list] = []

    def log_message(self, *args):
        pass

    def reply(self, body, status=200, headers=()):
        self.send_response(status)
        for name, value in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        return body

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(url.query)
        if url.path.endswith("/repo/files"):
            files = [{"Name": n, "Path": n, "Type": "blob", "Size": len(b), "Sha256": hashlib.sha256(b).hexdigest(), "Revision": "abc", "IsLFS": True, "Mode": "33188",
                      "Id": "1", "CommitId": "abc", "CommittedDate": 1, "InCheck": False} for n, b in self.files.items()]
            body = {"Data": {"Files": files, "TotalCount": len(files)}}
        elif url.path.endswith("/revisions"):
            body = {"Data": {"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": []}}}
        elif url.path.endswith("/repo") or "/resolve/" in url.path:
            return self.send_file(query.get("FilePath", [url.path.rsplit("/", 1)[-1]])[0])
        else:
            body = {"Data": {}}
        if self.command == "GET":
            self.wfile.write(self.reply(json.dumps({"Code": 200, "Success": True, "Message": "", "RequestId": "r", **body}).encode(), headers=[("Content-Type", "application/json")]))
        else:
            self.reply(b"")

    def send_file(self, name):
        data, wanted = self.files[name], self.headers.get("Range")
        start, _, end = wanted.removeprefix("bytes=").partition("-") if wanted else ("0", "", "")
        body = data[int(start):int(end) + 1 if end else None]
        if wanted:
            self.ranges.append((name, int(start)))
        sent = body
        if self.command == "GET" and self.cut.get(name, 0) > 0:
            self.cut[name] -= 1
            sent, self.close_connection = body[:len(body) // 2], True
        headers = [("Accept-Ranges", "bytes")] + ([("Content-Range", f"bytes {start}-{int(start) + len(body) - 1}/{len(data)}")] if wanted else [])
        self.reply(body, 206 if wanted else 200, headers)
        if self.command == "GET":
            self.wfile.write(sent)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """(endpoint, files): a hub that serves a tiny model."""
    base = make_model(tmp_path / "served")
    Hub.files = {path.name: path.read_bytes() for path in sorted(Path(base).iterdir())}
    Hub.files["original/consolidated.00.pth"] = b"x" * 1000
    Hub.cut, Hub.ranges = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Hub.files
    server.shutdown()


def fetch(endpoint, tmp_path, code=0, **kwargs):
    home = {"MODELSCOPE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return run("download_model.py", "--model", "ORG/tiny", "--endpoint", endpoint, cwd=tmp_path, env=home, code=code, **kwargs)


def test_a_download_lands_in_models_org_name_verified_and_without_other_formats(hub, tmp_path):
    endpoint, files = hub
    result = fetch(endpoint, tmp_path)
    assert result.stdout.strip().splitlines()[-1] == "模型已下载到: ./models/ORG/tiny"
    folder = tmp_path / "models" / "ORG" / "tiny"
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")} == set(files) - {"original/consolidated.00.pth"}
    assert all((folder / name).read_bytes() == body for name, body in files.items() if "original" not in name)
    assert "完好" in run("download_model.py", "--verify", folder).stderr
    run("inference.py", "--use_original_model", "--base_model", "./models/ORG/tiny", "--prompt", "你好", "--max_new_tokens", 2, cwd=tmp_path)


def test_a_cut_connection_goes_on_where_it_broke_off(hub, tmp_path):
    endpoint, files = hub
    Hub.cut = {"model.safetensors": 1}
    fetch(endpoint, tmp_path)
    assert (tmp_path / "models" / "ORG" / "tiny" / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert any(name == "model.safetensors" and start > 0 for name, start in Hub.ranges)


def test_damaged_files_are_named_with_sizes_or_hashes_and_fetched_again(hub, tmp_path):
    endpoint, files = hub
    fetch(endpoint, tmp_path)
    weights = tmp_path / "models" / "ORG" / "tiny" / "model.safetensors"
    flipped = bytearray(files["model.safetensors"])
    flipped[-5] ^= 4
    for content, word in ((bytes(flipped), "sha256"), (bytes(flipped[:-100]), "字节"), (b"", "字节")):
        weights.write_bytes(content)
        error = run("download_model.py", "--verify", weights.parent, code=4).stderr
        assert "model.safetensors" in error and word in error
    weights.unlink()
    fetch(endpoint, tmp_path)
    assert weights.read_bytes() == files["model.safetensors"]


def test_without_a_record_the_formats_themselves_are_checked(tmp_path):
    base = tmp_path / "m"
    make_model(base)
    good = (base / "model.safetensors").read_bytes()
    run("download_model.py", "--verify", base)
    for content in (good[:-1], b"\0" * 100, b"version https://git-lfs.github.com/spec/v1\n"):
        (base / "model.safetensors").write_bytes(content)
        assert "model.safetensors" in run("download_model.py", "--verify", base, code=4).stderr
    (base / "model.safetensors").unlink()
    assert "权重" in run("download_model.py", "--verify", base, code=4).stderr
    assert "config.json" in run("download_model.py", "--verify", tmp_path / "none", code=4).stderr


def test_a_hub_that_does_not_answer_is_an_error_within_seconds(tmp_path):
    began = time.monotonic()
    error = fetch("http://127.0.0.1:9", tmp_path, code=6).stderr
    assert "--demo" in error
    assert time.monotonic() - began < 15  # the client itself would try for 22 s after seconds of imports


def test_an_unknown_model_name_is_an_error(tmp_path):
    assert "ORG/NAME" in run("download_model.py", "--model", "../evil", code=2).stderr
    assert "ORG/NAME" in run("download_model.py", "--model", "justname", code=2).stderr


def test_an_address_without_a_scheme_and_a_folder_that_is_no_model_get_a_sentence(tmp_path):
    said = run("download_model.py", "--source", "huggingface", "--endpoint", "127.0.0.1:9", "--model", "a/b", cwd=tmp_path, code=6).stderr
    assert "https://127.0.0.1:9" in said and "--endpoint" in said
    said = run("download_model.py", "--source", "huggingface", "--model", "a/b", cwd=tmp_path, code=6, env={"HF_ENDPOINT": "127.0.0.1:8"}).stderr
    assert "https://127.0.0.1:8" in said
    assert "删掉" not in run("download_model.py", "--verify", tmp_path, code=4).stderr
    base = Path(make_model(tmp_path / "base"))
    (base / ".files.json").write_text("{", encoding="utf-8")
    assert "删掉这个文件" in run("download_model.py", "--verify", base, code=4).stderr


def test_the_default_name_is_not_asked_of_hugging_face(tmp_path):
    assert "同时写 --model" in run("download_model.py", "--source", "huggingface", "--endpoint", "127.0.0.1:9", cwd=tmp_path, code=2).stderr
