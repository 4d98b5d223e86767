"""hub.py: upload and download by huggingface_hub itself, against a hub that is a small server in this process.

The server answers what huggingface_hub asks for, and stores small and large files alike in the commit: the real hub
takes large files by another way, LFS or Xet, which is not tested here.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from teasr import Upscaler
from teasr.commands import export as command

pytest.importorskip("huggingface_hub", reason="the extra `train` is not installed")
TOKEN = "hf_token"


class Hub(BaseHTTPRequestHandler):
    """Repositories by name: {path: content}. `self.server.repos` holds them; those in `private` need the token."""

    def log_message(self, *arguments):
        pass

    def answer(self, code: int, body: bytes | dict = b"", **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            return self.answer(200, {"url": f"{self.server.address}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files, "commitOid": "0" * 40})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{SHA}", "commitOid": SHA})
        return self.answer(404)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        allowed = name not in self.server.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self.server.repos or not allowed:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = self.server.repos[name]
        if parts[0] == "api" and "tree" in parts:
            tree = [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()]
            return self.answer(200, json.dumps(tree).encode())
        if parts[0] == "api":
            found = {"id": name, "sha": SHA, "siblings": [{"rfilename": path} for path in files], "private": False}
            return self.answer(200, found | {"tags": [], "downloads": 0, "likes": 0, "gated": False})
        content = files["/".join(parts[4:])]
        return self.answer(200, content, ETag=f'"{_oid(content)}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET


SHA = "1" * 40


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running hub, to which huggingface_hub talks in this process, with an empty cache and no login."""
    import huggingface_hub.constants as constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.private = {}, set()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_goes_to_the_hub_and_back(hub, untrained, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert command.main([str(untrained), "--push-to-hub", "me/restorer"]) == 0, capsys.readouterr().err
    assert f"uploaded to {hub.address}/me/restorer: load it with --model me/restorer" in capsys.readouterr().out
    names = {"ema.safetensors", "fixed.safetensors", "config.yaml", "README.md", "MANIFEST.json"}
    assert set(hub.repos["me/restorer"]) == names
    card = hub.repos["me/restorer"]["README.md"].decode()
    assert "--model me/restorer\n" in card and 'from_pretrained("me/restorer")' in card
    hub.repos["me/restorer"]["README.md"] += b"\nEdited on the page of the hub.\n"
    monkeypatch.delenv("HF_TOKEN")
    photo = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    made = Upscaler.from_pretrained("me/restorer")(photo)
    assert np.array_equal(made, Upscaler.from_pretrained(untrained)(photo))


def test_a_private_model_stays_private(hub, untrained, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert command.main([str(untrained), "--push-to-hub", "me/secret", "--private"]) == 0
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="the hub has no model of that name that you can access"):
        Upscaler.from_pretrained("me/secret")


def test_mistakes_at_uploading(hub, untrained, monkeypatch, capsys):
    assert command.main([str(untrained), "--push-to-hub", "me/restorer"]) == 2
    assert "log in with `hf auth login`, or set HF_TOKEN to a token that may write" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert command.main([str(untrained), "--push-to-hub", "me/no such name"]) == 2
    assert "use owner/name" in capsys.readouterr().err
    assert hub.repos == {}
