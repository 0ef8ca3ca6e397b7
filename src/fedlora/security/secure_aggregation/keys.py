"""Key agreement and sealed messages: X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439).

Bonawitz et al. 2017, sections 3 and 4: key agreement and authenticated encryption between every two participants.
"""

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora.security.secure_aggregation.session import SERVER, ProtocolError

DOMAIN = b"fedlora secure aggregation 1"
SEAL = 12 + 16  # bytes that a seal adds: nonce and tag


@dataclass(frozen=True)
class Address:
    """The address of a key or a message: one session, one phase, one direction between one pair."""

    session: bytes  # the session's id, 32 bytes
    phase: str
    sender: int
    receiver: int

    def context(self) -> bytes:
        """The address as bytes, unique since only the last field's length varies."""
        pair = self.sender.to_bytes(8, "big", signed=True) + self.receiver.to_bytes(8, "big", signed=True)
        return DOMAIN + self.session + pair + self.phase.encode()


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair, made anew for each session."""

    private: bytes = field(repr=False)  # 32 bytes

    @classmethod
    def new(cls) -> Self:
        """Generate a pair from the operating system's randomness."""
        return cls(X25519PrivateKey.generate().private_bytes_raw())

    @cached_property
    def _key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.private)

    @cached_property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def agree(self, public: bytes, address: Address) -> bytes:
        """Derive 32 bytes that only the owners of both keys can compute, for this address only.

        :class:`ProtocolError` if ``public`` is no usable key.
        """
        try:
            secret = self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:  # a wrong length, or a point of small order
            raise ProtocolError("A public key is no X25519 key; leave its owner out.") from error
        return derive(secret, address.context() + b"".join(sorted((self.public, public))))


def derive(secret: bytes, context: bytes) -> bytes:
    """Derive 32 bytes by HKDF-SHA256; another ``context`` gives unrelated bytes."""
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=context).derive(secret)


def seal(payload: bytes | memoryview, own: KeyPair, public: bytes, address: Address) -> bytes:
    """Encrypt and authenticate ``payload`` for the owner of ``public``; the result is ``SEAL`` bytes longer."""
    nonce = os.urandom(12)
    return nonce + ChaCha20Poly1305(own.agree(public, address)).encrypt(nonce, payload, address.context())


def unseal(sealed: bytes, own: KeyPair, public: bytes, address: Address) -> bytes:
    """Decrypt a payload that the owner of ``public`` sealed for this address; :class:`ProtocolError` for any other."""
    key = own.agree(public, address)
    try:
        if len(sealed) < SEAL:
            raise InvalidTag
        return ChaCha20Poly1305(key).decrypt(sealed[:12], sealed[12:], address.context())
    except InvalidTag as error:
        raise ProtocolError(
            f"The {address.phase!r} message from {party_name(address.sender)} to {party_name(address.receiver)} does "
            "not open: it was altered, cut short, or made for another session, phase or pair. It was left out."
        ) from error


def party_name(number: int) -> str:
    """Return the name of the server or a client for an error message."""
    return "the server" if number == SERVER else f"client {number}"
