"""A local stand-in of the Hugging Face Hub, so that the real clients run with no account and no
network.

It serves what huggingface_hub, datasets, transformers and peft ask for when they download and push:
files, repository listings, LFS uploads, commits and the token check. Repositories lie on disk as
plain folders, every commit can be read back, and errors carry the headers from which the clients
choose their exceptions.

It is not the Hub: one user and one token, models and datasets only, one branch, no pull requests,
no deletions, no gated repositories, no search, no Xet, no validation of model cards, no
.gitattributes in a new repository. Anything else is answered with a 404 that says so.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PIECE = 1 << 20  # files are moved in pieces of this size, never held whole
LFS_SIZE = 10_000_000  # as on the Hub: larger files, and binary ones, are kept by LFS


class Hub:
    """The stand-in: `with Hub(root) as hub:` serves at `hub.url` the repositories kept under the
    folder `root`.
    """

    def __init__(self, root, user="rehearsal", token="hf_rehearsal"):
        self.root, self.user, self.token = Path(root).resolve(), user, token
        self.requests = []  # (method, path), in order of arrival
        # (repo_type, id) -> {"private": bool, "commits": [(oid, title), ...], "trees": {oid: {path:
        # file}}}
        self.repos = {}
        self.uploads = set()  # (repository, sha256) that a client was told to upload
        self.lock = threading.RLock()
        self.root.mkdir(parents=True, exist_ok=True)
        if (self.root / "hub.json").exists():
            for name, repo in json.loads((self.root / "hub.json").read_text("utf-8")).items():
                repo["commits"] = [tuple(commit) for commit in repo["commits"]]
                self.repos[tuple(name.split("s/", 1))] = repo
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """The variables that a client process needs, from its start; `home` is its own cache
        folder.

        One look-up remains: datasets asks for the host datasets-server.127.0.0.1, is told there is
        none, and goes on.
        """
        home = Path(home)
        # Both spellings: where both are set, the lower one wins.
        no_proxy = ",".join(
            filter(None, [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), "127.0.0.1"])
        )
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            # Set apart from HF_HOME as well: if the caller's own environment has these, they would
            # win over it.
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def add(self, repo_id, folder, repo_type="model", oid=None):
        """Serve the files of a folder as a public repository. Returns its key.

        `oid` is for a notebook that pins a commit.
        """
        key, files = (repo_type, repo_id), {}
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            file = describe(path)
            if not self.blob(key, file).exists():
                shutil.copyfile(path, self.blob(key, file))
            files[path.relative_to(folder).as_posix()] = file
        with self.lock:
            self.repos.setdefault(key, {"private": False, "commits": [], "trees": {}})
            self.publish(key, files, "add", oid)
        return key

    def folder(self, repo_id, repo_type="model"):
        """The current files of a repository, as pushed."""
        return self.root / f"{repo_type}s" / repo_id

    def page(self, key):
        return self.url + ("/datasets/" if key[0] == "dataset" else "/") + key[1]

    def blob(self, key, file):
        """Where the content of a file is kept: apart for each repository, or a push could skip its
        upload.
        """
        folder = self.root / "blobs" / f"{key[0]}s" / key[1]
        folder.mkdir(parents=True, exist_ok=True)
        return folder / etag(file)

    def head(self, key):
        """The newest commit of a repository and its files."""
        repo = self.repos[key]
        oid = repo["commits"][-1][0] if repo["commits"] else None
        return oid, repo["trees"].get(oid, {})

    def publish(self, key, files, title, oid=None):
        """Commit `files` as the whole of a repository, and bring its plain folder in line."""
        parent, old = self.head(key)
        folder = self.folder(key[1], key[0])
        folder.mkdir(parents=True, exist_ok=True)
        for path in (path for path in old if old[path] != files.get(path)):
            (folder / path).unlink(missing_ok=True)
            for emptied in (folder / path).parents:
                if emptied == folder or any(emptied.iterdir()):
                    break
                emptied.rmdir()
        for path in (path for path in files if old.get(path) != files[path]):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).unlink(missing_ok=True)
            try:
                os.link(self.blob(key, files[path]), folder / path)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.blob(key, files[path]), folder / path)
        oid = oid or hashlib.sha1(json.dumps([key, parent, title, files]).encode()).hexdigest()
        self.repos[key]["trees"][oid] = files
        self.repos[key]["commits"].append((oid, title))
        self.save()
        return oid

    def save(self):
        state = {
            f"{repo_type}s/{repo_id}": repo for (repo_type, repo_id), repo in self.repos.items()
        }
        new = self.root / "hub.json.new"
        new.write_text(json.dumps(state, indent=1), "utf-8")
        new.replace(self.root / "hub.json")


def is_lfs(sample, size):
    return size >= LFS_SIZE or b"\0" in sample  # git's own test for a binary file


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def regular_file(data):
    return {"size": len(data), "oid": git_oid(data)}


def lfs_file(sha256, size):
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    )
    return {
        "size": size,
        "oid": git_oid(pointer),
        "lfs": {"oid": sha256, "size": size, "pointerSize": len(pointer)},
    }


def describe(path):
    """What the Hub says of a file: its size and git oid, and its sha256 where LFS keeps it."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        lfs = is_lfs(stream.read(512), size)
        stream.seek(0)
        if not lfs:
            return regular_file(stream.read())
        sha256 = hashlib.sha256()
        for piece in pieces(stream, size):
            sha256.update(piece)
    return lfs_file(sha256.hexdigest(), size)


def etag(file):
    return file["lfs"]["oid"] if "lfs" in file else file["oid"]


def pieces(stream, size):
    while size > 0:
        piece = stream.read(min(size, PIECE))
        if not piece:
            raise ConnectionError("the stream ended early")
        size -= len(piece)
        yield piece


class Failure(Exception):
    """An answer other than success. The clients choose their exception by `code`, not by the
    status.
    """

    def __init__(self, status, message, code=None, **headers):
        self.status, self.message = status, message
        self.headers = {
            "X-Error-Message": message,
            **({"X-Error-Code": code} if code else {}),
            **headers,
        }


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = (
        128  # the clients open many connections at once; one that does not fit waits a second
    )

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away is no news
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    wbufsize = (
        -1
    )  # buffered: headers and body sent apart cost 44 ms a request (Nagle meets the delayed ACK)

    PAGE = r"/(?:(?P<kind>dataset)s/)?(?P<id>[^/]+/[^/]+|[^/]+)"
    API = r"/api/(?P<kind>model|dataset)s/(?P<id>[^/]+/[^/]+|[^/]+)"
    ROUTES = (
        ("GET HEAD", PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", API + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("POST", "/api/repos/create", "create"),
        ("POST", API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", PAGE + r"\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", PAGE + r"\.git/info/lfs/objects/(?P<sha256>[0-9a-f]{64})", "lfs_upload"),
        ("POST", PAGE + r"\.git/info/lfs/objects/verify", "lfs_verify"),
        ("POST", API + r"/commit/(?P<revision>[^/]+)", "commit"),
    )

    def dispatch(self):
        self.hub = self.server.hub
        self.hub.requests.append((self.command, self.path))
        self.body = self.read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            authorization = self.headers.get("Authorization")
            self.known = authorization == f"Bearer {self.hub.token}"
            if authorization and not self.known:
                # The Hub refuses a wrong token even for what is public.
                raise Failure(401, "Invalid credentials in Authorization header")
            name, fields = self.find_route(url.path)
            getattr(self, name)(**fields)
        except Failure as failure:
            self.reply({"error": failure.message}, failure.status, failure.headers)
        for _ in self.body:  # what was not read would be taken for the next request
            pass

    def find_route(self, path):
        """(name of the method, its arguments) for the path of a request."""
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                found = match.groupdict()
                fields = {field: unquote(text) for field, text in found.items() if text}
                if "id" in fields:
                    fields["key"] = (fields.pop("kind", "model"), fields.pop("id"))
                return name, fields
        raise Failure(404, "This stand-in of the Hub does not serve this")

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def log_message(self, *arguments):
        pass

    def read_body(self):
        """The body of the request, in pieces: a client that uploads a file gives its length or
        sends it chunked.
        """
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            size = int(self.rfile.readline(), 16)
            while size:
                yield from pieces(self.rfile, size)
                self.rfile.readline()
                size = int(self.rfile.readline(), 16)
            self.rfile.readline()
        else:
            yield from pieces(self.rfile, int(self.headers.get("Content-Length", 0)))

    def read_json(self):
        return json.loads(b"".join(self.body))

    def reply(self, answer, status=200, headers=None):
        data = json.dumps(answer).encode()
        self.start(
            status,
            {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})},
        )
        if self.command != "HEAD":
            self.wfile.write(data)

    def start(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def repository(self, key, write=False):
        """The repository that a request names, if the one who asks may see it, or write to it."""
        repo = self.hub.repos.get(key)
        hidden = repo is None or repo["private"]
        if not self.known and (hidden or write):
            raise Failure(401, "Invalid username or password.", "RepoNotFound")
        if repo is None:
            raise Failure(404, "Repository not found", "RepoNotFound")
        if write and not key[1].startswith(f"{self.hub.user}/"):
            raise Failure(
                403, "You have read access but not the required permissions for this operation"
            )
        return repo

    def files(self, key, revision="main"):
        """The commit that a revision names, and its files."""
        repo = self.repository(key)
        oid = self.hub.head(key)[0] if revision == "main" else revision
        if oid not in repo["trees"]:
            raise Failure(404, "Invalid rev id", "RevisionNotFound")
        return oid, repo["trees"][oid]

    def resolve(self, key, revision, path):
        oid, files = self.files(key, revision)
        if path not in files:
            raise Failure(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        size = files[path]["size"]
        status, first, end = 200, 0, size
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag(files[path])}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", self.headers.get("Range", ""))
        if match:
            start, last, suffix = match.groups()
            first = max(size - int(suffix), 0) if suffix else int(start)
            end = min(int(last) + 1, size) if last else size
            if first >= end:
                raise Failure(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
            status, headers["Content-Range"] = 206, f"bytes {first}-{end - 1}/{size}"
        self.start(
            status,
            {"Content-Type": "application/octet-stream", "Content-Length": end - first, **headers},
        )
        if self.command == "GET":
            with self.hub.blob(key, files[path]).open("rb") as stream:
                stream.seek(first)
                for piece in pieces(stream, end - first):
                    self.wfile.write(piece)

    def info(self, key, revision="main"):
        oid, files = self.files(key, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        if "blobs" in self.query:
            for sibling in siblings:
                file = files[sibling["rfilename"]]
                sibling.update(size=file["size"], blobId=file["oid"])
                if "lfs" in file:
                    sibling["lfs"] = {**file["lfs"], "sha256": file["lfs"]["oid"]}
        answer = {
            "id": key[1],
            "author": key[1].split("/")[0],
            "sha": oid,
            "private": self.hub.repos[key]["private"],
        }
        self.reply({**answer, "gated": False, "disabled": False, "tags": [], "siblings": siblings})

    def tree(self, key, revision, path=""):
        _, files = self.files(key, revision)
        recursive = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        prefix, entries = f"{path}/" if path else "", {}
        for name in sorted(name for name in files if name.startswith(prefix)):
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts) + 1 if recursive else 2):
                entry = prefix + "/".join(parts[:depth])
                entries[entry] = self.entry(files, entry)
        if path and not entries:
            raise Failure(404, "Entry not found", "EntryNotFound")
        self.reply(list(entries.values()))

    def entry(self, files, path):
        if path in files:
            return {"type": "file", "path": path, **files[path]}
        if any(name.startswith(f"{path}/") for name in files):
            return {
                "type": "directory",
                "path": path,
                "size": 0,
                "oid": hashlib.sha1(path.encode()).hexdigest(),
            }
        return None

    def whoami(self):
        if not self.known:
            raise Failure(401, "Invalid username or password.")
        user = {"type": "user", "name": self.hub.user, "fullname": self.hub.user, "orgs": []}
        token = {"displayName": "rehearsal", "role": "write"}
        self.reply({**user, "auth": {"type": "access_token", "accessToken": token}})

    def validate_yaml(self):
        self.reply({"errors": [], "warnings": []})

    def create(self):
        asked = self.read_json()
        user = asked.get("organization") or self.hub.user
        key = (asked.get("type") or "model", f"{user}/{asked['name']}")
        if not self.known:
            raise Failure(401, "Invalid username or password.")
        if user != self.hub.user:
            raise Failure(
                403, f"You don't have the rights to create a {key[0]} under this namespace"
            )
        if key[0] not in ("model", "dataset") or not re.fullmatch(r"\w[\w.-]*", asked["name"]):
            raise Failure(
                400, "This stand-in of the Hub serves models and datasets, under plain names"
            )
        answer = {"url": self.hub.page(key)}
        with self.hub.lock:
            if key in self.hub.repos:
                self.reply({**answer, "error": f"You already created this {key[0]} repo"}, 409)
                return
            self.hub.repos[key] = {"private": is_private(asked), "commits": [], "trees": {}}
            self.hub.publish(key, {}, "initial commit")
        self.reply(answer)

    def preupload(self, key, revision):
        self.repository(key, write=True)
        _, files = self.files(key, revision)
        answer = []
        for asked in self.read_json()["files"]:
            lfs = is_lfs(base64.b64decode(asked["sample"]), asked["size"])
            file = {
                "path": asked["path"],
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False,
            }
            if (
                asked["path"] in files
            ):  # the client leaves a file out of its commit where this is what it has
                file["oid"] = etag(files[asked["path"]])
            answer.append(file)
        self.reply({"files": answer})

    def lfs_batch(self, key):
        self.repository(key, write=True)
        base, answer = self.hub.url + self.path.removesuffix("batch"), []
        for asked in self.read_json()["objects"]:
            sha256, file = asked["oid"], {"oid": asked["oid"], "size": asked["size"]}
            if not self.hub.blob(key, {"oid": sha256}).exists():
                self.hub.uploads.add((key, sha256))
                file["actions"] = {
                    "upload": {"href": base + sha256},
                    "verify": {"href": base + "verify"},
                }
            answer.append(file)
        self.reply({"transfer": "basic", "objects": answer})

    def lfs_upload(self, key, sha256):
        if (
            key,
            sha256,
        ) not in self.hub.uploads:  # stands for the signed address: a client sends no token here
            raise Failure(403, "This upload was not announced")
        blob, found = self.hub.blob(key, {"oid": sha256}), hashlib.sha256()
        partial = blob.with_suffix(f".{threading.get_ident()}")
        try:
            with partial.open("wb") as stream:
                for piece in self.body:
                    found.update(piece)
                    stream.write(piece)
            if found.hexdigest() != sha256:
                raise Failure(400, "The content does not have the announced sha256")
            partial.replace(blob)
        finally:
            partial.unlink(missing_ok=True)
        self.reply({})

    def lfs_verify(self, key):
        self.repository(key, write=True)
        asked = self.read_json()
        blob = self.hub.blob(key, {"oid": asked["oid"]})
        if not blob.exists() or blob.stat().st_size != asked["size"]:
            raise Failure(404, "The object was not uploaded")
        self.hub.uploads.discard((key, asked["oid"]))
        self.reply({})

    def commit(self, key, revision):
        self.repository(key, write=True)
        if revision != "main" or "create_pr" in self.query:
            raise Failure(
                404, "This stand-in of the Hub commits to the branch main only", "RevisionNotFound"
            )
        lines = [json.loads(line) for line in b"".join(self.body).splitlines()]
        with self.hub.lock:
            parent, files = self.hub.head(key)
            files, header = dict(files), {}
            for line in lines:
                kind, value = line["key"], line["value"]
                path = value.get("path", "").rstrip("/")
                if kind == "header":
                    header = value
                elif {"", ".", ".."} & set(path.split("/")):
                    raise Failure(400, "Invalid path")
                elif kind == "file":
                    data = base64.b64decode(value["content"])
                    files[path] = regular_file(data)
                    if not self.hub.blob(
                        key, files[path]
                    ).exists():  # else it may be on its way to a reader
                        self.hub.blob(key, files[path]).write_bytes(data)
                elif kind == "lfsFile":
                    blob = self.hub.blob(key, {"oid": value["oid"]})
                    if not blob.exists():
                        raise Failure(400, "An LFS object of this commit was not uploaded")
                    files[path] = lfs_file(value["oid"], blob.stat().st_size)
                else:
                    raise Failure(400, "Unknown operation in this commit")
            if not parent.startswith(header.get("parentCommit", "")):
                raise Failure(412, "A commit has happened since")
            oid = self.hub.publish(key, files, header["summary"])
        self.reply(
            {"success": True, "commitUrl": f"{self.hub.page(key)}/commit/{oid}", "commitOid": oid}
        )


def is_private(asked):
    """What a request says of visibility: a word from newer clients, a yes or no from older ones."""
    if "visibility" in asked:
        return asked["visibility"] == "private"
    return asked.get("private", False)
