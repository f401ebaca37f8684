"""The site that ``make docs`` has built works from files, and links to other projects' names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import zlib
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx", reason="Sphinx is not installed: make docs")

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "docs"
INVENTORIES = {
    "python": "ValueError py:exception 1 library/exceptions.html#$ -",
    "numpy": "numpy.ndarray py:class 1 reference/numpy.ndarray.html#$ -",
    "mpi4py": "mpi4py.MPI.Intracomm py:class 1 reference/Intracomm.html#$ -",
    "torch": "torch.nn.SyncBatchNorm py:class 1 generated/SyncBatchNorm.html#$ -",
}
PAGE = """
Page
====

.. autoclass:: cupybn.typing.Array
   :no-members:
.. autoclass:: cupybn.communicators.MpiCommunicator
   :no-members:

Beside :class:`torch.nn.SyncBatchNorm`.
"""


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.places = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.places |= {values.get("id"), values.get("name")}
        if tag == "a":
            self.links.append(values.get("href") or "")
        elif tag in ("script", "img", "link", "iframe"):
            self.loads.append(values.get("src") or values.get("href") or "")


@pytest.fixture(scope="module")
def pages():
    found = {path: Page(path) for path in SITE.rglob("*.html")}
    if not found:
        pytest.skip("the site is not built: make docs")
    return found


def test_every_page_works_from_a_file(pages):
    """Nothing is loaded from elsewhere, and each link leads to a file, and to a place in it."""
    assert len(pages) > 30
    for path, page in pages.items():
        for address in filter(None, page.links + page.loads):
            parts = urlsplit(address)
            if parts.scheme in ("http", "https") and address in page.links:
                continue  # of another project
            assert not parts.scheme, (path, address)
            assert not address.startswith("/"), (path, address)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), (path, address)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].places, (path, address)


def test_the_search_needs_no_server(pages):
    """Its index is a script beside the page, and knows the names and words of the pages."""
    page = pages[SITE / "search.html"]
    assert "searchindex.js" in page.loads
    text = (SITE / "searchindex.js").read_text()
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", text.strip(), re.DOTALL)[1])
    assert {"start", "clusters", "api/layers"} <= set(index["docnames"])
    names = json.dumps(index["objects"])
    for name in ("SyncBatchNorm", "batch_norm_forward", "recalibrate", "PeerError"):
        assert f'"{name}"' in names, name
    assert {"slurm", "residu", "checkpoint"} <= set(index["terms"])


@pytest.fixture
def elsewhere(tmp_path):
    """The lists of names of the other projects, on a server of this machine."""
    for name, row in INVENTORIES.items():
        folder = tmp_path / "lists" / name
        folder.mkdir(parents=True)
        head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: 1\n# zlib\n"
        (folder / "objects.inv").write_bytes(head.encode() + zlib.compress(f"{row}\n".encode()))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=tmp_path / "lists")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def build(folder, address):
    """A page of three classes, with the settings of the site and other places for the lists."""
    settings = (ROOT / "docs" / "conf.py").read_text()
    settings, places = re.subn(r'"(\w+)": "https://[^"]+"', rf'"\1": "{address}/\1/"', settings)
    assert places == len(INVENTORIES)
    settings = settings.replace("__file__", repr(str(ROOT / "docs" / "conf.py")))
    settings = settings.replace('html_static_path = ["_static"]', "")
    source = folder / "source"
    source.mkdir()
    (source / "conf.py").write_text(settings)
    (source / "index.rst").write_text(PAGE)
    command = ["-m", "sphinx", "-q", "-W", "-b", "html", source, folder / "site"]
    process = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr
    return Page(folder / "site" / "index.html").links


def test_names_of_other_projects_are_links_where_these_can_be_reached(elsewhere, tmp_path):
    links = build(tmp_path, elsewhere)
    for name, row in INVENTORIES.items():
        named, *_, place, _ = row.split()
        assert f"{elsewhere}/{name}/{place.replace('$', named)}" in links


@pytest.mark.parametrize("lost", [[*INVENTORIES], ["mpi4py"]], ids=["all", "one"])
def test_without_them_the_site_is_built_all_the_same(elsewhere, lost, tmp_path):
    for name in lost:
        (tmp_path / "lists" / name / "objects.inv").unlink()
    assert not [link for link in build(tmp_path, elsewhere) if link.startswith(elsewhere)]
