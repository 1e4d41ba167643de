"Downloads that verify and resume, from a server that lies, stops or is not there"
import functools
import gzip
import hashlib
import http.server
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from pahcl.core.basics import PahclError
from pahcl.data import fetching
from pahcl.data.datasets import DATASETS
from pahcl.data.fetching import download, _parse_sums
from pahcl.data.simulation import simulate_dataset
from pahcl.download import pahcl_download


@given(st.text(max_size=60))
def test_no_name_leads_out_of_the_folder(name):
    try: sums = _parse_sums(f'{"0"*64}  {name}')
    except PahclError: return
    assert all('..' not in Path(n).parts and not Path(n).is_absolute() for n in sums)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass

    def do_GET(self):
        self.server.asked.append(self.path)
        if answer := self.server.answers.pop(self.path, None): return answer(self)
        # promises more than it sends, as a broken line does
        if self.path.endswith(self.server.cut) and self.server.cut:
            self.send_response(200)
            self.send_header('Content-Length', '1000000')
            self.end_headers()
            self.wfile.write(b'RIFF')
        else: super().do_GET()


@pytest.fixture
def published(tmp_path):
    "a small CirCor on a server; `server.asked` lists what was asked for"
    folder = tmp_path/'published'
    for name in ('training_data/1_AV.wav', 'training_data/1_AV.tsv', 'training_data/2 MV.wav',
                 'training_data.csv', 'RECORDS'):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(name.encode()*50)
    (folder/'SHA256SUMS.txt').write_text(
        ''.join(f'{hashlib.sha256(p.read_bytes()).hexdigest()} {p.relative_to(folder)}\n'
                for p in folder.rglob('*') if p.is_file()))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0),
                                             functools.partial(Handler, directory=folder))
    server.answers, server.asked, server.cut = {}, [], ''
    server.url = f'http://127.0.0.1:{server.server_port}/'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, folder
    server.shutdown()
    server.server_close()


def test_only_what_is_wanted_comes_and_only_once(published, tmp_path):
    server, folder = published
    assert download('circor', tmp_path/'raw', base_url=server.url) == {'circor': 4}
    assert (not (tmp_path/'raw/circor/RECORDS').exists()
            and (tmp_path/'raw/circor/training_data/2 MV.wav').read_bytes()
            == (folder/'training_data/2 MV.wav').read_bytes())
    server.asked.clear()
    server.shutdown()   # a complete data set needs no network
    assert (download('circor', tmp_path/'raw', base_url=server.url) == {'circor': 4}
            and not server.asked)


def test_a_cut_file_is_never_taken_for_a_whole_one(published, tmp_path):
    server, folder = published
    server.cut = '1_AV.wav'
    with pytest.raises(PahclError, match='The same command goes on where it stopped'):
        download('circor', tmp_path/'raw', base_url=server.url, retries=0, workers=1)
    assert not (tmp_path/'raw/circor/training_data/1_AV.wav').exists()
    server.cut = ''
    server.asked.clear()
    download('circor', tmp_path/'raw', base_url=server.url)
    assert (tmp_path/'raw/circor/training_data/1_AV.wav').read_bytes() == (
        folder/'training_data/1_AV.wav').read_bytes()
    assert '/SHA256SUMS.txt' not in server.asked


def test_a_list_that_makes_no_sense_is_not_kept(published, tmp_path):
    server, folder = published
    good = (folder/'SHA256SUMS.txt').read_text()
    for bad, says in (('<html>maintenance</html>', 'line 1 is no checksum'),
                      (f'{"0"*64} ../../evil', 'outside the folder'),
                      (f'{"0"*64} nothing_needed', 'lists none of the files')):
        (folder/'SHA256SUMS.txt').write_text(bad)
        with pytest.raises(PahclError, match=says):
            download('circor', tmp_path/'raw', base_url=server.url)
    (folder/'SHA256SUMS.txt').write_text(good)
    assert download('circor', tmp_path/'raw', base_url=server.url) == {'circor': 4}


def answer(status=200, body=b'', delay=0, **headers):
    "What a server says once: status, headers (_ for -), body (byte by byte with a delay)"
    def say(handler):
        handler.send_response(status)
        for name, value in headers.items(): handler.send_header(name.replace('_', '-'), value)
        handler.end_headers()
        for i in range(0, len(body), 1 if delay else len(body)):
            handler.wfile.write(body[i:i+1 if delay else None])
            time.sleep(delay)
    return say


def test_a_stale_list_is_fetched_again(published, tmp_path):
    server, folder = published
    download('circor', tmp_path/'raw', base_url=server.url)
    changed = folder/'training_data.csv'
    changed.write_bytes(b'corrected')
    listed = folder/'SHA256SUMS.txt'
    lines = [l for l in listed.read_text().splitlines() if 'training_data.csv' not in l]
    corrected = hashlib.sha256(b'corrected').hexdigest()
    listed.write_text('\n'.join([*lines, f'{corrected} training_data.csv']))
    (tmp_path/'raw/circor/training_data.csv').unlink()
    assert download('circor', tmp_path/'raw', base_url=server.url, retries=0) == {'circor': 4}
    assert (tmp_path/'raw/circor/training_data.csv').read_bytes() == b'corrected'
    changed.write_bytes(b'not what the new list says either')
    (tmp_path/'raw/circor/training_data.csv').unlink()
    with pytest.raises(PahclError, match='does not match its published SHA-256 sum'):
        download('circor', tmp_path/'raw', base_url=server.url, retries=0)


@pytest.mark.parametrize('bad', [b'', b'\xff\xfe\x00'])
def test_a_list_without_sums_is_no_success(published, tmp_path, bad):
    server, folder = published
    local, good = tmp_path/'raw/circor/SHA256SUMS.txt', (folder/'SHA256SUMS.txt').read_bytes()
    local.parent.mkdir(parents=True)
    local.write_bytes(bad)               # on our disk: fetched again
    assert download('circor', tmp_path/'raw', base_url=server.url) == {'circor': 4}
    assert local.read_bytes() == good
    (folder/'SHA256SUMS.txt').write_bytes(bad)   # the publisher's
    with pytest.raises(PahclError, match='SHA256SUMS.txt'):
        download('circor', tmp_path/'new', base_url=server.url)
    assert not (tmp_path/'new/circor/SHA256SUMS.txt').exists()


@pytest.mark.parametrize('said, says', [
    (answer(Content_Length='100000000000'), 'announces 100000000000 bytes'),
    (answer(body=b'x'*3000), 'sends more than the 2000 bytes'),
    (answer(body=gzip.compress(bytes(10**6)), Content_Encoding='gzip'), 'comes compressed'),
    (answer(body=b'x'*100, delay=.01), 'is too slow'),
    (answer(503, Retry_After='86400'), 'answered 503')])
@pytest.mark.parametrize('path', ['/training_data.csv', '/SHA256SUMS.txt'])
def test_a_server_gives_neither_too_much_nor_too_slowly(published, tmp_path, said, says, path,
                                                        monkeypatch):
    server, _ = published
    monkeypatch.setattr(fetching, '_MOST_BYTES', 2000)
    monkeypatch.setattr(fetching, '_LONGEST_FETCH', .3)
    server.answers[path] = said
    with pytest.raises(PahclError, match=says):
        download('circor', tmp_path/'raw', base_url=server.url, retries=0)
    assert not (tmp_path/'raw/circor'/path[1:]).exists()


def test_retry_after_is_obeyed_also_for_the_list(published, tmp_path, monkeypatch):
    server, _ = published
    slept = []
    monkeypatch.setattr(fetching.time, 'sleep', slept.append)
    server.answers |= {'/SHA256SUMS.txt': answer(429, Retry_After='7'),
                       '/training_data.csv': answer(503, Retry_After='9')}
    assert download('circor', tmp_path/'raw', base_url=server.url, retries=0) == {'circor': 4}
    assert slept == [7, 9]


def test_what_killed_downloads_left_is_removed(published, tmp_path):
    server, _ = published
    left = [tmp_path/'raw/circor'/n for n in ('tmpab12_xyz', 'training_data/tmp00000000',
                                              '.SHA256SUMS.txt.01234567.tmp')]
    left[1].parent.mkdir(parents=True)
    own = tmp_path/'raw/circor/tmp_notes.txt'
    for path in [*left, own]: path.write_bytes(b'half')
    download('circor', tmp_path/'raw', base_url=server.url)
    assert not any(p.exists() for p in left) and own.exists()


def test_simulated_data_are_not_mixed_with_real_ones(tmp_path):
    simulate_dataset(tmp_path, 'circor', subjects=9, seconds=0.6)
    with pytest.raises(PahclError, match='holds simulated recordings'): download('circor', tmp_path)


def test_script_without_a_network_is_one_sentence(tmp_path, capsys, monkeypatch):
    circor = DATASETS['circor']
    monkeypatch.setitem(DATASETS, 'circor',
                        replace(circor, source=replace(circor.source, url='http://127.0.0.1:9/')))
    assert pahcl_download(['--dataset', 'circor', '--output-dir', str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert 'could not be reached' in error and error.count('\n') == 1 and 'Traceback' not in error
    assert pahcl_download(['--dataset', 'pascal', '--output_dir', str(tmp_path)]) == 0
    assert 'heartchallenge' in capsys.readouterr().out
