"""Images by URL come from public addresses only, whatever a URL, a name or a redirect says."""

import asyncio
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_embeddings_server.inputs.fetch import is_public
from tests.image_bytes import encoded, scene
from tests.site import Detour, Names, Site, distrustful, fetched, loader, redirect, refusal, reply

IMAGE = encoded(scene(), "PNG")
PUBLIC = "93.184.215.14"
ADVICE = "its host has no public address; images from a private network need --allow-private-image-urls on the server"


@pytest.mark.parametrize(
    ("public", "addresses"),
    [
        (True, "8.8.8.8 93.184.215.14 1.1.1.1 100.63.255.255 172.32.0.1 198.20.0.1 223.255.255.255"),
        (True, "2606:2800:21f:cb07:6820:80da:af6b:8b2c 2001:4860:4860::8888 2a00:1450:4001::1 64:ff9b::808:808"),
        (False, "127.0.0.1 127.255.255.255 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1"),
        (False, "169.254.169.254 169.254.0.1 100.64.0.1 100.100.100.200 192.0.0.192 192.0.0.8 168.63.129.16"),
        (False, "192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255"),
        (False, ":: ::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::127.0.0.1 ::ffff:0:7f00:1 fe80::1 fe80::1%eth0 fec0::1"),
        (False, "fc00::1 fd00:ec2::254 ff02::1 100::1 2001:db8::1 3fff::1 5f00::1 2606:2800::1%eth0"),
        (False, "2002:7f00:1:: 2002:808:808:: 2001:0:4136:e378:8000:63bf:3fff:fdd2 64:ff9b::7f00:1 64:ff9b::a00:1"),
        (False, "64:ff9b::a9fe:a9fe 64:ff9b:1::7f00:1"),
    ],
)
def test_which_addresses_are_public(public: bool, addresses: str) -> None:
    assert [each for each in addresses.split() if is_public(each) is not public] == []


SPELLINGS = (
    "http://127.0.0.1:{port}/", "http://127.1:{port}/", "http://0x7f000001:{port}/", "http://2130706433:{port}/",
    "http://0177.0.0.1:{port}/", "http://0x7f.1:{port}/", "http://0:{port}/", "http://0.0.0.0:{port}/",
    "http://localhost:{port}/", "http://localhost.:{port}/", "HTTP://LOCALHOST:{port}/", "http://[::1]:{port}/",
    "http://[::]:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://[::ffff:7f00:1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/", "http://[::1%25lo]:{port}/", "http://[fe80::1%25lo]:{port}/",
    "http://%31%32%37.0.0.1:{port}/", "http://127%2e0.0.1:{port}/", "http://１２７.０.０.１:{port}/",
    "http://127。0。0。1:{port}/", "http://①②⑦.0.0.1:{port}/", "http://ⓛocalhost:{port}/",
    "http://example.com@127.0.0.1:{port}/", "http://a:b@127.0.0.1:{port}/", "http://example.com%40127.0.0.1:{port}/",
    "http://example.com\\@127.0.0.1:{port}/", "http://127.0.0.1:{port}\\@example.com/", "http:/127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}/", "http:///127.0.0.1:{port}/", "http://127.0.0.1:{port}#@example.com/",
    "https://127.0.0.1:{port}/", "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://192.168.0.1/",
)  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_leads_to_this_machine(spelling: str) -> None:
    async def run() -> None:
        async with Site({"/": reply(IMAGE)}) as site, loader(allow_private=False) as images:
            error = await refusal(images, spelling.format(port=site.port))
            assert error.code in ("image_fetch_failed", "invalid_image")
            assert site.visits == [] and site.left == []  # not even a connection

    asyncio.run(run())


def test_what_is_refused_reads_the_same_whether_it_exists_or_not() -> None:
    async def run() -> None:
        names = Names(inside_test=["10.1.2.3"], metadata_test=["169.254.169.254"])
        async with Site({"/": reply(IMAGE)}) as site, loader(allow_private=False, resolve=names) as images:
            site_url = site.url.replace("127.0.0.1", "inside.test")
            for url in (site_url, "http://inside.test:1/", "http://metadata.test/", "http://nowhere.test/"):
                error = await refusal(images, url)
                assert error.message == f"input[0] from {url!r} cannot be fetched: {ADVICE}"
            assert site.left == []

    asyncio.run(run())


def test_one_private_address_among_several_is_enough() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return [PUBLIC, "127.0.0.1"]

    async def run() -> None:
        async with Site({"/": reply(IMAGE)}) as site:
            internet = Detour(site)
            async with loader(allow_private=False, resolve=resolve, transport=internet) as images:
                assert ADVICE in (await refusal(images, "http://images.test/")).message
                assert internet.addresses == []

    asyncio.run(run())


def test_a_name_is_resolved_once_and_the_connection_goes_there() -> None:
    """A name that changes its address after the check (DNS rebinding) gains nothing."""

    async def run() -> None:
        names = Names(images_test=[PUBLIC, "127.0.0.1"])
        async with Site({"/": reply(IMAGE)}) as site:
            internet = Detour(site)
            async with loader(allow_private=False, resolve=names, transport=internet) as images:
                assert await fetched(images, "http://images.test/") == IMAGE
                assert (names.asked, internet.addresses) == (["images.test"], [PUBLIC])
                assert site.visits[0].headers["Host"] == "images.test"
                # And no connection of the first fetch is left over for the second.
                assert ADVICE in (await refusal(images, "http://images.test/")).message
                assert (len(names.asked), internet.addresses) == (2, [PUBLIC])

    asyncio.run(run())


@pytest.mark.parametrize(
    "target", ["http://inside.test:{port}/", "http://127.0.0.1:{port}/", "//127.0.0.1:{port}/", "http://images.test/x"]
)
def test_every_redirect_is_checked_anew(target: str) -> None:
    async def run() -> None:
        names = Names(images_test=[PUBLIC, "127.0.0.1"], inside_test=["10.0.0.1"])
        names.answers["127.0.0.1"] = [["127.0.0.1"]]
        pages: dict[str, Any] = {"/x": reply(IMAGE)}
        async with Site(pages) as site:
            pages["/"] = redirect(target.format(port=site.port))
            internet = Detour(site)
            async with loader(allow_private=False, resolve=names, transport=internet) as images:
                error = await refusal(images, "http://images.test/")
                assert error.message == f"input[0] from 'http://images.test/' cannot be fetched: {ADVICE}"
                assert (site.paths, internet.addresses) == (["/"], [PUBLIC])

    asyncio.run(run())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ftp://images.test/", "only http and https are fetched"),
        ("file:///etc/passwd", "only http and https are fetched"),
        ("data:image/png;base64,AAAA", "only http and https are fetched"),
        ("http://user:secret@images.test/", "a user name or password is not sent"),
        ("http://images.test:99999/", "it is not a valid URL"),
        ("http://[::1/", "it is not a valid URL"),
        ("/", "it has more than 3 redirects"),
    ],
)
def test_redirects_that_are_not_followed(target: str, message: str) -> None:
    async def run() -> None:
        async with Site({"/": redirect(target)}) as site, loader() as images:
            error = await refusal(images, f"{site.url}/")
            assert error.message == f"input[0] from '{site.url}/' cannot be fetched: {message}"
            assert error.code == "image_fetch_failed"
            assert len(site.visits) == (4 if target == "/" else 1)

    asyncio.run(run())


def test_https_goes_to_the_checked_address_and_checks_the_name(tmp_path: Path) -> None:
    if which("openssl") is None:
        pytest.skip("needs the openssl command")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=images.test"]
    command += ["-addext", "subjectAltName=DNS:images.test", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(certificate, key)
    trusting = httpx.AsyncHTTPTransport(verify=ssl.create_default_context(cafile=certificate), trust_env=False)

    async def run() -> None:
        names = Names(images_test=[PUBLIC], other_test=[PUBLIC])
        async with Site({"/a.png": reply(IMAGE)}, ours) as site:
            async with loader(allow_private=False, resolve=names, transport=Detour(site, trusting)) as images:
                assert await fetched(images, "https://images.test/a.png") == IMAGE
                assert site.visits[0].headers["Host"] == "images.test"
                error = await refusal(images, "https://other.test/a.png")
                assert "certificate is not valid" in error.message and error.code == "image_fetch_failed"
                assert len(site.visits) == 1
            async with loader(resolve=names, transport=Detour(site)) as images:  # trusts the usual authorities
                assert "certificate is not valid" in (await refusal(images, "https://images.test/a.png")).message

    asyncio.run(run())


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.from_regex(r"[a-z0-9.:@%/\\\[\]#?_-]{0,40}", fullmatch=True))
def test_no_url_raises_anything_else(rest: str) -> None:
    for scheme in ("http://", "https://"):
        asyncio.run(refusal(distrustful(), scheme + rest))
