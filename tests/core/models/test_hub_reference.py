"""References to the hub, and the quantisations that file names tell."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux_core.errors import ModelFileError
from inferflux_core.models.hub import HubSource
from inferflux_core.models.hub_choice import quantisation
from inferflux_core.models.hub_reference import HubReference


@pytest.mark.parametrize(
    ("ref", "parsed"),
    [
        ("hf:a/b", HubReference("a/b")),
        ("hf:a-1/B.c_2", HubReference("a-1/B.c_2")),
        ("hf:a/b:q4_k_m", HubReference("a/b", quantisation="Q4_K_M")),
        ("hf:a/b:UD-Q4_K_XL", HubReference("a/b", quantisation="UD-Q4_K_XL")),
        ("hf:a/b:sub/x y.gguf", HubReference("a/b", file="sub/x y.gguf")),
        ("hf:a/b@main", HubReference("a/b", revision="main")),
        ("hf:a/b:Q8_0@refs/pr/1", HubReference("a/b", quantisation="Q8_0", revision="refs/pr/1")),
    ],
)
def test_references(ref: str, parsed: HubReference) -> None:
    assert HubReference.parse(ref) == parsed


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("hf:", "'hf:' names no repository; write hf:owner/repo[:file-or-quantisation][@revision]"),
        ("hf:gpt2", "'hf:gpt2' names no repository; write"),
        ("hf:/b", "'' is no owner on the hub"),
        ("hf:a/", "'' is no repository on the hub"),
        ("hf:a/b/c", "'b/c' is no repository on the hub"),
        ("hf:../b", "'..' is no owner on the hub"),
        ("hf:a/b--c", "'b--c' is no repository on the hub"),
        ("hf:a/b:", "'' is neither a .gguf file nor a quantisation"),
        ("hf:a/b:x:y", "'x:y' is neither a .gguf file nor a quantisation"),
        ("hf:a/b:../x.gguf", "'../x.gguf' is no path in a repository"),
        ("hf:a/b:/x.gguf", "'/x.gguf' is no path in a repository"),
        ("hf:a/b:x\\y.gguf", "is no path in a repository"),
        ("hf:a/b:pytorch_model.bin", "'pytorch_model.bin' can run code when loaded and is refused"),
        ("hf:a/b:model.safetensors", "safetensors models are taken whole; leave ':model.safetensors' out"),
        ("hf:a/b@", "'' is no revision"),
        ("hf:a/b@../x", "'../x' is no revision"),
        ("hf:a/b@x/../y", "'x/../y' is no revision"),
        ("hf:a/b@v1@v2", "'v1@v2' is no revision"),
        ("hf:a/b c", "'b c' is no repository on the hub"),
    ],
)
def test_references_that_are_wrong(ref: str, message: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        HubReference.parse(ref)
    assert message in str(caught.value)


@given(st.text(alphabet=st.sampled_from("ab/:@.-_~\\ \0é\n"), max_size=20).map("hf:".__add__))
def test_any_reference_is_parsed_or_refused_clearly(ref: str) -> None:
    try:
        parsed = HubReference.parse(ref)
    except ModelFileError as error:
        message: str | None = str(error)
    else:
        message = None
        for text in (parsed.repo, parsed.file or "", parsed.revision or ""):
            assert ".." not in text.split("/")
            assert not text.startswith("/")
    assert message is None or repr(ref) in message


def test_it_understands_its_own_references_only() -> None:
    assert HubSource().matches("hf:a/b")
    assert not any(HubSource().matches(ref) for ref in ("demo", "./hf:a/b", "a/b", "HF:a/b", ""))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("tiny-Q4_K_M.gguf", "Q4_K_M"),
        ("tiny.q8_0.gguf", "Q8_0"),
        ("Qwen3-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("model-IQ2_XXS-00001-of-00004.gguf", "IQ2_XXS"),
        ("Q6_K/weights-00001-of-00002.gguf", "Q6_K"),
        ("tiny-fp16.gguf", "F16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("tiny-nvfp4.gguf", "NVFP4"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("Llama-3.2-1B.gguf", None),
    ],
)
def test_quantisations_in_file_names(name: str, label: str | None) -> None:
    assert quantisation(name) == label


def test_the_client_library_is_imported_when_needed_only() -> None:
    code = "import sys, inferflux_core.models.hub; print('huggingface_hub' in sys.modules, 'httpx2' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
