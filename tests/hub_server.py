"""A small Hub on localhost: what huggingface_hub's client needs to create, commit to and read a model repository.

Repositories live in memory; a commit is one swap of a reference, large files arrive through the LFS batch protocol and
are checked against their sha256, files are resolved with ETags and ranges, large ones through a redirect. A fault can
be set on any kind of request.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub.file_download
import yaml
from huggingface_hub import ModelCardData

TOKEN = "hf_localhostSecretToken0123456789"
LFS_SUFFIXES = (".safetensors", ".bin", ".pth")


class Missing(Exception):
    """What was asked for is not there, or not for the one who asks."""

    def __init__(self, what, code):
        self.what, self.code = what, code


@dataclass
class Fault:
    """What goes wrong, on the next ``times`` requests of a kind.

    Attributes:
        status: Answer with this HTTP status and do nothing.
        after: Do the work first, and then fail.
        reset: Close the connection in the middle of the body.
        truncate: Send half of the body, and say that it is all.
        corrupt: Send, or keep, a body with a bit flipped.
        trickle: Send the body in small pieces with this pause, in seconds, between them.
        headers: More headers for the answer.
    """

    status: int | None = None
    after: bool = False
    reset: bool = False
    truncate: bool = False
    corrupt: bool = False
    trickle: float = 0.0
    headers: dict = field(default_factory=dict)
    times: float = float("inf")


FAULTS = {
    "401": Fault(status=401),
    "403": Fault(status=403),
    "404": Fault(status=404),
    "409": Fault(status=409),
    "429": Fault(status=429, headers={"Retry-After": "7"}),
    "500": Fault(status=500),
    "reset": Fault(reset=True),
    "truncated": Fault(truncate=True),
    "checksum": Fault(corrupt=True),
    "trickle": Fault(trickle=0.002),
}
"""Those that any request may meet."""


@dataclass
class Commit:
    oid: str
    parent: str | None
    files: dict  # path: content
    summary: str = ""


class Repository:
    def __init__(self, private):
        self.private = private
        self.commits = {}
        self.branches = {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, branch, files, summary):
        parent = self.branches.get(branch)
        content = repr((parent, sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())))
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, dict(files), summary)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision):
        return self.commits.get(self.branches.get(revision, revision))

    def history(self, branch="main"):
        oids, oid = [], self.branches[branch]
        while oid:
            oids.append(oid)
            oid = self.commits[oid].parent
        return oids


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path):
    return path.endswith(LFS_SUFFIXES)


def pointer(data):
    sha = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(data)}\n".encode()


def metadata_errors(text):
    """What is wrong with a card's metadata, by huggingface_hub's own reader and the types that the Hub documents."""
    parts = text.split("---\n")
    if len(parts) < 3 or parts[0]:
        return ["there is no metadata"]
    try:
        data = yaml.safe_load(parts[1])
        ModelCardData(**data, ignore_metadata_errors=False)
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return [str(error)]
    errors = []
    for key, kinds in dict(
        license=str, library_name=str, pipeline_tag=str, tags=list, datasets=(str, list), base_model=(str, list)
    ).items():
        if key in data and not isinstance(data[key], kinds):
            errors.append(f"{key} is {data[key]!r}")
    for index in data.get("model-index", ()):
        for result in index["results"]:
            for metric in result["metrics"]:
                if not isinstance(metric.get("value"), (int, float)):
                    errors.append(f"a metric's value is {metric.get('value')!r}")
    return errors


# A request's kind, by method and path. The order counts.
ROUTES = [
    ("create", "POST", r"/api/repos/create"),
    ("validate-yaml", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)"),
    ("branch", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)"),
    ("commit", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)"),
    ("tree", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)"),
    ("info", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)"),
    ("info", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)"),
    ("lfs-batch", "POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("lfs-upload", "PUT", r"/lfs/(?P<sha>[0-9a-f]{64})"),
    ("lfs-verify", "POST", r"/lfs/verify"),
    ("head", "HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("download", "GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("lfs-download", "GET", r"/lfs/(?P<sha>[0-9a-f]{64})"),
    ("lfs-download", "HEAD", r"/lfs/(?P<sha>[0-9a-f]{64})"),
]
KINDS = list(dict.fromkeys(kind for kind, *_ in ROUTES))


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.objects = {}
        self.faults = {}
        self.seen = []  # kinds of the requests, in order
        self.told = []  # kinds of those to the store that came with the token
        self.lock = threading.RLock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def store_url(self):
        """Where large files lie: another host, to which the client must not send its token."""
        return f"http://localhost:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that went away is what some tests are about

    def take_fault(self, kind):
        with self.lock:
            fault = self.faults.get(kind)
            if fault is None or fault.times <= 0:
                return None
            fault.times -= 1
            return fault


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for the client's delayed acknowledgement
    server: HubServer

    def log_message(self, *args):
        pass

    def do_POST(self):
        path = unquote(urlsplit(self.path).path) if "%2F" not in self.path else urlsplit(self.path).path
        for kind, method, pattern in ROUTES:  # noqa: B007
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                break
        else:
            self.body = self.read()
            return self.send(404, dict(error=f"no route {self.command} {path}"))
        self.server.seen.append(kind)
        if kind in ("lfs-upload", "lfs-download") and self.headers.get("Authorization"):
            self.server.told.append(kind)
        self.fault = self.server.take_fault(kind)
        if self.fault and self.fault.reset and self.command == "PUT":
            self.read(half=True)
            return self.hang_up()
        self.body = self.read()
        if self.fault and self.fault.status and not self.fault.after:
            return self.fail()
        if not kind.startswith("lfs-") or kind == "lfs-batch":
            if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
                return self.send(401, dict(error=f"bad credentials: {self.headers['Authorization']}"))
            if self.command == "POST" and kind != "validate-yaml" and self.headers.get("Authorization") is None:
                return self.send(401, dict(error="log in"))
        with self.server.lock:
            try:
                answer = getattr(self, kind.replace("-", "_"))(**match.groupdict())
            except Missing as missing:
                answer = 404, dict(error=f"{missing.what} not found"), {"X-Error-Code": missing.code}
        if self.fault and self.fault.after and self.fault.status:
            return self.fail()
        self.send(*answer)

    do_GET = do_HEAD = do_PUT = do_POST

    def read(self, half=False):
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length // 2 if half else length)

    def hang_up(self):
        """Lingering for no time, so that the client sees a reset and not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def fail(self):
        if self.fault.status == 401:  # as some servers do, hand the secret back
            error = f"unauthorised: {self.headers.get('Authorization')}"
        else:
            error = f"fault {self.fault.status}"
        self.send(self.fault.status, dict(error=error), self.fault.headers)

    def send(self, status, content=b"", headers=None):
        fault = self.fault if hasattr(self, "fault") else None
        if isinstance(content, (dict, list)):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        body = content if self.command != "HEAD" else b""
        length = len(content)
        if fault and fault.corrupt and body and self.command == "GET" and status in (200, 206):
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault and fault.truncate and status < 300:
            body = body[: length // 2]
            length = len(body) if self.command != "HEAD" else length
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault and fault.reset:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            return self.hang_up()
        if fault and fault.trickle:
            step = max(1, len(body) // 20)
            for i in range(0, len(body), step):
                self.wfile.write(body[i : i + step])
                self.wfile.flush()
                time.sleep(fault.trickle)
            return
        self.wfile.write(body)

    # The routes: each returns status, content and perhaps headers.

    def create(self):
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        url = dict(url=f"{self.server.url}/{name}")
        if name in self.server.repositories:
            return 409, dict(url, error="You already created this model repo")
        self.server.repositories[name] = Repository(wanted.get("visibility") == "private")
        return 200, url

    def repository(self, name):
        found = self.server.repositories.get(name)
        if found is None or (found.private and self.headers.get("Authorization") is None):
            raise Missing("Repository", "RepoNotFound")
        return found

    def at(self, repo, revision):
        """The repository, and its commit of that name."""
        found = self.repository(repo)
        commit = found.at(unquote(revision))
        if commit is None:
            raise Missing("Revision", "RevisionNotFound")
        return found, commit

    def info(self, repo, revision="main"):
        found, commit = self.at(repo, revision)
        files = [dict(rfilename=path) for path in sorted(commit.files)]
        return 200, dict(id=repo, modelId=repo, sha=commit.oid, private=found.private, siblings=files, tags=[])

    def tree(self, repo, revision):
        _, commit = self.at(repo, revision)
        rows = []
        for path, data in sorted(commit.files.items()):
            row = dict(type="file", path=path, size=len(data), oid=git_oid(pointer(data) if is_lfs(path) else data))
            if is_lfs(path):
                sha = hashlib.sha256(data).hexdigest()
                row["lfs"] = dict(oid=sha, size=len(data), pointerSize=len(pointer(data)))
            rows.append(row)
        return 200, rows

    def branch(self, repo, revision):
        found = self.repository(repo)
        if unquote(revision) in found.branches:
            return 409, dict(error="Reference already exists")
        found.branches[unquote(revision)] = found.branches["main"]
        return 200, {}

    def validate_yaml(self):
        errors = metadata_errors(json.loads(self.body)["content"])
        answer = dict(errors=[dict(message=error) for error in errors], warnings=[])
        return (400 if errors else 200), answer

    def preupload(self, repo, revision):
        _, commit = self.at(repo, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answer = dict(path=path, uploadMode="lfs" if is_lfs(path) else "regular", shouldIgnore=False)
            if path in commit.files:
                data = commit.files[path]
                # The client compares with sha256 for large files, with git's own id for the others.
                answer["oid"] = hashlib.sha256(data).hexdigest() if is_lfs(path) else git_oid(data)
            files.append(answer)
        return 200, dict(files=files, commitOid=commit.oid)

    def lfs_batch(self, repo):
        wanted = json.loads(self.body)
        assert wanted["operation"] == "upload" and "basic" in wanted["transfers"]
        objects = []
        for item in wanted["objects"]:
            answer = dict(oid=item["oid"], size=item["size"])
            if item["oid"] not in self.server.objects:
                answer["actions"] = dict(
                    upload=dict(href=f"{self.server.store_url}/lfs/{item['oid']}"),
                    verify=dict(href=f"{self.server.url}/lfs/verify"),
                )
            objects.append(answer)
        return 200, dict(transfer="basic", objects=objects)

    def lfs_upload(self, sha):
        body = self.body
        if self.fault and self.fault.corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        if hashlib.sha256(body).hexdigest() != sha:
            return 400, dict(error="the content's sha256 is not the one announced")
        self.server.objects[sha] = body
        return 200, b""

    def lfs_verify(self):
        wanted = json.loads(self.body)
        stored = self.server.objects.get(wanted["oid"])
        return (
            (200, {}) if stored is not None and len(stored) == wanted["size"] else (404, dict(error="no such object"))
        )

    def commit(self, repo, revision):
        found = self.repository(repo)
        branch = unquote(revision)
        if branch not in found.branches:
            raise Missing("Revision", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, found.branches[branch]):
            return 412, dict(error="A commit has happened since. Please refresh and try again.")
        files = dict(found.at(branch).files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return 400, dict(error=f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                return 400, dict(error=f"unknown operation {line['key']}")
        commit = found.commit(branch, files, header["summary"])
        return 200, dict(success=True, commitOid=commit.oid, commitUrl=f"{self.server.url}/{repo}/commit/{commit.oid}")

    def resolve(self, repo, revision, path):
        _, commit = self.at(repo, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            return 404, dict(error="Entry not found"), {**headers, "X-Error-Code": "EntryNotFound"}
        data = commit.files[path]
        if is_lfs(path):
            sha = hashlib.sha256(data).hexdigest()
            self.server.objects.setdefault(sha, data)
            headers.update({"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))})
            return 302, b"", {**headers, "Location": f"{self.server.store_url}/lfs/{sha}"}
        return self.ranged(data, {**headers, "ETag": f'"{git_oid(data)}"'})

    head = download = resolve

    def lfs_download(self, sha):
        if sha not in self.server.objects:
            return 404, dict(error="no such object")
        return self.ranged(self.server.objects[sha], {"ETag": f'"{sha}"'})

    def ranged(self, data, headers):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers["Accept-Ranges"] = "bytes"
        if not wanted:
            return 200, data, headers
        start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return 206, data[start : end + 1], headers


@contextmanager
def hub_server():
    """A running server, stopped afterwards."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(server, home, monkeypatch):
    """Point huggingface_hub, in this process, at ``server``, with a cache of its own and no waiting between tries.

    Returns:
        The seconds that it wanted to wait, filled as it runs.
    """
    constants = dict(
        ENDPOINT=server.url,
        HUGGINGFACE_CO_URL_TEMPLATE=server.url + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_CACHE=str(home / "hub"),
        HF_HUB_DISABLE_XET=True,
        HF_HUB_OFFLINE=False,
        HF_HUB_ETAG_TIMEOUT=5,
        HF_HUB_DOWNLOAD_TIMEOUT=5,
    )
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    waits = []
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        quick = SimpleNamespace(**{**vars(time), "sleep": waits.append})
        monkeypatch.setattr(module, "time", quick)
    return waits
