# ruff: noqa: E501  (one row, one line)
"""Hostile files, options and requests for the fault campaign: what is given to which verb.

Each must come to one sentence and exit code 2 (of many prompts or pictures also 3), of a request to an answer of the
400s, in bounded time and memory, and nothing in it may be run.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MARK = "owned"  # the file that a pickle makes when somebody opens it


class Given(NamedTuple):
    """Something hostile.

    Attributes:
        group: of the table.
        what: it is.
        arguments: of the command, given the folder of good inputs and an empty folder to make the file in.
    """

    group: str
    what: str
    arguments: Callable[[Path, Path], list[object]]


class Owned:
    """A pickle that says so when somebody loads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(self.mark),)


# Files.


def file(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sparse(folder: Path, name: str, size: int = 1 << 30) -> Path:
    path = file(folder, name, b"")
    os.truncate(path, size)
    return path


def fifo(folder: Path, name: str) -> Path:
    os.mkfifo(folder / name)
    return folder / name


def link(folder: Path, name: str, target: str) -> Path:
    (folder / name).symlink_to(target)
    return folder / name


def directory(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
)

TEXTS: dict[str, Callable[[Path, str], Path]] = {
    "a sparse file of 1 GB": lambda d, end: sparse(d, f"x{end}"),
    "100,000 open brackets": lambda d, end: file(d, f"x{end}", "[" * 100_000),
    "100,000 open braces": lambda d, end: file(d, f"x{end}", '{"a":' * 100_000),
    "a number of 100,000 digits": lambda d, end: file(d, f"x{end}", "9" * 100_000),
    "bytes that are no text": lambda d, end: file(d, f"x{end}", b"\xff\xfe\x00\xd8" * 50),
    "a pickle": lambda d, end: file(d, f"x{end}", pickle.dumps(Owned(d / MARK))),
    "YAML that multiplies by aliases": lambda d, end: file(d, f"x{end}", LAUGHS),
    "YAML with an object": lambda d, end: file(d, f"x{end}", f"!!python/object/apply:os.mkdir ['{d}/{MARK}']\n"),
    "a folder": lambda d, end: directory(d, f"x{end}"),
    "a link to itself": lambda d, end: link(d, f"x{end}", f"x{end}"),
    "a named pipe that nobody writes to": lambda d, end: fifo(d, f"x{end}"),
    "/dev/zero": lambda d, end: link(d, f"x{end}", "/dev/zero"),
    "an empty file": lambda d, end: file(d, f"x{end}", ""),
}


def texts() -> Iterator[Given]:
    """Files where text is due, for every option that names one."""
    takes: dict[str, Callable[[Path, Path, Path], list[object]]] = {
        "generate --prompts .json": lambda f, d, x: ["generate", "--prompts", x, "--out", d / "o"],
        "generate --policy .json": lambda f, d, x: ["generate", "a", "--policy", x, "--out", d / "o"],
        "simulate --policy .json": lambda f, d, x: ["simulate", f / "rec.zarr", "--policy", x],
        "generate --settings .toml": lambda f, d, x: ["--settings", x, "generate", "a", "--out", d / "o"],
        "train --config .yaml": lambda f, d, x: ["train", "--config", x, "--out", d / "o"],
        "label --ground-truth .yaml": lambda f, d, x: ["label", f / "p.txt", d / "o", "--ground-truth", f"hps={x}"],
        "score --prompts .json": lambda f, d, x: ["score", f / "tree", "--reward", "shapes", "--prompts", x, "--out", d / "o"],
        "simulate tree.json": lambda f, d, x: ["simulate", x],
    }  # fmt: skip
    fine = {("generate --settings .toml", "an empty file"), ("train --config .yaml", "an empty file")}
    for option, arguments in takes.items():
        end = f".{option.rsplit('.', 1)[1]}"
        for what, make in TEXTS.items():
            if (option, what) not in fine:
                yield Given(option, what, lambda f, d, a=arguments, m=make, e=end: a(f, d, m(d, e)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", text: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + text + chunk(b"IDAT", data) + chunk(b"IEND", b"")


PICTURES: dict[str, Callable[[Path], Path]] = {
    "a decompression bomb of 60,000 x 60,000": lambda d: file(d, "x.png", png(60_000, 60_000, zlib.compress(bytes(9**7)))),
    "a picture of 2^31 x 2^31": lambda d: file(d, "x.png", png(2**31 - 1, 2**31 - 1)),
    "text that unpacks to 1 GB": lambda d: file(
        d, "x.png", png(8, 8, zlib.compress(bytes(8 * 25)), chunk(b"zTXt", b"ttsnap\0\0" + zlib.compress(bytes(1 << 30), 9)))
    ),
    "a pickle named .png": lambda d: file(d, "x.png", pickle.dumps(Owned(d / MARK))),
    "a script named .png": lambda d: file(d, "x.png", "<svg><script>alert(1)</script></svg>"),
    "PostScript named .png": lambda d: file(d, "x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n"),
    "a cut off picture": lambda d: file(d, "x.png", png(64, 64)[:40]),
    "a named pipe": lambda d: fifo(d, "x.png"),
    "a link to itself": lambda d: link(d, "x.png", "x.png"),
    "/dev/zero": lambda d: link(d, "x.png", "/dev/zero"),
    "a sparse file of 1 GB": lambda d: sparse(d, "x.png"),
    "an empty file": lambda d: file(d, "x.png", b""),
}  # fmt: skip


def pictures() -> Iterator[Given]:
    """Files where a picture is due."""
    takes: dict[str, Callable[[Path, Path, Path], list[object]]] = {
        "generate --image": lambda f, d, x: ["generate", "a", "--image", x, "--out", d / "o"],
        "generate --from": lambda f, d, x: ["generate", "--from", x, "--out", d / "o"],
        "show": lambda f, d, x: ["show", x],
        "score": lambda f, d, x: ["score", x, "--prompt", "a", "--reward", "shapes", "--out", d / "o"],
    }
    for option, arguments in takes.items():
        for what, make in PICTURES.items():
            yield Given(option, what, lambda f, d, a=arguments, m=make: a(f, d, m(d)))


def header(text: bytes | str, size: int | None = None) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data) if size is None else size) + data


WEIGHTS: dict[str, Callable[[Path], Path]] = {
    "safetensors whose header is said to have 2^63 bytes": lambda d: file(d, "x.safetensors", header("{}", 2**63)),
    "safetensors whose header is larger than the file": lambda d: file(d, "x.safetensors", header("{}", 99_000_000)),
    "safetensors with a header of 90 MB": lambda d: file(
        d, "x.safetensors", header('{"__metadata__":{"a":"' + "x" * 90_000_000 + '"}}')
    ),
    "safetensors with a header that is nested 100,000 deep": lambda d: file(
        d, "x.safetensors", header('{"a":' * 100_000)
    ),
    "safetensors with a tensor of 2^60 numbers": lambda d: file(
        d, "x.safetensors", header(json.dumps({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}))
    ),
    "safetensors whose tensors overlap": lambda d: file(
        d,
        "x.safetensors",
        header(json.dumps({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"})) + bytes(4),
    ),
    "safetensors of an unknown dtype": lambda d: file(
        d, "x.safetensors", header(json.dumps({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}})) + bytes(4)
    ),
    "safetensors that hold something else": lambda d: file(
        d, "x.safetensors", header(json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})) + bytes(4)
    ),
    "a pickle named .safetensors": lambda d: file(d, "x.safetensors", pickle.dumps(Owned(d / MARK))),
    "a sparse file of 1 GB named .safetensors": lambda d: sparse(d, "x.safetensors"),
    "a folder named .safetensors": lambda d: directory(d, "x.safetensors"),
}
GGUFS: dict[str, Callable[[Path], Path]] = {
    "GGUF without its first bytes": lambda d: file(d, "x.gguf", b"FUGG" + bytes(60)),
    "GGUF of version 99": lambda d: file(d, "x.gguf", b"GGUF" + struct.pack("<IQQ", 99, 0, 0)),
    "GGUF with 2^63 tensors": lambda d: file(d, "x.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0)),
    "GGUF with a name of 2^62 bytes": lambda d: file(d, "x.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62)),
    "GGUF that is cut off": lambda d: file(d, "x.gguf", b"GGUF" + struct.pack("<I", 3)),
    "a language model's GGUF": lambda d: file(
        d, "x.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"
    ),
    "a pickle named .gguf": lambda d: file(d, "x.gguf", pickle.dumps(Owned(d / MARK))),
}  # fmt: skip


def weights() -> Iterator[Given]:
    """Files where weights are due."""
    takes: dict[str, Callable[[Path, Path, Path], list[object]]] = {
        "generate --model": lambda f, d, x: ["generate", "a", "--model", x, "--reward", "shapes", "--out", d / "o"],
        "generate --lora": lambda f, d, x: ["generate", "a", "--lora", x, "--out", d / "o"],
        "generate --vae": lambda f, d, x: ["generate", "a", "--vae", x, "--out", d / "o"],
        "generate --embedding": lambda f, d, x: ["generate", "a", "--embedding", x, "--out", d / "o"],
    }
    for option, arguments in takes.items():
        for what, make in {**WEIGHTS, **(GGUFS if option == "generate --model" else {})}.items():
            yield Given(option, what, lambda f, d, a=arguments, m=make: a(f, d, m(d)))


def changed(recording: Path, folder: Path, name: str, change: Callable[[dict], None]) -> Path:
    """A copy of a recording with other metadata."""
    import shutil

    copy = folder / "x.zarr"
    shutil.copytree(recording, copy)
    data = json.loads((copy / name).read_text())
    change(data)
    (copy / name).write_text(json.dumps(data))
    return copy


ZARRS: dict[str, tuple[str, Callable[[dict], None]]] = {
    "an array of 10^18 prompts": ("clean/zarr.json", lambda m: m.update(shape=[10**18, *m["shape"][1:]])),
    "a negative size": ("clean/zarr.json", lambda m: m.update(shape=[-1, *m["shape"][1:]])),
    "chunks of no size": ("clean/zarr.json", lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[0, 0, 0, 0])),
    "chunks of 2^40 numbers": (
        "clean/zarr.json",
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[2**40, 1, 1, 1]),
    ),
    "a codec that runs Python": ("clean/zarr.json", lambda m: m.update(codecs=[{"name": "pickle", "configuration": {}}])),
    "no codecs": ("clean/zarr.json", lambda m: m.update(codecs=[])),
    "numbers of an unknown kind": ("clean/zarr.json", lambda m: m.update(data_type="object")),
    "a fill value that is a text": ("clean/zarr.json", lambda m: m.update(fill_value="x" * 999)),
    "a zarr format of 99": ("clean/zarr.json", lambda m: m.update(zarr_format=99)),
    "a group where an array is due": ("clean/zarr.json", lambda m: m.update(node_type="group")),
    "prompts that are numbers": ("zarr.json", lambda m: m["attributes"].update(prompts=[1, 2])),
    "a million prompts more than rewards": ("zarr.json", lambda m: m["attributes"].update(prompts=["a"] * 1_000_000)),
    "rewards without names": ("zarr.json", lambda m: m["attributes"].update(rewards=[])),
    "version 99": ("zarr.json", lambda m: m["attributes"].update(version=99)),
    "provenance that is a list": ("zarr.json", lambda m: m["attributes"].update(provenance=[1])),
    "scales that are texts": ("zarr.json", lambda m: m["attributes"].update(scales={"shapes": "x"})),
}  # fmt: skip


def recordings() -> Iterator[Given]:
    """Recordings with crafted metadata."""
    takes: dict[str, Callable[[Path], list[object]]] = {
        "simulate": lambda x: ["simulate", x, "--rungs", "2", "--keep", ".5", "--trials", 5],
        "tune": lambda x: ["tune", x, "--budget", "12NFE", "--trials", 5, "--folds", 2],
    }
    for option, arguments in takes.items():
        for what, (name, change) in ZARRS.items():
            yield Given(
                f"{option} RECORDING",
                what,
                lambda f, d, a=arguments, n=name, c=change: a(changed(f / "rec.zarr", d, n, c)),
            )


def trees() -> Iterator[Given]:
    """Image trees with links out of them and crafted manifests."""

    def tree(f: Path, d: Path, change: Callable[[Path], None]) -> list[object]:
        import shutil

        shutil.copytree(f / "tree", d / "tree")
        change(d / "tree")
        return ["label", d / "tree", d / "o.zarr", "--reward", "shapes", "--strict"]

    def manifest(change: Callable[[dict], None]) -> Callable[[Path], None]:
        def work(root: Path) -> None:
            data = json.loads((root / "manifest.json").read_text())
            change(data)
            (root / "manifest.json").write_text(json.dumps(data))

        return work

    def replaced(make: Callable[[Path], Path]) -> Callable[[Path], None]:
        def work(root: Path) -> None:
            image = root / "p0000" / "id000" / "s01.png"
            image.unlink()
            make(image.parent).rename(image)

        return work

    cases = {what: replaced(make) for what, make in PICTURES.items()}
    cases |= {
        "a link to /etc/passwd": lambda root: _relink(root / "p0000" / "id000" / "s01.png", "/etc/passwd"),
        "a candidate's folder that links to /etc": lambda root: _relink(root / "p0000" / "id000", "/etc"),
        "a manifest with 10^12 candidates": manifest(lambda m: m.update(seeds=[[1]] * 3)),
        "a manifest with calls beyond its steps": manifest(lambda m: m.update(calls=[1, 99])),
        "a manifest of a billion pixels": manifest(lambda m: m.update(image_size=[10**9, 10**9])),
        "a manifest whose format climbs": manifest(lambda m: m.update(image_format="../../etc/passwd")),
        "a manifest with NaN for noise": manifest(lambda m: m.update(sigmas=[float("nan")] * 6)),
    }
    for what, change in cases.items():
        if what != "text that unpacks to 1 GB":  # is not read here
            yield Given("label TREE", what, lambda f, d, c=change: tree(f, d, c))


def _relink(path: Path, target: str) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


OPTIONS = [
    "generate a --candidates 0", "generate a --candidates -5", "generate a --candidates 1e9", "generate a --candidates 999999999",
    "generate a --steps 0", "generate a --steps 100000", "generate a --size 0x0", "generate a --size 99999x99999",
    "generate a --size 1:0", "generate a --size -8", "generate a --guidance nan --guidance x", "generate a --budget nanNFE",
    "generate a --budget infTFLOP", "generate a --budget -1s", "generate a --budget 1e999TFLOP", "generate a --rungs 99",
    "generate a --rungs 2,2", "generate a --rungs 3,1", "generate a --keep 2", "generate a --keep nan --rungs 2",
    "generate a --keep 0 --rungs 2", "generate a --seed -1", "generate a --seed 99999999999999999999999", "generate a --stop-at nan x --top 0",
    "generate a --top 0", "generate a --max-batch 0", "generate a --call width", "generate a --call __class__=1",
    "generate a --call generator=1", "generate a --scheduler os.system", "generate a --scheduler Euler,__class__=x",
    "generate a --reward os:system", "generate a --reward ../../etc:passwd", "generate a --reward shapes,shapes", "generate a --device cuda:99",
    "generate a --devices cpu,,cpu", "generate a --devices cpu,nowhere", "generate a --reward-timeout 0", "generate a --reward-timeout nan",
    "generate a --dtype int3", "generate a --model ../../../etc/passwd", "generate a --model http://127.0.0.1:1/x", "generate a --out /proc/1/mem/x",
    "generate a --out /dev/null/x", "generate a --workers 0", "record a --out o --per-prompt 0", "record a --out o --calls 0",
    "record a --out o --calls 999", "record a --out o --calls nan", "record a --out o --store-size 0", "record a --out o --format exe",
    "serve --port 99999", "serve --port -1", "serve --host 0.0.0.0", "serve --host evil.invalid --insecure", "app --host 0.0.0.0",
    "app --port 99999", "score nowhere/** --reward shapes --prompt a", "bench a --candidates 1", "simulate nowhere.zarr", "train --out o",
]  # fmt: skip


def options() -> Iterator[Given]:
    """Options out of all range."""
    for line in OPTIONS:
        yield Given(f"{line.split()[0]}, options", f"`{line}`", lambda f, d, line=line: line.split())


def everything() -> Iterator[Given]:
    """All files and options."""
    for part in (texts, pictures, weights, recordings, trees, options):
        yield from part()


# Requests.


def raw(text: str, body: bytes = b"") -> bytes:
    return text.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body


def post(path: str, body: bytes | str, host: str = "127.0.0.1", **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else body.encode()
    given = {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
    lines = "".join(f"\n{name.replace('_', '-')}: {value}" for name, value in given.items())
    return raw(f"POST {path} HTTP/1.1\nHost: {host}\nConnection: close{lines}", data)


def get(path: str, host: str = "127.0.0.1", **headers: str) -> bytes:
    lines = "".join(f"\n{name.replace('_', '-')}: {value}" for name, value in headers.items())
    return raw(f"GET {path} HTTP/1.1\nHost: {host}\nConnection: close{lines}")


IMAGES = "/v1/images/generations"
BOTH = {
    "another site's name (DNS rebinding)": get("/", "evil.example"),
    "another site's name with a port": get("/", "evil.example:80"),
    "a name that ends like this one": get("/", "127.0.0.1.evil.example"),
    "no name": raw("GET / HTTP/1.1\nConnection: close"),
    "a page of another site": get("/", Origin="http://evil.example"),
    "a path that climbs": get("/../../../../etc/passwd"),
    "an encoded path that climbs": get("/%2e%2e/%2e%2e/%2e%2e/etc/passwd"),
    "a path with NUL": get("/%00"),
    "a path of 100,000 letters": get("/" + "a" * 100_000),
    "1,000 headers of 1,000 letters": get("/", **{f"X{n}": "a" * 1000 for n in range(1000)}),
    "a negative length": post("/", b"", Content_Length="-5"),
    "no HTTP at all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" * 20,
    "an unknown method": raw("BREW / HTTP/9.9\nHost: 127.0.0.1\nConnection: close"),
    "two lengths": raw(
        "POST / HTTP/1.1\nHost: 127.0.0.1\nContent-Length: 3\nContent-Length: 5\nConnection: close", b"aaa"
    ),
}
SERVE = {
    "JSON that is nested 100,000 deep": post(IMAGES, "[" * 100_000),
    "JSON that is cut off": post(IMAGES, '{"prompt": "a'),
    "a list": post(IMAGES, "[1]"),
    "no prompt": post(IMAGES, "{}"),
    "a prompt that is a number": post(IMAGES, '{"prompt": 5}'),
    "a prompt of a million letters": post(IMAGES, json.dumps({"prompt": "a" * 1_000_000})),
    "a prompt with NUL": post(IMAGES, json.dumps({"prompt": "a\0b"})),
    "a billion pictures": post(IMAGES, '{"prompt": "a", "n": 1000000000}'),
    "minus one picture": post(IMAGES, '{"prompt": "a", "n": -1}'),
    "NaN pictures": post(IMAGES, '{"prompt": "a", "n": NaN}'),
    "a picture of 99999999 x 1": post(IMAGES, '{"prompt": "a", "size": "99999999x1"}'),
    "a size that is none": post(IMAGES, '{"prompt": "a", "size": "../../etc"}'),
    "another model": post(IMAGES, '{"prompt": "a", "model": "../../etc/passwd"}'),
    "a seed beyond 2^62": post(IMAGES, '{"prompt": "a", "seed": 99999999999999999999999999}'),
    "an unknown option": post(IMAGES, '{"prompt": "a", "__class__": 1}'),
    "an answer of another kind": post(IMAGES, '{"prompt": "a", "response_format": "exe"}'),
    "a body of another kind": post(IMAGES, b"\xff" * 100, Content_Type="application/octet-stream"),
    "an edit without a form": post("/v1/images/edits", '{"prompt": "a"}'),
    "an edit whose form is cut off": post("/v1/images/edits", b"--x\r\nConte", Content_Type="multipart/form-data; boundary=x"),
    "an edit with a bomb": post(
        "/v1/images/edits",
        b"--x\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\na\r\n--x\r\nContent-Disposition: form-data; "
        b'name="image"; filename="../../x.png"\r\nContent-Type: image/png\r\n\r\n' + png(60_000, 60_000) + b"\r\n--x--\r\n",
        Content_Type="multipart/form-data; boundary=x",
    ),
    "a page of another site that posts": post(IMAGES, '{"prompt": "a"}', Origin="http://evil.example"),
    "another site's name that posts": post(IMAGES, '{"prompt": "a"}', "evil.example"),
    "a job that climbs": get("/v1/jobs/../../../etc/passwd"),
}  # fmt: skip
PAGE = {
    "a file of this machine": get("/gradio_api/file=/etc/passwd"),
    "a file that climbs": get("/gradio_api/file=../../../../etc/passwd"),
    "a file of the page's own code": get("/gradio_api/file=/work/x/src/ttsnap/app/server.py"),
    "a file from elsewhere": get("/gradio_api/file=http://127.0.0.1:1/x"),
    "a function that there is none of": post("/gradio_api/run/predict", '{"fn_index": 99999, "data": []}'),
    "a queue's message that is a list": post("/gradio_api/queue/join", "[1]"),
    "a queue's message that is nested 100,000 deep": post("/gradio_api/queue/join", "[" * 100_000),
    "a component that there is none of": post("/gradio_api/component_server", '{"component_id": 99999, "fn_name": "ls"}'),
    "an upload that is cut off": post("/gradio_api/upload", b"--x\r\nConte", Content_Type="multipart/form-data; boundary=x"),
    "a page of another site that posts": post("/gradio_api/queue/join", "{}", Origin="http://evil.example"),
    "another site's name that posts": post("/gradio_api/queue/join", "{}", "evil.example"),
    "a proxy to elsewhere": get("/gradio_api/proxy=http://127.0.0.1:1/x"),
    "a stream that there is none of": get("/gradio_api/stream/x/1/../../playlist.m3u8"),
}  # fmt: skip


def asked(port: int, data: bytes, patience: float = 60.0) -> tuple[int, bytes]:
    """Status and body of the answer to raw bytes; status 0 where the connection is closed without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        got, deadline = b"", time.monotonic() + patience
        try:
            connection.sendall(data)
            while (part := connection.recv(65536)) and time.monotonic() < deadline:
                got += part
        except (ConnectionError, TimeoutError):
            pass
    head, _, body = got.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), body
