"""Certificates that cannot be used are refused at once. A service that speaks HTTPS is that of
test_foreground.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from dray.cli import main
from dray.errors import SpecError, StoreError
from dray.serve.foreground import warn_of_plain_http
from dray.serve.tls import Tls, read_tls
from self_signed import save_certificate


def test_a_certificate_and_its_key_go_together(tmp_path: Path):
    one, other = save_certificate(tmp_path / "one"), save_certificate(tmp_path / "other")
    locked = save_certificate(tmp_path / "locked", b"a password")
    assert read_tls(str(one[0]), str(one[1])) == Tls(str(one[0]), str(one[1]))
    assert read_tls(None, None) is None
    for given in ((str(one[0]), None), (None, str(one[1]))):
        with pytest.raises(SpecError, match="is missing"):
            read_tls(*given)
    for certificate, key, message in (
        (one[0], other[1], "KEY_VALUES_MISMATCH"),
        (one[1], one[1], "cannot be used"),
        (locked[0], locked[1], "is not encrypted"),
        (one[0], tmp_path / "none", "none.*No such file"),
        (tmp_path, one[1], "directory"),
    ):
        with pytest.raises(StoreError, match=message):
            read_tls(str(certificate), str(key))


def test_plain_http_beyond_loopback_is_said_in_a_line():
    said: list[str] = []
    for host in ("127.0.0.1", "localhost", "::1"):
        warn_of_plain_http(host, None, said.append)
    warn_of_plain_http("0.0.0.0", Tls("a", "b"), said.append)
    assert said == []
    for host in ("0.0.0.0", "10.0.0.1", "serving.example"):
        warn_of_plain_http(host, None, said.append)
    assert [line.split(":")[0] for line in said] == [
        "plain HTTP on 0.0.0.0",
        "plain HTTP on 10.0.0.1",
        "plain HTTP on serving.example",
    ]


def test_a_service_with_half_of_it_is_not_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    certificate, _ = save_certificate(tmp_path / "one")
    assert main(["serve", "some", "--tls-cert", str(certificate)]) == 2
    assert "--tls-key is missing" in capsys.readouterr().err
