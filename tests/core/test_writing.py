"""pahcl.core.basics and pahcl.core.scripts: what is written lasts, what goes wrong is said of the
file that was to be written, one process a folder, no silence
"""
import errno
import io
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr

import numpy as np
import pytest
from joblib import delayed, Parallel
from pahcl.core import basics, scripts
from pahcl.core.basics import (
    atomic_path, get_logger, lock_folder, PahclError, progress, replace_folder, write_text)
from pahcl.core.scripts import console_script


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(basics.os, 'fsync', lambda f: (done.append('content'), sync(f)))
    monkeypatch.setattr(basics.os, 'replace', lambda *a: (done.append('name'), rename(*a)))
    write_text(tmp_path/'a.csv', 'a\n')
    with atomic_path(tmp_path/'b.png', lasting=False) as path: path.write_bytes(b'b')
    assert done == ['content', 'name', 'name']


@pytest.fixture
def small_files():
    "Writes beyond 10 kB fail, as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_names_the_target(tmp_path, small_files):
    write_text(tmp_path/'table.csv', 'good')
    with pytest.raises(OSError) as error: write_text(tmp_path/'table.csv', 'x'*20000)
    assert error.value.filename == str(tmp_path/'table.csv')
    assert [p.read_text() for p in tmp_path.iterdir()] == ['good']
    with pytest.raises(OSError) as error:
        with replace_folder(tmp_path/'task') as folder: np.save(folder/'x.npy', np.zeros(9999))
    assert error.value.filename in (str(tmp_path/'task'), None) and not (tmp_path/'task').exists()


def test_an_error_elsewhere_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        with atomic_path(tmp_path/'copy'): open(tmp_path/'source')
    assert error.value.filename == str(tmp_path/'source')


@pytest.mark.parametrize('error, says', [
    (OSError(errno.ENOSPC, 'No space left on device', 'out/last.pt'),
     'out/last.pt could not be written: No space left on device. Free some space.'),
    (OSError(errno.EROFS, 'Read-only file system', 'out'), 'out cannot be opened or written: Read'),
    (OSError(errno.ENOTEMPTY, 'Directory not empty', 'out'), 'Directory not empty: out. Check'),
    (MemoryError(), 'memory ran out'),
    (RuntimeError("can't start new thread"), 'memory ran out'),
    (ImportError('x.so: failed to map segment from shared object'), 'memory ran out'),
    (UnicodeEncodeError('ascii', 'Žuť.wav', 0, 1, 'ordinal'), 'Set PYTHONUTF8=1')])
def test_what_the_machine_lacks_is_a_sentence(error, says, capsys):
    @console_script
    def tool(): raise error
    assert tool([]) == 1
    said = capsys.readouterr().err
    assert said.startswith('tool: error: ') and says in said and said.count('\n') == 1
    assert 'disk is not full' not in said


def test_our_own_mistakes_keep_their_traceback():
    @console_script
    def tool(): raise RuntimeError('index 3')
    with pytest.raises(RuntimeError): tool([])


def test_a_locale_that_cannot_say_a_name(tmp_path):
    (tmp_path/'tool.py').write_text('from pahcl.core.scripts import console_script\n'
                                    '@console_script\ndef tool(): print("\\u017du\\u0165")\n'
                                    'raise SystemExit(tool([]))')
    done = subprocess.run([sys.executable, str(tmp_path/'tool.py')], capture_output=True,
                          text=True, env=dict(os.environ, PYTHONIOENCODING='ascii'))
    assert (done.returncode, done.stdout) == (0, '\\u017du\\u0165\n'), done.stderr


# ---- locks

def hold(folder, ready):
    with lock_folder(folder):
        ready.set()
        time.sleep(60)


@pytest.fixture
def held(tmp_path):
    context = multiprocessing.get_context('fork')
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path/'out', ready))
    other.start()
    assert ready.wait(60)
    yield tmp_path/'out', other
    other.kill()
    other.join()


def test_who_has_it_is_said_and_a_killed_one_has_nothing(held):
    folder, other = held
    with pytest.raises(PahclError, match=rf'{folder} is being written by .*\(process {other.pid} '
                                         r'on .*, since \d{4}-\d\d-\d\d .*\). Wait until'):
        with lock_folder(folder): pass
    other.kill()
    other.join()
    with lock_folder(folder): pass
    assert not list(folder.parent.iterdir())


def test_who_waits_gets_it(held):
    folder, other = held
    began = time.monotonic()
    os.spawnlp(os.P_NOWAIT, 'sh', 'sh', '-c', f'sleep .3; kill -9 {other.pid}')
    with lock_folder(folder, wait=True): assert time.monotonic()-began >= .25


def count_up(path, rounds):
    for _ in range(rounds):
        with lock_folder(path.with_name('x'), wait=True):
            number = int(path.read_text())
            path.write_text(str(number+1))


def test_nobody_comes_between(tmp_path):
    "The lock's file is removed and made again all the time, and still one is in it at a time."
    path, context = tmp_path/'count', multiprocessing.get_context('fork')
    path.write_text('0')
    several = [context.Process(target=count_up, args=(path, 30)) for _ in range(4)]
    for p in several: p.start()
    for p in several: p.join()
    assert path.read_text() == '120'


def test_a_lock_leaves_nothing(tmp_path):
    with lock_folder(tmp_path/'a'/'b'/'c'): assert (tmp_path/'a'/'b').is_dir()
    assert not list(tmp_path.iterdir())
    with lock_folder(tmp_path/'a'/'b'/'c'): (tmp_path/'a'/'result').touch()
    assert [p.name for p in (tmp_path/'a').iterdir()] == ['result']


def test_a_link_and_its_folder_are_one(tmp_path):
    (tmp_path/'real').mkdir()
    (tmp_path/'link').symlink_to(tmp_path/'real')
    with lock_folder(tmp_path/'link'), pytest.raises(PahclError, match='is being written'):
        with lock_folder(tmp_path/'real'): pass


@pytest.mark.parametrize('command, folder', [
    ('pahcl_simulate --output-dir {}', 'circor'), ('pahcl_segment {}/a.wav --output-dir {}/s', 's'),
    ('pahcl_predict {}/a.wav --task pascal --output {}/o.csv', 'o.csv')])
def test_commands_say_who_writes_there(tmp_path, capsys, command, folder):
    import pahcl.cycles, pahcl.download, pahcl.evaluate
    import soundfile
    soundfile.write(tmp_path/'a.wav', np.zeros(4000), 4000)
    name, *words = command.replace('{}', str(tmp_path)).split()
    [tool] = [getattr(m, name) for m in (pahcl.cycles, pahcl.download, pahcl.evaluate)
              if hasattr(m, name)]
    with lock_folder(tmp_path/folder): assert tool(words) == 1
    assert f'(process {os.getpid()} on ' in capsys.readouterr().err


# ---- no silence

@pytest.fixture
def lines(monkeypatch):
    said = []
    class Keep(logging.Handler):
        def emit(self, record): said.append(record.getMessage())
    keep = Keep()
    get_logger().addHandler(keep)
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    with redirect_stderr(io.StringIO()): yield said
    get_logger().removeHandler(keep)


def test_a_loop_says_how_far_it_is_within_an_item(lines, monkeypatch):
    assert basics._FIRST_LINE < 5 and basics._LINE_EVERY == 30
    monkeypatch.setattr(basics, '_FIRST_LINE', .05)
    monkeypatch.setattr(basics, '_LINE_EVERY', .2)
    list(progress(range(3), 'short'))
    for i in progress(range(4), 'cutting'): time.sleep(.35 if i == 1 else 0)
    time.sleep(.3)   # and no more when it is over
    assert lines == ['cutting: 1 of 4, 00:00 passed, 00:00 left']*2


def give(items): yield from items


@pytest.mark.parametrize('wrap', [iter, give, zip])
def test_an_abandoned_loop_is_silent(wrap, lines, monkeypatch):
    "Also while the traceback of what ended it is kept, as JupyterLab does, and with it the loop."
    monkeypatch.setattr(basics, '_FIRST_LINE', .1)
    monkeypatch.setattr(basics, '_LINE_EVERY', .1)
    def work():
        items = wrap(progress(range(4), 'left'))
        for _ in items:
            time.sleep(.25)
            raise PahclError('no')
    with pytest.raises(PahclError) as kept: work()
    said = len(lines)
    time.sleep(.4)
    assert said and lines[0].startswith('left: 0 of 4') and len(lines) == said and kept.tb
    items = wrap(progress(range(4), 'left'))
    next(items)
    time.sleep(.15)
    said = len(lines)
    del items
    time.sleep(.3)
    assert len(lines) == said > 2


def test_a_loop_that_others_draw_from_speaks(lines, monkeypatch):
    monkeypatch.setattr(basics, '_FIRST_LINE', .1)
    jobs = progress((delayed(time.sleep)(.15) for _ in range(4)), 'jobs', 4)
    Parallel(2, 'threading', pre_dispatch=2)(jobs)
    assert lines


def test_a_command_without_a_line_says_that_it_lives(lines, monkeypatch):
    monkeypatch.setattr(scripts, '_FIRST_LINE', .2)
    with scripts._say_alive('pahcl_x'): time.sleep(1.2)
    assert lines and lines[0].startswith('pahcl_x: at work for ')


@pytest.mark.skipif(sys.platform == 'win32', reason='has no ulimit')
@pytest.mark.parametrize('module, megabytes',
                         [('cycles', 300), ('cycles', 600), ('finetune', 1400)])
def test_too_little_memory_is_a_sentence(module, megabytes):
    "And it comes before libraries are loaded: OpenBLAS never comes back where it gets too little."
    where = '--task pascal --data-dir' if module == 'finetune' else '--raw-dir'
    command = f'ulimit -v {megabytes}000; exec {sys.executable} -m pahcl.{module} {where} nowhere'
    done = subprocess.run(['bash', '-c', command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f'memory ran out: this process may have {megabytes*1000/1024:.0f} MB' in done.stderr
