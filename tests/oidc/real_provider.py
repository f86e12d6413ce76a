"""A real, certified OpenID provider (npm `oidc-provider`) on a loopback port, for tests that must not trust our own reading
of the standards. What it is configured for stands in `provider/provider.mjs`.

It needs Node and npm. The packages are installed once, into a cache outside the tree, at the versions and checksums of
`provider/package-lock.json`; without Node, or where they cannot be installed, the tests that use it are skipped.
"""

from __future__ import annotations

import hashlib
import html.parser
import json
import os
import selectors
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin

import httpx
import pytest

SOURCE = Path(__file__).parent / "provider"
INSTALL_TIMEOUT_S = 120
ANSWER_TIMEOUT_S = 30
GRANTED_SCOPES = "infer:generate infer:admin"
"""What the provider knows for any resource; of a request for others it grants these only."""


class RealProvider:
    """A running provider. Its state (codes, refresh tokens, sessions) is in memory and outlives `restart`.

    Attributes:
        url: its issuer.
        introspection_client: id and secret of the resource server `rs`, for `client_secret_basic` (RFC 7662).
    """

    introspection_client = ("rs", "rs-secret")

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process = process
        self._log = log
        self.url: str = self._answer()["url"]

    def restart(self, keys: str = "new") -> None:
        """Restart it at the same address with other signing keys: `old`, `new`, `old+new`; the last named one signs.

        Every generation has an RS256, an ES256 and an EdDSA key, whose `kid` is `<generation>-<alg>`.
        """
        self._command(keys=keys)

    def advance(self, seconds: int) -> None:
        """Let its clock go forward."""
        self._command(advance_s=seconds)

    def client_credentials(self, resource: str, scope: str = "infer:generate") -> str:
        """An access token of the confidential client `svc`: a JWT (RS256, `at+jwt`, 600 s), opaque for `.../opaque`."""
        form = {"grant_type": "client_credentials", "resource": resource, "scope": scope}
        response = httpx.post(f"{self.url}/token", data=form, auth=("svc", "svc-secret"), timeout=ANSWER_TIMEOUT_S)
        assert response.status_code == 200, response.text
        token: str = response.json()["access_token"]
        return token

    def introspect(self, token: str) -> dict[str, Any]:
        """What it says of a token; `{"active": False}` for one that it does not know (any more)."""
        response = httpx.post(
            f"{self.url}/token/introspection",
            data={"token": token},
            auth=self.introspection_client,
            timeout=ANSWER_TIMEOUT_S,
        )
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    def sign_in(self, verification_uri_complete: str, name: str = "alice") -> None:
        """What a person does in a browser: confirm the device's code, log in with any password, and consent."""
        with _Browser() as browser:
            browser.open(verification_uri_complete)
            for _ in range(8):
                if browser.form is None:
                    break
                browser.submit({"login": name, "password": "any"})
            assert "Sign-in Success" in browser.text, browser.text

    def deny(self, verification_uri_complete: str) -> None:
        """Press "Abort" where the code is to be confirmed."""
        with _Browser() as browser:
            browser.open(verification_uri_complete)
            while browser.form is not None and "confirm" not in browser.form.fields:
                browser.submit({})
            browser.submit({"abort": "yes"})
            assert "interrupted" in browser.text, browser.text

    def _command(self, **command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> Any:
        stdout = self._process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            line = stdout.readline() if selector.select(ANSWER_TIMEOUT_S) else ""
        if not line:
            self._log.seek(0)
            raise AssertionError(f"the provider does not answer:\n{self._log.read()}")
        return json.loads(line)


@contextmanager
def real_provider(keys: str = "old") -> Iterator[RealProvider]:
    """Start a provider with these keys (see `RealProvider.restart`); skips the test where it cannot be had."""
    modules = _modules()
    # Packages are looked for beside the script, which therefore cannot be run from the source tree.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        script = shutil.copy(SOURCE / "provider.mjs", folder)
        (Path(folder) / "node_modules").symlink_to(modules, target_is_directory=True)
        process = subprocess.Popen(
            ["node", script, json.dumps({"keys": keys})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        with process:
            try:
                yield RealProvider(process, log)
            finally:
                process.kill()


def _modules() -> Path:
    """The folder `node_modules` of the cache; installs it when it is not there."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: the real OpenID provider needs Node 20 or later")
    lock = hashlib.sha256((SOURCE / "package-lock.json").read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "inferflux-tests"
    installed = cache / f"oidc-provider-9.13-{lock}"
    if not installed.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fresh = Path(folder) / "install"
            fresh.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(SOURCE / name, fresh)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            try:
                subprocess.run(command, cwd=fresh, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"npm cannot install the real OpenID provider: {error.stderr[-400:]}")
            except subprocess.TimeoutExpired:
                pytest.skip(f"npm has not installed the real OpenID provider within {INSTALL_TIMEOUT_S} s")
            try:
                fresh.rename(installed)
            except OSError:
                assert installed.exists()  # another test process was faster
    return installed / "node_modules"


class _Form(html.parser.HTMLParser):
    """The form of a page, with the values that its fields have."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "form":
            self.action = values.get("action")
        elif tag == "input" and (name := values.get("name")):
            self.fields[name] = values.get("value") or ""


class _Browser:
    """A browser without scripts: keeps cookies, follows redirects, submits the form of the current page."""

    def __init__(self) -> None:
        self._http = httpx.Client(follow_redirects=True, timeout=ANSWER_TIMEOUT_S)
        self._url = ""
        self.text = ""
        self.form: _Form | None = None

    def __enter__(self) -> _Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def open(self, url: str) -> None:
        self._show(self._http.get(url))

    def submit(self, typed: dict[str, str]) -> None:
        """Sends the form; of `typed`, the fields that it has, and a button's `abort`."""
        assert self.form is not None
        assert self.form.action is not None
        fields = self.form.fields | {name: value for name, value in typed.items() if name in (*self.form.fields, "abort")}
        self._show(self._http.post(urljoin(self._url, self.form.action), data=fields))

    def _show(self, response: httpx.Response) -> None:
        self._url, self.text = str(response.url), response.text
        form = _Form(response.text)
        self.form = form if form.action is not None else None
