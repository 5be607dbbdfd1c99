"""A model hub on this machine: as much of Hugging Face's and ModelScope's HTTP interface as their libraries ask for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """`files` are the repository org/name; `asked` the paths that were requested, `fetched` the files sent."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.url = files, ""
        self.asked: list[str] = []
        self.fetched: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a GET."""
        url, head = urlsplit(path), "/api/models/org/name"
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path in (head, f"{head}/revision/main", f"{head}/revision/{COMMIT}"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            return self._json({"id": "org/name", "sha": COMMIT, "siblings": siblings})
        if url.path.startswith(f"{head}/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if url.path.startswith(f"{head}/tree/"):
            listed = [{"type": "file", "oid": _hash(d), "size": len(d), "path": n} for n, d in self.files.items()]
            return self._json(listed)
        if url.path.startswith("/org/name/resolve/"):
            return self._file(unquote(url.path.split("/", 5)[5]))
        if url.path == "/api/v1/models/org/name/repo/files" and query.get("Revision", "master") == "master":
            listed = [
                {"Path": n, "Name": n, "Size": len(d), "Type": "blob", "Sha256": _hash(d)}
                for n, d in self.files.items()
            ]
            return self._json({"Code": 200, "Success": True, "Data": {"Files": listed}})
        if url.path == "/api/v1/models/org/name/repo":
            return self._file(query["FilePath"])
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _json(self, value: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def _file(self, name: str) -> tuple[int, dict[str, str], bytes]:
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = self.files[name]
        return 200, {"ETag": f'"{_hash(data)}"', "X-Repo-Commit": COMMIT, "X-Name": name}, data


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serve(hub: HubStandIn) -> Iterator[HubStandIn]:
    """With its address in `hub.url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            hub.asked.append(self.path)
            if "X-Name" in headers and self.command == "GET":
                hub.fetched.append(headers["X-Name"])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
