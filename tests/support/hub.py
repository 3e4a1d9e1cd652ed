"""A stand-in for the Hub on this machine: what huggingface_hub calls of its HTTP interface for packs of vectors.

Repositories live in memory. Large files (.safetensors, .png) are uploaded by LFS and downloaded from another host than
the Hub, as on the real one. `serve()` gives the environment in which huggingface_hub uses it.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_standin"
LARGE = (".safetensors", ".png")
LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "other")
PAGE = 2
"""Repositories on one page of the list."""


class Answer(Exception):
    """Ends a request with this status and the Hub's code for the error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


@dataclass
class Repo:
    """A repository: its commits in order, each with all files, and the names of some commits."""

    name: str
    private: bool = False
    gated: bool = False
    downloads: int = 0
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit to `main`; returns its name."""
        parent = self.names.get("main", "")
        digest = hashlib.sha1(f"{self.name} {parent}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        self.commits[digest.hexdigest()] = files
        self.names["main"] = digest.hexdigest()
        return digest.hexdigest()

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the last commit."""
        return self.commits[self.names["main"]]

    def find(self, revision: str) -> str:
        if revision in self.commits:
            return revision
        if revision not in self.names:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.names[revision]

    def metadata(self) -> dict[str, Any]:
        """The front matter of its card."""
        text = self.files.get("README.md", b"").decode(errors="replace")
        try:
            found = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    def tags(self) -> list[str]:
        found = self.metadata()
        tags = [tag for tag in found.get("tags") or [] if isinstance(tag, str)]
        return [*tags, *([f"base_model:{found['base_model']}"] if "base_model" in found else [])]


@dataclass
class Hub:
    """The state of the stand-in, and how it misbehaves if a test wants that.

    Attributes:
        requests: method and path of each request.
        on_listing: changes what is said about a repository.
        on_content: changes the bytes of a file that are sent, by its hash.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    on_listing: Callable[[dict[str, Any]], dict[str, Any]] = lambda listing: listing
    on_content: Callable[[bytes], bytes] = lambda content: content
    address: str = ""

    def add(self, name: str, files: dict[str, bytes] | None = None, **how: Any) -> Repo:
        """Create a repository with a first commit."""
        repo = self.repos[name] = Repo(name, **how)
        repo.commit({".gitattributes": b"", **(files or {})})
        return repo

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are to use the stand-in, besides a cache of their own in HF_HOME."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pointer(content: bytes) -> bytes:
    """What git holds in the place of a large file."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n"
    return text.encode()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        body = self._body()
        self.hub.requests.append(f"{self.command} {url.path}")
        try:
            self._route(parts, parse_qs(url.query), body)
        except Answer as answer:
            headers = {"X-Error-Code": answer.code} if answer.code else {}
            headers |= {"X-Error-Message": answer.message} if answer.message else {}
            self._send(answer.status, json.dumps({"error": answer.message}).encode(), headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        match parts:
            case [""]:
                self._send(200, b"the stand-in")
            case ["api", "models"]:
                self._list(query)
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                self._validate(json.loads(body)["content"])
            case ["api", "models", owner, name]:
                self._json(self._listing(self._repo(owner, name), "main", blobs="blobs" in query))
            case ["api", "models", owner, name, "revision", revision]:
                self._json(self._listing(self._repo(owner, name), revision, blobs="blobs" in query))
            case ["api", "models", owner, name, "preupload", revision]:
                self._preupload(self._repo(owner, name, writes=True), revision, json.loads(body))
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._repo(owner, name.removesuffix(".git"), writes=True)
                self._batch(json.loads(body))
            case ["upload", digest] if self.command == "PUT":
                assert sha256(body) == digest
                self.hub.large[digest] = body
                self._send(200, b"")
            case ["api", "models", owner, name, "commit", "main"]:
                self._commit(self._repo(owner, name, writes=True), body)
            case [owner, name, "resolve", revision, *path]:
                self._resolve(self._repo(owner, name), revision, "/".join(path))
            case ["cdn", digest]:
                assert "Authorization" not in self.headers  # the token must not leave the Hub
                self._content(self.hub.large[digest], {})
            case _:
                raise Answer(404, "", "no such route")

    # ---- who asks ----

    @property
    def _is_known(self) -> bool:
        sent = self.headers.get("Authorization")
        if sent not in (None, f"Bearer {TOKEN}"):
            raise Answer(401, "", "Invalid credentials in Authorization header")
        return sent is not None

    def _repo(self, owner: str, name: str, *, writes: bool = False) -> Repo:
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None or (repo.private and not self._is_known):
            raise Answer(404 if self._is_known else 401, "RepoNotFound", "Repository not found")
        if writes and (not self._is_known or owner != "me"):
            raise Answer(403, "", "you must use a write token")
        return repo

    # ---- what is asked ----

    def _list(self, query: dict[str, list[str]]) -> None:
        wanted = query.get("filter", [])
        found = [one for one in self.hub.repos.values() if not one.private and set(wanted) <= set(one.tags())]
        found.sort(key=lambda repo: -repo.downloads)
        start = int(query.get("cursor", ["0"])[0])
        page = [self._listing(repo, "main") for repo in found[start : start + PAGE]]
        more = "&".join([*(f"filter={one}" for one in wanted), f"cursor={start + PAGE}"])
        link = {"Link": f'<{self.hub.address}/api/models?{more}>; rel="next"'} if start + PAGE < len(found) else {}
        self._json(page, link)

    def _listing(self, repo: Repo, revision: str, *, blobs: bool = False) -> dict[str, Any]:
        commit = repo.find(revision)
        siblings: list[dict[str, Any]] = []
        for path, content in repo.commits[commit].items():
            siblings.append({"rfilename": path})
            if blobs and path.endswith(LARGE):
                lfs = {"sha256": sha256(content), "size": len(content), "pointerSize": len(pointer(content))}
                siblings[-1] |= {"size": len(content), "blobId": git_sha1(pointer(content)), "lfs": lfs}
            elif blobs:
                siblings[-1] |= {"size": len(content), "blobId": git_sha1(content)}
        return self.hub.on_listing(
            {
                "id": repo.name,
                "modelId": repo.name,
                "sha": commit,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "downloads": repo.downloads,
                "likes": 0,
                "lastModified": "2026-11-29T10:00:00.000Z",
                "tags": repo.tags(),
                "cardData": repo.metadata(),
                "siblings": siblings,
            }
        )

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._is_known:
            raise Answer(401, "", "Invalid username or password.")
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "me":
            raise Answer(403, "", "You don't have the rights to create a model under this namespace")
        if name in self.hub.repos:
            self._json(
                {"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}, status=409
            )
            return
        self.hub.add(name, private=asked.get("visibility") == "private" or asked.get("private", False) is True)
        self._json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def _validate(self, content: str) -> None:
        found = yaml.safe_load(content.split("---\n")[1])
        wrong = [] if found.get("license", "mit") in LICENCES else [{"message": '"license" must be one of [...]'}]
        self._json({"errors": wrong, "warnings": []}, status=400 if wrong else 200)

    def _preupload(self, repo: Repo, revision: str, asked: dict[str, Any]) -> None:
        files = []
        for one in asked["files"]:
            is_large, there = one["path"].endswith(LARGE), repo.commits[repo.find(revision)].get(one["path"])
            known = None if there is None else sha256(there) if is_large else git_sha1(there)
            mode = "lfs" if is_large else "regular"
            files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self._json({"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            upload = {"href": f"{self.hub.address}/upload/{one['oid']}"}
            objects.append({**one, **({} if one["oid"] in self.hub.large else {"actions": {"upload": upload}})})
        self._json({"objects": objects, "transfer": "basic"})

    def _commit(self, repo: Repo, body: bytes) -> None:
        header, *changes = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", repo.names["main"]) != repo.names["main"]:
            raise Answer(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files)
        for change in changes:
            value = change["value"]
            is_large = change["key"] == "lfsFile"
            files[value["path"]] = self.hub.large[value["oid"]] if is_large else base64.b64decode(value["content"])
        commit = repo.commit(files)
        self._json(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.address}/{repo.name}/commit/{commit}"}
        )

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit = repo.find(revision)
        if repo.gated:
            raise Answer(403, "GatedRepo", "Access to this model is restricted")
        content = repo.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif path.endswith(LARGE):
            self.hub.large[sha256(content)] = content
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256(content)}"'}
            cdn = self.hub.address.replace("127.0.0.1", "localhost")
            self._send(302, b"", {**headers, **linked, "Location": f"{cdn}/cdn/{sha256(content)}"})
        else:
            self._content(content, {**headers, "ETag": f'"{git_sha1(content)}"'})

    # ---- the answer ----

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        self._send(200, self.hub.on_content(content), headers)

    def _json(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a stand-in until the block ends."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
