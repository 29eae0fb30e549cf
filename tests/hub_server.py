"""A Hub on this machine: what huggingface_hub asks of huggingface.co to publish and to load a model, over HTTP.

    python tests/hub_server.py        # and then what it prints, in another terminal

It keeps repositories in memory and listens on the loopback interface only. It checks what a Hub must: tokens, the
SHA-256 of uploaded weights, that a commit's weights have arrived; and it can fail on purpose. docs/hub.md says what
passing against it proves and what not.
"""

import base64
import hashlib
import io
import json
import re
import secrets
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = {".safetensors", ".bin", ".pt", ".ckpt", ".h5", ".parquet", ".zip", ".npz"}
LFS_SIZE = 10 * 2**20  # bytes from which a file of any name goes to the large file storage
DATE = "2025-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """A file of a commit: its content, and whether it is in the large file storage."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's id of the file, or of the pointer that stands for it."""
        stored = self.content
        if self.lfs:
            version = "version https://git-lfs.github.com/spec/v1"
            stored = f"{version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def describe(self, path: str) -> dict:
        description = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.lfs:
            description["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return description


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        tree = json.dumps([parent, title, sorted((path, file.etag) for path, file in files.items())])
        commit = Commit(hashlib.sha1(tree.encode()).hexdigest(), parent, title, files)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def log(self, revision: str = "main") -> list[str]:
        """Titles of the commits up to a revision, the last one first."""
        titles, commit = [], self.resolve(revision)
        while commit is not None:
            titles.append(commit.title)
            commit = self.commits.get(commit.parent)
        return titles


@dataclass(frozen=True)
class Request:
    """An entry of the request log."""

    method: str
    path: str
    status: int  # 0 where the connection was dropped
    user: str | None
    received: int  # bytes of its body
    range: str | None


class Refusal(Exception):
    """An answer that refuses."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class Dropped(Exception):
    """The connection ends without an answer."""


def cut(connection: socket.socket) -> None:
    """End a connection at once."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # closed already
        pass


class HubServer:
    """The Hub. A context manager, which serves while it is open.

    Args:
        users: names of users by token.
        port: 0 for any free one.

    Attributes:
        repositories: by id, such as ``"alice/model"`` or, of a Space, ``"spaces/alice/page"``.
        requests: the log.
        fail_every: answer every n-th request with 503, without doing it; 0 for none.
        lose_answers: patterns of paths; the next request that matches one is done, but its answer is lost.
        die_after: end after so many bytes of uploaded weights, in the middle of a request; None for never. `start`
            brings the Hub back at the same address, with what it had stored.
    """

    def __init__(self, users: dict[str, str] | None = None, port: int = 0) -> None:
        self.users = {"hf_alice": "alice", "hf_bob": "bob"} if users is None else users
        self.port = port
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.signatures: dict[str, str] = {}  # of the addresses for uploads: what each may write
        self.requests: list[Request] = []
        self.fail_every = 0
        self.lose_answers: list[str] = []
        self.die_after: int | None = None
        self.lock = threading.RLock()
        self._server: ThreadingHTTPServer | None = None
        self._closing: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_endpoint(self) -> str:
        """The large file storage has another host name, as on the Hub: tokens must not be sent there."""
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        """Listen, at the address of the last time if there was one."""
        hub = self
        if self._closing is not None:
            self._closing.join()

        class BoundHandler(Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), BoundHandler)
        self._server.daemon_threads, self._server.ended, self._server.connections = True, False, set()
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Stop listening and cut all connections."""
        server, self._server = self._server, None
        if server is None:
            return

        def close() -> None:
            server.shutdown()
            server.server_close()

        # Not in this thread: it may serve the request that ends the server.
        self._closing = threading.Thread(target=close, daemon=True)
        self._closing.start()
        server.ended = True
        for connection in list(server.connections):
            cut(connection)

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def count(self, method: str, pattern: str, status: int | None = None) -> int:
        """How many requests of the log match."""
        done = [r for r in self.requests if r is not None]
        matching = [r for r in done if r.method == method and re.search(pattern, r.path)]
        return sum(status is None or r.status == status for r in matching)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)
        if self.server.ended:
            cut(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        try:
            super().finish()
        except OSError:  # the client is gone
            pass

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # -----------------------------------------------------------------------------------------------------------------
    # One request

    def answer(self) -> None:
        hub, self.received, self.status = self.server_hub, 0, 0
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.user = None
        with hub.lock:
            number = len(hub.requests)
            hub.requests.append(None)  # its place in the log, for requests that come meanwhile
        try:
            self.body = self.read_body()
            if hub.fail_every and (number + 1) % hub.fail_every == 0:
                raise Refusal(503, "the server fails on purpose")
            self.user = self.authenticate()
            answer = self.route(unquote(url.path))
            for pattern in hub.lose_answers:
                if re.search(pattern, url.path):
                    hub.lose_answers.remove(pattern)
                    raise Dropped
            self.reply(*answer)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code is not None:
                headers["X-Error-Code"] = refusal.code
            self.reply(refusal.status, {"error": refusal.message}, headers)
        except (Dropped, ConnectionError):
            self.close_connection = True
            cut(self.connection)
        finally:
            hub.requests[number] = Request(
                self.command, url.path, self.status, self.user, self.received, self.headers.get("Range")
            )

    def read_body(self) -> bytes:
        body = io.BytesIO()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                self.read_into(body, size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.read_into(body, int(self.headers.get("Content-Length", 0)))
        return body.getvalue()

    def read_into(self, body: io.BytesIO, size: int) -> None:
        hub = self.server_hub
        while size > 0:
            chunk = self.rfile.read(min(size, 4096))
            if not chunk:
                raise Dropped
            size -= len(chunk)
            self.received += len(chunk)
            body.write(chunk)
            if self.command == "PUT" and hub.die_after is not None:
                hub.die_after -= len(chunk)
                if hub.die_after <= 0:
                    hub.die_after = None
                    hub.stop()
                    raise Dropped

    def reply(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Length": str(len(body)), "X-Request-Id": secrets.token_hex(4), **(headers or {})}
        if not isinstance(content, bytes):
            headers.setdefault("Content-Type", "application/json")
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def authenticate(self) -> str | None:
        """Name of the user whose token came with the request; None without one."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.server_hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server_hub.users[token]

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        """A repository that the user may read, or write to."""
        repository = self.server_hub.repositories.get(repo_id)
        owned = self.user is not None and repo_id.removeprefix("spaces/").startswith(f"{self.user}/")
        if repository is None or (repository.private and not owned):
            # The Hub doesn't tell what is private from what isn't there.
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not owned:
            raise Refusal(403 if self.user else 401, f"You have no right to write to {repo_id}")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def json(self) -> dict:
        return json.loads(self.body)

    # -----------------------------------------------------------------------------------------------------------------
    # The calls

    def route(self, path: str) -> tuple:
        for method, pattern, call in ROUTES:
            if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                with self.server_hub.lock:
                    return call(self, **match.groupdict())
        raise Refusal(404, f"this Hub doesn't know {self.command} {path}")

    def whoami(self) -> tuple:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        return 200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}

    def may_write(self, repo: str) -> tuple:
        self.repository(repo, write=True)
        return 200, {}

    def create_repository(self) -> tuple:
        wanted = self.json()
        owner = wanted.get("organization") or self.user
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if owner != self.user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        kind = wanted.get("type") or "model"
        if kind == "space" and not wanted.get("sdk"):
            raise Refusal(400, "A Space needs an sdk")
        repo_id = f"{'spaces/' if kind == 'space' else ''}{owner}/{wanted['name']}"
        answer = {"name": repo_id, "url": f"{self.server_hub.endpoint}/{repo_id}"}
        if repo_id in self.server_hub.repositories:
            return 409, {**answer, "error": f"You already created this {kind} repo"}
        repository = Repository(private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in sorted(LFS_SUFFIXES)).encode()
        repository.commit("main", "initial commit", {".gitattributes": File(attributes, lfs=False)})
        self.server_hub.repositories[repo_id] = repository
        return 200, answer

    def validate_yaml(self) -> tuple:
        content = self.json()["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if match is None:
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            data = yaml.safe_load(match[1])
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        errors = []
        for index in (data or {}).get("model-index") or []:
            if "name" not in index or not isinstance(index.get("results"), list):
                errors.append({"message": '"model-index[0]" needs "name" and "results"'})
                continue
            for result in index["results"]:
                if not result.get("task", {}).get("type") or not result.get("dataset", {}).get("type"):
                    errors.append({"message": '"model-index[0].results" needs "task.type" and "dataset.type"'})
                if not all("type" in metric and "value" in metric for metric in result.get("metrics", [{}])):
                    errors.append({"message": '"model-index[0].results.metrics" need "type" and "value"'})
        return 400 if errors else 200, {"errors": errors, "warnings": []}

    def preupload(self, repo: str, revision: str) -> tuple:
        commit = self.commit_of(self.repository(repo, write=True), revision)
        answer = []
        for file in self.json()["files"]:
            path = file["path"]
            large = PurePosixPath(path).suffix in LFS_SUFFIXES or file["size"] >= LFS_SIZE
            known = commit.files.get(path)
            answer.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": known.etag if known is not None else None,
                }
            )
        return 200, {"files": answer, "commitOid": commit.sha}

    def lfs_batch(self, repo: str) -> tuple:
        self.repository(repo, write=True)
        hub, objects = self.server_hub, []
        for wanted in self.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in hub.storage:
                signature = secrets.token_hex(8)
                hub.signatures[signature] = wanted["oid"]
                answer["actions"] = {
                    "upload": {"href": f"{hub.storage_endpoint}/lfs/{wanted['oid']}?signature={signature}"},
                    "verify": {"href": f"{hub.endpoint}/{repo}.git/info/lfs/objects/verify"},
                }
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> tuple:
        self.refuse_token()
        if self.server_hub.signatures.get(self.query.get("signature", "")) != oid:
            raise Refusal(403, "SignatureDoesNotMatch")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content doesn't have the SHA-256 that was announced")
        self.server_hub.storage[oid] = self.body
        return 200, b""

    def lfs_verify(self, repo: str) -> tuple:
        self.repository(repo, write=True)
        wanted = self.json()
        if len(self.server_hub.storage.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, f"object {wanted['oid']} of {wanted['size']} bytes is not there")
        return 200, b""

    def create_commit(self, repo: str, revision: str) -> tuple:
        repository = self.repository(repo, write=True)
        if "create_pr" in self.query:
            raise Refusal(400, "this Hub has no pull requests")
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, title = dict(repository.resolve(revision).files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                title = value["summary"]
                if value.get("parentCommit", repository.branches[revision]) != repository.branches[revision]:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif kind == "lfsFile":
                content = self.server_hub.storage.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    raise Refusal(400, f"{value['path']}: its content has not been uploaded")
                files[value["path"]] = File(content, lfs=True)
            elif kind == "deletedFile":
                if value["path"] not in files:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            elif kind == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(f"{value['path']}/")}
            else:
                raise Refusal(400, f"unknown operation {kind!r}")
        commit = repository.commit(revision, title, files)
        url = f"{self.server_hub.endpoint}/{repo}/commit/{commit.sha}"
        return 200, {"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""}

    def info(self, repo: str, revision: str = "main") -> tuple:
        repository = self.repository(repo)
        commit = self.commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return 200, {
            **{"_id": hashlib.sha1(repo.encode()).hexdigest()[:24], "id": repo, "modelId": repo},
            **{"author": repo.split("/")[0], "sha": commit.sha, "private": repository.private, "gated": False},
            **{"disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings, "spaces": []},
            **{"createdAt": DATE, "lastModified": DATE},
        }

    def tree(self, repo: str, revision: str, folder: str | None = None) -> tuple:
        commit = self.commit_of(self.repository(repo), revision)
        below = {p: f for p, f in commit.files.items() if folder is None or p.startswith(f"{folder}/")}
        if folder is not None and not below:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        depth = 0 if folder is None else folder.count("/") + 1
        folders = {str(parent) for p in below for parent in PurePosixPath(p).parents if str(parent) != "."}
        folders = {f for f in folders if folder is None or f.startswith(f"{folder}/")}
        if self.query.get("recursive", "").lower() != "true":
            below = {p: f for p, f in below.items() if p.count("/") == depth}
            folders = {f for f in folders if f.count("/") == depth}
        listed = [
            {"type": "directory", "path": f, "size": 0, "oid": hashlib.sha1(f.encode()).hexdigest()} for f in folders
        ]
        listed += [file.describe(path) for path, file in below.items()]
        return 200, sorted(listed, key=lambda one: one["path"])

    def paths_info(self, repo: str, revision: str) -> tuple:
        commit = self.commit_of(self.repository(repo), revision)
        return 200, [commit.files[p].describe(p) for p in self.json()["paths"] if p in commit.files]

    def refs(self, repo: str) -> tuple:
        repository = self.repository(repo)
        kinds = (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        answer = {
            kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": sha} for n, sha in known.items()]
            for kind, ref, known in kinds
        }
        return 200, {**answer, "converts": []}

    def history(self, repo: str, revision: str) -> tuple:
        repository = self.repository(repo)
        commit, listed = self.commit_of(repository, revision), []
        while commit is not None:
            listed.append({"id": commit.sha, "title": commit.title, "message": "", "authors": [], "date": DATE})
            commit = repository.commits.get(commit.parent)
        return 200, listed

    def create_branch(self, repo: str, branch: str) -> tuple:
        repository = self.repository(repo, write=True)
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        start = (self.json() if self.body else {}).get("startingPoint", "main")
        repository.branches[branch] = self.commit_of(repository, start).sha
        return 200, {}

    def create_tag(self, repo: str, revision: str) -> tuple:
        repository = self.repository(repo, write=True)
        tag = self.json()["tag"]
        if tag in repository.tags:
            raise Refusal(409, f"Tag reference exists already: {tag}")
        repository.tags[tag] = self.commit_of(repository, revision).sha
        return 200, {}

    def resolve(self, repo: str, revision: str, path: str) -> tuple:
        commit = self.commit_of(self.repository(repo), revision)
        headers = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(path)
        if file is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, {"error": "Entry not found"}, headers
        if file.lfs:
            location = f"{self.server_hub.storage_endpoint}/storage/{file.sha256}"
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            return 302, b"", {**headers, "Location": location}
        return self.content(file.content, file.etag, headers)

    def stored(self, oid: str) -> tuple:
        self.refuse_token()
        if oid not in self.server_hub.storage:
            raise Refusal(404, "NoSuchKey")
        return self.content(self.server_hub.storage[oid], oid, {})

    def content(self, content: bytes, etag: str, headers: dict[str, str]) -> tuple:
        """A file, or the range of its bytes that is asked for."""
        headers = {
            **headers,
            "ETag": f'"{etag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, content, headers
        first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if first > last:
            return 416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"}
        return 206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}

    def refuse_token(self) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "a token was sent to the large file storage")


REPO, REVISION = r"(?P<repo>(?:spaces/)?[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
API = rf"/api/(?:models/(?!spaces/)|(?=spaces/)){REPO}"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", API, Handler.info),
    ("GET", f"{API}/auth-check/write", Handler.may_write),
    ("GET", f"{API}/revision/{REVISION}", Handler.info),
    ("GET", f"{API}/tree/{REVISION}(/(?P<folder>.+))?", Handler.tree),
    ("POST", f"{API}/paths-info/{REVISION}", Handler.paths_info),
    ("GET", f"{API}/refs", Handler.refs),
    ("GET", f"{API}/commits/{REVISION}", Handler.history),
    ("POST", f"{API}/branch/(?P<branch>[^/]+)", Handler.create_branch),
    ("POST", f"{API}/tag/{REVISION}", Handler.create_tag),
    ("POST", f"{API}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"{API}/commit/{REVISION}", Handler.create_commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", Handler.lfs_verify),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    ("GET HEAD", r"/storage/(?P<oid>[0-9a-f]{64})", Handler.stored),
    ("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]


if __name__ == "__main__":
    with HubServer(port=8765) as served:
        print(f"export HF_ENDPOINT={served.endpoint} HF_TOKEN=hf_alice HF_HUB_DISABLE_XET=1")
        threading.Event().wait()
