"""Bytes in an S3 bucket, Amazon's or another server's; the one file that imports boto3."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from esper.errors import ConfigError, MissingExtraError, StoreError

try:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
except ImportError:
    raise MissingExtraError("boto3", "s3", "keeping bytes in an S3 bucket") from None

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["S3Store"]

ENDPOINT = "AWS_ENDPOINT_URL_S3"  # boto3's own variable for a server that is not Amazon's
REGION = "us-east-1"  # what a request is signed for where nothing names a region; other servers ignore it
PIECE = 64 << 20  # bytes of one upload; S3 takes 10,000 of them for an object, and 5 GiB in one
PAGE = 1000  # keys of one answer; more are never sent
ATTEMPTS = 4
CONNECT, READ = 5.0, 60.0  # seconds; botocore's own are 60 each
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()/=+ -]*")
_MISSING, _CHANGED = ("NoSuchKey", "404"), ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
Result = TypeVar("Result")


class S3Store:
    """Keeps blobs under a prefix of one bucket, which must exist.

    Credentials come from where boto3 finds them (variables, profiles, the machine's role) and are in no
    message. Every request has a time limit and is tried up to four times.

    Args:
        bucket: Name of the bucket.
        prefix: Text put before every key, with a slash between.
        endpoint: URL of a server that is not Amazon's; None: ``$AWS_ENDPOINT_URL_S3``, or Amazon's.
        region: Name of the region; None: what boto3 is set up for.
        conditional: True where the server knows ``If-Match`` and ``If-None-Match``, so that two writers find
            out about each other for certain.

    Raises:
        ConfigError: The bucket's name, the prefix or the endpoint is not one.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        endpoint: str | None = None,
        *,
        region: str | None = None,
        conditional: bool = True,
    ) -> None:
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError(f"{bucket[:80]!r} is no bucket: 3 to 63 of a-z, 0-9, - and .")
        if not _PREFIX.fullmatch(prefix) or {"..", "."} & {*prefix.split("/")}:
            raise ConfigError(f"{prefix[:80]!r} is no prefix: letters, digits and !_.*'()/=+- are allowed")
        endpoint = endpoint or os.environ.get(ENDPOINT) or None
        if endpoint is not None and ("@" in endpoint or urlsplit(endpoint).scheme not in ("http", "https")):
            raise ConfigError(
                "the endpoint must be http(s)://host:port; a name and a secret are not part of it"
            )
        self.bucket, self.conditional = bucket, conditional
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        session = boto3.session.Session()
        settings = Config(
            connect_timeout=CONNECT,
            read_timeout=READ,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            # a server of one's own seldom has a host name for each bucket
            s3={"addressing_style": "path" if endpoint else "auto"},
            # the newer checksums are trailers that other servers refuse; who reads has digests
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            self.client: Any = session.client(
                "s3",
                endpoint_url=endpoint,
                region_name=region or session.region_name or REGION,
                config=settings,
            )
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"cannot use {self}: {type(error).__name__}") from None

    @classmethod
    def at(cls, place: str) -> S3Store:
        """Return the store of a URL, of which ``place`` is what follows ``s3://``."""
        bucket, _, prefix = place.partition("/")
        return cls(bucket, prefix)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def put(self, key: str, content: Sequence[bytes | memoryview]) -> None:
        """Keep a blob; what was there is replaced, once the last byte has arrived.

        Raises:
            StoreError: The server does not answer, or refuses.
        """
        source = Joined(content)
        where = {"Bucket": self.bucket, "Key": self.prefix + key}
        if source.size <= PIECE:
            self._try("put", key, lambda: self.client.put_object(**where, Body=source))
        else:
            self._try("put", key, lambda: self._put_pieces(source, where))

    def _put_pieces(self, source: Joined, where: dict[str, str]) -> None:
        """Upload one piece after the other; s3transfer's threads cannot start while the program ends."""
        upload = {**where, "UploadId": self.client.create_multipart_upload(**where)["UploadId"]}
        pieces: list[dict[str, object]] = []
        try:
            while piece := source.read(PIECE):
                number = len(pieces) + 1
                sent = self.client.upload_part(**upload, PartNumber=number, Body=piece)
                pieces.append({"PartNumber": number, "ETag": sent["ETag"]})
            self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": pieces})
        except (BotoCoreError, ClientError):
            self.client.abort_multipart_upload(**upload)  # what it holds is paid for, and listed nowhere
            raise

    def swap(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Replace ``old`` (None: nothing) by ``new``; returns False if something else is there.

        Raises:
            StoreError: The server does not answer, refuses, or knows no conditions.
        """
        where: dict[str, object] = {"Bucket": self.bucket, "Key": self.prefix + key}
        found = self._try("read", key, lambda: self._read(key))
        if (None if found is None else found[0]) != old:
            return False
        if self.conditional:
            where |= {"IfNoneMatch": "*"} if found is None else {"IfMatch": found[1]}

        def send() -> bool:
            try:
                self.client.put_object(**where, Body=new)
            except ClientError as error:
                if code_of(error) not in _CHANGED:
                    raise
                return self.get(key) == new  # an answer that was lost made botocore ask a second time
            return True

        return self._try("put", key, send)

    def get(self, key: str) -> bytes | None:
        """Return a blob, or None.

        Raises:
            StoreError: The server does not answer, or refuses.
        """
        found = self._try("read", key, lambda: self._read(key))
        return None if found is None else found[0]

    def _read(self, key: str) -> tuple[bytes, str] | None:
        """Return a blob and its tag; a connection that breaks in the middle is asked for anew."""
        for attempt in range(ATTEMPTS):
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)
                return answer["Body"].read(), answer["ETag"]
            except ClientError as error:
                if code_of(error) in _MISSING:
                    return None
                raise
            except BotoCoreError:
                if attempt == ATTEMPTS - 1:
                    raise
        return None

    def keys(self, prefix: str = "") -> list[str]:
        """List the keys that start with ``prefix``, sorted.

        Raises:
            StoreError: The server does not answer, or refuses.
        """

        def ask() -> list[str]:
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix, PaginationConfig={"PageSize": PAGE}
            )
            return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

        return sorted(key.removeprefix(self.prefix) for key in self._try("list", prefix, ask))

    def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is no error.

        Raises:
            StoreError: The server does not answer, or refuses.
        """
        self._try("delete", key, lambda: self.client.delete_object(Bucket=self.bucket, Key=self.prefix + key))

    def _try(self, verb: str, key: str, ask: Callable[[], Result]) -> Result:
        """Ask the server; its own words stay out of messages, they may quote what was sent."""
        try:
            return ask()
        except ClientError as error:
            reason = f"the server says {code_of(error)[:80]}"
            if code_of(error) in ("NotImplemented", "501"):
                reason += "; if it knows no If-Match: S3Store(..., conditional=False)"
        except NoCredentialsError:
            reason = (
                "boto3 finds no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            )
        except BotoCoreError as error:
            reason = f"{type(error).__name__} after {ATTEMPTS} attempts"
        raise StoreError(f"cannot {verb} {key or 'keys'} in {self}: {reason}")


class Joined(io.RawIOBase):
    """Chunks of memory as one file, so that they are never joined."""

    def __init__(self, chunks: Sequence[bytes | memoryview]) -> None:
        self.chunks = [memoryview(chunk).cast("B") for chunk in chunks]
        self.size = sum(map(len, self.chunks))
        self.position = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read again, which a second attempt does."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer; only at the end it stays shorter."""
        target = memoryview(buffer).cast("B")
        done, start = 0, 0
        for chunk in self.chunks:
            begin = self.position + done - start
            if 0 <= begin < len(chunk) and done < len(target):
                piece = chunk[begin : begin + len(target) - done]
                target[done : done + len(piece)] = piece
                done += len(piece)
            start += len(chunk)
        self.position += done
        return done


def code_of(error: ClientError) -> str:
    """Return what the server calls the error."""
    return str(error.response.get("Error", {}).get("Code", "nothing"))
