"""pahcl.training.run_folders: `--overwrite` removes nothing that is not its own, and nothing before
there is something better; two runs never write one folder
"""
import multiprocessing
import os

import pytest
from pahcl.core.basics import lock_folder, PahclError
from pahcl.models.checkpoints import save_checkpoint
from pahcl.training import run_folders
from pahcl.training.runs import Run


def train(folder, weight, fail=False, **given):
    "What a training does with its folder; the run."
    with Run(folder, dict(weight=weight), use_amp=False, **given) as run:
        save_checkpoint(run.folder/'best_model.pt', dict(model_state_dict={}, weight=weight))
        if fail: raise PahclError('the loss is inf.')
        run.finish(dict(weight=weight))
    return run


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes()
                           for p in folder.rglob('*') if p.is_file()}


@pytest.fixture
def old(tmp_path):
    run = train(tmp_path/'run', 1)
    assert run.folder == tmp_path/'run'
    (run.folder/'evaluation_pascal_test').mkdir()
    (run.folder/'evaluation_pascal_test'/'metrics.json').write_text('{}')
    return run.folder


def test_an_unfinished_run_of_an_older_version_goes_on(tmp_path):
    "A key that it did not know means its default; another value is another run."
    with pytest.raises(PahclError, match='the loss is inf'): train(tmp_path/'run', 1, fail=True)
    defaults = dict(weight=0, size=3)
    with Run(tmp_path/'run', dict(weight=1, size=3), use_amp=False, defaults=defaults) as run:
        assert run.state == 'resume'
    with pytest.raises(PahclError, match='size is 3 there and 4 here'):
        Run(tmp_path/'run', dict(weight=1, size=4), use_amp=False, defaults=defaults)


def test_somebody_elses_folder_is_left_alone(tmp_path):
    project = tmp_path/'project'
    project.mkdir()
    for name in ('config.yaml', 'status.json', 'thesis.txt'): (project/name).write_text('{}')
    before = files(project)
    with pytest.raises(PahclError, match='does not carry the mark of a run'):
        train(project, 2, overwrite=True)
    (project/'.pahcl.json').write_text('{"program": "pahcl", "run": "1", "signature": "1"}')
    with pytest.raises(PahclError, match='does not carry the mark of a run'):
        train(project, 2, overwrite=True)
    (project/'.pahcl.json').unlink()
    assert files(project) == before


def test_a_file_of_somebody_else_in_a_run(old):
    for name in ('thesis.txt', 'evaluation_pascal_test/notes.docx', 'evaluation_pascal_test/me.png',
                 'kept/best_model.pt', 'data/config.yaml'):
        (old/name).parent.mkdir(exist_ok=True)
        (old/name).write_text('mine')
        before = files(old)
        with pytest.raises(PahclError, match=f'holds what pahcl did not write .{name}.'):
            train(old, 2, overwrite=True)
        assert files(old) == before
        (old/name).unlink()


BAD_YAML = {   # what is written into config.yaml -> what is said
    'weight: 1\nsize: {a: 1': 'config.yaml is not valid YAML.*or start anew',
    '- 1': 'config.yaml: a mapping of sections was expected, not list.*or start anew',
    'weight: {a: 1}': 'weight is a section there and 1 here .config.yaml.',
    'weight: [1, 2]': r'weight is .1, 2. there and 1 here .config.yaml.',
    'weight: 1\nsize: 5': 'size is 5 there and a section here .config.yaml.',
    'weight: 1\nsize: {a: {b: 1}}': 'size.a is a section there and 3 here .config.yaml.',
    'weight: 1\nsiez: {a: 3}': 'siez is a section there and None here .config.yaml.',
    'weight: 2023-01-01': 'weight is datetime.date.*there and 1 here .config.yaml.',
    b'weight: \xff': 'config.yaml is not valid YAML.*or start anew'}

@pytest.mark.parametrize('text', BAD_YAML)
def test_a_configuration_that_somebody_has_edited(text, tmp_path):
    config, run = dict(weight=1, size=dict(a=3)), tmp_path/'run'
    with Run(run, config, use_amp=False): pass
    assert Run(run, config, defaults=config).state == 'resume'
    (run/'config.yaml').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PahclError, match=f'(?s){BAD_YAML[text]}'): Run(run, config, defaults=config)


def test_numbers_as_people_write_them_and_names_that_look_like_them(tmp_path):
    config = dict(rate=1e-3, name='1e-3')
    with Run(tmp_path/'run', config, use_amp=False): pass
    path = tmp_path/'run'/'config.yaml'
    path.write_text(path.read_text().replace('0.001', '1e-3'))
    assert Run(tmp_path/'run', config).state == 'resume'


def test_a_link_is_refused(old, tmp_path):
    (tmp_path/'link').symlink_to(old)
    before = files(old)
    with pytest.raises(PahclError, match='is a link to another place'):
        train(tmp_path/'link', 2, overwrite=True)
    assert files(old) == before


def test_a_run_that_fails_costs_nothing_and_goes_on(old):
    before = files(old)
    with pytest.raises(PahclError, match='the loss is inf'): train(old, 2, True, overwrite=True)
    assert files(old) == before and Run(old, dict(weight=1)).finished
    beside = old.with_name('.run.new')
    assert Run(old, dict(weight=2), overwrite=True).state == 'resume'
    # other settings: the try before is of no use
    assert Run(old, dict(weight=3), overwrite=True).state == 'new' and not beside.exists()
    run = train(old, 3, overwrite=True)
    assert run.folder == old and Run(old, dict(weight=3)).finished
    assert sorted(p.name for p in old.parent.iterdir()) == ['run']
    assert not (old/'evaluation_pascal_test').exists()


def test_the_old_run_is_kept_where_asked(old):
    before = files(old)
    train(old, 2, overwrite=True, keep=True)
    assert files(old.with_name('run.previous')) == before
    with pytest.raises(PahclError, match='run.previous is there, so --keep has no name'):
        train(old, 3, overwrite=True, keep=True)
    assert Run(old, dict(weight=2)).finished


@pytest.mark.parametrize('renames', [0, 1, 2])
def test_killed_while_it_takes_the_place(old, renames, monkeypatch):
    "Whatever was done, one of the two is there, and the same command ends with the new one."
    real, done = os.rename, []
    def rename(*names):
        if len(done) == renames: raise KeyboardInterrupt
        done.append(real(*names))
    monkeypatch.setattr(run_folders.os, 'rename', rename)
    if renames == 2:
        def stop(folder): raise KeyboardInterrupt
        monkeypatch.setattr(run_folders, '_remove_run', stop)
    with pytest.raises(KeyboardInterrupt): train(old, 2, overwrite=True)
    monkeypatch.undo()
    again = Run(old, dict(weight=2), overwrite=renames == 0)
    assert again.finished and again.folder == old and again.metrics() == dict(weight=2)
    assert sorted(p.name for p in old.parent.iterdir()) == ['run']


def test_what_comes_into_the_old_run_meanwhile_is_kept(old):
    with Run(old, dict(weight=2), overwrite=True) as run:
        save_checkpoint(run.folder/'best_model.pt', dict(model_state_dict={}))
        (old/'thesis.txt').write_text('mine')
        run.finish({})
    assert files(old.with_name('run.previous')) == {'thesis.txt': b'mine'}


def hold(folder, ready, end):
    with Run(folder, dict(weight=1), use_amp=False) as run:
        ready.set()
        end.wait(60)


def test_the_second_is_told_who_was_first(tmp_path):
    context = multiprocessing.get_context('fork')
    ready, end = context.Event(), context.Event()
    first = context.Process(target=hold, args=(tmp_path/'run', ready, end))
    first.start()
    assert ready.wait(60)
    for overwrite in (False, True):
        with pytest.raises(PahclError, match=rf'run is being written by .*\(process {first.pid} on '
                                             r'.*, since \d{4}-.*\). Wait'):
            Run(tmp_path/'run', dict(weight=1), overwrite=overwrite)
    first.kill()   # the lock ends with it
    first.join()
    assert Run(tmp_path/'run', dict(weight=1)).state == 'resume'


def test_who_looked_before_another_wrote_looks_again(tmp_path):
    late = Run(tmp_path/'run', dict(weight=1), use_amp=False)
    train(tmp_path/'run', 1)
    with pytest.raises(PahclError, match='has just written'):
        with late: pass
    assert Run(tmp_path/'run', dict(weight=1)).finished
    with lock_folder(tmp_path/'run'): pass   # nobody has kept it
