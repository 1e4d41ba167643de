"""Every command of the guide is run as it stands, up to its work: its shell is right, its words are
flags and values of their kind
"""
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
from nbdev.config import get_config

ROOT = Path(__file__).parents[1]
PAGES = ['guide', 'guide_zh', 'tutorials/from_the_original']
SCRIPTS = dict(s.split('=') for s in get_config().d['console_scripts'].split())


def blocks(page):
    "The shell blocks of a page."
    cells = json.loads((ROOT/f'nbs/{page}.ipynb').read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return re.findall(r'```sh\n(.*?)```', text, re.S)


def commands(page):
    "Our commands on a page, as lists of words; a loop's variable is a number."
    text = '\n'.join(blocks(page)).replace('\\\n', ' ')
    found = re.findall(r'(?:torchrun [^\n]*?-m (pahcl\.\w+)|\b(pahcl_[a-z_]+))([^\n;|]*)', text)
    modules = {m.split(':')[0]: n for n, m in reversed(SCRIPTS.items())}
    return [[name or modules[module], *shlex.split(re.sub(r'\$\w+', '1', rest).split(' #')[0])]
            for module, name, rest in found]


@pytest.mark.parametrize('page', PAGES)
def test_every_block_is_shell(page):
    for block in blocks(page):
        done = subprocess.run(['bash', '-n'], input=block, text=True, capture_output=True)
        assert done.returncode == 0, f'{block}\n{done.stderr}'


class Reached(Exception): "The command has come to its work, which other tests do."


WORK = dict(   # what each command calls in the end
    pahcl_download='data.fetching.download', pahcl_simulate='data.simulation.simulate_dataset',
    pahcl_preprocess='segmentation.preprocessing.preprocess',
    pahcl_segment='segmentation.segmented_files._segment_files',
    pahcl_score_states='segmentation.folder_scoring._score_folders_in_groups',
    pahcl_prepare='data.splitting.prepare', pahcl_pretrain='training.pretraining.pretrain',
    pahcl_finetune='training.finetuning.finetune', pahcl_evaluate='evaluation.evaluator.evaluate',
    pahcl_predict='evaluation.prediction.predict', pahcl_ensemble='studies.ensemble.ensemble',
    pahcl_downstream='studies.downstream.run_downstream',
    pahcl_ablation='studies.ablation.run_ablation',
    pahcl_benchmark='studies.benchmark.run_benchmark',
    pahcl_represent='studies.representation.represent')
OTHERWISE = {'--compare': 'studies.comparison.compare_experiments',
             '--audio-dir': 'data.labelled_audio.write_recordings_table',
             '--list': 'studies.benchmark_protocol._describe_protocols',
             '--cross-validate': 'studies.benchmark.run_benchmark',
             'pahcl_summarize': 'studies.summary.summarize'}


@pytest.mark.parametrize('page', PAGES)
def test_every_command_is_run_up_to_its_work(page, capsys, monkeypatch, tmp_path):
    "Its words are flags with values of their kind, and nothing refuses them before the work."
    found = commands(page)
    monkeypatch.chdir(tmp_path)
    for name, *words in found:
        module, function = SCRIPTS[name].split(':')
        other = next((OTHERWISE[w] for w in [*words, name] if w in OTHERWISE), None)
        work = Mock(side_effect=Reached)
        monkeypatch.setattr(f'pahcl.{other or WORK[name]}', work)
        try: code = getattr(importlib.import_module(module), function)(words)
        except Reached: code = None
        except SystemExit as e: code = e.code
        said = f'{name} {shlex.join(words)}: {capsys.readouterr().err}'
        assert code is None and work.called, said
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    assert len(found) > 8


def test_every_command_is_in_the_guide():
    assert {name for name, *_ in commands('guide')} == set(SCRIPTS)


def test_explanations_stand_beside_the_code():
    "No comment at the end of a line, and no line that a page cuts off."
    for page in PAGES:
        for block in blocks(page):
            assert all(len(line) <= 88 and ' #' not in line for line in block.splitlines()), block
