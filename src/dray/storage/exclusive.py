"""Creating a small file so that exactly one of any number of writers succeeds; attempts and markers
rest on it.

A local disk links, S3, GCS and Azure put on the condition that nothing is there. Other stores have
neither: there the last of simultaneous writers wins, after a pause in which all look again.
"""

from __future__ import annotations

import configparser
import errno
import logging
import os
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from dray.errors import StoreError
from dray.storage.filesystem import (
    TEMPORARY,
    exists,
    is_local,
    make_folder,
    read_bytes,
    sync,
    write_bytes,
)
from dray.storage.retrying import http_status, retry

SETTLE_SECONDS = 0.5
REQUEST_SECONDS = 30
AZURE_FIELDS = {
    "account_name": "account_name",
    "account_key": "account_key",
    "sas_token": "sas_key",
    "client_id": "client_id",
    "client_secret": "client_secret",
    "tenant_id": "tenant_id",
}
"""Attributes of fsspec's Azure filesystem → obstore's settings; what is not given comes from the
environment."""

_log = logging.getLogger("dray.runs")


def create_exclusive(filesystem: pafs.FileSystem, path: str, content: bytes) -> bool:
    """Create a small file unless it exists; whether this call created it. The content must be
    unlike any other's.

    Exactly one of any number of processes succeeds, also when the storage fails meanwhile: who
    meets a file looks whether it is its own, whose answer was lost. Only on stores that can neither
    link nor put on a condition (HDFS and most of fsspec's, old S3 servers) the last of the
    simultaneous writers wins. Raises StorageFailed.
    """
    make_folder(filesystem, path.rpartition("/")[0])
    bucket, _, key = path.partition("/")
    store = None if is_local(filesystem) else _build_store(filesystem, bucket)

    def create() -> bool:
        created = (
            _link(path, content)
            if is_local(filesystem)
            else _put(store, key, path, content)
            if store
            else None
        )
        if created is None:
            return _put_and_look(filesystem, path, content)
        return created or _is_mine(filesystem, path, content)

    return retry(create, path)


def _is_mine(filesystem: pafs.FileSystem, path: str, content: bytes) -> bool:
    try:
        return read_bytes(filesystem, path) == content
    except (
        FileNotFoundError
    ) as error:  # S3 answers so, too, while another's put is under way and may yet fail
        raise OSError(errno.EAGAIN, f"{path} is being created by another process") from error


def _link(path: str, content: bytes) -> bool:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"{TEMPORARY}{name}-{uuid.uuid4().hex[:12]}")
    with open(temporary, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    try:
        os.link(temporary, path)  # unlike a rename, a link never replaces
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    sync(folder)
    return True


def _put(store: Any, key: str, path: str, content: bytes) -> bool | None:
    """Whether a put on the condition that nothing is there put it; none if the server knows no
    conditions."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, GenericError

    try:
        obstore.put(store, key, content, mode="create", use_multipart=False)
    except AlreadyExistsError:
        return False
    except GenericError as error:
        if http_status(error) != 501:
            raise
        _log.warning(
            "%s: this server has no conditional put; of two drivers at once the last to write wins",
            path,
        )
        return None
    except FileNotFoundError as error:
        raise StoreError(
            path, "there is no such bucket", "the storage is a place that exists", "create it"
        ) from error
    return True


def _put_and_look(filesystem: pafs.FileSystem, path: str, content: bytes) -> bool:
    if exists(filesystem, path):
        return read_bytes(filesystem, path) == content
    write_bytes(filesystem, path, content)
    time.sleep(SETTLE_SECONDS)
    return read_bytes(filesystem, path) == content


def _build_store(filesystem: pafs.FileSystem, bucket: str) -> Any:
    """obstore's client for a bucket, set up as the filesystem is; none for a filesystem without
    conditional put."""
    import obstore.store

    if isinstance(filesystem, pafs.S3FileSystem):
        settings = _s3_settings(filesystem.__reduce__()[1][0])
        return obstore.store.S3Store(
            bucket, **settings, **_client_settings(settings.get("endpoint", ""))
        )
    if isinstance(filesystem, pafs.GcsFileSystem):
        settings = _gcs_settings(filesystem.__reduce__()[1][0])
        return obstore.store.GCSStore(
            bucket, **settings, **_client_settings(settings.get("base_url", ""))
        )
    if isinstance(filesystem, pafs.PyFileSystem) and isinstance(
        filesystem.handler, pafs.FSSpecHandler
    ):
        azure = filesystem.handler.fs
        if "abfs" in (
            azure.protocol if isinstance(azure.protocol, (tuple, list)) else (azure.protocol,)
        ):
            given = {ours: getattr(azure, theirs, None) for theirs, ours in AZURE_FIELDS.items()}
            settings = {
                key: value for key, value in given.items() if isinstance(value, str) and value
            }
            return obstore.store.AzureStore(bucket, **settings, **_client_settings(""))
    return None


def _client_settings(endpoint: str) -> dict[str, Any]:
    """Short patience: `retry` is what waits, and it knows when to stop."""
    return {
        "client_options": {
            "timeout": timedelta(seconds=REQUEST_SECONDS),
            "connect_timeout": timedelta(seconds=5),
            "allow_http": endpoint.startswith("http://"),
        },
        "retry_config": {"max_retries": 2, "retry_timeout": timedelta(seconds=REQUEST_SECONDS)},
    }


def _s3_settings(options: dict[str, Any]) -> dict[str, Any]:
    """pyarrow's settings of an S3 filesystem as obstore's; keys that the URI does not hold come
    from the environment, where obstore looks itself, or a profile's file, where it does not."""
    settings: dict[str, Any] = {
        "region": options["region"],
        "skip_signature": options["anonymous"],
        "virtual_hosted_style_request": bool(options["force_virtual_addressing"]),
    }
    if options["endpoint_override"]:
        endpoint = options["endpoint_override"]
        settings["endpoint"] = (
            endpoint if "://" in endpoint else f"{options['scheme']}://{endpoint}"
        )
    if options["access_key"]:
        settings |= {
            "access_key_id": options["access_key"],
            "secret_access_key": options["secret_key"],
        }
        if options["session_token"]:
            settings["session_token"] = options["session_token"]
    elif not options["anonymous"] and not os.environ.get("AWS_ACCESS_KEY_ID"):
        settings |= _profile_settings()
    return settings


def _profile_settings() -> dict[str, Any]:
    """The keys of the AWS profile in use; with boto3 installed also those of roles and of single
    sign-on."""
    credentials = Path(
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials"
    )
    config = Path(os.environ.get("AWS_CONFIG_FILE") or Path.home() / ".aws" / "config")
    profile = os.environ.get("AWS_PROFILE", "default")
    parser = configparser.RawConfigParser()
    parser.read(credentials)
    if parser.has_option(profile, "aws_access_key_id"):
        names = {
            "aws_access_key_id": "access_key_id",
            "aws_secret_access_key": "secret_access_key",
            "aws_session_token": "session_token",
        }
        found = dict(parser[profile])
        return {ours: found[theirs] for theirs, ours in names.items() if theirs in found}
    if config.is_file() or credentials.is_file():
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider

            return {"credential_provider": Boto3CredentialProvider()}
        except (
            ImportError,
            ValueError,
        ):  # no boto3, or nothing that it knows: the machine's own role remains
            return {}
    return {}


def _gcs_settings(options: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if options["endpoint_override"]:
        settings["base_url"] = f"{options['scheme']}://{options['endpoint_override']}"
    if options["access_token"] or options["anonymous"]:
        # obstore asks for a token before it puts, even when told to sign nothing: emulators get one
        # that says nothing.
        settings["bearer_token"] = options["access_token"] or "anonymous"
    return settings
