"""Objects of S3, or of anything that speaks its language: boto3 reads AWS_ENDPOINT_URL, credentials and region as everywhere else."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from rich.progress import Progress

from tessera.files import UserError, read_json, write_json

FRUITLESS = 5
"""Attempts in a row that bring not one byte, after which a download is given up."""
PAUSE = 2.0
"""Seconds before the next attempt, as many times as attempts brought nothing."""
_PIECE = 1 << 20


def download(address: str, path: Path, bars: Progress) -> bool:
    """``s3://bucket/key`` to ``path``, unless it is there; True where an earlier call had brought a part of it.

    Raises UserError: no such bucket or object, no or wrong credentials, no connection, too little space.
    """
    if path.exists():
        return True
    bucket = address.removeprefix("s3://").partition("/")[0]
    with _explained(address, bucket):
        settings = Config(connect_timeout=10, read_timeout=60)
        download = _Download(boto3.client("s3", config=settings), address, path, bars)
        resumed = download.run()
    download.part.replace(path)
    download.note.unlink()
    return resumed


class _Download:
    """What there is so far lies in ``part``; ``note`` says of which version of the object it is the beginning."""

    def __init__(self, client: Any, address: str, path: Path, bars: Progress) -> None:
        self.part, self.note = (path.with_name(path.name + suffix) for suffix in (".part", ".json"))
        self._client = client
        self._address = address
        self._bucket, _, self._key = address.removeprefix("s3://").partition("/")
        self._bars = bars
        self._task = bars.add_task(f"fetch {address}", total=None)

    def run(self) -> bool:
        resumed = self._version() is not None
        begun = False
        fruitless = 0
        while True:
            before = self._have()
            try:
                self._receive()
                return resumed
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
                    raise
                self._bars.console.print(f"{self._address}: has changed since its beginning was fetched; starting over")
                self.note.unlink()
                resumed = False
            except (NoConnectionError, HTTPClientError, IncompleteReadError) as error:
                begun = begun or self._have() > before
                if isinstance(error, NoConnectionError) and not begun:
                    raise
                fruitless = 0 if self._have() > before else fruitless + 1
                if fruitless == FRUITLESS:
                    raise UserError(
                        f"{self._address}: cut off after {self._have()} bytes, and {FRUITLESS} attempts brought no more ({error}); run again "
                        "later: the download goes on where it stopped"
                    ) from None
                time.sleep(PAUSE * fruitless)

    def _receive(self) -> None:
        version = self._version()
        have = self._have() if version else 0
        request = {"Bucket": self._bucket, "Key": self._key}
        if version is not None:
            if have == version["size"]:
                return
            request |= {"IfMatch": version["etag"]} | ({"Range": f"bytes={have}-"} if have else {})
        answer = self._client.get_object(**request)
        if version is None:
            if not answer.get("ETag"):
                raise IncompleteReadError(actual_bytes=0, expected_bytes=1)  # Cut off amid the headers.
            version = {"etag": answer["ETag"], "size": answer["ContentLength"]}
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self.part.write_bytes(b"")
            write_json(self.note, version)
        if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            have = 0
        missing, free = version["size"] - have, shutil.disk_usage(self.part.parent).free
        if missing > free:
            raise UserError(
                f"{self._address}: {missing} bytes are still to come, but the disk of {self.part.parent} has {free} free; make room there"
            )
        self._bars.update(self._task, total=version["size"], completed=have)
        with self.part.open("ab" if have else "wb") as stream:
            for piece in answer["Body"].iter_chunks(_PIECE):
                stream.write(piece)
                self._bars.advance(self._task, len(piece))
        if self._have() != version["size"]:
            raise IncompleteReadError(actual_bytes=self._have(), expected_bytes=version["size"])

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _version(self) -> dict[str, Any] | None:
        """``etag`` and ``size`` of the object whose beginning is there; None where there is nothing to build upon."""
        if not (self.part.exists() and self.note.exists()):
            return None
        try:
            known = read_json(self.note)
        except UserError:
            return None
        usable = isinstance(known, dict) and known.keys() == {"etag", "size"} and self._have() <= known["size"]
        return known if usable else None


@contextlib.contextmanager
def _explained(address: str, bucket: str) -> Iterator[None]:
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise UserError(
            f"{address}: no credentials for S3 ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from None
    except ClientError as error:
        code = error.response["Error"]["Code"]
        reasons = {
            "NoSuchBucket": f"there is no bucket {bucket!r}; correct the address, or AWS_ENDPOINT_URL and AWS_REGION",
            "NoSuchKey": f"the bucket {bucket!r} has no such object; correct the address",
            "AccessDenied": "access was denied; these credentials may not read it",
            "InvalidAccessKeyId": "the access key is unknown there; correct AWS_ACCESS_KEY_ID or AWS_PROFILE",
            "SignatureDoesNotMatch": "the signature was refused; correct AWS_SECRET_ACCESS_KEY",
            "ExpiredToken": "the session has expired; renew the credentials",
        }
        raise UserError(f"{address}: {reasons.get(code, f'the server answered {error}')}") from None
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"{address}: {error} (AWS_ENDPOINT_URL, where it is set, names the server)") from None
