"""Models from the hub: which files a reference means, and that nothing damaged or half-written is ever left behind."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.models.hub_server import Hub, running_hub
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import ModelFiles, SourceContext
from inferflux_core.models.hub import HubSource

REPO = "acme/tiny-gguf"
Q4, Q8 = b"four bits " * 5000, b"eight bits " * 5000
FILES = {"README.md": b"# tiny", "tiny-Q4_K_M.gguf": Q4, "tiny-Q8_0.gguf": Q8, "mmproj-tiny-F16.gguf": b"picture"}
SAFETENSORS = {
    "README.md": b"# tiny",
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "model-00001-of-00002.safetensors": b"first half",
    "model-00002-of-00002.safetensors": b"second half",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"import os",
    "onnx/model.onnx": b"onnx",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub

    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def context(tmp_path: Path) -> SourceContext:
    return SourceContext(cache_dir=tmp_path / "cache")


def offline(context: SourceContext) -> SourceContext:
    return SourceContext(cache_dir=context.cache_dir, offline=True)


def resolve(ref: str, context: SourceContext) -> ModelFiles:
    return HubSource().resolve(ref, context)


def refused(ref: str, context: SourceContext) -> str:
    with pytest.raises(ModelFileError) as caught:
        resolve(ref, context)
    return str(caught.value)


def contents(files: ModelFiles) -> list[bytes]:
    return [Path(path).read_bytes() for path in files.paths if Path(path).is_file()]


def everything(context: SourceContext) -> list[Path]:
    """All files with content in the cache, except what the client library keeps for itself."""
    assert context.cache_dir is not None
    kept = context.cache_dir.rglob("*") if context.cache_dir.exists() else []
    return sorted(path for path in kept if path.is_file() and ".locks" not in path.parts and path.name != "CACHEDIR.TAG")


# --- pulling ----------------------------------------------------------------------------------------------------------


def test_a_pull_fetches_the_usual_quantisation_once(hub: Hub, context: SourceContext) -> None:
    commit = hub.add(REPO, FILES)
    files = resolve(f"hf:{REPO}", context)
    assert (files.ref, files.format, files.revision) == (f"hf:{REPO}", "gguf", commit)
    assert contents(files) == [Q4]
    assert Path(files.paths[0]).name == "tiny-Q4_K_M.gguf"
    assert hub.fetched() == ["tiny-Q4_K_M.gguf"]
    assert resolve(f"hf:{REPO}", context) == files
    assert hub.fetched() == ["tiny-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("selector", "content"),
    [(":Q8_0", Q8), (":q8_0", Q8), (":tiny-Q8_0.gguf", Q8), (":Q4_K_M", Q4), (":mmproj-tiny-F16.gguf", b"picture")],
)
def test_a_quantisation_or_file_may_be_named(hub: Hub, context: SourceContext, selector: str, content: bytes) -> None:
    hub.add(REPO, FILES)
    assert contents(resolve(f"hf:{REPO}{selector}", context)) == [content]


def test_an_unknown_choice_lists_those_there_are(hub: Hub, context: SourceContext) -> None:
    hub.add(REPO, FILES)
    assert refused(f"hf:{REPO}:Q2_K", context) == (f"'hf:{REPO}:Q2_K': {REPO} has no quantisation 'Q2_K'; it has Q4_K_M, Q8_0")
    assert refused(f"hf:{REPO}:other.gguf", context) == (
        f"'hf:{REPO}:other.gguf': {REPO} has no file 'other.gguf'; it has tiny-Q4_K_M.gguf, tiny-Q8_0.gguf"
    )
    hub.add("acme/odd", {"a.IQ1_S.gguf": b"a", "b.IQ2_M.gguf": b"b"})
    assert refused("hf:acme/odd", context) == (
        "'hf:acme/odd' names no quantisation, and none is the usual one; acme/odd has a.IQ1_S.gguf, b.IQ2_M.gguf; "
        "append one as ':file.gguf' or its quantisation, such as :Q4_K_M"
    )
    hub.add("acme/two", {"a-Q4_0.gguf": b"a", "b-Q4_0.gguf": b"b"})
    assert refused("hf:acme/two", context) == (
        "'hf:acme/two' fits several files; acme/two has a-Q4_0.gguf, b-Q4_0.gguf; append one as ':file.gguf'"
    )
    assert everything(context) == []


def test_a_single_file_needs_no_choice(hub: Hub, context: SourceContext) -> None:
    hub.add("acme/one", {"weights.gguf": b"w"})
    assert contents(resolve("hf:acme/one", context)) == [b"w"]


def test_a_split_model_is_fetched_whole_and_in_order(hub: Hub, context: SourceContext) -> None:
    parts = {f"Q8_0/big-Q8_0-0000{n}-of-00003.gguf": b"part %d" % n for n in (3, 1, 2)}
    hub.add("acme/big", {**parts, "big-Q2_K.gguf": b"small"})
    files = resolve("hf:acme/big:Q8_0", context)
    assert contents(files) == [b"part 1", b"part 2", b"part 3"]
    assert resolve("hf:acme/big:Q8_0/big-Q8_0-00002-of-00003.gguf", context).paths == files.paths
    del parts["Q8_0/big-Q8_0-00002-of-00003.gguf"]
    hub.add("acme/big", parts)
    assert "of 3 files 1 are missing: Q8_0/big-Q8_0-00002-of-00003.gguf" in refused("hf:acme/big:Q8_0", context)


def test_without_gguf_the_safetensors_model_is_taken_and_no_code(hub: Hub, context: SourceContext) -> None:
    hub.add("acme/st", SAFETENSORS)
    files = resolve("hf:acme/st", context)
    assert files.format == "safetensors"
    folder = Path(files.paths[0])
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert contents(files) == [b"first half", b"second half"]
    assert refused("hf:acme/st:Q4_0", context) == "'hf:acme/st:Q4_0': acme/st has no GGUF files; leave ':Q4_0' out"
    assert resolve("hf:acme/st", offline(context)) == files


def test_pickles_alone_are_refused(hub: Hub, context: SourceContext) -> None:
    hub.add("acme/pickle", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    assert "has neither GGUF files nor config.json with .safetensors files" in refused("hf:acme/pickle", context)
    assert hub.fetched() == []


def test_names_that_lead_out_of_the_cache_are_ignored(hub: Hub, context: SourceContext) -> None:
    hub.add("acme/evil", {"../../evil-Q4_K_M.gguf": b"evil", "/etc/evil-Q4_K_M.gguf": b"evil", "good.gguf": b"good"})
    assert contents(resolve("hf:acme/evil", context)) == [b"good"]


def test_revisions(hub: Hub, context: SourceContext) -> None:
    old = hub.add(REPO, {"tiny.gguf": b"old"})
    new = hub.add(REPO, {"tiny.gguf": b"new"})
    branch = hub.add(REPO, {"tiny.gguf": b"draft"}, branch="refs/pr/7")
    assert contents(resolve(f"hf:{REPO}", context)) == [b"new"]
    assert contents(resolve(f"hf:{REPO}@{old}", context)) == [b"old"]
    assert contents(resolve(f"hf:{REPO}:tiny.gguf@refs/pr/7", context)) == [b"draft"]
    for revision, commit in ((f"@{old}", old), ("", new), ("@refs/pr/7", branch)):
        assert resolve(f"hf:{REPO}{revision}", offline(context)).revision == commit
    assert refused(f"hf:{REPO}@v9", context) == (
        f"'hf:{REPO}@v9': {REPO} has no revision 'v9'; correct it, or leave '@...' out"
    )


# --- transfers that go wrong ------------------------------------------------------------------------------------------


def test_a_broken_transfer_is_resumed(hub: Hub, context: SourceContext) -> None:
    content = bytes(range(256)) * 50_000
    hub.add(REPO, {"tiny-Q4_K_M.gguf": content})
    hub.break_after["tiny-Q4_K_M.gguf"] = 11 << 20  # the client keeps what it has got in steps of 10 MiB
    assert contents(resolve(f"hf:{REPO}", context)) == [content]
    first, second = hub.transfers("tiny-Q4_K_M.gguf")
    assert "Range" not in {name.title() for name in first.headers}
    assert {name.title(): value for name, value in second.headers.items()}["Range"] == "bytes=10485760-"


def test_a_checksum_mismatch_leaves_nothing(hub: Hub, context: SourceContext) -> None:
    hub.add(REPO, FILES)
    hub.corrupt.add("tiny-Q4_K_M.gguf")
    actual = hashlib.sha256(Q4[:-1] + bytes([Q4[-1] ^ 1])).hexdigest()
    assert refused(f"hf:{REPO}", context) == (
        f"'hf:{REPO}': tiny-Q4_K_M.gguf arrived damaged and was deleted: its sha256 is {actual}, the hub says "
        f"{hashlib.sha256(Q4).hexdigest()}; try again; if it stays so, a proxy or mirror in between alters files"
    )
    assert everything(context) == []
    hub.corrupt.clear()
    assert contents(resolve(f"hf:{REPO}", context)) == [Q4]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("short", "the server sent less or more than the file has; nothing was kept; try again"),
        ("endless", "the server sent more than the file has; nothing was kept; check the proxy or mirror in between"),
    ],
)
def test_transfers_of_the_wrong_length_leave_nothing(hub: Hub, context: SourceContext, fault: str, message: str) -> None:
    hub.add(REPO, FILES)
    getattr(hub, fault).add("tiny-Q4_K_M.gguf")
    assert refused(f"hf:{REPO}", context) == f"'hf:{REPO}': {message}"
    assert everything(context) == []


def test_a_process_that_dies_before_the_check_leaves_no_trusted_file(
    hub: Hub, context: SourceContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, FILES)
    hub.corrupt.add("tiny-Q4_K_M.gguf")
    monkeypatch.setattr("inferflux_core.models.hub._verify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        resolve(f"hf:{REPO}", context)
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert "is not in the cache" in refused(f"hf:{REPO}", offline(context))
    assert "arrived damaged and was deleted" in refused(f"hf:{REPO}", context)
    assert everything(context) == []


def test_a_failed_part_leaves_the_model_unusable_and_is_fetched_alone_next_time(hub: Hub, context: SourceContext) -> None:
    hub.add("acme/big", {f"big-0000{n}-of-00002.gguf": b"part %d" % n for n in (1, 2)})
    hub.corrupt.add("big-00002-of-00002.gguf")
    assert "big-00002-of-00002.gguf arrived damaged" in refused("hf:acme/big", context)
    assert "is not in the cache" in refused("hf:acme/big", offline(context))
    hub.corrupt.clear()
    hub.requests.clear()
    assert contents(resolve("hf:acme/big", context)) == [b"part 1", b"part 2"]
    assert hub.fetched() == ["big-00002-of-00002.gguf"]


def test_a_full_disk_is_noticed_before_the_download(hub: Hub, context: SourceContext, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, FILES)
    monkeypatch.setattr("inferflux_core.models.hub_cache.HubCache.free_bytes", lambda _: 10)
    assert refused(f"hf:{REPO}", context) == (
        f"'hf:{REPO}' needs 0.00 GB, but {context.cache_dir} has 0.00 GB free; free some, or set hub.cache_dir"
    )
    assert hub.fetched() == []


def test_a_disk_that_fills_up_during_the_download(hub: Hub, context: SourceContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add(REPO, FILES)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    assert refused(f"hf:{REPO}", context) == (
        f"'hf:{REPO}': no space left in {context.cache_dir}; nothing half-written was kept; free some, or set hub.cache_dir"
    )
    assert everything(context) == []


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, FILES)
    (tmp_path / "cache").write_text("a file, no folder")
    assert refused(f"hf:{REPO}", SourceContext(cache_dir=tmp_path / "cache")) == (
        f"'hf:{REPO}': {tmp_path / 'cache'} cannot be written (Not a directory); correct its permissions, or set hub.cache_dir"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_with_the_model_serves_it(hub: Hub, context: SourceContext) -> None:
    hub.add(REPO, FILES)
    files = resolve(f"hf:{REPO}", context)
    assert context.cache_dir is not None
    folders = [context.cache_dir, *(path for path in context.cache_dir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        assert resolve(f"hf:{REPO}", context) == files
        assert "cannot be written" in refused(f"hf:{REPO}:Q8_0", context)
    finally:
        for folder in folders:
            folder.chmod(0o700)


# --- access -----------------------------------------------------------------------------------------------------------


def test_gated_repositories(hub: Hub, context: SourceContext) -> None:
    hub.add(REPO, FILES, gated=True, token="right")
    message = (
        f"'hf:{REPO}': {REPO} is gated: accept its terms at https://huggingface.co/{REPO}, and set hub.token or HF_TOKEN to a "
        f"token of that account"
    )
    assert refused(f"hf:{REPO}", context) == message
    assert refused(f"hf:{REPO}", SourceContext(cache_dir=context.cache_dir, token="wrong")) == message
    assert contents(resolve(f"hf:{REPO}", SourceContext(cache_dir=context.cache_dir, token="right"))) == [Q4]
    tokens = [{n.title(): v for n, v in r.headers.items()}.get("Authorization") for r in hub.requests]
    assert set(tokens[2:-1]) == {"Bearer right"}
    assert tokens[-1] is None  # the file storage is another host: it must not see the token


def test_the_token_may_come_from_the_environment(hub: Hub, context: SourceContext, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, FILES, token="right")
    assert refused(f"hf:{REPO}", context) == (
        f"'hf:{REPO}': there is no repository '{REPO}', or HF_TOKEN or hub.token may not read it; correct the name, or set "
        f"another token"
    )
    monkeypatch.setenv("HF_TOKEN", "right")
    assert contents(resolve(f"hf:{REPO}", context)) == [Q4]


def test_a_repository_that_does_not_exist(hub: Hub, context: SourceContext) -> None:
    assert "there is no repository 'acme/absent'" in refused("hf:acme/absent", context)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the hub does not accept the token in use (HTTP 401)"),
        (403, "the token in use may not read acme/tiny-gguf (HTTP 403)"),
        (429, "the hub refuses more requests for now (HTTP 429)"),
        (418, "the hub answered with HTTP 418; try again later"),
        (503, "the hub cannot be reached, and the model is not in the cache"),
    ],
)
def test_statuses_of_the_hub(hub: Hub, context: SourceContext, status: int, message: str) -> None:
    hub.failing = status
    error = refused(f"hf:{REPO}", SourceContext(cache_dir=context.cache_dir, token="secret-token"))
    assert message in error
    assert "secret-token" not in error


# --- without network --------------------------------------------------------------------------------------------------


def test_offline_serves_what_is_in_the_cache_and_asks_nobody(hub: Hub, context: SourceContext) -> None:
    hub.add(REPO, FILES)
    assert refused(f"hf:{REPO}", offline(context)) == (
        f"'hf:{REPO}' is not in the cache '{context.cache_dir}', and the hub is not asked, because offline is set; "
        f"pull it with network"
    )
    assert hub.requests == []
    files = resolve(f"hf:{REPO}", context)
    hub.requests.clear()
    assert resolve(f"hf:{REPO}", offline(context)) == files
    assert resolve(f"hf:{REPO}:q4_k_m", offline(context)).paths == files.paths
    assert refused(f"hf:{REPO}:Q8_0", offline(context)) == (
        f"'hf:{REPO}:Q8_0': {REPO} has no quantisation 'Q8_0'; it has Q4_K_M (only the cache was searched: the hub is not "
        f"asked, because offline is set)"
    )
    assert hub.requests == []


def test_an_unreachable_hub_does_not_stop_a_cached_model(
    context: SourceContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add(REPO, FILES)
        files = resolve(f"hf:{REPO}", context)
        hub.failing = 503
        assert resolve(f"hf:{REPO}", context) == files
        huggingface_hub.close_session()
    assert resolve(f"hf:{REPO}", context) == files
    assert f"the hub cannot be reached; using what is in the cache for hf:{REPO}" in caplog.text
    assert "the hub cannot be reached, and the model is not in the cache" in refused("hf:acme/other", context)
    huggingface_hub.close_session()
