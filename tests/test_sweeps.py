"""Every program, file and command on the page about sweeps: run with stand-ins for what is not
installed, or checked against the flags of the command
"""
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from pahcl.core.config import load_config

PAGE = Path(__file__).parents[1]/'nbs'/'tutorials'/'sweeps.ipynb'
TEXT = '\n'.join(''.join(c['source']) for c in json.loads(PAGE.read_text(encoding='utf-8'))['cells']
                 if c['cell_type'] == 'markdown')


def blocks(language): return re.findall(rf'```{language}\n(.*?)```', TEXT, re.S)


class Study:
    "A study that proposes the first value of each range, then the last."
    best_params = {}

    def optimize(self, objective, n_trials):
        assert n_trials > 1
        for self.number in range(2): assert objective(self) == self.number

    def suggest_float(self, name, low, high, log): return (low, high)[self.number]

    def suggest_categorical(self, name, choices): return choices[-self.number]


def test_optuna_calls_our_function(monkeypatch):
    trained = []

    def train(**given):
        trained.append(load_config('finetune', None, overrides=given))
        return dict(validation_loss=len(trained)-1)
    optuna = types.SimpleNamespace(create_study=lambda study_name, storage, load_if_exists: Study())
    monkeypatch.setitem(sys.modules, 'optuna', optuna)
    monkeypatch.setattr('pahcl.training.finetuning.finetune', train)
    monkeypatch.setattr('pahcl.finetune.finetune', train, raising=False)
    [program] = blocks('python')
    exec(program, {})
    assert [c.training.learning_rate for c in trained] == [1e-5, 1e-2]
    assert {c.experiment.name for c in trained} == {'sweep_0', 'sweep_1'}
    [key] = re.findall(r"finetune\(\*\*(\{.*?\})\)", TEXT)
    load_config('finetune', None, overrides=dict(task='pascal', pretrained='none') | eval(key))


def test_the_agent_of_wandb_starts_our_command(tmp_path):
    "the command that W&B makes of sweep.yaml, with `finetune` in it saying what it was called with"
    utils = pytest.importorskip('wandb.sdk.launch.sweeps.utils')
    sweep = yaml.safe_load(blocks('yaml')[0])
    values = {name: p['values'][-1] if 'values' in p else p['min']
              for name, p in sweep['parameters'].items()}
    arguments = utils.create_sweep_command_args(
        dict(args={k: dict(value=v) for k, v in values.items()}))['args']
    command = []
    for part in utils.create_sweep_command(sweep['command']):
        command += arguments if part == '${args}' else [part]
    script = tmp_path/'pahcl_finetune'
    script.write_text(f'#!{sys.executable}\nimport json, sys\n'
                      'import pahcl.training.finetuning as f\n'
                      'def say(*a, **given): print(json.dumps(given))\n'
                      'f.finetune = say\n'
                      'from pahcl.finetune import pahcl_finetune\n'
                      'sys.exit(pahcl_finetune())\n')
    script.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ['PATH']])
    done = subprocess.run(command, env=dict(os.environ, PATH=path, WANDB_RUN_ID='ab12'), text=True,
                          capture_output=True, cwd=PAGE.parents[2])
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout.splitlines()[-1])
    assert given['experiment_name'] == 'sweep_ab12' and given['task'] == 'circor_murmur'
    assert {k: given[k] for k in values} == values and values['lr'] == 1e-5
    load_config('finetune', None, overrides={k: v for k, v in given.items() if v is not None})
    assert sweep['metric'] == dict(name='validation/loss', goal='minimize')


def help_of(*program):
    return subprocess.run([sys.executable, *program, '--help'], capture_output=True, text=True,
                          cwd=PAGE.parents[2]).stdout


def flags_of(tool):
    "The help of a program, or all its flags."
    if tool == 'torchrun':
        from torch.distributed.run import get_args_parser
        return ' '.join(get_args_parser()._option_string_actions)
    if tool == 'accelerate launch':
        from accelerate.commands.launch import launch_command_parser
        return ' '.join(launch_command_parser()._option_string_actions)
    if tool == 'pahcl_ablation':   # not the first of its module
        return help_of('-c', 'from pahcl.evaluate import pahcl_ablation as f; f()')
    return help_of('-m', *dict(pahcl_preprocess=['pahcl.cycles']).get(tool, tool.split()))


@pytest.mark.parametrize('tool', ['pahcl_ablation', 'pahcl_preprocess', 'torchrun',
                                  'accelerate launch', 'dask worker'])
def test_every_flag_of_the_page_exists(tool):
    code = [*'\n'.join(blocks('sh')).splitlines(), *re.findall('`(.*?)`', TEXT)]
    lines = [line.split('#')[0].split() for line in code if re.match(rf'{tool} .*--?\w', line)]
    assert lines
    for words in lines:
        place = words.index('-m') if '-m' in words else len(words)   # ours come after it
        theirs, ours = words[:place], words[place:]
        check(flags_of(tool), theirs)
        if ours: check(help_of(*ours[:2]), ours)
    if tool == 'torchrun': check(flags_of(tool), ['--nnodes', '--rdzv_backend', '--rdzv_endpoint'])


def check(known, words):
    for word in words:
        if not word.startswith('--'): continue
        assert re.search(rf'{re.escape(word.split("=")[0])}\b', known), word
