"""The signature of a webhook: bare hex HMAC-SHA256 of the body, as the users' guide has receivers check it."""

from __future__ import annotations

import hashlib
import hmac

SIGNATURE_HEADER = "X-Kanbu-Signature"


def sign(body: bytes, secret: str) -> str:
    """The value of `X-Kanbu-Signature` for `body`: 64 lower-case hex characters. The key is `secret` in UTF-8."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
