"""OIDC access tokens for InferFlux: who holds one, checked by the keys or the introspection endpoint of its issuer."""
