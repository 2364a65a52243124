"""Memory and a bucket keep the one contract of blobs; a bucket's trouble is told without secrets."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from esper.checkpoint import BlobStore
from esper.errors import ConfigError, StoreError
from esper.urza.blobs import s3
from esper.urza.blobs.memory import MemoryStore
from esper.urza.blobs.s3 import Joined, S3Store
from tests.urza.blobs.serving import ACCOUNT, BUCKET, s3_server


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as served:
        yield served


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test sets, never the developer's own profile."""
    for name, value in {**ACCOUNT, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")


@pytest.fixture(params=["memory", "s3", "s3 without conditions"])
def blobs(request: pytest.FixtureRequest, endpoint: str) -> BlobStore:
    if request.param == "memory":
        return MemoryStore()
    return S3Store(BUCKET, f"run-{secrets.token_hex(4)}", endpoint, conditional=request.param == "s3")


def test_the_contract(blobs: BlobStore) -> None:
    assert blobs.keys() == []
    assert blobs.get("a/b") is None
    blobs.delete("a/b")
    blobs.put("a/b", [b"1", memoryview(b"23")])
    blobs.put("a/c", [b""])
    blobs.put("b/c", [])
    assert [blobs.get(key) for key in ("a/b", "a/c", "b/c")] == [b"123", b"", b""]
    blobs.put("a/b", [b"other"])
    assert blobs.get("a/b") == b"other"
    assert blobs.keys("a/") == ["a/b", "a/c"]
    blobs.delete("a/b")
    assert blobs.keys() == ["a/c", "b/c"]


def test_a_blob_is_swapped_only_for_the_one_that_is_known(blobs: BlobStore) -> None:
    assert not blobs.swap("a", b"old", b"new")
    assert blobs.swap("a", None, b"first")
    assert not blobs.swap("a", None, b"new")
    assert not blobs.swap("a", b"other", b"new")
    assert blobs.swap("a", b"first", b"second")
    assert blobs.get("a") == b"second"


def test_of_many_who_swap_at_once_one_wins(endpoint: str) -> None:
    store = S3Store(BUCKET, "race", endpoint)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: store.swap("commit", None, b"%d" % number), range(8)))
    assert sum(won) == 1
    assert store.get("commit") == b"%d" % won.index(True)


def test_stores_of_other_prefixes_do_not_meet(endpoint: str) -> None:
    one, two = S3Store(BUCKET, "meet", endpoint), S3Store(BUCKET, "/meet/too/", endpoint)
    two.put("x", [b"2"])
    one.put("x", [b"1"])
    assert (one.get("x"), two.get("x")) == (b"1", b"2")
    assert two.keys() == ["x"]
    assert (str(one), str(two)) == (f"s3://{BUCKET}/meet", f"s3://{BUCKET}/meet/too")


def test_more_keys_than_a_page_are_listed(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PAGE", 2)
    store = S3Store(BUCKET, "many", endpoint)
    for number in range(5):
        store.put(str(number), [b""])
    assert store.keys() == list("01234")


def test_a_large_blob_goes_up_in_pieces(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PIECE", 5 << 20)  # the least that S3 takes
    store = S3Store(BUCKET, "large", endpoint)
    content = [secrets.token_bytes(3 << 20) for _ in range(4)]
    store.put("x", content)
    assert store.get("x") == b"".join(content)
    uploads = store.client.list_multipart_uploads(Bucket=BUCKET)
    assert not uploads.get("Uploads")


def test_chunks_read_as_one_file() -> None:
    whole = bytes(range(256)) * 3
    file = Joined([whole[:1], b"", memoryview(whole)[1:700], whole[700:]])
    assert file.read() == whole
    assert file.seek(-5, 2) == len(whole) - 5
    assert file.read(99) == whole[-5:]
    file.seek(0)
    assert b"".join(iter(lambda: file.read(7), b"")) == whole


@pytest.mark.parametrize("bucket", ["", "ab", "UPPER", "a/b", "user:secret@host", "a" * 64])
def test_what_is_no_bucket_is_refused(bucket: str) -> None:
    with pytest.raises(ConfigError, match="is no bucket"):
        S3Store(bucket)


@pytest.mark.parametrize("prefix", ["../x", "a/./b", "a?b", "a\nb"])
def test_what_is_no_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="is no prefix"):
        S3Store(BUCKET, prefix)


@pytest.mark.parametrize("bad", ["http://user:hush@127.0.0.1:1", "ftp://127.0.0.1", "127.0.0.1:9000"])
def test_an_endpoint_holds_no_secret(bad: str) -> None:
    with pytest.raises(ConfigError, match="the endpoint must be") as caught:
        S3Store(BUCKET, endpoint=bad)
    assert "hush" not in str(caught.value)


def test_a_url_finds_the_server_in_the_variable(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    store = S3Store.at(f"{BUCKET}/a/b")
    store.put("x", [b"1"])
    assert S3Store(BUCKET, "a/b", endpoint).get("x") == b"1"
    assert S3Store.at(BUCKET).prefix == ""


def test_trouble_is_told_without_secrets(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "CONNECT", 0.2)
    monkeypatch.setattr(s3, "ATTEMPTS", 1)
    gone = S3Store("not-there", "p", endpoint)
    dead = S3Store(BUCKET, "p", "http://127.0.0.1:9")
    said = []
    for store, reason in ((gone, "the server says NoSuchBucket"), (dead, "EndpointConnectionError")):
        for ask in (lambda s=store: s.put("k", [b"1"]), lambda s=store: s.get("k"), lambda s=store: s.keys()):
            with pytest.raises(StoreError, match=reason) as caught:
                ask()
            said.append(str(caught.value))
    assert said[0] == "cannot put k in s3://not-there/p: the server says NoSuchBucket"
    assert not any(secret in line for line in said for secret in ACCOUNT.values())
    for name in ACCOUNT:
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match="finds no credentials: set AWS_ACCESS_KEY_ID"):
        S3Store(BUCKET, "p", endpoint).get("k")
