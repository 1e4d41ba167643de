"""Every console script: quick help, both spellings of every flag, python -m, usage errors, one
clear sentence for bad input
"""
import configparser
import importlib
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = configparser.ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SCRIPTS = {name: target.split(':')[0] for name, target in (
    line.split('=') for line in SETTINGS['DEFAULT']['console_scripts'].split())}
# `python -m` runs the first script of a module; the order is that of settings.ini
FIRST = {module: name for name, module in reversed(SCRIPTS.items())}
GUIDE = dict(
    pahcl_download='dataset output-dir', pahcl_preprocess='raw-dir output-dir num-workers',
    pahcl_prepare='dataset raw-dir processed-dir output-dir seed copy verbose splits '
                  'split-column leaky-splits',
    pahcl_pretrain='config processed-dir downstream-dir output-dir experiment-name encoder-type '
                   'moco epochs lr batch-size seed include-heldout-subjects tensorboard wandb '
                   'wandb-project wandb-entity overwrite keep',
    pahcl_finetune='task config pretrained data-dir output-dir experiment-name linear-eval '
                   'few-shot shot-ratio epochs lr batch-size seed tensorboard wandb wandb-project '
                   'wandb-entity',
    pahcl_evaluate='checkpoint task data-dir split robustness',
    pahcl_ensemble='checkpoints task weighted', pahcl_summarize='compare',
    pahcl_ablation='config jobs dry-run',
    pahcl_benchmark='list quick cross-validate jobs seeds tasks raw-dir processed-dir output-dir '
                    'overwrite',
    pahcl_represent='checkpoint task',
    pahcl_downstream='demo epochs pretrain-epochs splits split-column leaky-splits',
    pahcl_simulate='output-dir dataset subjects seed',
    pahcl_score_states='groups columns only-predicted output',
    pahcl_segment='output-dir figures num-workers scheduler',
    pahcl_predict='checkpoint task subject-from table threshold output report states-dir '
                  'num-workers scheduler')
HEAVY = {'torch', 'numpy', 'pandas', 'scipy', 'sklearn', 'matplotlib', 'pydantic', 'librosa',
         'numba', 'accelerate', 'soundfile'}
POSITIONAL = dict(pahcl_score_states=('found', 'true'), pahcl_segment=('a.wav',),
                  pahcl_predict=('a.wav',), pahcl_benchmark=('four-tasks',))


def call(name, *arguments, run=forked.run, **environment):
    "Run a script: the first of its module as `python -m`, as torchrun does, others as installed."
    module = SCRIPTS[name]
    # what pip writes into the program of a script
    program = f'import sys; from {module} import {name}; sys.exit({name}())'
    how = ['-m', module] if FIRST[module] == name else ['-c', program]
    return run([sys.executable, *how, *map(str, arguments)], capture_output=True, text=True,
               cwd=ROOT, env=os.environ | environment)


@lru_cache
def ask_help(name):
    "The help of a script, started as a user does; standard error names what was imported."
    return call(name, '--help', run=subprocess.run, PYTHONPROFILEIMPORTTIME='1')


@pytest.mark.parametrize('name', SCRIPTS)
def test_help(name):
    done = ask_help(name)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and all(line.startswith('import time:') for line in lines)
    # what makes it quick, on any machine: of the package, and of what stands below it, nearly
    # nothing is imported
    imported = {line.split('|')[-1].strip() for line in lines}
    assert 'pahcl.core.basics' in imported and len(imported) < 400, sorted(imported)
    assert not {name.split('.')[0] for name in imported} & HEAVY
    assert done.stdout.startswith(f'usage: {name} ')
    for flag in GUIDE[name].split():
        assert re.search(rf'--{flag}\b', done.stdout), flag
        assert re.search(rf'--{flag.replace("-", "_")}\b', done.stdout), flag


@pytest.mark.parametrize('name', SCRIPTS)
def test_unknown_flag_is_a_usage_error(name):
    done = call(name, *POSITIONAL.get(name, ()), '--no-such-flag')
    assert (done.returncode == 2 and 'Traceback' not in done.stderr
            and '--no-such-flag' in done.stderr)


def test_all_scripts_are_installed_under_their_own_names():
    for line in SETTINGS['DEFAULT']['console_scripts'].split():
        name, target = line.split('=')
        module, function = target.split(':')
        assert function == name and callable(getattr(importlib.import_module(module), function))
        assert (Path(sys.executable).parent/name).exists()


def test_every_script_is_listed_and_the_first_of_a_module_first():
    "`python -m` runs the script that is defined first, so settings.ini lists it first, too."
    for module in FIRST:
        source = (ROOT/module.replace('.', '/')).with_suffix('.py').read_text(encoding='utf-8')
        defined = re.findall(r'^@console_script\ndef (\w+)', source, re.M)
        assert defined[0] == FIRST[module]
        assert set(defined) == {name for name, m in SCRIPTS.items() if m == module}


BAD = [
    ('pahcl_score_states', '{0}/none {0}/empty', 'none'),
    ('pahcl_score_states', '{0}/empty {0}/empty', 'no states'),
    ('pahcl_preprocess', '--raw_dir {0}/none --output_dir {0}/out', 'none'),
    ('pahcl_preprocess', '--raw-dir {0}/empty --output-dir {0}/out', 'no labels found'),
    ('pahcl_prepare',
     '--raw-dir {0}/empty --processed-dir {0}/none --output-dir {0}/out', 'no labels found'),
    ('pahcl_pretrain',
     '--processed-dir {0}/none --output-dir {0}/out --include-heldout-subjects', 'none'),
    ('pahcl_pretrain', '--downstream-dir {0}/none --output-dir {0}/out',
     'none.*pahcl_prepare first, or give --include-heldout-subjects'),
    ('pahcl_finetune', '--task pascal --pretrained none --data-dir {0}/none --output-dir {0}/out',
     'pahcl_prepare'),
    ('pahcl_finetune', '--pretrained none --output-dir {0}/out', '--task'),
    ('pahcl_finetune', '--task pascal --config {0}/typing_error.yaml --pretrained none',
     'sa8e_interval.*save_interval'),
    ('pahcl_finetune', '--task pascal --pretrained none --epochs 0',
     r'--epochs \(training.num_epochs\)'),
    ('pahcl_finetune', '--task pascal --pretrained none --shot-ratio 2',
     r'--shot-ratio \(few_shot\)'),
    ('pahcl_finetune', '--task pascal --pretrained none --experiment-name ../evil',
     'no name for a folder'),
    ('pahcl_evaluate', '--checkpoint {0}/none.pt --task pascal', 'none.pt'),
    ('pahcl_evaluate', '--checkpoint {0}/text.pt --task pascal --data-dir {0}/none', 'pascal'),
    ('pahcl_ensemble', '--checkpoints {0}/none_*/best_model.pt --task pascal',
     'no checkpoint matches'),
    ('pahcl_summarize', '--output-dir {0}/none', 'none'),
    ('pahcl_benchmark', 'four-tasks --raw-dir {0}/none --processed-dir {0}/none --output-dir '
     '{0}/out', 'no labels found'),
    ('pahcl_benchmark', '{0}/unknown_key.yaml', 'unknown_key.yaml: unknown key .taks.*.tasks'),
    ('pahcl_downstream', 'train circor', 'circor_murmur'),
    ('pahcl_downstream', 'train pascal --output-dir {0}/empty --data-dir {0}/none',
     'checkpoint not found')]

@pytest.mark.parametrize('name, arguments, told', BAD,
                         ids=[f'{n}-{i}' for i, (n, *_) in enumerate(BAD)])
def test_bad_input_is_one_sentence(tmp_path, name, arguments, told):
    (tmp_path/'empty').mkdir()
    (tmp_path/'text.pt').write_text('not a checkpoint')
    (tmp_path/'typing_error.yaml').write_text('training: {sa8e_interval: 10}')
    (tmp_path/'unknown_key.yaml').write_text('taks: [pascal]')
    before = sorted(tmp_path.rglob('*'))
    done = call(name, *arguments.format(tmp_path).split())
    usage = told in ('--task', 'circor_murmur')
    assert done.returncode == (2 if usage else 1) and 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f'{name}: error: ') and re.search(told, last)
    assert sorted(tmp_path.rglob('*')) == before  # nothing half-written


# what is imported before the flags are read, and what only the work needs
@pytest.mark.parametrize('module, flags', [('argparse', '--help'),
                                           ('pydantic', '--task pascal --pretrained none')])
@pytest.mark.parametrize('command', [['-m', 'pahcl.finetune'], ['{0}/pahcl_finetune']])
def test_ctrl_c_while_importing(tmp_path, command, module, flags):
    "An import that is interrupted: here of a module that ours need."
    (tmp_path/f'{module}.py').write_text('raise KeyboardInterrupt')
    # as pip writes it
    (tmp_path/'pahcl_finetune').write_text('import sys\nfrom pahcl.finetune import pahcl_finetune\n'
                                           'sys.exit(pahcl_finetune())\n')
    command = [sys.executable, *(c.format(tmp_path) for c in command), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                          env=dict(os.environ, PYTHONPATH=f'{tmp_path}:{ROOT}'))
    assert (done.returncode == 130 and done.stderr == 'pahcl_finetune: error: interrupted; '
                                                      'the same command goes on where it stopped\n'
            and not done.stdout)


def test_an_import_elsewhere_keeps_its_hook():
    done = subprocess.run([sys.executable,
                           '-c', 'import sys; before = sys.excepthook; import pahcl.core.basics; '
                                 'sys.exit(sys.excepthook is not before)'], cwd=ROOT)
    assert done.returncode == 0


@pytest.mark.parametrize('name', SCRIPTS)
def test_switches_make_no_noise(name): assert 'default: False' not in ask_help(name).stdout


@pytest.mark.parametrize('yaml, told', [
    ('num_epochs: many', "training.num_epochs is 'many'; a whole number is expected"),
    ('num_epochs: 1.5', 'training.num_epochs is 1.5; a whole number is expected'),
    ('learning_rate: fast', "is 'fast'; a number is expected"),
    ('use_amp: 1', 'use_amp is 1; true or false is expected'),
    ('learning_rate: 0', 'a number above 0 is expected'),
    ('label_smoothing: 1', 'a number below 1 is expected'),
    ('loss_type: hinge', "one of 'ce', 'focal' is expected"),
    ('batch_size:', 'batch_size is empty; a whole number is expected'),
    ('batch_size: [1]', r'batch_size is \[1\]; a whole number is expected')])
def test_a_wrong_value_is_a_sentence(tmp_path, yaml, told):
    from pahcl.core.basics import PahclError
    from pahcl.core.config import load_config
    (tmp_path/'my.yaml').write_text('training: {'+yaml+'}')
    with pytest.raises(PahclError, match=rf'my\.yaml: .*{told}\.$'):
        load_config('finetune', tmp_path/'my.yaml')
