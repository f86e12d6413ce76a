"""Settings of the auth provider `oidc`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from inferflux_auth_oidc.urls import check_url
from inferflux_core.identity import TENANT, Action
from inferflux_core.settings import Group

Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"
]  # fmt: skip
"""Signatures only. Shared-secret algorithms and `none` cannot even be configured."""


class ClaimSettings(Group):
    """Which claims say what. A name that begins with `/` is a JSON pointer, such as `/realm_access/roles`."""

    subject: str = Field("sub", min_length=1, description="Claim that names the caller; unique and never reassigned.")
    tenant: str = Field("tenant", min_length=1, description="Claim that names the tenant.")
    roles: str = Field("roles", min_length=1, description="Claim with the roles or groups: a list, or words in a string.")
    scope: str = Field(
        "scope", min_length=1, description="Claim with the scopes: words in a string, or a list. Entra ID and Okta: `scp`."
    )
    name: str = Field(
        "preferred_username", min_length=1, description="Claim with the name that people know, for the audit log only."
    )


class IntrospectionSettings(Group):
    """How this server proves itself to the issuer's introspection endpoint: by a secret or by a private key."""

    client_id: str = Field(min_length=1, description="Client that this server is to the issuer.")
    client_secret: SecretStr | None = Field(None, description="Its secret; better in the environment or in a file.")
    client_secret_env: str | None = Field(None, description="Environment variable that holds the secret.")
    client_secret_file: Path | None = Field(None, description="File that holds the secret, with or without a line end.")
    private_key_file: Path | None = Field(
        None, description="PEM file of a private key: authenticate by `private_key_jwt` (RFC 7523), without a shared secret."
    )
    private_key_id: str | None = Field(None, description="`kid` of that key at the issuer, if it has several of this client.")
    private_key_algorithm: Algorithm = Field("RS256", description="Algorithm to sign with; must fit the key.")
    endpoint: str | None = Field(
        None, description="URL of the endpoint; by default from the issuer's metadata, and then of the issuer's own origin."
    )

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value)

    @model_validator(mode="after")
    def _one_proof(self) -> IntrospectionSettings:
        proofs = ("client_secret", "client_secret_env", "client_secret_file", "private_key_file")
        given = [name for name in proofs if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"introspection needs exactly one of {', '.join(proofs)}; there are {len(given)}: {given!r}")
        return self


class IssuerSettings(Group):
    """One issuer of access tokens. Tokens never choose an issuer that is not listed."""

    issuer: str = Field(description="The issuer exactly as its tokens say in `iss`: an https URL; http for loopback only.")
    audiences: tuple[str, ...] = Field(
        (), description="Values of `aud`, one of which a token must have; empty means `server.public_url`."
    )
    algorithms: tuple[Algorithm, ...] = Field(
        ("RS256", "PS256", "ES256", "EdDSA", "Ed25519"), min_length=1, description="Signature algorithms to accept."
    )
    required_typ: tuple[str, ...] = Field(
        ("at+jwt", "application/at+jwt"),
        description="Values of the header `typ` to accept (RFC 9068), so that an ID token is no access token. For providers "
        "whose access tokens say `JWT` list that, or empty for any: tokens that look like ID tokens are then still refused.",
    )
    leeway_s: float = Field(30.0, ge=0, le=120, description="Seconds by which clocks may differ.")
    max_token_age_s: float | None = Field(
        None, gt=0, description="Oldest token in seconds since `iat`, for issuers whose tokens live too long; null: any age."
    )
    clients: tuple[str, ...] = Field(
        (), description="Clients (`azp`, `client_id`) whose tokens are accepted; empty accepts those of any client."
    )
    claims: ClaimSettings = Field(default_factory=ClaimSettings, description="Which claims say what.")
    scope_prefix: str = Field(
        "infer:", description="Before `generate`, `embed`, `read` and `admin` in the scopes that mean them; others are ignored."
    )
    roles: dict[str, str] = Field(
        default_factory=dict,
        description="Role for each value of the roles claim; values not listed bring none. Empty: the values are the roles.",
    )
    default_tenant: str | None = Field(
        "default", description="Tenant of tokens without that claim; null refuses them, for servers that many tenants share."
    )
    allowed_tenants: tuple[str, ...] = Field(
        (),
        description="Tenants that this issuer may speak for; empty: any. With several issuers list them, or one can name a "
        "tenant of another.",
    )
    jwks_uri: str | None = Field(
        None, description="URL of the keys; by default from the issuer's metadata, and then of the issuer's own origin."
    )
    jwt: bool = Field(
        True,
        description="Check JSON Web Tokens here by the issuer's keys. False asks its introspection endpoint about them too, "
        "which knows revoked ones and costs a request.",
    )
    introspection: IntrospectionSettings | None = Field(
        None, description="Ask the issuer about opaque tokens (RFC 7662); null refuses them. At most one issuer may have it."
    )

    @field_validator("issuer")
    @classmethod
    def _issuer(cls, value: str) -> str:
        return check_url(value, query=False)

    @field_validator("jwks_uri")
    @classmethod
    def _jwks_uri(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value)

    @field_validator("required_typ")
    @classmethod
    def _lower(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(typ.lower() for typ in value)  # media types have no case

    @model_validator(mode="after")
    def _consistent(self) -> IssuerSettings:
        for tenant in (*self.allowed_tenants, *([] if self.default_tenant is None else [self.default_tenant])):
            if TENANT.fullmatch(tenant) is None:
                raise ValueError(f"the tenant {tenant!r} is not 1 to 64 letters, digits, dots, underscores and hyphens")
        if self.allowed_tenants and self.default_tenant not in (None, *self.allowed_tenants):
            raise ValueError(
                f"default_tenant {self.default_tenant!r} is not in allowed_tenants: add it, or set default_tenant to null"
            )
        if not self.jwt and self.introspection is None:
            raise ValueError(f"the issuer {self.issuer!r} has jwt off and no introspection, so no token could be checked")
        return self

    def scope_of(self, action: Action) -> str:
        """The scope that means an action."""
        return self.scope_prefix + action


class OidcSettings(Group):
    """OpenID Connect providers whose access tokens this server accepts."""

    issuers: tuple[IssuerSettings, ...] = Field(min_length=1, description="The issuers.")
    timeout_s: float = Field(
        5.0, gt=0, le=30, description="Seconds that one request to an issuer may take from beginning to end; then it failed."
    )
    ca_file: Path | None = Field(
        None, description="PEM file of the authorities that vouch for the issuers' certificates; by default the public ones."
    )
    proxy: SecretStr | None = Field(
        None,
        description="`http://host:port` to reach the issuers through, or `http://user:password@host:port`. The environment's "
        "proxy variables are not used.",
    )

    @model_validator(mode="after")
    def _distinct(self) -> OidcSettings:
        names = [issuer.issuer for issuer in self.issuers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the issuer {twice[0]!r} is listed twice; put its audiences and clients into one entry")
        asked = [issuer.issuer for issuer in self.issuers if issuer.introspection is not None]
        if len(asked) > 1:
            raise ValueError(
                f"{asked!r} have introspection, but an opaque token does not say whose it is, and no issuer may see the tokens "
                f"of another: keep it for one of them"
            )
        return self
