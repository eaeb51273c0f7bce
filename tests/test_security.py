"""Nobody is let in: paths from data, code in checkpoints, what steers a terminal, secrets. The web: see test_web."""

from __future__ import annotations

import ast
import json
import logging
import pickle
import shutil
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guardalign import cli
from guardalign.cli import main
from guardalign.config import AuditConfig, Choice, ClipConfig, InputConfig, LvlmConfig, to_plain
from guardalign.credentials import refuse_credentials
from guardalign.errors import ConfigError, InputError, ModelError, RowError, harmless
from guardalign.evaluation.printing import Sheet, _markdown, _text
from guardalign.micro import FOLDER, WEIGHTS
from guardalign.models.checkpoints import Checkpoint
from guardalign.models.clip import PatchEncoder
from guardalign.models.guard import load_guard
from guardalign.models.lvlm import Lvlm
from guardalign.models.reward import load_reward
from guardalign.settings import as_yaml
from guardalign.sources import make_source
from guardalign.sources.pictures import ImageRoot
from tests.runs import rows, run

PACKAGE = FOLDER.parent
SECRET = "MARKER0secret"
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2066x\u2028\u2029\x85\r\nrows 0 of 0|`<img src=x>"
"""a window title, a cleared screen, C1, directions turned, line separators, a faked line, Markdown, HTML"""


# Paths from data


@pytest.mark.parametrize(
    "reference",
    [
        *("../x.png", "a/../../x.png", "/etc/passwd", "//etc/passwd", "/", "..", ".", "", "/data/rooted/x.png"),
        *("file:///etc/passwd", "file://localhost/etc/passwd", "FILE:///etc/passwd", "local:///data/root/x"),
        *("s3://other/x.png", "memory://x.png", "ftp://host/x.png", "data:image/png;base64,://AAAA"),
        *("simplecache::file:///etc/passwd", "zip://x.png::/tmp/x.zip", "filecache::s3://b/x", "http://host/x.png"),
        *("HTTPS://host/x.png", "a\0b.png"),
    ],
)
def test_no_reference_leads_out_of_a_local_root(reference: str) -> None:
    with pytest.raises(RowError) as found:
        ImageRoot("/data/root", "").relative(reference, "a17")
    assert found.value.kind == "image_missing" and (len(reference) < 3 or reference not in str(found.value))


@pytest.mark.parametrize(
    ("reference", "relative"),
    [
        *[("a/../b.png", "b.png"), ("./b.png", "b.png"), ("/data/root/b.png", "b.png")],
        *[("file:///data/root/b.png", "b.png"), ("~/b.png", "~/b.png"), ("$HOME/b.png", "$HOME/b.png")],
        *[("..\\b.png", "..\\b.png"), ("%2e%2e/b.png", "%2e%2e/b.png"), ("x::b.png", "x::b.png")],
    ],
)
def test_what_only_looks_like_a_way_out_is_a_plain_name_below_the_root(reference: str, relative: str) -> None:
    assert ImageRoot("/data/root", "").relative(reference, "a17") == relative


@pytest.mark.parametrize(
    "reference",
    [
        *("../x.png", "%2e%2e/x.png", "a/%2E%2E/%2e%2e/x.png", "..%2fx.png", "s3://bucket/other/x.png", "/etc/passwd"),
        *("x::file", "a.png::memory", "zip://x::s3://bucket/root/a.zip", "s3://other/root/x.png", "memory://root/x"),
    ],
)
def test_no_reference_leads_out_of_a_remote_root_or_to_another_file_system(reference: str) -> None:
    with pytest.raises(RowError):
        ImageRoot("s3://bucket/root", "").relative(reference, "a17")


def test_a_link_a_pipe_and_a_folder_below_the_root_are_no_pictures(tmp_path: Path) -> None:
    import os

    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.png")
    for reference in ("link.png", "linked/secret.png", "pipe.png", "folder", "absent.png"):
        with pytest.raises(RowError):
            ImageRoot(str(root), "").read(reference, "a17")


# Checkpoints


def code(marker: Path, *classes: str) -> str:
    """A module that tells when it is run."""
    return f"open({str(marker)!r}, 'w').write('ran')\n" + "\n".join(f"class {name}: pass" for name in classes)


class Writes:
    """Unpickled, it tells."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def changed(path: Path, **more: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | more))


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """Where hostile code would leave its mark; it must not be there at the end."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "code of a checkpoint ran"


@pytest.mark.parametrize("asks", [False, True])
def test_a_clip_folder_cannot_have_its_own_tokenizer_code_run(asks: bool, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(WEIGHTS / "clip", folder)
    (folder / "foreign.py").write_text(code(marker, "Foreign"))
    own = {"AutoTokenizer": ["foreign.Foreign", "foreign.Foreign"]}
    changed(folder / "tokenizer_config.json", tokenizer_class="Foreign", auto_map=own)
    if asks:
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded") as found:
        PatchEncoder.load(ClipConfig(model=f"local-dir:{folder}"))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("tower", "options", "words"),
    [
        ("vision_cfg", {"timm_model_name": "hf-hub:somebody/model"}, "would be fetched"),
        ("text_cfg", {"hf_model_name": "somebody/model"}, "would be fetched"),
        ("text_cfg", {"hf_model_name": "FOLDER"}, "code of its own"),
    ],
)
def test_a_clip_folder_cannot_name_foreign_towers(
    tower: str, options: dict[str, str], words: str, tmp_path: Path, marker: Path
) -> None:
    folder, text = tmp_path / "clip", tmp_path / "text"
    shutil.copytree(WEIGHTS / "clip", folder)
    text.mkdir()
    (text / "foreign.py").write_text(code(marker, "Config"))
    changed(text / "config.json", model_type="foreign", auto_map={"AutoConfig": "foreign.Config"})
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"][tower] |= {key: str(text) if it == "FOLDER" else it for key, it in options.items()}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        PatchEncoder.load(ClipConfig(model=f"local-dir:{folder}"))


AUTO = {
    "config.json": ("AutoConfig", "AutoModelForImageTextToText", "AutoModelForCausalLM"),
    "processor_config.json": ("AutoProcessor", "AutoImageProcessor"),
    "tokenizer_config.json": ("AutoTokenizer",),
    "preprocessor_config.json": ("AutoImageProcessor", "AutoProcessor"),
}


@pytest.mark.parametrize("file", AUTO)
@pytest.mark.parametrize("known", [False, True])
def test_an_lvlm_folder_cannot_have_its_own_code_run(file: str, known: bool, tmp_path: Path, marker: Path) -> None:
    """Under a class that transformers has, the folder's own is passed by; under any other it is refused in a line."""
    folder = tmp_path / "lvlm"
    shutil.copytree(WEIGHTS / "lvlm", folder)
    (folder / "foreign.py").write_text(code(marker, "Foreign"))
    own = {name: ["foreign.Foreign"] * 2 if "Tokenizer" in name else "foreign.Foreign" for name in AUTO[file]}
    foreign = {"model_type": "foreign", "processor_class": "Foreign", "tokenizer_class": "Foreign"}
    changed(folder / file, auto_map=own, **({} if known else foreign))
    try:
        Lvlm.load(LvlmConfig(model=str(folder)))
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert known or file != "config.json"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "open_clip_pytorch_model.bin"])
def test_a_folder_with_pickled_weights_only_is_refused_unread(name: str, tmp_path: Path, marker: Path) -> None:
    for kind in ("lvlm", "clip", "reward"):
        shutil.copytree(WEIGHTS / kind, tmp_path / kind)
        for weights in (tmp_path / kind).glob("*.safetensors"):
            weights.unlink()
        (tmp_path / kind / name).write_bytes(pickle.dumps(Writes(marker)))
    loads: list[Callable[[], Any]] = [
        lambda: Lvlm.load(LvlmConfig(model=str(tmp_path / "lvlm"))),
        lambda: PatchEncoder.load(ClipConfig(model=f"local-dir:{tmp_path / 'clip'}")),
        lambda: PatchEncoder.load(ClipConfig(model="ViT-B-16", pretrained=str(tmp_path / "clip" / name))),
        lambda: load_reward(str(tmp_path / "reward"), None, "float32", "cpu"),
        lambda: load_guard(Checkpoint(str(tmp_path / "reward"))),
    ]
    for load in loads:
        with pytest.raises(ModelError, match="safetensors"):
            load()


def test_a_folder_with_an_adapter_that_names_another_model_is_refused(tmp_path: Path) -> None:
    for kind in ("lvlm", "reward"):
        shutil.copytree(WEIGHTS / kind, tmp_path / kind)
        changed(tmp_path / kind / "adapter_config.json", base_model_name_or_path="somebody/model", peft_type="LORA")
    with pytest.raises(ModelError, match="merge the adapter"):
        Lvlm.load(LvlmConfig(model=str(tmp_path / "lvlm")))
    with pytest.raises(ModelError, match="merge the adapter"):
        load_guard(Checkpoint(str(tmp_path / "reward")))


def test_a_data_set_folder_with_a_script_is_refused_unread(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(code(marker, "Set"))
    with pytest.raises(InputError, match="no complete data set"):
        make_source(InputConfig("huggingface", str(folder))).plan(4, None)


def test_the_package_unpickles_its_own_messages_only_and_never_turns_safety_off() -> None:
    """Whoever adds such a call has to come by here."""
    between_own_processes = {"pipeline.py", "supervision.py", "watching.py", "worker.py", "reading.py"}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
        }
        unsafe = {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"} & imported
        assert not unsafe or (unsafe == {"pickle"} and path.name in between_own_processes), f"{path.name}: {unsafe}"
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            refuse_unsafe(call, path.name)


def refuse_unsafe(call: ast.Call, place: str) -> None:
    name, given = ast.unparse(call.func), {each.arg: ast.unparse(each.value) for each in call.keywords}
    assert name not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"), f"{place}"
    assert name != "torch.load" or given.get("weights_only") == "True", f"{place}: torch.load without weights_only"
    assert given.get("trust_remote_code", "False") == "False", f"{place}: trust_remote_code"
    assert given.get("allow_pickle", "False") == "False" and given.get("shell", "False") == "False", f"{place}"
    if name.endswith(".from_pretrained"):
        local = given.get("local_files_only") == "True"
        assert local or any("source" in value for value in given.values()), f"{place}: {name} without its safe options"


# Terminals and Markdown


def test_harmless_leaves_nothing_that_steers() -> None:
    """All code points: controls, formats (directions among them), separators, surrogates are escaped; letters stay."""
    kinds: dict[str, list[str]] = {}
    for number in range(sys.maxunicode + 1):
        kinds.setdefault(unicodedata.category(chr(number)), []).append(chr(number))
    for kind, letters in kinds.items():
        shown = harmless("".join(letters))
        if kind in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"):
            assert shown.isascii() and shown.isprintable() and shown.count("\\") == len(letters), kind
        elif kind != "Zs":
            assert shown == "".join(letters), kind


def require_tame(text: str) -> None:
    for line in text.split("\n"):
        assert line == harmless(line), ascii(line[:200])
    assert "\nrows 0 of 0" not in text, "data begins a line"


def test_no_cell_of_a_data_set_steers_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The hostile text stands in every column, in column names and in file names."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / f"{HOSTILE.replace('/', '')}.png").write_bytes(b"x")
    cells = {"sample_id": [HOSTILE, "b"], "prompt": [HOSTILE] * 2, "image": [None, HOSTILE]}
    cells |= {"category": [HOSTILE] * 2, "label": [HOSTILE, "unsafe"], f"more{HOSTILE}": [HOSTILE] * 2}
    data, out = tmp_path / f"d{HOSTILE.replace('/', '')}.parquet", tmp_path / "out"
    pq.write_table(pa.table(cells), data)
    flags = ["--input.format", "parquet", "--input.path", str(data), "--input.passthrough", f'["more{escaped()}"]']
    flags += ["--self_check", "false", "--input.image_root", str(tmp_path / "pictures")]
    assert run(*flags, "--dry_run", "--output", out) == 0
    assert run(*flags, "--output", out) == 0
    assert {row["error_kind"] for row in rows(out).values()} == {None, "image_missing"}
    assert main(["show", str(out), HOSTILE]) == 0
    assert main(["show", str(out), "b"]) == 0
    assert main(["show", str(out), f"absent{HOSTILE}"]) == 2
    assert main(["rescore", str(out), "--threshold", "0.1"]) == 0
    pq.write_table(pa.table(cells | {"sample_id": [HOSTILE, HOSTILE]}), data)
    assert run(*flags, "--output", tmp_path / "twice") == 2
    assert run("--input.format", "parquet", "--input.path", f"{data}{HOSTILE}", "--output", tmp_path / "x") == 2
    assert run("--judge.name", HOSTILE, "--output", tmp_path / "x") == 2
    assert main([HOSTILE]) == 2
    said = capfd.readouterr()
    assert "owned" in said.out and "owned" in said.err, "nothing hostile was told of: the test proves nothing"
    require_tame(said.out)
    require_tame(said.err)


def escaped() -> str:
    """The hostile text within double quotes of YAML."""
    return json.dumps(HOSTILE)[1:-1]


def test_log_lines_and_printed_settings_are_tame(capsys: pytest.CaptureFixture[str]) -> None:
    formatter = cli._HarmlessFormatter("%(levelname)s: %(message)s")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("x", logging.WARNING, "", 1, "%s", (HOSTILE,), sys.exc_info())
    require_tame(formatter.format(record))
    config = AuditConfig(lvlm=LvlmConfig(system_prompt=HOSTILE))
    require_tame(as_yaml(config))
    import yaml

    assert yaml.safe_load(as_yaml(config)) == to_plain(config), "escaped, not changed"
    assert "ü" in as_yaml(AuditConfig(lvlm=LvlmConfig(system_prompt="ü")))


def test_tables_keep_their_shape_whatever_a_cell_holds() -> None:
    sheet = Sheet(
        "t", ("part", "rate"), ((HOSTILE, "12.0 % [10.0, 14.0]"), ("[a](javascript:x) &#x202e; **b**", "< 1"))
    )
    require_tame(_text(sheet))
    assert len(_text(sheet).rstrip().splitlines()) == 6
    markdown = _markdown(sheet)
    require_tame(markdown)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [line.replace("\\|", "").count("|") for line in table] == [3] * 4
    for tag in ("<img", "](", "&#", "**", " `"):
        assert tag not in "".join(table)
    assert "12.0 % [10.0, 14.0]" in markdown and "| < 1 |" in markdown


# Secrets


@pytest.mark.parametrize(
    "address",
    [
        *(f"https://user:{SECRET}@host/x", f"https://{SECRET}@host/x", f"https://host/x?sig={SECRET}"),
        *(f"http://host/x#{SECRET}", f"s3://KEY:{SECRET}@bucket/x", f"s3://KEY:{SECRET}/a/b@bucket/x"),
        *(f"ftp://user:{SECRET}@host/x", f"simplecache::https://user:{SECRET}@host/x", f"S3://K:{SECRET}@b"),
        *(f"zip://x::https://host/x?{SECRET}", f"sftp://user:{SECRET}@host:22/x", f"HTTPS://{SECRET}@host"),
        *(f"https://u:p {SECRET}@host/x", f" https://u:{SECRET}@host/x.csv", f"s3://K:a\n{SECRET}@b/x\n"),
        *(f"s3://b/x?X-Amz-Signature={SECRET}", f"abfs://c@a/x?sv=1&sig={SECRET}", f"gs://b/x#token={SECRET}"),
        *(f"https://u:{SECRET}@host/x://", f"s3://K:a::{SECRET}@b/x", f"s3://b/x?a=b;secret={SECRET}"),
    ],
)
def test_addresses_that_hold_a_secret_are_refused_without_being_repeated(address: str) -> None:
    for build in (
        lambda: InputConfig("parquet", address),
        lambda: InputConfig("parquet", ["x", address]),
        lambda: InputConfig("csv", "x", image_root=address),
        lambda: AuditConfig(output=address),
        lambda: AuditConfig(lvlm=LvlmConfig(model=address)),
    ):
        with pytest.raises(ConfigError, match="credentials belong into the environment") as found:
            build()
        assert SECRET not in str(found.value)


@pytest.mark.parametrize(
    "address",
    [
        *("s3://bucket/a?b*.parquet", "gs://b/x", "abfs://container@account.dfs.core.windows.net/x", "/a/b:c@d?x"),
        *("hdfs://host:9000/x@y", "sftp://user@host/x", "github://owner:repo@main/x.csv", "https://host:8443/x@y/z"),
        *("memory://x", "file:///a@b", "simplecache::s3://b/x", "data/part-?.parquet", "ray://head:10001"),
        *("s3://b/day?/key=3/x", "s3://b/key=3/x?.parquet", "zip://x::s3://b/x@y"),
    ],
)
def test_addresses_without_a_secret_pass(address: str) -> None:
    refuse_credentials("input.path", address)


def test_a_prompt_that_quotes_an_address_is_no_address() -> None:
    AuditConfig(lvlm=LvlmConfig(system_prompt="Ask at https://host/x?y=z and at https://a:b@c/ only."))
    AuditConfig(lvlm=LvlmConfig(system_prompt="https://host/x?y=z and https://a:b@c/ are where to ask."))
    AuditConfig(defense=Choice("plain", {"prefix": "https://a:b@c/ is where to ask."}))
    for secret in (f"https://host/x?{SECRET}", f" https://u:{SECRET}@host/x "):
        with pytest.raises(ConfigError):
            AuditConfig(lvlm=LvlmConfig(system_prompt=secret))


@pytest.fixture
def endpoint() -> Iterator[Callable[[int], str]]:
    """A judge's endpoint that answers with the status it is told, and repeats the key it was sent."""
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            said = {"message": self.headers["Authorization"], "code": self.headers["Authorization"]}
            body = json.dumps({"choices": [{"message": {"content": "no"}}], "error": said}).encode()
            self.send_response(status[0])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def start(answer: int) -> str:
        status[0] = answer
        return f"http://127.0.0.1:{server.server_address[1]}/v1"

    yield start
    server.shutdown()
    server.server_close()


def test_no_secret_stands_in_any_file_or_line_of_a_run(
    endpoint: Callable[[int], str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of the judge, tokens in the environment, and keys inside picture addresses; a run fails, another ends."""
    for variable in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "HTTPS_PROXY_PASSWORD"):
        monkeypatch.setenv(variable, SECRET)
    urls = [f"http://127.0.0.1/x?key={SECRET}", f"https://user:{SECRET}@127.0.0.1/x", f"http://{SECRET}.invalid:22/"]
    cells = {"sample_id": ["a", "b", "c", "d"], "prompt": ["Name it."] * 4, "image": [*urls, None]}
    pq.write_table(pa.table(cells), tmp_path / "t.parquet")
    flags = ["--input.format", "parquet", "--input.path", str(tmp_path / "t.parquet"), "--recipe", "none"]
    flags += ["--judge.name", "endpoint", "--judge.model", "m", "--judge.retries", "1", "--self_check", "false"]
    fetching = ["--input.allow_urls", "true", "--input.url_seconds", "2"]
    out = tmp_path / "out"
    assert run(*flags, "--judge.url", endpoint(200), "--output", out / "off") == 0
    assert run(*flags, *fetching, "--judge.url", endpoint(200), "--output", out / "on") == 0
    found = rows(out / "on")
    assert [found[name]["error_kind"] for name in "abcd"] == ["image_missing"] * 3 + [None]
    assert found["d"]["unsafe"] is False, "the judge was asked, with the key"
    assert run(*flags, "--judge.url", endpoint(400), "--output", out / "rows-fail") == 0
    assert run(*flags, "--judge.url", endpoint(401), "--output", out / "stops") == 2
    url = endpoint(200)
    for wrong in (
        ["--judge.url", url.replace("//", f"//user:{SECRET}@")],
        ["--judge.url", f"{url}?key={SECRET}"],
        ["--judge.url", url, "--judge.key_variable", f"sk-{SECRET}"],
        ["--judge.url", url, "--input.path", f"https://user:{SECRET}@host/t.parquet"],
        ["--judge.url", url, "--input.path", f"https://host/t.parquet?sig={SECRET}"],
        ["--judge.url", url, "--input.image_root", f"s3://KEY:{SECRET}@bucket/pictures"],
        ["--judge.url", url, "--output", f"s3://KEY:{SECRET}@bucket/out"],
    ):
        assert run(*flags, "--output", out / "wrong", *wrong) == 2
        assert run(*flags, *wrong, "--print_config") == 2
    assert main(["evaluate", "--benchmarks", f"xstest=https://user:{SECRET}@host/x", "--output", str(out / "e")]) == 2
    assert run(*flags, "--judge.url", url, "--print_config") == 0
    said = capfd.readouterr()
    assert "judge.key_variable" in said.err and "neither user nor password" in said.err
    assert SECRET not in said.out + said.err
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path.name


def test_what_holds_a_key_does_not_show_it(endpoint: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    from guardalign.judges import EndpointJudge

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    judge = EndpointJudge(endpoint(200), "m")
    ready: Any = judge.ready()
    shown = [repr(each) + str(each) for each in (judge, ready, ready.endpoint, ready.endpoint._auth, ready.settings)]
    assert SECRET not in "".join(shown) + json.dumps(to_plain(judge))
    assert SECRET.encode() not in pickle.dumps(judge), "what travels to workers holds the variable's name only"
