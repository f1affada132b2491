"""Signatures of manifests: Ed25519 by the cryptography library, keys as PEM files.

A private key that others may read, one that is locked by a passphrase, and one of another kind are
refused. The signature is 64 bytes, so that openssl verifies it as well.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dray.errors import StoreError

MAKE_KEY = "openssl genpkey -algorithm ed25519 -out key.pem && chmod 600 key.pem"
_MOST_BYTES = 65_536


@dataclass(frozen=True)
class Signer:
    """A private key, and what its signatures are known by."""

    key: Any
    public: bytes
    """32 bytes."""

    def sign(self, content: bytes) -> bytes:
        signature: bytes = self.key.sign(content)
        return signature

    def to_json(self) -> dict[str, str]:
        """As a manifest names who signs it."""
        return {
            "algorithm": "ed25519",
            "fingerprint": fingerprint(self.public),
            "public_key": base64.b64encode(self.public).decode(),
        }


def fingerprint(public: bytes) -> str:
    """Of a public key's 32 bytes, as ssh writes them: SHA256:…"""
    return f"SHA256:{base64.b64encode(hashlib.sha256(public).digest()).decode().rstrip('=')}"


def load_signer(path: str) -> Signer:
    """The private key of a PEM file. Raises StoreError."""
    content = _read(path, "--sign", private=True)
    serialization, ed25519 = _library("--sign")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except TypeError as error:
        raise StoreError(
            "--sign",
            f"{path} is locked by a passphrase",
            "nobody is asked for one",
            f"openssl pkey -in {path} -out FILE writes it unlocked",
        ) from error
    except Exception as error:
        raise StoreError(
            "--sign", f"{path} holds no private key", "an Ed25519 key as PEM signs", MAKE_KEY
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise StoreError("--sign", f"{path} is no Ed25519 key", "that kind signs", MAKE_KEY)
    return Signer(key, key.public_key().public_bytes_raw())


def load_public_key(path: str) -> bytes:
    """The 32 bytes of a public key's PEM file. Raises StoreError."""
    content = _read(path, "--key", private=False)
    serialization, ed25519 = _library("--key")
    try:
        key = serialization.load_pem_public_key(content)
    except Exception as error:
        raise StoreError(
            "--key",
            f"{path} holds no public key",
            "an Ed25519 key as PEM verifies",
            "openssl pkey -in key.pem -pubout -out public.pem writes it",
        ) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise StoreError("--key", f"{path} is no Ed25519 key", "that kind verifies")
    raw: bytes = key.public_bytes_raw()
    return raw


def is_signed_by(public: bytes, signature: bytes, content: bytes) -> bool:
    """Whether a public key's owner has signed the content. Raises StoreError without the
    library."""
    _, ed25519 = _library("--key")
    from cryptography.exceptions import InvalidSignature

    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def _library(option: str) -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise StoreError(
            option,
            "signatures need the cryptography library",
            way_out="pip install 'dray[sign]'",
        ) from error
    return serialization, ed25519


def _read(path: str, option: str, *, private: bool) -> bytes:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            raise StoreError(option, f"{path} is no key", "a PEM file of one key is wanted")
        if private and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StoreError(
                option,
                f"others may read {path} (mode {found.st_mode & 0o777:o})",
                "who can read a private key can sign with it",
                f"chmod 600 {path}",
            )
        return Path(path).read_bytes()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            option, f"{path} cannot be read ({error.strerror or error})", way_out=MAKE_KEY
        ) from error
