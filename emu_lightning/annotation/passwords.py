"""Secrets that the database keeps only as hashes: passwords (Argon2id) and the tokens of links (SHA-256)."""

from __future__ import annotations

import hashlib
import secrets
import threading

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

SHORTEST, LONGEST = 8, 1000

# 19 MiB, two passes, one lane: among OWASP's choices. Few at a time, lest a flood of logins fill the memory.
_hasher = PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)
_few = threading.BoundedSemaphore(4)
_nobody = _hasher.hash(secrets.token_urlsafe())


def hash_password(password: str) -> str:
    """Argon2id with its salt and parameters, as text.

    Raises:
        ValueError: the password is too short or too long.
    """
    if not SHORTEST <= len(password) <= LONGEST:
        raise ValueError(f"the password has {len(password)} characters: choose {SHORTEST} to {LONGEST}")
    with _few:
        return _hasher.hash(password.encode(errors="surrogatepass"))


def password_fits(password: str, password_hash: str | None) -> bool:
    """Takes as long for someone who is not known or has no password (None) as for a wrong password."""
    if len(password) > LONGEST:
        return False
    try:
        with _few:
            _hasher.verify(password_hash or _nobody, password.encode(errors="surrogatepass"))
    except (VerificationError, InvalidHashError):
        return False
    return password_hash is not None


def new_token() -> str:
    """192 random bits, as 32 characters that stand in a URL."""
    return secrets.token_urlsafe(24)


def hash_token(token: str) -> str:
    """A random token needs no salt and no slow hash."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()
