"""Hostile containers are refused, at the right moment: what is not signed is never parsed."""

from __future__ import annotations

import hashlib
import hmac
import io
import itertools
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints.kernel import initial_weights
from esper.blueprints.program import Instruction, Program, Weight
from esper.contracts import Kernel, Signature, kernel_id
from esper.errors import KernelError
from esper.tezzeret import container
from esper.tezzeret.container import is_published, open_sealed, publish, seal
from esper.tezzeret.contents import (
    MAX_DEPTH,
    MAX_HEADER,
    canonical,
    check_archive,
    parse_object,
    tensor_table,
)
from esper.tezzeret.pipelines.export import PIPELINE

KEY, OTHER = b"k" * 32, b"o" * 32
SIGNATURE = Signature("image", "parallel", 4, 6, (3, 3), (1, 1), (1, 1), (1, 1))
GRAPH = '{"name":"linear","nodes":[]}'
SEAL = 88  # bytes before the manifest: 24 of header, 32 of digest, 32 of signature
PICKLE = b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
ELF = b"\x7fELF\x02\x01\x01" + bytes(57)


def tensors(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file; a header that is bytes is taken as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def archive(*names: str, mode: int = 0o100600, content: bytes = b"code") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, content)
    return out.getvalue()


def make(seed: int = 1, pipeline: str = "export", **changes: Any) -> Kernel:
    found = kernel_id(GRAPH, SIGNATURE, 8, seed, pipeline, "torch 2.13.0 cpu")
    kernel = Kernel(
        id=found,
        graph=GRAPH,
        signature=SIGNATURE,
        hidden=8,
        seed=seed,
        pipeline=pipeline,
        toolchain="torch 2.13.0 cpu",
        weights=tensors({"w": entry(0, 8), "v": entry(8, 16, [2, 1])}, bytes(range(16))),
        variants={"export": archive("kernel/data.json")},
        report={"milliseconds": 12.5, "tags": ["fast"], "speedup": None},
    )
    return replace(kernel, **changes)


ARCHIVE = archive("kernel/data.json", "kernel/model.so")
NONE = "0" * 64
EMPTY = hashlib.sha256().hexdigest()
KERNEL = make()
SOUND = seal(KERNEL, KEY)
MANIFEST = struct.unpack_from(">I", SOUND, 12)[0]  # bytes


def assemble(manifest: bytes, parts: bytes = b"", key: bytes = KEY, version: int = 1) -> bytes:
    """A container with any manifest and parts, soundly digested and signed."""
    header = struct.pack(">8sHHIQ", container.MAGIC, version, 0, len(manifest), len(parts))
    digest = hashlib.sha256(manifest + parts).digest()
    signature = hmac.new(key, header + digest + manifest + parts, hashlib.sha256).digest()
    return header + digest + signature + manifest + parts


def split(sealed: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack_from(">I", sealed, 12)[0]
    return json.loads(sealed[SEAL : SEAL + size]), sealed[SEAL + size :]


def altered(change: Callable[[dict[str, Any]], object], sealed: bytes = SOUND) -> bytes:
    """The sound container with its manifest changed and everything digested and signed anew."""
    manifest, parts = split(sealed)
    change(manifest)
    return assemble(canonical(manifest), parts)


def with_parts(**contents: bytes) -> bytes:
    """A soundly signed container of any parts; ``variant__x`` is the part ``variant:x``."""
    manifest, _ = split(SOUND)
    table: list[dict[str, Any]] = []
    offset = 0
    for name, content in contents.items():
        name = {"weights": "weights.safetensors"}.get(name, name.replace("__", ":"))
        table.append(
            {
                "name": name,
                "offset": offset,
                "sha256": hashlib.sha256(content).hexdigest(),
                "size": len(content),
            }
        )
        offset += len(content)
    manifest["parts"], manifest["weights_digest"] = table, table[0]["sha256"]
    return assemble(canonical(manifest), b"".join(contents.values()))


def set_part(index: int, **facts: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["parts"][index].update(facts)


def named(name: str) -> bytes:
    return altered(set_part(1, name=name))


def described(**facts: Any) -> bytes:
    return altered(lambda manifest: manifest.update(facts))


def regraphed(graph: str) -> bytes:
    return described(graph=graph, id=kernel_id(graph, SIGNATURE, 8, 1, "export", "torch 2.13.0 cpu"))


def shaped(**facts: Any) -> bytes:
    return altered(lambda manifest: manifest["signature"].update(facts))


def spliced(position: int, piece: bytes) -> bytes:
    return SOUND[:position] + piece + SOUND[position + len(piece) :]


def test_what_was_sealed_comes_back() -> None:
    assert open_sealed(SOUND, KEY, KERNEL.id) == KERNEL
    assert seal(KERNEL, KEY) == SOUND
    bare = make(variants={}, weights=tensors({}), report={})
    assert open_sealed(seal(bare, KEY), KEY) == bare


def test_the_largest_and_smallest_that_may_be_come_back() -> None:
    def made(**changes: Any) -> Kernel:
        one = make(**changes)
        known = kernel_id(GRAPH, SIGNATURE, one.hidden, one.seed, "export", one.toolchain)
        return replace(one, id=known)

    room = (4 << 20) - len(canonical(split(seal(make(report={"log": ""}), KEY))[0]))
    for kernel in (
        made(hidden=0, seed=-(1 << 63)),
        made(hidden=(1 << 31) - 1, seed=(1 << 64) - 1, toolchain="x" * 1024),
        make(report={"log": "x" * room}),  # a manifest of 4 MiB
    ):
        assert open_sealed(seal(kernel, KEY), KEY) == kernel
    with pytest.raises(KernelError, match="too large"):
        seal(make(report={"log": "x" * (room + 1)}), KEY)


def test_it_has_the_layout_that_is_documented() -> None:
    manifest, parts = split(SOUND)
    assert assemble(canonical(manifest), parts) == SOUND
    assert parts == KERNEL.weights + KERNEL.variants["export"]
    assert [part["name"] for part in manifest["parts"]] == ["weights.safetensors", "variant:export"]
    assert manifest["weights_digest"] == hashlib.sha256(KERNEL.weights).hexdigest()
    assert manifest["published"] is False


# What is wrong → the word the refusal must say. None of these is signed with our key, so none is parsed:
# wherever a manifest is shown, it is one that the parser would have choked on.
JUNK = b'{"a":' * 20_000
UNSIGNED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a kernel's container"),
    "a pickle": (PICKLE + bytes(100), "starts with"),
    "an ELF file": (ELF + bytes(100), "starts with"),
    "a zip archive": (archive("weights.safetensors", "manifest.json"), "starts with"),
    "a zip that ends in a container": (archive("manifest.json") + SOUND, "starts with"),
    "JSON": (canonical({"format": "esper", "text": "x" * 100}), "starts with"),
    "an older version": (assemble(JUNK, version=0), "format version 0"),
    "a future version": (assemble(JUNK, version=2), "format version 2"),
    "the other byte order": (spliced(8, b"\x01\x00"), "format version 256"),
    "a flag nobody defined": (spliced(10, b"\x00\x01"), r"format version 1\.1"),
    "an oversize manifest": (spliced(12, b"\xff\xff\xff\xff"), "oversize"),
    "oversize parts": (spliced(16, b"\xff" * 8), "oversize"),
    "a manifest one byte too large": (spliced(12, struct.pack(">I", (4 << 20) + 1)), "oversize"),
    "a manifest that is just not too large": (spliced(12, struct.pack(">I", 4 << 20)), "length fields"),
    "parts one byte too large": (spliced(16, struct.pack(">Q", (512 << 20) + 1)), "oversize"),
    "parts that are just not too large": (spliced(16, struct.pack(">Q", 512 << 20)), "length fields"),
    "a length field one too large": (
        spliced(16, struct.pack(">Q", len(split(SOUND)[1]) + 1)),
        "length fields",
    ),
    "a length field one too small": (
        spliced(16, struct.pack(">Q", len(split(SOUND)[1]) - 1)),
        "length fields",
    ),
    "a trailing byte": (SOUND + b"\0", "length fields"),
    "a container twice": (SOUND + SOUND, "length fields"),
    "a zip polyglot": (SOUND + archive("../../bin/sh"), "length fields"),
    "an ELF polyglot": (ELF + SOUND, "starts with"),
    "a digest of zeros": (spliced(24, bytes(32)), "digest"),
    "JSON that does not parse, damaged": (assemble(JUNK)[:-1] + b"!", "digest"),
    "no signature": (spliced(56, bytes(32)), "signature"),
    "JSON that does not parse, no signature": (assemble(JUNK)[:56] + bytes(32) + JUNK, "signature"),
    "JSON that does not parse, another key": (assemble(JUNK, key=OTHER), "signature"),
    "another key": (seal(KERNEL, OTHER), "signature"),
    "the digest as signature": (spliced(56, SOUND[24:56]), "signature"),
    "the signature of another kernel": (spliced(56, seal(make(seed=2), KEY)[56:88]), "signature"),
    "HMAC-SHA512 cut short": (
        spliced(56, hmac.new(KEY, SOUND[:56] + SOUND[88:], hashlib.sha512).digest()[:32]),
        "signature",
    ),
    "HMAC of the digest alone": (spliced(56, hmac.new(KEY, SOUND[24:56], "sha256").digest()), "signature"),
    "lengths moved, digest unchanged": (
        spliced(12, struct.pack(">IQ", MANIFEST + 1, len(SOUND) - SEAL - MANIFEST - 1)),
        "signature",
    ),
}

# Signed with our key all the same: by an Esper with a fault, or one that was lent its key.
SIGNED: dict[str, tuple[bytes, str]] = {
    "an empty manifest": (assemble(b""), "not JSON"),
    "a manifest that is a list": (assemble(b"[]"), "not a JSON object"),
    "a manifest in UTF-16": (assemble('{"a":1}'.encode("utf-16")), "not JSON"),
    "a byte order mark": (assemble(b"\xef\xbb\xbf{}"), "not JSON"),
    "a repeated key": (assemble(b'{"id":"a","id":"b"}'), "repeats a key"),
    "NaN": (assemble(b'{"report":NaN}'), "NaN"),
    "infinity by exponent": (assemble(b'{"report":1e999}'), "not finite"),
    "deep nesting": (assemble(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "deeper than 32"),
    "a number of 10,000 digits": (assemble(b'{"seed":' + b"9" * 10_000 + b"}"), "not JSON"),
    "a lone surrogate": (assemble(b'{"id":"\\ud800"}'), "strict JSON"),
    "spaces": (assemble(b'{"id": 1}'), "canonical"),
    "escapes that are not needed": (assemble(b'{"id":"\\u0061"}'), "canonical"),
    "a field more": (described(loader="pickle"), "must have"),
    "a field less": (altered(lambda m: m.pop("published")), "must have"),
    "an algorithm field": (described(algorithm="none"), "must have"),
    "true for a number": (described(seed=True), "seed is not a int"),
    "a float for a number": (described(hidden=8.0), "hidden is not a int"),
    "one for true": (described(published=1), "published is not a bool"),
    "a negative width": (described(hidden=-1), "out of range"),
    "a seed out of range": (described(seed=1 << 64), "out of range"),
    "a seed below the range": (described(seed=-(1 << 63) - 1), "out of range"),
    "a width out of range": (described(hidden=1 << 31), "out of range"),
    "a long toolchain": (described(toolchain="x" * 1025), "line of text"),
    "a pipeline that is a path": (described(pipeline="../eager"), "pipeline named"),
    "a toolchain that moves the cursor": (described(toolchain="torch\x1b[2J"), "line of text"),
    "zip-slip in a part's name": (named("../../etc/cron.d/x"), "part named"),
    "an absolute part": (named("/etc/passwd"), "part named"),
    "traversal in a variant": (named("variant:../x"), "part named"),
    "a backslash in a variant": (named("variant:..\\x"), "part named"),
    "a newline after a name": (named("variant:export\n"), "part named"),
    "a full-width name": (named("variant:\uff45xport"), "part named"),
    "a right-to-left mark in a name": (named("variant:\u202eexport"), "part named"),
    "a dotless i in a name": (named("variant:\u0131nductor"), "part named"),
    "a NUL in a name": (named("variant:export\0.pt2"), "part named"),
    "upper case in a name": (named("variant:Export"), "part named"),
    "an empty variant name": (named("variant:"), "part named"),
    "a name that is a list": (altered(set_part(1, name=["variant:export"])), "part named"),
    "a pickle by name": (named("weights.pkl"), "part named"),
    "a part of another kind": (altered(lambda m: m["parts"].append("x")), "by other than"),
    "a part's extra field": (altered(set_part(0, mode=0o777)), "by other than"),
    "a part listed twice": (
        altered(
            lambda m: m["parts"].insert(
                0, {"name": "weights.safetensors", "offset": 0, "size": 0, "sha256": EMPTY}
            )
        ),
        "listed twice",
    ),
    "a negative offset": (altered(set_part(0, offset=-1)), "where the one before it ends"),
    "a negative size": (altered(set_part(1, size=-1)), "where the one before it ends"),
    "overlapping parts": (altered(set_part(1, offset=0)), "where the one before it ends"),
    "a gap between parts": (
        altered(set_part(1, offset=len(KERNEL.weights) + 1)),
        "where the one before it ends",
    ),
    "a part past the end": (altered(set_part(1, size=1 << 39)), "past the end"),
    "a part one byte past the end": (
        altered(set_part(1, size=len(KERNEL.variants["export"]) + 1)),
        "past the end",
    ),
    "variants in another order": (
        with_parts(weights=KERNEL.weights, variant__export=archive("a"), variant__aoti=archive("a")),
        "parts must be",
    ),
    "an offset of 2⁶⁴": (altered(set_part(1, offset=1 << 64)), "where the one before it ends"),
    "an offset that is true": (altered(set_part(0, offset=False)), "where the one before it ends"),
    "bytes of no part": (altered(lambda m: m["parts"].pop()), "belong to no part"),
    "no weights": (assemble(canonical({**split(SOUND)[0], "parts": []})), "parts must be"),
    "a part's digest of another": (altered(set_part(1, sha256=NONE)), "SHA-256"),
    "a part's digest that is no text": (altered(set_part(1, sha256=None)), "SHA-256"),
    "parts in another order": (
        with_parts(variant__export=archive("a"), weights=KERNEL.weights),
        "parts must be",
    ),
    "weights_digest of another": (described(weights_digest=NONE), "weights_digest"),
    "an id that does not match": (described(id="0" * 64), "contents make"),
    "the id of another kernel": (described(id=make(seed=2).id), "contents make"),
    "an id that is a path": (described(id="../../x"), "contents make"),
    "another graph": (described(graph='{"name":"evil"}'), "contents make"),
    "another seed": (described(seed=2), "contents make"),
    "another width": (described(hidden=9), "contents make"),
    "another toolchain": (described(toolchain="torch 2.12.0 cpu"), "contents make"),
    "marked published": (described(published=True), "contents make"),
    "an unknown layout": (shaped(layout="volume"), "unknown word"),
    "a layout that is a list": (shaped(layout=["image"]), "unknown word"),
    "another signature field": (shaped(loader="x"), "other fields"),
    "negative channels": (shaped(inputs=-4), "channels"),
    "a stride of words": (shaped(stride=["1", "1"]), "geometry"),
    "a stride of ten axes": (shaped(stride=[1] * 10), "geometry"),
    "a stride of four axes": (shaped(stride=[1] * 4), "geometry"),
}


def _weights(data: bytes) -> bytes:
    return with_parts(weights=data, variant__export=KERNEL.variants["export"])


def variant(data: bytes) -> bytes:
    return with_parts(weights=KERNEL.weights, variant__export=data)


# Weights and compiled forms that a loader must never see, in containers that are sound otherwise.
CONTENTS: dict[str, tuple[bytes, str]] = {
    "a pickle as weights": (_weights(PICKLE), "not safetensors"),
    "an ELF file as weights": (_weights(ELF), "not safetensors"),
    "a zip archive as weights": (_weights(archive("data.pkl")), "not safetensors"),
    "no bytes as weights": (_weights(b""), "not safetensors"),
    "a header bomb": (_weights(struct.pack("<Q", 1 << 63) + b"{}"), "not safetensors"),
    "a header larger than allowed": (_weights(tensors(b"{" + b" " * MAX_HEADER + b"}")), "not safetensors"),
    "a header that is not JSON": (_weights(tensors(b"{'w'}")), "not JSON"),
    "a header nested deeply": (_weights(tensors(b'{"w":' * 5000 + b"1" + b"}" * 5000)), "deeper than 32"),
    "a header that repeats a tensor": (
        _weights(tensors(b'{"w":%b,"w":%b}' % ((canonical(entry(0, 4)),) * 2), bytes(4))),
        "repeats a key",
    ),
    "ten thousand tensors": (
        _weights(tensors({f"w{i}": entry(0, 0, [0]) for i in range(10_000)})),
        "are allowed",
    ),
    "tensors that overlap": (_weights(tensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12))), "overlap"),
    "tensors with a gap": (_weights(tensors({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))), "gap"),
    "tensors past the end": (_weights(tensors({"a": entry(0, 400)}, bytes(4))), "bytes of tensors"),
    "bytes of no tensor": (_weights(tensors({"a": entry(0, 4)}, bytes(8))), "bytes of tensors"),
    "a negative tensor offset": (_weights(tensors({"a": entry(-4, 0)})), "whole numbers"),
    "a shape that overflows 64 bits": (
        _weights(tensors({"a": entry(0, 0, [1 << 32, 1 << 32])})),
        "in 0 bytes",
    ),
    "a shape of true": (_weights(tensors({"a": entry(0, 4, [True])}, bytes(4))), "whole numbers"),
    "numbers of another type": (_weights(tensors({"a": entry(0, 4, dtype="U8")}, bytes(4))), "of type"),
    "a type that is a list": (_weights(tensors({"a": {**entry(0, 0), "dtype": ["F32"]}})), "of type"),
    "a tensor that is a path": (_weights(tensors({"../w": entry(0, 4)}, bytes(4))), "tensor named"),
    "a tensor described otherwise": (_weights(tensors({"w": {"file": "/etc/passwd"}})), "other than dtype"),
    "metadata that is not text": (_weights(tensors({"__metadata__": {"a": {}}})), "metadata"),
    "a pickle as variant": (with_parts(weights=KERNEL.weights, variant__eager=PICKLE), "not an archive"),
    "an ELF file as variant": (with_parts(weights=KERNEL.weights, variant__aoti=ELF), "not an archive"),
    "a torn archive": (with_parts(weights=KERNEL.weights, variant__aoti=archive("a")[:-4]), "whole archive"),
    "zip-slip in an archive": (
        with_parts(weights=KERNEL.weights, variant__aoti=archive("../../etc/cron.d/x")),
        "land elsewhere",
    ),
    "an absolute name in an archive": (
        with_parts(weights=KERNEL.weights, variant__aoti=archive("/etc/passwd")),
        "land elsewhere",
    ),
    "a link in an archive": (
        with_parts(weights=KERNEL.weights, variant__aoti=archive("a", mode=0o120777)),
        "a link",
    ),
    "a pickle in an archive": (variant(archive("kernel/model.json", content=PICKLE)), "might unpickle"),
    "a pickle of text in an archive": (
        variant(archive("kernel/state.pkl", content=b"cposix\nsystem\n(S'id'\ntR.")),
        "might unpickle",
    ),
    "tensors in an archive": (variant(archive("kernel/data/weights/weight_0")), "might unpickle"),
    "torch's old format, which is unpickled": (
        variant(archive("serialized_state_dict.pt")),
        "might unpickle",
    ),
    "an archive in an archive": (variant(archive("kernel/a.json", content=archive("b"))), "might unpickle"),
    "machine code in an export": (variant(archive("kernel/model.so", content=ELF)), "machine code"),
    "an archive with an empty name": (variant(archive("a/", "a//")), "land elsewhere"),
    "a file twice in an archive": (
        with_parts(weights=KERNEL.weights, variant__aoti=archive("ab", "cd").replace(b"cd", b"ab")),
        "repeats a name",
    ),
    "a graph that is a list": (regraphed("[]"), "the graph is not a JSON object"),
    "a graph nested deeply": (regraphed('{"a":' * 50 + "1" + "}" * 50), "the graph nests deeper"),
    "a graph with NaN": (regraphed('{"a":-Infinity}'), "the graph holds -Infinity"),
}
HOSTILE = {**UNSIGNED, **SIGNED, **CONTENTS}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_container_is_refused(name: str) -> None:
    data, reason = HOSTILE[name]
    with pytest.raises(KernelError, match=reason):
        open_sealed(data, KEY)


def test_there_are_enough_of_them_and_no_two_are_the_same() -> None:
    assert len({data for data, _ in HOSTILE.values()}) == len(HOSTILE) >= 25


@pytest.mark.parametrize("name", UNSIGNED)
def test_what_is_not_signed_is_refused_by_the_seal_alone(name: str) -> None:
    """The seal knows no JSON and no safetensors, so nothing can have been parsed."""
    with pytest.raises(KernelError):
        container._unseal(UNSIGNED[name][0], KEY)


@pytest.mark.parametrize("name", SIGNED)
def test_the_same_damage_without_our_key_is_a_matter_of_the_signature(name: str) -> None:
    data = SIGNED[name][0]
    unsigned = data[:56] + hmac.new(OTHER, data[:56] + data[88:], hashlib.sha256).digest() + data[88:]
    with pytest.raises(KernelError, match="signature"):
        open_sealed(unsigned, KEY)


def test_parts_of_two_kernels_cannot_be_swapped() -> None:
    manifest, _ = split(SOUND)
    swapped = KERNEL.weights[:-1] + b"!" + KERNEL.variants["export"]
    with pytest.raises(KernelError, match="digest"):
        open_sealed(SOUND[: -len(swapped)] + swapped, KEY)
    with pytest.raises(KernelError, match="signature"):
        open_sealed(assemble(canonical(manifest), swapped, key=OTHER), KEY)
    with pytest.raises(KernelError, match=r"weights\.safetensors is damaged"):
        open_sealed(assemble(canonical(manifest), swapped), KEY)
    exchanged = seal(make(2), KEY)[:SEAL] + SOUND[SEAL:]  # the seal of one before the contents of the other
    with pytest.raises(KernelError, match="digest"):
        open_sealed(exchanged, KEY)


def test_a_sound_container_in_another_kernels_place_is_refused() -> None:
    with pytest.raises(KernelError, match="asked for was"):
        open_sealed(SOUND, KEY, make(seed=2).id)


def test_every_truncation_is_refused() -> None:
    for length in range(len(SOUND)):
        with pytest.raises(KernelError, match=r"not a kernel's container|length fields"):
            open_sealed(SOUND[:length], KEY)


@given(st.integers(0, len(SOUND) - 1), st.integers(1, 255))
def test_any_flipped_byte_is_refused(position: int, mask: int) -> None:
    damaged = bytearray(SOUND)
    damaged[position] ^= mask
    with pytest.raises(KernelError):
        open_sealed(bytes(damaged), KEY)


def test_every_flipped_bit_of_the_seal_is_refused() -> None:
    for position, bit in itertools.product(range(SEAL), range(8)):
        damaged = bytearray(SOUND)
        damaged[position] ^= 1 << bit
        with pytest.raises(KernelError):
            open_sealed(bytes(damaged), KEY)


@given(st.binary(max_size=300))
def test_any_signed_bytes_are_refused_or_sound(manifest: bytes) -> None:
    with pytest.raises(KernelError):
        open_sealed(assemble(manifest), KEY)


@given(st.binary(max_size=200))
def test_any_bytes_as_weights_or_archive_raise_nothing_else(data: bytes) -> None:
    for check in (tensor_table, check_archive):
        with pytest.raises(KernelError):
            check(data + b"!", "it")
    with pytest.raises(KernelError):
        check_archive(b"PK\x03\x04" + data, "it")


@given(st.integers(0, len(ARCHIVE) - 1), st.integers(1, 255))
def test_a_damaged_archive_raises_nothing_else(position: int, mask: int) -> None:
    damaged = bytearray(ARCHIVE)
    damaged[position] ^= mask
    with suppress(KernelError):  # some bytes mean nothing
        check_archive(bytes(damaged), "it")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (make(report={"loss": float("nan")}), "strict JSON"),
        (make(report={"log": "x" * (4 << 20)}), "too large"),
        (make(report={"shape": (1, 2)}), "no tuples"),
        (make(report={"at": object()}), "strict JSON"),
        (make(variants={"../x": archive("a")}), "part named"),
        (make(id="0" * 64), "contents make"),
        (make(weights=PICKLE), "not safetensors"),
        (make(graph="{}"), "contents make"),
    ],
)
def test_what_would_be_refused_is_not_sealed(kernel: Kernel, reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        seal(kernel, KEY)


@pytest.mark.parametrize("key", [b"", b"k" * 31])
def test_a_key_anyone_could_guess_is_refused(key: bytes) -> None:
    with pytest.raises(KernelError, match="at least 32 bytes"):
        seal(KERNEL, key)
    with pytest.raises(KernelError, match="at least 32 bytes"):
        open_sealed(SOUND, key)


def test_trained_weights_get_an_id_of_their_own() -> None:
    trained = tensors({"w": entry(0, 8), "v": entry(8, 16, [2, 1])}, bytes(16))
    published = publish(KERNEL, trained)
    assert not is_published(KERNEL)
    assert is_published(published)
    assert published == replace(KERNEL, id=published.id, weights=trained)
    assert len({KERNEL.id, published.id, publish(KERNEL, KERNEL.weights).id}) == 3
    assert publish(published, trained) == publish(KERNEL, trained)
    sealed = seal(published, KEY)
    assert open_sealed(sealed, KEY) == published
    assert split(sealed)[0]["published"] is True
    with pytest.raises(KernelError, match="contents make"):
        open_sealed(altered(lambda manifest: manifest.update(published=False), sealed), KEY)
    with pytest.raises(KernelError, match="contents make"):
        seal(replace(published, weights=KERNEL.weights), KEY)


@pytest.mark.parametrize(
    "weights",
    [
        tensors({"w": entry(0, 8)}, bytes(8)),
        tensors({"w": entry(0, 8), "v": entry(8, 16, [1, 2])}, bytes(16)),
        tensors({"w": entry(0, 8), "v": entry(8, 16, [2, 2], "F16")}, bytes(16)),
        tensors({"w": entry(0, 8), "u": entry(8, 16, [2, 1])}, bytes(16)),
    ],
)
def test_weights_of_another_kernel_are_not_published(weights: bytes) -> None:
    with pytest.raises(KernelError, match="names, types or shapes differ"):
        publish(KERNEL, weights)


def test_real_weights_and_real_archives_pass() -> None:
    signature = Signature("vector", "parallel", 3, 3)
    program = Program(
        signature,
        (Weight("w", (3, 3), "zeros"),),
        (Instruction("y", "linear", ("%x", "@w"), "y"),),
        "%y",
        ("w",),
    )
    weights = safetensors.torch.save(initial_weights(program, 0), metadata={"format": "pt"})
    assert tensor_table(weights, "weights") == {"w": ("F32", (3, 3))}
    exported = PIPELINE.dump(PIPELINE.compile(program, torch.ones(2, 3)))
    assert exported is not None
    native = archive("kernel/data/aotinductor/model/a.wrapper.so", content=ELF)
    kernel = make(weights=weights, variants={"export": exported, "aoti": native})
    opened = open_sealed(seal(kernel, KEY), KEY)
    assert torch.equal(safetensors.torch.load(opened.weights)["w"], torch.zeros(3, 3))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_what_is_written_canonically_is_read_back(value: Any) -> None:
    try:
        text = canonical({"value": value})
    except KernelError:  # a lone surrogate
        return
    assert parse_object(text, "it") == {"value": value}
    assert canonical(parse_object(text, "it")) == text


def test_brackets_in_strings_are_not_nesting() -> None:
    assert parse_object(canonical({"a": '[[{"\\' * MAX_DEPTH}), "it")
    deepest = '{"a":' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}"
    assert parse_object(deepest.encode(), "it")


def test_opening_needs_no_torch() -> None:
    code = (
        "import sys, esper.tezzeret.container, esper.tezzeret.signing, esper.urza.folder\n"
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
