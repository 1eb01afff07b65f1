"""TLS toward endpoints: whom we believe, and who we are.

In: the files that a source names. Out: a context for each new connection.
Rules here: files that changed count from the second connection on, as soon as they rest; those that cannot be used are
told once, and the last good ones stay.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path

from epp.config.pages import PageSource
from epp.errors import ConfigError
from epp.watch import FileWatch

log = logging.getLogger(__name__)


class ClientTls:
    """How connections of one source are secured."""

    def __init__(self, params: PageSource) -> None:
        """Read the files. Raises ConfigError: they cannot be used."""
        self._params = params
        self._watch = FileWatch(*map(Path, filter(None, (params.ca_cert_path, *_own(params)))))
        self._context = _context(params)

    def context(self) -> ssl.SSLContext:
        """For the next connection."""
        if self._watch.has_changed():
            try:
                self._context = _context(self._params)
            except ConfigError as error:
                log.warning("changed files are not taken, the last ones stay: %s", error)
        return self._context


def _own(params: PageSource) -> tuple[str, str]:
    return params.client_cert_path, params.client_key_path


def _context(params: PageSource) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    if params.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif params.ca_cert_path:
        _read(params.ca_cert_path, lambda path: context.load_verify_locations(cafile=path))
    else:
        context.load_default_certs()
    if params.client_cert_path:
        _read(params.client_cert_path, lambda path: context.load_cert_chain(path, params.client_key_path))
    return context


def _read(path: str, load: Callable[[str], None]) -> None:
    try:
        load(path)
    except ssl.SSLError as error:
        raise ConfigError(
            f"no PEM certificate that can be used, with the key that belongs to it: {error}", file=path
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", file=path) from None
