"""A Hugging Face hub on this machine, as far as its client asks: repositories, commits, files."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Repositories as {name: {path: bytes}}; `private` are those that were made so."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """What `HfApi.create_repo`, `upload_folder`, `snapshot_download` and diffusers call."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, content: object = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self) -> None:
        self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def commit_of(self, name: str) -> str:
        files = self.server.repositories[name]
        return sha(b"".join(f"{path} {sha(files[path])}".encode() for path in sorted(files)))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "repos"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.server.private |= {name} if asked.get("visibility") == "private" else set()
            return self.answer(200, {"url": f"{self.server.address}/{name}", "name": name})
        if parts[1] == "validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        if name not in self.server.repositories:
            return self.missing()
        if parts[4] == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name][line["value"]["path"]] = content
        oid = self.commit_of(name)
        url = f"{self.server.address}/{name}/commit/{oid}"
        return self.answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[0] == "api"
        name = "/".join(parts[2:4] if api else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self.missing()
        if api and "tree" in parts:
            tree = [{"type": "file", "path": path, "size": len(data), "oid": sha(data)}
                    for path, data in files.items()]  # fmt: skip
            return self.answer(200, tree)
        if api:
            siblings = [{"rfilename": path} for path in files]
            info = {"id": name, "sha": self.commit_of(name), "siblings": siblings, "tags": []}
            return self.answer(200, info | {"private": name in self.server.private})
        path = "/".join(parts[4:])
        if path not in files:
            return self.answer(404, {"error": "no entry"}, X_Error_Code="EntryNotFound")
        etag = {"ETag": f'"{sha(files[path])}"', "X_Repo_Commit": self.commit_of(name)}
        return self.answer(200, files[path], **etag)

    do_HEAD = do_GET


@contextmanager
def serving():
    """Yield a hub that answers until the end of the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
