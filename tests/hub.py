"""A stand-in for the Hugging Face Hub, on this host: it serves folders as model and data set
repositories.

It answers what huggingface_hub 0.36 and datasets 5.0 ask when they list and download a repository,
and when they make one and upload a folder with the token TOKEN of the user "somebody", with the Hub's own paths, headers and error codes. Every repository has one commit. Files that the
Hub keeps in LFS are answered as it answers them: by a redirect to another host, with the size and
the hash in headers of their own.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS = {".bin", ".safetensors", ".parquet"}
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


TOKEN = "hf_somebodys"


class Hub:
    """What the server serves, `root`/{models,datasets}/owner/name/..., and how it behaves."""

    def __init__(self, root: Path):
        self.root = root
        # "serve"; or a Hub in trouble: "error" answers 500, "hang up" closes every connection,
        # "silent" takes them and never answers, "cut" serves half of the first large file, closes
        # the connection and then acts like "hang up".
        self.mode = "serve"
        self.requests: list[str] = []  # "GET /api/models/..."
        self.role = "write"  # of the token
        self.uploaded: dict[str, bytes] = {}  # LFS's objects
        self.stopped = threading.Event()

    def environment(self, home: Path) -> dict[str, str]:
        """The variables of a process that takes this for the Hub and has its caches under
        `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "XDG_CACHE_HOME": str(home / "xdg"),
            # Datasets counts loads on another host than HF_ENDPOINT
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
        }

    def repository(self, kind: str, name: str) -> Path:
        """The folder of a repository, `kind` being models or datasets."""
        return self.root / kind / name

    def commit(self, kind: str, name: str) -> str:
        """The 40 digits of a repository's only commit: they follow its files."""
        folder = self.repository(kind, name)
        content = [
            (str(f.relative_to(folder)), hashlib.sha1(f.read_bytes()).hexdigest())
            for f in files(folder)
        ]
        return hashlib.sha1(repr((kind, name, content)).encode()).hexdigest()


def _mode(name: str, kind: str) -> dict:
    return {"path": name, "uploadMode": kind, "shouldIgnore": False, "oid": None}


def files(folder: Path) -> list[Path]:
    """All files under `folder`, in a fixed order."""
    return sorted(f for f in folder.rglob("*") if f.is_file())


@contextmanager
def serving(root: Path):
    """A Hub that serves `root` while the context lasts; `url` is its address."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    # By name: datasets asks datasets-server.<this host> too, and what is under localhost needs no
    # name server to be refused.
    hub.url = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.mode == "error":
            return self._answer(500, {"error": "Internal Server Error"})
        if self.hub.mode == "silent":
            self.hub.stopped.wait()
        if self.hub.mode not in ("serve", "cut"):
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        url = urlsplit(self.path)
        path = unquote(url.path)
        if found := _API.fullmatch(path):
            return self._api(*found.groups(), parse_qs(url.query))
        if found := _FILE.fullmatch(path):
            return self._resolve(*found.groups())
        if path == "/api/whoami-v2" and self._is_somebody():
            token = {"accessToken": {"role": self.hub.role}}
            return self._answer(200, {"name": "somebody", "orgs": [{"name": "lab"}], "auth": token})
        if path == "/api/whoami-v2":
            return self._answer(401, {"error": "Invalid username or password."})
        if path.startswith("/cdn/"):
            return self._large(self.hub.root / path.removeprefix("/cdn/"))
        self._answer(404, {"error": "Not Found"})

    do_HEAD = do_GET

    def do_POST(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._is_somebody():
            return self._answer(401, {"error": "Invalid username or password."})
        if self.hub.mode == "silent":
            self.hub.stopped.wait()
        if self.hub.mode != "serve":
            return self._answer(500, {"error": "Internal Server Error"})
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.hub.repository("models", name).mkdir(parents=True)
            return self._answer(200, {"url": f"{self.hub.url}/{name}"})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            kinds = {True: "lfs", False: "regular"}
            named = [file["path"] for file in json.loads(body)["files"]]
            return self._answer(
                200,
                {"files": [_mode(name, kinds[Path(name).suffix in LFS]) for name in named]},
            )
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                asked | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(self.hub.repository("models", found[1]), body)
            commit = self.hub.commit("models", found[1])
            url = f"{self.hub.url}/{found[1]}/commit/{commit}"
            return self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})
        self._answer(404, {"error": "Not Found"})

    def do_PUT(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        oid = self.path.removeprefix("/lfs/")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.uploaded[oid] = content
        self._answer(200)

    def _is_somebody(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _commit(self, folder: Path, body: bytes):
        for line in body.decode().splitlines():
            action = json.loads(line)
            value = action["value"]
            if action["key"] == "deletedFile":
                (folder / value["path"]).unlink()
            elif action["key"] in ("file", "lfsFile"):
                file = folder / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                content = value.get("content")
                file.write_bytes(
                    base64.b64decode(content) if content else self.hub.uploaded[value["oid"]]
                )

    def log_message(self, *_):
        pass

    def _answer(self, status: int, body=None, **headers):
        self._bytes(b"" if body is None else json.dumps(body).encode(), status, **headers)

    def _bytes(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _large(self, file: Path):
        """A file of LFS's host: from the byte that is asked for, as the Hub's host has it for
        downloads that broke off."""
        content, status, first = file.read_bytes(), 200, 0
        total = len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, first = 206, int(asked[1])
            content = content[first:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        self.end_headers()
        if self.hub.mode == "cut" and self.command == "GET":
            self.hub.mode = "hang up"
            content = content[: total // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, kind: str, name: str, revision: str | None) -> bool:
        """Refuse what is not there, as the Hub does: a repository that does not exist looks like a
        private one."""
        if not self.hub.repository(kind, name).is_dir():
            # huggingface_hub knows a bare 401 for what it means under https alone; the code is for
            # http.
            self._answer(
                401, {"error": "Invalid username or password."}, X_Error_Code="RepoNotFound"
            )
        elif revision not in (None, "main", self.hub.commit(kind, name)):
            self._answer(
                404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound"
            )
        else:
            return False
        return True

    def _api(self, kind, name, what, revision, under, query):
        if self._missing(kind, name, revision):
            return
        folder = self.hub.repository(kind, name)
        if what == "tree":
            inside = folder / (under or "")
            if not inside.exists():
                return self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            recursive = query.get("recursive", [""])[0].lower() in ("true", "1")
            return self._answer(
                200,
                [
                    self._info(folder, p)
                    for p in sorted(inside.rglob("*") if recursive else inside.iterdir())
                ],
            )
        names = [{"rfilename": str(f.relative_to(folder))} for f in files(folder)]
        answer = {
            "id": name,
            "sha": self.hub.commit(kind, name),
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        self._answer(200, answer | {"siblings": names})

    def _info(self, folder: Path, path: Path) -> dict:
        """A file or folder as the tree lists it."""
        info = {
            "type": "directory" if path.is_dir() else "file",
            "path": str(path.relative_to(folder)),
            "size": 0,
        }
        if path.is_dir():
            return info | {"oid": hashlib.sha1(info["path"].encode()).hexdigest()}
        content = path.read_bytes()
        info |= {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.suffix in LFS:
            info["lfs"] = {
                "oid": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 134,
            }
        return info

    def _resolve(self, datasets, name, revision, path):
        kind = "datasets" if datasets else "models"
        if self._missing(kind, name, revision):
            return
        commit = {"X_Repo_Commit": self.hub.commit(kind, name)}
        file = self.hub.repository(kind, name) / path
        if not file.is_file():
            return self._answer(
                404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **commit
            )
        content = file.read_bytes()
        if file.suffix in LFS:
            digest = f'"{hashlib.sha256(content).hexdigest()}"'
            other = (
                f"http://127.0.0.1:{self.server.server_port}/cdn/{file.relative_to(self.hub.root)}"
            )
            return self._answer(
                302,
                None,
                Location=other,
                X_Linked_Etag=digest,
                X_Linked_Size=len(content),
                **commit,
            )
        self._bytes(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **commit)


def save_opt_tokenizer(directory: Path) -> None:
    """Write a tokenizer as facebook/opt-* ship it: GPT-2's byte-level BPE as vocab.json and
    merges.txt, OPT's special tokens, and a BOS that it adds by itself."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = [("Ġ", "a"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("e", "r"), ("o", "n")]
    tokens = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *sorted(ByteLevel.alphabet()),
        *("".join(pair) for pair in merges),
    ]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    )
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {
        "add_bos_token": True,
        "add_prefix_space": False,
        "errors": "replace",
        "tokenizer_class": "GPT2Tokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | special))
