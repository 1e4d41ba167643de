"""The built site as a reader meets it: no dead link, no page wider than its window, no error, and a
search that finds. Slow: the whole site, as it was built in `_docs` by test_docs.py or `make docs`.
"""
import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from chromium import find_chromium, open_browser

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get('PAHCL_SITE', ROOT/'_docs'))
WIDTHS = 1200, 375
# what is asked -> pages that answer it; one of them is among the first three
QUERIES = {'install': ['install.html'],
           'TensorBoard': ['guide.html', 'tensorboard', 'trackers.html'],
           'predict a wav': ['commands/pahcl_predict.html', 'tutorials/your_own_recordings.html'],
           'resume': ['guide.html', 'training/runs.html', 'run_folders.html']}


class Links(HTMLParser):
    "Addresses that a page leads to, and the places in it that have a name."
    def __init__(self, page):
        super().__init__()
        self.found, self.names = [], {''}
        self.feed(page.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names.add(given.get('id') or given.get('name') or '')
        self.found += [given[k] for k in ('href', 'src') if given.get(k)]


def find_dead_links(site, may_lack=()) -> list:
    "Links within a site that lead nowhere."
    pages = {p.resolve(): Links(p) for p in site.rglob('*.html')}
    dead = []
    for page, links in pages.items():
        if page.name == '404.html': continue   # its addresses are those of the server
        for href in links.found:
            parts = urlsplit(href)
            if parts.scheme or parts.netloc: continue
            target = (page.parent/unquote(parts.path)).resolve() if parts.path else page
            if target.is_dir(): target = target/'index.html'
            name = unquote(parts.fragment)
            if target.name in may_lack and not target.exists(): continue
            if not target.exists() or name not in getattr(pages.get(target), 'names', {name}):
                dead.append(f'{page.relative_to(site.resolve())}: {href}')
    return dead


def find_wide_pages(browser, pages) -> list:
    "Pages that are wider than their window."
    wide = []
    for page in pages:
        browser.open(page.resolve().as_uri())
        for width in WIDTHS:
            browser.resize(width)
            if (least := browser.run('document.documentElement.scrollWidth')) > width:
                wide.append(f'{page}: {least} of {width}')
    return wide


def find_misses(browser, site, queries) -> list:
    "Queries whose answer is not among the first three pages."
    missed = []
    for words, answers in queries.items():
        browser.open((site/'index.html').resolve().as_uri())
        first = list(dict.fromkeys(browser.search(words)))[:3]
        if not any(a in address for a in answers for address in first):
            missed.append(f'{words}: {first}')
    return missed


def needs_chromium():
    pytest.importorskip('websocket')
    if not find_chromium(): pytest.skip('no Chromium here (apt install chromium)')


@pytest.fixture
def site():
    if not (SITE/'index.html').exists(): pytest.skip(f'no site in {SITE}: make docs')
    return SITE


@pytest.mark.slow
def test_no_link_is_dead(site):
    assert not (dead := find_dead_links(site)), '\n'.join(dead)


@pytest.mark.slow
def test_pages_fit_their_window_and_search_finds(site):
    needs_chromium()
    pages = sorted(p for p in site.rglob('*.html') if p.name != '404.html')
    with open_browser() as browser:
        assert not (wide := find_wide_pages(browser, pages)), wide
        assert not (missed := find_misses(browser, site, QUERIES)), missed
        assert not browser.errors, browser.errors[:3]


def test_a_dead_link_is_found(tmp_path):
    (tmp_path/'a.html').write_text('<a href="b.html#x">b</a><a href="c.html">c</a>')
    (tmp_path/'b.html').write_text('<p id="y"><a href="a.html#">a</a>')
    assert find_dead_links(tmp_path) == ['a.html: b.html#x', 'a.html: c.html']


def test_a_wide_page_and_an_error_are_found(tmp_path):
    needs_chromium()
    (tmp_path/'a.html').write_text('<div style="width:800px">a</div><script>nothing()</script>')
    with open_browser() as browser:
        assert [w.split(': ')[1] for w in find_wide_pages(browser, tmp_path.glob('*.html'))] == [
            '808 of 375']
        assert 'nothing is not defined' in browser.errors[0]
