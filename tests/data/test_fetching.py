"Downloads that verify and resume, from a server that lies, stops or is not there"
import functools
import hashlib
import http.server
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from pahcl.core.basics import PahclError
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
    server.asked, server.cut, server.url = [], '', f'http://127.0.0.1:{server.server_port}/'
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
