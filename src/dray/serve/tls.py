"""A certificate with its key, for HTTPS: looked at before anything is started.

Ray's proxy reads the files once, on the node of the head. Refuses a key that is encrypted, since
nobody is there to be asked for its password, and one that does not belong to the certificate.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass

from dray.errors import SpecError, StoreError


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files."""

    certificate: str
    """With those that have signed it behind it, if there are any."""
    key: str


def read_tls(certificate: str | None, key: str | None) -> Tls | None:
    """What the options say; none for plain HTTP. Raises SpecError for one without the other,
    StoreError for files that are not there, or do not go together."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        rule = "a certificate and its key go together"
        raise SpecError("dray serve", "one of --tls-cert and --tls-key is missing", rule)
    tls = Tls(os.path.abspath(certificate), os.path.abspath(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        for path in (tls.certificate, tls.key):
            with open(path, "rb"):
                pass
        # A password that is none: without one OpenSSL would ask for it at the terminal.
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    except ssl.SSLError as error:
        raise StoreError(
            tls.certificate,
            f"cannot be used with {tls.key} ({error.reason or error})",
            "PEM files of a certificate and of its own key, which is not encrypted",
        ) from error
    except OSError as error:
        where = str(error.filename or tls.certificate)
        raise StoreError(where, error.strerror or str(error)) from error
    return tls
